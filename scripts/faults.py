"""Damage saved models in every way we can think of, load them, and count what happens: `make faults`.

    python -m scripts.faults --out FILE.jsonl [--sample N] [--subject NAME] [--kind NAME]

A *subject* is a saved model and the ways to load it; a *kind* is a generator of faults. Each fault is done to a copy of
the subject's folder, and each way of loading then ends in one of

    refused     an error of orbitdit in one line
    refused unclearly   any other error: diffusers found the fault before it asked orbitdit
    identical   a model with the same tensors and the same output, bit for bit: what was damaged says nothing
    passed by   no quantized model: the configuration no longer says that orbitdit should load it
    silent      a model with another output

Beside that `orbitdit verify` says whether it finds the fault. One JSON line for each subject and kind. `--sample N`
takes N faults of each kind, which is what the tests do; else at most MOST are.
docs/reliability.md is made of the lines (scripts.faults_page).

To add a kind: a function in `KINDS` that takes a subject and a random generator and yields faults, each a sentence and
a function of the folder to damage.
"""

import argparse
import contextlib
import gc
import itertools
import json
import logging
import random
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import psutil
import safetensors.torch
import torch
from torch import Tensor, nn

import orbitdit
from orbitdit import OrbitDiTError, OrbitQuantConfig
from orbitdit.integrations.folders import load_model
from orbitdit.manifest import read_header
from orbitdit.model import packed_layers
from orbitdit.report import environment
from orbitdit.verify import verify

WEIGHTS = "diffusion_pytorch_model.safetensors"
FLIPS, MOST = 150, 600
TINY = {"in_channels": 8, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
TINY |= {"joint_attention_dim": 24, "pooled_projection_dim": 32, "axes_dims_rope": (4, 6, 6)}

Damage = Callable[[Path], None]
Fault = tuple[str, Damage]
Load = Callable[[Path], nn.Module]


@dataclass
class Subject:
    """A saved model: its folder, further folders of the same layout, ways to load it, and what it should be."""

    name: str
    folder: Path
    foreign: list[Path]
    loads: dict[str, Load]
    quantized: bool = True
    expected: tuple[dict[str, Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.expected = outcome_of(next(iter(self.loads.values()))(self.folder))


def flux(seed: int) -> nn.Module:
    """A tiny FLUX in bf16 with weights drawn from `seed`."""
    torch.manual_seed(seed)
    return nn.Module.to(diffusers.FluxTransformer2DModel(**TINY).eval(), torch.bfloat16)


@torch.no_grad()
def outcome_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """A model's tensors, and its output for fixed inputs."""
    g = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(torch.bfloat16)

    output = model(
        hidden_states=noise(1, 6, 8),
        encoder_hidden_states=noise(1, 3, 24),
        pooled_projections=noise(1, 32),
        timestep=torch.tensor([0.5]),
        img_ids=torch.arange(18).view(6, 3).float(),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, output


def from_pretrained(folder: Path) -> nn.Module:
    """As users of diffusers load it."""
    model: nn.Module = diffusers.FluxTransformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
    return model


def from_single_file(folder: Path) -> nn.Module:
    """The file alone, without its configuration."""
    file = str(folder / WEIGHTS)
    model: nn.Module = diffusers.FluxTransformer2DModel.from_single_file(file, dtype=torch.bfloat16)
    return model


def own_loader(folder: Path) -> nn.Module:
    """orbitdit's own, which the command line uses."""
    return load_model(folder, dtype=torch.bfloat16)


def subjects(base: Path) -> Iterator[Callable[[], Subject]]:
    """Each makes its subject: W4A4 and W2A4, in a folder plain and in shards, and as one file; and an unquantized model
    in diffusers alone."""
    for bits in ("w4a4", "w2a4", ""):
        yield partial(subject, base, bits, "folder", "10GB")
        yield partial(subject, base, bits, "shards", "50KB")
        if bits:
            yield partial(single, base, bits)


def subject(base: Path, bits: str, layout: str, size: str) -> Subject:
    """The tiny FLUX at `bits` ("" for as it is), saved in files of at most `size`; foreign are another model, and the
    same one with other rotations."""
    name = f"{bits or 'unquantized'}, {layout}"
    folders = [base / name / part for part in ("model", "other", "reseeded")]
    for folder, weights, seed in zip(folders, (0, 1, 0), (0, 0, 1), strict=True):
        model = flux(weights)
        if bits:
            orbitdit.quantize_(model, OrbitQuantConfig(bits, seed=seed), progress=False)
        model.save_pretrained(folder, max_shard_size=size)
    loads: dict[str, Load] = {"from_pretrained": from_pretrained}
    if bits:
        loads["own loader"] = own_loader
    return Subject(name, folders[0], folders[1 : 3 if bits else 2], loads, bool(bits))


def single(base: Path, bits: str) -> Subject:
    """The same model as one file, without a configuration beside it."""
    folder = base / f"{bits}, one file"
    folder.mkdir()
    shutil.copy(base / f"{bits}, folder" / "model" / WEIGHTS, folder / WEIGHTS)
    loads: dict[str, Load] = {"from_single_file": from_single_file, "own loader": lambda f: own_loader(f / WEIGHTS)}
    return Subject(folder.name, folder, [], loads)


def flips(subject: Subject, rng: random.Random) -> Iterator[Fault]:
    """One flipped bit each, spread over every file: a third in headers and JSON, the rest in data."""
    files = sorted(path for path in subject.folder.iterdir() if path.is_file())
    for number in range(FLIPS):
        file = files[number % len(files)]
        size = file.stat().st_size
        begin = size
        if file.suffix == ".safetensors":
            begin = min(first for _, _, first, _ in read_header(file).tensors.values())
        at = rng.randrange(begin) if number % 3 == 0 else rng.randrange(0 if begin == size else begin, size)
        yield (
            f"bit {number % 8} of byte {at} of {file.name} flipped",
            partial(flip, name=file.name, at=at, bit=number % 8),
        )


def flip(folder: Path, name: str, at: int, bit: int) -> None:
    """Flip a bit of a file."""
    data = bytearray((folder / name).read_bytes())
    data[at] ^= 1 << bit
    (folder / name).write_bytes(data)


def truncations(subject: Subject, rng: random.Random) -> Iterator[Fault]:
    """Each file cut at the beginning of each of its tensors, within the header, and with a byte too many."""
    for file in sorted(subject.folder.glob("*.safetensors")):
        header = read_header(file)
        for length in sorted({0, 8, 100, header.end - 1, *(first for _, _, first, _ in header.tensors.values())}):
            yield f"{file.name} cut to {length} bytes", partial(cut, name=file.name, length=length)
        yield f"{file.name} with a byte more", partial(cut, name=file.name, length=header.end + 1)


def cut(folder: Path, name: str, length: int) -> None:
    """Give a file another length."""
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:length].ljust(length, b"\0"))


def files(subject: Subject, rng: random.Random) -> Iterator[Fault]:
    """Files that are missing, swapped, or of another save or model with the same layout."""
    names = sorted(path.name for path in subject.folder.iterdir() if path.is_file())
    weights = [name for name in names if name.endswith(".safetensors")]
    for name in names:
        yield f"{name} missing", partial(lambda folder, name: (folder / name).unlink(), name=name)
    for a, b in itertools.pairwise(weights):
        yield f"{a} and {b} swapped", partial(swap, a=a, b=b)
    for other in subject.foreign:
        for name in names:
            if (other / name).read_bytes() != (subject.folder / name).read_bytes():
                yield f"{name} of {other.name}", partial(take, name=name, other=other)
        if len(weights) > 1:
            for name in weights:
                rest = [n for n in weights if n != name]
                yield f"all but {name} of {other.name}", partial(take_all, names=rest, other=other)


def swap(folder: Path, a: str, b: str) -> None:
    """Exchange two files."""
    (folder / a).rename(folder / "x")
    (folder / b).rename(folder / a)
    (folder / "x").rename(folder / b)


def take(folder: Path, name: str, other: Path) -> None:
    """Put another folder's file in the place of this one's."""
    shutil.copyfile(other / name, folder / name)


def take_all(folder: Path, names: list[str], other: Path) -> None:
    """The same for several files."""
    for name in names:
        take(folder, name, other)


def configuration(subject: Subject, rng: random.Random) -> Iterator[Fault]:
    """Every key of config.json: another value, of another type, null, gone, and under another name."""
    if subject.name.endswith("folder"):  # it is the same in shards
        yield from edits(subject, "config.json")


def index(subject: Subject, rng: random.Random) -> Iterator[Fault]:
    """Keys of the index, 300 such edits."""
    for file in subject.folder.glob("*.index.json"):
        yield from rng.sample(list(edits(subject, file.name)), 300)


def edits(subject: Subject, name: str) -> Iterator[Fault]:
    """Edits of every value in a JSON file."""
    for path, value in leaves(json.loads((subject.folder / name).read_text())):
        told = ".".join(map(str, path))
        for other in others(value):
            yield f"{name}: {told} = {json.dumps(other)}", partial(edit, name=name, path=path, value=other)
        if isinstance(path[-1], str):
            yield f"{name}: {told} gone", partial(edit, name=name, path=path)
            yield f"{name}: {told} renamed", partial(edit, name=name, path=path, renamed=f"{path[-1]}_")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Paths and values of everything in a JSON value, containers included."""
    if path:
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def others(value: Any) -> list[Any]:
    """Values that are not `value`."""
    if isinstance(value, bool):
        return [not value, None, "yes"]
    if isinstance(value, int):
        return [value + 1, value - 1, 2 * value + 2, float(value), str(value), None, -1]
    if isinstance(value, float):
        return [value * 2 + 1, None]
    if isinstance(value, str):
        return [f"{value}x", value.upper(), "", None, 3, [value]]
    if value is None:
        return [0, 1, "x"]
    return [None, [], {}, 3]


def edit(folder: Path, name: str, path: tuple[Any, ...], **change: Any) -> None:
    """Change, drop or rename the value at `path` of a JSON file."""
    values = json.loads((folder / name).read_text())
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    if "value" in change:
        inner[path[-1]] = change["value"]
    else:
        value = inner.pop(path[-1])
        if "renamed" in change:
            inner[change["renamed"]] = value
    (folder / name).write_text(json.dumps(values, indent=2))


def tensors(subject: Subject, rng: random.Random) -> Iterator[Fault]:
    """30 tensors dropped, renamed, replaced by zeros, in another shape or dtype, and one too many; the file is written
    anew around each with the metadata it had."""
    for file in [] if subject.name.endswith("shards") else sorted(subject.folder.glob("*.safetensors")):
        for name in rng.sample(sorted(read_header(file).tensors), 30):
            for told, change in TENSOR_CHANGES.items():
                yield f"{name} {told}", partial(rewrite, file=file.name, name=name, change=change)


TENSOR_CHANGES: dict[str, Callable[[dict[str, Tensor], str], Any]] = {
    "dropped": lambda all_, name: all_.pop(name),
    "renamed": lambda all_, name: all_.update({f"{name}_": all_.pop(name)}),
    "zeroed": lambda all_, name: all_.update({name: torch.zeros_like(all_[name])}),
    "reversed": lambda all_, name: all_.update({name: all_[name].flatten().flip(0).view(all_[name].shape).clone()}),
    "flattened": lambda all_, name: all_.update({name: all_[name].flatten()[None].clone()}),
    "cast": lambda all_, name: all_.update({name: all_[name].to(torch.float16)}),
    "doubled": lambda all_, name: all_.update({f"{name.rpartition('.')[0]}.more.codes": all_[name].clone()}),
}


def rewrite(folder: Path, file: str, name: str, change: Callable[[dict[str, Tensor], str], Any]) -> None:
    """Write a safetensors file anew with changed tensors."""
    metadata = read_header(folder / file).metadata
    found = {key: tensor.clone() for key, tensor in safetensors.torch.load_file(folder / file).items()}
    change(found, name)
    safetensors.torch.save_file(found, folder / file, metadata=metadata)


Kind = Callable[[Subject, random.Random], Iterator[Fault]]
KINDS: dict[str, Kind] = {
    "flipped bits": flips,
    "truncated files": truncations,
    "missing, swapped and foreign files": files,
    "edited config.json": configuration,
    "edited index": index,
    "changed tensors": tensors,
}


def run(subject: Subject, kind: str, sample: int | None = None, seed: int = 0) -> dict[str, Any]:
    """The result line of a kind of faults: counts by way of loading, how many `verify` finds, and examples."""
    rng = random.Random(f"{seed} {subject.name} {kind}")
    faults = list(KINDS[kind](subject, rng))
    if len(faults) > (sample or MOST):
        faults = rng.sample(faults, sample or MOST)
    counts: dict[str, Counter[str]] = {way: Counter() for way in subject.loads}
    notes: dict[str, list[str]] = {"silent": [], "passed by": [], "refused unclearly": [], "missed by verify": []}
    for told, damage in faults:
        with tempfile.TemporaryDirectory(prefix="faults-") as scratch:
            folder = Path(shutil.copytree(subject.folder, Path(scratch) / "model"))
            damage(folder)
            outcomes = []
            for way, load in subject.loads.items():
                outcome, note = judge(subject, load, folder)
                counts[way][outcome] += 1
                outcomes.append(outcome)
                if outcome in notes:
                    notes[outcome].append(f"{way}: {told}{note}")
            part = folder if (subject.folder / "config.json").exists() else folder / WEIGHTS
            if subject.quantized and set(outcomes) != {"identical"} and not is_found(part):
                notes["missed by verify"].append(told)
    line: dict[str, Any] = {"subject": subject.name, "kind": kind, "tried": len(faults)}
    line |= {"ways": {way: dict(count) for way, count in counts.items()}}
    return (
        line | {name: len(told) for name, told in notes.items()} | {"examples": {n: t[:20] for n, t in notes.items()}}
    )


def judge(subject: Subject, load: Load, folder: Path) -> tuple[str, str]:
    """What loading a damaged folder ends in, and a note."""
    try:
        with plain_dtype():
            model = load(folder)
        state, output = outcome_of(model)
    except Exception as error:
        if isinstance(error, OrbitDiTError) and "\n" not in str(error):
            return "refused", ""
        return "refused unclearly", f" ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    expected, wanted = subject.expected
    same = state.keys() == expected.keys() and all(same_bits(state[name], expected[name]) for name in state)
    if same and same_bits(output, wanted):
        return "identical", ""
    return ("passed by" if subject.quantized and not any(packed_layers(model)) else "silent"), ""


@contextlib.contextmanager
def plain_dtype() -> Iterator[None]:
    """fp32 as default again at the end: diffusers leaves another one behind when it fails."""
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, NaN and the sign of zero included."""
    if a.dtype != b.dtype or a.shape != b.shape or a.is_meta or b.is_meta:
        return False
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def is_found(path: Path) -> bool:
    """Whether `orbitdit verify` finds a fault."""
    try:
        return any(finding.problem for finding in verify(path))
    except OrbitDiTError:
        return True


def memory(subject: Subject, forwards: int = 10_000, loads: int = 100) -> dict[str, Any]:
    """Resident MB before and after so many forwards of one model, and loads of a model that is then dropped, with the
    garbage collector off; both after a tenth as many."""
    process, line = psutil.Process(), {"subject": subject.name, "memory": True}
    model = from_pretrained(subject.folder)
    steps = {
        "forwards": (lambda: outcome_of(model), forwards),
        "loads": (lambda: from_pretrained(subject.folder), loads),
    }
    gc.collect()
    gc.disable()
    try:
        for name, (step, count) in steps.items():
            for number in range(count + count // 10):
                if number == count // 10:
                    before = process.memory_info().rss
                step()
            line[name] = {"count": count, "mb": [round(m / 1e6, 2) for m in (before, process.memory_info().rss)]}
    finally:
        gc.enable()
    return line


def main() -> None:
    """Run what is asked for, appending a line for each subject and kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", type=int)
    parser.add_argument("--subject", help="part of a subject's name")
    parser.add_argument("--kind", choices=[*KINDS, "memory"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="subjects-") as base, options.out.open("a", encoding="utf-8") as out:
        for make in subjects(Path(base)):
            found = make()
            if (options.subject or "") not in found.name:
                continue
            wanted = [options.kind] if options.kind else list(KINDS)
            for kind in wanted:
                began = time.perf_counter()
                if kind == "memory":
                    continue
                line = run(found, kind, options.sample)
                if not line["tried"]:
                    continue
                line |= {"seconds": round(time.perf_counter() - began, 1), "environment": environment()}
                out.write(json.dumps(line) + "\n")
                out.flush()
                print(found.name, kind, line["tried"], line["ways"], line["missed by verify"], flush=True)
                for note in ("silent", "missed by verify"):
                    for told in line["examples"][note][:5]:
                        print(f"    {note}: {told}", flush=True)
            if "w4a4, folder" in found.name and options.kind in (None, "memory") and not options.sample:
                line = memory(found) | {"environment": environment()}
                out.write(json.dumps(line) + "\n")
                print(line, flush=True)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
