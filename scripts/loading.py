"""How long loading takes with and without verification: `python -m scripts.loading --out FILE.jsonl`.

Makes a FLUX with random codes (W4A4, GB as asked), then loads it in fresh processes, verified and not in turn, until
every byte of its weights has been read once. One JSON line for each state of the page cache.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from torch import nn

import orbitdit
from orbitdit import OrbitQuantConfig
from orbitdit.model import announce, empty_layer, linear_named, plan, replace_module
from orbitdit.report import environment

GB_A_BLOCK = 0.31
"""About what one double and two single blocks of FLUX.1 take at W4A4, with INT4 modulation."""
STATES = ("warm", "cold", "copied")


def save_random(folder: Path, gb: float, shard: str) -> None:
    """Save a FLUX of about `gb` GB with random codes, never quantized."""
    blocks = max(1, round(gb / GB_A_BLOCK))
    with init_empty_weights():
        model = FluxTransformer2DModel(num_layers=blocks, num_single_layers=2 * blocks, guidance_embeds=True)
    nn.Module.to(model, torch.bfloat16)
    found = plan(model, OrbitQuantConfig("w4a4"))
    for row in found.select("quantize", "int4"):
        replace_module(model, row.name, empty_layer(linear_named(model, row.name), row))
    nn.Module.to_empty(model, device="cpu")
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dtype == torch.uint8:
            parameter.data.random_(0, 256, generator=g)
        else:
            parameter.data.uniform_(0.01, 0.02, generator=g)
    for tell in announce:
        tell(model, found.recorded)
    model.save_pretrained(folder, max_shard_size=shard)


def load_once(folder: Path, kind: str, state: str) -> float:
    """Seconds of one load in this process, or of reading the files."""
    if state == "cold":
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    if kind == "read":
        buffer = bytearray(1 << 22)
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - began
    with contextlib.nullcontext() if kind == "with" else orbitdit.unverified():
        model = FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16, disable_mmap=state == "copied")
    for parameter in model.parameters():
        parameter.data.flatten().view(torch.uint8).view(-1)[::4096].max()
    return time.perf_counter() - began


def main() -> None:
    """Measure, or (with --once) load once and print the seconds."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--shard", default="10GB")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--once", nargs=3)
    options = parser.parse_args()
    if options.once:
        folder, kind, state = options.once
        print(load_once(Path(folder), kind, state))
        return
    with tempfile.TemporaryDirectory(prefix="loading-") as scratch:
        save_random(Path(scratch), options.gb, options.shard)
        sizes = [path.stat().st_size for path in Path(scratch).glob("*.safetensors")]
        for state in STATES:
            kinds = ("read", "without", "with") if state == "cold" else ("without", "with")
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for kind in kinds * (options.runs + 1):
                command = [sys.executable, "-m", "scripts.loading", "--once", scratch, kind, state]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                seconds[kind].append(float(done.stdout.split()[-1]))
            line = {"loading": state, "gb": sum(sizes) / 1e9, "files": len(sizes), "runs": options.runs}
            line |= {kind: median(found[1:]) for kind, found in seconds.items()}
            line |= {"all": seconds, "environment": environment()}
            with options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")
            print(state, line["without"], line["with"], flush=True)


if __name__ == "__main__":
    main()
