"""What is measured of one step of a model: its time, its host's, a CUDA graph of it, and its kernels."""

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import one_line, relative_error, summary

STEP_SECONDS = 3.0
"""Time for the steps that are counted."""
STEPS = (3, 20)
"""At least and at most so many of them."""
WARM_UP = 1
CAPTURE_WARM_UP = 2
"""Steps on a side stream before a capture: what is allocated once must not be allocated in the graph."""
GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
"""The categories of a profiler's trace that keep a GPU busy."""


@dataclass(frozen=True)
class Times:
    """Microseconds of steps: until the device has finished each, and until the host has queued it."""

    total: list[float]
    queued: list[float]

    def facts(self, device: str) -> dict[str, float]:
        """Median and spread; the host's median on a GPU, where it is not the same."""
        host = {"queue_us": round(median(self.queued), 2)} if device == "cuda" else {}
        return {**summary(self.total), **host}


def step(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The output of one step; those of several pictures stacked."""
    output = model(**inputs, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, call: Callable[[], Any]) -> tuple[Any, float]:
    """The result of `call` and its seconds, until the device has finished."""
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return result, time.perf_counter() - start


def step_times(device: str, call: Callable[[], object], steps: tuple[int, int] | None = None) -> Times:
    """The times of `call`, one after another, each from an idle device; `steps`: at least and at most so many."""
    least, most = steps or STEPS
    times = Times([], [])
    for number in range(WARM_UP + most):
        start = time.perf_counter()
        call()
        queued = time.perf_counter() - start
        synchronize(device)
        if number >= WARM_UP:
            times.total.append((time.perf_counter() - start) * 1e6)
            times.queued.append(queued * 1e6)
        if len(times.total) >= least and sum(times.total) > STEP_SECONDS * 1e6:
            break
    return times


def capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of `call`, and the tensor that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CAPTURE_WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    return graph, output


def checked_capture(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, dict[str, Any]]:
    """A CUDA graph of `call`, whether its replay gives the bits of `call`, and its memory.

    `graph_peak_gb` is the peak of what is allocated during the capture, as `peak_gb` is of plain steps, and
    `graph_held_gb` what stays reserved for the graph between replays.
    """
    expected = call().clone()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    graph, output = capture(call)
    facts = {"graph_peak_gb": peak_gb("cuda")}
    torch.cuda.empty_cache()
    facts["graph_held_gb"] = round((torch.cuda.memory_reserved() - before) / 1e9, 3)
    output.fill_(torch.nan)  # only a replay writes it
    graph.replay()
    facts["graph_equal"] = torch.equal(output, expected)
    if not facts["graph_equal"]:
        facts["graph_note"] = f"differs from the plain step by {relative_error(output, expected.float()):.2g}"
    return graph, facts


def graph_facts(call: Callable[[], Tensor]) -> dict[str, Any]:
    """What `checked_capture` tells, and the time of a replay, `graph_us`, where it gives the bits of `call`."""
    graph, facts = checked_capture(call)
    if facts["graph_equal"]:
        times = summary(step_times("cuda", graph.replay).total)
        facts |= {f"graph_{name}": value for name, value in times.items() if name.endswith("us")}
        facts["graph_us"] = facts.pop("graph_median_us")
    return facts


def profile_kernels(call: Callable[[], object]) -> tuple[Counter[str], float]:
    """The GPU kernels of `call`, by name, and the microseconds in which the GPU was busy with it.

    Profile last: a profiler that has been on may slow launches down.
    """
    from torch.profiler import ProfilerActivity, profile, schedule

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(
            activities=[ProfilerActivity.CUDA],
            schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
            on_trace_ready=lambda made: made.export_chrome_trace(str(path)),
        ) as profiler:
            for _ in range(2):
                call()
                torch.cuda.synchronize()
                profiler.step()
        events = json.loads(path.read_text())["traceEvents"]
    kernels, busy = gpu_work(events)
    if not kernels:
        raise RuntimeError("the profiler saw no kernels")
    return kernels, busy


def gpu_work(events: Iterable[dict[str, Any]]) -> tuple[Counter[str], float]:
    """Kernels by name, and microseconds in which anything ran on the GPU, from the events of a profiler's trace."""
    work = sorted((event for event in events if event.get("cat") in GPU_WORK), key=lambda event: event["ts"])
    busy, end = 0.0, float("-inf")
    for event in work:
        stop = event["ts"] + event["dur"]
        busy += max(0.0, stop - max(end, event["ts"]))
        end = max(end, stop)
    return Counter(event["name"] for event in work if event["cat"] == "kernel"), busy


def kernel_facts(call: Callable[[], object]) -> dict[str, Any]:
    kernels, busy = profile_kernels(call)
    return {"gpu_kernels": kernels.total(), "gpu_busy_us": round(busy, 2)}


def attempt(what: str, measured: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The facts, or a note on why there are none: what was measured before is not lost for it."""
    try:
        return measured()
    except Exception as problem:  # a peer that cannot be captured, a machine without a profiler
        return {f"{what}_note": one_line(problem)}


def peak_gb(device: str) -> float | None:
    """The peak of what was allocated since the last reset of the statistics."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if device == "cuda" else None


def free(device: str) -> None:
    """Forget compiled code and give memory back, so that providers do not meet."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
