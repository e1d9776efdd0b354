"""The benchmarks on a CPU: tiny cases through the same runner, the gate, the command line, the report."""

import argparse
import json
import math
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

import orbitdit
from orbitdit import linear as orbit_linear
from orbitdit.ops.linear import cpu as linear_cpu
from orbitdit.ops.rotate_encode import reference
from specs import orbit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import (  # noqa: E402
    compare_trees,
    families,
    kernels,
    layers,
    measure,
    models,
    records,
    report,
    steps,
    tree_worker,
)

TREES = compare_trees.TREES
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
    assert shapes == [((1, 300, 128), 2, 2), ((1, 300, 128), 0, 2)]


@torch.no_grad()
def test_the_gate_is_red_without_the_means_of_centred_tokens(monkeypatch):
    work = layers.Workload(layers.Layer(300, 128, 48, kind="centred tokens"), "cpu")
    monkeypatch.setattr(linear_cpu, "add_means", lambda y, *_: y)
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
    lines = {line["provider"]: line for line in run("kernels", [measure.Case(made.name, kernels.PROVIDERS, made.open)])}
    assert {name: line["status"] for name, line in lines.items()} == {"copy": "ok", "e4m3": "ok", "int8": "ok"}
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
    providers = ("copy", kernels.APART, kernels.TOGETHER)
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


def test_two_trees_are_compared_on_a_cpu(tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "trees.jsonl"
    monkeypatch.setattr(compare_trees, "ROUNDS", (2, 2))
    trees = [f"--before=old={ROOT}", f"--after=new={ROOT}"]
    compare_trees.main([*trees, "--out", str(out), "--device", "cpu"])
    lines = {(line["case"], line["provider"]): line for line in map(json.loads, out.read_text().splitlines())}
    kinds = ("tiny W4A4 eager", "tiny W4A4 compiled")
    assert list(lines) == [(kind, provider) for kind in kinds for provider in ("before", "after", "after/before")]
    for kind in kinds:
        before, after, both = (lines[kind, provider] for provider in ("before", "after", "after/before"))
        assert (before["commit"], after["commit"], both["commit"], both["commit_before"]) == (
            "old",
            "new",
            "new",
            "old",
        )
        assert both["ratio"] == pytest.approx(after["median_us"] / before["median_us"], abs=1e-3)
        assert both["ratio_p20"] <= both["ratio_p80"]
        assert (both["output_equal"], both["output_max"], both["output_error"]) == (True, 0, 0)
        assert 0.02 < before["error"] == after["error"] < 0.6
        assert before["repeats"] == 2 * compare_trees.STEPS_A_TURN
    assert (lines[kinds[0], "after"]["graphs"], lines[kinds[1], "after"]["graphs"]) == (0, 2)
    assert f"| {kinds[1]} | {lines[kinds[1], 'before']['median_us'] / 1e3:.2f}, " in capsys.readouterr().out


def test_a_tree_whose_process_fails_is_recorded(tmp_path):
    (tmp_path / "src/orbitdit").mkdir(parents=True)
    (tmp_path / "src/orbitdit/__init__.py").write_text("raise ImportError('an old tree')")
    out = tmp_path / "trees.jsonl"
    compare_trees.main([f"--before=old={tmp_path}", "--out", str(out), "--device", "cpu"])
    (found,) = map(json.loads, out.read_text().splitlines())
    assert (found["case"], found["provider"], found["status"]) == ("tiny W4A4", "after/before", "failed")
    assert found["note"] == "RuntimeError: old: the process ended with 1 when asked to build"


@pytest.mark.parametrize("text", ["old", f"={ROOT}", "old=/nowhere"])
def test_a_tree_is_a_commit_and_a_folder(text):
    with pytest.raises(argparse.ArgumentTypeError, match="write COMMIT=PATH"):
        compare_trees.Tree.parse(text)


def test_trees_take_turns_in_both_orders():
    asked = []

    class Asked:
        def __init__(self, label):
            self.label = label

        def ask(self, do, **arguments):
            asked.append((self.label, do, arguments))
            return {"total": [100.0 if self.label == "before" else 101.0], "queued": [50.0], "peak_gb": 1.5}

    turns = compare_trees.take_turns({label: Asked(label) for label in compare_trees.TREES}, "eager")
    order = [label for label, _, _ in asked]
    assert order == ["before", "after", "after", "before"] * (compare_trees.ROUNDS[1] // 2)
    assert asked[0] == ("before", "turn", {"mode": "eager", "steps": compare_trees.STEPS_A_TURN})
    ratios = compare_trees.ratios(turns, "cuda")
    assert (ratios["ratio"], ratios["ratio_p20"], ratios["ratio_p80"]) == (1.01, 1.01, 1.01)
    assert ratios["queue_ratio"] == 1
    assert set(compare_trees.ratios(turns, "cpu")) == {"ratio", "ratio_p20", "ratio_p80"}
    facts = compare_trees.turn_facts(turns["after"], "eager", "cuda")
    assert (facts["median_us"], facts["queue_us"], facts["peak_gb"]) == (101.0, 50.0, 1.5)


def test_a_kind_of_step_that_fails_leaves_the_others(tmp_path):
    class Fails:
        def __init__(self, label):
            self.label = label

        def build(self):
            return {"model_gb": 1.0}

        def ask(self, do, mode, **arguments):
            if (self.label, mode) == ("after", "compiled"):
                raise RuntimeError(f"new, {do}: it does not compile")
            if do == "start":
                torch.save(torch.ones(2), arguments["output"])
                return {"error": 0.1}
            return {"total": [100.0], "queued": [50.0], "peak_gb": None}

    workers = {label: Fails(label) for label in compare_trees.TREES}
    found = compare_trees.measure(workers, ["compiled", "eager"], "cpu", tmp_path)
    assert found["compiled"] == {"note": "RuntimeError: new, start: it does not compile"}
    assert found["eager"]["both"]["ratio"] == 1
    assert {"error": 0.1, "median_us": 100.0, "model_gb": 1.0}.items() <= found["eager"]["after"].items()


@torch.no_grad()
def test_a_worker_counts_the_kernels_of_a_step(monkeypatch, tmp_path):
    profiled = []

    def profile(call):
        profiled.append(call())
        return Counter({"gemm": 2, "encode": 1}), 12.345

    monkeypatch.setattr(tree_worker, "profile_kernels", profile)
    model = tree_worker.TreeModel("tiny", "w4a4", "cpu", "native")
    assert model.build()["source"] == orbitdit.__file__
    model.start("eager", str(tmp_path / "output"))
    counted = model.kernels("eager")
    assert counted == {"names": {"gemm": 2, "encode": 1}, "gpu_kernels": 3, "gpu_busy_us": 12.35}
    assert torch.equal(profiled[0], torch.load(tmp_path / "output"))


def test_outputs_and_kernels_of_trees_are_compared():
    before = torch.tensor([3.0, 4.0], dtype=torch.bfloat16)
    apart = compare_trees.difference(before, torch.tensor([3.0, 4.5], dtype=torch.bfloat16))
    assert apart == {"output_equal": False, "output_max": 0.5, "output_error": pytest.approx(0.1)}
    names = Counter({"gemm": 5, "encode": 2, "gelu": 1}), Counter({"gemm": 5, "encode": 5, "norm": 1})
    assert compare_trees.changed(*names) == {"encode": [2, 5], "gelu": [1, 0], "norm": [0, 1]}
    assert compare_trees.shortened("gemm" * 30) == "gemm" * 30
    assert compare_trees.shortened("a" * 100 + "b" * 100) == "a" * 60 + "..." + "b" * 57


def test_the_table_of_trees():
    sides = {label: {"median_us": 1e5, "queue_us": 2e3, "graph_equal": True, "graph_peak_gb": 7.0} for label in TREES}
    both = {"ratio": 1.002, "ratio_p20": 0.999, "ratio_p80": 1.004, "queue_ratio": 1.1}
    text = compare_trees.shown([{"case": "a graph", **sides, "both": both}])
    row = "| a graph | 100.00, 100.00 | 1.0020 | 0.9990 to 1.0040 | 2.00, 2.00 | 1.100 | - | - | 7.000, 7.000 |"
    assert text.splitlines()[-1] == f"{row} as compiled |"
    sides["after"]["graph_equal"] = False
    assert "**not as compiled**" in compare_trees.shown([{"case": "a graph", **sides, "both": both}])


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


def test_measuring_needs_no_peer():
    assert not {"orbitquant", "torchao", "comfy_kitchen", "sdnq"} & set(sys.modules)
    assert torch.is_grad_enabled()
