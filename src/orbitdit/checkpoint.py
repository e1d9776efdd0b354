"""Files and folders: what is safe to read.

Only safetensors files are read. `check_folder` looks at the weights of a model folder before anything is
loaded: every shard that the index names must be there and complete.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orbitdit.errors import CheckpointError
from orbitdit.manifest import DTYPES, read_header

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_JSON = 1 << 26
"""Bytes of the largest JSON file that is read: indexes of large models have some hundred kilobytes."""


def check_name(name: object, where: Path) -> str:
    """`name`, which the file `where` has, if it is that of a file or folder beside it. Raises CheckpointError for what
    could lead elsewhere: separators, "..", drives, names that are too long, or characters that are not printed."""
    plain = isinstance(name, str) and name.isprintable() and len(name) <= 200 and not set(name) & set("/\\:")
    if not plain or name in ("", ".", ".."):
        raise CheckpointError(f"{where} names {name!r:.80}, which is no plain name: the file is damaged or hostile")
    assert isinstance(name, str)
    return name


def check_link(path: Path, root: Path) -> None:
    """Raise CheckpointError where `path`, in the folder `root`, is a link (or lies behind one) that leads nowhere or
    out of `root`; to the files of the hub's cache it may lead."""
    try:
        real, base = path.resolve(strict=True), root.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        raise CheckpointError(f"{path} is missing, or a link that leads nowhere: copy the model again") from error
    snapshots = next((parent for parent in (base, *base.parents) if parent.parent.name == "snapshots"), None)
    blobs = None if snapshots is None else snapshots.parent.parent / "blobs"
    if not real.is_relative_to(base) and (blobs is None or not real.is_relative_to(blobs)):
        raise CheckpointError(f"{path} is a link that leads out of {root}: copy what it names into the folder")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `path` is a complete safetensors file."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read: convert it to safetensors first"
        )
    if not os.path.isfile(path):
        raise CheckpointError(f"{path} is missing: download or copy the model again")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download or copy it again") from error


def packed_layers_in(files: Iterable[str | os.PathLike[str]]) -> dict[str, bool]:
    """The names of packed layers in safetensors files, and whether each is INT4 (has scales of groups)."""
    headers = (read_header(path).tensors for path in files)
    scales = ((name, shape) for header in headers for name, (_, shape, *_) in header.items())
    return {name.removesuffix(".scales"): len(shape) == 2 for name, shape in scales if name.endswith(".scales")}


def shards_in(index: Path) -> dict[str, str]:
    """Tensor -> file beside it, as an index of shards says. Raises CheckpointError unless all are plain names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} has no weight_map: download or copy it again")
    return {name: check_name(shard, index) for name, shard in shards.items()}


def check_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """The complete safetensors files of a model folder. Raises CheckpointError, naming the file, otherwise."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise CheckpointError(f"{folder} is no folder: name a model folder")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        for shard in sorted(set(shards_in(index).values())):
            check_file(folder / shard)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        check_link(file, folder)
        check_file(file)
    if not files:
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            check_file(pickles[0])
        raise CheckpointError(f"{folder} has no safetensors file: name a folder with model weights")
    return files


def find_model(model: str | None, default: Path, weights: bool = True) -> Path:
    """The folder of `model`: a folder, a hub id such as "org/name" (downloaded; without `weights` only its
    configuration files), or `default` for None. Raises CheckpointError when there is no such model."""
    if model is None:
        return default
    if model and os.path.isdir(model):
        return Path(model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise CheckpointError(f"{model!r} is no folder and no hub id: name a model folder or an id such as 'org/name'")
    from huggingface_hub import snapshot_download

    # components and a lone model, but no single-file weights at the root and no variants beside the default ones
    tensors = ["*.txt", "*.model", "*/*.safetensors", "diffusion_pytorch_model*.safetensors"]
    patterns = ["*.json", *(tensors if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=["*.fp16.*", "*.bf16.*"]))
    except Exception as error:  # the hub's client raises errors of several libraries
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{model} is no folder, and cannot be fetched from the hub: {reason}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError when it is missing or damaged."""
    if not os.path.exists(path):
        raise CheckpointError(f"{path} is missing: name a model folder in diffusers' layout")
    if not path.is_file() or path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path} is no file, or too large for one of JSON: download or copy the model again")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): copy the model again") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: download or copy the model again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: download or copy the model again")
    return values


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def stored_dtype(folder: Path) -> torch.dtype:
    """`most_common_dtype` of the tensors of a model folder."""
    return most_common_dtype(check_folder(folder))


def most_common_dtype(files: Iterable[Path]) -> torch.dtype:
    """`main_dtype` of the tensors in safetensors files."""
    names = [dtype for path in files for dtype, *_ in read_header(path).tensors.values()]
    return main_dtype(DTYPES[name] for name in names if name in DTYPES)


def main_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype that a model stored in `dtypes` is computed in: bf16 if some are fp8, else that of fp32, bf16 and fp16
    that most tensors have; fp32 when none has."""
    counts = Counter(dtypes)
    if any(dtype in counts for dtype in FP8):
        return torch.bfloat16
    floats = torch.float32, torch.bfloat16, torch.float16
    return next((dtype for dtype, _ in counts.most_common() if dtype in floats), torch.float32)
