"""orbitdit as a quantizer of diffusers: load, save and reload with `from_pretrained` and `save_pretrained`.

Loading works on the meta-device skeleton. A checkpoint of orbitdit's own has packed layers: their empty
counterparts are put in place before the weights arrive. Any other checkpoint has ordinary weights: each
planned layer stays an `nn.Linear` until its weight arrives and is quantized there and then, so the
full-precision model never exists in memory. Which of the two it is, the tensor names tell.
"""

from typing import Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.utils import logging
from torch import Tensor, nn

from orbitdit.checkpoint import check_file
from orbitdit.config import OrbitQuantConfig, QuantMethod
from orbitdit.errors import CheckpointError, ConfigError, TensorError
from orbitdit.linear import Int4Linear, OrbitLinear
from orbitdit.model import (
    connect_layers,
    dequantize_,
    empty_layer,
    linear_named,
    plan,
    quantize_layer,
    replace_module,
)
from orbitdit.policy import LayerPlan


def register() -> None:
    """Enter orbitdit in diffusers' table of quantizers. Idempotent."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QuantMethod.ORBITDIT.value] = OrbitQuantConfig
    auto.AUTO_QUANTIZER_MAPPING[QuantMethod.ORBITDIT.value] = OrbitQuantizer


class OrbitQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads a model; see the module's docstring."""

    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: OrbitQuantConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.rows: dict[str, LayerPlan] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what diffusers would do behind the quantizer's back."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ConfigError("device_map sends layers to 'disk', where diffusers does not quantize: use 'cpu' instead")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """`from_pretrained` shows the files and tensor names before it loads: check the files, see what they hold."""
        for file in checkpoint_files:
            check_file(file)
        self.pre_quantized = any(key.endswith(".codes") for key in loaded_keys)
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        if state_dict is not None:  # from_single_file shows the tensors here, and nothing before
            self.pre_quantized = any(key.endswith(".codes") for key in state_dict)
        config = self.quantization_config
        self.rows = {row.name: row for row in plan(model, config).select("quantize", "int4")}
        if self.pre_quantized:
            for row in self.rows.values():
                replace_module(model, row.name, empty_layer(linear_named(model, row.name), row, config.seed))
        total = 0 if self.pre_quantized else len(self.rows)
        self.progress = logging.tqdm(total=total, desc=f"Quantizing to {config.label}", disable=not total, leave=False)
        model.register_to_config(quantization_config=config)

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
        stored, module = state_dict[param_name].to(target_device), linear_named(model, name)
        if part != "weight":
            expected = getattr(module, part).dtype
            if stored.dtype != expected:
                raise TensorError(f"{param_name} has dtype {stored.dtype} in the checkpoint; {expected} is needed")
            setattr(module, part, nn.Parameter(stored, requires_grad=False))
            return
        source = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        source.weight, source.bias = nn.Parameter(stored, requires_grad=False), module.bias
        try:
            with torch.no_grad():
                replace_module(model, name, quantize_layer(source, self.rows[name], self.quantization_config.seed))
        except BaseException:
            self.progress.close()
            raise
        self.progress.update()

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """A tensor that a planned layer needs and no file has is an error, not a random initialization."""
        missing = sorted(key for key in missing_keys if key.rpartition(".")[0] in self.rows)
        if missing:
            raise CheckpointError(f"the checkpoint has no tensor {missing[0]!r}: it is incomplete or of another model")
        return missing_keys

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.progress.close()
        for name in self.rows:
            if not isinstance(model.get_submodule(name), OrbitLinear | Int4Linear):
                raise CheckpointError(
                    f"the checkpoint has no tensor '{name}.weight': it is incomplete or of another model"
                )
        connect_layers(model)

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """For the arithmetic of an automatic `device_map`: a byte a weight, an upper bound of what is stored."""
        return torch.int8

    def get_cuda_warm_up_factor(self) -> int:
        return 4

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return dequantize_(model)


register()
