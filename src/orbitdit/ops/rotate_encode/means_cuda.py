"""`token_means` on CUDA, for tokens of 16 bits: one pass over them. See means.py and means.cu."""

import torch
from torch import Tensor

from orbitdit.ops.nvrtc import kernel, readable
from orbitdit.ops.rotate_encode.means import groups

THREADS = 128


def token_means(x: Tensor, group_size: int) -> Tensor:
    """See means.py; `x` is bf16 or fp16 and its width a multiple of 8."""
    x = readable(x)
    count, dim = x.shape[-2:]
    means = x.numel() // (count * dim) * groups(count, group_size)
    out = torch.empty((means, dim), dtype=x.dtype, device=x.device)
    constants = compile_options(x.dtype == torch.float16)
    built = kernel("rotate_encode/means.cu", "token_means", tuple(constants.items()), "PPiiiii", x.device.index)
    blocks = -(-means * (dim // 8) // THREADS)
    built.launch(
        blocks, THREADS, 0, x.data_ptr(), out.data_ptr(), means, dim // 8, count, groups(count, group_size), group_size
    )
    return out


def compile_options(half: bool) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {"HALF": int(half), "THREADS": THREADS}
