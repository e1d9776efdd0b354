"""Centred tokens: the sum of two codes, one of a mean that tokens share and one of what is left without it,

    x^ = grid(Q(x - m) + gain * Q6(m)),    y = W x^ + bias.

Tokens of one sample are alike, and modulation and bias add the same to all of them; tokens less their mean are small,
and so is the error of their codes. The operand of the product is a byte on a number grid in any case, so the sum is
formed while tokens are encoded, rounded to the grid once, and the product is the same as without means. (Without a grid
the sum is rounded to the dtype that is multiplied.) Both codebooks are laid on the grid int8, whatever the grid of the
sum. `group_size` consecutive tokens of a sample share a mean; the last
group may be smaller. The tokens of a sample lie along the second last dimension of the layer's input: (tokens, dim) is
one sample, and means never cross samples. Where a sequence is spread over devices, each device's share is grouped from
its own first token: with a multiple of `group_size` tokens on each device the groups are those of one device.

Any m gives the same y up to the error of the codes, if both terms have the same. A mean that is not finite counts as
zero, so that a token of NaN or Inf does not reach the others.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from orbitdit.codebooks.lloyd_max import on_grid, shrinkage
from orbitdit.grids import EXACT, GRIDS, INT8
from orbitdit.spec import Encoding

MEAN_BITS = 6
"""The bits of a mean's codes."""
GROUP_SIZE = 16
"""Tokens that share a mean, at most."""

Encoded = tuple[Tensor, Tensor]
"""Values (tokens, dim) and scales (tokens,): value * scale stands for a coordinate of the rotated token."""


@cache
def parts_of(encoding: Encoding) -> tuple[Encoding, Encoding]:
    """How tokens less their means, and the means, are encoded."""
    grid = EXACT if encoding.grid == EXACT else INT8.name
    own, mean = (Encoding(encoding.dim, bits, grid, encoding.seed) for bits in (encoding.bits, MEAN_BITS))
    return own, mean


@cache
def mean_gain(encoding: Encoding) -> float:
    """The factor of means' codes: the rows' scales undo the shrinking of the tokens' codes, and those of means shrink
    less."""
    if not encoding.unbiased:
        return 1.0
    return shrinkage(encoding.dim, encoding.bits) / shrinkage(encoding.dim, MEAN_BITS)


@cache
def reaches(encoding: Encoding) -> tuple[float, float]:
    """What the scale of a token's sum takes of the scales of its two codes, so that the largest sum is the grid's
    largest number."""
    if encoding.grid == EXACT:
        return 1.0, 1.0
    own, mean = (float(on_grid(part.dim, part.bits, part.grid, True).values.max()) for part in parts_of(encoding))
    return own / GRIDS[encoding.grid].largest, mean / GRIDS[encoding.grid].largest


def groups(tokens: int, group_size: int) -> int:
    """Means of a sample of so many tokens."""
    return -(-tokens // group_size)


def sample_of(x: Tensor) -> int:
    """The tokens of a sample of `x` (..., tokens, dim); (dim,) is one token."""
    return x.shape[-2] if x.ndim > 1 else 1


def token_means(x: Tensor, group_size: int) -> Tensor:
    """Means (samples * groups, dim), in the dtype of `x`, of tokens `x` (samples, tokens, dim)."""
    whole = x.shape[1] // group_size
    means: Tensor = x[:, : whole * group_size].unflatten(1, (whole, group_size)).mean(2, dtype=torch.float32)
    if whole * group_size < x.shape[1]:
        rest = x[:, whole * group_size :].mean(1, keepdim=True, dtype=torch.float32)
        means = torch.cat([means, rest], dim=1)
    return means.flatten(0, 1).to(x.dtype).nan_to_num(0, 0, 0)


def groups_of(samples: int, tokens: int, group_size: int, device: torch.device) -> Tensor:
    """The group (samples * tokens,) of each token, among those of all samples."""
    first = torch.arange(samples, device=device)[:, None] * groups(tokens, group_size)
    return (first + torch.arange(tokens, device=device) // group_size).flatten()


def encode_centred(x: Tensor, encoding: Encoding, encode: Callable[[Tensor, Encoding], Encoded]) -> Encoded:
    """Values and scales of tokens `x` (..., tokens, dim) that are centred, on a grid or, for "exact", in the dtype of
    the values that `encode` gives for tokens (tokens, dim) and an encoding without means."""
    size = encoding.group_size
    assert size is not None
    flat, tokens = x.reshape(-1, x.shape[-1]), max(1, sample_of(x))
    samples = len(flat) // tokens
    means = token_means(flat.view(samples, tokens, flat.shape[1]), size)
    group = groups_of(samples, tokens, size, x.device)
    less = (flat.float() - means.index_select(0, group).float()).to(x.dtype)
    own, mean = parts_of(encoding)
    return add(encode(less, own), encode(means, mean), group, encoding)


def add(own: Encoded, of_means: Encoded, group: Tensor, encoding: Encoding) -> Encoded:
    """The sum of the codes of tokens and of the means of their groups, (groups, dim) and (groups,)."""
    (values, scales), (mean_values, mean_scales) = own, of_means
    own_reach, mean_reach = reaches(encoding)
    mean_scales = (mean_scales * mean_gain(encoding)).index_select(0, group)
    total = scales * own_reach + mean_scales * mean_reach
    usual = (total > 0) & (total < 3e38)
    own_part, mean_part = ((part / total).where(usual, 0)[:, None] for part in (scales, mean_scales))
    both = torch.addcmul(mean_values.float().index_select(0, group) * mean_part, values.float(), own_part)
    return both.to(values.dtype) if encoding.grid == EXACT else GRIDS[encoding.grid].nearest(both), total
