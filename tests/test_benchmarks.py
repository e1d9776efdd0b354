"""The benchmarks on a CPU: tiny cases through the same runner, the gate, the command line, the report."""

import json
import math
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch

import orbitdit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import families, kernels, layers, measure, models, records, report  # noqa: E402

SHARED = {
    "gpu": "NVIDIA H200",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cuda": "13.0",
    "packages": {"torchao": "0.18.0"},
    "commit": "abc",
    "date": "2026-11-24",
    "copy_tbps": 4.0,
}


def our_plain_layers(linears):
    made = [orbitdit.OrbitLinear.from_linear(linear, 4, 4) for linear in linears]
    return lambda x: [layer(x) for layer in made]


def broken(linears):
    return lambda x: [linear(x).roll(1, dims=-1) for linear in linears]


def missing(linears):
    raise ImportError("No module named 'peer'\n  again")


PROVIDERS = {
    "bf16": layers.PROVIDERS["bf16"],
    "W4A4": layers.Provider(our_plain_layers, "4", "4", "e4m3"),
    "INT4": layers.MODULATION_PROVIDERS["INT4"],
    "broken": layers.Provider(broken, "2", "3", "int8"),
    "not a number": layers.Provider(lambda linears: lambda x: [x[:, :48] * math.nan], "4", "4", "int8"),
    "missing": layers.Provider(missing, "4", "4", "int8"),
}


@pytest.fixture
def run(tmp_path):
    """Run cases through the runner and give back the lines that were written."""

    def go(suite, cases, **limits):
        path = tmp_path / "lines.jsonl"
        with path.open("w") as file:
            recorder = records.Recorder(file, SHARED)
            measure.run_suite(suite, cases, "cpu", recorder, measure.Limits(**limits))
        return [json.loads(line) for line in path.read_text().splitlines()]

    return go


def tiny(count=1):
    return layers.case_of(layers.Layer(300, 128, 48, count), "cpu", PROVIDERS)


def test_a_layer_is_measured_from_input_to_output(run):
    lines = {line["provider"]: line for line in run("layers", [tiny()])}
    assert {name: line["status"] for name, line in lines.items()} == {
        "bf16": "ok",
        "W4A4": "ok",
        "INT4": "ok",
        "broken": "refused",
        "not a number": "refused",
        "missing": "failed",
    }
    ours = lines["W4A4"]
    assert ours["flops"] == 2 * 300 * 128 * 48
    assert ours["bytes"] == 2 * 300 * (128 + 48) + 128 * 48 // 2
    assert 0 < ours["p20_us"] <= ours["median_us"] <= ours["p80_us"]
    assert ours["repeats"] == measure.ROUNDS
    assert ours["tflops"] == pytest.approx(ours["flops"] / ours["median_us"] / 1e6, abs=1e-3)
    assert 0.10 < ours["error"] < ours["bound"] < 0.2
    assert lines["bf16"]["error"] < lines["bf16"]["bound"] == 0.005
    assert SHARED.items() <= ours.items()


def test_the_gate_refuses_a_wrong_output_before_it_is_timed(run):
    line = run("layers", [tiny()], only=["*/broken"])[0]
    assert line["status"] == "refused"
    assert line["error"] > 1 > line["bound"]
    assert "median_us" not in line


def test_what_a_peer_raises_is_recorded_on_one_line(run):
    assert run("layers", [tiny()], only=["*/missing"])[0]["note"] == "ImportError: No module named 'peer' again"


def test_a_case_that_cannot_be_opened_leaves_the_others(run):
    def opened():
        raise MemoryError("too large")

    lines = run("layers", [measure.Case("large", ("bf16", "W4A4"), opened), tiny()], only=["*/bf16"])
    assert [(line["case"], line["status"]) for line in lines] == [("large", "failed"), ("layer 300, 128 to 48", "ok")]


def test_layers_that_share_an_input_are_one_case(run):
    line = run("layers", [tiny(3)], only=["layer 300*/W4A4"])[0]
    assert (line["case"], line["flops"]) == ("layer 300, 128 to 3x48", 3 * 2 * 300 * 128 * 48)


def test_deadline_and_case_limit_skip_what_is_left(run):
    assert {line["note"] for line in run("layers", [tiny()], deadline=time.monotonic())} == {"deadline"}
    assert {line["note"] for line in run("layers", [tiny()], case_s=0)} == {"time limit of the case"}


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_gates_fit_their_formats(bits):
    work = layers.Workload(layers.Layer(200, 256, 64), "cpu")
    layer = orbitdit.OrbitLinear.from_linear(work.linears[0], bits, 4)
    error = measure.relative_error(layer(work.inputs[0])[work.rows], work.reference)
    bound = measure.error_bound(str(bits), "4", 1.2)
    assert bound / 1.5 < error < bound


def test_inputs_alternate_and_providers_take_turns():
    calls = []
    names = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = measure.interleave(measure.WallClock(), names, limit_s=60)
    assert calls[:6] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert {name: len(values) for name, values in times.items()} == {"a": measure.ROUNDS, "b": measure.ROUNDS}


@pytest.mark.parametrize("made", [kernels.Encode(300, 128, "cpu"), kernels.Decode(300, 128, 3, "cpu")])
def test_kernels_are_measured_against_a_copy_of_the_same_bytes(run, made):
    lines = {line["provider"]: line for line in run("kernels", [measure.Case(made.name, kernels.PROVIDERS, made.open)])}
    assert {name: line["status"] for name, line in lines.items()} == {"copy": "ok", "e4m3": "ok", "int8": "ok"}
    size = 3 * 300 * 128 if isinstance(made, kernels.Encode) else 300 * 128 * 11 // 8
    assert {line["bytes"] for line in lines.values()} == {size}


def test_the_search_for_trellis_codes_is_measured_in_weights(run, tmp_path):
    made = kernels.Viterbi(30, 256, 2, 8, "cpu")
    (line,) = run("kernels", [measure.Case(made.name, ("viterbi",), made.open)])
    assert (line["case"], line["status"]) == ("viterbi 2-bit 2^8-state 30x256", "ok")
    assert line["flops"] == 3 * 30 * 256 * 256
    assert line["weights_s"] == pytest.approx(30 * 256 / line["median_us"] * 1e6, abs=1)
    assert 0.25 < line["error"] < line["bound"] == pytest.approx(0.1175**0.5, abs=1e-4)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(line | {"weights_s": 10**9, "median_us": 7.68}))
    text = report.page(report.read(folder))
    assert "| viterbi | 7.7 |" in text
    assert "| 1,000 M weights/s: FLUX.1-dev in 8.6 s | - |" in text


def test_the_weights_of_flux_are_those_of_its_rotated_layers():
    with torch.device("meta"):
        model = families.MODELS[0].make()
    plan = orbitdit.plan(model, orbitdit.OrbitQuantConfig("w2a4"))
    assert sum(layer.weights for layer in plan.select("quantize")) == report.FLUX_WEIGHTS


def test_suites_have_the_cases_that_were_asked_for():
    names = [case.name for case in (*kernels.cases("cuda"), *layers.cases("cuda"))]
    assert len(names) == len(set(names)) == 11 + 5 * 4 + 3 * 5 + 6 + 2 * 9 + 11 + 8
    assert next(case.name for case in layers.cases("cpu")) == "layer 1024, 3072 to 3072"
    assert "layer 4608, 3072 to 3x3072" in names
    assert families.MODELS[0].name == "FLUX.1-dev"


TINY_FLUX = families.Model(
    "tiny",
    diffusers.FluxTransformer2DModel,
    partial(families.flux_inputs, side=4, text=5, sizes=(8, 24, 32)),
    {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    },
)


def test_a_model_is_measured_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "MODELS", (TINY_FLUX,))
    monkeypatch.setattr(models, "MODELS", (TINY_FLUX,))
    monkeypatch.setattr(models, "STEPS", (2, 3))
    wrong = models.Provider(lambda model: model.proj_out.weight.neg_(), 1.0, "bf16", compiled=False)
    monkeypatch.setitem(models.PROVIDERS, "wrong", wrong)
    out = tmp_path / "models.jsonl"
    chosen = [f"--only=tiny/{name}" for name in ("bf16", "W4A4", "wrong")]
    command.main(["models", "--out", str(out), "--device", "cpu", "--commit", "abc", *chosen])
    lines = {line["provider"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line["status"] for name, line in lines.items()} == {"bf16": "ok", "W4A4": "ok", "wrong": "refused"}
    assert lines["bf16"]["error"] == 0
    assert 0.02 < lines["W4A4"]["error"] < 0.6
    assert lines["wrong"]["error"] == pytest.approx(2, abs=1e-3)
    assert lines["W4A4"]["model_gb"] <= lines["bf16"]["model_gb"]
    assert lines["W4A4"]["repeats"] == 3
    assert lines["W4A4"]["flops"] == lines["bf16"]["flops"] > 1e6
    assert lines["W4A4"]["commit"] == "abc"


def test_arithmetic_in_attention_is_counted_apart():
    class Attends(torch.nn.Module):
        def forward(self, x, return_dict):
            scores = torch.nn.functional.linear(x, x.new_ones(6, 4))
            return (scores @ scores.mT,)

    flops, output = models.count_flops(Attends(), {"x": torch.ones(3, 5, 4)})
    assert flops == {"flops": 2 * 3 * 5 * 4 * 6, "attention_flops": 2 * 3 * 5 * 6 * 5}
    assert output.shape == (3, 5, 5)


def test_the_command_appends_lines_and_filters(tmp_path):
    out = tmp_path / "new" / "kernels.jsonl"
    arguments = ["kernels", "--out", str(out), "--device", "cpu", "--only", "decode 2-bit 3072x3072/copy"]
    command.main(arguments)
    command.main(arguments)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["case"], line["provider"]) for line in lines] == [("decode 2-bit 3072x3072", "copy")] * 2
    assert lines[0]["copy_tbps"] > 0
    assert lines[0]["commit"] == records.git_commit()


def line(suite, case, provider, status="ok", **facts):
    return {"suite": suite, "case": case, "provider": provider, "status": status, **facts, **SHARED}


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


def test_measuring_needs_no_peer():
    assert not {"orbitquant", "torchao", "comfy_kitchen", "sdnq"} & set(sys.modules)
    assert torch.is_grad_enabled()
