"""One source tree's side of `compare_trees`: a quantized model in a process of its own, which does what it is asked.

Requests and replies are lines of JSON on standard input and output; what else is printed goes to standard error. Only
the public names of orbitdit are used, so that trees of different commits can be compared.
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch

import orbitdit
from benchmarks.families import MODELS, TINY
from benchmarks.measure import one_line, relative_error
from benchmarks.models import build, compile_blocks, graph_count, model_bytes, ours
from benchmarks.steps import checked_capture, free, peak_gb, profile_kernels, step, step_times, timed


class TreeModel:
    """A model of the suite, quantized by the orbitdit of this process. Each public method answers a request."""

    def __init__(self, name: str, bits: str, device: str, attention: str):
        self.case = next(case for case in (*MODELS, TINY) if case.name == name)
        self.bits, self.device, self.attention = bits, device, attention
        self.steps: dict[str, Callable[[], Any]] = {}

    def build(self) -> dict[str, Any]:
        """Make the bf16 model, keep its output as the reference, and quantize it."""
        self.inputs = self.case.inputs(self.device)
        self.model = build(self.case, self.device, self.attention)
        self.reference = step(self.model, self.inputs).float()
        _, seconds = timed(self.device, lambda: ours(self.bits)(self.model))
        free(self.device)
        gigabytes = round(model_bytes(self.model) / 1e9, 3)
        return {"source": orbitdit.__file__, "quantize_s": round(seconds, 2), "model_gb": gigabytes}

    def start(self, mode: str, output: str) -> dict[str, Any]:
        """Get ready for steps of a mode; eager and compiled ones leave their first output in the file `output`."""
        if mode == "graph":
            graph, facts = checked_capture(self.eager_or_compiled)
            self.steps[mode] = graph.replay
            return facts
        if mode == "compiled":  # without a GPU the blocks are traced only
            compile_blocks(self.case, self.model, **({} if self.device == "cuda" else {"backend": "eager"}))
        self.steps[mode] = self.eager_or_compiled
        made, seconds = timed(self.device, self.eager_or_compiled)
        torch.save(made.cpu(), output)
        error = round(relative_error(made, self.reference), 4)
        return {"error": error, "first_step_s": round(seconds, 2), "graphs": graph_count()}

    def eager_or_compiled(self) -> torch.Tensor:
        return step(self.model, self.inputs)

    def turn(self, mode: str, steps: int) -> dict[str, Any]:
        """The times of so many steps, and their peak memory."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = step_times(self.device, self.steps[mode], (steps, steps))
        return {"total": times.total, "queued": times.queued, "peak_gb": peak_gb(self.device)}

    def kernels(self, mode: str) -> dict[str, Any]:
        """The GPU kernels of a step; asked last, for a profiler may slow down what comes after it."""
        self.steps.clear()  # a graph, that is
        with torch.compiler.set_stance("force_eager" if mode == "eager" else "default"):
            kernels, busy = profile_kernels(self.eager_or_compiled)
        return {"names": kernels, "gpu_kernels": kernels.total(), "gpu_busy_us": round(busy, 2)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.tree_worker", description=__doc__)
    for name in ("name", "bits", "device", "attention"):
        parser.add_argument(name)
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    model = TreeModel(**vars(parser.parse_args()))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(model, request.pop("do"))(**request)
        except Exception as problem:
            traceback.print_exc()
            reply = {"problem": one_line(problem)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
