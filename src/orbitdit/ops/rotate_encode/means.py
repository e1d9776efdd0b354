"""Centred tokens: a mean that they share is subtracted and multiplied apart, y = W Q(x - m) + W Q6(m) + bias.

Any m gives the same y up to the error of the codes. Tokens less their mean are small, and so is their error: tokens of
one sample are alike, and modulation and bias add the same to all of them. `group_size` consecutive tokens of a sample
share a mean; the last group may be smaller. The tokens of a sample lie along the second last dimension of the layer's
input. Means have codes of 6 bits.
"""

from functools import cache

import torch
from torch import Tensor

from orbitdit.codebooks import token_gain
from orbitdit.codebooks.lloyd_max import shrinkage
from orbitdit.spec import Encoding, LayerSpec, Projection

MEAN_BITS = 6
"""The bits of a mean's codes."""


def mean_gain(spec: LayerSpec) -> float:
    """The factor of the products of means: the rows' scales undo the shrinking of the tokens' codes, and codes of
    means shrink less."""
    if spec.weight.scale != "unbiased":
        return 1.0
    return 1 / shrinkage(spec.in_features, MEAN_BITS) / token_gain(spec)


@cache
def mean_encoding(key: str) -> Encoding:
    """How the op `linear` encodes the means of the projection with this key."""
    projection = Projection.parse(key)
    tokens, gain = projection.tokens, mean_gain(projection.first)
    return Encoding(tokens.dim, MEAN_BITS, tokens.grid, tokens.seed, gain)


def group_size_for(x: Tensor, group_size: int | None) -> int | None:
    """How many tokens of `x` (..., tokens, dim) share a mean: `group_size`, at most all tokens of a sample. None where
    tokens are not centred, and for inputs of two dimensions, whose rows are no tokens of one sample."""
    return min(group_size, x.shape[-2]) if group_size is not None and x.ndim > 2 and x.numel() else None


def groups(tokens: int, group_size: int) -> int:
    """Means of a sample of so many tokens."""
    return -(-tokens // group_size)


def token_means(x: Tensor, group_size: int) -> Tensor:
    """Means (samples * groups, dim), in the dtype of `x`, of tokens `x` (..., tokens, dim).

    A mean that is not finite counts as zero, so that a token of NaN or Inf does not reach the other tokens.
    """
    tokens, count = x.reshape(-1, *x.shape[-2:]), x.shape[-2]
    whole = count // group_size
    means: Tensor = tokens[:, : whole * group_size].unflatten(1, (whole, group_size)).mean(2, dtype=torch.float32)
    if whole * group_size < count:
        means = torch.cat([means, tokens[:, whole * group_size :].mean(1, keepdim=True, dtype=torch.float32)], dim=1)
    return means.nan_to_num(0, 0, 0).flatten(0, 1).to(x.dtype)


def spread(rows: Tensor, tokens: int, group_size: int) -> Tensor:
    """`rows` (samples * groups, channels) for every token: (samples * tokens, channels)."""
    by_sample = rows.view(-1, groups(tokens, group_size), rows.shape[1])
    return by_sample.repeat_interleave(group_size, 1)[:, :tokens].flatten(0, 1)


def less_means(x: Tensor, means: Tensor, tokens: int, group_size: int) -> Tensor:
    """Tokens `x` (samples * tokens, dim) less their means, rounded once to their dtype."""
    return (x.float() - spread(means, tokens, group_size).float()).to(x.dtype)


def add_means(y: Tensor, of_means: Tensor, tokens: int, group_size: int) -> Tensor:
    """Outputs (samples * tokens, rows) plus those of the means (samples * groups, rows): in place
    where all groups are whole, except under torch.compile."""
    if tokens % group_size:
        return y + spread(of_means, tokens, group_size)
    of_each = y.view(len(of_means), group_size, y.shape[1])
    add = of_each.add if torch.compiler.is_compiling() else of_each.add_
    return add(of_means[:, None]).view(y.shape)
