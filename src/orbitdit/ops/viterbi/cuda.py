"""`encode` on CUDA: rows of numbers to trellis codes. See viterbi.cu."""

import torch
from torch import Tensor

from orbitdit.errors import TensorError
from orbitdit.ops.nvrtc import kernel, num_sms

BITS, STATES = (2, 3, 4), range(8, 13)
"""Bits a weight, and log2 of the states, that the kernel takes."""
HELD_STATES = 16
"""States of a thread: 2^12 states are a block of 256 threads."""
MIN_THREADS = 64
"""Fewer states share a block of so many threads: a processor holds a limited number of blocks."""
RESIDENT_THREADS = {2: 1280, 3: 1024, 4: 1280}
"""By bits: threads a processor that the compiler shall leave registers for."""
WORKSPACE_BYTES = 2 << 30
"""What all blocks together may take for their decisions, a byte a weight and thread: 5 blocks of 256 threads on each of
132 processors take 0.5 GB for rows of 3,072 weights; from rows of 12,711 on fewer blocks run."""


def encode(z: Tensor, table: Tensor, bits: int) -> Tensor:
    """Codes (rows, dim) uint8 of finite `z` (rows, dim) fp32 by `table` (2^states,) fp32, both on one CUDA device.

    A row's codes, b bits each, are the path of least squared error through the bit-shift trellis (Tseng et al., arXiv
    2406.11235) that starts in state 0: state s_i = s_(i-1) >> b | c_i << (states - b), weight i stands for table[s_i].
    Costs are in fp32, each operation rounded on its own; ties go to the lowest state.

    Raises TensorError for other dtypes and devices, and for bits and states that the kernel does not take.
    """
    states = len(table).bit_length() - 1
    if bits not in BITS or states not in STATES or len(table) != 1 << states:
        raise TensorError(
            f"the Viterbi kernel takes 2 to 4 bits and tables of 2^8 to 2^12; got {bits} bits and {len(table)} values"
        )
    if z.dtype != torch.float32 or table.dtype != torch.float32 or z.ndim != 2 or not z.is_cuda:
        raise TensorError(
            f"the Viterbi kernel takes fp32 rows on CUDA; got {z.dtype} of shape {tuple(z.shape)} on {z.device} and a "
            f"table of {table.dtype}"
        )
    if z.device != table.device:
        raise TensorError(f"the rows are on {z.device}, the table is on {table.device}: move one of them")
    z, table = z.contiguous(), table.contiguous()
    (rows, dim), device = z.shape, z.device
    codes = torch.empty(rows, dim, dtype=torch.uint8, device=device)
    if codes.numel():
        defines = compile_options(bits, states)
        threads = defines["THREADS"]
        built = kernel("viterbi/viterbi.cu", "viterbi", tuple(defines.items()), "PPPPii", device.index)
        resident = num_sms(device.index) * max(1, built.blocks_per_processor(threads, 0))
        blocks, size = blocks_and_workspace(rows, dim, states, threads, resident)
        workspace = torch.empty(size, dtype=torch.uint8, device=device)
        pointers = (t.data_ptr() for t in (z, table, workspace, codes))
        built.launch(blocks, threads, 0, *pointers, rows, dim)
    return codes


def compile_options(bits: int, states: int) -> dict[str, int]:
    """The kernel's compile-time constants."""
    threads = max(MIN_THREADS, (1 << states) // HELD_STATES)
    return {"BITS": bits, "STATES": states, "THREADS": threads, "MIN_BLOCKS": RESIDENT_THREADS[bits] // threads}


def blocks_and_workspace(rows: int, dim: int, states: int, threads: int, resident: int) -> tuple[int, int]:
    """Blocks for `rows`, at most `resident` at a time, and the bytes of their workspace; all end together."""
    at_a_time = threads * HELD_STATES >> states
    size = -(-dim // 4) * 4 * threads
    groups = -(-rows // at_a_time)
    rounds = -(-groups // max(1, min(resident, WORKSPACE_BYTES // size)))
    blocks = -(-groups // rounds)
    return blocks, blocks * size
