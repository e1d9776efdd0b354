"""Quantize a model in place, and undo it.

`quantize_` checks everything first and changes the model only when nothing can go wrong any more; each
`nn.Linear` named by the plan becomes an `OrbitLinear` or an `Int4Linear`. The plan is a function of the
model's layer names and shapes and the configuration (see `policy`), whichever way a model is quantized.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import ConfigError, ModelError
from orbitdit.families import FAMILIES
from orbitdit.fusion import fuse_blocks, unfuse_blocks
from orbitdit.kernels import EXACT, GRIDS, device_grids
from orbitdit.linear import Int4Linear, OrbitLinear, share_inputs
from orbitdit.policy import Layer, LayerPlan, Plan, build_plan
from orbitdit.quantize import check_weight


def plan(model: nn.Module, config: OrbitQuantConfig) -> Plan:
    """What `quantize_(model, config)` would do: one row for each linear layer. The model may be on the meta device.

    Raises ModelError when the model is quantized already, has adapters, or has nothing to quantize, and ConfigError
    for a rule that matches no layer.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{type(model).__name__} is no model: name its transformer, such as pipe.transformer")
    if not isinstance(config, OrbitQuantConfig):
        raise ConfigError(f"config is {type(config).__name__}: write OrbitQuantConfig('w4a4')")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ModelError(f"{type(model).__name__} has adapters: fuse or unload the LoRA before quantizing")
    if next(packed_layers(model), None):
        raise ModelError(f"{type(model).__name__} is quantized already: load the full-precision model instead")
    layers = [
        Layer(name, m.in_features, m.out_features, m.bias is not None, m.weight.element_size(), type(m) is nn.Linear)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and name
    ]
    found = build_plan(type(model).__name__, layers, config)
    if not found.select("quantize", "int4"):
        raise ModelError(
            f"{type(model).__name__} has nothing to quantize: none of its {len(layers)} linear layers fits"
        )
    return found


@torch.no_grad()
def quantize_(model: nn.Module, config: OrbitQuantConfig, progress: bool = True) -> Plan:
    """Quantize `model` in place, layer by layer on each layer's device, and return the plan that was carried out.

    Raises as `plan` does, and TensorError, naming the weight, for NaN or Inf or weights without data;
    the model is unchanged then.
    """
    found = plan(model, config)
    todo = found.select("quantize", "int4")
    for row in todo:
        check_weight(linear_named(model, row.name).weight, f"{row.name}.weight")
    rows: Iterable[LayerPlan] = todo
    if progress:
        from rich.console import Console  # late: most of what imports orbitdit shows no progress
        from rich.progress import track

        console = Console(stderr=True)
        title = f"Quantizing to {config.label}"
        rows = track(todo, title, console=console, transient=True, disable=not console.is_terminal)
    for row in rows:
        replace_module(model, row.name, quantize_layer(linear_named(model, row.name), row, config.seed))
    connect_layers(model)
    _tell_diffusers(model, config)
    return found


def set_grid_(model: nn.Module, grid: str = "auto", resident: bool = False) -> nn.Module:
    """Choose, in place, the number grid that quantized layers multiply on, and return the model.

    "auto" is the fastest of the device: "e4m3" on CUDA devices of compute capability 8.9 and newer, "int8" on 8.0 and
    newer and on CPUs that multiply it, else "exact", which multiplies the centroids themselves. `resident` keeps the
    weights decoded on the grid, a byte each, beside the codes: more memory, and a little less time except where layers
    share their input, whose products are then made one by one; the grid then stays that of the device that the model
    is on. Nothing of this is saved with the model. Raises ConfigError for a grid that is unknown, or that the model's
    device does not multiply.
    """
    if grid != "auto" and grid not in GRIDS:
        raise ConfigError(f"grid {grid!r} is unknown; choose auto, {', '.join(GRIDS)}")
    number = None if grid == "auto" else GRIDS[grid]
    layers = [layer for _, layer in packed_layers(model) if isinstance(layer, OrbitLinear)]
    for device in {layer.codes.device for layer in layers if number not in (None, EXACT)}:
        if grid not in device_grids(device):
            raise ConfigError(f"{device} does not multiply {grid}; choose auto, {', '.join(device_grids(device))}")
    for layer in layers:
        layer.set_grid(number, resident)
    return model


def connect_layers(model: nn.Module) -> None:
    """What quantized layers do together: share the encoding of a common input, and compute what precedes them."""
    share_model_inputs(model)
    fuse_blocks(model)


def share_model_inputs(model: nn.Module) -> None:
    """Let the quantized layers of each block that take the same tensor encode it once (see `families`)."""
    packed = {name: layer for name, layer in packed_layers(model) if isinstance(layer, OrbitLinear)}
    family = FAMILIES.get(type(model).__name__)
    for names in family.shared if family else ():
        for block in {name.removesuffix(part) for part in names for name in packed if name.endswith(f".{part}")}:
            share_inputs(packed[block + part] for part in names if block + part in packed)


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Turn the quantized layers of `model` back into `nn.Linear`, in place, and return it.

    Weights become what the codes stand for, in the dtype of the model's other parameters: the quantization
    error stays. Raises ModelError when the model is not quantized.
    """
    packed = dict(packed_layers(model))
    if not packed:
        raise ModelError(f"{type(model).__name__} is not quantized: there is nothing to undo")
    dtype = _compute_dtype(model, packed)
    for name, layer in packed.items():
        replace_module(model, name, layer.to_linear(dtype))
    unfuse_blocks(model)
    _tell_diffusers(model, None)
    return model


def packed_layers(model: nn.Module) -> Iterator[tuple[str, OrbitLinear | Int4Linear]]:
    """Names and modules of the quantized layers of `model`."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, OrbitLinear | Int4Linear))


def linear_named(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of `model` that `name` names."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def quantize_layer(linear: nn.Linear, row: LayerPlan, seed: int) -> OrbitLinear | Int4Linear:
    """The quantized layer that `row` asks for."""
    name = f"{row.name}.weight"
    if row.action == "int4":
        return Int4Linear.from_linear(linear, name)
    bits = row.weight_bits, row.activation_bits
    coding: Any = {"states": row.states, "scale": row.scale, "mean_tokens": row.mean_tokens}
    return OrbitLinear.from_linear(linear, *bits, seed, name, **coding)


def empty_layer(linear: nn.Linear, row: LayerPlan, seed: int) -> OrbitLinear | Int4Linear:
    """A layer as `quantize_layer` makes, without values, on the device of `linear`: to load a checkpoint into."""
    size, device = (row.in_features, row.out_features, linear.bias), linear.weight.device
    if row.action == "int4":
        return Int4Linear(*size, device=device)
    return OrbitLinear(
        *size,
        weight_bits=row.weight_bits,
        activation_bits=row.activation_bits,
        states=row.states,
        scale=row.scale,
        mean_tokens=row.mean_tokens,
        seed=seed,
        device=device,
    )


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that `name` names; train or eval mode is carried over."""
    parent, _, leaf = name.rpartition(".")
    module.train(model.get_submodule(name).training)
    setattr(model.get_submodule(parent), leaf, module)


def _compute_dtype(model: nn.Module, packed: dict[str, OrbitLinear | Int4Linear]) -> torch.dtype:
    """What a diffusers model says of itself, else the dtype of most parameters outside `packed`, else bf16."""
    if isinstance(getattr(model, "dtype", None), torch.dtype):
        return model.dtype  # type: ignore[return-value]
    inside = {id(p) for layer in packed.values() for p in (layer.codes, layer.scales)}
    count: Counter[torch.dtype] = Counter()
    for p in model.parameters():
        if p.is_floating_point() and id(p) not in inside:
            count[p.dtype] += p.numel()
    return count.most_common(1)[0][0] if count else torch.bfloat16


def _tell_diffusers(model: Any, config: OrbitQuantConfig | None) -> None:
    """Set what a diffusers model's `save_pretrained` writes and its `to(dtype)` asks; other models are left alone."""
    if not hasattr(model, "register_to_config"):
        return
    model.is_quantized = config is not None
    if config is not None:
        model.register_to_config(quantization_config=config)
        model.quantization_method = config.quant_method
    else:  # there is no public way to take an entry out
        entries = {key: value for key, value in model.config.items() if key != "quantization_config"}
        model._internal_dict = type(model.config)(entries)
        model.hf_quantizer = None
