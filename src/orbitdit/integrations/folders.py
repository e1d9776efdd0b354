"""Models and pipelines as folders in diffusers' layout: what is in them, and loading it."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from orbitdit.checkpoint import (
    check_folder,
    check_name,
    read_json,
    stored_dtype,
)
from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import CheckpointError, DependencyError, ModelError, OrbitDiTError
from orbitdit.integrations.diffusers import check_complete
from orbitdit.integrations.single_file import load_file
from orbitdit.shapes.worlds import SHAPES, WORLDS, World
from orbitdit.verify import check_listing, read_saved

OWN_PIPELINES = {"ShapesPipeline": "orbitdit.shapes.pipeline"}
"""Pipelines that diffusers does not know: class -> module."""

LIBRARIES = ("diffusers", "transformers", *OWN_PIPELINES.values())
"""Where classes of components come from."""
MAX_PARAMETERS = 10_000
"""Of a model; the largest that diffusers has are of some thousand tensors."""


def transformers_in(folder: Path) -> dict[str, Path]:
    """Component names and folders of the transformers in a pipeline folder; {"": folder} for a single model."""
    if not (folder / "model_index.json").exists():
        read_json(folder / "config.json")
        return {"": folder}
    names = components_in(folder)
    found = {name: folder / name for name in names if name.startswith("transformer") and (folder / name).is_dir()}
    if not found:
        raise CheckpointError(f"{folder} has no transformer folder: there is nothing to quantize")
    return found


def components_in(folder: Path) -> list[str]:
    """The names of components in `folder/model_index.json`, whether their folders are there or not.

    Raises CheckpointError for one that is no plain name."""
    index = folder / "model_index.json"
    return [check_name(name, index) for name, value in read_json(index).items() if isinstance(value, list)]


def skeleton(folder: Path) -> nn.Module:
    """The model that `folder/config.json` describes, in bf16 on the meta device: names and shapes, no weights.

    Raises ModelError when the folder holds a quantized model, CheckpointError for a configuration that makes no model.
    """
    return model_of(read_json(folder / "config.json"), folder)


def model_of(config: dict[str, Any], where: Path) -> nn.Module:
    """The model that `config`, which `where` has, describes; otherwise as `skeleton`."""
    if "quantization_config" in config:
        raise ModelError(f"{where} is quantized already: name the full-precision model instead")
    cls = _model_class(config, where)
    with init_empty_weights(), _bounded(where), _readable(where):
        model: nn.Module = cls.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


@contextmanager
def _bounded(where: Path) -> Iterator[None]:
    """Raise CheckpointError as soon as more than MAX_PARAMETERS parameters are made."""
    count = 0

    def check(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_PARAMETERS:
            raise CheckpointError(
                f"{where} describes a model of more than {MAX_PARAMETERS:,} tensors: it is damaged or hostile"
            )

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def load_model(
    folder: Path,
    config: OrbitQuantConfig | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> nn.Module:
    """The model in `folder`, quantized while loading when `config` is given, in `dtype` or as it is stored.

    `folder` may also be the one file of a quantized model.

    `device` (the CPU if left out) is where its weights are quantized, one by one, and where it is then.
    Raises CheckpointError for files that are missing, damaged or pickles, for tensors that are missing or have
    another shape, and errors as `orbitdit.plan` does.
    """
    if folder.is_file() and config is None:
        return load_file(folder, dtype, device or "cpu")
    check_folder(folder)
    stored = read_json(folder / "config.json")
    read_saved(folder)
    if config is not None and "quantization_config" in stored:
        raise ModelError(f"{folder} is quantized already: name the full-precision model instead")
    cls = _model_class(stored, folder)
    options = {"dtype": dtype or stored_dtype(folder), "use_safetensors": True, "local_files_only": True}
    if config is not None:
        options["quantization_config"] = config
    if device is not None:
        options["device_map"] = device
    model: nn.Module
    with _bounded(folder), _readable(folder):
        model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])[0]
        raise CheckpointError(f"{folder} has no tensor {missing!r}: it is incomplete or of another model")
    check_complete(model)
    return model


def load_pipeline(folder: Path, dtype: torch.dtype) -> diffusers.DiffusionPipeline:
    """The pipeline in `folder`: diffusers' own classes and those of OWN_PIPELINES.

    Raises as `load_model` does, and DependencyError when the class needs a package that is not installed.
    """
    name = read_json(folder / "model_index.json").get("_class_name")
    for component in transformers_in(folder).values():
        check_folder(component)
        read_saved(component)
    check_listing(folder)
    _check_libraries(folder)
    cls = diffusers.DiffusionPipeline
    if isinstance(name, str) and name in OWN_PIPELINES:
        cls = getattr(importlib.import_module(OWN_PIPELINES[name]), name)
    elif not _is_class(name, diffusers.DiffusionPipeline):
        raise CheckpointError(f"{folder}: the pipeline class {name!r} is unknown to diffusers {diffusers.__version__}")
    with _readable(folder):
        return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)


def world_of(folder: Path) -> World | None:
    """The world whose pictures the pipeline in `folder` draws, None for a model of anything else."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    world = index.get("world", SHAPES.name)
    return WORLDS.get(world) if isinstance(world, str) and index.get("_class_name") == "ShapesPipeline" else None


def _model_class(config: dict[str, Any], where: Path) -> Any:
    name = config.get("_class_name")
    if not _is_class(name, diffusers.ModelMixin):
        raise CheckpointError(f"{where}: the model class {name!r} is unknown to diffusers {diffusers.__version__}")
    return getattr(diffusers, str(name))


def _check_libraries(folder: Path) -> None:
    """Raise CheckpointError for components of libraries that no pipeline needs: diffusers would import them."""
    index = folder / "model_index.json"
    for name, value in read_json(index).items():
        library = value[0] if isinstance(value, list) and value else None
        known = isinstance(library, str) and (library in LIBRARIES or hasattr(diffusers.pipelines, library))
        if library is not None and not known:
            raise CheckpointError(
                f"{index}: {name!r} is of the library {library!r:.80}; those of {', '.join(LIBRARIES)} are imported"
            )


def _is_class(name: Any, base: type) -> bool:
    """Whether diffusers has a class of this name below `base`.

    Raises DependencyError when a package that the class needs is not installed: diffusers has a stand-in then.
    """
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    missing = [package for package in getattr(found, "_backends", ()) if importlib.util.find_spec(package) is None]
    if missing:
        raise DependencyError(f"{name} needs {', '.join(missing)}: run pip install {' '.join(missing)}")
    return isinstance(found, type) and issubclass(found, base) and found is not base


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Turn what diffusers raises on files it cannot use into one line with the folder's name, and undo the default
    dtype that it then leaves behind."""
    dtype = torch.get_default_dtype()
    try:
        yield
    except OrbitDiTError:
        raise
    except (AttributeError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).partition(". If you want")[0].split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
    finally:
        torch.set_default_dtype(dtype)
