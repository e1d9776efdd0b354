"""Steps of models before and after a change: `python -m benchmarks.compare_trees --before COMMIT=PATH --out FILE`.

PATH holds src/ of the other tree; `--after`, in the same form, is this checkout. For each case both trees have a
process and a quantized model of their own on one GPU, built from one seed, and take turns of a few steps, so that
whatever the machine does meets both. Eager steps come first, then compiled ones, then replays of a CUDA graph of the
compiled step; the profiler, which counts kernels, comes last. A line a tree and kind of step is written, and one that
compares them; the last thing printed is the table of these.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median, quantiles
from typing import Any, TextIO

import torch

from benchmarks.measure import Limits, one_line, summary
from benchmarks.records import ROOT, Recorder, environment, git_commit
from benchmarks.report import table

STEPS_A_TURN = 2
ROUNDS = (4, 8)
"""At least and at most so many turns of each tree."""
ROUNDS_SECONDS = 8.0
"""When the rounds of a kind of step end, if there were enough."""
STOP_SECONDS = 30.0
"""For a process to end, before it is killed."""
TREES = ("before", "after")
NAMED = 12
"""Kernels that a line names, of those of which a step has more or fewer."""


@dataclass(frozen=True)
class Tree:
    """A source tree: src/ in the folder `path`."""

    commit: str
    path: Path

    @classmethod
    def parse(cls, text: str) -> "Tree":
        commit, _, path = text.rpartition("=")
        if not commit or not (Path(path) / "src/orbitdit/__init__.py").exists():
            raise argparse.ArgumentTypeError(f"{text!r}: write COMMIT=PATH, where PATH holds src/orbitdit")
        return cls(commit, Path(path).resolve())


@dataclass(frozen=True)
class Comparison:
    """A model of the suite and its bits; whether its eager steps are compared too."""

    model: str
    bits: str
    eager: bool = True

    @property
    def name(self) -> str:
        return f"{self.model} {self.bits.upper()}"

    def modes(self, device: str) -> list[str]:
        return [*(["eager"] if self.eager else []), "compiled", *(["graph"] if device == "cuda" else [])]


COMPARISONS = (
    Comparison("FLUX.1-dev", "w4a4"),
    Comparison("Z-Image-Turbo", "w4a4"),
    Comparison("Wan 2.1-1.3B", "w4a4"),
    Comparison("FLUX.1-dev", "w2a4", eager=False),
)
"""In the order of what must be known first."""
ON_CPU = (Comparison("tiny", "w4a4"),)


class Worker:
    """The process of a tree (see `tree_worker`). It begins to start at once, so that several start together."""

    def __init__(self, tree: Tree, case: Comparison, device: str, attention: str):
        command = [sys.executable, "-m", "benchmarks.tree_worker", case.model, case.bits, device, attention]
        found = [str(tree.path / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, found))
        self.tree = tree
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The reply to a request; RuntimeError with what went wrong."""
        with suppress(BrokenPipeError):  # of a process that has ended: there will be no reply
            print(json.dumps({"do": do, **arguments}), file=self.stream("stdin"), flush=True)
        line = self.stream("stdout").readline()
        if not line:
            raise RuntimeError(f"{self.tree.commit}: the process ended with {self.process.wait()} when asked to {do}")
        reply = json.loads(line)
        if "problem" in reply:
            raise RuntimeError(f"{self.tree.commit}, {do}: {reply['problem']}")
        return reply

    def stream(self, name: str) -> TextIO:
        return getattr(self.process, name)

    def stop(self) -> None:
        """End the process: it ends by itself when there are no more requests."""
        with suppress(BrokenPipeError):
            self.stream("stdin").close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stream("stdout").close()

    def build(self) -> dict[str, Any]:
        """Ask for the model, and see that it is this tree's."""
        facts = self.ask("build")
        source = Path(facts.pop("source"))
        if not source.is_relative_to(self.tree.path / "src"):
            raise RuntimeError(f"{self.tree.commit}: orbitdit came from {source}")
        return facts


@contextmanager
def workers_of(trees: Mapping[str, Tree], case: Comparison, device: str, attention: str) -> Iterator[dict[str, Worker]]:
    """The processes of a case, ended afterwards."""
    with ExitStack() as stack:
        workers = {}
        for label, tree in trees.items():
            workers[label] = Worker(tree, case, device, attention)
            stack.callback(workers[label].stop)
        yield workers


def take_turns(workers: Mapping[str, Worker], mode: str) -> dict[str, list[dict[str, Any]]]:
    """What each tree's turns gave; every other round the trees go in the other order."""
    turns: dict[str, list[dict[str, Any]]] = {label: [] for label in workers}
    start = time.monotonic()
    for number in range(ROUNDS[1]):
        for label in list(workers)[:: -1 if number % 2 else 1]:
            turns[label].append(workers[label].ask("turn", mode=mode, steps=STEPS_A_TURN))
        if number + 1 >= ROUNDS[0] and time.monotonic() - start > ROUNDS_SECONDS:
            break
    return turns


def measure(workers: Mapping[str, Worker], modes: list[str], device: str, folder: Path) -> dict[str, dict[str, Any]]:
    """For each mode: facts of each tree, and of both compared, by label; a "note" instead where a mode fails."""
    # One after another: two models in full precision would not fit.
    built = {label: worker.build() for label, worker in workers.items()}
    found: dict[str, dict[str, Any]] = {}
    for mode in modes:
        try:
            found[mode] = measure_mode(workers, mode, device, folder)
        except RuntimeError as problem:
            found[mode] = {"note": one_line(problem)}
            continue
        for label in workers:
            found[mode][label] |= built[label]
    if device == "cuda":
        for mode, facts in found.items():
            if mode != "graph" and "note" not in facts:
                count_kernels(workers, mode, facts)
    return found


def measure_mode(workers: Mapping[str, Worker], mode: str, device: str, folder: Path) -> dict[str, Any]:
    """The first step of each tree, then its turns."""
    outputs = {label: folder / f"{label} {mode}" for label in workers}
    facts = {label: worker.ask("start", mode=mode, output=str(outputs[label])) for label, worker in workers.items()}
    turns = take_turns(workers, mode)
    for label in workers:
        facts[label] |= turn_facts(turns[label], mode, device)
    facts["both"] = ratios(turns, device)
    if mode != "graph":  # which must give the bits of the compiled step: see graph_equal
        facts["both"] |= difference(*(torch.load(outputs[label]) for label in TREES))
    return facts


def turn_facts(turns: list[dict[str, Any]], mode: str, device: str) -> dict[str, Any]:
    """Median and spread of a tree's steps, and on a GPU the host's median and the peak memory."""
    facts: dict[str, Any] = summary(list(chain.from_iterable(turn["total"] for turn in turns)))
    if device == "cuda":
        facts["queue_us"] = round(median(chain.from_iterable(turn["queued"] for turn in turns)), 2)
        if mode != "graph":  # whose replays allocate nothing: see graph_peak_gb
            facts["peak_gb"] = max(turn["peak_gb"] for turn in turns)
    return facts


def ratios(turns: Mapping[str, list[dict[str, Any]]], device: str) -> dict[str, float]:
    """After over before: of all steps' medians, and the 20th and 80th percentile of the rounds' own ratios."""
    facts = {}
    for name in ("total", "queued") if device == "cuda" else ("total",):
        before, after = ([turn[name] for turn in turns[label]] for label in TREES)
        of_rounds = [median(a) / median(b) for b, a in zip(before, after, strict=True)]
        fifths = quantiles(of_rounds, n=5, method="inclusive")
        key = "" if name == "total" else "queue_"
        facts[f"{key}ratio"] = round(median(chain(*after)) / median(chain(*before)), 4)
        facts[f"{key}ratio_p20"], facts[f"{key}ratio_p80"] = round(fifths[0], 4), round(fifths[3], 4)
    return facts


def difference(before: torch.Tensor, after: torch.Tensor) -> dict[str, Any]:
    """How far the outputs of the trees are apart: bits, the largest value, and relatively."""
    apart = after.double() - before.double()
    return {
        "output_equal": torch.equal(before, after),
        "output_max": float(apart.abs().max()),
        "output_error": float(apart.norm() / before.double().norm()),
    }


def count_kernels(workers: Mapping[str, Worker], mode: str, facts: dict[str, Any]) -> None:
    """Add what the profiler counts to the facts of a mode; a note where it fails."""
    try:
        counted = {label: worker.ask("kernels", mode=mode) for label, worker in workers.items()}
    except RuntimeError as problem:
        facts["both"]["gpu_note"] = one_line(problem)
        return
    names = {label: Counter(counts.pop("names")) for label, counts in counted.items()}
    for label, counts in counted.items():
        facts[label] |= counts
    facts["both"]["kernels_changed"] = changed(*(names[label] for label in TREES))


def changed(before: Counter[str], after: Counter[str]) -> dict[str, list[int]]:
    """Kernels of which a step has more or fewer: their number before and after, the largest differences first."""
    apart = {name: [before[name], after[name]] for name in before | after if before[name] != after[name]}
    largest = sorted(apart, key=lambda name: -abs(apart[name][1] - apart[name][0]))
    return {shortened(name): apart[name] for name in largest[:NAMED]}


def shortened(name: str) -> str:
    """A kernel's name without its middle, which template arguments make long."""
    return name if len(name) <= 120 else f"{name[:60]}...{name[-57:]}"


def run(trees: Mapping[str, Tree], recorder: Recorder, limits: Limits, device: str, attention: str) -> list[dict]:
    """Compare the trees in every selected case; the lines that compare, for the table."""
    compared = []
    for case in ON_CPU if device == "cpu" else COMPARISONS:
        if not limits.selects(case.name, "trees"):
            continue
        if time.monotonic() > limits.deadline:
            recorder.write("trees", case.name, "after/before", "skipped", note="deadline")
            continue
        start = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder, workers_of(trees, case, device, attention) as workers:
                found = measure(workers, case.modes(device), device, Path(folder))
        except Exception as problem:  # the other cases still run
            recorder.write("trees", case.name, "after/before", "failed", note=one_line(problem))
            continue
        for mode, facts in found.items():
            if "note" in facts:
                recorder.write("trees", f"{case.name} {mode}", "after/before", "failed", **facts)
                continue
            for label, tree in trees.items():
                own = Recorder(recorder.file, recorder.shared | {"commit": tree.commit})
                own.write("trees", f"{case.name} {mode}", label, "ok", **facts[label])
            recorder.write("trees", f"{case.name} {mode}", "after/before", "ok", **facts["both"])
            compared.append({"case": f"{case.name} {mode}", **facts})
        print(f"{case.name}: {time.monotonic() - start:.0f} s", flush=True)
    return compared


def shown(compared: list[dict]) -> str:
    """The table of what was compared; a pair of numbers is before and after."""

    def pair(row: dict, *keys: str, unit: float = 1, digits: int = 0) -> str:
        values = [next((row[label][key] for key in keys if key in row[label]), None) for label in TREES]
        return "-" if None in values else ", ".join(f"{value / unit:.{digits}f}" for value in values)

    def output(row: dict) -> str:
        both = row["both"]
        if "output_equal" not in both:
            same = all(row[label]["graph_equal"] for label in TREES)
            return "as compiled" if same else "**not as compiled**"
        return "equal" if both["output_equal"] else f"{both['output_error']:.1e}, at most {both['output_max']:.1e}"

    head = ["case", "step, ms", "ratio", "of rounds", "host, ms", "ratio", "kernels", "busy, ms", "peak, GB", "outputs"]
    body = [
        [
            row["case"],
            pair(row, "median_us", unit=1e3, digits=2),
            f"{row['both']['ratio']:.4f}",
            f"{row['both']['ratio_p20']:.4f} to {row['both']['ratio_p80']:.4f}",
            pair(row, "queue_us", unit=1e3, digits=2),
            f"{row['both']['queue_ratio']:.3f}" if "queue_ratio" in row["both"] else "-",
            pair(row, "gpu_kernels"),
            pair(row, "gpu_busy_us", unit=1e3, digits=2),
            pair(row, "peak_gb", "graph_peak_gb", digits=3),
            output(row),
        ]
        for row in compared
    ]
    return table(head, body)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.compare_trees", description=__doc__)
    parser.add_argument("--before", type=Tree.parse, required=True, metavar="COMMIT=PATH")
    parser.add_argument("--after", type=Tree.parse, metavar="COMMIT=PATH", help="this checkout unless given")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; appended to")
    parser.add_argument("--only", action="append", metavar="GLOB", help="over the case, may be repeated")
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="begin no case then")
    parser.add_argument("--attention", default="native", help="diffusers' attention backend")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    args = parser.parse_args(arguments)
    trees = {"before": args.before, "after": args.after or Tree(git_commit(), ROOT)}
    limits = Limits([f"{glob}/*" for glob in args.only or ("*",)], deadline=time.monotonic() + args.deadline)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        shared = environment(args.device, trees["after"].commit) | {"commit_before": trees["before"].commit}
        if args.device == "cuda":
            torch.cuda.empty_cache()  # the models' processes have the GPU
        compared = run(trees, Recorder(file, shared), limits, args.device, args.attention)
    print(shown(compared))


if __name__ == "__main__":
    main()
