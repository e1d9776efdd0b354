"""A quantized copy of a model folder, a pipeline or a single file, made with bounded memory."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from orbitdit.atomic import new_folder
from orbitdit.checkpoint import PICKLES, check_file, check_folder, check_link, read_json
from orbitdit.config import OrbitQuantConfig
from orbitdit.convert import Job, convert, plan_conversion
from orbitdit.errors import CheckpointError, ConfigError
from orbitdit.integrations.folders import components_in, model_of, skeleton, transformers_in
from orbitdit.integrations.layouts import file_sources, flux_config, folder_sources, in_layout_of
from orbitdit.manifest import source_of
from orbitdit.verify import write_listing

MAX_FILES = 10_000
TEXTS = (".json", ".jsonl", ".txt", ".model", ".md", ".jinja", ".tiktoken", ".bpe", ".vocab")
"""What is copied of a pipeline, by the ends of names, beside the safetensors files of its components."""


def quantize_folder(
    source: Path,
    target: Path,
    config: OrbitQuantConfig,
    device: str = "cpu",
    layout: Path | None = None,
    resume: bool = False,
) -> None:
    """Write the model or pipeline `source` to the new folder `target` with transformers quantized, on `device`.

    `source` is a folder in diffusers' layout or one safetensors file, which `layout`, a folder with a config.json,
    describes where it does not say itself what it is. It is read block by block (see `convert`), so that memory does
    not grow with the model. The other components and texts of a pipeline are copied: no pickles, no code and no hidden
    files, and no weights that lie beside the components. Nothing is left behind when it fails, except with `resume`,
    which continues from what was left. Raises CheckpointError for what is missing, damaged, no safetensors file,
    or leads out of the folder, TensorError for values that cannot be quantized, and errors as `orbitdit.plan` does.
    """
    if target.resolve().is_relative_to(source.resolve()):
        raise CheckpointError(f"{target} lies inside {source}: choose an output folder elsewhere")
    jobs, others = _jobs(source, config, layout)
    with new_folder(target, resume) as scratch, _progress(config, sum(job.nbytes for job in jobs.values())) as told:
        for path in others:
            (scratch / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, scratch / path)
        journals = {name: scratch / f".{name or 'model'}.done.jsonl" for name in jobs}
        for name, job in jobs.items():
            convert(job, scratch / name, device, told, journals[name])
        for journal in journals.values():
            journal.unlink()
        if "" not in jobs:
            write_listing(scratch)


def _jobs(source: Path, config: OrbitQuantConfig, layout: Path | None) -> tuple[dict[str, Job], list[Path]]:
    """What is to be converted, by component ("" for a lone model), and the paths in `source` that are copied."""
    if source.is_file():
        return {"": _file_job(source, config, layout)}, []
    if layout is not None:
        raise ConfigError(f"--config has no effect for {source}, a folder with its own config.json: leave it out")
    components, jobs = transformers_in(source), {}
    for name, folder in components.items():
        check_link(folder / "config.json", source)
        check_folder(folder)
        model: Any = skeleton(folder)
        model.register_to_config(_name_or_path=source.name)  # else the local path would travel along
        jobs[name] = plan_conversion(model, config, folder_sources(folder), source_of(source), folder)
    return jobs, [] if "" in components else _copied(source, [n for n in components_in(source) if n not in components])


def _file_job(file: Path, config: OrbitQuantConfig, layout: Path | None) -> Job:
    sources = file_sources(file)
    described = flux_config(sources) if layout is None else read_json(layout / "config.json")
    if described is None:
        raise CheckpointError(f"{file} does not say what model it is: name a folder with its config.json by --config")
    model: Any = model_of(described, layout or file)
    model.register_to_config(_name_or_path=file.stem)
    return plan_conversion(model, config, in_layout_of(model, sources, file), source_of(file), file)


def _copied(folder: Path, components: list[str]) -> list[Path]:
    """Files of a pipeline that are copied: texts at its top, texts and safetensors files of `components`.

    Raises CheckpointError for links that lead out of the folder or to folders, for components whose weights are
    pickles, and for more than MAX_FILES.
    """
    found = []
    for top in (Path(), *map(Path, components)):
        there = list(_files(folder / top, folder, deep=top != Path()))
        ends = TEXTS if top == Path() else (*TEXTS, ".safetensors")
        pickles = [path for path in there if path.suffix in PICKLES]
        if pickles and top != Path() and not any(path.suffix == ".safetensors" for path in there):
            check_file(pickles[0])
        found += [p.relative_to(folder) for p in there if p.suffix.lower() in ends or p.stem in ("LICENSE", "NOTICE")]
    return found


def _files(folder: Path, root: Path, deep: bool) -> Iterator[Path]:
    """The files in `folder`, and in its folders if `deep`; not those with hidden names."""
    todo, count = [folder] if folder.is_dir() else [], 0
    while todo:
        for path in sorted(todo.pop().iterdir()):
            count += 1
            if count > MAX_FILES:
                raise CheckpointError(f"{folder} has more than {MAX_FILES:,} files: name a folder with a model alone")
            if path.name.startswith("."):
                continue
            if path.is_symlink():
                check_link(path, root)
            if path.is_file():
                yield path
            elif path.is_dir() and path.is_symlink():
                raise CheckpointError(f"{path} is a link to a folder: copy what it names into {root}")
            elif path.is_dir() and deep:
                todo.append(path)


@contextmanager
def _progress(config: OrbitQuantConfig, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes and the time left, on a terminal; what to call with numbers of bytes that are done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Quantizing to {config.label}", total=total)
        yield lambda done: progress.advance(task, done)
