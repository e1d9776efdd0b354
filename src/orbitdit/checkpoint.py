"""Files and folders: what is safe to read, and writing so that a half-written result is never left behind.

Only safetensors files are read. `check_folder` looks at the weights of a model folder before anything is
loaded: every shard that the index names must be there and complete. `new_folder` lets the caller write
beside the target and renames at the end.
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orbitdit.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_file(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `path` is a complete safetensors file."""
    path = Path(path)
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run code when it is read: convert it to safetensors first"
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: download or copy the model again")
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}): download or copy it again") from error


def packed_layers_in(files: Iterable[str | os.PathLike[str]]) -> dict[str, bool]:
    """The names of packed layers in safetensors files, and whether each is INT4 (has scales of groups)."""
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if name.endswith(".scales"):
                    found[name.removesuffix(".scales")] = len(file.get_slice(name).get_shape()) == 2
    return found


def check_folder(folder: str | os.PathLike[str]) -> list[Path]:
    """The complete safetensors files of a model folder. Raises CheckpointError, naming the file, otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name a model folder")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{index} has no weight_map: download or copy it again")
        for shard in sorted(set(shards.values())):
            check_file(folder / shard)
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        check_file(file)
    if not files:
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        if pickles:
            check_file(pickles[0])
        raise CheckpointError(f"{folder} has no safetensors file: name a folder with model weights")
    return files


@contextmanager
def new_folder(target: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill, beside `target`, that becomes `target` when the block ends and vanishes when it fails.

    Raises CheckpointError at once when `target` exists and is not an empty folder, or cannot be made.
    """
    target = Path(os.path.abspath(target))
    if target.is_symlink() or target == Path.cwd():
        raise CheckpointError(f"{target} is a link or the current folder: choose another output folder")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder: choose another output folder")
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error.strerror}): choose another output folder") from error
    try:
        yield scratch
        for path in (scratch, *scratch.rglob("*")):  # not as private as temporary files are made
            path.chmod(0o755 if path.is_dir() else 0o644)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def find_model(model: str | None, default: Path, weights: bool = True) -> Path:
    """The folder of `model`: a folder, a hub id such as "org/name" (downloaded; without `weights` only its
    configuration files), or `default` for None. Raises CheckpointError when there is no such model."""
    if model is None:
        return default
    if model and Path(model).is_dir():
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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is missing: name a model folder in diffusers' layout") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: download or copy the model again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object: download or copy the model again")
    return values


def stored_dtype(folder: Path) -> torch.dtype:
    """The floating dtype that most tensors of a model folder are stored in; fp32 when it holds none."""
    return most_common_dtype(check_folder(folder))


def most_common_dtype(files: Iterable[Path]) -> torch.dtype:
    """The floating dtype that most tensors in safetensors files are stored in; fp32 when they hold none."""
    names: Counter[str] = Counter()
    for path in files:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            names.update(file.get_slice(key).get_dtype() for key in keys)
    floats = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return next((floats[name] for name, _ in names.most_common() if name in floats), torch.float32)
