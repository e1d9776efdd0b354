"""The two kernels that every layer consists of beside its GEMM, against a copy that moves the same bytes; and the
search for trellis codes, which quantizes a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.measure import DISTORTION, INPUTS, Candidate, Case, error_bound, relative_error
from orbitdit.codebooks import indices, points
from orbitdit.codebooks.lloyd_max import look_up
from orbitdit.config import TRELLIS_STATES
from orbitdit.grids import E4M3
from orbitdit.ops import CUDA_GRIDS, ops
from orbitdit.ops.rotate_encode.cuda import rotate_encode
from orbitdit.ops.rotate_encode.means import GROUP_SIZE
from orbitdit.ops.rotate_encode.reference import apply_prologue
from orbitdit.packing import packed_width, unpack
from orbitdit.quantize import quantize_weight, search
from orbitdit.rotation import rotation
from orbitdit.spec import Encoding, LayerSpec, Projection, TokenCode, WeightCode

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
TRELLIS_DECODE = ((3072, 3072), (12288, 3072), (3072, 15360))
TRELLISES = ((2, 8), (2, 10), (2, 12), (3, 12), (4, 12))
"""Bits, and log2 of the number of states."""
VITERBI = ((3072, 3072), (3072, 15360))
VITERBI_ON_CPU = ((64, 3072),)
VITERBI_BITS = (2, 3, 4)
ENCODE_BITS = 4
SAMPLE = 256
"""Rows that the gate compares."""
PAGE = 4096
DECODE_BOUND = 0.08
"""How far, relatively, the points of a number grid may be from the centroids that they stand for."""


PROVIDERS = ("copy", *CUDA_GRIDS)
MEANS = ", centred"
"""What is added to the name of an encoding whose tokens are sums of two codes."""
ENCODERS = (*PROVIDERS, *(grid + MEANS for grid in CUDA_GRIDS))


def weight_code(bits: int, log2_states: int | None = None) -> WeightCode:
    """Scalar codes, or those of a trellis."""
    return WeightCode("scalar" if log2_states is None else "trellis", bits, "norm", log2_states)


def layer_of(width: int, rows: int, code: WeightCode, group_size: int | None = None) -> LayerSpec:
    """A layer whose tokens have codes of `ENCODE_BITS`."""
    return LayerSpec(width, rows, code, TokenCode(ENCODE_BITS, group_size))


def values_of(values: Tensor, scales: Tensor) -> Tensor:
    """What values on a grid and their row scales stand for, in fp32."""
    return values.float() * scales[:, None]


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
        makers = {
            grid + (MEANS if size else ""): lambda grid=grid, size=size: self.candidate(inputs, grid, size)
            for size in (None, GROUP_SIZE)
            for grid in CUDA_GRIDS
        }
        return {"copy": copy_of(self.bytes, self.device), **makers}

    @property
    def bytes(self) -> int:
        return 3 * self.tokens * self.width

    def candidate(self, inputs: list[Tensor], grid: str, group_size: int | None) -> Candidate:
        key = Projection.key_of((layer_of(self.width, 16, weight_code(ENCODE_BITS), group_size).key,), grid)

        def run(i: int) -> tuple[Tensor, Tensor]:
            return ops.rotate_encode(inputs[i], key)

        def error() -> float:
            values, scales = run(0)
            reference = rotation(self.width, 0).apply(inputs[0][:SAMPLE].float())
            return relative_error(values_of(values[:SAMPLE], scales[:SAMPLE]), reference)

        return Candidate(run, error, error_bound("bf16", str(ENCODE_BITS), 1.2), {"bytes": self.bytes})


PROLOGUES = (
    ("gelu", 4608, 15360, 3072),
    ("gelu", 4608, 12288, 0),
    ("layer_norm", 4608, 3072, 0),
    ("silu", 4096, 10240, 0),
    ("rms_norm", 4096, 3840, 0),
    ("layer_norm", 32760, 5120, 0),
)
"""What precedes the encoding in the blocks of FLUX, Z-Image and Wan: tokens, width, channels before the activation."""
APART, TOGETHER = "apart", "in the encoding"
PROLOGUE_PROVIDERS = ("copy", APART, TOGETHER, TOGETHER + MEANS)


@dataclass(frozen=True)
class Prologue:
    """An encoding with what precedes it: in the kernel itself, or compiled and then encoded."""

    prologue: str
    tokens: int
    width: int
    first: int
    device: str

    @property
    def name(self) -> str:
        return f"{self.prologue.replace('_', ' ')} and encode {self.tokens}x{self.width}"

    def drawn(self) -> tuple[Tensor, list[Tensor]]:
        """Tokens and the arguments of `apply_prologue`."""

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device, dtype=torch.bfloat16)

        if self.prologue == "silu":
            x, gate = noise(self.tokens, 2 * self.width).chunk(2, dim=1)  # of one product
            return x, [gate]
        x = noise(self.tokens, self.width - self.first)
        if self.prologue == "gelu":
            return x, [noise(self.tokens, self.first)] if self.first else []
        scale, other = noise(1, self.width) / 8, noise(1, self.width)
        return x, [scale, other] if self.prologue == "layer_norm" else [other, scale]

    def open(self) -> Mapping[str, Callable[[], Candidate]]:
        inputs = [self.drawn() for _ in range(INPUTS)]
        size = (5 if self.prologue == "silu" else 3) * self.tokens * self.width  # a gate is read too
        made = torch.compile(apply_prologue, fullgraph=True, dynamic=False)
        encoding = Encoding(self.width, ENCODE_BITS, E4M3.name)

        def apart(i: int) -> tuple[Tensor, Tensor]:
            x, args = inputs[i]
            return rotate_encode(made(x, self.prologue, args), encoding)

        def together(i: int, encoding: Encoding = encoding) -> tuple[Tensor, Tensor]:
            x, args = inputs[i]
            return rotate_encode(x, encoding, self.prologue, args)

        def with_means(i: int) -> tuple[Tensor, Tensor]:
            return together(i, replace(encoding, group_size=GROUP_SIZE))

        def candidate(run: Callable[[int], tuple[Tensor, Tensor]]) -> Candidate:
            def error() -> float:
                values, scales = run(0)
                x, args = inputs[0]
                tokens = apply_prologue(x, self.prologue, args)[:SAMPLE]
                reference = rotation(self.width, 0).apply(tokens.float())
                return relative_error(values_of(values[:SAMPLE], scales[:SAMPLE]), reference)

            bound = error_bound("bf16", str(ENCODE_BITS), 1.2)
            return Candidate(run, error, bound, {"bytes": size})

        runs = (apart, together, with_means)
        made_of = {name: lambda run=run: candidate(run) for name, run in zip(PROLOGUE_PROVIDERS[1:], runs, strict=True)}
        return {"copy": copy_of(size, self.device), **made_of}


@dataclass(frozen=True)
class Decode:
    """`decode` of packed codes: reads `bits` a coordinate and writes one byte."""

    rows: int
    width: int
    bits: int
    device: str
    log2_states: int | None = None

    @property
    def name(self) -> str:
        codes = f"{self.bits}-bit" if self.log2_states is None else f"{self.bits}-bit 2^{self.log2_states}-state"
        return f"decode {codes} {self.rows}x{self.width}"

    @property
    def spec(self) -> LayerSpec:
        return layer_of(self.width, self.rows, weight_code(self.bits, self.log2_states))

    def open(self) -> Mapping[str, Callable[[], Candidate]]:
        if self.log2_states is None:
            weight = torch.randn(self.rows, self.width, device=self.device, dtype=torch.bfloat16)
            codes, scales = quantize_weight(weight, self.spec)
        else:  # any bits are a trellis' codes
            shape = (self.rows, packed_width(self.width, self.bits))
            codes = torch.randint(256, shape, device=self.device, dtype=torch.uint8)
            scales = torch.rand(self.rows, device=self.device).bfloat16()
        size = codes.nbytes + self.rows * self.width
        copies = [codes.clone() for _ in range(INPUTS)]
        makers = {grid: lambda grid=grid: self.candidate(copies, scales, grid, size) for grid in CUDA_GRIDS}
        return {"copy": copy_of(size, self.device), **makers}

    def candidate(self, codes: list[Tensor], scales: Tensor, grid: str, size: int) -> Candidate:
        key = Projection.key_of((self.spec.key,), grid)

        def run(i: int) -> tuple[Tensor, Tensor]:
            return ops.decode(codes[i], scales, key)

        def error() -> float:
            values, row_scales = run(0)
            reference = self.centroids(unpack(codes[0][:SAMPLE], self.bits, self.width))
            reference = reference * scales[:SAMPLE].float()[:, None]
            return relative_error(values_of(values[:SAMPLE], row_scales[:SAMPLE]), reference)

        return Candidate(run, error, DECODE_BOUND, {"bytes": size})

    def centroids(self, codes: Tensor) -> Tensor:
        """What codes stand for in a row of norm 1, in fp32."""
        code = self.spec.weight
        table, step = points(code, self.width, codes.device, torch.float32)
        return look_up(indices(codes, code), table) * step


@dataclass(frozen=True)
class Viterbi:
    """The search for trellis codes of least error: three operations a weight and state, none of them fused."""

    rows: int
    width: int
    bits: int
    log2_states: int
    device: str

    @property
    def name(self) -> str:
        return f"viterbi {self.bits}-bit 2^{self.log2_states}-state {self.rows}x{self.width}"

    def open(self) -> Mapping[str, Callable[[], Candidate]]:
        return {"viterbi": self.candidate}

    def candidate(self) -> Candidate:
        inputs = [torch.randn(self.rows, self.width, device=self.device) for _ in range(INPUTS)]
        code = weight_code(self.bits, self.log2_states)
        table, _ = points(code, self.width, torch.device(self.device), torch.float32)

        def run(i: int) -> Tensor:
            return search(inputs[i], code, self.width)

        def error() -> float:
            found = look_up(indices(run(0)[:SAMPLE], code), table)
            return relative_error(found, inputs[0][:SAMPLE])

        weights = self.rows * self.width
        facts = {"weights": weights, "flops": 3 * weights << self.log2_states, "peak": "fp32"}
        return Candidate(run, error, DISTORTION[str(self.bits)] ** 0.5, facts)  # less than scalar codes have


def cases(device: str) -> list[Case]:
    encodes = [Encode(tokens, width, device) for tokens, width in ENCODE]
    decodes = [Decode(rows, width, bits, device) for rows, width in DECODE for bits in DECODE_BITS]
    decodes += [Decode(*shape, bits, device, states) for shape in TRELLIS_DECODE for bits, states in TRELLISES]
    both = [Prologue(*sizes, device) for sizes in PROLOGUES] if device == "cuda" else []
    shapes = VITERBI if device == "cuda" else VITERBI_ON_CPU
    searches = [
        Viterbi(*shape, bits, states, device) for shape in shapes for bits in VITERBI_BITS for states in TRELLIS_STATES
    ]
    compared = [Case(made.name, ENCODERS, made.open) for made in encodes]
    compared += [Case(made.name, PROVIDERS, made.open) for made in decodes]
    compared += [Case(made.name, PROLOGUE_PROVIDERS, made.open) for made in both]
    return [*compared, *(Case(made.name, ("viterbi",), made.open) for made in searches)]
