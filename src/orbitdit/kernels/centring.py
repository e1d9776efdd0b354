"""Tokens less a mean that they share, which is multiplied apart: y = W Q(x - m) + W Q6(m) + bias.

Any m gives the same y but for the error of codes, and what is left of tokens after their mean is small: neighbours of
a picture are alike, and all have in common what modulation and bias add to them. `each` consecutive tokens of a
picture share a mean, of which the last ones may be fewer; the tokens of a picture are those along the second last
dimension of the layer's input. Means have codes of 6 bits.
"""

import torch
from torch import Tensor

MEAN_BITS = 6


def groups(tokens: int, each: int) -> int:
    """Means of a picture of so many tokens."""
    return -(-tokens // each)


def token_means(x: Tensor, each: int) -> Tensor:
    """Means (pictures * groups, dim), in the dtype of `x`, of tokens `x` (..., tokens, dim).

    What is not finite counts as zero: a token that is spoilt shall not spoil the others.
    """
    tokens, count = x.reshape(-1, *x.shape[-2:]), x.shape[-2]
    whole = count // each
    means = tokens[:, : whole * each].unflatten(1, (whole, each)).mean(2, dtype=torch.float32)
    if whole * each < count:
        means = torch.cat([means, tokens[:, whole * each :].mean(1, keepdim=True, dtype=torch.float32)], dim=1)
    return means.nan_to_num(0, 0, 0).flatten(0, 1).to(x.dtype)


def spread(rows: Tensor, tokens: int, each: int) -> Tensor:
    """`rows` (pictures * groups, channels) for every token: (pictures * tokens, channels)."""
    by_picture = rows.view(-1, groups(tokens, each), rows.shape[1])
    return by_picture.repeat_interleave(each, 1)[:, :tokens].flatten(0, 1)


def less_means(x: Tensor, means: Tensor, tokens: int, each: int) -> Tensor:
    """Tokens `x` (pictures * tokens, dim) less their means, rounded once to their dtype."""
    return (x.float() - spread(means, tokens, each).float()).to(x.dtype)


def add_means(y: Tensor, of_means: Tensor, tokens: int, each: int) -> Tensor:
    """Outputs (pictures * tokens, rows) plus those of the means (pictures * groups, rows): written to `y` itself where
    the means are of as many tokens each, unless a compiler looks on."""
    if tokens % each:
        return y + spread(of_means, tokens, each)
    of_each = y.view(len(of_means), each, y.shape[1])
    add = of_each.add if torch.compiler.is_compiling() else of_each.add_
    return add(of_means[:, None]).view(y.shape)
