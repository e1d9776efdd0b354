"""orbitdit as a quantizer of diffusers: load, save and reload with `from_pretrained` and `save_pretrained`.

Loading works on the meta-device skeleton. A checkpoint of orbitdit's own has packed layers: their empty
counterparts are put in place before the weights arrive. Any other checkpoint has ordinary weights: each
planned layer stays an `nn.Linear` until its weight arrives and is quantized there and then, so the
full-precision model never exists in memory. Which of the two it is, the tensor names tell.

A packed checkpoint is compared with its manifest on the way (see `verify`). Saving makes the manifest: diffusers asks
the model's quantizer what the files' metadata should have, so models that were quantized in place get one too.
"""

import json
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from torch import Tensor, nn

from orbitdit.checkpoint import check_file, packed_layers_in
from orbitdit.config import OrbitQuantConfig, QuantMethod
from orbitdit.errors import CheckpointError, ConfigError, ModelError, TensorError
from orbitdit.fusion import Places, connect, places
from orbitdit.linear import Int4Linear, OrbitLinear, is_offloaded, spec_tensor
from orbitdit.manifest import (
    ENTRY,
    Manifest,
    check_config,
    check_fingerprint,
    check_names,
    dumps,
    make,
    read_header,
    source_of,
    tensor_hash,
)
from orbitdit.model import announce, dequantize_, empty_layer, linear_named, plan, quantize_layer, replace_module
from orbitdit.policy import LayerPlan, as_stored
from orbitdit.quantize import check_finite, check_scales
from orbitdit.spec import LayerSpec
from orbitdit.verify import Check, shared_manifest


def register() -> None:
    """Enter orbitdit in diffusers' table of quantizers, and let models that are quantized in place be known as
    quantized. Idempotent."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.ORBITDIT.value] = OrbitQuantConfig
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.ORBITDIT.value] = OrbitQuantizer
    if tell_diffusers not in announce:
        announce.append(tell_diffusers)


class OrbitQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model; see the module's docstring."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: OrbitQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.rows: dict[str, LayerPlan] = {}
        """Planned layers by each of their names: a module that is shared has several."""
        self.places: Places = {}
        self.stored: dict[str, bool] = {}
        self.needed: set[str] = set()
        self.check: Check | None = None
        self.source: Mapping[str, str | None] | None = None
        """The full-precision model that was quantized; None where the model's configuration says it."""
        self.shapes: dict[str, torch.Size] = {}
        """Of the tensors of a model that is being loaded."""
        self.prepared: Manifest | None = None
        """The manifest, while the model is being saved."""
        self._model: Any = None

    def remember(self, model: Any) -> None:
        """`model` is the one that this quantizer belongs to. It is not kept alive."""
        self._model = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": self._model and self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._model = None if state["_model"] is None else weakref.ref(state["_model"])

    def make_manifest(self, state_dict: dict[str, Any]) -> Manifest:
        """The manifest of this quantizer's model, whose state is `state_dict`. Raises CheckpointError for adapters."""
        if any(".base_layer." in name for name in state_dict):
            raise CheckpointError("adapters are not saved with a quantized model: save them apart, then unload them")
        model = self._model and self._model()
        if model is None:
            raise ModelError("the quantizer's model is gone: save the model that it was made for")
        hashes = {name: tensor_hash(tensor) for name, tensor in once(state_dict).items()}
        source = source_of(model.config.get("_name_or_path")) if self.source is None else self.source
        return make(json.loads(model.to_json_string()), hashes, source)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes: the tensors, once each, and the manifest as metadata of each file."""
        return once(state_dict), {ENTRY: dumps(self.prepared or self.make_manifest(state_dict))}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what diffusers would do behind the quantizer's back."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError("device_map sends layers to 'disk', where diffusers does not quantize: use 'cpu' instead")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """`from_pretrained` shows the files and tensor names before it loads: check the files, see what they hold."""
        for file in checkpoint_files:
            check_file(file)
        where = str(checkpoint_files[0] if len(checkpoint_files) == 1 else Path(checkpoint_files[0]).parent)
        self.pre_quantized = any(key.endswith(".codes") for key in loaded_keys)
        self.stored = packed_layers_in(checkpoint_files) if self.pre_quantized else {}
        manifest = shared_manifest(checkpoint_files)
        if manifest is not None:
            check_names(manifest, loaded_keys, f"the index of {where}")
            check_fingerprint(manifest, self.quantization_config.fingerprint, where)
            self.check, self.source = Check(manifest, where), manifest["source"]
            return [key for key in loaded_keys if not key.endswith(".spec")]
        if self.quantization_config.layers:
            raise CheckpointError(f"{where} has no manifest, and should: download or copy it again")
        there = {name for file in checkpoint_files for name in read_header(file).tensors}
        absent = sorted(set(loaded_keys) - there)
        if absent and len(checkpoint_files) > 1:
            raise CheckpointError(f"{where} lacks the tensor {absent[0]!r} that its index names: copy it again")
        packed = {key.removesuffix(".codes") for key in loaded_keys if key.endswith(".codes")}
        if not packed <= set(self.stored):
            raise CheckpointError(f"{where} lacks the tensor '{min(packed - set(self.stored))}.scales': copy it again")
        return loaded_keys

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Called with the tensors of each file, perhaps in several threads: hash them. Specs are no parameters."""
        if self.check is None:
            return state_dict
        self.check.see(state_dict)
        for name, tensor in state_dict.items():
            if self.shapes.get(name, tensor.shape) != tensor.shape:
                self.check_quantized_param_shape(name, torch.empty(self.shapes[name], device="meta"), tensor)
        return {name: tensor for name, tensor in state_dict.items() if not name.endswith(".spec")}

    def _process_model_before_weight_loading(
        self, model: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:  # from_single_file shows the tensors here, and nothing before
            self.pre_quantized = any(key.endswith(".codes") for key in state_dict)
            scales = {key: tensor for key, tensor in state_dict.items() if key.endswith(".scales")}
            self.stored = {key.removesuffix(".scales"): tensor.ndim == 2 for key, tensor in scales.items()}
        config = self.quantization_config
        found = plan(model, config)
        self.needed = {row.name for row in found.select("quantize", "int4")}
        if self.pre_quantized:
            found = as_stored(found, self.stored)
        rows = found.select("quantize", "int4")
        planned = {linear_named(model, row.name): row for row in rows}
        names = model.named_modules(remove_duplicate=False)
        self.rows = {name: planned[module] for name, module in names if module in planned}
        self.needed -= set(self.rows)  # planned today, and not packed in this checkpoint
        self.places = places(model)
        if self.pre_quantized:
            for linear, row in planned.items():
                replace_module(model, row.name, empty_layer(linear, row), self.places)
        total = 0 if self.pre_quantized else len(rows)
        self.progress = logging.tqdm(total=total, desc=f"Quantizing to {config.label}", disable=not total, leave=False)
        model.register_to_config(quantization_config=found.recorded)
        if self.check is not None:
            self._check_config(model)
            self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
            model.register_to_config(quantization_config=replace(found.recorded, fingerprint=""))

    def _check_config(self, model: Any) -> None:
        """The model's configuration and its record of layers are those of the manifest."""
        assert self.check is not None
        manifest, given = self.check.manifest, dict(model.config)
        saved = OrbitQuantConfig.from_dict(manifest["config"]["quantization_config"]).to_dict()
        name = manifest["config"].get("_class_name")
        given["_class_name"] = (
            name if any(cls.__name__ == name for cls in type(model).__mro__) else type(model).__name__
        )
        manifest = {**manifest, "config": {**manifest["config"], "quantization_config": saved}}
        check_config(manifest, given, self.check.where, exactly=False)
        for key, found in manifest["tensors"].items():
            name, _, part = key.rpartition(".")
            spec = self.rows[name].spec if name in self.rows else None
            if part in ("codes", "spec") and (spec is None or (part == "spec" and found != _spec_hash(spec))):
                raise CheckpointError(f"{self.check.where}: {key!r} is not as the configuration says: copy it again")

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """The weight of a planned layer, or the codes or scales of a packed one."""
        name, _, part = param_name.rpartition(".")
        return name in self.rows and part in ("weight", "codes", "scales")

    def check_quantized_param_shape(self, param_name: str, current_param: Tensor, loaded_param: Tensor) -> None:
        """Called when the shapes differ: name the tensor."""
        raise TensorError(
            f"{param_name} has shape {tuple(loaded_param.shape)} in the checkpoint; {tuple(current_param.shape)} is "
            "needed: the file is damaged or belongs to another model"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Put a packed tensor in place as it is stored, or quantize an ordinary weight in its stored dtype."""
        name, _, part = param_name.rpartition(".")
        module, row = linear_named(model, name), self.rows[name]
        if part == "weight" and isinstance(module, OrbitLinear | Int4Linear):
            return  # quantized under another of its names
        stored = state_dict[param_name].to(target_device)
        if part != "weight":
            expected = getattr(module, part).dtype
            if stored.dtype != expected:
                raise TensorError(f"{param_name} has dtype {stored.dtype} in the checkpoint; {expected} is needed")
            if part == "scales":
                check_scales(stored, param_name)
            setattr(module, part, nn.Parameter(stored, requires_grad=False))
            return
        source = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        source.weight, source.bias = nn.Parameter(stored, requires_grad=False), module.bias
        try:
            with torch.no_grad():
                layer = quantize_layer(source, row)
            layer.dtype = module.weight.dtype  # what the model is loaded in, whatever is stored
            replace_module(model, row.name, layer, self.places)
        except BaseException:
            self.progress.close()
            raise
        self.progress.update()

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """A tensor that a planned layer needs and no file has is an error, not a random initialization."""
        names = Counter(row.name for row in self.rows.values())
        parts = [key.rpartition(".") for key in missing_keys]
        absent = Counter(f"{self.rows[name].name}.{part}" for name, _, part in parts if name in self.rows)
        missing = sorted(key for key, count in absent.items() if count == names[key.rpartition(".")[0]])
        missing += sorted(key for key, (name, _, _) in zip(missing_keys, parts, strict=True) if name in self.needed)
        if missing:
            raise CheckpointError(f"the checkpoint has no tensor {missing[0]!r}: it is incomplete or of another model")
        return [key for key, (name, _, _) in zip(missing_keys, parts, strict=True) if name not in self.rows]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.progress.close()
        for name in self.rows:
            if not isinstance(model.get_submodule(name), OrbitLinear | Int4Linear):
                raise CheckpointError(
                    f"the checkpoint has no tensor '{name}.weight': it is incomplete or of another model"
                )
        if self.check is not None:
            self.check.finish()
        check_complete(model)
        self.check, self.rows, self.places, self.shapes = None, {}, {}, {}
        del self.progress
        self.remember(model)
        for name, parameter in [] if self.pre_quantized else model.named_parameters():
            if parameter.is_floating_point() and not parameter.is_meta:
                check_finite(parameter, name)
        connect(model)
        refuse_fusing(model)

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """For the arithmetic of an automatic `device_map`: a byte a weight, an upper bound of what is stored."""
        return torch.int8

    def get_cuda_warm_up_factor(self) -> int:
        return 4

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return dequantize_(model)


def once(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a state under the first of their names: files hold no tensor twice, and the modules that share it
    are given it together. Specs go with their codes."""
    first: dict[Any, str] = {}
    for name, tensor in state_dict.items():
        shared = tensor.numel() and not tensor.is_meta
        first.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype) if shared else name, name)
    kept = set(first.values())
    alone = {name for name in kept if name.endswith(".spec") and f"{name.removesuffix('spec')}codes" not in kept}
    return {name: tensor for name, tensor in state_dict.items() if name in kept - alone}


@cache
def _spec_hash(spec: LayerSpec) -> str:
    return tensor_hash(spec_tensor(spec))


def check_complete(model: nn.Module) -> None:
    """Raise CheckpointError for a tensor without values, unless its module is offloaded."""
    for prefix, module in model.named_modules():
        own = [*module.named_parameters(prefix, False), *module.named_buffers(prefix, False)]
        empty = next((name for name, tensor in own if tensor.is_meta), None)
        if empty is not None and not is_offloaded(module):
            raise CheckpointError(f"the checkpoint has no tensor {empty!r}: it is incomplete or of another model")


def tell_diffusers(model: Any, config: OrbitQuantConfig | None) -> None:
    """Set what a diffusers model's `save_pretrained` writes and its `to(dtype)` asks; other models are left alone."""
    if not hasattr(model, "register_to_config"):
        return
    model.is_quantized = config is not None
    if config is not None:
        model.hf_quantizer = OrbitQuantizer(config)
        model.hf_quantizer.remember(model)
        model.register_to_config(quantization_config=config)
        model.quantization_method = config.quant_method
        refuse_fusing(model)
    else:  # there is no public way to take an entry out
        entries = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(entries)
        model.hf_quantizer = None
        model.__dict__.pop("fuse_lora", None)


def refuse_fusing(model: Any) -> None:
    """Let the `fuse_lora` of a diffusers model raise before it does anything: it changes layer after layer, and would
    stop half-way, at the first that is packed."""
    if hasattr(model, "fuse_lora"):
        model.fuse_lora = cannot_fuse


def cannot_fuse(*args: Any, **kwargs: Any) -> None:
    """What a quantized model has as `fuse_lora`. Raises ModelError."""
    raise ModelError(
        "LoRAs cannot be fused: weights are packed and cannot be written to. Keep them as adapters, or fuse them into "
        "the full-precision model and quantize that"
    )


register()
