"""Quantize a model in place, and undo it.

`quantize_` checks everything first and changes the model only when nothing can go wrong any more; each
`nn.Linear` named by the plan becomes an `OrbitLinear` or an `Int4Linear`. The plan is a function of the
model's layer names and shapes and the configuration (see `policy`), whichever way a model is quantized.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import ConfigError, ModelError
from orbitdit.fusion import Places, connect, disconnect, places
from orbitdit.grids import EXACT, GRIDS
from orbitdit.linear import Int4Linear, OrbitLinear, layer_class
from orbitdit.ops import device_grids
from orbitdit.policy import Layer, LayerPlan, Plan, build_plan
from orbitdit.quantize import check_finite, check_weight

announce: list[Callable[[nn.Module, OrbitQuantConfig | None], None]] = []
"""Functions of integrations, called with each model that was quantized in place and its configuration with the record
of layers, or that was dequantized and None."""


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

    Raises as `plan` does, and TensorError, naming the parameter, for NaN or Inf (in kept ones too) or weights without
    data; the model is unchanged then.
    """
    found = plan(model, config)
    todo = found.select("quantize", "int4")
    for row in todo:
        check_weight(linear_named(model, row.name).weight, f"{row.name}.weight")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            check_finite(parameter, name)
    rows: Iterable[LayerPlan] = todo
    if progress:
        from rich.console import Console  # late: most of what imports orbitdit shows no progress
        from rich.progress import track

        console = Console(stderr=True)
        title = f"Quantizing to {config.label}"
        rows = track(todo, title, console=console, transient=True, disable=not console.is_terminal)
    where = places(model)
    for row in rows:
        replace_module(model, row.name, quantize_layer(linear_named(model, row.name), row), where)
    connect(model)
    for tell in announce:
        tell(model, found.recorded)
    return found


def set_grid_(model: nn.Module, grid: str = "auto", cache_decoded: bool = False, resident: bool = False) -> nn.Module:
    """Choose, in place, the number grid that quantized layers multiply on, and return the model.

    "auto" is the fastest of the device: "e4m3" on CUDA devices of compute capability 8.9 and newer, "int8" on 8.0 and
    newer and on CPUs that multiply it, else "exact", which multiplies the centroids themselves. `cache_decoded` keeps
    the weights decoded on the grid, a byte each, beside the codes: more memory, and a little less time in eager mode
    except where layers share their input, whose products are then made one by one. Compiled code decodes each time.
    What is kept is made anew when codes or scales change, as far as torch counts it: writes through `.data` and in
    inference mode are not counted; call `set_grid_` again after them. `resident` is the old name of `cache_decoded`.
    Nothing of this is saved with the model. Raises ConfigError for a grid that is unknown, or that the model's device
    does not multiply.
    """
    if grid not in ("auto", EXACT, *GRIDS):
        raise ConfigError(f"grid {grid!r} is unknown; choose auto, {EXACT}, {', '.join(GRIDS)}")
    layers = [layer for _, layer in packed_layers(model) if isinstance(layer, OrbitLinear)]
    for device in {layer.codes.device for layer in layers if grid in GRIDS}:
        if grid not in device_grids(device):
            raise ConfigError(f"{device} does not multiply {grid}; choose auto, {', '.join(device_grids(device))}")
    for layer in layers:
        layer.set_grid(None if grid == "auto" else grid, cache_decoded or resident)
    return model


@torch.no_grad()
def dequantize_(model: nn.Module) -> nn.Module:
    """Turn the quantized layers of `model` back into `nn.Linear`, in place, and return it.

    Weights become what the codes stand for, in the dtype of a diffusers model or else of each layer: the quantization
    error stays. Raises ModelError when the model is not quantized.
    """
    packed = dict(packed_layers(model))
    if not packed:
        raise ModelError(f"{type(model).__name__} is not quantized: there is nothing to undo")
    where, dtype = places(model), getattr(model, "dtype", None)
    for name, layer in packed.items():
        linear = layer.to_linear(dtype if isinstance(dtype, torch.dtype) else layer.dtype)
        replace_module(model, name, linear, where)
    disconnect(model)
    for tell in announce:
        tell(model, None)
    return model


def packed_layers(model: nn.Module) -> Iterator[tuple[str, OrbitLinear | Int4Linear]]:
    """Names and modules of the quantized layers of `model`."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, OrbitLinear | Int4Linear))


def linear_named(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of `model` that `name` names."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def quantize_layer(linear: nn.Linear, row: LayerPlan) -> OrbitLinear | Int4Linear:
    """The quantized layer that `row` asks for."""
    assert row.spec is not None
    layer: OrbitLinear | Int4Linear = layer_class(row.spec).from_linear(linear, row.spec, f"{row.name}.weight")
    return layer


def empty_layer(linear: nn.Linear, row: LayerPlan) -> OrbitLinear | Int4Linear:
    """A layer as `quantize_layer` makes, without values, on the device of `linear`: to load a checkpoint into."""
    assert row.spec is not None
    return layer_class(row.spec)(row.spec, linear.bias, device=linear.weight.device, dtype=linear.weight.dtype)


def replace_module(model: nn.Module, name: str, module: nn.Module, where: Places | None = None) -> None:
    """Put `module` in the place that `name` names, and in all others of the module that was there (`where` is
    `places(model)`, for many calls); train or eval mode is carried over."""
    module.train(model.get_submodule(name).training)
    for parent, leaf in (places(model) if where is None else where)[name]:
        setattr(parent, leaf, module)
