"""Training a small model: it learns, stops, resumes, fits a time, and what it exports is loaded, judged, quantized."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orbitdit import OrbitQuantConfig, plan
from orbitdit.evaluate import compare
from orbitdit.integrations.folders import load_pipeline
from orbitdit.shapes.prompts import CATEGORIES, benchmark
from orbitdit.shapes.worlds import GLYPHS, SHAPES

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from training import train as script  # noqa: E402

WIDTH = {"joint_attention_dim": 24, "pooled_projection_dim": 24, "attention_head_dim": 24, "num_attention_heads": 1}
TINY = {
    "shapes": {**WIDTH, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (8, 8, 8)},
    "glyphs-sd3": {**WIDTH, "num_layers": 2, "caption_projection_dim": 24},
    "glyphs": {
        "num_layers": 2,
        "attention_head_dim": 24,
        "num_attention_heads": 1,
        "cross_attention_dim": 24,
        "caption_channels": 24,
    },
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, changes in TINY.items():
        recipe = script.RECIPES[name]
        small = recipe._replace(config=recipe.config | changes, width=24, batch=4)
        monkeypatch.setitem(script.RECIPES, name, small)


def train(monkeypatch, out, *arguments, model="glyphs"):
    """Train with these arguments; the log, line by line."""
    quick = ["--per-category", 1, "--samplers", 1]
    monkeypatch.setattr(sys, "argv", ["train", model, "--out", str(out), *map(str, [*quick, *arguments])])
    script.main()
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("model", "world"), [("shapes", SHAPES), ("glyphs", GLYPHS), ("glyphs-sd3", GLYPHS)])
def test_the_exported_folder_is_loaded_judged_and_quantized(monkeypatch, tmp_path, model, world):
    log = train(monkeypatch, tmp_path, "--steps", 2, model=model)
    assert list(log[-2])[-7:] == [*CATEGORIES, "overall"]
    pipeline = load_pipeline(tmp_path / "pipeline", torch.float32)
    assert pipeline.world is world
    counts = plan(pipeline.transformer, OrbitQuantConfig("w2a4")).counts
    assert counts == {"shapes": (17, 3, 8), "glyphs": (20, 0, 6), "glyphs-sd3": (21, 4, 7)}[model]
    prompts = [p.text for p in benchmark(1, world=world)]
    results = compare(tmp_path / "pipeline", [OrbitQuantConfig("w2a4")], prompts, num_inference_steps=1)
    assert all(r.right == [False] * 6 for r in results)  # untrained: judged, and wrong
    assert set(results[0].scores(prompts)) == {*CATEGORIES, "overall"}


def test_a_run_that_stops_goes_on_as_if_it_had_not(monkeypatch, tmp_path):
    train(monkeypatch, tmp_path / "whole", "--steps", 3)
    for stop in (0, float("inf")):
        with monkeypatch.context() as patch:
            patch.setattr(script.Run, "seconds", property(lambda run: float(run.step)))
            log = train(monkeypatch, tmp_path / "parts", "--steps", 3, "--stop-after", min(stop + 1, 9))
    assert [row["first_step"] for row in log if "first_step" in row] == [0, 1]
    whole, parts = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 3
    for key in ("net", "ema"):
        assert whole[key].keys() == parts[key].keys()
        assert all(torch.equal(tensor, parts[key][name]) for name, tensor in whole[key].items())


def test_the_loss_falls(monkeypatch, tmp_path):
    monkeypatch.setattr(script, "WARMUP", 5)
    args = script.argparse.Namespace(model="glyphs", out=tmp_path, steps=60, seed=1, fit=None)
    run = script.Run(args, "cpu")
    batches = script.Batches(GLYPHS, 8, 1, "cpu")
    losses = [run.advance(batches.draw(step)).item() for step in range(30)]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    assert not any(parameter.requires_grad for parameter in run.ema.parameters())


def test_fit_chooses_the_steps_once(monkeypatch, tmp_path):
    """With a clock of a second a step, 2 steps measured from 2 to 4, and 9 seconds: 9 steps; resuming keeps them."""
    monkeypatch.setattr(script, "FIT_FROM", 2)
    monkeypatch.setattr(script, "FIT_TO", 4)
    monkeypatch.setattr(script.Run, "seconds", property(lambda run: float(run.step)))
    for stop in (6, 99):
        log = train(monkeypatch, tmp_path, "--fit", 9, "--stop-after", stop)
    assert [(row["step"], row["steps"]) for row in log if "seconds_per_step" in row] == [(4, 9)]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 9


def test_a_fit_needs_steps_to_measure(monkeypatch, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(monkeypatch, tmp_path, "--fit", 9, "--steps", 100)
    assert re.search(r"--fit measures steps 40 to 140", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["glyphs", "glyphs-sd3"])
def test_a_trained_model_draws_its_own_world(name):
    folder, recipe = ROOT / "training" / "models" / name, script.RECIPES[name]
    if not folder.is_dir():
        pytest.skip(f"training/models/{name} is in the history: training/README.md says how to bring it back")
    pipeline = load_pipeline(folder, torch.float32)
    assert (pipeline.world, type(pipeline.transformer)) == (recipe.world, recipe.cls)
    prompts = [p.text for p in benchmark(1, world=recipe.world)]
    assert sum(compare(folder, [], prompts, num_inference_steps=12)[0].right) >= 4


def test_the_commands_that_bring_trained_models_back_name_them():
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"git archive --prefix=training/models/(\S+)/ (\S+) \| tar x", text)
    assert [name for name, _ in commands] == ["glyphs", "glyphs-sd3"]
    for name, tree in commands:
        git = ["git", "-C", str(ROOT), "show", f"{tree}/transformer/config.json"]
        shown = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
        if shown is None or shown.returncode:
            pytest.skip("this checkout is without its history")
        assert json.loads(shown.stdout)["_class_name"] == script.RECIPES[name].cls.__name__
