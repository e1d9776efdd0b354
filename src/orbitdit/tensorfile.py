"""Tensors of safetensors files, read in blocks of rows and never mapped: a mapped file counts as memory of the process,
and ends it where a file turns out shorter than it was."""

from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from orbitdit.checkpoint import check_file
from orbitdit.errors import CheckpointError
from orbitdit.manifest import DTYPES, read_header


class TensorFile:
    """A safetensors file. `tensors` are dtype and shape of each tensor in it.

    Raises CheckpointError for files that `check_file` refuses, and for dtypes that no model has.
    """

    def __init__(self, path: Path):
        check_file(path)
        self.path, self._offsets = path, {}
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, (dtype, shape, first, _) in read_header(path).tensors.items():
            if dtype not in DTYPES:
                raise CheckpointError(f"{path}: {name!r} has dtype {dtype}, which is not supported: convert it to BF16")
            self.tensors[name] = DTYPES[dtype], shape
            self._offsets[name] = first

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop (of the first axis; a number is one row) of the tensor `name`, on the CPU."""
        dtype, shape = self.tensors[name]
        row = prod(shape[1:]) * dtype.itemsize
        data = torch.empty((stop - start) * row, dtype=torch.uint8)
        left = data.numpy().data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._offsets[name] + start * row)
                while left and (read := file.readinto(left)):
                    left = left[read:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}): copy it again") from error
        if left:
            raise CheckpointError(f"{self.path} ends within {name!r}: download or copy it again")
        return data.view(dtype).view(stop - start, *shape[1:])


class Piece(NamedTuple):
    """Rows start..stop of the tensor `name` in `file`, times `scale` (one number, or one a row of the tensor) if there
    is one."""

    file: TensorFile
    name: str
    start: int
    stop: int
    scale: Tensor | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of this piece; scaled ones are fp64, in which the product is exact."""
        begin, end = self.start + start, self.start + stop
        rows = self.file.read(self.name, begin, end)
        if self.scale is None:
            return rows
        scale = self.scale if self.scale.numel() == 1 else self.scale[begin:end]
        return rows.double() * scale.double().view(-1, *[1] * (rows.ndim - 1))


class Source(NamedTuple):
    """A tensor of a model as pieces of stored ones, below each other. `dtype` is that of the stored ones."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """How many rows `read` gives in all: of the first axis, one for a number."""
        return self.shape[0] if self.shape else 1

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop."""
        found, first = [], 0
        for piece in self.pieces:
            last = first + piece.stop - piece.start
            if first < stop and last > start:
                found.append(piece.read(max(start - first, 0), min(stop, last) - first))
            first = last
        return found[0] if len(found) == 1 else torch.cat(found)


def whole(file: TensorFile, name: str, scale: Tensor | None = None) -> Source:
    """The tensor `name` of `file` as it is."""
    dtype, shape = file.tensors[name]
    return Source(shape, dtype, (Piece(file, name, 0, shape[0] if shape else 1, scale),))
