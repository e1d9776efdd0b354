"""The methods, each a function of one layer: weight, calibration statistics, bits, seed -> a fake-quantized layer.

They raise ConfigError, with the reason but not the layer's name, for a layer that the method cannot do. All of them see
each layer alone: statistics are of the full-precision model.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from baselines.calibration import Statistics
from baselines.layer import FakeQuantLinear, block_hadamard, regular_hadamard
from baselines.uniform import Activation, decode, encode, gptq, grid_of
from orbitdit.errors import ConfigError

Bits = tuple[int, int]
"""Bits of a weight code and of an activation code."""

ALPHAS = tuple(i / 10 for i in range(11))
"""Strengths of smoothing that are tried for each layer."""
RANK, SVD_GROUP, SVD_ROUNDS, SVD_WIDTH = 32, 64, 5, 3072
GELU_LEAST = 0.171875
"""GELU gives nothing below minus this."""


def rtn(weight: Tensor, statistics: Statistics, bits: Bits, seed: int) -> FakeQuantLinear:
    """Round-to-nearest from least to largest value, a scale and zero point for each row and each token."""
    grid = grid_of(weight, bits[0], weight.shape[1], symmetric=False)
    return FakeQuantLinear(encode(weight, grid), grid, Activation(bits[1], symmetric=False))


def smoothquant(weight: Tensor, statistics: Statistics, bits: Bits, seed: int) -> FakeQuantLinear:
    """SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4): max|x|^alpha / max|w|^(1 - alpha) moves from activations
    into weights; then as `rtn`. Alpha is the one of ALPHAS with the least output error on the calibration tokens.

    The authors' version has one alpha for a whole model (0.5 in most), one scale for a whole weight, and smooths only
    layers that follow a norm, into which the factors go for free; here every layer is smoothed, its factors stored.
    """

    def make(smooth: Tensor) -> FakeQuantLinear:
        grid = grid_of(weight * smooth, bits[0], weight.shape[1], symmetric=False)
        return FakeQuantLinear(encode(weight * smooth, grid), grid, Activation(bits[1], symmetric=False), smooth=smooth)

    return _best(weight, statistics, make, _smoothings(weight, [statistics.absmax.amax(0)]))[0]


def quarot(weight: Tensor, statistics: Statistics, bits: Bits, seed: int, errors: bool = False) -> FakeQuantLinear:
    """QuaRot (Ashkboos et al., arXiv 2404.00456): random signs and a Hadamard matrix before both sides, symmetric
    codes, tokens clipped at 0.9 of their largest magnitude, rows at the ratio of least squared error. `errors` makes up
    for errors by GPTQ, its best; otherwise the codes are round-to-nearest.

    The authors' version was made for language models: it fuses the rotation into the layers before (a DiT's modulated
    norms forbid that: here it is made online, before every layer), rotates keys and values, takes Kronecker products
    with Hadamard matrices of order 12, 20, 28, ... where the width is no power of two (here blocks), and collects
    GPTQ's statistics behind the layers already quantized.
    """
    rotation = block_hadamard(weight.shape[1], seed, weight.device)
    rotated = rotation.apply(weight)
    grid = grid_of(rotated, bits[0], weight.shape[1], symmetric=True, search=True)
    codes = gptq(rotated, rotation.conjugate(statistics.hessian), grid) if errors else encode(rotated, grid)
    return FakeQuantLinear(codes, grid, Activation(bits[1], clip=0.9), rotation=rotation)


def vidit_q(weight: Tensor, statistics: Statistics, bits: Bits, seed: int) -> FakeQuantLinear:
    """ViDiT-Q (Zhao et al., arXiv 2406.02540): static-dynamic channel balancing. Smoothing takes what is lasting in the
    channels' imbalance, a rotation behind it what changes over timesteps; then as `rtn`.

    The smoothing is taken from one group of timesteps; group and alpha are those of least output error on calibration
    tokens of all timesteps. The authors' version has one alpha for a model, takes the smoothing from the first
    timesteps (in an early draft one for each range of timesteps, which needs codes of its own for each), and knows
    mixed precision: a search by metrics of pictures leaves sensitive layers at more bits, which are not equal bits.
    """
    rotation = block_hadamard(weight.shape[1], seed, weight.device)

    def make(smooth: Tensor) -> FakeQuantLinear:
        rotated = rotation.apply(weight * smooth)
        grid = grid_of(rotated, bits[0], weight.shape[1], symmetric=False)
        activation = Activation(bits[1], symmetric=False)
        return FakeQuantLinear(encode(rotated, grid), grid, activation, rotation=rotation, smooth=smooth)

    return _best(weight, statistics, make, _smoothings(weight, statistics.absmax))[0]


def svdquant(weight: Tensor, statistics: Statistics, bits: Bits, seed: int, to_scale: bool = False) -> FakeQuantLinear:
    """SVDQuant (Li et al., arXiv 2411.05007): smoothing, the weight's largest RANK singular vectors in bf16, and the
    rest in symmetric codes by GPTQ; groups of SVD_GROUP inputs for weights and activations.

    The low-rank branch is found anew from what the codes leave over, SVD_ROUNDS times, the best kept; alpha is the one
    of least output error. After GELU, groups are shifted by its least value, so that their codes are unsigned.

    RANK is the authors' for layers 3,072 wide, where the branch takes a third of a bit a weight. In a model 256 wide it
    takes four: `to_scale` gives the branch the same share of a layer as it has at SVD_WIDTH, so that bits stay near
    those of the other methods. The authors' version also knows NVFP4, gives q, k and v one branch together, and
    searches the smoothing of a block through the block's output.
    """
    rows, dim = weight.shape
    rank = max(1, round(RANK * min(rows, dim) / SVD_WIDTH)) if to_scale else RANK
    if dim % SVD_GROUP or min(rows, dim) <= rank:
        raise ConfigError(f"groups of {SVD_GROUP} inputs and rank {rank} do not fit {dim} inputs and {rows} outputs")
    least = statistics.least.unflatten(0, (-1, SVD_GROUP)).amin(-1)
    unsigned = least >= -GELU_LEAST - 1e-3
    shift = (GELU_LEAST * unsigned.float()).repeat_interleave(SVD_GROUP) if unsigned.any() else None
    moved = statistics if shift is None else statistics.shifted(shift)
    activation = Activation(bits[1], SVD_GROUP, unsigned=unsigned)

    def make(smooth: Tensor, refine: bool = False) -> FakeQuantLinear:
        smoothed, hessian = weight * smooth, moved.hessian / smooth / smooth[:, None]
        down, up = _low_rank(smoothed, rank)
        if refine:
            down, up = _refined(smoothed, hessian, bits[0], (down, up))
        rest = smoothed - up @ down
        grid = grid_of(rest, bits[0], SVD_GROUP, symmetric=True, search=refine)
        codes = gptq(rest, hessian, grid) if refine else encode(rest, grid)
        return FakeQuantLinear(codes, grid, activation, smooth=smooth, shift=shift, low_rank=(down, up))

    smooth = _best(weight, statistics, make, _smoothings(weight, [moved.absmax.amax(0)]))[1]
    return make(smooth, refine=True)


def _refined(weight: Tensor, hessian: Tensor, bits: int, branch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The best branch of SVD_ROUNDS: each is taken from what round-to-nearest codes beside the last one leave over."""
    best, lowest = branch, None
    for _ in range(SVD_ROUNDS):
        down, up = branch
        rest = weight - up @ down
        grid = grid_of(rest, bits, SVD_GROUP, symmetric=True)
        coded = decode(encode(rest, grid), grid)
        error = ((rest - coded) @ hessian * (rest - coded)).sum()
        if lowest is None or bool(error < lowest):
            best, lowest = branch, error
        branch = _low_rank(weight - coded, len(down))
    return best


def convrot(weight: Tensor, statistics: Statistics, bits: Bits, seed: int) -> FakeQuantLinear:
    """ConvRot (Huang et al., arXiv 2512.03673): regular Hadamard matrices on groups of 256 inputs (or the largest power
    of four that fits), then symmetric round-to-nearest, a scale for each row and token.

    The authors' version is a module whose kernel does rotation, rounding and an INT4 product in one; which layers it
    takes in FLUX is theirs to choose, where here they are those of the plan.
    """
    rotation = regular_hadamard(weight.shape[1], weight.device)
    rotated = rotation.apply(weight)
    grid = grid_of(rotated, bits[0], weight.shape[1], symmetric=True)
    return FakeQuantLinear(encode(rotated, grid), grid, Activation(bits[1]), rotation=rotation)


class Method(NamedTuple):
    """`make` is one of the functions above; `title` as tables name it; `seeds` are those of the rotation to try."""

    title: str
    make: Callable[[Tensor, Statistics, Bits, int], FakeQuantLinear]
    seeds: tuple[int, ...] = (0,)


METHODS = {
    "rtn": Method("RTN", rtn),
    "smoothquant": Method("SmoothQuant", smoothquant),
    "quarot": Method("QuaRot", quarot, (0, 1, 2)),
    "quarot-gptq": Method("QuaRot, GPTQ", partial(quarot, errors=True), (0, 1, 2)),
    "vidit-q": Method("ViDiT-Q", vidit_q, (0, 1, 2)),
    "svdquant": Method("SVDQuant, rank 32", svdquant),
    "svdquant-scaled": Method("SVDQuant, rank to scale", partial(svdquant, to_scale=True)),
    "convrot": Method("ConvRot", convrot),
}


def _smoothings(weight: Tensor, largest: Iterable[Tensor]) -> list[Tensor]:
    """None at all, and smoothing factors (dim,), in bf16 as they would be stored, for each magnitude and each alpha."""
    of_weight = weight.abs().amax(0).clamp(min=1e-5)
    factors = [x.clamp(min=1e-5) ** alpha / of_weight ** (1 - alpha) for x in largest for alpha in ALPHAS]
    return [torch.ones_like(of_weight), *(f.clamp(1e-4, 1e4).to(torch.bfloat16).float() for f in factors)]


def _best(
    weight: Tensor, statistics: Statistics, make: Callable[[Tensor], FakeQuantLinear], smoothings: list[Tensor]
) -> tuple[FakeQuantLinear, Tensor]:
    """The layer whose output on the calibration tokens is nearest to that of `weight`, the first of equals, and its
    smoothing."""
    target = statistics.tokens @ weight.T
    layers = [make(smooth).finish(None, weight.dtype) for smooth in smoothings]
    errors = [float((layer(statistics.tokens) - target).square().sum()) for layer in layers]
    place = errors.index(min(errors))
    return layers[place], smoothings[place]


def _low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`down` (rank, dim) and `up` (rows, rank), in bf16 as they would be stored: the best up @ down for `matrix`.

    From the eigenvectors of the smaller of M M^T and M^T M, in fp64.
    """
    m = matrix.double()
    wide = m.shape[0] <= m.shape[1]
    vectors = torch.linalg.eigh(m @ m.T if wide else m.T @ m).eigenvectors[:, -rank:]
    down, up = (vectors.T @ m, vectors) if wide else (vectors.T, m @ vectors)
    return down.to(torch.bfloat16).float(), up.to(torch.bfloat16).float()
