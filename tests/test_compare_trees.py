"""Two trees beside each other, on a CPU: processes, turns, ratios and the table."""

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import orbitdit

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import compare_trees, tree_worker  # noqa: E402

TREES = compare_trees.TREES


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
