"""Models and pipelines as folders in diffusers' layout: load them, quantize them, write them."""

import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from orbitdit.checkpoint import PICKLES, check_folder, new_folder, read_json, stored_dtype
from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import CheckpointError, DependencyError, ModelError, OrbitDiTError
from orbitdit.integrations.diffusers import check_complete
from orbitdit.integrations.single_file import load_file
from orbitdit.shapes.worlds import SHAPES, WORLDS, World
from orbitdit.verify import check_listing, read_saved, write_listing

OWN_PIPELINES = {"ShapesPipeline": "orbitdit.shapes.pipeline"}
"""Pipelines that diffusers does not know: class -> module."""

WEIGHTS = (".safetensors", ".gguf", *PICKLES)


def transformers_in(folder: Path) -> dict[str, Path]:
    """Component names and folders of the transformers in a pipeline folder; {"": folder} for a single model."""
    if not (folder / "model_index.json").exists():
        read_json(folder / "config.json")
        return {"": folder}
    names = [name for name, value in read_json(folder / "model_index.json").items() if isinstance(value, list)]
    found = {name: folder / name for name in names if name.startswith("transformer") and (folder / name).is_dir()}
    if not found:
        raise CheckpointError(f"{folder} has no transformer folder: there is nothing to quantize")
    return found


def skeleton(folder: Path) -> nn.Module:
    """The model that `folder/config.json` describes, in bf16 on the meta device: names and shapes, no weights.

    Raises ModelError when the folder holds a quantized model.
    """
    config = read_json(folder / "config.json")
    if "quantization_config" in config:
        raise ModelError(f"{folder} is quantized already: name the full-precision model instead")
    cls = _model_class(folder)
    with init_empty_weights(), _readable(folder):
        model: nn.Module = cls.from_config(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


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
    read_saved(folder)
    if config is not None and "quantization_config" in read_json(folder / "config.json"):
        raise ModelError(f"{folder} is quantized already: name the full-precision model instead")
    cls = _model_class(folder)
    options = {"dtype": dtype or stored_dtype(folder), "use_safetensors": True, "local_files_only": True}
    if config is not None:
        options["quantization_config"] = config
    if device is not None:
        options["device_map"] = device
    model: nn.Module
    with _readable(folder):
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
    cls = diffusers.DiffusionPipeline
    if name in OWN_PIPELINES:
        cls = getattr(importlib.import_module(OWN_PIPELINES[name]), name)
    elif not _is_class(name, diffusers.DiffusionPipeline):
        raise CheckpointError(f"{folder}: the pipeline class {name!r} is unknown to diffusers {diffusers.__version__}")
    with _readable(folder):
        return cls.from_pretrained(folder, dtype=dtype, use_safetensors=True, local_files_only=True)


def world_of(folder: Path) -> World | None:
    """The world whose pictures the pipeline in `folder` draws, None for a model of anything else."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").exists() else {}
    return WORLDS.get(index.get("world", SHAPES.name)) if index.get("_class_name") == "ShapesPipeline" else None


def quantize_folder(folder: Path, target: Path, config: OrbitQuantConfig, device: str | None = None) -> None:
    """Write `folder`, a model or pipeline in diffusers' layout, to the new folder `target` with transformers quantized,
    on `device`.

    Everything else is copied, except weights that lie beside the components. Nothing is left behind when it fails;
    raises as `load_model` does.
    """
    components = transformers_in(folder)
    if target.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{target} lies inside {folder}: choose an output folder elsewhere")
    with new_folder(target) as scratch:
        for name, source in components.items():
            model: Any = load_model(source, config, device=device)
            model.register_to_config(_name_or_path=folder.name)  # else the local path would travel along
            model.save_pretrained(scratch / name)
        for item in sorted(folder.iterdir()) if "" not in components else []:
            if item.is_dir() and item.name not in components:
                shutil.copytree(item, scratch / item.name)
            elif item.is_file() and item.suffix not in WEIGHTS:
                shutil.copy2(item, scratch / item.name)
        if "" not in components:
            write_listing(scratch)


def _model_class(folder: Path) -> Any:
    name = read_json(folder / "config.json").get("_class_name")
    if not _is_class(name, diffusers.ModelMixin):
        raise CheckpointError(f"{folder}: the model class {name!r} is unknown to diffusers {diffusers.__version__}")
    return getattr(diffusers, str(name))


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
    except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).partition(". If you want")[0].split())
        raise CheckpointError(f"{folder} cannot be loaded: {reason}") from error
    finally:
        torch.set_default_dtype(dtype)
