"""The measurement of all methods: its lines, its metrics, and the page that is made of them."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from scipy.special import betainc
from scipy.stats import kstest

from baselines import METHODS
from orbitdit import cli
from orbitdit.errors import CheckpointError, ConfigError
from orbitdit.lines import append_line, read_lines, resume_lines
from orbitdit.metrics import ssim
from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.prompts import CATEGORIES
from scripts import mechanism, quality, quality_page
from scripts.variants import VARIANTS
from tiny import tiny_pipeline

ROOT = Path(__file__).parent.parent


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def ssim_by_scipy(x, y):
    weights = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weights /= weights.sum()

    def blur(z):
        return correlate1d(correlate1d(z, weights, axis=1), weights, axis=2)[:, 5:-5, 5:-5]

    x, y = x.astype(np.float64), y.astype(np.float64)
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = 6.5025, 58.5225
    return (((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


@pytest.mark.parametrize("shape", [(1, 11, 13, 1), (3, 17, 11, 3), (103, 12, 12, 2)])
def test_ssim_is_that_of_another_calculation(shape):
    x, noise = pictures(*shape), pictures(*shape, seed=1)
    y = (0.7 * x + 0.3 * noise).astype(np.uint8)
    assert ssim(x, y) == pytest.approx(ssim_by_scipy(x, y), abs=1e-9)
    assert ssim(x, x) == pytest.approx(1)
    assert ssim(x, noise) < ssim(x, y) < 1


def test_ssim_refuses_what_has_no_window():
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(pictures(1, 10, 64, 3), pictures(1, 10, 64, 3))
    with pytest.raises(ValueError, match="one shape"):
        ssim(pictures(1, 12, 12, 3), pictures(2, 12, 12, 3))


def test_lines_survive_a_stop(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    assert resume_lines(path) == ([], "")
    append_line(path, {"a": 1})
    append_line(path, {"a": 2})
    assert resume_lines(path) == ([{"a": 1}, {"a": 2}], "")
    with path.open("a") as file:
        file.write('{"a": 3')
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    rows, message = resume_lines(path)
    assert rows == [{"a": 1}, {"a": 2}]
    assert "unfinished" in message
    append_line(path, {"a": 3})
    assert path.read_text() == '{"a": 1}\n{"a": 2}\n{"a": 3}\n'
    path.write_text('{"a": 1}\n[2]\n{"a": 3}\n')
    with pytest.raises(CheckpointError, match=r"lines\.jsonl, line 2 is no JSON object"):
        resume_lines(path)
    with pytest.raises(CheckpointError, match="cannot be written"):
        append_line(tmp_path, {})
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_lines(tmp_path / "none")
    with pytest.raises(CheckpointError, match="cannot be made"):
        resume_lines(path / "below" / "a.jsonl")


def test_the_most_telling_runs_come_first():
    runs = quality.runs_of(["a", "b"])
    assert len(set(runs)) == len(runs)
    assert [r.name for r in runs[:4]] == ["a/full/-/0", "b/full/-/0", "a/orbitdit/W2A4/0", "b/orbitdit/W2A4/0"]
    ours = Counter((r.bits, r.seed) for r in runs if (r.model, r.method) == ("a", "orbitdit"))
    assert ours == Counter((bits, seed) for bits in quality.BITS for seed in quality.SEEDS)
    assert {r.seed for r in runs if r.method == "svdquant"} == {0}
    assert {r.method for r in runs} == {"full", *quality.OURS, *METHODS}
    assert [r.seed for r in runs] == sorted(r.seed for r in runs)
    assert set(quality.TITLES) == {r.method for r in runs}


def test_runs_of_variants_have_no_line_that_the_table_has():
    names = {r.name for r in quality.runs_of(["a"], variants=True)}
    assert {"a/base/W2A4/0", "a/token-mean/W2A3/2", "a/allotted/W3A3/1"} < names
    assert "a/allotted/W2A4/0" not in names
    assert {name.split("/")[1] for name in names} == set(VARIANTS)


def test_shards_are_all_runs():
    runs = quality.runs_of(["a", "b"])
    shards = [quality.shard_of(f"{i}/3", runs) for i in (1, 2, 3)]
    assert sorted(run for shard in shards for run in shard) == sorted(runs)
    assert [shard[0] for shard in shards] == runs[:3]
    assert quality.shard_of("1/1", runs) == runs


@pytest.fixture
def measure(folders, tmp_path):
    """Run the measurement on both tiny models; gives the lines of the file."""

    def run(*arguments):
        models = [f"--model={name}={folders / name}" for name in ("shapes", "glyphs")]
        fixed = ["--out", str(tmp_path / "lines.jsonl"), "--per-category", "1", "--steps", "1", "--device", "cpu"]
        quality.main([*fixed, *models, "--commit", "abc", *map(str, arguments)])
        return read_lines(tmp_path / "lines.jsonl")

    return run


def test_runs_are_measured_once_and_go_on_after_a_stop(measure, tmp_path, capsys):
    chosen = [f"--only=*/{glob}" for glob in ("full/*", "orbitdit/W2A4/0", "paper/W2A4/0", "quarot-gptq/W4A4/1")]
    lines = measure(*chosen)
    assert [(r["model"], r["method"], r["status"]) for r in lines] == [
        (m, name, "ok") for name in ("full", "orbitdit", "paper", "quarot-gptq") for m in ("shapes", "glyphs")
    ]
    full, ours, paper, theirs = lines[::2]
    assert (full["psnr_db"], full["ssim"], full["effective_bits"]) == (None, None, 16)
    assert list(full["scores"]) == [*CATEGORIES, "overall"]
    assert 5 < ours["psnr_db"] < theirs["psnr_db"] < 100
    assert 0 < ours["ssim"] < theirs["ssim"] < 1
    assert 2 < ours["effective_bits"] == paper["effective_bits"] < 2.4
    assert ours["psnr_db"] != paper["psnr_db"]
    assert 4 < theirs["effective_bits"] < 4.4
    assert ours["layer_bytes"] < theirs["layer_bytes"]
    assert (ours["commit"], ours["per_category"], ours["steps"]) == ("abc", 1, 1)
    assert ours["torch"] == torch.__version__
    assert "[8/8] glyphs/quarot-gptq/W4A4/1: score" in capsys.readouterr().out
    path = tmp_path / "lines.jsonl"
    text = path.read_text()
    path.write_text(text[:-30])
    assert len(measure(*chosen)) == 8
    said = capsys.readouterr().out
    assert "the last line was unfinished" in said
    assert "7 of 8 runs are in" in said
    assert path.read_text().startswith("".join(text.splitlines(keepends=True)[:7]))
    assert {k: v for k, v in read_lines(path)[-1].items() if k in FIGURES} == {
        k: v for k, v in lines[-1].items() if k in FIGURES
    }


FIGURES = ("scores", "psnr_db", "ssim", "effective_bits", "layer_bytes")


def test_the_deadline_leaves_runs_for_another_time(measure, capsys, monkeypatch):
    monkeypatch.setattr(quality.time, "monotonic", iter(range(0, 1000, 10)).__next__)
    lines = measure("--only", "*/rtn/*", "--deadline", "45")
    assert 0 < len(lines) < 10
    assert f"the deadline left {10 - len(lines)} runs" in capsys.readouterr().out


def test_a_run_that_fails_is_recorded_and_tried_again(measure, monkeypatch):
    only = ["--only", "shapes/rtn/W2A4/0"]

    def broken(*arguments):
        raise ConfigError("no\nluck")

    with monkeypatch.context() as patch:
        patch.setattr(quality.baselines, "quantize_", broken)
        assert [(r["status"], r["note"]) for r in measure(*only)] == [("failed", "ConfigError: no luck")]
    assert [r["status"] for r in measure(*only)] == ["failed", "ok"]
    assert len(measure(*only)) == 2


def test_bad_use_is_one_line(measure, folders, tmp_path):
    with pytest.raises(SystemExit, match="matches no run, such as"):
        measure("--only", "nothing")
    for shard in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises(SystemExit, match=f"--shard '{shard}' is not I/N"):
            measure("--shard", shard)
    with pytest.raises(SystemExit, match="'glyph' is not NAME=FOLDER"):
        quality.main(["--out", str(tmp_path / "a.jsonl"), "--model", "glyph"])
    out = tmp_path / "a.jsonl"
    for script in (quality, mechanism):
        with pytest.raises(SystemExit, match="transformer is no pipeline of a world"):
            script.main(["--out", str(out), "--model", f"b={folders / 'shapes' / 'transformer'}"])
        with pytest.raises(SystemExit, match=r"nowhere is no folder: training/README\.md says how"):
            script.main(["--out", str(out), "--model", "b=nowhere"])
    assert not out.exists()
    assert quality.models_of(["embedded", "b=c"]) == {"embedded": MODEL_DIR, "b": Path("c")}
    with pytest.raises(ConfigError, match="no pipeline of a world"):
        quality.Subject(folders / "shapes" / "transformer", "cpu", 1, 1)


@pytest.mark.parametrize("dim", [3, 64, 1280])
def test_distances_are_kolmogorov_and_smirnovs(dim):
    x = torch.randn(40, dim, generator=torch.Generator().manual_seed(dim)).double()
    values = (x / x.norm(dim=1, keepdim=True)).flatten()[:777]

    def exact(z):
        above = 0.5 * betainc((dim - 1) / 2, 0.5, 1 - z**2)
        return np.where(z > 0, 1 - above, above)

    for shifted in (values, (values + 0.5 * dim**-0.5).clamp(-1, 1), values.abs()):
        expected = kstest(shifted.numpy(), exact).statistic
        assert mechanism.ks_distance(shifted, dim) == pytest.approx(expected, abs=1e-4)


def test_a_rotation_brings_few_large_channels_to_the_density():
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    x[:, :3] *= 30
    x[7] = 0
    raw, rotated = mechanism.distances(x)
    assert rotated < 0.08 < 0.3 < raw
    assert mechanism.distances(torch.zeros(4, 8)) == (1.0, 1.0)


def test_the_mechanism_has_a_row_for_each_layer_and_branch(folders, tmp_path):
    out = tmp_path / "m.jsonl"
    arguments = ["--out", str(out), "--prompts", "6", "--steps", "2", "--device", "cpu", "--commit", "abc"]
    mechanism.main([*arguments, "--model", f"glyphs={folders / 'glyphs'}"])
    rows = read_lines(out)
    layers = list(dict.fromkeys(r["layer"] for r in rows))
    assert [(r["layer"], r["branch"]) for r in rows] == [(n, b) for n in layers for b in mechanism.BRANCHES]
    assert all(len(r["raw"]) == len(r["rotated"]) == 2 for r in rows)
    assert all(0 < v <= 1 for r in rows for v in r["raw"] + r["rotated"])
    assert {r["commit"] for r in rows} == {"abc"}
    with pytest.raises(ConfigError, match="13 prompts are no single batch"):
        mechanism.measure(tiny_pipeline("glyphs"), ["transformer"], [""] * 13, 1)


def line(method, bits, seed, overall, status="ok", model="embedded", **more):
    scores = dict.fromkeys(CATEGORIES, overall) | {"overall": overall}
    facts = {"psnr_db": 20.0, "ssim": 0.5, "effective_bits": int(bits[1]) + 0.04 if bits else 16.0, "quantize_s": 1.5}
    facts |= {"gpu": "NVIDIA H200", "torch": "2.11", "diffusers": "0.42", "commit": "abc", "date": "2026-11-25"}
    run = {"model": model, "method": method, "bits": bits, "seed": seed, "status": status, "scores": scores}
    return {**run, **facts, "per_category": 200, "steps": 12, **more}


def distances(branch, raw):
    facts = {"model": "embedded", "component": "transformer", "layer": "a", "dim": 64, "branch": branch}
    return {**facts, "raw": raw, "rotated": [0.01, 0.02]}


@pytest.fixture
def docs(tmp_path):
    """A docs folder with lines of two models."""
    rows = [
        line("full", "", 0, 0.8),
        line("orbitdit", "W2A4", 0, 0.70),
        line("orbitdit", "W2A4", 1, 0.74),
        line("orbitdit", "W2A3", 0, 0.4),
        line("paper", "W2A4", 0, 0.72 - 0.001),
        line("svdquant", "W2A4", 0, 0.76, effective_bits=5.2),
        line("rtn", "W2A4", 0, 0.99, per_category=1),
        line("convrot", "W2A4", 0, 0.1, status="failed", note="ConfigError: no"),
        line("quarot", "W2A4", 0, 0.3),
        line("quarot", "W2A4", 0, 0.2),
        line("orbitdit", "W4A4", 0, 0.5, model="other"),
        distances("with prompt", [0.1, 0.4]),
        distances("without", [0.2, 0.3]),
    ]
    (tmp_path / "quality").mkdir()
    (tmp_path / "quality" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page_says_what_the_lines_say(docs):
    quality_page.main(["--docs", str(docs)])
    text = (docs / "quality.md").read_text(encoding="utf-8")
    assert "| orbitdit | 0.04 | 0.900 ± 0.035 | - | - | **0.500** | - |" in text
    assert "| OrbitQuant, the paper's recipe | 0.04 | 0.899 | - | - | - | - |" in text
    assert "| SVDQuant, rank 32 | 3.20 | **0.950** | - | - | - | - |" in text
    assert "| QuaRot | 0.04 | 0.250 | - | - | - | - |" in text
    ours = "| orbitdit | 2.04 | 0.720 ± 0.028 | 0.72 | 0.72 | 0.72 | 0.72 | 0.72 | 0.72 | 20.0 | 0.500 | 2 | 1.5 |"
    assert ours in text
    assert "RTN" not in text
    assert "- ConvRot, W2A4: ConfigError: no" in text
    assert "## other\n\nFull precision was not measured" in text
    assert "| embedded | with prompt | 0.250 | 0.400 | 0.015 | 0.020 |" in text
    assert "Full precision scores 0.800 in 12 steps. Measured on NVIDIA H200; torch 2.11;" in text
    figure = (docs / "quality" / "mechanism-embedded.svg").read_text(encoding="utf-8")
    assert figure.startswith("<svg ")
    assert figure.count("<circle") == 2
    assert figure.count("<polyline") == 4
    quality_page.main(["--docs", str(docs), "--check"])
    (docs / "quality" / "mechanism-embedded.svg").write_text("by hand")
    with pytest.raises(SystemExit, match=r"mechanism-embedded\.svg is not up to date"):
        quality_page.main(["--docs", str(docs), "--check"])


def test_the_page_tells_what_was_tried_beyond(docs):
    quality_page.main(["--docs", str(docs)])
    without = (docs / "quality.md").read_text(encoding="utf-8")
    assert "tried beyond" not in without
    run = {"model": "embedded", "what": "variant", "name": "base", "bits": "W3A3", "seed": 0}
    run |= {"error": 0.0156, "guided": 0.0625}
    facts = {"per_category": 1, "steps": 12, "states": 12, "torch": "2.11", "commit": "abc", "date": "2026-11-25"}
    (docs / "quality" / "variants.jsonl").write_text(json.dumps(run | facts) + "\n")
    quality_page.main(["--docs", str(docs)])
    text = (docs / "quality.md").read_text(encoding="utf-8")
    start, end = text.index("## What was tried beyond"), text.index("## Why one codebook serves all")
    assert text[:start] + text[end:] == without
    assert "| trellis codes and unbiased rows | 1 (0.062) |" in text[start:end]
    assert "| trellis codes and unbiased rows | 1 (0.016) |" in text[start:end]


def test_the_page_compares_pictures_of_variants_with_the_base_of_the_same_seeds(docs):
    facts = {"per_category": 1, "steps": 12, "states": 12, "torch": "2.11", "commit": "abc", "date": "2026-11-25"}
    run = {"model": "embedded", "what": "variant", "name": "base", "bits": "W3A3", "seed": 0, "error": 1, "guided": 1}
    (docs / "quality" / "variants.jsonl").write_text(json.dumps(run | facts) + "\n")
    found = [
        line("orbitdit-rows", "W2A4", 0, 0.6, psnr_db=20.0),
        line("orbitdit-rows", "W2A4", 1, 0.4, psnr_db=18.0),
        line("token-mean", "W2A4", 0, 0.68, psnr_db=20.5),
        line("token-mean", "W2A4", 1, 0.48, psnr_db=19.5),
        line("token-mean", "W2A4", 2, 0.1, psnr_db=10.0),
        line("token-mean", "W2A4", 0, 0.1, psnr_db=10.0, status="failed", note="ConfigError: no"),
        line("token-mean", "W2A4", 0, 0.1, psnr_db=10.0, model="without"),
    ]
    (docs / "quality" / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    quality_page.main(["--docs", str(docs)])
    text = (docs / "quality.md").read_text(encoding="utf-8")
    title = VARIANTS["token-mean"].title
    assert f"| {title} | - | +0.100, +1.0 dB (2) | - | - | - | - |" in text
    assert text.index(title) > text.index("## What was tried beyond")


@pytest.mark.parametrize("name", ["token-mean", "own-mean"])
def test_variants_are_measured_as_methods_are(measure, name):
    assert name == "token-mean" or VARIANTS[name].looks
    row = measure("--variants", "--only", f"glyphs/{name}/W2A3/1")[0]
    assert (row["method"], row["bits"], row["seed"], row["status"]) == (name, "W2A3", 1, "ok"), row
    assert 2 < row["effective_bits"] < 3


def test_without_lines_the_page_says_so(tmp_path):
    (tmp_path / "quality").mkdir()
    quality_page.main(["--docs", str(tmp_path)])
    text = (tmp_path / "quality.md").read_text(encoding="utf-8")
    assert "No line of the full table has been measured" in text


def test_the_committed_page_is_up_to_date():
    quality_page.main(["--check"])


def test_orbitdit_evaluate_writes_lines_and_goes_on(folders, tmp_path, monkeypatch, capsys):
    out = tmp_path / "e.jsonl"

    def run(*bits, recipes=()):
        given = [part for b in bits for part in ("--bits", b)] + [part for r in recipes for part in ("--recipe", r)]
        fixed = ["--rotation-seed", "5", "--per-category", "1", "--steps", "1", "--device", "cpu", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["orbitdit", "evaluate", str(folders / "glyphs"), *fixed, *given])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
        return capsys.readouterr()

    run("w4a4")
    assert [r["label"] for r in read_lines(out)] == ["full precision", "W4A4"]
    out.write_text(out.read_text() + '{"torn')
    said = run("w4a4", "w2a4")
    assert "unfinished" in said.err
    assert "1 of 2 are in" in said.out
    rows = read_lines(out)
    assert [r["label"] for r in rows] == ["full precision", "W4A4", "W2A4"]
    assert [r["config"] and r["config"]["seed"] for r in rows] == [None, 5, 5]
    assert rows[1]["psnr_db"] > rows[2]["psnr_db"]
    assert rows[1]["ssim"] > rows[2]["ssim"]
    assert list(rows[0]["scores"]) == [*CATEGORIES, "overall"]
    assert "2 of 2 are in" in run("w4a4", "w2a4").out
    assert len(read_lines(out)) == 3
    assert "1 of 2 are in" in run("w2a4", recipes=("best", "paper")).out
    assert [r["config"]["scale"] for r in read_lines(out)[2:]] == ["unbiased", "norm"]
