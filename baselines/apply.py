"""Put a baseline's layers into a model, and count what a model would store."""

from collections.abc import Mapping

import torch
from torch import nn

from baselines.calibration import Statistics
from baselines.layer import FakeQuantLinear
from baselines.methods import METHODS
from orbitdit import Int4Linear, OrbitLinear, OrbitQuantConfig, Plan, plan
from orbitdit.errors import ConfigError
from orbitdit.model import linear_named, quantize_layer, replace_module
from orbitdit.quantize import check_weight


@torch.no_grad()
def quantize_(model: nn.Module, method: str, bits: str, statistics: Mapping[str, Statistics], seed: int = 0) -> Plan:
    """Quantize `model` in place by the baseline `method` of METHODS at `bits` ("w4a4"), layer by layer on its device.

    Modulation layers become INT4, weight-only, as orbitdit stores them. Returns orbitdit's plan, whose layers these
    are. Raises ConfigError for an unknown method, and for a layer without statistics or that the method cannot do (its
    name is in the message), and as `orbitdit.quantize_` does; the model is unchanged then.
    """
    if method not in METHODS:
        raise ConfigError(f"baseline {method!r} is unknown; choose one of {', '.join(METHODS)}")
    config = OrbitQuantConfig(bits)
    found = plan(model, config)
    made: dict[str, nn.Module] = {}
    for row in found.select("quantize", "int4"):
        linear = linear_named(model, row.name)
        check_weight(linear.weight, f"{row.name}.weight")
        if row.action == "int4":
            made[row.name] = quantize_layer(linear, row)
            continue
        if row.name not in statistics:
            raise ConfigError(f"{row.name} has no calibration statistics: calibrate the model that is quantized")
        assert row.spec is not None
        widths = row.spec.weight.bits, 16 if row.spec.tokens is None else row.spec.tokens.bits
        try:
            layer = METHODS[method].make(linear.weight.detach().float(), statistics[row.name], widths, seed)
        except ConfigError as error:
            raise ConfigError(f"{METHODS[method].title} cannot do layer {row.name}: {error}") from error
        made[row.name] = layer.finish(linear.bias, linear.weight.dtype)
    for name, module in made.items():
        replace_module(model, name, module)
    return found


def stored_bits(model: nn.Module) -> float:
    """Bits that would be stored (codes, scales, zero points, factors) per weight of the quantized layers, by counting
    the bytes of the tensors themselves; INT4 layers are left out, as `orbitdit.policy.effective_bits` does."""
    stored = weights = 0
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            stored += module.stored
        elif isinstance(module, OrbitLinear):
            stored += sum(p.nbytes for name, p in module.named_parameters() if name != "bias")
        else:
            continue
        weights += module.in_features * module.out_features
    return 8 * stored / max(1, weights)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all changed layers: the quantized and the INT4 ones, with their biases."""
    size = 0
    for module in model.modules():
        if isinstance(module, FakeQuantLinear):
            size += module.stored + (0 if module.bias is None else module.bias.nbytes)
        elif isinstance(module, OrbitLinear | Int4Linear):
            size += sum(p.nbytes for p in module.parameters())
    return size
