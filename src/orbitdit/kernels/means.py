"""`token_means` on CUDA, for tokens of 16 bits: one pass over them. See centring.py and means.cu."""

import torch
from torch import Tensor

from orbitdit.kernels.centring import groups
from orbitdit.kernels.nvrtc import kernel, readable

THREADS = 128


def token_means(x: Tensor, each: int) -> Tensor:
    """See centring.py; `x` is bf16 or fp16 and its width a multiple of 8."""
    x = readable(x)
    count, dim = x.shape[-2:]
    means = x.numel() // (count * dim) * groups(count, each)
    out = torch.empty((means, dim), dtype=x.dtype, device=x.device)
    constants = compile_options(x.dtype == torch.float16)
    built = kernel("means.cu", "token_means", tuple(constants.items()), "PPiiiii", x.device.index)
    blocks = -(-means * (dim // 8) // THREADS)
    built.launch(blocks, THREADS, 0, x.data_ptr(), out.data_ptr(), means, dim // 8, count, groups(count, each), each)
    return out


def compile_options(half: bool) -> dict[str, int]:
    """The kernel's compile-time constants."""
    return {"HALF": int(half), "THREADS": THREADS}
