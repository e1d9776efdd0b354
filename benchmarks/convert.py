"""Streaming conversion of a FLUX transformer with random weights: time and memory, beside what bounds them.

`python -m benchmarks.convert --model flux-dev --work FOLDER --out FILE` writes the source (24 GB for flux-dev) to
FOLDER, unless it is there, converts it in a process of its own, and appends a line. `read_s` is the time that reading
the source's bytes takes, `encode_s` that of `quantize_weight` alone (one layer of each kind, times how many there are;
on a CPU it is CPU time, to be compared with `user_s` and `system_s`, since other processes may share the cores).
`rss_mb` is the resident memory after imports, `peak_mb` the largest during the conversion, over that.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from benchmarks.records import Recorder, environment
from orbitdit import OrbitQuantConfig, plan
from orbitdit.quantize import quantize_weight

MODELS = {
    "flux-1b": {"num_layers": 2, "num_single_layers": 4, "guidance_embeds": True},
    "flux-dev": {"guidance_embeds": True},
}


def skeleton(name: str) -> FluxTransformer2DModel:
    with init_empty_weights():
        return FluxTransformer2DModel(**MODELS[name]).to(torch.bfloat16)


def make_source(name: str, folder: Path) -> None:
    """Write the model with normal weights of standard deviation 0.02, in bf16, in shards of 1 GB."""
    model = skeleton(name)
    state = model.state_dict()
    split = split_torch_state_dict_into_shards(
        state, max_shard_size="1GB", filename_pattern="diffusion_pytorch_model{suffix}.safetensors"
    )
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for file, names in split.filename_to_tensors.items():
        tensors = {
            name: torch.randn(state[name].shape, generator=generator).mul_(0.02).to(torch.bfloat16) for name in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    model.save_config(folder)


def read_seconds(folder: Path) -> float:
    """The time that reading the safetensors files takes: from the disk, where the system can be told to forget them."""
    buffer, files = bytearray(1 << 22), sorted(folder.glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def encode_seconds(name: str, config: OrbitQuantConfig, device: str) -> float:
    """The time that encoding all layers takes, without reading and writing."""
    found = plan(skeleton(name), config)
    kinds = Counter(row.spec for row in found.select("quantize", "int4"))
    seconds, clock = 0.0, time.perf_counter if device == "cuda" else time.process_time
    for spec, count in kinds.items():
        assert spec is not None
        weight = torch.randn(spec.out_features, spec.in_features, device=device).to(torch.bfloat16)
        quantize_weight(weight, spec)  # tables
        start = clock()
        quantize_weight(weight, spec)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds += count * (clock() - start)
    return seconds


def resident_mb(entry: str) -> float:
    return int(Path("/proc/self/status").read_text().partition(f"{entry}:")[2].split()[0]) / 1e3


def convert(source: Path, target: Path, bits: str, device: str) -> None:
    """Convert in this process, and print what it took as JSON."""
    from orbitdit.integrations.conversion import quantize_folder

    if device == "cuda":
        torch.cuda.init()
    before, start = resident_mb("VmRSS"), time.perf_counter()
    earlier = resource.getrusage(resource.RUSAGE_SELF)
    quantize_folder(source, target, OrbitQuantConfig(bits), device)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    user, system = used.ru_utime - earlier.ru_utime, used.ru_stime - earlier.ru_stime
    facts = {"seconds": round(seconds, 1), "user_s": round(user, 1), "system_s": round(system, 1)}
    facts |= {"rss_mb": round(before), "peak_mb": round(resident_mb("VmHWM") - before)}
    if device == "cuda":
        facts["peak_gpu_mb"] = round(torch.cuda.max_memory_reserved() / 1e6)
    print(json.dumps(facts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.convert", description=__doc__)
    parser.add_argument("--model", choices=tuple(MODELS), default="flux-1b")
    parser.add_argument("--bits", default="w4a4")
    parser.add_argument("--work", type=Path, required=True, help="folder for source and result")
    parser.add_argument("--out", type=Path, help="JSON lines; appended to")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--commit", help="what to record where the checkout has no git directory")
    parser.add_argument("--convert", action="store_true", help="convert alone, in this process")
    args = parser.parse_args()
    source, target = args.work / args.model, args.work / f"{args.model}-{args.bits}"
    if args.convert:
        convert(source, target, args.bits, args.device)
        return
    if not source.exists():
        make_source(args.model, source)
    shutil.rmtree(target, ignore_errors=True)
    facts = {"read_s": round(read_seconds(source), 1)}
    facts["encode_s"] = round(encode_seconds(args.model, OrbitQuantConfig(args.bits), args.device), 1)
    command = [sys.executable, "-m", "benchmarks.convert", "--convert", "--model", args.model, "--bits", args.bits]
    command += ["--work", str(args.work), "--device", args.device]
    facts |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    sizes = [sum(path.stat().st_size for path in folder.iterdir()) for folder in (source, target)]
    facts |= {"source_bytes": sizes[0], "bytes": sizes[1]}
    with args.out.open("a") as file:
        case = f"convert {args.model} {args.bits}"
        Recorder(file, environment(args.device, args.commit)).write("convert", case, "orbitdit", "ok", **facts)


if __name__ == "__main__":
    main()
