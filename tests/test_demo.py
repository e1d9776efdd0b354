"""The demo's whole path at reduced size: `orbitdit compare` and `generate`, the figures, the grid, the table."""

import json
import sys
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from orbitdit import OrbitQuantConfig, report
from orbitdit.cli import main
from orbitdit.evaluate import FULL_PRECISION, Result, compare, generate
from orbitdit.metrics import IDENTICAL_DB, psnr
from orbitdit.report import GAP, LABEL, RIGHT, TILE, WRONG, environment, picture_grid
from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.prompts import CATEGORIES, benchmark

MOST_KEPT = dict.fromkeys(["*transformer_blocks.[1-9]*.*", "*.ff*", "*.proj_*", "*.add_*"], "keep")
"""Rules that leave some of the first blocks to be quantized: the search for trellis codes takes its time on a CPU."""


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["orbitdit", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def read(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One run of the demo with a prompt a category and two steps; what it printed and its folder."""
    out = tmp_path_factory.mktemp("demo") / "out"
    with pytest.MonkeyPatch.context() as patch:
        options = ("--recipe", "paper", "--steps", 2, "--device", "cpu", "--out", out)
        code = run(patch, "compare", "--per-category", 1, *options)
    assert not code
    return out


def test_the_figures_are_those_of_the_plan(compared):
    figures = json.loads((compared / "results.json").read_text())
    assert figures["prompts"] == [p.text for p in benchmark(1)]
    full, w4a4, w2a4 = figures["results"]
    assert [r["label"] for r in figures["results"]] == [FULL_PRECISION, "W4A4", "W2A4"]
    assert full["psnr_db"] is None
    assert full["effective_bits"] == 16
    # 11.0M weights in 76 layers, 3.9M in 14 modulation layers: codes, row or group scales, biases
    assert (full["layer_bytes"], w4a4["layer_bytes"], w2a4["layer_bytes"]) == LAYER_BYTES
    assert w4a4["effective_bits"] == pytest.approx(4.044, abs=1e-3)
    assert w2a4["effective_bits"] == pytest.approx(2.044, abs=1e-3)
    assert 5 < w2a4["psnr_db"] < w4a4["psnr_db"] < 60
    assert all(list(r["scores"]) == [*CATEGORIES, "overall"] for r in figures["results"])
    assert all(r["seconds"] > 0 for r in figures["results"])
    assert figures["environment"]["torch"] == torch.__version__
    assert figures["settings"] == {
        "model": "embedded",
        "device": "cpu",
        "seed": 0,
        "rotation_seed": 0,
        "recipe": "paper",
        "rules": [],
        "num_inference_steps": 2,
    }


LAYER_BYTES = (29975552, 7745536, 4993024)


@pytest.mark.parametrize("told", ["2.13.0", "2.13.0+cpu", "2.14.1+cu130"])
def test_torch_is_recorded_with_its_build(told, monkeypatch):
    """A CUDA build of PyPI is "2.14.1" in its wheel's metadata and "2.14.1+cu130" in what it says of itself."""
    monkeypatch.setattr(torch, "__version__", told)
    monkeypatch.setattr(report, "version", lambda name: told.partition("+")[0])
    assert environment()["torch"] == told


def test_packages_that_are_not_imported_are_recorded_too(monkeypatch):
    monkeypatch.setattr(report, "PACKAGES", ("scipy", "no-such-package"))
    monkeypatch.delitem(sys.modules, "scipy", raising=False)
    found = environment()
    assert (found["scipy"], found["no-such-package"]) == (version("scipy"), "not installed")


def test_the_grid_has_a_row_for_each_prompt_and_a_column_for_each_model(compared):
    with Image.open(compared / "grid.png") as grid:
        assert grid.width >= LABEL + 3 * (TILE + GAP)
        assert grid.height >= 6 * (TILE + GAP)
    assert {p.name for p in compared.iterdir()} == {"grid.png", "index.html", "results.json"}


def test_right_and_wrong_are_marked_on_each_picture():
    pictures = np.zeros((2, 64, 64, 3), np.uint8)
    results = [Result("a", pictures, [True, False], 1, 4.0, None, 1.0), Result("b", pictures, [None] * 2, 1, 4.0, 9, 1)]
    grid = np.asarray(picture_grid(results, ["a circle", "a longer prompt that must be broken into several lines"]))
    rgb = {name: tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for name, c in (("right", RIGHT), ("wrong", WRONG))}
    count = {name: int((grid == colour).all(-1).sum()) for name, colour in rgb.items()}
    frame = 4 * 3 * TILE
    assert frame < count["right"] < 2 * frame
    assert frame < count["wrong"] < 2 * frame


def test_the_table_and_the_paths_are_printed(monkeypatch, capsys, tmp_path):
    options = ["--prompt", "a red circle", "--prompt", "a circle left of a square", "--bits", "w3a3", "--recipe=paper"]
    code = run(monkeypatch, "compare", *options, "--steps", 1, "--device", "cpu", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert not code
    for text in ("W3A3", "right pictures: colours", "right pictures: position", "PSNR", "MB", "bits", "seconds"):
        assert text in printed
    assert "counting" not in printed
    assert str(tmp_path / "grid.png") in printed


def test_pictures_are_the_same_from_any_batch_and_setting_of_the_noise_seed():
    texts = [p.text for p in benchmark(3)][:14]
    whole = compare(MODEL_DIR, [], texts, num_inference_steps=1)[0].pictures
    tail = compare(MODEL_DIR, [], texts[12:], seed=12, num_inference_steps=1)[0].pictures
    assert np.abs(whole[12:].astype(int) - tail).max() <= 8  # bf16 products of another batch size


def test_two_runs_give_the_same_pictures():
    config = [OrbitQuantConfig("w2a4", trellis_states=8, rules=tuple(MOST_KEPT.items()))]
    first, second = (compare(MODEL_DIR, config, ["two circles"], num_inference_steps=1)[1] for _ in range(2))
    np.testing.assert_array_equal(first.pictures, second.pictures)


def test_generate_writes_a_picture_for_each_prompt(monkeypatch, capsys, tmp_path):
    arguments = ["--prompt", "a circle", "--prompt", "two squares", "--bits", "w4a4", "--steps", 1, "--device", "cpu"]
    assert not run(monkeypatch, "generate", *arguments, "--out", tmp_path / "p")
    assert [read(path).shape for path in sorted((tmp_path / "p").glob("*.png"))] == [(64, 64, 3)] * 2
    assert "2 pictures" in capsys.readouterr().out


def test_a_quantized_folder_is_generated_from_as_it_is(monkeypatch, tmp_path):
    rules = [f"--rule={glob}={action}" for glob, action in MOST_KEPT.items()]
    assert not run(monkeypatch, "quantize", "--bits", "w2a4", *rules, "--out", tmp_path / "model")
    shared = ["--prompt", "a circle", "--steps", 1, "--device", "cpu"]
    assert not run(monkeypatch, "generate", tmp_path / "model", *shared, "--out", tmp_path / "stored")
    assert not run(monkeypatch, "generate", *shared, "--bits", "w2a4", *rules, "--out", tmp_path / "loaded")
    stored, loaded = (read(tmp_path / name / "000.png") for name in ("stored", "loaded"))
    assert np.abs(stored.astype(int) - loaded).max() <= 8


def test_a_video_pipeline_gives_its_first_frame():
    class Video:
        def set_progress_bar_config(self, **kwargs):
            pass

        def __call__(self, prompt, output_type, generator):
            frames = torch.rand(len(prompt), 5, 4, 4, 3, generator=generator).numpy()
            return SimpleNamespace(frames=frames)

    pictures, seconds = generate(Video(), ["a", "b"], seed=4)
    assert pictures.shape == (2, 4, 4, 3)
    expected = torch.rand(1, 5, 4, 4, 3, generator=torch.Generator().manual_seed(5))[0, 0] * 255
    np.testing.assert_array_equal(pictures[1], expected.round().to(torch.uint8).numpy())
    assert seconds >= 0


def test_psnr_against_a_hand_calculation():
    reference = np.zeros((2, 2, 2, 3), np.uint8)
    other = reference.copy()
    other[0] = 255
    assert psnr(other, reference) == pytest.approx((0 + IDENTICAL_DB) / 2)
    other[0], other[1] = 51, 255
    assert psnr(other, reference) == pytest.approx(10 * np.log10(25) / 2)
    with pytest.raises(ValueError, match="one shape"):
        psnr(other, reference[:1])
