"""The two layers that a quantized model is made of.

Both hold packed codes and scales as parameters without gradient (offloading moves parameters, not buffers),
are subclasses of `nn.Linear` (PEFT adapts nothing else), and show a `weight` of the right shape that stores one
number: enough for code that looks at a layer's weight without using its values.

The forward pass is the method's definition in plain torch. With n_i and t the norms of row i and of the token,

    y_i = n_i * t * <c_W(i), c_A> + bias_i        (OrbitQuant, arXiv 2607.02461)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from orbitdit.codebook import bins, codebook_on, look_up, nearest, nearest_by_bins
from orbitdit.config import ACTIVATION_BITS
from orbitdit.errors import ConfigError, TensorError
from orbitdit.packing import GROUP, packed_width, unpack
from orbitdit.quantize import (
    QuantizedWeight,
    dequantize_int4,
    dequantize_weight,
    quantize_int4,
    quantize_weight,
)
from orbitdit.rotation import rotation

EPSILON = 1e-10
CACHED_ELEMENTS = 1 << 18
"""Activations that a CPU handles at a time: the two dozen passes over them then stay in its cache."""


def encode_tokens(x: Tensor, bits: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Codes (..., d) uint8 and norms (..., 1) fp32 of tokens `x` (..., d) in any floating dtype.

    The codes are the nearest centroids of R x / (||x|| + 1e-10), all in fp32.
    """
    unit, norm = _normalize(x, EPSILON)
    dim = x.shape[-1]
    rotated = rotation(dim, seed).apply(unit)
    if x.is_cpu:
        return nearest_by_bins(rotated, bins(dim, bits)), norm
    return nearest(rotated, codebook_on(dim, bits, x.device, torch.float32).boundaries), norm


def _normalize(x: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x / (||x|| + epsilon) and ||x||, in fp32; the norm neither overflows nor underflows where it exists."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    norm = largest * (x / largest.where(largest > 0, 1)).norm(dim=-1, keepdim=True)
    return x / (norm + epsilon), norm


class _PackedLinear(nn.Linear):
    """What both layers share: `codes` (out, bytes) uint8, `scales` (out, ...) bf16, `bias` (out,) or None."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, quantized: QuantizedWeight):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.codes = nn.Parameter(quantized.codes, requires_grad=False)
        self.scales = nn.Parameter(quantized.scales, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A stand-in of shape (out, in) that holds NaN, so that nobody computes with it unnoticed.

        On the layer's device, in the dtype of its bias (bf16 without one); `dequantize` gives the values.
        """
        like = self.scales if self.bias is None else self.bias
        return like.detach().new_full((1, 1), torch.nan).expand(self.out_features, self.in_features)

    dequantize: Callable[[], Tensor]
    """The weight (out, in) in fp32 that the codes stand for."""

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary `nn.Linear` with the dequantized weight and the bias in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize().to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear

    def _check_input(self, x: Tensor) -> None:
        if not x.is_floating_point() or x.shape[-1:] != (self.in_features,):
            raise TensorError(
                f"{self}: the input must be floating-point with width {self.in_features}; got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )


def _empty(rows: int, dim: int, bits: int, scales: tuple[int, ...], device) -> QuantizedWeight:
    codes = torch.empty(rows, packed_width(dim, bits), dtype=torch.uint8, device=device)
    return QuantizedWeight(codes, torch.empty(scales, dtype=torch.bfloat16, device=device))


class OrbitLinear(_PackedLinear):
    """A linear layer with `weight_bits` codes and one bf16 scale a row, on activations of `activation_bits`.

    Made by `from_linear`, or empty (to load a state dict into) by the constructor. `forward` takes (..., in) in
    fp32, bf16 or fp16 and gives (..., out) in the same dtype. Norms, rotation and codes are always computed in
    fp32; the product multiplies the centroids in the input's dtype, so it is exact for fp32 and rounds each
    centroid once for the others. It raises TensorError for other inputs.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        weight_bits: int,
        activation_bits: int,
        seed: int = 0,
        quantized: QuantizedWeight | None = None,
        device: torch.device | str | None = None,
    ):
        if activation_bits not in ACTIVATION_BITS:
            allowed = ", ".join(map(str, ACTIVATION_BITS))
            raise ConfigError(f"activation_bits={activation_bits!r} is not supported; choose one of {allowed}")
        quantized = quantized or _empty(out_features, in_features, weight_bits, (out_features,), device)
        super().__init__(in_features, out_features, bias, quantized)
        self.weight_bits, self.activation_bits, self.seed = weight_bits, activation_bits, seed

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, weight_bits: int, activation_bits: int, seed: int = 0, name: str = "weight"
    ) -> "OrbitLinear":
        """Quantize `linear`, on its device; its bias is shared. Raises as `quantize_weight` does."""
        return cls(
            linear.in_features,
            linear.out_features,
            linear.bias,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            seed=seed,
            quantized=quantize_weight(linear.weight, weight_bits, seed, name),
        )

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        dtype = x.dtype if x.dtype in (torch.bfloat16, torch.float16) else torch.float32
        centroids = codebook_on(self.in_features, self.weight_bits, x.device, dtype).centroids
        rows = look_up(unpack(self.codes, self.weight_bits, self.in_features), centroids)
        tokens = x.reshape(-1, self.in_features)
        block = max(1, CACHED_ELEMENTS // self.in_features) if x.is_cpu else max(1, len(tokens))
        with torch.autocast(x.device.type, enabled=False):
            outputs = torch.cat([self._product(part, rows) for part in tokens.split(block)])
        return outputs.view(*x.shape[:-1], self.out_features)

    def _product(self, x: Tensor, rows: Tensor) -> Tensor:
        """The outputs for tokens `x` (tokens, in), given the centroids of the weight, `rows` (out, in)."""
        if self.activation_bits == 16:
            unit, norm = _normalize(x, torch.finfo(torch.float32).tiny)
            token = rotation(self.in_features, self.seed).apply(unit).to(rows.dtype)
        else:
            codes, norm = encode_tokens(x, self.activation_bits, self.seed)
            centroids = codebook_on(self.in_features, self.activation_bits, x.device, rows.dtype).centroids
            token = look_up(codes, centroids)
        y = (token @ rows.T) * norm * self.scales.float()
        return (y if self.bias is None else y + self.bias.float()).to(x.dtype)

    def dequantize(self) -> Tensor:
        return dequantize_weight(
            QuantizedWeight(self.codes, self.scales), self.weight_bits, self.in_features, self.seed
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, W{self.weight_bits}A{self.activation_bits}"


class Int4Linear(_PackedLinear):
    """A weight-only INT4 layer in groups of 64 inputs, for AdaLN modulation; the activations stay as they are.

    Made and loaded as `OrbitLinear`; raises TensorError for inputs that are not floating-point (..., in).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        quantized: QuantizedWeight | None = None,
        device: torch.device | str | None = None,
    ):
        groups = -(-in_features // GROUP)
        quantized = quantized or _empty(out_features, in_features, 4, (out_features, groups), device)
        super().__init__(in_features, out_features, bias, quantized)

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str = "weight") -> "Int4Linear":
        """Quantize `linear`, on its device; its bias is shared. Raises as `quantize_int4` does."""
        quantized = quantize_int4(linear.weight, name)
        return cls(linear.in_features, linear.out_features, linear.bias, quantized=quantized)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.dequantize().to(x.dtype), bias)

    def dequantize(self) -> Tensor:
        return dequantize_int4(QuantizedWeight(self.codes, self.scales), self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, INT4"
