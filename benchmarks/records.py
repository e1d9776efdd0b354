"""Results as JSON lines: one line a measurement, complete in itself, written at once."""

import json
import platform
import subprocess
import time
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("diffusers", "orbitquant", "torchao", "comfy-kitchen", "sdnq")


class Recorder:
    """Writes lines to `file`, each with what all measurements of the process share, and tells the terminal."""

    def __init__(self, file: TextIO, shared: dict[str, Any]):
        self.file, self.shared = file, shared

    def write(self, suite: str, case: str, provider: str, status: str, **facts: Any) -> None:
        """`status` is ok, refused (wrong output), failed (an exception) or skipped (no time)."""
        line = {"suite": suite, "case": case, "provider": provider, "status": status, **facts, **self.shared}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        told = f"{facts['median_us']:.1f} us" if "median_us" in facts else f"{status}: {facts.get('note', facts)}"
        print(f"{suite} | {case} | {provider} | {told}", flush=True)


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """GPU, versions, commit and date; and what a copy of 1 GiB moves here, read plus write, in TB/s."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else cpu_name()
    found = {name: installed(name) for name in PACKAGES}
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": installed("triton"),
        "cuda": torch.version.cuda,
        "packages": {name: value for name, value in found.items() if value},
        "commit": commit or git_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "copy_tbps": round(copy_bandwidth(device), 3),
    }


def cpu_name() -> str:
    """The processor and how many of its cores torch uses."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return f"CPU ({name}, {torch.get_num_threads()} threads)"


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str:
    """The commit of the checkout, "+dirty" when tracked files differ from it, "unknown" outside a checkout."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=ROOT, capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+dirty" if changed else "")


def copy_bandwidth(device: str) -> float:
    size = 1 << (30 if device == "cuda" else 24)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * size / median(times[2:]) / 1e12
