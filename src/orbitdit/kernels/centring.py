"""Tokens less a mean that they share, which is multiplied apart: y = W Q(x - m) + W Q6(m) + bias.

Any m gives the same y but for the error of codes, and what is left of tokens after their mean is small: neighbours of
a picture are alike, and all have in common what modulation and bias add to them. `each` consecutive tokens of a
picture share a mean, of which the last ones may be fewer; the tokens of a picture are those along the second last
dimension of the layer's input. Means have codes of 6 bits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from orbitdit.kernels.reference import NORM_EPSILONS, apply_before

MEAN_BITS = 6
SAMPLE = 256
"""A mean of more tokens than two times this is that of so many of them, or a few more, evenly spaced: it is within
1/16 of their deviation then, and costs no pass over all of them."""


def groups(tokens: int, each: int) -> int:
    """Means of a picture of so many tokens."""
    return -(-tokens // each) if each < tokens else 1


def token_means(x: Tensor, before: str, extras: Sequence[Tensor], each: int) -> Tensor:
    """Means (pictures * groups, dim), in the dtype of `x`, of what `apply_before` makes of tokens `x` (..., tokens,
    channels). What is not finite counts as zero: a token that is spoilt shall not spoil the others."""
    count = x.shape[-2]
    if each >= count:
        step = max(1, count // SAMPLE - 1 | 1)  # odd, to meet all columns of a picture
        x = x[..., ::step, :]
        if before not in NORM_EPSILONS:
            extras = [t[..., ::step, :] for t in extras]
        each = count = x.shape[-2]
    tokens = apply_before(x.reshape(-1, x.shape[-1]), before, [t.reshape(-1, t.shape[-1]) for t in extras])
    tokens = tokens.view(-1, count, tokens.shape[-1])
    whole = count // each * each
    means = tokens[:, :whole].unflatten(1, (-1, each)).mean(2, dtype=torch.float32)
    if whole < count:
        means = torch.cat([means, tokens[:, whole:].mean(1, keepdim=True, dtype=torch.float32)], dim=1)
    return means.nan_to_num(0, 0, 0).flatten(0, 1).to(x.dtype)


def spread(rows: Tensor, tokens: int, each: int) -> Tensor:
    """`rows` (pictures * groups, channels) for every token: (pictures * tokens, channels)."""
    if each >= tokens:
        return rows.repeat_interleave(tokens, 0)
    by_picture = rows.view(-1, groups(tokens, each), rows.shape[1])
    return by_picture.repeat_interleave(each, 1)[:, :tokens].flatten(0, 1)


def less_means(x: Tensor, means: Tensor, tokens: int, each: int) -> Tensor:
    """Tokens `x` (pictures * tokens, dim) less their means, rounded once to their dtype."""
    return (x.float() - spread(means, tokens, each).float()).to(x.dtype)


def add_means(y: Tensor, of_means: Tensor, tokens: int, each: int) -> Tensor:
    """Outputs (pictures * tokens, rows) plus those of the means (pictures * groups, rows)."""
    if torch.compiler.is_compiling() or (each < tokens and tokens % each):
        return y + spread(of_means, tokens, each)
    return y.view(len(of_means), -1, y.shape[1]).add_(of_means[:, None]).view(y.shape)
