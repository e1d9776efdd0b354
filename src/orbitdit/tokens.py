"""Tensors as values that remember: what is still to be done to them, and what layers have made of them.

A norm in front of quantized layers returns `Tokens`: its input, and the norm as a step that is still to be done. The
block's own code goes on as with a tensor: `*` and `+` with a modulation extend the step. A quantized layer takes the
step into the kernel that encodes its tokens, and leaves the outputs of its siblings (to_k and to_v, for to_q) in the
value itself, where they find them. Whatever else touches the value gets the tensor: the steps are then done by
diffusers' own modules, in the order in which its code asked for them.

So a block runs its own forward pass, whatever its version; code that is not understood is right and merely not fused;
and nothing outlives the local variable of the block that holds the value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_map

from orbitdit.errors import ModelError


class Deferred:
    """What acts as a tensor and is made when it is needed."""

    def tensor(self) -> Tensor:
        """The tensor itself; from here on the value is no more than that."""
        raise TypeError(f"{type(self).__name__} has no tensor")

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _special(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __mul__(self, other: Any) -> Any:
        return self.tensor() * plain(other)

    def __rmul__(self, other: Any) -> Any:
        return plain(other) * self.tensor()

    def __add__(self, other: Any) -> Any:
        return self.tensor() + plain(other)

    def __radd__(self, other: Any) -> Any:
        return plain(other) + self.tensor()

    def __sub__(self, other: Any) -> Any:
        return self.tensor() - plain(other)

    def __rsub__(self, other: Any) -> Any:
        return plain(other) - self.tensor()

    def __truediv__(self, other: Any) -> Any:
        return self.tensor() / plain(other)

    def __matmul__(self, other: Any) -> Any:
        return self.tensor() @ plain(other)

    def __neg__(self) -> Any:
        return -self.tensor()

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    def __len__(self) -> int:
        return len(self.tensor())


def plain(value: Any) -> Any:
    """`value` with every deferred tensor in it made."""
    if isinstance(value, Deferred):
        return value.tensor()
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return [plain(item) for item in value] if isinstance(value, list) else value


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_SUMS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)


def _special(func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func` on made tensors, but for the few functions that can leave a step to do."""
    if func is functional.dropout:
        return _dropout(*args, **kwargs)
    if func is functional.silu and isinstance(args[0], Modulation):
        return Modulation(functional.silu(args[0].tensor()))
    if func is torch.cat:
        return _cat(*args, **kwargs)
    if len(args) == 2 and not kwargs and (func in _PRODUCTS or func in _SUMS):
        # a tensor is on the left, or a compiler reorders
        tokens, other = args if isinstance(args[0], Tokens) else (args[1], args[0])
        if isinstance(tokens, Tokens):
            return tokens.__mul__(other) if func in _PRODUCTS else tokens.__add__(other)
    return func(*(plain(arg) for arg in args), **{name: plain(arg) for name, arg in kwargs.items()})


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return functional.dropout(plain(x), p, training, inplace) if training and p > 0 else x


def _cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    """Channels before those of a pending GELU become an argument of it; tokens of several streams stay tokens."""
    if dim in (-1, tensors[0].ndim - 1):
        *first, last = tensors
        pending = isinstance(last, Tokens) and last.prologue == "gelu" and not last.prologue_args and len(first) == 1
        if pending and isinstance(first[0], Tensor):
            before, gelu = first[0], last
            gelu.check()
            return Tokens(last.source, lambda: torch.cat([before, gelu.tensor()], dim), "gelu", (before,))
        return torch.cat(plain(list(tensors)), dim)
    return Tokens(torch.cat(plain(list(tensors)), dim))


class Modulation(Deferred):
    """A scale, shift or gate, perhaps with 1 to be added: the kernels add it themselves, in fp32."""

    def __init__(self, source: Tensor, plus_one: bool = False):
        self.source, self.plus_one = source, plus_one

    def tensor(self) -> Tensor:
        """The tensor, with 1 added if that is still to do."""
        return 1 + self.source if self.plus_one else self.source

    def chunk(self, chunks: int, dim: int = 0) -> tuple["Modulation", ...]:
        """As of a tensor."""
        return tuple(Modulation(part) for part in self.tensor().chunk(chunks, dim))

    def unsqueeze(self, dim: int) -> "Modulation":
        """As of a tensor."""
        return Modulation(self.source.unsqueeze(dim), self.plus_one)

    def __getitem__(self, index: Any) -> "Modulation":
        return Modulation(self.source[index], self.plus_one)

    def __radd__(self, other: Any) -> Any:
        if isinstance(other, (int, float)) and other == 1 and not self.plus_one:
            return Modulation(self.source, True)
        return super().__radd__(other)


class Tokens(Deferred):
    """Tokens (..., channels): a tensor `source`, the `prologue` that is still to be done to it (see
    `ops.rotate_encode.reference.apply_prologue`; "" for none) with its arguments, and a memo of siblings' outputs.

    `make` gives the tensor as diffusers' own modules compute it; without one it is the source. The arguments of a norm
    come one by one: until they are complete the step is left to `make`. Raises ModelError where the source was written
    to before its step was done (as far as torch counts it: not in inference mode): what it was is gone.
    """

    def __init__(
        self,
        source: Tensor,
        make: Callable[[], Tensor] | None = None,
        prologue: str = "",
        prologue_args: tuple[Any, ...] = (),
        dtype: torch.dtype | None = None,
    ):
        self.source, self.make = source, make
        self.prologue, self.prologue_args = prologue, prologue_args
        self.dtype = source.dtype if dtype is None else dtype
        self.memo: list[Any] = []
        self.seen = version(source)

    def tensor(self) -> Tensor:
        """The tokens as a tensor; whoever has it may write to it, so from here on the step is done."""
        if self.make is not None:
            self.check()
            kept = self.outputs()
            self.source, self.make, self.prologue, self.prologue_args = self.make(), None, "", ()
            self.memo, self.seen = kept, version(self.source)
        return self.source

    def check(self) -> None:
        """Raise ModelError if a step is pending whose source is no longer what it was."""
        if self.make is not None and version(self.source) != self.seen:
            raise ModelError(
                "the input of a norm or activation was written to before a quantized layer used its result: write to a "
                "new tensor instead, or call orbitdit.fusion.disconnect(model)"
            )

    def outputs(self) -> list[Any]:
        """What layers have made of these tokens; nothing where they were written to since."""
        if version(self.source) != self.seen:
            self.memo, self.seen = [], version(self.source)
        return self.memo

    @property
    def shape(self) -> torch.Size:
        """As of a tensor."""
        if self.prologue == "gelu" and self.prologue_args:
            before = self.prologue_args[0].shape[-1]
            return torch.Size((*self.source.shape[:-1], before + self.source.shape[-1]))
        return self.source.shape

    @property
    def ndim(self) -> int:
        """As of a tensor."""
        return self.source.ndim

    @property
    def device(self) -> torch.device:
        """As of a tensor."""
        return self.source.device

    @property
    def is_cuda(self) -> bool:
        """As of a tensor."""
        return self.source.is_cuda

    def size(self, dim: int | None = None) -> Any:
        """As of a tensor."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As of a tensor."""
        return self.source.ndim

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As of a tensor; a change of dtype alone leaves the step to do."""
        if len(args) == 1 and isinstance(args[0], torch.dtype) and not kwargs:
            dtype = args[0]
            if dtype == self.dtype:
                return self
            self.check()
            return Tokens(self.source, lambda: self.tensor().to(dtype), self.prologue, self.prologue_args, dtype)
        return self.tensor().to(*plain(args), **kwargs)

    def type_as(self, other: Any) -> Any:
        """As of a tensor."""
        return self.to(other.dtype)

    def __mul__(self, other: Any) -> Any:
        expected = {"layer_norm": 0, "rms_norm": 1}.get(self.prologue)
        if expected == len(self.prologue_args) and self._modulates(other):
            return self._then(lambda: self.tensor() * plain(other), other)
        return super().__mul__(other)

    def __add__(self, other: Any) -> Any:
        if self.prologue == "layer_norm" and len(self.prologue_args) == 1 and self._modulates(other):
            return self._then(lambda: self.tensor() + plain(other), other)
        return super().__add__(other)

    def __getitem__(self, index: Any) -> "Tokens":
        return Tokens(self.tensor()[index])

    def _then(self, make: Callable[[], Tensor], arg: Any) -> "Tokens":
        self.check()
        dtype = torch.promote_types(self.dtype, arg.source.dtype if isinstance(arg, Modulation) else arg.dtype)
        return Tokens(self.source, make, self.prologue, (*self.prologue_args, arg), dtype)

    def _modulates(self, other: Any) -> bool:
        """Whether `other` has one row for all tokens of a sample, or of all samples."""
        row = other.source if isinstance(other, Modulation) else other
        if not isinstance(row, Tensor) or row.ndim != self.source.ndim or row.shape[-1] != self.source.shape[-1]:
            return False
        return row.shape[0] in (1, self.source.shape[0]) and all(size == 1 for size in row.shape[1:-1])


class TokensTensor(Tensor):
    """`Tokens` for whoever asks whether he has a tensor: of its shape, dtype and device, and made when it is used."""

    tokens: Tokens

    @staticmethod
    def __new__(cls, tokens: Tokens) -> "TokensTensor":
        made: TokensTensor = Tensor._make_wrapper_subclass(
            cls, tokens.shape, dtype=tokens.dtype, device=tokens.device, requires_grad=False
        )
        made.tokens = tokens
        return made

    def __init__(self, tokens: Tokens):
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        args, kwargs = tree_map(lambda a: a.tokens.tensor() if isinstance(a, cls) else a, (args, kwargs or {}))
        return func(*args, **kwargs)


def version(x: Tensor) -> int:
    """How often `x` was written to, where torch counts it: not in inference mode, nor in compiled code."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
