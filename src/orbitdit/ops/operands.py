"""The tensors of one or more layers, as ops take them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from orbitdit.errors import TensorError


class Packed(NamedTuple):
    """Layers side by side: packed codes (rows, bytes), bf16 scales (rows,) and biases (rows,), or None, of each. Codes
    and scales may have been decoded before: values (rows, dim) on a grid and fp32 scales (rows,)."""

    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    biases: Sequence[Tensor | None]


def packed_of(operands: Sequence[Any]) -> Packed:
    """Codes, scales and biases of layers, which `operands` hold one layer after another."""
    return Packed(operands[::3], operands[1::3], operands[2::3])


def check_devices(x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise TensorError unless all are on one device: a kernel that is given an address of another device would end
    the process's use of this one."""
    for weight in weights:
        if weight.device != x.device:
            raise TensorError(f"the layer's codes are on {weight.device}, its input is on {x.device}: move one of them")
