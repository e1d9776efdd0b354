"""The two layers that a quantized model is made of.

Both hold packed codes and scales as parameters without gradient (offloading moves parameters, not buffers),
are subclasses of `nn.Linear` (PEFT adapts nothing else), and show a `weight` of the right shape that stores one
number: enough for code that looks at a layer's weight without using its values.

The forward pass is, with n_i and t the norms of row i and of the token,

    y_i = n_i * t * <c_W(i), c_A> + bias_i        (OrbitQuant, arXiv 2607.02461; for n_i also see `quantize`)

in the steps of `kernels`: encode the tokens, decode the codes, multiply. Tokens may be centred: the sum is of what is
left of them after a mean that they share, and of the mean (see `kernels.centring`). Which grid the centroids lie on is
a matter of the device that runs the layer, and no part of a checkpoint.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from orbitdit import kernels, trellis
from orbitdit.config import ACTIVATION_BITS
from orbitdit.errors import ConfigError, TensorError
from orbitdit.kernels import EXACT, centring, ops
from orbitdit.kernels.centring import MEAN_BITS
from orbitdit.kernels.reference import exact_linear, int4_linear
from orbitdit.packing import GROUP, packed_width
from orbitdit.quantize import (
    QuantizedWeight,
    dequantize_int4,
    dequantize_weight,
    quantize_int4,
    quantize_weight,
    token_gain,
)


class SharedInput:
    """Layers that take the same tensor: the first of them that is called computes the outputs of all.

    So the tensor is encoded once, and one op does the work of many. A member that is given the very tensor that the
    outputs are of takes its output; for any other tensor all is computed anew, so that nothing depends on the members
    being called together. What was written to the tensor in between counts as another one, except in inference mode
    and in compiled code, where torch does not tell. What is held goes with the last member; each thread has its own.
    """

    def __init__(self, members: tuple["OrbitLinear", ...]):
        self.members = members
        self.held: dict[int, tuple[Tensor, int, int, list[Tensor | None], str]] = {}

    def output(self, place: int, x: Tensor, grid: int) -> Tensor:
        """The output of member number `place` for `x` (..., dim)."""
        thread, version, output = _thread(), _version(x), None
        held = self.held.get(thread)
        if held is not None and held[0] is x:
            if held[1] == version and held[2] == grid:
                output = held[3][place]
            if output is None and held[4]:
                raise RuntimeError("what a layer shares was held for one call of each layer, with its input unchanged")
        if held is None or output is None:
            for member in self.members:
                if is_hooked(member) or member.codes.device != x.device:  # its weight is there when it is called
                    return _project(self.members[place : place + 1], x, grid)[0]
            held = (x, version, grid, list(_project(self.members, x, grid)), "")
            self.held[thread], output = held, held[3][place]
        held[3][place] = None  # the caller's own, to write to
        for left in held[3]:
            if left is not None:
                break
        else:
            self.held.pop(thread, None)
        assert output is not None
        return output

    def hold(self, x: Tensor, before: str, *extras: Tensor) -> None:
        """Compute the outputs for what `reference.apply_before` makes of `x`, to be given when members are called
        with `x` itself. All members must be on the device of `x`, and all be called, once each: RuntimeError else."""
        grid = self.members[0].grid_for(x)
        outputs: list[Tensor | None] = list(_project(self.members, x, grid, before, extras))
        self.held[_thread()] = (x, _version(x), grid, outputs, before)

    def __getstate__(self) -> dict:
        return {"members": self.members, "held": {}}


def share_inputs(layers: Iterable["OrbitLinear"]) -> None:
    """Let `layers`, which take the same tensor and are called one after the other, encode it once.

    Only layers that encode alike (width, bits, means and seed) share; the others are left alone.
    """
    alike: dict[tuple[int | float, ...], list[OrbitLinear]] = {}
    for layer in layers:
        if layer.fits:
            encoding = layer.in_features, layer.activation_bits, layer.mean_tokens, layer.mean_gain, layer.seed
            alike.setdefault(encoding, []).append(layer)
    for members in alike.values():
        shared = SharedInput(tuple(members)) if len(members) > 1 else None
        for place, layer in enumerate(members):
            layer.shared_input, layer.shared_place = shared, place


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate or diffusers moves the weights of this very module, perhaps still while another one runs."""
    own = module.__dict__
    return "_hf_hook" in own or "_diffusers_hook" in own


def _thread() -> int:
    """The number of the thread that runs, or in compiled code of the one that traces: there nothing stays held."""
    return threading.get_ident()


_thread._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see `kernels.device_grids`


def _version(x: Tensor) -> int:
    """Counts what was written to `x`, where torch counts it."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


def _project(
    layers: tuple["OrbitLinear", ...], x: Tensor, grid: int, before: str = "", extras: tuple[Tensor, ...] = ()
) -> tuple[Tensor, ...]:
    """The outputs of `layers`, which encode alike, for `x` (..., dim): views of one tensor."""
    first = layers[0]
    weights, scales, biases, bits, states = [], [], [], [], []
    for layer in layers:
        weight, scale = layer.operands(grid)
        weights.append(weight)
        scales.append(scale)
        biases.append(layer.bias)
        bits.append(layer.weight_bits)
        states.append(layer.states)
    encoding = first.activation_bits, kernels.signed(first.seed), grid, before, extras
    means = first.mean_tokens, first.mean_gain
    y = kernels.project(x, weights, scales, biases, bits, states, *encoding, *means)
    return (y,) if len(layers) == 1 else y.split([layer.out_features for layer in layers], dim=-1)


class _PackedLinear(nn.Linear):
    """What both layers share: `codes` (out, bytes) uint8, `scales` (out, ...) bf16, `bias` (out,) or None."""

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None, quantized: QuantizedWeight):
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        # First, for diffusers takes the first floating-point parameter's dtype for the model's: scales are always bf16.
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.codes = nn.Parameter(quantized.codes, requires_grad=False)
        self.scales = nn.Parameter(quantized.scales, requires_grad=False)

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

    The codes are those of a trellis of 2^`states` states (see `trellis`), or scalar ones if `states` is 0. `scale` says
    what the scales hold (see `quantize`). So many consecutive tokens as `mean_tokens` share a mean that is multiplied
    apart (see `kernels.centring`), for inputs of three dimensions and more; 0 leaves tokens as they are.

    Made by `from_linear`, or empty (to load a state dict into) by the constructor. `forward` takes (..., in) in fp32,
    bf16 or fp16 and gives (..., out) in the same dtype; it raises TensorError for other inputs. bf16 and fp16 run
    on the grid of the device (see `kernels.choose`) or on `grid`, if that is set. fp32 inputs, and what no grid takes,
    run exactly: the product multiplies the centroids, in fp32 or rounded once to the input's dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Tensor | None = None,
        *,
        weight_bits: int,
        activation_bits: int,
        states: int = 0,
        scale: str = "norm",
        mean_tokens: int = 0,
        seed: int = 0,
        quantized: QuantizedWeight | None = None,
        device: torch.device | str | None = None,
    ):
        if activation_bits not in ACTIVATION_BITS:
            allowed = ", ".join(map(str, ACTIVATION_BITS))
            raise ConfigError(f"activation_bits={activation_bits!r} is not supported; choose one of {allowed}")
        if states:
            trellis.check(weight_bits, states)
        quantized = quantized or _empty(out_features, in_features, weight_bits, (out_features,), device)
        super().__init__(in_features, out_features, bias, quantized)
        self.weight_bits, self.activation_bits, self.seed = weight_bits, activation_bits, seed
        self.states, self.gain = states, token_gain(in_features, activation_bits, scale)
        # the rows' scales make good for what codes of activation_bits lose, and codes of means lose less
        self.mean_tokens, self.mean_gain = mean_tokens, token_gain(in_features, MEAN_BITS, scale) / self.gain
        self.fits = kernels.fits((in_features, out_features), (weight_bits, activation_bits))
        self.grid: int | None = None
        self.resident = False
        self.shared_input: SharedInput | None = None
        self.shared_place = 0
        # Kept as integers: a model that is cast to another dtype must leave them alone.
        self.register_buffer("resident_values", None, persistent=False)
        self.register_buffer("resident_scales", None, persistent=False)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_bits: int,
        activation_bits: int,
        seed: int = 0,
        name: str = "weight",
        *,
        states: int = 0,
        scale: str = "norm",
        mean_tokens: int = 0,
    ) -> "OrbitLinear":
        """Quantize `linear`, on its device; its bias is shared. Arguments and errors are those of `quantize_weight`."""
        coding: Any = {"activation_bits": activation_bits, "states": states, "scale": scale}
        quantized = quantize_weight(linear.weight, weight_bits, seed, name, **coding)
        own: Any = {"weight_bits": weight_bits, "mean_tokens": mean_tokens, "seed": seed, "quantized": quantized}
        return cls(linear.in_features, linear.out_features, linear.bias, **own, **coding)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        if torch.is_grad_enabled() and x.requires_grad:
            with torch.autocast(x.device.type, enabled=False):
                return self._exactly(exact_linear, x, self.seed)
        grid = self.grid_for(x)
        if grid == EXACT:
            return self._exactly(ops.exact_linear, x, kernels.signed(self.seed))
        shared = self.shared_input
        if shared is not None and shared.members[self.shared_place] is self:  # else this is a shallow copy
            return shared.output(self.shared_place, x, grid)
        return _project((self,), x, grid)[0]

    def _exactly(self, linear: Callable[..., Tensor], x: Tensor, seed: int) -> Tensor:
        """The outputs for `x` (..., in) by `linear`, which is `reference.exact_linear` or the op."""

        def product(tokens: Tensor, bias: Tensor | None, bits: int) -> Tensor:
            return linear(tokens, self.codes, self.scales, bias, self.weight_bits, bits, seed, self.states)

        tokens, each = x.reshape(-1, self.in_features), kernels.mean_tokens(x, self.mean_tokens)
        if each:
            count, means = x.shape[-2], centring.token_means(x, each)
            y = product(centring.less_means(tokens, means, count, each), self.bias, self.activation_bits)
            y = centring.add_means(y, product(means, None, MEAN_BITS) * self.mean_gain, count, each)
        else:
            y = product(tokens, self.bias, self.activation_bits)
        return y.view(*x.shape[:-1], self.out_features)

    def grid_for(self, x: Tensor) -> int:
        """The grid that the layer runs on for inputs like `x`."""
        return kernels.choose(self.grid, x.device, x.dtype) if self.fits else EXACT

    def after(self, before: str, x: Tensor, *extras: Tensor) -> Tensor:
        """The layer's output for what `reference.apply_before` makes of `x`, on a grid; gradients do not flow."""
        return _project((self,), x, self.grid_for(x), before, extras)[0]

    def operands(self, grid: int) -> tuple[Tensor, Tensor]:
        """What `ops.project` takes as a weight: codes and scales, or what was decoded of them."""
        if not self.resident or self.resident_values is None or self.resident_scales is None:
            return self.codes, self.scales
        return self.resident_values.view(kernels.dtype_of(grid)), self.resident_scales.view(torch.float32)

    def set_grid(self, grid: int | None, resident: bool) -> None:
        """Force a grid, or None for the device's own; `resident` keeps the decoded weight, a byte each, in memory."""
        self.grid = grid
        self.resident_values = self.resident_scales = None
        chosen = kernels.choose(grid, self.codes.device, torch.bfloat16) if self.fits else EXACT
        self.resident = resident and chosen != EXACT
        if self.resident:
            self.grid = chosen  # values of one grid mean nothing on that of the next device
            bits, dim = self.weight_bits, self.in_features
            values, scales = ops.decode(self.codes, self.scales, bits, dim, chosen, self.states)
            self.resident_values, self.resident_scales = values.view(torch.uint8), scales.view(torch.int32)

    def dequantize(self) -> Tensor:
        packed = QuantizedWeight(self.codes, self.scales)
        return dequantize_weight(packed, self.weight_bits, self.in_features, self.seed, self.states, self.gain)

    def extra_repr(self) -> str:
        codes = f", trellis 2^{self.states}" if self.states else ""
        codes += ", centred" if self.mean_tokens else ""
        return f"{super().extra_repr()}, W{self.weight_bits}A{self.activation_bits}{codes}"


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
        if torch.is_grad_enabled() and x.requires_grad:
            return int4_linear(x, self.codes, self.scales, self.bias)
        return ops.int4_linear(x, self.codes, self.scales, self.bias)

    def dequantize(self) -> Tensor:
        return dequantize_int4(QuantizedWeight(self.codes, self.scales), self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, INT4"
