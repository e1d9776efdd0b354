"""Which way each layer of a quantized model runs, and why not a faster one.

What is decided here is read from `linear`, `fusion` and `ops`, which decide it when a model runs; the tests compare the
two on recorded forward passes.
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orbitdit.errors import ConfigError
from orbitdit.explanation import Explanation, LayerRun
from orbitdit.families import FAMILIES, Family
from orbitdit.fusion import KNOWN, OWN_HOOKS, is_known, is_wrapped
from orbitdit.grids import E4M3, EXACT, GRIDS, INT8
from orbitdit.linear import Int4Linear, OrbitLinear, is_offloaded
from orbitdit.model import packed_layers
from orbitdit.ops import GRID_BITS, cuda_grids, device_grids
from orbitdit.ops.int4_linear.cuda import CHUNK, CHUNKS
from orbitdit.ops.int4_linear.cuda import ROWS as INT4_ROWS
from orbitdit.ops.linear.matmul import has_row_scales
from orbitdit.ops.rotate_encode import cuda as rotate_encode_cuda
from orbitdit.ops.rotate_encode.reference import NORM_EPSILONS
from orbitdit.spec import LayerSpec

TORCH, INT4_KERNEL, INT4_TORCH, NOT_RUN = "torch", "INT4 kernel", "INT4 torch", "not run"
"""Routes, beside "exact" and, for each grid, "e4m3 kernel" and "int8 kernel". "torch" is a layer that is kept."""
PROLOGUES = {
    "LayerNorm": "layer_norm",
    "FP32LayerNorm": "layer_norm",
    "RMSNorm": "rms_norm",
    "GELU": "gelu",
    "FeedForward": "silu",
}
"""What an encoding computes in place of a module, by the names of the classes that `fusion.KNOWN` has."""
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
SHORT = (torch.bfloat16, torch.float16)
"""What kernels take."""
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Layers that diffusers' `fuse_projections` makes, and those whose weights they hold."""
_BLOCK = re.compile(r"(\w+\.\d+)\.(.+)")


class Device(NamedTuple):
    """Where layers run: its name, "cuda" or "cpu" or another type, and the grids that it multiplies, fastest first."""

    name: str
    type: str
    grids: tuple[str, ...]

    @property
    def lacks(self) -> str:
        """Why layers run exactly here."""
        if self.type == "cpu":
            return "int8 products of this CPU are not both exact and fast"
        return f"no kernels for {self.name}: an NVIDIA GPU of compute capability 8.0 or newer is needed"


def device_named(device: torch.device | str) -> Device:
    """The device that a user names; "meta" stands for this machine's fastest. Raises ConfigError."""
    named = re.fullmatch(r"(?:cuda )?sm_(\d+)(\d)[a-z]?", device) if isinstance(device, str) else None
    if named:
        return Device(f"cuda sm_{named[1]}{named[2]}", "cuda", cuda_grids((int(named[1]), int(named[2]))))
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device {device!r} is unknown; choose cpu, cuda, or an architecture such as sm_90") from None
    if found.type == "meta":
        found = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cpu":
        return Device("cpu", "cpu", device_grids(found))
    if found.type != "cuda":
        return Device(str(found), found.type, (EXACT,))
    if not torch.cuda.is_available():
        raise ConfigError(f"device {str(found)!r}: no CUDA device is available; name an architecture such as sm_90")
    if torch.version.cuda is None:
        return Device(f"{found} of ROCm", "cuda", (EXACT,))
    major, minor = torch.cuda.get_device_capability(found)
    return Device(f"cuda sm_{major}{minor}", "cuda", cuda_grids((major, minor)))


class Explainer:
    """Explains the layers of one quantized model, for `device` (None: where each layer is) and `dtype` (None: its
    own)."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, device: Device | None):
        self.model, self.dtype, self.device = model, dtype, device
        self.family = FAMILIES.get(type(model).__name__, Family(()))
        self.modules = dict(model.named_modules())
        self.adapted = {name for name, module in self.modules.items() if hasattr(module, "base_layer")}
        self.names = {layer: name.removesuffix(".base_layer") for name, layer in packed_layers(model)}

    def explanation(self) -> Explanation:
        """All rows, and the notes that apply."""
        rows, devices, dtypes = [], dict[str, Device](), dict[str, None]()
        for name, layer in self.modules.items():
            if not isinstance(layer, nn.Linear) or not name:
                continue
            adapter = next((a for a in self.adapted if name.startswith(f"{a}.")), None)
            if adapter is None:
                rows.append(self.row(name, layer))
            elif name == f"{adapter}.base_layer":
                row = self.row(adapter, layer)
                rows.append(replace(row, reasons=(*row.reasons, *_beside_adapter(row))))
            if isinstance(layer, OrbitLinear | Int4Linear):
                devices[self.device_of(layer).name] = self.device_of(layer)
                dtypes[_name_of(self.dtype_of(layer))] = None
        notes = tuple(self.notes(rows, list(devices.values())))
        return Explanation(type(self.model).__name__, ", ".join(devices), ", ".join(dtypes), tuple(rows), notes)

    def row(self, name: str, layer: nn.Linear) -> LayerRun:
        """The row of the layer of this name."""
        shape = layer.in_features, layer.out_features
        if isinstance(layer, Int4Linear):
            int4_route, why_torch = self.int4_route(layer)
            return LayerRun(name, *shape, layer.spec.label, int4_route, reasons=why_torch)
        if not isinstance(layer, OrbitLinear):
            return LayerRun(name, *shape, "kept", TORCH)
        made, tokens = self.made_of(name), layer.spec.tokens
        if made:
            why = f"not run: fuse_projections has put its weight into {made}, in full precision"
            return LayerRun(name, *shape, layer.spec.label, NOT_RUN, reasons=(why,))
        grid, reasons = self.grid(layer)
        prologue, not_fused = self.prologue(name)
        together, not_shared = self.together(layer)
        reasons = reasons + not_fused + not_shared + self.product(layer, together, grid)
        return LayerRun(
            name,
            *shape,
            label=layer.spec.label,
            route=EXACT if grid == EXACT else f"{grid} kernel",
            prologue=prologue,
            siblings=len(together) - 1,
            group_size=None if tokens is None else tokens.group_size,
            reasons=tuple(reasons),
        )

    def int4_route(self, layer: Int4Linear) -> tuple[str, tuple[str, ...]]:
        """Kernel or torch, and why torch."""
        device, dtype = self.device_of(layer), self.dtype_of(layer)
        if device.type != "cuda" or device.grids == (EXACT,):
            return INT4_TORCH, ("INT4 in torch: its kernel needs an NVIDIA GPU of compute capability 8.0 or newer",)
        if dtype not in SHORT:
            return INT4_TORCH, (f"INT4 in torch: inputs are {_name_of(dtype)}; its kernel takes bf16 and fp16",)
        if layer.in_features > CHUNK * CHUNKS:
            return INT4_TORCH, (f"INT4 in torch: its kernel takes at most {CHUNK * CHUNKS:,} inputs",)
        return INT4_KERNEL, ()

    def grid(self, layer: OrbitLinear) -> tuple[str, list[str]]:
        """As `OrbitLinear.grid_for`, and why it is not the fastest."""
        device, dtype = self.device_of(layer), self.input_dtype(layer)
        if not layer.has_kernel:
            return EXACT, [f"exact: {_no_kernel(layer.spec)}"]
        if dtype not in SHORT:
            given = self.dtype_of(layer)
            why = "" if dtype == given else f", since the weight of a norm before is not {_name_of(given)}"
            return EXACT, [f"exact: inputs are {_name_of(dtype)}{why}; kernels take bf16 and fp16"]
        best = device.grids[0]
        if layer.grid is None or layer.grid == best:
            return best, [f"exact: {device.lacks}"] if best == EXACT else []
        if layer.grid in device.grids:
            return layer.grid, [f"{layer.grid}: set_grid_ asks for it; {best} is the fastest of {device.name}"]
        return layer.grid, [f"{layer.grid}: set_grid_ asks for it; {device.name} does not multiply it, and will fail"]

    def prologue(self, name: str) -> tuple[str, list[str]]:
        """The step before the layer that runs inside its encoding, or why the step before it does not.

        The layers that take a step are called in order: one that takes it as a tensor leaves nothing pending for those
        after it, but for outputs that a sibling before it has left.
        """
        step, takers = self.before(name)
        if step is None:
            return "", []
        found: dict[str, tuple[str, list[str]]] = {}
        made = ""
        for taker in takers:
            module = self.modules.get(taker)
            layer = getattr(module, "base_layer", module)
            if isinstance(layer, OrbitLinear):
                if taker not in found:
                    why = self.not_taken(layer, step) or made
                    result = ("", [f"not fused: {why}"]) if why else (PROLOGUES[_original(step).__name__], [])
                    found |= {self.names.get(sibling, ""): result for sibling in self.together(layer)[0]}
                    found[taker] = result
                taken = bool(found[taker][0]) and taker not in self.adapted
            else:
                taken = module is None
            if not taken and not made:
                block = _BLOCK.fullmatch(taker)
                made = f"{block[2] if block else taker}, called before it, takes the tokens as a tensor"
        return found[name]

    def not_taken(self, layer: OrbitLinear, step: nn.Module) -> str:
        """Why a layer does not take the pending step of a module; "" if it does. As `OrbitLinear._step`."""
        device = self.device_of(layer)
        if self.grid(layer)[0] == EXACT:
            return "layers that run exactly take no step before them"
        if device.type != "cuda":
            return f"kernels of a {device.name.upper()} take no step before them"
        if is_offloaded(layer):
            return "the layer is offloaded by itself"
        return _not_deferred(step)

    def before(self, name: str) -> tuple[nn.Module | None, tuple[str, ...]]:
        """The module in front of a layer whose step might run inside its encoding, and the layers that take it, in the
        order of their calls: what the family names, or the activation of a feed-forward of diffusers'."""
        found = _BLOCK.fullmatch(name)
        for step, layers in self.family.pending.items() if found else ():
            if found and found[2] in layers and f"{found[1]}.{step}" in self.modules:
                return self.modules[f"{found[1]}.{step}"], tuple(f"{found[1]}.{layer}" for layer in layers)
        parent, _, leaf = name.rpartition(".")
        previous: nn.Module | None = None
        for child_name, child in self.modules[parent].named_children() if parent else ():
            if child_name == leaf:
                break
            previous = previous if isinstance(child, nn.Dropout) else child
        if previous is None or _original(previous).__module__ != "diffusers.models.activations":
            return None, ()
        return previous, (name,)

    def together(self, layer: OrbitLinear) -> tuple[Sequence[OrbitLinear], list[str]]:
        """As `OrbitLinear._together`: the layers that one encoding serves, and why it does not serve all that take the
        same tokens."""
        members = self.members(self.names.get(layer, ""))
        others = {other: member for other, member in members.items() if member is not layer}
        grid = self.grid(layer)[0]
        if layer.siblings is None and not others:
            return (layer,), []
        if grid == EXACT:
            return (layer,), ["not shared: layers that run exactly encode for themselves"]
        unlike = [o for o, m in others.items() if not m.has_kernel or m.spec.encoding != layer.spec.encoding]
        reasons = [f"not shared with {', '.join(unlike)}: tokens are encoded otherwise there"] if unlike else []
        if layer.siblings is None:
            alike = [other for other in others if other not in unlike]
            return (layer,), reasons + [f"not shared with {', '.join(alike)}: they are not connected"] * bool(alike)
        layers = layer.siblings.layers()
        if not layers:
            return (layer,), [*reasons, "not shared: a sibling is gone"]
        if layers[layer.place] is not layer:
            return (layer,), [*reasons, "not shared: the layer is a copy whose siblings are those of another"]
        if any(is_offloaded(sibling) for sibling in layers):
            return (layer,), [*reasons, "not shared: the layer or a sibling is offloaded by itself"]
        if any(self.grid(sibling)[0] != grid for sibling in layers):
            return (layer,), [*reasons, "not shared: a sibling runs on another grid"]
        if self.device is None and any(sibling.codes.device != layer.codes.device for sibling in layers):
            return (layer,), [*reasons, "not shared: a sibling is on another device"]
        return layers, reasons

    def members(self, name: str) -> dict[str, OrbitLinear]:
        """The quantized layers that take the same tokens as this one, itself among them, by their names in the
        block."""
        found = _BLOCK.fullmatch(name)
        names = next((names for names in self.family.shared if found and found[2] in names), ())
        members = {}
        for other in names if found else ():
            module = self.modules.get(f"{found[1]}.{other}") if found else None
            module = getattr(module, "base_layer", module)
            if isinstance(module, OrbitLinear):
                members[other] = module
        return members

    def product(self, layer: OrbitLinear, together: Sequence[OrbitLinear], grid: str) -> list[str]:
        """What the decoding and the product could do better."""
        if grid == EXACT:
            return []
        why, reasons = "", []
        if layer.cache_decoded:
            reasons.append("cache_decoded: the decoded weight is kept, a byte each")
        if any(sibling.cache_decoded for sibling in together):
            why = "one has cache_decoded"
        elif any(sibling.spec.weight != layer.spec.weight for sibling in together):
            why = "their weights have different codes"
        elif {None if s.bias is None else s.bias.dtype for s in together} not in ({None}, *({t} for t in SHORT)):
            why = "their biases are not all bf16 or all fp16"
        apart = self.device_of(layer).type == "cuda" and len(together) > 1 and bool(why)
        if apart:
            reasons.append(f"siblings are decoded and multiplied one by one: {why}")
        if grid == E4M3.name and self.device_of(layer).type == "cuda":
            rows = layer.out_features if apart else sum(sibling.out_features for sibling in together)
            few = bisect_left(range(1 << 20), True, 1, key=lambda t: has_row_scales(t, rows, layer.in_features)) - 1
            if few:
                reasons.append(f"few tokens: up to {few:,} of them, scales are applied by a kernel after the product")
        return reasons

    def made_of(self, name: str) -> str | None:
        """The layer that diffusers has put this one's weight into and calls in its place."""
        parent, _, leaf = name.rpartition(".")
        attention = self.modules[parent]
        fused = FUSED_PROJECTIONS.items() if getattr(attention, "fused_projections", False) else ()
        return next((made for made, parts in fused if leaf in parts and hasattr(attention, made)), None)

    def notes(self, rows: Sequence[LayerRun], devices: Sequence[Device]) -> Iterator[str]:
        """What holds for all layers, in sentences."""
        model, routes = type(self.model).__name__, {row.route for row in rows}
        if not self.family.shared:
            yield f"{model} is of no known family: its layers share no inputs, and its norms are not fused."
        elif not self.family.pending:
            yield f"Norms in front of the layers of {model} are not fused: its family names none."
        for device in devices:
            if device.type == "cuda" and device.grids[0] == INT8.name:
                yield f"{device.name} has no FP8: e4m3 needs compute capability 8.9."
        if any(row.prologue in NORM_EPSILONS for row in rows):
            yield "Norms with a modulation of its own for each token (Wan 2.2 TI2V has it) are not fused."
        if INT4_KERNEL in routes:
            yield f"The INT4 kernel takes up to {INT4_ROWS} rows, as modulation has; torch multiplies more."
        if routes & {f"{grid} kernel" for grid in GRIDS}:
            yield (
                "Where gradients are enabled nothing is fused, and inputs that require them run exactly. "
                "Under autocast nothing is fused, and inputs that it leaves in fp32 run exactly."
            )

    def device_of(self, layer: OrbitLinear | Int4Linear) -> Device:
        """Where a layer runs."""
        return self.device or device_named(layer.codes.device)

    def dtype_of(self, layer: OrbitLinear | Int4Linear) -> torch.dtype:
        """The dtype of the model's tokens."""
        return self.dtype or layer.dtype

    def input_dtype(self, layer: OrbitLinear) -> torch.dtype:
        """The dtype of a layer's inputs: that of the tokens, unless an RMSNorm before them has a weight in another."""
        step, _ = self.before(self.names.get(layer, ""))
        for child in ("w1", "proj"):  # of a feed-forward or a GELU, which give what these do
            first = getattr(step, child, None)
            first = getattr(first, "base_layer", first)
            if isinstance(first, OrbitLinear):
                return self.input_dtype(first)
        weight = getattr(step, "weight", None)
        if step is not None and isinstance(weight, Tensor) and PROLOGUES.get(_original(step).__name__) == "rms_norm":
            return torch.promote_types(self.dtype_of(layer), weight.dtype)
        return self.dtype_of(layer)


def _no_kernel(spec: LayerSpec) -> str:
    """Why `ops.has_kernel` refuses a layer."""
    dim, tokens = spec.in_features, spec.tokens
    if tokens is None:
        return "tokens are not quantized (A16)"
    if max(spec.weight.bits, tokens.bits) > GRID_BITS:
        return f"codes of more than {GRID_BITS} bits have more levels than a grid ({spec.label})"
    if rotate_encode_cuda.has_kernel(dim):
        return f"{spec.out_features:,} outputs are no multiple of 16"
    if dim % 16:
        return f"{dim:,} inputs are no multiple of 16"
    if dim > rotate_encode_cuda.MAX_DIM:
        return f"{dim:,} inputs are more than the {rotate_encode_cuda.MAX_DIM:,} that kernels take"
    return f"kernels have no Hadamard blocks of {dim & -dim:,} (for {dim:,} inputs)"


def _original(module: nn.Module) -> type[nn.Module]:
    """The class of a module in its own library."""
    original: type[nn.Module] = getattr(type(module), "original", type(module))
    return original


def _not_deferred(module: nn.Module) -> str:
    """Why the step of `module` does not wait for the encoding; "" if it does. See `fusion`."""
    original = _original(module)
    name = original.__name__
    if f"{original.__module__}.{original.__qualname__}" not in KNOWN:
        return f"no kernel computes {name}"
    if not is_known(original):
        return f"{name} is not as orbitdit knows it"
    if is_offloaded(module):
        return f"{name} is offloaded by itself"
    if type(module) is original:
        return f"{name} was not replaced when the model was quantized (it was offloaded, perhaps)"
    if is_wrapped(module):
        return f"{name} was given another forward pass, as hooks of other libraries do"
    if {*module._forward_hooks.values(), *module._forward_pre_hooks.values()} - {*OWN_HOOKS}:
        return f"a hook is registered on {name}"
    prologue, weight = PROLOGUES[name], getattr(module, "weight", None)
    if prologue in NORM_EPSILONS and module.eps != NORM_EPSILONS[prologue]:
        return f"{name} has epsilon {module.eps:g}; the kernel's is {NORM_EPSILONS[prologue]:g}"
    if prologue == "layer_norm" and module.elementwise_affine:
        return f"{name} has a weight of its own"
    if prologue == "rms_norm" and (weight is None or getattr(module, "bias", None) is not None):
        return f"{name} has {'no weight' if weight is None else 'a bias'}"
    if prologue == "gelu" and module.approximate != "tanh":
        return f"{name} is not the tanh approximation"
    return ""


def _beside_adapter(row: LayerRun) -> list[str]:
    """What an adapter around a layer costs beside its own products."""
    if row.route == NOT_RUN:
        return []
    if row.prologue:
        return ["adapter: it takes the tokens as a tensor, so the step before runs once more in torch"]
    return ["adapter: its own matrices are multiplied beside the layer"]


def _name_of(dtype: torch.dtype) -> str:
    return DTYPES.get(dtype, str(dtype).removeprefix("torch."))
