"""A quantized model written while its source is read: block of rows by block of rows, whatever size the model has.

All shapes are known before any value is, so the files' headers are written first, and each tensor goes to its place as
its rows come. Blocks are those that `quantize_weight` works on, so the codes are the same. A journal beside the files
says which tensors are complete, with their hashes; who resumes keeps those whose bytes still have them.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from orbitdit import manifest
from orbitdit.checkpoint import main_dtype
from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import CheckpointError, TensorError
from orbitdit.fusion import places
from orbitdit.linear import Int4Linear, OrbitLinear, spec_tensor
from orbitdit.lines import append_line, resume_lines
from orbitdit.model import empty_layer, linear_named, plan, replace_module
from orbitdit.quantize import block_rows, check_finite, encoder
from orbitdit.spec import LayerSpec
from orbitdit.tensorfile import Source

WEIGHTS, PATTERN = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model{suffix}.safetensors"
SHARD_SIZE = "10GB"
"""The largest file, as diffusers has it."""
ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")
"""Dtypes as the library orders tensors in files: from the last to the first, and by name."""
Value = TypeVar("Value")


@dataclass
class Job:
    """A model to convert: `model` is what will be saved, with layers that have no values; `specs` are its quantized
    layers by each of their names; `sources` are the tensors of the full-precision model; `origin` says what they come
    from, for the manifest."""

    model: nn.Module
    specs: dict[str, LayerSpec]
    sources: dict[str, Source]
    origin: Mapping[str, str | None]

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        return sum(source.nbytes for source in self.sources.values())


class _Part(NamedTuple):
    """A tensor of the result: its file, where its bytes begin there, safetensors' name of its dtype, and its shape."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


def plan_conversion(
    model: Any, config: OrbitQuantConfig, sources: dict[str, Source], origin: Mapping[str, str | None], where: Path
) -> Job:
    """Plan the conversion of `model`, on the meta device, whose tensors are `sources`, and check that they fit.

    Raises as `plan` does, and CheckpointError, naming the tensor, for one that is missing, foreign or of another shape.
    """
    found = plan(model, config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in sorted({*expected, *sources}):
        if name not in sources:
            raise CheckpointError(f"{where} has no tensor {name!r}: it is incomplete or of another model")
        if name not in expected and not any(re.search(pattern, name) for pattern in ignored):
            raise CheckpointError(f"{where} has the tensor {name!r}, and its configuration has no place for it")
        if name in expected and sources[name].shape != expected[name]:
            raise CheckpointError(
                f"{where}: {name!r} has shape {sources[name].shape}, expected shape {expected[name]}: the file is "
                "damaged or of another model"
            )
    at = places(model)
    for row in found.select("quantize", "int4"):
        if not sources[f"{row.name}.weight"].dtype.is_floating_point:
            raise TensorError(f"{row.name}.weight: a floating-point matrix is needed; the file has integers")
        replace_module(model, row.name, empty_layer(linear_named(model, row.name), row), at)
    model.register_to_config(quantization_config=found.recorded)
    packed = ((n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, OrbitLinear | Int4Linear))
    specs = {name: module.spec for name, module in packed}
    return Job(model, specs, {name: source for name, source in sources.items() if name in expected}, origin)


def convert(job: Job, folder: Path, device: str, told: Callable[[int], object], journal: Path) -> None:
    """Write the quantized model of `job` to `folder`, in diffusers' layout, with layers quantized on `device`.

    `told` is called with the numbers of source bytes that are done. What `journal`, a file of an earlier call that was
    stopped, says is complete is not made again. Raises TensorError, naming the tensor, for NaN, Inf and weights without
    scales in bf16, and CheckpointError where the disk has too little space or the journal is of another conversion.
    """
    folder.mkdir(exist_ok=True)
    model: Any = job.model
    model.save_config(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = _tensors(job)
    split = split_torch_state_dict_into_shards(tensors, filename_pattern=PATTERN, max_shard_size=SHARD_SIZE)
    unknown = manifest.make(config, dict.fromkeys(tensors, manifest.UNKNOWN), job.origin)
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        parts: dict[str, _Part] = {}
        for name, members in split.filename_to_tensors.items():
            files[name] = stack.enter_context(_open(folder / name))
            parts |= _lay_out(files[name], name, {member: tensors[member] for member in members}, unknown)
        _check_space(folder, list(files.values()))
        output = _Output(files, parts, journal)
        output.begin({"manifest": unknown["fingerprint"], "sources": _identity(job.sources.values())})
        _fill(job, output, torch.device(device), told)
    known = manifest.make(config, output.hashes, job.origin)
    recorded = OrbitQuantConfig.from_dict(config["quantization_config"])
    model.register_to_config(quantization_config=replace(recorded, fingerprint=known["fingerprint"]))
    model.save_config(folder)
    for name in files:
        manifest.replace_metadata(folder / name, **{manifest.ENTRY: manifest.dumps(known)})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / f"{WEIGHTS}.index.json").write_text(text, encoding="utf-8")


class _Output:
    """The files of a model while they are filled, and the journal of what is complete."""

    def __init__(self, files: dict[str, BinaryIO], parts: dict[str, _Part], journal: Path):
        self.files, self.parts, self.journal = files, parts, journal
        self.hashes: dict[str, str] = {}
        self._open: dict[str, tuple[int, Any]] = {}

    def begin(self, identity: dict[str, Any]) -> None:
        """Read the journal, or start one. Raises CheckpointError for that of another conversion."""
        rows, _ = resume_lines(self.journal)
        if not rows:
            append_line(self.journal, identity)
        elif rows[0] != identity:
            raise CheckpointError(
                f"{self.journal.parent} was begun from another source or with other options: run without --resume"
            )
        for row in rows[1:]:
            self.hashes |= {name: digest for name, digest in row.items() if self._hash(name) == digest}

    def write(self, name: str, block: Tensor) -> None:
        """Write the next rows of the tensor `name`."""
        part = self.parts[name]
        done, found = self._start(name)
        data = block.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        file = self.files[part.file]
        file.seek(part.offset + done)
        file.write(data)
        found.update(data)
        self._open[name] = done + len(data), found

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return manifest.DTYPES[self.parts[name].dtype]

    def _start(self, name: str) -> tuple[int, Any]:
        """How many bytes of a tensor are written, and their hash; it is none of those that are being written then."""
        part = self.parts[name]
        return self._open.pop(name, None) or (0, manifest.hasher(part.dtype, part.shape))

    def complete(self, *names: str) -> None:
        """These tensors are whole: note it in the journal."""
        digests = {name: self._start(name)[1].hexdigest() for name in names}
        append_line(self.journal, digests)
        self.hashes |= digests

    def _hash(self, name: str) -> str:
        part = self.parts[name]
        found, file = manifest.hasher(part.dtype, part.shape), self.files[part.file]
        left = torch.Size(part.shape).numel() * manifest.DTYPES[part.dtype].itemsize
        file.seek(part.offset)
        while left and (data := file.read(min(left, 1 << 22))):
            found.update(data)
            left -= len(data)
        return found.hexdigest()


def _fill(job: Job, output: _Output, device: torch.device, told: Callable[[int], object]) -> None:
    """Quantize or copy what is not complete yet, in the model's order."""
    todo: list[tuple[tuple[str, ...], Source, LayerSpec | None]] = []
    for name, value in _state(job.model):
        layer, _, part = name.rpartition(".")
        spec = job.specs.get(layer)
        if spec is not None and part == "spec":
            output.write(name, value)
            output.complete(name)
        elif spec is not None and part == "codes":
            todo.append(((name, f"{layer}.scales"), job.sources[f"{layer}.weight"], spec))
        elif name in job.sources:
            todo.append(((name,), job.sources[name], None))
    for names, source, _ in todo:
        told(source.nbytes * all(name in output.hashes for name in names))
    todo = [row for row in todo if not all(name in output.hashes for name in row[0])]
    parameters = {name for name, _ in job.model.named_parameters(remove_duplicate=False)}

    def blocks() -> Iterator[tuple[Source, int, int]]:
        for _, source, _ in todo:
            step = block_rows(torch.Size(source.shape[1:]).numel(), device)
            yield from ((source, start, min(start + step, source.rows)) for start in range(0, source.rows, step))

    ahead = _one_ahead(lambda block: block[0].read(*block[1:]), blocks())
    for names, source, spec in todo:
        weight = names[0] if spec is None else f"{names[0].removesuffix('.codes')}.weight"
        encode = None if spec is None else encoder(spec, device, weight)
        left = source.rows
        while left:
            rows = next(ahead)
            if weight in parameters or spec is not None:
                check_finite(rows, weight)
            parts = (rows.to(output.dtype(weight)),) if encode is None else encode(rows.to(device))
            for name, part_of_it in zip(names, parts, strict=True):
                output.write(name, part_of_it)
            left -= len(rows)
            told(source.nbytes * len(rows) // source.rows)
        output.complete(*names)


def _one_ahead(function: Callable[[Any], Value], arguments: Iterable[Any]) -> Iterator[Value]:
    """`function` of each argument, of the next one in a thread while the last is in use."""
    with ThreadPoolExecutor(1) as pool:
        futures = (pool.submit(function, argument) for argument in arguments)
        waiting = next(futures, None)
        while waiting is not None:
            following = next(futures, None)
            yield waiting.result()
            waiting = following


def _tensors(job: Job) -> dict[str, Tensor]:
    """The tensors of the result, without values."""
    model: Any = job.model
    dtype = main_dtype(source.dtype for source in job.sources.values())
    in_fp32 = set(model._keep_in_fp32_modules or ())
    found = {}
    for name, tensor in _state(model):
        if name in job.sources:
            stored = job.sources[name].dtype
            kept = torch.float32 if in_fp32 & set(name.split(".")) else dtype
            tensor = torch.empty_like(tensor, dtype=kept if stored.is_floating_point else stored, device="meta")
        found[name] = tensor.to("meta")
    return found


def _state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state of `model` as it will be when its layers have values: with their specs."""
    for name, module in model.named_modules(remove_duplicate=False):
        prefix = f"{name}." if name else ""
        own: dict[str, Tensor] = {}
        module._save_to_state_dict(own, prefix, keep_vars=False)
        yield from own.items()
        if isinstance(module, OrbitLinear | Int4Linear):
            yield f"{prefix}spec", spec_tensor(module.spec)


def _open(path: Path) -> BinaryIO:
    return open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # what is there is kept


def _lay_out(file: BinaryIO, name: str, tensors: dict[str, Tensor], unknown: manifest.Manifest) -> dict[str, _Part]:
    """Write the header of `file` and give it its size; the place of each tensor in it."""
    dtypes = {key: manifest.NAMES[tensor.dtype] for key, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", manifest.ENTRY: manifest.dumps(unknown)}}
    first = 0
    for key in sorted(tensors, key=lambda key: (-ORDER.index(dtypes[key]), key)):
        last = first + tensors[key].numel() * tensors[key].element_size()
        header[key] = {"dtype": dtypes[key], "shape": list(tensors[key].shape), "data_offsets": [first, last]}
        first = last
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    begin = 8 + len(text)
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(begin + first)
    del header["__metadata__"]
    return {
        key: _Part(name, begin + value["data_offsets"][0], value["dtype"], tuple(value["shape"]))
        for key, value in header.items()
    }


def _check_space(folder: Path, files: list[BinaryIO]) -> None:
    """Raise CheckpointError where the disk has less space than `files`, which have their sizes, still take."""
    stats = [os.fstat(file.fileno()) for file in files]
    needed, free = sum(s.st_size - 512 * s.st_blocks for s in stats), shutil.disk_usage(folder).free
    if needed > free:
        raise CheckpointError(
            f"the quantized model takes {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB: free some "
            "space or choose another output folder"
        )


def _identity(sources: Iterable[Source]) -> list[list[Any]]:
    """What says whether the source is still the same: names, sizes and times of its files."""
    paths = sorted({piece.file.path for source in sources for piece in source.pieces})
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
