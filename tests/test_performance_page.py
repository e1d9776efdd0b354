"""The performance page: what it says of result lines, and that the committed one is up to date."""

import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from parameters import BENCHMARK_RUN

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402


def line(suite, case, provider, status="ok", **facts):
    return {"suite": suite, "case": case, "provider": provider, "status": status, **facts, **BENCHMARK_RUN}


def times(median):
    return {"median_us": median, "p20_us": median - 1, "p80_us": median + 1, "repeats": 30, "error": 0.1, "bound": 0.2}


@pytest.fixture
def results(tmp_path):
    """A folder of results: kernels, layers and models, with a slower, a refused, a failed and a replaced row."""
    flops = {"flops": 2 * 4608 * 3072 * 3072, "bytes": 60_000_000, "tflops": 700.0}
    layer = partial(line, "layers", "layer 4608, 3072 to 3072")
    step = {"first_step_s": 9.0, "quantize_s": 1.5, "peak_gb": 6.9, "model_gb": 6.1, "graphs": 2, "graphs_later": 0}
    step |= {"flops": 59_510_000_000_000, "attention_flops": 14_870_000_000_000}
    rows = [
        line("kernels", "encode 4608x3072", "copy", bytes=42_467_328, tbps=2.9, **times(14.0)),
        line("kernels", "encode 4608x3072", "e4m3", bytes=42_467_328, tbps=2.1, **times(20.0)),
        layer("bf16", peak="bf16", **flops, **times(999.0)),
        layer("bf16", peak="bf16", **flops, **times(120.0)),
        layer("W4A4", peak="e4m3", **flops, **times(80.0)),
        layer("orbitquant W4A4", peak="int8", **flops, **times(160.0)),
        layer("sdnq int8", "refused", error=1.4, bound=0.02, note="the correctness gate is red"),
        layer("torchao int8", "failed", note="ImportError: no | torchao"),
        layer("W4A4", "skipped", note="deadline"),
        line("layers", "unmeasured", "W4A4", "skipped", note="deadline"),
        line("models", "FLUX.1-dev", "bf16 compiled", peak="bf16", **step, **times(131_000.0)),
        line("models", "FLUX.1-dev", "W4A4 compiled", peak="e4m3", **step, **times(87_000.0)),
    ]
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_report_has_the_steps_of_gpus(results):
    facts = {"queue_us": 66_000.0, "gpu_busy_us": 84_000.0, "gpu_kernels": 2345}
    step = {"first_step_s": 9.0, "quantize_s": 1.5, "peak_gb": 6.9, "model_gb": 6.1, "graphs": 2, "graphs_later": 0}
    step |= {"flops": 59_510_000_000_000, "attention_flops": 14_870_000_000_000, **facts}

    def graph(median):
        spread = {"graph_us": median, "graph_p20_us": median - 100, "graph_p80_us": median + 100}
        return {**spread, "graph_equal": True, "graph_held_gb": 0.5}

    model = partial(line, "models", "another model")
    rows = [
        model("bf16 compiled", peak="bf16", **step, **times(131_000.0), **graph(126_000.0)),
        model("W4A4 compiled", peak="e4m3", **step, **times(97_000.0), **graph(90_000.0)),
        model("peer compiled", peak="e4m3", **step, **times(99_000.0), graph_note="RuntimeError: a | b"),
        model("W4A4", peak="e4m3", **{**step, "gpu_kernels": 3000}, **times(138_000.0)),
    ]
    assert "Where a step's time goes" not in report.page(report.read(results))
    (results / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report.page(report.read(results))
    start = "| another model |"
    assert f"{start} W4A4 compiled | 97.0 | 66.0 | 84.0 | 2,345 | 90.0 | 89.9 to 90.1 | 1.40x | 0.50 |" in text
    assert f"{start} peer compiled | 99.0 | 66.0 | 84.0 | 2,345 | - | - | - | RuntimeError: a / b |" in text
    assert f"{start} W4A4 | 138.0 | 66.0 | 84.0 | 3,000 | - | - | - | - |" in text


def test_the_report_says_what_the_lines_say(results):
    text = report.page(report.read(results))
    assert "| layer 4608, 3072 to 3072 | 120 | 1.50x | **0.75x** | refused | failed |" in text
    assert "| layer 4608, 3072 to 3072 | W4A4 | 80.0 | 79.0 to 81.0 | 700 TFLOP/s | 1.50x | 55% | 0.1000 |" in text
    assert "| encode 4608x3072 | e4m3 | 20.0 | 19.0 to 21.0 | 2.10 TB/s | **0.70x** | 44% | 0.1000 |" in text
    assert "| FLUX.1-dev | W4A4 compiled | 87.0 | 87.0 to 87.0 | - | 1.51x | 52% | 9.0 | 1.5 | 6.90 | 6.10 |" in text
    assert "sdnq int8: refused: the correctness gate is red (error 1.400, at most 0.020)" in text
    assert "torchao int8: failed: ImportError: no / torchao" in text
    assert "torch 2.11.0+cu130; triton 3.6.0; cuda 13.0; torchao 0.18.0; commit abc; measured 2026-11-24" in text
    assert "| unmeasured | - | skipped | - | - | - |" in text
    assert Counter(text.splitlines())["## NVIDIA H200"] == 1


def test_nothing_that_was_measured_is_faster_than_its_floor():
    rows = [row for row in report.read(ROOT / "benchmarks/results") if row["gpu"] in report.LIMITS]
    timed = [row for row in rows if row["status"] == "ok"]
    assert len(timed) > 100
    assert [row["case"] for row in timed if report.floor_us(row) > row["median_us"]] == []


def test_a_gpu_without_known_limits_has_no_floor():
    row = line("layers", "a", "W4A4", peak="e4m3", flops=1, bytes=1) | {"gpu": "another"}
    assert report.floor_us(row) is None


def test_a_line_of_an_older_name_is_replaced_by_one_of_the_new(results):
    layer = partial(line, "layers", "layer 4608, 3072 to 3072", peak="e4m3", flops=1, bytes=1, tflops=1.0)
    rows = [layer("W4A4 resident", **times(79.0)), layer("W4A4 cached", **times(78.0))]
    (results / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row["median_us"] for row in report.read(results) if row["provider"] in ("W4A4 resident", "W4A4 cached")]
    assert found == [78.0]


def test_check_tells_whether_the_page_is_up_to_date(results, tmp_path):
    where = ["--results", str(results), "--page", str(tmp_path / "page.md")]
    with pytest.raises(SystemExit, match="not up to date"):
        report.main([*where, "--check"])
    report.main(where)
    report.main([*where, "--check"])
    (tmp_path / "page.md").write_text("typed by hand")
    with pytest.raises(SystemExit, match="not up to date"):
        report.main([*where, "--check"])


def test_the_committed_page_is_up_to_date():
    if list((ROOT / "benchmarks/results").glob("*.jsonl")):
        report.main(["--check"])
