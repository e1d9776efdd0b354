"""The two layers that a quantized model is made of.

Both hold packed codes and scales as parameters without gradient (offloading moves parameters, not buffers) and are
subclasses of `nn.Linear` (PEFT adapts nothing else). `weight` is what the codes stand for, expanded when its values are
used.

The forward pass is, with n_i and t the norms of row i and of the token,

    y_i = n_i * t * <c_W(i), c_A> + bias_i        (OrbitQuant, arXiv 2607.02461; for n_i also see `quantize`)

in the steps of `ops`: encode the tokens, decode the codes, multiply. The code of a token may be a sum of two, of a mean
that tokens share and of what is left without it (see `ops.rotate_encode.means`). Which grid the centroids lie on
depends on the device that runs the layer, and is no part of a checkpoint.

A layer that is given `Tokens` (see `tokens`) takes their pending step into the encoding, and computes the outputs of
its siblings with its own.
"""

import copy
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orbitdit.errors import CheckpointError, ModelError, TensorError
from orbitdit.grids import EXACT
from orbitdit.ops import choose, has_kernel, ops, run_linear
from orbitdit.ops.int4_linear.reference import int4_linear
from orbitdit.ops.linear.reference import exact_linear
from orbitdit.quantize import QuantizedWeight, check_scales, check_spec, empty_weight, quantize_weight
from orbitdit.spec import INT4, LayerSpec, Projection
from orbitdit.tokens import Deferred, Modulation, Tokens, TokensTensor
from orbitdit.weight import PackedWeight


class Siblings:
    """Layers of a block that take the same tokens and encode them alike. It does not keep them alive."""

    def __init__(self, layers: "Iterable[OrbitLinear]"):
        self._layers = tuple(weakref.ref(layer) for layer in layers)

    def layers(self) -> "tuple[OrbitLinear, ...]":
        """All of them, or none if one is gone."""
        found = []
        for reference in self._layers:
            layer = reference()
            if layer is None:
                return ()
            found.append(layer)
        return tuple(found)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings":
        memo[id(self)] = twin = Siblings(())
        twin._layers = tuple(weakref.ref(copy.deepcopy(layer, memo)) for layer in self.layers())
        return twin

    def __getstate__(self) -> "dict[str, tuple[OrbitLinear, ...]]":
        return {"layers": self.layers()}

    def __setstate__(self, state: "dict[str, tuple[OrbitLinear, ...]]") -> None:
        self._layers = tuple(weakref.ref(layer) for layer in state["layers"])


class Stamp:
    """Parameters and how often they had been written to when something was made of them."""

    def __init__(self, *parameters: Tensor | None):
        self.parameters, self.versions = parameters, _versions(parameters)

    def fits(self, *parameters: Tensor | None) -> bool:
        """Whether these are the same tensors, not written to since (as far as torch counts it)."""
        for before, now in zip(self.parameters, parameters, strict=True):
            if before is not now:
                return False
        return self.versions == _versions(parameters)


def _versions(parameters: Sequence[Tensor | None]) -> list[int]:
    if torch.compiler.is_compiling():
        return []
    try:
        return [0 if p is None else p._version for p in parameters]
    except RuntimeError:  # of inference mode: nothing is counted
        return [0 if p is None or p.is_inference() else p._version for p in parameters]


class Outputs(NamedTuple):
    """What siblings' outputs are kept as in `Tokens`: whose, on which grid, and of which parameters."""

    siblings: Siblings
    grid: str
    outputs: list[Tensor | None]
    stamps: list[Stamp]


class Decoded(NamedTuple):
    """A decoded weight and what it was decoded from."""

    stamp: Stamp
    grid: str
    values: Tensor
    row_scales: Tensor


def share_inputs(layers: "Iterable[OrbitLinear]") -> None:
    """Let `layers`, which take the same tokens, encode them once and be multiplied side by side, where these come as
    `Tokens`.

    Only layers that encode alike (width, token code, scale and seed) and have kernels share; others are left alone.
    """
    alike: dict[Any, list[OrbitLinear]] = {}
    for layer in dict.fromkeys(layers):  # keys may be the values
        layer.siblings, layer.place = None, 0
        if layer.has_kernel:
            alike.setdefault(layer.spec.encoding, []).append(layer)
    for members in alike.values():
        if len(members) > 1:
            siblings = Siblings(members)
            for place, layer in enumerate(members):
                layer.siblings, layer.place = siblings, place


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate or diffusers moves the weights of this very module, perhaps still while another one runs."""
    own = module.__dict__
    registry = own.get("_diffusers_hook")
    return "_hf_hook" in own or (registry is not None and bool(registry.hooks))


class _PackedLinear(nn.Linear):
    """What both layers share: `spec`, `codes` (out, bytes) uint8, `scales` (out, ...) bf16, `bias` (out,) or None.

    `dtype` is the compute dtype: that of the weight which was quantized, then whatever the layer is cast to, except for
    what tensors are only stored in (layerwise casting keeps them in fp8 between calls).
    """

    def __init__(
        self,
        spec: LayerSpec,
        bias: Tensor | None = None,
        quantized: QuantizedWeight | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        nn.Module.__init__(self)
        check_spec(spec)
        quantized = quantized or empty_weight(spec, device)
        self.spec, self.in_features, self.out_features = spec, spec.in_features, spec.out_features
        self.key = spec.key  # compiled code cannot compute it
        candidates = (dtype, None if bias is None else bias.dtype, torch.bfloat16)
        self.dtype: torch.dtype = next(each for each in candidates if each is not None and _computes_in(each))
        # First, for diffusers takes the first floating-point parameter's dtype for the model's: scales are always bf16.
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self.codes = nn.Parameter(quantized.codes, requires_grad=False)
        self.scales = nn.Parameter(quantized.scales, requires_grad=False)

    @classmethod
    def from_linear(cls, linear: nn.Linear, spec: LayerSpec, name: str = "weight") -> Any:
        """Quantize `linear` as `spec` says, on its device; its bias is shared. Raises as `quantize_weight` does."""
        quantized = quantize_weight(linear.weight, spec, name)
        return cls(spec, linear.bias, quantized, dtype=linear.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the codes stand for, in the compute dtype, for reading.

        Its values are expanded when they are used; compiled code expands them at once. Raises ModelError for an
        attempt to write to it.
        """
        return self.dequantize().to(self.dtype) if torch.compiler.is_compiling() else PackedWeight(self)

    @weight.setter
    def weight(self, value: Any) -> None:
        raise self._not_replaced()

    @weight.deleter
    def weight(self) -> None:
        raise self._not_replaced()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `nn.Module`. Raises ModelError for `weight`, whose values are packed."""
        if name == "weight":
            raise self._not_replaced()
        super().register_parameter(name, param)

    def _not_replaced(self) -> ModelError:
        return ModelError(f"{self}: the weight is packed and cannot be replaced: use orbitdit.dequantize_ first")

    def dequantize(self) -> Tensor:
        """The weight (out, in) in fp32 that the codes stand for."""
        weight: Tensor = ops.dequantize(self.codes, self.scales, self.key)
        return weight

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """An ordinary `nn.Linear` with the dequantized weight and the bias in `dtype`."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dequantize().to(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return linear

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Beside codes and scales the state has what they mean: the spec's key (on the CPU), if there are values."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.codes.is_meta:
            destination[f"{prefix}spec"] = spec_tensor(self.spec)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Raises CheckpointError for the codes of another spec (older states do not say what theirs is), and
        TensorError for scales that are none."""
        check_spec_tensor(state_dict.get(f"{prefix}spec"), self.spec, prefix.removesuffix("."))
        if f"{prefix}scales" in state_dict:
            check_scales(state_dict[f"{prefix}scales"], f"{prefix}scales")
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected: list[str] = args[3]
        if f"{prefix}spec" in unexpected:
            unexpected.remove(f"{prefix}spec")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_PackedLinear":
        """Moves go to all tensors, casts to the bias alone: codes and scales in another dtype would be others."""
        codes, scales = self.codes, self.scales

        def keep_dtype(tensor: Tensor) -> Tensor:
            if tensor is not codes and tensor is not scales:
                return fn(tensor)
            integers = tensor.view(torch.int16) if tensor is scales else tensor
            moved = fn(integers)
            if moved.dtype != integers.dtype:  # `nn.Module.type` casts integers too
                moved = integers.to(moved.device)
            return moved.view(tensor.dtype)

        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if _computes_in(dtype):
            self.dtype = dtype
        moved: _PackedLinear = super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return moved

    def _check_input(self, x: "Tensor | Tokens") -> None:
        if not x.dtype.is_floating_point or x.shape[-1:] != (self.in_features,):
            raise TensorError(
                f"{self}: the input must be floating-point with width {self.in_features}; got {x.dtype} of shape "
                f"{tuple(x.shape)}"
            )
        if self.codes.is_meta and x.device.type != "meta":
            raise ModelError(f"{self} has no weights (it is on the meta device): load them first")

    def extra_repr(self) -> str:
        """Shape, bits and code."""
        return f"{super().extra_repr()}, {self.spec.label}, {self.spec.weight.key}"


def spec_tensor(spec: LayerSpec) -> Tensor:
    """The key of `spec` as ASCII text, uint8: a layer's entry `spec` in state dicts and files. Spaces make it a
    multiple of 64 bytes long: codes that follow it in a file stay aligned."""
    text = spec.key.encode()
    return torch.frombuffer(bytearray(text.ljust(-(-len(text) // 64) * 64)), dtype=torch.uint8)


def check_spec_tensor(stored: Tensor | None, spec: LayerSpec, name: str) -> None:
    """Raise CheckpointError unless `stored`, the entry `spec` of the layer `name`, is None or says `spec`."""
    if stored is None or torch.equal(stored.cpu(), spec_tensor(spec)):
        return
    said = bytes(stored.flatten().to("cpu", torch.uint8).tolist()).decode("ascii", "replace").rstrip()
    raise CheckpointError(
        f"the stored codes of {name or 'the layer'} are {said!r}, the model's layer is {spec.key!r}: quantize the "
        "model as the stored one was"
    )


def _computes_in(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


class OrbitLinear(_PackedLinear):
    """A linear layer of packed codes with one bf16 scale a row, on quantized tokens, as its `spec` says.

    Made by `from_linear`, or empty (to load a state dict into) by the constructor. `forward` takes (..., in) in fp32,
    bf16 or fp16 and gives (..., out) in the same dtype; it raises TensorError for other inputs, ModelError where it is
    on the meta device. Where tokens are centred, those of a sample lie along the second last dimension. bf16 and fp16
    run on the grid of the device (see `ops.choose`) or on `grid`, if that is set. fp32 inputs, and what no grid takes,
    run exactly: the product multiplies the centroids, in fp32 or rounded once to the input's dtype.
    """

    def __init__(
        self,
        spec: LayerSpec,
        bias: Tensor | None = None,
        quantized: QuantizedWeight | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(spec, bias, quantized, device, dtype)
        self.has_kernel = has_kernel(spec)
        self.grid: str | None = None
        self.cache_decoded = False
        self.siblings: Siblings | None = None
        self.place = 0
        self._decoded: Decoded | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out) for `x` (..., in), which may be `Tokens`."""
        if isinstance(x, TokensTensor):
            return self._of_deferred(x.tokens)
        if isinstance(x, Deferred):
            return self._of_deferred(x)
        self._check_input(x)
        if torch.is_grad_enabled() and x.requires_grad:
            with torch.autocast(x.device.type, enabled=False):
                return exact_linear(x, self.codes, self.scales, self.bias, self.spec)
        grid = self.grid_for(x)
        if grid == EXACT:
            y: Tensor = ops.exact_linear(x, self.codes, self.scales, self.bias, self.key)
            return y
        return project((self,), x, grid)[0]

    def _of_deferred(self, x: Deferred) -> Tensor:
        if not isinstance(x, Tokens):
            return self.forward(x.tensor())
        self._check_input(x)
        step = self._step(x)
        if step is None:
            x.tensor()
            step = x.source, "", ()
        source, prologue, prologue_args = step
        grid = self.grid_for(source)
        if grid == EXACT or (torch.is_grad_enabled() and source.requires_grad):
            return self.forward(source)
        siblings = self.siblings
        for entry in x.outputs():
            if entry.siblings is siblings and entry.grid == grid:
                output: Tensor | None = entry.outputs[self.place]
                entry.outputs[self.place] = None  # the caller's own, to write to
                if output is not None and entry.stamps[self.place].fits(*self._parameters.values()):
                    return output
                siblings = None  # called twice, or changed since: alone this time
        together = self._together(siblings, source, grid)
        outputs = project(together, source, grid, prologue, prologue_args)
        if siblings is None or len(together) == 1:
            return outputs[0]
        left: list[Tensor | None] = list(outputs)
        left[self.place] = None
        stamps = [Stamp(*layer._parameters.values()) for layer in together]
        x.memo.append(Outputs(siblings, grid, left, stamps))
        return outputs[self.place]

    def _together(self, siblings: Siblings | None, x: Tensor, grid: str) -> "tuple[OrbitLinear, ...]":
        """The layers whose outputs are computed now: all siblings where they can be, else this one."""
        layers = () if siblings is None else siblings.layers()
        if not layers or layers[self.place] is not self:  # the latter in a shallow copy
            return (self,)
        for layer in layers:
            if layer.codes.device != x.device or layer.grid_for(x) != grid or is_offloaded(layer):
                return (self,)
        return layers

    def _step(self, x: Tokens) -> tuple[Tensor, str, tuple[Tensor, ...]] | None:
        """What the kernel makes of pending tokens on the way: source, prologue and arguments. None where it can't."""
        x.check()
        if not x.prologue:
            return x.source, "", ()
        tokens, args = self.spec.tokens, x.prologue_args
        if not fuses(x) or tokens is None or is_offloaded(self) or not self.has_kernel:
            return None
        if choose(self.grid, x.device, x.dtype) == EXACT:
            return None
        source = x.source.to(x.dtype)
        if x.prologue in ("layer_norm", "rms_norm"):
            if len(args) not in ((2,) if x.prologue == "layer_norm" else (1, 2)):
                return None
            norm, *modulation = args if x.prologue == "rms_norm" else (None, *args)
            rows = [_without_one(modulation[0]), *map(_row, modulation[1:])] if modulation else []
            rows = [row.to(source.dtype) for row in rows]  # here, where a compiler sees it
            args = tuple(rows) if norm is None else (norm.view(1, -1), *rows)
        for arg in args:
            if arg.device != source.device:
                return None
        return source, x.prologue, args

    def grid_for(self, x: Tensor) -> str:
        """The grid that the layer runs on for inputs like `x`."""
        return choose(self.grid, x.device, x.dtype) if self.has_kernel else EXACT

    def operands(self, grid: str) -> tuple[Tensor, Tensor]:
        """What the op takes as a weight: codes and scales, or what was decoded of them.

        Compiled code decodes each time: it cannot see that a parameter was written to since.
        """
        codes, scales = self.codes, self.scales
        if not self.cache_decoded or torch.compiler.is_compiling():
            return codes, scales
        kept = self._decoded
        current = kept is not None and kept.stamp.fits(codes, scales) and kept.values.device == codes.device
        if kept is None or not current or kept.grid != grid:
            values, row_scales = ops.decode(codes, scales, Projection.key_of((self.key,), grid))
            self._decoded = kept = Decoded(Stamp(codes, scales), grid, values, row_scales)
        return kept.values, kept.row_scales

    def set_grid(self, grid: str | None, cache_decoded: bool) -> None:
        """Force a grid, or None for the device's own; `cache_decoded` keeps the decoded weight, a byte each."""
        self.grid, self.cache_decoded, self._decoded = grid, cache_decoded, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_PackedLinear":
        self._decoded = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_decoded": None}


class Int4Linear(_PackedLinear):
    """A weight-only INT4 layer in groups of 64 inputs, for AdaLN modulation; the activations stay as they are.

    Made and loaded as `OrbitLinear`; raises as it does for inputs that are not floating-point (..., in).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out) for `x` (..., in); a `Modulation` for a `Modulation`."""
        if isinstance(x, Deferred):
            made = self.forward(x.tensor())
            return Modulation(made) if isinstance(x, Modulation) else made
        self._check_input(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return int4_linear(x, self.codes, self.scales, self.bias)
        y: Tensor = ops.int4_linear(x, self.codes, self.scales, self.bias)
        return y


def layer_class(spec: LayerSpec) -> type[OrbitLinear] | type[Int4Linear]:
    """The class of a layer's module."""
    return Int4Linear if spec.weight.codebook == INT4 else OrbitLinear


def project(
    layers: Sequence[OrbitLinear], x: Tensor, grid: str, prologue: str = "", prologue_args: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """The outputs of `layers`, which encode alike, for `x` (..., dim) after `prologue`: views of one tensor."""
    operands: list[Tensor | None] = []
    keys = []
    for layer in layers:
        operands += *layer.operands(grid), layer.bias
        keys.append(layer.key)
    y = run_linear(x, prologue_args, operands, Projection.key_of(keys, grid, prologue))
    return (y,) if len(layers) == 1 else y.split([layer.out_features for layer in layers], dim=-1)


def fuses(x: Tokens) -> bool:
    """Whether kernels take pending steps on this device, and no gradients are asked for, which they would cut off."""
    return x.is_cuda and not torch.is_grad_enabled()


def _without_one(scale: Any) -> Tensor:
    """AdaLN's scale as a row for each sample, less the 1 that the kernel adds."""
    if isinstance(scale, Modulation):
        return _flat_rows(scale.source) if scale.plus_one else _flat_rows(scale.source) - 1
    return _flat_rows(scale) - 1


def _row(shift: Any) -> Tensor:
    return _flat_rows(shift.tensor() if isinstance(shift, Modulation) else shift)


def _flat_rows(rows: Tensor) -> Tensor:
    """(samples, 1, ..., dim) as (samples, dim)."""
    return rows.flatten(0, -2)
