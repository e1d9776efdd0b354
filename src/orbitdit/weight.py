"""The weight of a packed layer as a tensor that is expanded when its values are used."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from orbitdit.errors import ModelError


class Packed(Protocol):
    """What a weight needs of its layer."""

    in_features: int
    out_features: int
    dtype: torch.dtype
    codes: Any

    def dequantize(self) -> Tensor:
        """The weight (out, in) in fp32."""


class PackedWeight(Tensor):
    """The weight (out, in) of a packed layer, in its compute dtype and on its device, or a view of it.

    It takes no memory: each operation on its values expands the codes and gives an ordinary tensor. Raises ModelError
    where something would write to it, ask for its gradient, or take its address.
    """

    layer: Packed
    make: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, layer: Packed, like: Tensor | None = None, make: Callable[[], Tensor] | None = None
    ) -> "PackedWeight":
        """The weight of `layer`, or a view of it that `make` gives and that is laid out as the meta tensor `like`."""
        dtype = layer.dtype
        if like is None:
            like = torch.empty(layer.out_features, layer.in_features, dtype=dtype, device="meta")
        made: PackedWeight = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=layer.codes.device, requires_grad=False
        )
        made.layer, made.make = layer, make or (lambda: layer.dequantize().detach().to(dtype))
        return made

    def __init__(self, *args: Any):
        super().__init__()

    @property
    def data(self) -> Tensor:
        """The weight itself, as it holds no gradient."""
        return self

    @data.setter
    def data(self, value: Tensor) -> None:
        raise _read_only(self)

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"PackedWeight({self.make()!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.make()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.make().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not all(issubclass(each, Tensor) for each in types):  # leave it to what acts as a tensor and is none
            return NotImplemented
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            weight, *rest = args
            asked = [value is not False and value is not None for value in (*rest, *kwargs.values())]
            if func in _WRITES or (func in _GRADIENTS and asked != [False]):
                raise _read_only(weight)
            if func is Tensor.data_ptr:
                raise ModelError(f"the weight of {weight.layer} is packed and has no address: take that of a clone()")
            args = (weight.make() if func in _OF_MEMORY else weight, *rest)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        for place, declared in enumerate(func._schema.arguments):  # type: ignore[attr-defined]
            if declared.alias_info is not None and declared.alias_info.is_write:
                for written in tree_leaves(args[place] if place < len(args) else named.get(declared.name)):
                    if isinstance(written, cls):
                        raise _read_only(written)
        if func.is_view and isinstance(args[0], cls):  # type: ignore[attr-defined]
            in_parts = func.decompose(*args, **named)  # type: ignore[attr-defined] # what may be a view, or a copy
            if in_parts is not NotImplemented:
                return in_parts
            return args[0]._view(lambda base: func(base, *args[1:], **named))
        args, named = tree_map(lambda a: a.make() if isinstance(a, cls) else a, (args, named))
        return func(*args, **named)

    def _view(self, view: Callable[[Tensor], Any]) -> Any:
        """The view of this weight that `view` takes of an ordinary tensor, or several, which are expanded together."""
        found = view(torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta"))
        if isinstance(found, Tensor):
            return PackedWeight(self.layer, found, lambda: view(self.make()))
        parts = view(self.make())
        return [PackedWeight(self.layer, like, lambda part=part: part) for like, part in zip(found, parts, strict=True)]


_WRITES: set[Any] = {Tensor.__setitem__, Tensor.apply_, Tensor.map_, Tensor.map2_}
_PROPERTIES: Any = Tensor
_GRADIENTS: set[Any] = {Tensor.requires_grad_, _PROPERTIES.requires_grad.__set__, _PROPERTIES.grad.__set__}
_OF_MEMORY = {
    Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.untyped_storage, Tensor.storage,
    Tensor._typed_storage, Tensor.share_memory_,
}  # fmt: skip
"""Functions that torch does not dispatch: those that write, those that ask for a gradient if they are told so, and
those that read a tensor's memory, which are given an ordinary one."""


def _read_only(weight: PackedWeight) -> ModelError:
    return ModelError(
        f"the weight of {weight.layer} is packed and cannot be written to: use orbitdit.dequantize_ first, "
        "change the weights, and quantize again"
    )
