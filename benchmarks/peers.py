"""The peers, each through its public API. None is a dependency: a peer that is missing is recorded as failed.

Each function takes linear layers that share an input and gives their forward pass. A peer that would run without its
kernels raises: its fallback is not what it is compared by.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Forward = Callable[[Tensor], list[Tensor]]


def each(layers: list[Any]) -> Forward:
    return lambda x: [layer(x) for layer in layers]


def orbitquant(linears: list[nn.Linear], recipe: str) -> Forward:
    """orbitquant's packed layers, on the CUDA kernels built from its sources (see the README)."""
    from orbitquant import OrbitQuantLinear
    from orbitquant import recipe as recipe_of

    config = recipe_of(recipe)
    layers = [OrbitQuantLinear.from_linear(linear, config=config, module_name="layer") for linear in linears]
    with torch.no_grad():
        layers[0](linears[0].weight[:64])  # 64 rows: as many as its large-batch kernels need
    runs = layers[0].last_effective_runtime_mode
    if runs != "native_packed_matmul":
        raise RuntimeError(f"orbitquant runs {runs}: build its kernels first")
    return each(layers)


def orbitquant_int4(linears: list[nn.Linear]) -> Forward:
    from orbitquant import recipe
    from orbitquant.adaln import RTNInt4Linear

    config = recipe("w4a4")
    return each([RTNInt4Linear.from_linear(linear, config=config, module_name="norm.linear") for linear in linears])


def torchao_float8(linears: list[nn.Linear]) -> Forward:
    """float8 weights and dynamic activations with a scale per row, compiled."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow

    return _torchao(linears, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False))


def torchao_int8(linears: list[nn.Linear]) -> Forward:
    """int8 weights with a scale per row and dynamic activations with a scale per token, compiled."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _torchao(linears, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))


def _torchao(linears: list[nn.Linear], config: Any) -> Forward:
    from torchao.quantization import quantize_

    model = nn.ModuleList(copy.deepcopy(linear) for linear in linears)
    quantize_(model, config)
    return torch.compile(each(list(model)), fullgraph=True, dynamic=False)


def comfy_w4a4(linears: list[nn.Linear]) -> Forward:
    """comfy-kitchen's ConvRot W4A4 on its CUDA backend, with the largest rotation that fits the width."""
    import comfy_kitchen
    from comfy_kitchen.tensor import convrot_w4a4_linear, quantize_convrot_w4a4_weight

    _needs_cuda_backend(comfy_kitchen, "convrot_w4a4_linear")
    group = next(size for size in (256, 64, 16) if linears[0].in_features % size == 0)

    def layer(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        codes, scales = quantize_convrot_w4a4_weight(linear.weight, convrot_groupsize=group)
        return lambda x: convrot_w4a4_linear(x, codes, scales, linear.bias, convrot_groupsize=group)

    return each([layer(linear) for linear in linears])


def comfy_int8(linears: list[nn.Linear]) -> Forward:
    """comfy-kitchen's INT8 with a scale per row of the weight and per token, on its CUDA backend."""
    import comfy_kitchen

    _needs_cuda_backend(comfy_kitchen, "int8_linear")

    def layer(linear: nn.Linear) -> Callable[[Tensor], Tensor]:
        codes, scales = comfy_kitchen.quantize_int8_rowwise(linear.weight)
        return lambda x: comfy_kitchen.int8_linear(x, codes, scales, linear.bias, out_dtype=torch.bfloat16)

    return each([layer(linear) for linear in linears])


def _needs_cuda_backend(comfy_kitchen: Any, op: str) -> None:
    backend = comfy_kitchen.list_backends().get("cuda", {})
    if not backend.get("available") or op not in backend.get("capabilities", ()):
        raise RuntimeError(f"comfy-kitchen has no CUDA {op}: {backend.get('unavailable_reason')}")


def sdnq(linears: list[nn.Linear], weights: str) -> Forward:
    """SDNQ with its quantized matmul; it compiles its own functions."""
    from sdnq import sdnq_post_load_quant

    model = nn.Sequential(*(copy.deepcopy(linear) for linear in linears))
    model = sdnq_post_load_quant(
        model, weights_dtype=weights, use_quantized_matmul=True, add_skip_keys=False, torch_dtype=torch.bfloat16
    )
    layers = list(model)
    if not all(layer.sdnq_dequantizer.use_quantized_matmul for layer in layers):
        raise RuntimeError("SDNQ would multiply in bf16")
    return each(layers)
