"""A quantized model in one safetensors file, which says all of itself (see docs/format.md): save and load it.

diffusers' `from_single_file` reads original checkpoints, whose class and configuration it guesses from tensor names. A
file of ours says both, so once diffusers' module is loaded, `from_single_file` hands files that have a manifest to
`load_file`; all others go their way.
"""

import functools
import os
import warnings
from pathlib import Path
from typing import Any

import diffusers
import safetensors.torch
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_model
from diffusers.models.model_loading_utils import load_model_dict_into_meta
from torch import nn

from orbitdit.atomic import new_file
from orbitdit.checkpoint import most_common_dtype
from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import CheckpointError, ModelError
from orbitdit.integrations.diffusers import OrbitQuantizer
from orbitdit.manifest import ENTRY, read_header, replace_metadata
from orbitdit.verify import Saved, read_saved

HUB_OPTIONS = {"force_download", "proxies", "token", "cache_dir", "local_files_only", "revision", "config_revision"}
"""Arguments of `from_single_file` that mean nothing for a local file."""
OPTIONS = {"dtype", "torch_dtype", "device", "disable_mmap", "quantization_config", "low_cpu_mem_usage", *HUB_OPTIONS}


def save_file(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized diffusers model to the safetensors file `path`, which replaces one that is there.

    The file appears when it is complete and on the disk. Raises ModelError for other models, CheckpointError where the
    file cannot be written.
    """
    quantizer, path = getattr(model, "hf_quantizer", None), Path(path)
    if not isinstance(quantizer, OrbitQuantizer):
        raise ModelError(f"{type(model).__name__} is no quantized diffusers model: quantize it first")
    state, metadata = quantizer.get_state_dict_and_metadata(model.state_dict(), safe_serialization=True)
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    try:
        with new_file(path) as beside:
            safetensors.torch.save_file(tensors, beside, metadata={"format": "pt", **metadata})
            replace_metadata(beside)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} cannot be written ({error}): choose another file") from error


def load_file(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    disable_mmap: bool = False,
) -> nn.Module:
    """The quantized model in a file that `save_file` wrote, checked, in `dtype` or as it is stored, on `device`.

    Raises CheckpointError for a file that is damaged, or has no manifest.
    """
    (saved,) = read_saved(path)
    name = saved.config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type) or not issubclass(cls, diffusers.ModelMixin):
        raise CheckpointError(f"{path}: the model class {name!r} is unknown to diffusers {diffusers.__version__}")
    return _load(cls, saved, dtype or most_common_dtype(saved.files), device, disable_mmap)


def _load(cls: Any, saved: Saved, dtype: torch.dtype, device: str | torch.device, disable_mmap: bool) -> nn.Module:
    """As `from_pretrained` does it, with the same quantizer."""
    assert saved.manifest is not None
    path, config = saved.where, {**saved.config["quantization_config"], "fingerprint": saved.manifest["fingerprint"]}
    plain = {key: value for key, value in saved.config.items() if key != "quantization_config"}
    with init_empty_weights():
        model = cls.from_config(plain)
    quantizer = OrbitQuantizer(OrbitQuantConfig.from_dict(config), pre_quantized=True)
    quantizer.maybe_update_loaded_keys(list(read_header(path).tensors), [str(path)])
    quantizer.preprocess_model(model, device_map=None)
    whole = quantizer.maybe_update_state_dict(
        safetensors.torch.load(path.read_bytes()) if disable_mmap else safetensors.torch.load_file(path)
    )
    quantizer.update_missing_keys(model, sorted(set(model.state_dict()) - set(whole)), prefix="")
    fp32 = cls._keep_in_fp32_modules or []
    load_model_dict_into_meta(
        model, whole, dtype, hf_quantizer=quantizer, keep_in_fp32_modules=fp32, device_map={"": torch.device(device)}
    )
    quantizer.postprocess_model(model)
    model.hf_quantizer = quantizer
    model.register_to_config(_name_or_path=str(path))
    loaded: nn.Module = model.eval()
    return loaded


def _from_single_file(original: Any) -> Any:
    @functools.wraps(original)
    def from_single_file(cls: Any, pretrained_model_link_or_path_or_dict: Any = None, **options: Any) -> Any:
        path = pretrained_model_link_or_path_or_dict
        if not _is_packed(path) or (options.get("quantization_config") is not None and not _has_manifest(path)):
            return original.__func__(cls, path, **options)
        (saved,) = read_saved(path)
        name = saved.config.get("_class_name")
        if cls.__name__ != name and not any(base.__name__ == name for base in cls.__mro__):
            raise CheckpointError(f"{path} holds a {name}, not a {cls.__name__}: load it with {name}.from_single_file")
        if options.get("quantization_config") is not None:
            warnings.warn(f"{path} is quantized already: its own quantization_config is used", stacklevel=2)
        given = {key for key, value in options.items() if value is not None} - OPTIONS - {"config", "subfolder"}
        if given:
            raise CheckpointError(f"{path} is quantized already: it cannot be loaded with {min(given)}")
        dtype = options.get("dtype") or options.get("torch_dtype") or torch.float32
        device = options.get("device") or "cpu"
        return _load(cls, saved, dtype, device, options.get("disable_mmap", False))

    return from_single_file


def _is_packed(path: Any) -> bool:
    """Whether `path` is a safetensors file of a quantized model."""
    if not isinstance(path, str | os.PathLike) or not str(path).endswith(".safetensors") or not Path(path).is_file():
        return False
    return _has_manifest(path) or any(name.endswith(".codes") for name in read_header(path).tensors)


def _has_manifest(path: Any) -> bool:
    return ENTRY in read_header(path).metadata


def register() -> None:
    """Let diffusers' `from_single_file` load files of ours. Idempotent."""
    mixin = single_file_model.FromOriginalModelMixin
    original = mixin.__dict__["from_single_file"]
    if not hasattr(original.__func__, "of_diffusers"):
        wrapped = _from_single_file(original)
        wrapped.of_diffusers = original
        mixin.from_single_file = classmethod(wrapped)


register()
