"""Checking saved models against their manifests: while they are loaded, and on their own. docs/format.md says what is
checked.

Loading hashes each tensor in a thread beside, when the file that holds it has been opened: the bytes are those that the
model gets. `verify` reads files in blocks and loads nothing.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from orbitdit.checkpoint import read_json, shards_in
from orbitdit.config import FORMAT_VERSION
from orbitdit.errors import CheckpointError, OrbitDiTError
from orbitdit.manifest import (
    ENTRY,
    HASH,
    NO_SOURCE,
    Manifest,
    check_config,
    check_fingerprint,
    check_hash,
    check_names,
    file_hash,
    file_hashes,
    fingerprint,
    loads,
    read_header,
    specs_of,
    tensor_hash,
)

LISTING = "orbitdit-files.json"
"""The file in a quantized pipeline's folder that has the hashes of its other components' files."""
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
            check_fingerprint(manifest, config["quantization_config"].get("fingerprint", ""), str(files[0]))
            if names is not None:
                check_names(manifest, names, f"the index of {path}")
        elif _quantization(config).get("layers"):
            raise CheckpointError(f"{files[0]} has no manifest, and should: download or copy it again")
        found.append(Saved(path, files, config, manifest))
    return found


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `quantization_config` of a model's configuration, empty if there is none."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) else {}


def _indexed(index: Path) -> tuple[list[Path], list[str]]:
    """The files and tensor names that an index names."""
    shards = shards_in(index)
    if not isinstance(read_json(index).get("metadata"), dict):  # diffusers needs it
        raise CheckpointError(f"{index} has no metadata: download or copy it again")
    return [index.parent / shard for shard in sorted(set(shards.values()))], list(shards)


class Finding(NamedTuple):
    """What `verify` says of a part: `where` it is, `problem` ("" if there is none), and `note`, what was compared."""

    where: str
    problem: str
    note: str


def verify(path: str | os.PathLike[str]) -> Iterator[Finding]:
    """Compare a quantized model (a folder or a file) or a pipeline folder with its manifests, part by part, reading all
    of it and loading nothing.

    A part of a pipeline is a folder that model_index.json names, or all the files of its listing.
    Raises CheckpointError where there is nothing that could be verified.
    """
    path, seen = Path(path), 0
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name a model folder, a pipeline folder or a safetensors file")
    for part in _parts(path):
        try:
            models = read_saved(part)
        except OrbitDiTError as error:
            yield Finding(str(part), str(error), "")
            seen += 1
            continue
        for saved in models:
            if saved.manifest is not None or _quantization(saved.config).get("quant_method") == "orbitdit":
                yield _verify_tensors(saved)
                seen += 1
    if (path / LISTING).exists():
        yield _verify_listing(path)
    elif (path / "model_index.json").exists() and seen:
        yield Finding(str(path), "", f"no {LISTING}: files without a manifest are not compared")
    elif not seen:
        raise CheckpointError(f"{path} holds no model that orbitdit quantized: there is nothing to verify it with")


def _parts(path: Path) -> list[Path]:
    """The folders (or the file) below `path` that may hold a quantized model."""
    if path.is_file() or not (path / "model_index.json").exists():
        return [path]
    names = [name for name, value in read_json(path / "model_index.json").items() if isinstance(value, list)]
    inside = [path / name for name in sorted(names) if Path(name).name == name]
    return [part for part in inside if (part / "config.json").is_file() and any(part.glob("*.safetensors"))]


def _verify_tensors(saved: Saved) -> Finding:
    where = str(saved.where)
    if saved.manifest is None:
        version = saved.config["quantization_config"].get("format_version")
        return Finding(where, "", f"format version {version} has no hashes: save the model again to have them")
    try:
        for file in saved.files:
            for name, found in file_hashes(file):
                check_hash(saved.manifest, name, found, str(file))
    except CheckpointError as error:
        return Finding(where, str(error), "")
    count = len(saved.manifest["tensors"])
    return Finding(where, "", f"{count} tensors, configuration; fingerprint {saved.manifest['fingerprint']}")


def write_listing(folder: str | os.PathLike[str]) -> None:
    """Write LISTING into a finished pipeline folder: the hash of every file that has no manifest of its own."""
    folder = Path(folder)
    listing: dict[str, Any] = {"format_version": FORMAT_VERSION, "hash": HASH, "files": {}}
    for name, file in _files(folder):
        if file.suffix != ".safetensors" or ENTRY not in read_header(file).metadata:
            listing["files"][name] = file_hash(file)
    listing["fingerprint"] = fingerprint(listing)
    (folder / LISTING).write_text(json.dumps(listing, indent=1) + "\n", encoding="utf-8")


def check_listing(folder: str | os.PathLike[str]) -> int:
    """Compare a pipeline folder with its listing, and say how many files it has.

    Raises CheckpointError, naming the file, for one that is missing or differs, and for JSON and safetensors files in
    its component folders that it does not name. A folder without a listing has 0 files.
    """
    folder = Path(folder)
    if not (folder / LISTING).exists():
        return 0
    listing = read_json(folder / LISTING)
    files, version = listing.get("files"), listing.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise CheckpointError(f"{folder / LISTING} has format version {version}: upgrade orbitdit")
    if not isinstance(files, dict) or listing.get("hash") != HASH or fingerprint(listing) != listing.get("fingerprint"):
        raise CheckpointError(f"{folder / LISTING} is damaged: download or copy it again")
    there = dict(_files(folder))
    for name, expected in files.items():
        if name not in there:
            raise CheckpointError(f"{folder / name} is missing: download or copy it again")
        if file_hash(there[name]) != expected:
            raise CheckpointError(f"{folder / name} is not what was saved (its hash differs): copy it again")
    for name in sorted(set(there) - set(files)):
        known = there[name].suffix == ".safetensors" and ENTRY in read_header(there[name]).metadata
        if there[name].suffix in (".json", ".safetensors") and not known:
            raise CheckpointError(f"{folder / name} is foreign: {LISTING} does not name it; remove it")
    return len(files)


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Names (with "/") and paths of model_index.json and of the files in component folders; hidden files and texts for
    people aside."""
    found = [(path.relative_to(folder).as_posix(), path) for path in sorted(folder.glob("*/**/*")) if path.is_file()]
    found = [(name, path) for name, path in found if not name.startswith(".") and "/." not in name]
    found = [(name, path) for name, path in found if path.suffix != ".md"]
    index = folder / "model_index.json"
    return [*found, (index.name, index)] if index.is_file() else found


def _verify_listing(folder: Path) -> Finding:
    try:
        return Finding(str(folder), "", f"{check_listing(folder)} further files")
    except CheckpointError as error:
        return Finding(str(folder), str(error), "")


def describe(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """What is inside a model folder, a file or a pipeline folder, from headers alone: a dictionary for each quantized
    model. Raises CheckpointError as `read_saved` does, or when there is none."""
    path, seen = Path(path), False
    for part in _parts(path):
        for saved in read_saved(part):
            if _quantization(saved.config).get("quant_method") == "orbitdit":
                seen = True
                yield _describe(saved)
    if not seen:
        raise CheckpointError(f"{path} holds no model that orbitdit quantized")


def _describe(saved: Saved) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for file in saved.files:
        sizes |= {name: last - first for name, (_, _, first, last) in read_header(file).tensors.items()}
    specs, manifest = specs_of(saved.config), saved.manifest or {}
    packed = {name: sizes.get(f"{name}.codes", 0) + sizes.get(f"{name}.scales", 0) for name in specs}
    weights = sum(spec.in_features * spec.out_features for spec in specs.values())
    source = manifest.get("source", NO_SOURCE)
    kinds = Counter(f"{s.weight.key} {s.tokens.key if s.tokens else 'a16'}" for s in specs.values())
    return {
        "where": str(saved.where),
        "model": saved.config.get("_class_name"),
        "source": " @ ".join(str(part) for part in source.values() if part) or "unknown",
        "format version": saved.config["quantization_config"].get("format_version"),
        "saved by": f"orbitdit {manifest['orbitdit_version']}" if manifest else "unknown",
        "seeds": ", ".join(sorted({str(spec.seed) for spec in specs.values() if spec.seed is not None})),
        "layers": ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items())) or "not recorded",
        "bits a weight": f"{8 * sum(packed.values()) / weights:.2f} in these layers" if weights else "unknown",
        "size": f"{sum(sizes.values()) / 1e6:,.1f} MB in {len(saved.files)} files, "
        f"{sum(packed.values()) / 1e6:,.1f} MB of them codes and scales",
        "fingerprint": manifest.get("fingerprint", "none"),
    }
