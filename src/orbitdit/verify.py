"""Checking saved models against their manifests: while they are loaded, and on their own. docs/format.md says what is
checked.

Loading hashes each tensor in a thread beside, when the file that holds it has been opened: the bytes are those that the
model gets. `verify` reads files in blocks and loads nothing.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from orbitdit.checkpoint import read_json
from orbitdit.errors import CheckpointError
from orbitdit.manifest import (
    ENTRY,
    Manifest,
    check_config,
    check_hash,
    check_names,
    loads,
    read_header,
    tensor_hash,
)

_verifying: ContextVar[bool] = ContextVar("verifying", default=True)


@contextmanager
def unverified() -> Iterator[None]:
    """Within this context, models of orbitdit's format are loaded without hashing their tensors.

        with orbitdit.unverified():
            pipe = FluxPipeline.from_pretrained(folder)

    Names, shapes, configuration, and that files belong together are checked all the same.
    """
    token = _verifying.set(False)
    try:
        yield
    finally:
        _verifying.reset(token)


class Check:
    """Hashes the tensors that a loader shows and compares them with the manifest of the files they are from."""

    def __init__(self, manifest: Manifest, where: str):
        self.manifest, self.where = manifest, where
        self._found: dict[str, Future[str]] = {}
        self._threads = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "orbitdit-hash") if _verifying.get() else None

    def see(self, tensors: Mapping[str, Tensor]) -> None:
        """Begin to hash these; they must not be written to before `finish`. Any thread may call it."""
        if self._threads is not None:
            self._found |= {name: self._threads.submit(tensor_hash, tensor) for name, tensor in tensors.items()}

    def finish(self) -> None:
        """Raise CheckpointError unless the tensors seen are those of the manifest."""
        if self._threads is None:
            return
        try:
            check_names(self.manifest, self._found, self.where)
            for name, found in self._found.items():
                check_hash(self.manifest, name, found.result(), self.where)
        finally:
            self._threads.shutdown(cancel_futures=True)
            self._found.clear()


def shared_manifest(files: Iterable[str | os.PathLike[str]]) -> Manifest | None:
    """The manifest that the safetensors files of one model all have, checked against the tensors' names. None where no
    file has one. Raises CheckpointError, naming the file."""
    paths = list(map(Path, files))
    manifest, names, texts = None, list[str](), list[str | None]()
    for path in paths:
        header = read_header(path)
        names += header.tensors
        texts.append(header.metadata.get(ENTRY))
    for path, text in zip(paths, texts, strict=True):
        if text is None and any(other is not None for other in texts):
            raise CheckpointError(f"{path} has no manifest, files beside it have: files of two saves are mixed")
        if text is not None and (manifest is None or text != texts[0]):
            found = loads(text, str(path))
            if manifest is not None:
                raise CheckpointError(
                    f"{path} belongs to another save (fingerprint {found['fingerprint']}) than {paths[0].name} "
                    f"({manifest['fingerprint']}): copy all files of one save"
                )
            manifest = found
    if manifest is not None:
        check_names(manifest, names, str(paths[0] if len(paths) == 1 else paths[0].parent))
    return manifest


class Saved(NamedTuple):
    """A saved model: `where` (a folder or a file), its safetensors `files`, `config` (of config.json, or of the
    manifest for a lone file) and `manifest` (None for models that are not orbitdit's, or older than format version 5).
    """

    where: Path
    files: list[Path]
    config: dict[str, Any]
    manifest: Manifest | None


def read_saved(path: str | os.PathLike[str]) -> list[Saved]:
    """The models in a file, or in a folder with a config.json (one, and its variants), without reading tensors.

    Raises CheckpointError or ConfigError for all that does not fit together: see "What loading checks", 1 to 5.
    """
    path = Path(path)
    if path.is_file():
        manifest = shared_manifest([path])
        if manifest is None:
            raise CheckpointError(f"{path} has no manifest: it is no quantized model of orbitdit in one file")
        return [Saved(path, [path], manifest["config"], manifest)]
    config = read_json(path / "config.json")
    rest = sorted(path.glob("*.safetensors"))
    groups: list[tuple[list[Path], list[str] | None]] = []
    for index in sorted(path.glob("*.safetensors.index*.json")):
        groups.append(_indexed(index))
        rest = [file for file in rest if file not in groups[-1][0]]
    groups += [([file], None) for file in rest]
    if not groups:
        raise CheckpointError(f"{path} has no safetensors file: name a folder with model weights")
    found = []
    for files, names in groups:
        manifest = shared_manifest(files)
        if manifest is not None:
            check_config(manifest, config, str(path / "config.json"))
            if names is not None:
                check_names(manifest, names, f"the index of {path}")
        elif config.get("quantization_config", {}).get("layers"):
            raise CheckpointError(f"{files[0]} has no manifest, and should: download or copy it again")
        found.append(Saved(path, files, config, manifest))
    return found


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
    """The files and tensor names that an index names."""
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index} has no weight_map: download or copy it again")
    for shard in shards.values():
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is no file beside it: download or copy it again")
    return [index.parent / shard for shard in sorted(set(shards.values()))], list(shards)
