"""Files and folders: what is safe to read, and writing so that a half-written result is never left behind.

Only safetensors files are read. `check_folder` looks at the weights of a model folder before anything is
loaded: every shard that the index names must be there and complete. `new_folder` lets the caller write
beside the target and renames at the end.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from orbitdit.errors import CheckpointError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_file(path: str | os.PathLike) -> None:
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


def check_folder(folder: str | os.PathLike) -> list[Path]:
    """The complete safetensors files of a model folder. Raises CheckpointError, naming the file, otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder: name a model folder")
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            named = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: download or copy it again") from error
        for shard in named:
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
def new_folder(target: str | os.PathLike) -> Iterator[Path]:
    """A folder to fill, beside `target`, that becomes `target` when the block ends and vanishes when it fails.

    Raises CheckpointError at once when `target` exists and is not an empty folder, or cannot be made.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty folder: choose another output folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written ({error.strerror}): choose another output folder") from error
    try:
        yield scratch
        scratch.chmod(0o755)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
