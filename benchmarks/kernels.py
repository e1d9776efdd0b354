"""The two kernels that every layer consists of beside its GEMM, against a copy that moves the same bytes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import INPUTS, Candidate, Case, error_bound, relative_error
from orbitdit.codebook import GRID_DTYPES, codebook_on, look_up
from orbitdit.kernels import E4M3, GRIDS
from orbitdit.kernels.reference import apply_before
from orbitdit.kernels.rotate_encode import rotate_encode
from orbitdit.packing import unpack
from orbitdit.quantize import quantize_weight
from orbitdit.rotation import rotation

ENCODE = (  # tokens, width: FLUX, Z-Image, Wan 1.3B and 14B, CogVideoX
    (4608, 3072),
    (4608, 12288),
    (4608, 15360),
    (4096, 3840),
    (4096, 10240),
    (32760, 1536),
    (32760, 5120),
    (32760, 8960),
    (32760, 13824),
    (17776, 1920),
    (17776, 7680),
)
DECODE = ((3072, 3072), (12288, 3072), (3072, 12288), (3072, 15360), (13824, 5120))
"""Rows and width of the packed weight."""
DECODE_BITS = (2, 3, 4, 6)
ENCODE_BITS = 4
SAMPLE = 256
"""Rows that the gate compares."""
PAGE = 4096
DECODE_BOUND = 0.08
"""How far, relatively, the points of a number grid may be from the centroids that they stand for."""


PROVIDERS = ("copy", *GRID_DTYPES)


def values_of(values: Tensor, scales: Tensor, grid: str) -> Tensor:
    """What grid bytes and their row scales stand for, in fp32."""
    return values.view(GRID_DTYPES[grid]).float() * scales.float().reshape(-1, 1)


def copy_of(size: int, device: str) -> Callable[[], Candidate]:
    """A device copy that moves `size` bytes, read plus write: whole pages, for one that ends elsewhere is slow."""

    def make() -> Candidate:
        pages = -(-size // (2 * PAGE))
        sources = [torch.randint(256, (pages * PAGE,), dtype=torch.uint8, device=device) for _ in range(INPUTS)]
        target = torch.empty_like(sources[0])
        return Candidate(lambda i: target.copy_(sources[i]), lambda: 0.0, 0.0, {"bytes": size})

    return make


@dataclass(frozen=True)
class Encode:
    """`rotate_encode` of bf16 tokens: reads two bytes a coordinate and writes one."""

    tokens: int
    width: int
    device: str

    @property
    def name(self) -> str:
        return f"encode {self.tokens}x{self.width}"

    def open(self) -> Mapping[str, Callable[[], Candidate]]:
        shape = (self.tokens, self.width)
        inputs = [torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(INPUTS)]
        makers = {grid: lambda grid=grid: self.candidate(inputs, grid) for grid in GRID_DTYPES}
        return {"copy": copy_of(self.bytes, self.device), **makers}

    @property
    def bytes(self) -> int:
        return 3 * self.tokens * self.width

    def candidate(self, inputs: list[Tensor], grid: str) -> Candidate:
        def run(i: int) -> tuple[Tensor, Tensor]:
            return torch.ops.orbitdit.rotate_encode(inputs[i], ENCODE_BITS, 0, GRIDS[grid])

        def error() -> float:
            values, scales = run(0)
            reference = rotation(self.width, 0).apply(inputs[0][:SAMPLE].float())
            return relative_error(values_of(values[:SAMPLE], scales[:SAMPLE], grid), reference)

        return Candidate(run, error, error_bound("bf16", str(ENCODE_BITS), 1.2), {"bytes": self.bytes})


BEFORE = (("gelu", 4608, 15360, 3072), ("gelu", 4608, 12288, 0), ("layer_norm", 4608, 3072, 0))
"""What precedes the encoding in FLUX's blocks: tokens, width, and the channels before the activation."""
APART, TOGETHER = "apart", "in the encoding"


@dataclass(frozen=True)
class Before:
    """An encoding with what precedes it: in the kernel itself, or compiled and then encoded."""

    before: str
    tokens: int
    width: int
    first: int
    device: str

    @property
    def name(self) -> str:
        return f"{self.before.replace('_', ' ')} and encode {self.tokens}x{self.width}"

    def open(self) -> Mapping[str, Callable[[], Candidate]]:
        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

        inputs = [noise(self.tokens, self.width - self.first) for _ in range(INPUTS)]
        gelu = [noise(self.tokens, self.first)] if self.first else []
        extras = gelu if self.before == "gelu" else [noise(1, self.width) / 8, noise(1, self.width)]
        made = torch.compile(apply_before, fullgraph=True, dynamic=False)

        def apart(i: int) -> tuple[Tensor, Tensor]:
            return torch.ops.orbitdit.rotate_encode(made(inputs[i], self.before, extras), ENCODE_BITS, 0, E4M3)

        def together(i: int) -> tuple[Tensor, Tensor]:
            return rotate_encode(inputs[i], ENCODE_BITS, 0, "e4m3", before=self.before, extras=extras)

        def candidate(run: Callable[[int], tuple[Tensor, Tensor]]) -> Candidate:
            def error() -> float:
                values, scales = run(0)
                tokens = apply_before(inputs[0], self.before, extras)[:SAMPLE]
                reference = rotation(self.width, 0).apply(tokens.float())
                return relative_error(values_of(values[:SAMPLE], scales[:SAMPLE], "e4m3"), reference)

            bound = error_bound("bf16", str(ENCODE_BITS), 1.2)
            return Candidate(run, error, bound, {"bytes": 3 * self.tokens * self.width})

        copy = copy_of(3 * self.tokens * self.width, self.device)
        return {"copy": copy, APART: lambda: candidate(apart), TOGETHER: lambda: candidate(together)}


@dataclass(frozen=True)
class Decode:
    """`decode` of packed codes: reads `bits` a coordinate and writes one byte."""

    rows: int
    width: int
    bits: int
    device: str

    @property
    def name(self) -> str:
        return f"decode {self.bits}-bit {self.rows}x{self.width}"

    def open(self) -> Mapping[str, Callable[[], Candidate]]:
        weight = torch.randn(self.rows, self.width, device=self.device, dtype=torch.bfloat16)
        codes, scales = quantize_weight(weight, self.bits)
        size = codes.nbytes + self.rows * self.width
        copies = [codes.clone() for _ in range(INPUTS)]
        makers = {grid: lambda grid=grid: self.candidate(copies, scales, grid, size) for grid in GRID_DTYPES}
        return {"copy": copy_of(size, self.device), **makers}

    def candidate(self, codes: list[Tensor], scales: Tensor, grid: str, size: int) -> Candidate:
        def run(i: int) -> tuple[Tensor, Tensor]:
            return torch.ops.orbitdit.decode(codes[i], scales, self.bits, self.width, GRIDS[grid])

        def error() -> float:
            values, row_scales = run(0)
            centroids = codebook_on(self.width, self.bits, values.device, torch.float32).centroids
            reference = look_up(unpack(codes[0][:SAMPLE], self.bits, self.width), centroids)
            reference = reference * scales[:SAMPLE].float()[:, None]
            return relative_error(values_of(values[:SAMPLE], row_scales[:SAMPLE], grid), reference)

        return Candidate(run, error, DECODE_BOUND, {"bytes": size})


def cases(device: str) -> list[Case]:
    encodes = [Encode(tokens, width, device) for tokens, width in ENCODE]
    decodes = [Decode(rows, width, bits, device) for rows, width in DECODE for bits in DECODE_BITS]
    both = [Before(*sizes, device) for sizes in BEFORE] if device == "cuda" else []
    compared = [Case(made.name, PROVIDERS, made.open) for made in (*encodes, *decodes)]
    return [*compared, *(Case(made.name, ("copy", APART, TOGETHER), made.open) for made in both)]
