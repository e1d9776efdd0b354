"""Kill, starve and race what writes quantized models, and count what is left: the second half of `make faults`.

    python -m scripts.faults_writing --out FILE.jsonl [--sample N]

Conversions run as `orbitdit quantize` does, in processes of their own that are forked from one which has imported
everything, so that a kill meets the work and not the imports. One JSON line for each kind, with how often each outcome
was seen; outcomes that must not be are named "WRONG: ...". `--sample N` tries N times of each kind.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import diffusers
import torch

import orbitdit
from orbitdit import OrbitDiTError, OrbitQuantConfig, cli
from orbitdit.integrations.conversion import quantize_folder
from orbitdit.integrations.folders import load_model
from orbitdit.report import environment
from scripts.faults import flux

KILLS = 80
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["orbitdit.integrations.conversion", "scripts.faults_writing"])


def command(arguments: list[str], setting: str, log: Path) -> None:
    """In a child: the command line with these arguments, in a process that is short of something; what it prints goes
    to the file `log`."""
    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if setting == "no sockets":
        socket.socket.connect = refuse  # type: ignore[method-assign, assignment]
    if setting == "no home":
        os.environ |= {"HOME": "/proc", "HF_HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none"}
    sys.argv = ["orbitdit", *arguments]
    cli.main()


def refuse(*args: Any) -> None:
    raise OSError("the network was used")


def start(source: Path, target: Path, *options: str, setting: str = "") -> tuple[ForkServerProcess, Path]:
    """A conversion in a process of its own, and the file with what it prints."""
    arguments = ["quantize", str(source), "--out", str(target), "--device", "cpu", *options]
    handle, log = tempfile.mkstemp(dir=source.parent)
    os.close(handle)
    process = CONTEXT.Process(target=command, args=(arguments, setting, Path(log)))
    process.start()
    return process, Path(log)


def finish(process: ForkServerProcess, log: Path) -> int:
    """Its exit code; 2 only if it says why in one line."""
    process.join(300)
    assert process.exitcode is not None, "the command hangs"
    told = log.read_text()
    log.unlink()
    if process.exitcode == 2 and not (told.startswith("orbitdit: ") and told.count("\n") == 1):
        return 1
    return process.exitcode


def wait_for(path: Path, process: ForkServerProcess) -> None:
    """Return when `path` is there, or the process has ended."""
    while not path.exists() and process.is_alive():
        time.sleep(0.001)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def state(target: Path, expected: dict[str, bytes]) -> str:
    """ "absent", "whole", or what is wrong."""
    if not target.exists():
        return "absent"
    return "whole" if contents(target) == expected else "WRONG: a folder that is not whole"


def kills(source: Path, work: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
    """Kill conversions, by each signal in turn, at random moments while they write; then run again, maybe resuming."""
    rng, target = random.Random(0), work / "out"
    finish(*start(source, work / "out"))  # the server imports everything before
    shutil.rmtree(target)
    process, log = start(source, target)
    wait_for(work / ".out.orbitdit-partial", process)
    began = time.perf_counter()
    finish(process, log)
    seconds = time.perf_counter() - began
    for count in range(number):
        shutil.rmtree(target, ignore_errors=True)
        how = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP)[count % 4]
        resume = ["--resume"] if count % 8 >= 4 else []
        process, log = start(source, target, *resume)
        wait_for(work / ".out.orbitdit-partial", process)
        time.sleep(rng.uniform(0, 0.9 * seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid or 0, how)
        finish(process, log)
        found = state(target, expected)
        left = {path.name for path in work.iterdir()} - {"out"}
        if left and how != signal.SIGKILL and not resume:
            yield "WRONG: leftovers after a signal that can be handled"
        if found != "absent":
            yield found
            continue
        code = finish(*start(source, target, *resume))
        again = state(target, expected)
        if code or again != "whole" or [path.name for path in work.iterdir()] != ["out"]:
            yield f"WRONG: the next run ended with {code}, {again}"
        else:
            yield f"absent{', with leftovers' if left else ''}; the next run {'resumes' if resume else 'starts anew'}"


def races(source: Path, work: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
    """Two conversions into one folder."""
    for _ in range(number):
        shutil.rmtree(work / "out", ignore_errors=True)
        both = [start(source, work / "out") for _ in range(2)]
        codes = sorted(finish(*one) for one in both)
        right = codes == [0, 2] and state(work / "out", expected) == "whole" and os.listdir(work) == ["out"]
        yield "one wins, the other is refused" if right else f"WRONG: exit codes {codes}"


def starved(setting: str) -> Callable[[Path, Path, int, dict[str, bytes]], Iterator[str]]:
    """Conversions without something that they should not need."""

    def attempt(source: Path, work: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
        for _ in range(min(number, 5)):
            shutil.rmtree(work / "out", ignore_errors=True)
            code = finish(*start(source, work / "out", setting=setting))
            found = state(work / "out", expected)
            yield "whole" if (code, found) == (0, "whole") else f"WRONG: exit code {code}, {found}"

    return attempt


def full_disks(source: Path, work: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
    """Conversions onto file systems that are full at a random moment; nothing where none may be mounted."""
    rng, needed = random.Random(0), sum(map(len, expected.values()))
    for _ in range(number):
        size = rng.randrange(1 << 12, needed + (1 << 16))
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(work)]
        if subprocess.run(mount, capture_output=True).returncode:
            return
        try:
            code = finish(*start(source, work / "out"))
            found = state(work / "out", expected)
            right = (code, found) == (0, "whole") or (code == 2 and os.listdir(work) == [])
            yield {0: "whole", 2: "refused in one line, nothing left"}[code] if right else f"WRONG: {code}, {found}"
        finally:
            subprocess.run(["umount", str(work)], check=True)


def save(source: Path, target: Path, ready: Path) -> None:
    """In a child: save the model in `source` over that in `target`, in place, as diffusers does."""
    torch.set_num_threads(1)
    model: Any = load_model(source)
    ready.touch()
    model.save_pretrained(target, max_shard_size="50KB")


def saves(source: Path, work: Path, number: int, expected: dict[str, bytes]) -> Iterator[str]:
    """`save_pretrained` over another model's folder, killed at a random moment; then load it."""
    models = []
    for seed in (0, 1):
        model: Any = flux(seed)
        orbitdit.quantize_(model, OrbitQuantConfig("w4a4"), progress=False)
        model.save_pretrained(work / str(seed), max_shard_size="50KB")
        models.append(dict(load_model(work / str(seed)).state_dict()))
    saved: Any = load_model(work / "0")
    began = time.perf_counter()
    saved.save_pretrained(work / "timed", max_shard_size="50KB")
    seconds, rng = time.perf_counter() - began, random.Random(0)
    for _ in range(number):
        target, ready = work / "target", work / "ready"
        ready.unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(work / "1", target)
        process = CONTEXT.Process(target=save, args=(work / "0", target, ready))
        process.start()
        wait_for(ready, process)
        time.sleep(rng.uniform(0, 1.5 * seconds))
        process.kill()
        process.join()
        try:
            found = dict(load_model(target).state_dict())
        except OrbitDiTError as error:
            yield "WRONG: more than a line" if "\n" in str(error) else "refused"
            continue
        same = [m.keys() == found.keys() and all(torch.equal(m[n], found[n]) for n in m) for m in models]
        yield "the new model" if same[0] else "the old model" if same[1] else "WRONG: a mix loads"


KINDS: dict[str, Callable[[Path, Path, int, dict[str, bytes]], Iterator[str]]] = {
    "conversions killed at random moments": kills,
    "save_pretrained over another model, killed at random moments": saves,
    "two conversions into one folder": races,
    "disks that are full": full_disks,
    "no sockets": starved("no sockets"),
    "no home that can be written": starved("no home"),
}


def run(kind: str, number: int, base: Path) -> dict[str, Any]:
    """The result line of a kind, tried so often; in `base`, an empty folder."""
    source, expected = base / "source", base / "expected"
    flux(0).save_pretrained(source)  # type: ignore[operator]
    quantize_folder(source, expected, OrbitQuantConfig("w4a4"))
    (base / "work").mkdir()
    outcomes = Counter(KINDS[kind](source, base / "work", number, contents(expected)))
    return {"writing": kind, "tried": sum(outcomes.values()), "outcomes": dict(outcomes)}


def main() -> None:
    """Run all kinds, appending a line for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=KILLS)
    parser.add_argument("--kind", choices=KINDS)
    options = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    diffusers.utils.logging.disable_progress_bar()
    with options.out.open("a", encoding="utf-8") as out:
        for kind in [options.kind] if options.kind else KINDS:
            with tempfile.TemporaryDirectory(prefix="faults-") as base:
                line = run(kind, options.sample, Path(base))
            out.write(json.dumps(line | {"environment": environment()}) + "\n")
            out.flush()
            print(kind, line["tried"], line["outcomes"], flush=True)


if __name__ == "__main__":
    main()
