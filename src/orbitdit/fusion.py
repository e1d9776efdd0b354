"""Connects the layers of a quantized model: who shares an input, and what runs inside an encoding.

Norms, activations and gated feed-forwards that precede a quantized layer are replaced by subclasses of themselves whose
result is `Tokens` with a pending step (see `tokens`); the original class computes it wherever a kernel does not. Blocks
stay as they are, and run their own forward passes. Hooks wrap the inputs of modules whose layers share them.

What a pending step computes is known for certain bodies of diffusers' modules. Each is recognised by a hash of its
source: one that is not known is left alone, and one warning says so.
"""

import hashlib
import inspect
import re
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orbitdit.families import FAMILIES, Family
from orbitdit.linear import OrbitLinear, is_offloaded, share_inputs
from orbitdit.ops.rotate_encode.reference import NORM_EPSILONS
from orbitdit.tokens import Modulation, Tokens, TokensTensor

Places = dict[str, list[tuple[nn.Module, str]]]
"""Where modules are, as parents and names in them: more than one where a module is shared. Keys are modules' names."""


def connect(model: nn.Module) -> None:
    """Let the quantized layers of `model` share their inputs, and take pending steps. Idempotent."""
    family = FAMILIES.get(type(model).__name__, Family(()))
    _replace_modules(model, family)
    share_inputs_of(model)
    for name, module in model.named_modules():
        if _BLOCK.sub("", name) in family.modulation_inputs:
            _hook_inputs(module, wrap_modulation)


def disconnect(model: nn.Module) -> None:
    """Undo `connect`."""
    where = places(model)
    for name, module in list(model.named_modules()):
        original = getattr(type(module), "original", None)
        if original is not None:
            _put(where[name], _reborn(original, module))
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in OWN_HOOKS]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if isinstance(module, OrbitLinear):
            module.siblings = None


def share_inputs_of(model: nn.Module) -> None:
    """`connect` without pending steps."""
    family = FAMILIES.get(type(model).__name__, Family(()))
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, OrbitLinear)}
    for names in family.shared:
        for block in {name.removesuffix(part) for part in names for name in layers if f".{name}".endswith(f".{part}")}:
            found = {part: layers[block + part] for part in names if block + part in layers}
            _share(model, block, found, family.source)


def wrap_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook: the tokens that a module is given come as `Tokens`, so that its layers can share what they make of
    them; as tensors, if another library has put a forward pass around the module's own, as caches of diffusers do."""
    wrap = _tensor if is_wrapped(module) else _tokens
    given = [*args[:3], *(kwargs[name] for name in TOKEN_NAMES if name in kwargs)]
    wrapped: list[Any] = []
    for place, value in enumerate(given):
        first = next((i for i in range(place) if given[i] is value), place)
        wrapped.append(wrap(value) if first == place else wrapped[first])  # one value for one tensor
    named = dict(zip([name for name in TOKEN_NAMES if name in kwargs], wrapped[len(args[:3]) :], strict=True))
    return (*wrapped[: len(args[:3])], *args[3:]), {**kwargs, **named}


def wrap_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """A hook: the tokens that a module gives, alone or before other outputs, come as `Tokens`."""
    if isinstance(output, tuple):
        return (_tokens(output[0]), *output[1:])
    return _tokens(output)


def wrap_modulation(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook: AdaLN's input comes as a `Modulation`, and so does what is made of it."""
    if torch.is_grad_enabled() or not args or not isinstance(args[0], Tensor):
        return args, kwargs
    return (Modulation(args[0]), *args[1:]), kwargs


OWN_HOOKS = (wrap_inputs, wrap_output, wrap_modulation)
TOKEN_NAMES = ("hidden_states", "encoder_hidden_states", "norm_hidden_states", "norm_encoder_hidden_states", "x")
"""Parameters of diffusers' modules that are tokens; so are the first three that are passed by position."""


def _tokens(value: Any) -> Any:
    if isinstance(value, TokensTensor):
        return value.tokens
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        return value
    return value if torch.is_grad_enabled() and value.requires_grad else Tokens(value)


def _tensor(value: Any) -> Any:
    tokens = _tokens(value)
    if not isinstance(tokens, Tokens):
        return tokens
    return tokens.tensor() if torch.compiler.is_compiling() else TokensTensor(tokens)


def _share(model: nn.Module, block: str, layers: dict[str, OrbitLinear], source: str | None) -> None:
    """Let `layers`, by their names within the block with the prefix `block`, share their input."""
    parents = {part.rpartition(".")[0] for part in layers}
    if len(parents) > 1:
        origin = _submodule(model, f"{block}{source}") if source else None
        if origin is None:  # nothing of this block gives what all of them take
            return _share(model, block, {part: layer for part, layer in layers.items() if "." in part}, None)
        if wrap_output not in origin._forward_hooks.values():
            origin.register_forward_hook(wrap_output)
    share_inputs(layers.values())
    if any(layer.siblings is not None for layer in layers.values()):
        for parent in parents:
            if parent or len(parents) == 1:
                _hook_inputs(model.get_submodule(f"{block}{parent}".rstrip(".")), wrap_inputs)
    return None


def _hook_inputs(module: nn.Module, hook: Callable[..., Any]) -> None:
    if hook not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(hook, with_kwargs=True)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    return dict(model.named_modules()).get(name)


_BLOCK = re.compile(r"^\w+\.\d+\.")
"""What comes before a name within its block."""


class Known(NamedTuple):
    """A module that can leave its step pending: how, and the hashes of its methods' sources for which that is what they
    compute (none for torch's own)."""

    forward: Callable[..., Any]
    sources: dict[str, tuple[str, ...]]


def _layer_norm(self: Any, x: Any) -> Any:
    def compute() -> Tensor:
        normed: Tensor = self.original.forward(self, x)
        return normed

    if self.elementwise_affine or self.eps != NORM_EPSILONS["layer_norm"] or not _defers(self, x):
        return compute()
    return Tokens(x, compute, "layer_norm")


def _rms_norm(self: Any, x: Any) -> Any:
    def compute() -> Tensor:
        normed: Tensor = self.original.forward(self, x)
        return normed

    weight, bias = self.weight, getattr(self, "bias", None)
    if weight is None or bias is not None or self.eps != NORM_EPSILONS["rms_norm"] or not _defers(self, x):
        return compute()
    if weight.dtype != x.dtype or weight.device != x.device:
        return compute()
    return Tokens(x, compute, "rms_norm", (weight,))


def _gelu(self: Any, x: Any) -> Any:
    def compute() -> Tensor:
        activated: Tensor = self.original.forward(self, x)
        return activated

    if self.approximate != "tanh" or not _defers(self, x):
        return compute()
    return Tokens(x, compute, "gelu")


def _projected_gelu(self: Any, hidden_states: Any) -> Any:
    x = self.proj(hidden_states)

    def compute() -> Tensor:
        activated: Tensor = self.gelu(x)
        return activated

    if self.approximate != "tanh" or not _defers(self, x):
        return compute()
    return Tokens(x, compute, "gelu")


def _gated_feed_forward(self: Any, x: Any) -> Any:
    first, gate = self.w1(x), self.w3(x)

    def compute() -> Tensor:
        gated: Tensor = self._forward_silu_gating(first, gate)
        return gated

    return self.w2(Tokens(first, compute, "silu", (gate,)) if _defers(self, first) else compute())


KNOWN: dict[str, Known] = {
    "torch.nn.modules.normalization.LayerNorm": Known(_layer_norm, {}),
    "torch.nn.modules.activation.GELU": Known(_gelu, {}),
    "diffusers.models.normalization.FP32LayerNorm": Known(_layer_norm, {"forward": ("1f774f77",)}),
    "diffusers.models.normalization.RMSNorm": Known(_rms_norm, {"forward": ("3219c025",)}),
    "diffusers.models.activations.GELU": Known(_projected_gelu, {"forward": ("a27bd4a1",), "gelu": ("ab312125",)}),
    "diffusers.models.transformers.transformer_z_image.FeedForward": Known(
        _gated_feed_forward, {"forward": ("ff303a98",), "_forward_silu_gating": ("d2738b39",)}
    ),
}
"""By the full names of their classes. The hashes are those of the oldest and the newest diffusers that are
supported."""


def source_hash(function: Callable[..., Any]) -> str:
    """Eight hexadecimal digits for the source of a function, its comments and layout aside."""
    text = re.sub(r"#.*", "", inspect.getsource(function))
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:8]


@cache
def _known(cls: type[nn.Module]) -> Known | None:
    name = f"{cls.__module__}.{cls.__qualname__}"
    known = KNOWN.get(name)
    for method, hashes in known.sources.items() if known else ():
        try:
            found = source_hash(getattr(cls, method))
        except (OSError, TypeError):
            found = "no source"
        if found not in hashes:
            warnings.warn(
                f"{name} is not as orbitdit knows it: it runs unfused, which is right and slower", stacklevel=2
            )
            return None
    return known


def is_known(cls: Any) -> bool:
    """Whether the class `cls` is in `KNOWN`, with the body that it has there."""
    return _known(cls) is not None


def _defers(module: nn.Module, x: Any) -> bool:
    """Whether the step of `module` may wait: `x` is a tensor, no gradients or casts are in the way, and no hooks are
    registered but our own: others would see no tensor."""
    if not isinstance(x, Tensor) or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        if hook not in OWN_HOOKS:
            return False
    return not is_offloaded(module)


def _replace_modules(model: nn.Module, family: Family) -> None:
    """Put deferring modules where the family says, and in every feed-forward of diffusers' that has GELU."""
    where = places(model)
    for name, module in list(model.named_modules()):
        inner = _BLOCK.sub("", name)
        everywhere = type(module).__module__ == "diffusers.models.activations"
        if (inner != name and inner in family.pending) or (everywhere and name):
            cls: Any = type(module)
            if not is_offloaded(module) and _known(cls) is not None:
                _put(where[name], _reborn(_deferring(cls), module))


@cache
def _deferring(original: type[nn.Module]) -> type[nn.Module]:
    """A subclass of a known class that can leave its step pending."""
    known = KNOWN[f"{original.__module__}.{original.__qualname__}"]

    def reduce(module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _revive, (original,), module.__dict__

    own = {"forward": known.forward, "original": original, "__reduce_ex__": reduce, "__module__": __name__}
    return type(f"Deferring{original.__name__}", (original,), own)


def _revive(original: Any) -> nn.Module:
    """An empty module to fill, for copies and pickles."""
    cls = _deferring(original)
    return cls.__new__(cls)


def _reborn(cls: type[nn.Module], module: nn.Module) -> nn.Module:
    """The same parameters, buffers and settings as a module of another class; not the forward pass of its own class
    that a hook of accelerate leaves bound in the module when it is removed."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    if not is_wrapped(module):
        twin.__dict__.pop("forward", None)
    return twin


def is_wrapped(module: nn.Module) -> bool:
    """Whether `module` has a forward pass other than that of its class, as hooks of other libraries give it."""
    if "forward" not in module.__dict__:
        return False
    own = module.__dict__["forward"]
    return getattr(own, "__func__", None) is not type(module).forward or own.__self__ is not module


def _put(where: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    for parent, leaf in where:
        setattr(parent, leaf, module)


def places(model: nn.Module) -> Places:
    """Where each module below `model` is. It does not keep them alive."""
    names = {module: name for name, module in model.named_modules()}
    found: Places = {}
    for parent in names:
        for leaf, child in parent._modules.items():
            if child is not None:
                found.setdefault(names[child], []).append((parent, leaf))
    return found
