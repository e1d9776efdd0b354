"""What layers occupy on a CPU, before and after a forward pass: resident memory of a process of its own each.

`python -m benchmarks.memory --out FILE` appends a line for bf16 and for W4A4: 16 layers of 3072 to 3072, on 1,024
tokens. Freed memory is given back to the system before each reading, where the C library can.
"""

import argparse
import ctypes
import gc
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from benchmarks.records import Recorder, environment

LAYERS, WIDTH, TOKENS = 16, 3072, 1024


def resident_mb() -> float:
    """Anonymous resident memory of this process in MB (Linux)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1e3


def measure(provider: str) -> None:
    """Print resident MB of the layers, before and after a forward pass of each, over the process without them."""
    from orbitdit import OrbitLinear, OrbitQuantConfig

    spec = OrbitQuantConfig("w4a4").layer((WIDTH, WIDTH))

    def make() -> nn.Module:
        linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16).requires_grad_(False)
        return linear if provider == "bf16" else OrbitLinear.from_linear(linear, spec)

    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    with torch.no_grad():
        make()(x)  # shared tables and the library's own buffers are there already
        start = resident_mb()
        layers = [make() for _ in range(LAYERS)]
        before = resident_mb()
        for layer in layers:
            layer(x)
        print(round(before - start, 1), round(resident_mb() - start, 1))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON lines; appended to")
    parser.add_argument("--measure", choices=("bf16", "W4A4"), help="in this process, to standard output")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    with args.out.open("a") as file:
        recorder = Recorder(file, environment("cpu", None))
        for provider in ("bf16", "W4A4"):
            command = [sys.executable, "-m", "benchmarks.memory", "--measure", provider]
            printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            before, after = map(float, printed)
            case = f"memory {LAYERS} layers {WIDTH} to {WIDTH}"
            recorder.write("memory", case, provider, "ok", before_mb=before, after_mb=after)


if __name__ == "__main__":
    main()
