"""What a block of each kernel takes of a processor, by architecture: `python -m benchmarks.resources`.

NVRTC compiles every kernel that the package launches at the widths of the models, which needs no GPU, and its log says
how many registers a thread has, how many bytes are spilled, and how much shared memory is static. With the shape of the
launch this tells whether a block fits and how many of them run at a time. Results are JSON lines, one a launch, and
docs/kernels.md is made from them. All take 25 minutes of one core. --only compiles some kernels again and keeps the
lines of the others; --check writes nothing and says whether the page is up to date.
"""

import argparse
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.kernels import ENCODE
from benchmarks.report import table
from orbitdit.config import TRELLIS_BITS, TRELLIS_STATES
from orbitdit.ops import nvrtc
from orbitdit.ops.decode import cuda as decode
from orbitdit.ops.int4_linear import cuda as int4_linear
from orbitdit.ops.linear import matmul
from orbitdit.ops.rotate_encode import cuda as rotate_encode
from orbitdit.ops.rotate_encode.means import MEAN_BITS
from orbitdit.ops.viterbi import cuda as viterbi

ROOT = Path(__file__).parent.parent
LINES, PAGE = ROOT / "benchmarks/results/resources/kernels.jsonl", ROOT / "docs/kernels.md"
RERUN = "run python -m benchmarks.resources and commit what it writes"

WIDTHS = sorted({width for _, width in ENCODE})
"""Inputs of the quantized layers of FLUX, Z-Image, Wan and CogVideoX."""
LARGEST = (20480, rotate_encode.MAX_DIM)
"""The largest width with a Hadamard matrix of 4096, and the largest width."""
MODULATION_WIDTHS = (256, 512, 3072, int4_linear.CHUNKS * int4_linear.CHUNK)
"""Inputs of INT4 layers: Z-Image, CogVideoX and FLUX have the first three; the last are the most."""
FUSED = {
    1536: ("layer_norm", 0),
    3072: ("layer_norm", 0),
    3840: ("rms_norm", 0),
    5120: ("layer_norm", 0),
    7680: ("gelu", 0),
    8960: ("gelu", 0),
    10240: ("silu", 0),
    12288: ("gelu", 0),
    13824: ("gelu", 0),
    15360: ("gelu", 3072),
}
"""By width: what comes before an encoding in the models' blocks, and the channels beside those of the GELU."""
REGISTERS, WARP_UNIT, PARTS = 1 << 16, 256, 4
"""Registers of a processor on all of the architectures. A warp gets a multiple of WARP_UNIT, all of them from one of
the processor's PARTS."""


class Architecture(NamedTuple):
    """A compute capability, and what a processor has room for: threads, blocks, bytes of shared memory. A block has one
    KiB of that less, which the system takes for each."""

    name: str
    threads: int
    blocks: int
    shared: int

    @property
    def block_shared(self) -> int:
        """Bytes of shared memory that a block may have."""
        return self.shared - 1024

    @property
    def bulk_copies(self) -> bool:
        return int(self.name.removeprefix("sm_")) >= 90

    @property
    def fp8(self) -> bool:
        """Whether it has e4m3, on which sums of two codes are rounded; else int8."""
        return int(self.name.removeprefix("sm_")) >= 89

    def blocks_at_a_time(self, registers: int, threads: int, shared: int) -> int:
        """Blocks that a processor runs at a time; 0 if not even one fits."""
        if registers > 255 or shared > self.block_shared:
            return 0
        warps = -(-threads // 32)
        of_warp = -(-registers * 32 // WARP_UNIT) * WARP_UNIT
        by_registers = REGISTERS // PARTS // of_warp * PARTS // warps
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(by_registers, by_shared, self.threads // (warps * 32), self.blocks)


ARCHITECTURES = (
    Architecture("sm_80", 2048, 32, 164 << 10),
    Architecture("sm_86", 1536, 16, 100 << 10),
    Architecture("sm_89", 1536, 24, 100 << 10),
    Architecture("sm_90", 2048, 32, 228 << 10),
    Architecture("sm_100", 2048, 32, 228 << 10),
    Architecture("sm_120", 1536, 24, 100 << 10),
)


class Launch(NamedTuple):
    """A kernel as the package launches it: which one, its row on the page, what the page does not tell apart, and the
    compile-time constants, threads and dynamic shared memory of a block."""

    kernel: str
    case: str
    variant: str
    constants: dict[str, int]
    threads: int
    shared: int

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.case, self.variant


def launches(arch: Architecture) -> list[Launch]:
    """All that are launched on this architecture."""
    return [*_encoding(arch), *_decoding(), *_viterbi(), *_int4(arch), *_scale()]


SOURCES = {
    name: f"{folder}/{name}.cu"
    for name, folder in {
        "rotate_encode": "rotate_encode",
        "decode": "decode",
        "viterbi": "viterbi",
        "int4_linear": "int4_linear",
        "scale": "linear",
    }.items()
}
"""The files of the kernels, below `orbitdit/ops`."""
TYPES = {False: "bf16", True: "fp16"}


AVERAGE, CENTRED = "means", "centred"


class Encoding(NamedTuple):
    """A variant of `rotate_encode` but for the dtype of tokens and the grid: width, what comes before and how many
    channels beside it, bits, and its part in centring ("" for none)."""

    dim: int
    before: str
    first: int
    bits: int
    part: str = ""

    @property
    def case(self) -> str:
        beside = f"beside {self.first}" if self.first else ""
        bits = "6 bits" if self.bits > 4 and not self.part else "" if self.part == AVERAGE else "2 to 4 bits"
        return ", ".join(filter(None, (f"{self.dim} inputs", self.before.replace("_", " "), beside, self.part, bits)))


def _encodings() -> tuple[list[Encoding], list[Encoding]]:
    """Those in the models, and those of the other combinations of widths and what comes before."""
    befores = [(before, 0) for before in rotate_encode.SIGNATURES]
    models, others = [], []
    for dim in (*WIDTHS, *LARGEST):
        used = [("", 0), *([FUSED[dim]] if dim in FUSED else [])]
        for bits, part in ((4, ""), (6, ""), (MEAN_BITS, AVERAGE), (4, CENTRED)):
            own = [Encoding(dim, *kind, bits, part) for kind in used]
            rest = [] if part else [Encoding(dim, *kind, bits) for kind in befores if kind not in used]
            if dim in LARGEST:
                others += own + rest
            else:
                models += own
                others += rest
    return models, others


def _encoding(arch: Architecture) -> Iterator[Launch]:
    for encoding, half in product(chain(*_encodings()), TYPES):
        dim, before, first, bits, part = encoding
        tile = rotate_encode.tile_of(dim, before, part == AVERAGE)
        grid = rotate_encode.CENTRED[1 if arch.fp8 else 2] if part == CENTRED else ""
        kind = rotate_encode.Kind(half, before, first, part == AVERAGE, grid)
        constants = rotate_encode.compile_options(dim, bits, tile, kind)
        shape = 32 * tile.warps, rotate_encode.shared_bytes(dim, tile, part == AVERAGE)
        yield Launch("rotate_encode", encoding.case, TYPES[half], constants, *shape)


def _decoding() -> Iterator[Launch]:
    codes = [(bits, 0) for bits in (2, 3, 4, 6)] + list(product(TRELLIS_BITS, TRELLIS_STATES))
    for (bits, states), members in product(codes, range(1, decode.MEMBERS + 1)):
        for bias in (False, True)[: 1 if members == 1 else 2]:  # one weight's bias is taken as it is
            constants = decode.compile_options(bits, states or bits, members, bias)
            variant = f"{members} weights{' and biases' if bias else ''}"
            yield Launch("decode", _code(bits, states), variant, constants, constants["THREADS"], 0)


def _viterbi() -> Iterator[Launch]:
    for bits, states in product(TRELLIS_BITS, TRELLIS_STATES):
        constants = viterbi.compile_options(bits, states)
        yield Launch("viterbi", _code(bits, states), "fp32", constants, constants["THREADS"], 0)


def _code(bits: int, states: int) -> str:
    return f"{bits} bits, {f'2^{states} states' if states else 'scalar'}"


def _int4(arch: Architecture) -> Iterator[Launch]:
    for dim, bulk in product(MODULATION_WIDTHS, (False, True)):
        shape = int4_linear.shape_for(dim, bulk and arch.bulk_copies, arch.block_shared)
        if shape is None or shape.bulk != bulk:
            continue
        for half in TYPES:
            constants = int4_linear.compile_options(dim, half, shape)
            variant = f"{TYPES[half]}, copied {'in bulk' if bulk else 'by threads'}"
            yield Launch("int4_linear", f"{dim} inputs", variant, constants, shape.threads, shape.shared_bytes(dim))


def _scale() -> Iterator[Launch]:
    halves = torch.bfloat16, torch.float16
    for sums, output, bias in product((torch.int32, torch.float32), halves, (None, *halves)):
        constants = matmul.compile_options(sums, output, bias)
        case, to, added = (str(dtype).removeprefix("torch.") for dtype in (sums, output, bias))
        yield Launch("scale", f"sums in {case}", f"to {to}, bias {added}", constants, constants["THREADS"], 0)


def resources(launch: Launch, arch: Architecture) -> dict[str, Any]:
    """What the compiler's log says of a launch, and how many of its blocks run at a time.

    registers of a thread, spills (bytes stored, bytes loaded) of a thread, shared (bytes of a block, static and
    dynamic), blocks, and what the compiler warns of, if it does. Raises RuntimeError if the kernel does not compile.
    """
    constants = tuple(launch.constants.items())
    _, log = nvrtc.compile_with_log(SOURCES[launch.kernel], constants, arch.name, "--ptxas-options=-v")
    (registers,) = map(int, re.findall(r"Used (\d+) registers", log))
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    shared = launch.shared + sum(map(int, re.findall(r"(\d+) bytes smem", log)))
    found = {
        "registers": registers,
        "spills": [sum(map(int, column)) for column in zip(*spilled, strict=True)],
        "shared": shared,
        "blocks": arch.blocks_at_a_time(registers, launch.threads, shared),
    }
    warnings = re.findall(r"warning\s*:\s*(.*\S)", log)
    return found | ({"warnings": warnings} if warnings else {})


Line = dict[str, Any]


def compile_all(kernels: Sequence[str]) -> list[Line]:
    """A line for each launch of the `kernels`, with what it takes on every architecture that it is launched on."""
    chosen = [(arch, launch) for arch in ARCHITECTURES for launch in launches(arch) if launch.kernel in kernels]
    lines: dict[tuple, Line] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compiler runs beside Python
        for (arch, launch), found in zip(chosen, pool.map(lambda pair: resources(*pair[::-1]), chosen), strict=True):
            if launch.key not in lines:
                named = {"kernel": launch.kernel, "case": launch.case, "variant": launch.variant}
                lines[launch.key] = {**named, "threads": launch.threads, "nvrtc": nvrtc.compiler_version()}
            lines[launch.key][arch.name] = found
            print(f"\r{arch.name}, {len(lines)} launches", end="", flush=True)
    return list(lines.values())


def read() -> dict[tuple[str, str, str], Line]:
    """The committed lines by kernel, case and variant."""
    lines = map(json.loads, LINES.read_text().splitlines())
    return {(line["kernel"], line["case"], line["variant"]): line for line in lines}


KERNELS = {
    "rotate_encode": "tokens to codes. Variants: bf16 and fp16 tokens",
    "decode": "packed weights to grid values. Variants: up to four weights at a time, with and without biases",
    "viterbi": "rows of a weight to trellis codes, when a model is quantized",
    "int4_linear": "modulation. Variants: bf16 and fp16; copied by threads or, from sm_90 on, in bulk",
    "scale": "what follows a product that has no epilogue. Variants: the dtypes of outputs and biases",
}
IN_MODELS, ELSEWHERE = "rotate_encode in the models", "rotate_encode elsewhere"

HEAD = """
Generated by `python -m benchmarks.resources` from its [lines](../{lines}); not edited by hand. Every kernel that the
package launches at the widths of FLUX, Z-Image, Wan and CogVideoX is compiled for {archs} by NVRTC {nvrtc}, which needs
no GPU. Tiles were chosen on sm_90, where the kernels are measured; nothing has been run on the others.

A cell says how many registers a thread has, how many blocks a processor (SM) runs at a time, and how many bytes a
thread spills, if it does. Of the variants that share a row a cell has the most registers, the fewest blocks and the
most spilled bytes. Shared memory is that of a block, static and dynamic; a block may have {limits}. Blocks that run at
a time are computed from the limits of the architecture: registers, shared memory, threads and blocks of a processor.

Every kernel compiles for every architecture, and a block of it fits. Where shared memory is small, on sm_86, sm_89 and
sm_120, it lets fewer blocks of the wide encodings run than their registers would.

No kernel has instructions for e4m3, which do not compile for sm_80 and sm_86: values on a number grid are bytes that
are looked up. The grids differ in the product that follows alone, and devices below 8.9 multiply int8.
"""
NORMS = """The largest widths, and what no model has before an encoding of that width. A norm keeps its token in
registers, of which there are too few at widths that have no tile for norms."""
OUT_OF_RANGE = """A launch bound that asks for more blocks than the processor has is ignored; 16 blocks of 64 threads
with 64 registers then fill the register file of sm_86."""


def page(lines: Sequence[Line]) -> str:
    """docs/kernels.md; a function of the lines alone."""
    names = [arch.name for arch in ARCHITECTURES]
    limits = ", ".join(f"{arch.block_shared >> 10} KiB on {arch.name}" for arch in ARCHITECTURES)
    compilers = " and ".join(sorted({line["nvrtc"] for line in lines}))
    archs = f"{', '.join(names[:-1])} and {names[-1]}"
    head = HEAD.format(lines=LINES.relative_to(ROOT), archs=archs, nvrtc=compilers, limits=limits)
    sections = _sections(lines)
    rows = [[title, f"{len(own)}", *_row(own)[1:]] for title, (_, own) in sections.items()]
    parts = ["# What the kernels take", *map(_filled, head.strip().split("\n\n"))]
    parts += ["## In short", table(["", "compiled", "shared, bytes", *names], rows)]
    for title, (text, own) in sections.items():
        cases: dict[str, list[Line]] = {}
        for line in own:
            cases.setdefault(line["case"], []).append(line)
        rows = [[case, *_row(of_case)] for case, of_case in cases.items()]
        parts += [f"## {title}", _filled(text), table(["", "threads", "shared, bytes", *names], rows)]
    return "\n\n".join([*parts, *_warnings(lines)]) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def _sections(lines: Sequence[Line]) -> dict[str, tuple[str, list[Line]]]:
    """What is said of each section, and its lines."""
    models = {encoding.case for encoding in _encodings()[0]}
    sections: dict[str, tuple[str, list[Line]]] = {}
    for kernel, what in KERNELS.items():
        own = [line for line in lines if line["kernel"] == kernel]
        text = f"{what[0].upper()}{what[1:]}."
        if kernel == "rotate_encode":
            sections[IN_MODELS] = text, [line for line in own if line["case"] in models]
            sections[ELSEWHERE] = NORMS, [line for line in own if line["case"] not in models]
        else:
            sections[kernel] = text, own
    return sections


def _row(lines: Sequence[Line]) -> list[str]:
    found = [[line[arch.name] for line in lines if arch.name in line] for arch in ARCHITECTURES]
    shared = max(one["shared"] for of_arch in found for one in of_arch)
    return [f"{lines[0]['threads']}", f"{shared:,}", *map(_cell, found)]


def _cell(found: Sequence[dict[str, Any]]) -> str:
    """Of several variants the most registers, fewest blocks and most spilled bytes."""
    if not found:
        return "-"
    registers, blocks = max(one["registers"] for one in found), min(one["blocks"] for one in found)
    spilled = max(one["spills"][0] for one in found)
    return f"{registers} / {blocks}" + (f" / {spilled} B" if spilled else "")


def _warnings(lines: Sequence[Line]) -> list[str]:
    said = [
        f"- {line['kernel']}, {line['case']}, {arch.name}: {warning}"
        for line in lines
        for arch in ARCHITECTURES
        for warning in line.get(arch.name, {}).get("warnings", ())
    ]
    return ["## What the compiler warns of", _filled(OUT_OF_RANGE), "\n".join(dict.fromkeys(said))] if said else []


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.resources", description=__doc__)
    parser.add_argument("--only", action="append", choices=tuple(KERNELS), help="may be repeated")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(arguments)
    if args.check:
        if PAGE.read_text() != page(list(read().values())):
            sys.exit(f"{PAGE} is not up to date: {RERUN}")
        return
    older = [line for line in read().values() if line["kernel"] in KERNELS]
    kept = [line for line in older if line["kernel"] not in args.only] if args.only else []
    lines = sorted(
        kept + compile_all(args.only or tuple(KERNELS)), key=lambda line: list(KERNELS).index(line["kernel"])
    )
    LINES.parent.mkdir(parents=True, exist_ok=True)
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))
    PAGE.write_text(page(lines))
    narrow = [
        f"{line['kernel']}, {line['case']}, {line['variant']}: not a block fits on {arch.name}"
        for line in lines
        for arch in ARCHITECTURES
        if arch.name in line and not line[arch.name]["blocks"]
    ]
    if narrow:
        sys.exit("\n".join(narrow))


if __name__ == "__main__":
    main()
