"""The manifest of a saved model: what was saved, so that nothing else can pass for it. docs/format.md describes it.

A manifest is plain data that travels as JSON in the metadata of every safetensors file of a model: the whole
configuration with the record of layers, a hash of each tensor, checksums of the rotations and tables that the codes are
read with, and a fingerprint of all that. Files of another save have another fingerprint.

Hashes are XXH3 with 128 bits: they find damage and mix-ups, at memory speed, and are no protection against forgery.
"""

import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from orbitdit.codebooks import points
from orbitdit.codebooks.lloyd_max import lloyd_max
from orbitdit.config import FORMAT_VERSION
from orbitdit.errors import CheckpointError
from orbitdit.ops.rotate_encode.means import MEAN_BITS
from orbitdit.rotation import rotation
from orbitdit.spec import INT4, LayerSpec

Manifest = dict[str, Any]

ENTRY = "orbitdit"
"""The entry of a safetensors file's metadata that holds the manifest."""
HASH = "xxh3_128"
UNKNOWN = "0" * 32
"""Stands for a hash that is not known yet: it is as long as one."""
NO_SOURCE: Mapping[str, str | None] = {"model": None, "revision": None}
VOLATILE = ("_diffusers_version", "_name_or_path", "_pre_quantization_dtype", "_commit_hash", "_use_default_values")
"""Keys of a model's configuration that say nothing of the model."""
MAX_HEADER = 100_000_000
"""Bytes of a safetensors header: what the format's own library allows."""
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The dtypes of safetensors files that models have, by their names there."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def hasher(dtype: str, shape: Iterable[int]) -> xxhash.xxh3_128:
    """The hash of a tensor of `dtype` (as safetensors names it) and `shape`, to be fed its bytes by `update`, in order
    and in blocks of any size; `hexdigest()` then is what `tensor_hash` gives."""
    return xxhash.xxh3_128(f"{dtype} {'x'.join(map(str, shape))}\n".encode())


def tensor_hash(tensor: Tensor) -> str:
    """The hash of dtype, shape and bytes (little end first, row by row), 32 hexadecimal digits.

    Raises CheckpointError for a tensor that has no values (on the meta device) or a dtype that is not in `DTYPES`.
    """
    if tensor.is_meta or tensor.dtype not in NAMES:
        raise CheckpointError(f"a tensor of {tensor.dtype} on {tensor.device} cannot be saved: load the model first")
    found, step = hasher(NAMES[tensor.dtype], tensor.shape), 1 << 24
    flat = tensor.detach().reshape(-1).contiguous()
    blocks = (flat,) if tensor.device.type == "cpu" else flat.split(step)
    for block in blocks:
        found.update(block.cpu().view(torch.uint8).numpy().data)
    return found.hexdigest()


def source_of(path: str | os.PathLike[str] | None) -> dict[str, str | None]:
    """Model and revision that a name, a folder or a file of the hub's cache stands for; of other folders the name."""
    parts = Path(path).parts if path else ()
    if "snapshots" in parts[1:-1]:
        at = parts.index("snapshots", 1)
        if parts[at - 1].startswith("models--"):
            return {"model": parts[at - 1].removeprefix("models--").replace("--", "/"), "revision": parts[at + 1]}
    if not parts:
        return dict(NO_SOURCE)
    local = len(parts) != 2 or Path(*parts).exists()
    return {"model": Path(*parts).name if local else str(path), "revision": None}


def checksums(specs: Iterable[LayerSpec]) -> dict[str, dict[str, str]]:
    """Checksums of what codes are read with: of each rotation in use, "3072 s0" -> of permutation and signs, and of
    each table, "3072 scalar4" -> of its points. Rotations are hashed as tensors I64 and F32; points are in units of
    2^-20 at unit variance, rounded, I32: their last digits differ between machines."""
    rotations, tables = {}, {}
    for spec in dict.fromkeys(specs):
        dim, code = spec.in_features, spec.weight
        if code.codebook == INT4:
            continue
        assert spec.seed is not None
        if f"{dim} s{spec.seed}" not in rotations:
            drawn = rotation(dim, spec.seed)
            parts = tensor_hash(drawn.permutation), tensor_hash(drawn.signs)
            rotations[f"{dim} s{spec.seed}"] = " ".join(parts)
        name = f"{dim} {code.key.removesuffix(f'.{code.scale}')}"
        if name not in tables:
            values, step = points(code, dim, torch.device("cpu"), torch.float64)
            tables[name] = _table_hash(values * step, dim)
        bits = [] if spec.tokens is None else [spec.tokens.bits]
        bits += [MEAN_BITS] if spec.tokens is not None and spec.tokens.group_size is not None else []
        for b in bits:
            if f"{dim} scalar{b}" not in tables:
                tables[f"{dim} scalar{b}"] = _table_hash(lloyd_max(dim, b).centroids, dim)
    return {"rotations": rotations, "tables": tables}


def _table_hash(values: Tensor, dim: int) -> str:
    return tensor_hash((values * dim**0.5 * 2**20).round().to(torch.int32))


def make(
    config: Mapping[str, Any], tensors: Mapping[str, str], source: Mapping[str, str | None] = NO_SOURCE
) -> Manifest:
    """The manifest of a model with the configuration `config` (as in config.json, with its `quantization_config`) and
    `tensors`, name -> hash. `UNKNOWN` hashes may be given first: the manifest with the real ones is as long."""
    kept = json.loads(json.dumps(dict(config), default=_plain))
    kept = {key: kept[key] for key in kept if key not in VOLATILE or key == VOLATILE[0]}  # a name may be a local path
    kept["quantization_config"].pop("fingerprint", None)
    manifest = {
        "format_version": FORMAT_VERSION,
        "orbitdit_version": sys.modules["orbitdit"].__version__,
        "hash": HASH,
        "source": dict(source),
        "config": kept,
        **checksums(specs_of(kept).values()),
        "tensors": dict(sorted(tensors.items())),
    }
    return {**manifest, "fingerprint": fingerprint(manifest)}


def _plain(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else str(value)


def specs_of(config: Mapping[str, Any]) -> dict[str, LayerSpec]:
    """What each layer is, by the record in a model's configuration. Raises ConfigError for keys of no layer."""
    layers = config.get("quantization_config", {}).get("layers", {})
    return {name: LayerSpec.parse(key) for name, key in layers.items()}


def fingerprint(manifest: Mapping[str, Any]) -> str:
    """The hash of everything else in the manifest."""
    return xxhash.xxh3_128(dumps({k: v for k, v in manifest.items() if k != "fingerprint"}).encode()).hexdigest()


def dumps(manifest: Mapping[str, Any]) -> str:
    """The manifest as text, in ASCII with sorted keys: the same values give the same text."""
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))


_SCHEMA = {"format_version": int, "orbitdit_version": str, "hash": str, "source": dict, "config": dict}
_SCHEMA |= {"rotations": dict, "tables": dict, "tensors": dict, "fingerprint": str}


def loads(text: str, where: str) -> Manifest:
    """The manifest in `text`, which `where` (a file) holds. Raises CheckpointError unless it is whole: readable, of
    this format or an older one, with its own fingerprint, and with the rotations and tables that this orbitdit has."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict) or type(manifest.get("format_version")) is not int:
        raise CheckpointError(f"{where}: its manifest cannot be read: download or copy it again")
    if manifest["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{where} has format version {manifest['format_version']}, newer than this orbitdit reads: upgrade orbitdit"
        )
    sound = all(type(manifest.get(key)) is kind for key, kind in _SCHEMA.items()) and manifest["hash"] == HASH
    try:
        sound = sound and fingerprint(manifest) == manifest["fingerprint"]
        found = checksums(specs_of(manifest["config"]).values()) if sound else {}
    except (AttributeError, ValueError, RecursionError):
        sound = False
    if not sound:
        raise CheckpointError(f"{where}: its manifest is damaged: download or copy it again")
    for kind, values in found.items():
        for name in sorted({*values, *manifest[kind]}):
            if values.get(name) != manifest[kind].get(name):
                raise CheckpointError(
                    f"{where} was made with other {kind} for {name!r} than this orbitdit has (it was saved by version "
                    f"{manifest['orbitdit_version']}): install that version, or quantize the model again"
                )
    return manifest


def check_fingerprint(manifest: Manifest, said: str, where: str) -> None:
    """Raise CheckpointError unless `said`, the fingerprint in a model's configuration, is the manifest's."""
    if said != manifest["fingerprint"]:
        raise CheckpointError(
            f"{where}: config.json belongs to another save (fingerprint {said or 'missing'}) than the tensors "
            f"({manifest['fingerprint']}): copy all files of one save"
        )


def check_config(manifest: Manifest, config: Mapping[str, Any], where: str, exactly: bool = True) -> None:
    """Raise CheckpointError, naming the key, unless `config` is what the manifest has, `VOLATILE` keys aside.

    `exactly` is for the content of config.json; without it keys that the manifest does not have may be there (those
    that a newer diffusers added).
    """
    saved, given = manifest["config"], json.loads(json.dumps(dict(config), default=_plain))
    if isinstance(given.get("quantization_config"), dict):
        given["quantization_config"].pop("fingerprint", None)  # for `check_fingerprint`
    for key in sorted({*saved, *given}):
        if key in VOLATILE or (not exactly and (key not in saved or key not in given)):
            continue
        found = _difference(key, given.get(key), saved.get(key))
        if found:
            raise CheckpointError(
                f"{where}: {found} when the model was saved: the configuration was changed or belongs to another "
                "model; download or copy it again"
            )


def _difference(key: str, given: Any, saved: Any) -> str:
    """How two values of `key` differ, "" if they do not: 1, 1.0 and true are three values."""
    texts = [json.dumps(value, sort_keys=True) for value in (given, saved)]
    if texts[0] == texts[1]:
        return ""
    if isinstance(given, dict) and isinstance(saved, dict):
        found = (_difference(f"{key}.{name}", given.get(name), saved.get(name)) for name in sorted({*given, *saved}))
        return next((text for text in found if text), f"{key} has other entries than")
    a, b = (text if len(text) <= 60 else f"{text[:57]}..." for text in texts)
    return f"{key} is {a}, and was {b}"


def check_names(manifest: Manifest, names: Iterable[str], where: str) -> None:
    """Raise CheckpointError unless `names` are those of the manifest's tensors: each one, once, and no other."""
    expected, found = manifest["tensors"], list(names)
    there = set(found)
    for kind, wrong in (("lacks the tensor", set(expected) - there), ("has the foreign tensor", there - set(expected))):
        if wrong:
            raise CheckpointError(f"{where} {kind} {min(wrong)!r}: it is incomplete or of another model; copy it again")
    if len(found) > len(there):
        twice = next(name for name in sorted(there) if found.count(name) > 1)
        raise CheckpointError(f"{where} has the tensor {twice!r} twice: files of two models are mixed; copy it again")


def check_hash(manifest: Manifest, name: str, found: str, where: str) -> None:
    """Raise CheckpointError unless the tensor `name` has the hash that the manifest says."""
    if found != manifest["tensors"].get(name):
        raise CheckpointError(f"{where}: the tensor {name!r} is not what was saved (its hash differs): copy it again")


class Header(NamedTuple):
    """What a safetensors file says of itself: `metadata`, `tensors` (name -> dtype, shape, first and last byte + 1 of
    its data in the file), and `end`, the bytes that the whole file has."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]]
    end: int


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a safetensors file. Raises CheckpointError, naming the file, unless header and size are sound."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(f"{path} is truncated or no safetensors file: download or copy it again")
            values = json.loads(file.read(length))
        metadata, begin, tensors = values.pop("__metadata__", {}), 8 + length, {}
        for name, value in values.items():
            shape, (first, last) = tuple(value["shape"]), value["data_offsets"]
            if not 0 <= first <= last:
                raise ValueError(f"data_offsets of {name}")
            tensors[name] = value["dtype"], shape, begin + first, begin + last
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("metadata")
    except OSError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): download or copy it again") from error
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, its header cannot be read: download or copy it again") from error
    end = max([begin, *(last for *_, last in tensors.values())])
    if end != size:
        raise CheckpointError(f"{path} has {size:,} bytes in place of {end:,}: download or copy it again")
    return Header(metadata, tensors, end)


def file_hashes(path: str | os.PathLike[str], block: int = 1 << 22) -> Iterator[tuple[str, str]]:
    """Name and hash of each tensor of a safetensors file, in the order of its data, read in blocks of `block` bytes
    and not mapped. Raises as `read_header` does."""
    header, buffer = read_header(path), bytearray(block)
    with open(path, "rb", buffering=0) as file:
        for name, (dtype, shape, first, last) in sorted(header.tensors.items(), key=lambda item: item[1][2]):
            found, left = hasher(dtype, shape), last - first
            file.seek(first)
            while left:
                read = file.readinto(memoryview(buffer)[: min(left, block)])
                if not read:
                    raise CheckpointError(f"{path} ends within {name!r}: download or copy it again")
                found.update(memoryview(buffer)[:read])
                left -= read
            yield name, found.hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str:
    """The hash of a file's bytes, whatever it is."""
    found = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(1 << 22):
                found.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): download or copy it again") from error
    return found.hexdigest()


def replace_metadata(path: str | os.PathLike[str], **entries: str) -> None:
    """Overwrite entries of a safetensors file's metadata in place, each by a text that takes as many bytes, and sort
    all entries: safetensors writes them in any order.

    A writer that knows hashes only at the end writes a manifest with `UNKNOWN` ones first. Raises CheckpointError where
    the header's size would change. The file is not synced.
    """
    with open(path, "r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        values = json.loads(file.read(length))
        values["__metadata__"] = dict(sorted({**values["__metadata__"], **entries}.items()))
        text = json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise CheckpointError(f"{path}: the metadata would take {len(text):,} bytes where {length:,} are there")
        file.seek(8)
        file.write(text.ljust(length))
