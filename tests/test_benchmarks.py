"""The benchmarks on a CPU: tiny cases through the same runner, the gate, the command line."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

import orbitdit
from orbitdit import linear as orbit_linear
from orbitdit.ops.rotate_encode import means, reference
from parameters import BENCHMARK_RUN
from specs import orbit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    families,
    kernels,
    layers,
    measure,
    models,
    records,
    report,
    steps,
)


def our_plain_layers(linears):
    made = [orbit(linear) for linear in linears]
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
            recorder = records.Recorder(file, BENCHMARK_RUN)
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
    assert BENCHMARK_RUN.items() <= ours.items()


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


def test_layers_that_share_an_input_are_one_product(monkeypatch):
    keys = []

    def counted(x, prologue_args, operands, key):
        keys.append(key)
        return run_linear(x, prologue_args, operands, key)

    run_linear = orbit_linear.run_linear
    monkeypatch.setattr(orbit_linear, "run_linear", counted)
    work = layers.Workload(layers.Layer(30, 128, 48, count=3), "cpu")
    for provider in (layers.PROVIDERS["W4A4"], layers.PROVIDERS["W4A4 cached"]):
        forward = provider.make(work.linears)
        for x in work.inputs:  # each value of tokens is encoded once, and nothing is left from the one before
            outputs = torch.cat(forward(x), dim=-1)
            reference = torch.cat([linear(x) for linear in work.linears], dim=-1)
            assert measure.relative_error(outputs, reference) < 0.2
    assert [key.count("128x48") for key in keys] == [3, 3, 3, 3]


@torch.no_grad()
def test_centred_tokens_are_cases_of_their_own(run, monkeypatch):
    layer = layers.Layer(300, 128, 48, count=2, kind="centred tokens")
    lines = {line["provider"]: line for line in run("layers", [layers.case_of(layer, "cpu")])}
    assert list(lines) == ["bf16", "W2A4 centred", "W2A4 uncentred"]
    assert {(line["case"], line["status"]) for line in lines.values()} == {("centred tokens 300, 128 to 2x48", "ok")}
    centred, uncentred = lines["W2A4 centred"], lines["W2A4 uncentred"]
    assert centred["error"] < uncentred["error"] < centred["bound"]
    assert centred["bytes"] == uncentred["bytes"] == 2 * 300 * (128 + 2 * 48) + 2 * 128 * 48 // 4

    shapes, run_linear = [], orbit_linear.run_linear

    def seen(x, prologue_args, operands, key):
        shapes.append((x.shape, key.count("a4g16"), key.count("trellis2.12.unbiased")))
        return run_linear(x, prologue_args, operands, key)

    monkeypatch.setattr(orbit_linear, "run_linear", seen)
    work = layers.Workload(layer, "cpu")
    for name in ("W2A4 centred", "W2A4 uncentred"):
        work.candidate(layers.CENTRED_PROVIDERS[name]).run(0)
    assert shapes == [((300, 128), 2, 2), ((300, 128), 0, 2)]


@torch.no_grad()
def test_the_gate_is_red_without_the_means_of_centred_tokens(monkeypatch):
    work = layers.Workload(layers.Layer(300, 128, 48, kind="centred tokens"), "cpu")
    monkeypatch.setattr(means, "mean_gain", lambda encoding: 0.0)
    candidate = work.candidate(layers.CENTRED_PROVIDERS["W2A4 centred"])
    assert candidate.error() > 1.2 * candidate.bound


def test_deadline_and_case_limit_skip_what_is_left(run):
    assert {line["note"] for line in run("layers", [tiny()], deadline=time.monotonic())} == {"deadline"}
    assert {line["note"] for line in run("layers", [tiny()], case_s=0)} == {"time limit of the case"}


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_the_gates_fit_their_formats(bits):
    work = layers.Workload(layers.Layer(200, 256, 64), "cpu")
    layer = orbit(work.linears[0], bits)
    error = measure.relative_error(layer(work.inputs[0])[work.rows], work.reference)
    bound = measure.error_bound(str(bits), "4", 1.2)
    assert bound / 1.5 < error < bound


def test_inputs_alternate_and_providers_take_turns():
    calls = []
    names = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    times = measure.interleave(measure.WallClock(), names, limit_s=60)
    assert calls[:6] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 0), ("b", 0)]
    assert {name: len(values) for name, values in times.items()} == {"a": measure.ROUNDS, "b": measure.ROUNDS}


@pytest.mark.parametrize(
    "made",
    [
        kernels.Encode(300, 128, "cpu"),
        kernels.Decode(300, 128, 3, "cpu"),
        kernels.Decode(300, 128, 3, "cpu", log2_states=8),
    ],
)
def test_kernels_are_measured_against_a_copy_of_the_same_bytes(run, made):
    providers = kernels.ENCODERS if isinstance(made, kernels.Encode) else kernels.PROVIDERS
    lines = {line["provider"]: line for line in run("kernels", [measure.Case(made.name, providers, made.open)])}
    assert {name: line["status"] for name, line in lines.items()} == dict.fromkeys(providers, "ok")
    size = 3 * 300 * 128 if isinstance(made, kernels.Encode) else 300 * 128 * 11 // 8
    assert {line["bytes"] for line in lines.values()} == {size}


@pytest.mark.parametrize("prologue", [("gelu", 64), ("gelu", 0), ("layer_norm", 0), ("silu", 0), ("rms_norm", 0)])
def test_prologues_are_measured_in_the_encoding_and_apart(run, monkeypatch, prologue):
    def on_cpu(x, encoding, prologue="", prologue_args=()):
        return reference.rotate_encode(reference.apply_prologue(x, prologue, prologue_args), encoding)

    monkeypatch.setattr(kernels, "rotate_encode", on_cpu)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    name, first = prologue
    made = kernels.Prologue(name, 300, 256, first, "cpu")
    providers = kernels.PROLOGUE_PROVIDERS
    lines = {line["provider"]: line for line in run("kernels", [measure.Case(made.name, providers, made.open)])}
    assert {line["status"] for line in lines.values()} == {"ok"}
    assert {line["bytes"] for line in lines.values()} == {(5 if name == "silu" else 3) * 300 * 256}
    assert lines[kernels.APART]["error"] == lines[kernels.TOGETHER]["error"] > 0.09


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
    assert len(names) == len(set(names)) == 11 + 5 * 4 + 3 * 5 + 6 + 2 * 9 + 11 + 8 + 6
    assert next(case.name for case in layers.cases("cpu")) == "layer 1024, 3072 to 3072"
    assert "layer 4608, 3072 to 3x3072" in names
    assert "centred tokens 4608, 3072 to 3x3072" in names
    assert families.MODELS[0].name == "FLUX.1-dev"


def test_a_model_is_measured_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(families, "MODELS", (families.TINY,))
    monkeypatch.setattr(models, "MODELS", (families.TINY,))
    monkeypatch.setattr(steps, "STEPS", (2, 3))
    wrong = models.Provider(lambda model: model.proj_out.weight.neg_(), 1.0, "bf16", compiled=False)
    monkeypatch.setitem(models.PROVIDERS, "wrong", wrong)
    out = tmp_path / "models.jsonl"
    int8 = models.Provider(models.ours("w4a4", grid="int8"), 0.6, "int8", compiled=False)
    monkeypatch.setitem(models.PROVIDERS, "W4A4 int8", int8)
    chosen = [f"--only=tiny/{name}" for name in ("bf16", "W4A4", "W4A4 int8", "wrong")]
    command.main(["models", "--out", str(out), "--device", "cpu", "--commit", "abc", *chosen])
    lines = {line["provider"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert {name: line["status"] for name, line in lines.items()} == {
        "bf16": "ok",
        "W4A4": "ok",
        "W4A4 int8": "ok",
        "wrong": "refused",
    }
    assert lines["bf16"]["error"] == 0
    assert 0.02 < lines["W4A4 int8"]["error"] < 0.6
    assert lines["W4A4 int8"]["peak"] == "int8"
    assert 0.02 < lines["W4A4"]["error"] < 0.6
    assert lines["wrong"]["error"] == pytest.approx(2, abs=1e-3)
    assert lines["W4A4"]["model_gb"] <= lines["bf16"]["model_gb"]
    assert lines["W4A4"]["repeats"] == 3
    assert lines["W4A4"]["flops"] == lines["bf16"]["flops"] > 1e6
    assert lines["W4A4"]["commit"] == "abc"
    assert not {"queue_us", "graph_us", "gpu_kernels", "gpu_busy_us"} & set(lines["W4A4"])


def test_the_grid_of_a_provider_is_forced():
    model = models.build(families.TINY, "cpu", "native")
    chosen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "set_grid_", lambda model, grid: chosen.append((model, grid)))
        models.PROVIDERS["W4A4 int8 compiled"].prepare(model)
        models.PROVIDERS["W4A4 compiled"].prepare(models.build(families.TINY, "cpu", "native"))
    assert chosen == [(model, "int8")]


def test_the_host_is_timed_apart_from_the_device(monkeypatch):
    calls = []
    monkeypatch.setattr(steps, "synchronize", lambda device: time.sleep(0.02))
    times = steps.step_times("cuda", lambda: calls.append(1), (2, 2))
    assert len(calls) == 2 + steps.WARM_UP
    assert max(times.queued) < 20_000 <= min(times.total)
    facts = times.facts("cuda")
    assert facts["queue_us"] < 20_000 <= facts["median_us"]
    assert "queue_us" not in times.facts("cpu")


def event(cat, name, ts, dur):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}


def test_kernels_are_counted_once_and_overlaps_too():
    events = [
        {"ph": "M", "name": "process_name"},
        event("cuda_runtime", "cudaLaunchKernel", 0, 9),
        event("kernel", "gemm", 20.5, 10),
        event("kernel", "encode", 10, 5.25),
        event("kernel", "gemm", 25, 2),  # beside the first one, on another stream
        event("gpu_memcpy", "Memcpy DtoD", 30, 4),
        event("gpu_user_annotation", "step", 0, 100),
        event("gpu_memset", "Memset", 50, 1),
    ]
    kernels, busy = steps.gpu_work(events)
    assert kernels == {"gemm": 2, "encode": 1}
    assert busy == 5.25 + (34 - 20.5) + 1


def test_a_step_that_cannot_be_captured_keeps_its_other_facts():
    def broken():
        raise RuntimeError("not while\ncapturing")

    assert steps.attempt("graph", broken) == {"graph_note": "RuntimeError: not while capturing"}
    assert steps.attempt("graph", lambda: {"graph_us": 1.0}) == {"graph_us": 1.0}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu():
    weight = torch.randn(256, 256, device="cuda")
    facts = models.step_facts("cuda", lambda: weight.relu().cos() + 1, compiled=True)
    assert facts["graph_equal"]
    assert facts["graph_us"] > 0
    assert facts["graph_held_gb"] >= 0
    assert facts["gpu_kernels"] == 3
    assert 0 < facts["gpu_busy_us"] < facts["median_us"]
    assert 0 < facts["queue_us"] <= facts["median_us"]

    draws = steps.graph_facts(lambda: torch.randn(8, device="cuda"))
    assert not draws["graph_equal"]
    assert "graph_us" not in draws
    assert draws["graph_note"].startswith("differs from the plain step by ")


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


def test_measuring_needs_no_peer():
    assert not {"orbitquant", "torchao", "comfy_kitchen", "sdnq"} & set(sys.modules)
    assert torch.is_grad_enabled()
