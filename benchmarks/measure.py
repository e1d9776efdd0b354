"""How a case is measured: every provider passes a gate, then all of them take turns in one process.

A provider is refused, and recorded as refused, while its output is further from the fp32 reference than its
formats explain. What is timed runs from input to output. On a GPU each call sits between two CUDA events, after a
read through a buffer much larger than the L2 cache; that read also keeps the GPU busy while the host enqueues the
call, so launch latency is not part of the figure unless a call takes longer to enqueue than the read takes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from statistics import median, quantiles
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.records import Recorder

DISTORTION = {"bf16": 0.0, "int8": 4.2e-5, "e4m3": 7e-4, "6": 6.6e-4, "4": 9.5e-3, "3": 3.45e-2, "2": 0.1175}
"""Mean squared error of a format on a standard normal variable: Lloyd-Max for code widths, rounding for grids."""

ROUNDING = 0.005
"""Relative error allowed on top, for bf16 outputs."""

FLUSH_BYTES = 1 << 30
WARM_UP = 3
ROUNDS = 30
MEASURE_S = 5.0
"""Seconds after which the rounds of a case end, however many they are."""
INPUTS = 2
"""Inputs that calls alternate between: a peer that remembers its last input is timed with its encoding."""


def error_bound(weight: str, activation: str, slack: float) -> float:
    """The relative RMS error that a layer with these formats may have; `slack` is over ideal quantizers."""
    return slack * (DISTORTION[weight] + DISTORTION[activation]) ** 0.5 + ROUNDING


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference||, in fp32."""
    return float((output.float() - reference).norm() / reference.norm())


@dataclass(frozen=True)
class Candidate:
    """A provider made ready for a case: `run` takes the number of an input; `facts` go into its record."""

    run: Callable[[int], object]
    error: Callable[[], float]
    bound: float
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A name, who competes, and `open`, which makes the tensors and returns one maker of a candidate per provider."""

    name: str
    providers: tuple[str, ...]
    open: Callable[[], Mapping[str, Callable[[], Candidate]]]


class Clock(Protocol):
    """Times one round: each call once, in order, in microseconds."""

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]: ...


class CudaClock:
    """CUDA events around each call, each after a flush of the L2 cache."""

    def __init__(self) -> None:
        self.buffer = torch.zeros(FLUSH_BYTES // 4, device="cuda")

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        events = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.sum()
            start.record()
            call()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in events]


class WallClock:
    """The clock of a CPU, without a flush."""

    def round(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        times = []
        for call in calls:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return times


def clock_for(device: str) -> Clock:
    return CudaClock() if device == "cuda" else WallClock()


def summary(times: Sequence[float]) -> dict[str, float]:
    """Median and spread of times in microseconds, as they are recorded."""
    fifths = [times[0]] * 4 if len(times) < 2 else quantiles(times, n=5, method="inclusive")
    return {
        "median_us": round(median(times), 2),
        "p20_us": round(fifths[0], 2),
        "p80_us": round(fifths[3], 2),
        "repeats": len(times),
    }


def rate(facts: Mapping[str, Any], microseconds: float) -> dict[str, float]:
    """Achieved TFLOP/s where there is arithmetic, TB/s elsewhere; and weights quantized a second, where they are."""
    if "flops" in facts:
        achieved = {"tflops": round(facts["flops"] / microseconds / 1e6, 3)}
        return achieved | ({"weights_s": round(facts["weights"] / microseconds * 1e6)} if "weights" in facts else {})
    return {"tbps": round(facts["bytes"] / microseconds / 1e6, 4)}


def interleave(clock: Clock, calls: Mapping[str, Callable[[int], object]], limit_s: float) -> dict[str, list[float]]:
    """Times of every call over at most `ROUNDS` rounds after the warm-up, fewer once `limit_s` is over."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = time.monotonic() + limit_s
    for number in range(WARM_UP + ROUNDS):
        took = clock.round([partial(call, number % INPUTS) for call in calls.values()])
        if number >= WARM_UP:
            for name, value in zip(times, took, strict=True):
                times[name].append(value)
            if time.monotonic() > stop:
                break
    return times


@dataclass(frozen=True)
class Limits:
    """What may run and for how long: globs over "case/provider", seconds a case, and when all must be over."""

    only: Sequence[str] = ("*",)
    case_s: float = 60.0
    deadline: float = float("inf")

    def selects(self, case: str, provider: str) -> bool:
        return any(fnmatch(f"{case}/{provider}", pattern) for pattern in self.only)

    def select(self, case: Case) -> list[str]:
        """The providers of a case that may run."""
        return [name for name in case.providers if self.selects(case.name, name)]

    def ends(self) -> float:
        """When a case that starts now must be over, on the monotonic clock."""
        return min(self.deadline, time.monotonic() + self.case_s)


def run_case(suite: str, case: Case, clock: Clock, recorder: Recorder, limits: Limits) -> None:
    """Gate, time and record every selected provider of `case`, in the time that it has."""
    ends = limits.ends()
    makers = case.open()
    ready: dict[str, tuple[Candidate, dict[str, Any]]] = {}
    for name in limits.select(case):
        if time.monotonic() > ends - MEASURE_S:
            recorder.write(suite, case.name, name, "skipped", note="time limit of the case")
            continue
        passed = admit(suite, case.name, name, makers[name], recorder)
        if passed is not None:
            ready[name] = passed
    if not ready:
        return
    left = min(MEASURE_S, max(0.0, ends - time.monotonic()))
    times = interleave(clock, {name: candidate.run for name, (candidate, _) in ready.items()}, left)
    for name, (candidate, facts) in ready.items():
        took = summary(times[name])
        achieved = rate(candidate.facts, took["median_us"])
        recorder.write(suite, case.name, name, "ok", **took, **achieved, **facts, **candidate.facts)


def admit(
    suite: str, case: str, provider: str, make: Callable[[], Candidate], recorder: Recorder
) -> tuple[Candidate, dict[str, Any]] | None:
    """The candidate and the facts of its gate; None, recorded with the reason, when it fails or is refused."""
    start = time.monotonic()
    try:
        candidate = make()
        error = candidate.error()
    except Exception as problem:  # whatever a peer raises is its result
        recorder.write(suite, case, provider, "failed", note=one_line(problem))
        return None
    facts = {
        "error": round(error, 5),
        "bound": round(candidate.bound, 5),
        "setup_s": round(time.monotonic() - start, 2),
    }
    if not error <= candidate.bound:  # NaN is refused too
        recorder.write(suite, case, provider, "refused", note="the correctness gate is red", **facts)
        return None
    return candidate, facts


def one_line(problem: BaseException) -> str:
    """The kind of a problem and what it says."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]


def run_suite(suite: str, cases: Sequence[Case], device: str, recorder: Recorder, limits: Limits) -> None:
    """Run the cases in order; those that the deadline leaves no time for are recorded as skipped."""
    clock = clock_for(device)
    for case in filter(limits.select, cases):
        if time.monotonic() > limits.deadline:
            for name in limits.select(case):
                recorder.write(suite, case.name, name, "skipped", note="deadline")
            continue
        try:
            with torch.no_grad():
                run_case(suite, case, clock, recorder, limits)
        except Exception as problem:  # out of memory, say: the other cases still run
            for name in limits.select(case):
                recorder.write(suite, case.name, name, "failed", note=one_line(problem))
        torch.compiler.reset()  # the compiled peers of the next case start anew
