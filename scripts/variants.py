"""What was tried beyond trellis codes and unbiased rows, each as a change of one thing: `python -m scripts.velocity`
(how the velocity errs), `python -m scripts.quality --variants` (what pictures score).

A variant's layer holds an `OrbitLinear` (its codes, its scales, its bytes) of the weight W' = B W, where B is an
orthogonal transform of the inputs in front of the recipe's own rotation R, and computes in plain torch

    y_i = n_i * t * <c_W(i), c_A(R B x)> + bias_i

with c_W(i) from R B w_i. Where a picture's mean token is kept apart, x is what is left of a token, and the mean's own
product is added. All is on the points of e4m3, as `orbitdit` computes on a GPU: products of points are exact, sums in
fp32. The variant "base" changes nothing: its codes are those of `quantize_` with the scale "unbiased-rows" and no
tokens centred, its outputs those of the layers, up to the order of sums. "token-constant" has become the default recipe
and, where tokens are centred, "mean-16-constant", whose two products are one of a sum of codes there.

All variants store the same bits as the default recipe, or a little less where they are allotted; only those with
`own_balance` store a factor for each input. They, and those with `own_mean`, are not calibration-free in the strict
sense: they look at pictures that the model makes from noise without a prompt, which takes no data and yet a pass.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from baselines import Statistics
from orbitdit import OrbitLinear, OrbitQuantConfig, plan
from orbitdit.codebooks.lloyd_max import look_up, nearest, on_grid, shrinkage
from orbitdit.errors import ConfigError
from orbitdit.model import linear_named, quantize_layer, replace_module
from orbitdit.ops.decode.reference import decode
from orbitdit.ops.rotate_encode.means import groups_of, token_means
from orbitdit.ops.rotate_encode.reference import normalize
from orbitdit.policy import LayerPlan
from orbitdit.quantize import QuantizedWeight, check_weight, quantize_weight
from orbitdit.rotation import rotation

GRID = "e4m3"
E4M3_MAX = 448.0
STEPS = (0.85, 0.92, 1.0, 1.08, 1.16)
"""Multiples of the codebook that "token-search" tries on each token."""
TRELLIS_ERRORS = {2: 0.0709, 3: 0.0185, 4: 0.0049}
"""Squared error of 2^12 states on normal rows, by bits (see `orbitdit.codebooks.trellis`)."""

Transform = Callable[[Tensor], Tensor]
"""An orthogonal transform of rows (..., dim), in their dtype."""


class Codebook(NamedTuple):
    """An activation's codebook on the grid: point k is `scale` * `values`[k]; in fp32."""

    values: Tensor
    boundaries: Tensor
    scale: float


def codebook_of(dim: int, bits: int, device: torch.device | str = "cpu") -> Codebook:
    """The one that `orbitdit` encodes tokens with on a GPU, on `device`."""
    found = on_grid(dim, bits, GRID, True)
    return Codebook(found.values.float().to(device), found.boundaries.float().to(device), found.scale)


Tokens = Callable[[Tensor, Codebook], tuple[Tensor, Tensor | float]]
"""Takes rotated tokens u (..., dim) of norm 1 (or 0) in fp32, and gives values (..., dim) on the grid and factors
(..., 1), or a number for all, such that values * factors stand for u."""


def by_norm(u: Tensor, codebook: Codebook) -> tuple[Tensor, float]:
    """The paper's scale: the norm alone."""
    return look_up(nearest(u, codebook.boundaries), codebook.values), codebook.scale


def unbiased(u: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """<u, u> / <u, q>: what stands for u has the product <u, u> with it, as a weight's row has."""
    q = by_norm(u, codebook)[0]
    return q, _ratio(u.square().sum(-1, True), (u * q).sum(-1, True), codebook.scale)


def unbiased_on_average(u: Tensor, codebook: Codebook) -> tuple[Tensor, float]:
    """`unbiased` with the mean of <u, q> over random tokens in place of each one's own: a constant, 1 / (1 - D), that
    folds into a scale and costs nothing at run time."""
    values, scale = by_norm(u, codebook)
    return values, scale / shrinkage(u.shape[-1], len(codebook.values).bit_length() - 1)


def searched(u: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Of codes on STEPS multiples of the codebook, those whose direction is nearest to u's, then as `unbiased`.

    With its best scale a code q errs by <u, u> - <u, q>^2 / <q, q>.
    """
    best, most = torch.zeros_like(u), torch.zeros_like(u[..., :1])
    for step in STEPS:
        q = by_norm(u / step, codebook)[0]
        along = (u * q).sum(-1, True).square() / q.square().sum(-1, True)
        best, most = torch.where(along > most, q, best), torch.maximum(along, most)
    return best, _ratio(u.square().sum(-1, True), (u * best).sum(-1, True), codebook.scale)


def finely(u: Tensor, codebook: Codebook) -> tuple[Tensor, Tensor]:
    """The points of e4m3 nearest to each coordinate, 8 bits: for the one mean token of a picture."""
    scale = u.abs().amax(-1, True) / E4M3_MAX
    return (u / scale.where(scale > 0, 1)).to(torch.float8_e4m3fn).float(), scale


def _ratio(above: Tensor, below: Tensor, otherwise: float) -> Tensor:
    return torch.where(below > 0, above / below.where(below > 0, 1), otherwise)


def nothing(dim: int, seed: int) -> Transform | None:
    """No transform in front of the rotation."""
    return None


def another_round(dim: int, seed: int) -> Transform:
    """A whole rotation, of another seed, in front of the first."""
    return rotation(dim, seed ^ 1 << 63).apply


def across_blocks(dim: int, seed: int) -> Transform | None:
    """What makes the rotation a Kronecker product: with the Hartley matrix C of order d/h, R B = (C x H_h) S P.

    C mixes coordinates of the same place over the blocks, behind permutation P and signs S, where it commutes with the
    Hadamard matrices; it has no zeros for odd orders, so that each output takes of every input. None for one block.
    """
    r = rotation(dim, seed)
    order = dim // r.block_size
    if order == 1:
        return None
    matrix = hartley(order)

    def apply(x: Tensor) -> Tensor:
        signs = r.signs.to(x.dtype)
        blocks = (x.index_select(-1, r.permutation) * signs).unflatten(-1, (order, r.block_size))
        mixed = (matrix.to(x.dtype) @ blocks).flatten(-2) * signs
        return torch.empty_like(x).index_copy_(-1, r.permutation, mixed)

    return apply


def hartley(order: int) -> Tensor:
    """The symmetric orthogonal matrix cas(2 pi j k / order) / sqrt(order), cas = cos + sin, fp64."""
    steps = torch.arange(order, dtype=torch.float64)
    angle = steps[:, None] * steps % order * (2 * math.pi / order)
    return (angle.cos() + angle.sin()) * order**-0.5


def allotted(model: nn.Module, rows: Sequence[LayerPlan], bits: int) -> dict[str, int]:
    """Bits (2, 3, 4) of each layer's weights, on average over all weights at most `bits`.

    Reverse water-filling on what the weights tell alone: white inputs of unit variance make layer l err by
    D(b) * ||W_l||^2.
    """
    energy = {row.name: float(linear_named(model, row.name).weight.double().square().sum()) for row in rows}
    return allocated(energy, {row.name: row.weights for row in rows}, bits, TRELLIS_ERRORS)


def allocated(
    importance: Mapping[str, float], sizes: Mapping[str, int], average: float, error: Mapping[int, float]
) -> dict[str, int]:
    """Bits of each part, out of those of `error`, at most `average` over all `sizes`, that make the sum of `importance`
    times `error` least but for the last bits that fit nowhere. From the fewest everywhere, one goes at a time to where
    it saves most a stored bit, which is best because savings shrink with the bits."""
    bits = dict.fromkeys(importance, min(error))
    left = sum(sizes.values()) * (average - min(error))

    def saved(part: str) -> float:
        return importance[part] * (error[bits[part]] - error[bits[part] + 1]) / sizes[part]

    while fitting := [part for part in bits if bits[part] + 1 in error and sizes[part] <= left]:
        part = max(fitting, key=saved)
        bits[part] += 1
        left -= sizes[part]
    return bits


class Variant(NamedTuple):
    """How a variant differs from trellis codes and unbiased rows. `bits`: the settings that it is measured at. `before`
    makes the transform of (dim, seed); `centred`: each picture's mean token is taken off before encoding and multiplied
    in 8 bits, or with `each` the mean of so many tokens; `block_seeds`: layers of different blocks have rotations of
    their own; `own_mean`: the weights' error on the mean of unprompted pictures' activations is taken off the bias;
    `own_balance`: see `balance_of`; `allotted`: see `allotted`."""

    title: str
    tokens: Tokens = by_norm
    before: Callable[[int, int], Transform | None] = nothing
    centred: bool = False
    own_mean: bool = False
    own_balance: bool = False
    allotted: bool = False
    each: int = 0
    block_seeds: bool = False
    bits: tuple[str, ...] = ("W2A4", "W3A3", "W2A3")

    @property
    def looks(self) -> bool:
        """Whether it needs statistics of activations."""
        return self.own_mean or self.own_balance


VARIANTS = {
    "base": Variant("trellis codes and unbiased rows"),
    "token-mean": Variant("mean token apart", centred=True),
    "token-constant": Variant(
        "token scale unbiased on average: the default recipe where no tokens are centred", unbiased_on_average
    ),
    "mean-constant": Variant("mean token apart, scale unbiased on average", unbiased_on_average, centred=True),
    "mean-16-constant": Variant(
        "mean of 16 tokens apart, scale unbiased on average: the default recipe when its means were multiplied apart",
        unbiased_on_average,
        centred=True,
        each=16,
    ),
    "block-seeds": Variant(
        "each block its own rotation, scale unbiased on average", unbiased_on_average, block_seeds=True
    ),
    "token-unbiased": Variant("unbiased token scale", unbiased),
    "token-search": Variant("token scale searched, unbiased", searched),
    # No code has less than 2 bits: at 2 bits there is nothing to take from.
    "allotted": Variant("weight bits allotted, 2 to 4", allotted=True, bits=("W3A3",)),
    "own-mean": Variant("bias for the mean of unprompted pictures", own_mean=True),
    "two-rounds": Variant("two rounds of rotation", before=another_round),
    "cross-blocks": Variant("Hartley matrix across blocks", before=across_blocks),
    "own-balance": Variant("channels balanced by unprompted pictures", own_balance=True),
}
"""In the order in which they are measured."""


class Encoding:
    """What a variant makes of tokens: layers that encode alike share one, which remembers its last input."""

    def __init__(
        self,
        variant: Variant,
        dim: int,
        bits: int,
        seed: int,
        balance: Tensor | None = None,
        device: torch.device | str = "cpu",
    ):
        self.tokens, self.centred, self.each, self.balance = variant.tokens, variant.centred, variant.each, balance
        self.codebook = codebook_of(dim, bits, device)
        self.before, self.rotation = variant.before(dim, seed), rotation(dim, seed)
        self.last: tuple[Tensor, int] | None = None
        self.parts: list[tuple[Tensor, Tensor]] = []

    def mix(self, x: Tensor) -> Tensor:
        """R B x for each row of `x` (..., dim), in its dtype."""
        return self.rotation.apply(x if self.before is None else self.before(x))

    def __call__(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Values (..., dim) on the grid and scales (..., 1), both fp32, of each part of `x` (..., dim): their sum, each
        spread over the tokens, stands for R B (x / balance)."""
        if self.last is None or self.last[0] is not x or self.last[1] != x._version:
            rows = x.float() if self.balance is None else x.float() / self.balance
            if self.centred and x.ndim > 2:
                mean = rows.mean(-2, keepdim=True)
                if self.each:
                    samples = rows.flatten(0, -3)
                    group = groups_of(*samples.shape[:2], self.each, rows.device)
                    mean = token_means(samples, self.each)[group].view(rows.shape)
                self.parts = [self.part(rows - mean, self.tokens), self.part(mean, finely)]
            else:
                self.parts = [self.part(rows, self.tokens)]
            self.last = x, x._version
        return self.parts

    def part(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        unit, norm = normalize(x)
        values, factors = tokens(self.mix(unit), self.codebook)
        return values, norm * factors


class VariantLinear(nn.Module):
    """See the module's docstring; takes (..., in) in any floating dtype and gives (..., out) in the same."""

    def __init__(self, coded: OrbitLinear, encoding: Encoding):
        super().__init__()
        self.coded, self.encoding = coded, encoding
        self.in_features, self.out_features = coded.in_features, coded.out_features
        values, scales = decode(coded.codes, coded.scales, coded.spec, GRID)
        self.register_buffer("values", values.float())
        self.register_buffer("row_scales", scales)

    values: Tensor
    row_scales: Tensor

    @property
    def weight(self) -> Tensor:
        """That of `OrbitLinear`."""
        return self.coded.weight

    def forward(self, x: Tensor) -> Tensor:
        parts = [values @ self.values.T * scales * self.row_scales for values, scales in self.encoding(x)]
        y = sum(parts[1:], parts[0])
        bias = self.coded.bias
        return (y if bias is None else y + bias.float()).to(x.dtype)


Encodings = dict[tuple[int, int, int], Encoding]
"""Of one variant, by width, activation bits and seed."""
Codes = dict[tuple, QuantizedWeight]
"""What weights of one model were quantized to, for variants that quantize the same."""


def variant_layer(
    linear: nn.Linear,
    row: LayerPlan,
    variant: Variant,
    seed: int,
    statistics: Statistics | None = None,
    encodings: Encodings | None = None,
    codes: Codes | None = None,
) -> VariantLinear:
    """`linear` as `row` plans it. `statistics` of its inputs are needed for `own_mean` and `own_balance`; layers made
    with the same `encodings` share them, and with the same `codes` the same weight is quantized once."""
    if statistics is None and variant.looks:
        raise ConfigError(f"{row.name} has no statistics of its inputs: calibrate the model that is quantized")
    weight, encodings, codes = (
        linear.weight.detach(),
        {} if encodings is None else encodings,
        {} if codes is None else codes,
    )
    balance = None
    if variant.own_balance and statistics is not None:
        balance, encodings, codes = balance_of(statistics), {}, {}
        weight = weight.float() * balance
    if variant.block_seeds:
        seed = seed * 7919 + zlib.crc32(row.name.rpartition(".")[0].encode())
    assert row.spec is not None
    assert row.spec.tokens is not None
    width = row.in_features, row.spec.tokens.bits, seed
    encoding = encodings.get(width) or Encoding(variant, *width, balance, weight.device)
    encodings[width] = encoding
    spec = replace(row.spec, tokens=None, seed=seed)
    key = row.name, spec, variant.before
    if key not in codes:
        given = weight if encoding.before is None else encoding.before(weight.double())
        codes[key] = quantize_weight(given, spec, f"{row.name}.weight")
    layer = VariantLinear(OrbitLinear(spec, linear.bias, codes[key], dtype=linear.weight.dtype), encoding)
    if balance is not None:
        layer.coded.balance = nn.Parameter(balance.to(torch.bfloat16), requires_grad=False)  # to be counted
    if variant.own_mean and statistics is not None:
        mean = statistics.mean
        error = weight.float() @ mean - layer.values @ encoding.mix(mean) * layer.row_scales
        bias = error if linear.bias is None else linear.bias.detach().float() + error
        layer.coded.bias = nn.Parameter(bias.to(linear.weight.dtype), requires_grad=False)
    return layer


def balance_of(statistics: Statistics) -> Tensor:
    """D (in,), in bf16 as it would be stored: the weight is multiplied by it and the input divided.

    Errors of codes are spread evenly by the rotation, whatever they are errors of: the output errs by |W D|^2 |x / D|^2
    times a constant, which is least for D_j^4 = E x_j^2 / |W_j|^2. The weights' columns differ little, and layers with
    the same input need the same D: they are left out.
    """
    moments = statistics.hessian.diagonal()
    return (moments / moments.mean()).clamp(1e-4, 1e4).pow(0.25).to(torch.bfloat16).float()


@torch.no_grad()
def quantize_variant_(
    model: nn.Module,
    name: str,
    bits: str,
    seed: int = 0,
    statistics: Mapping[str, Statistics] | None = None,
    states: int = 12,
    codes: Codes | None = None,
) -> None:
    """Quantize `model` in place by the variant `name` of VARIANTS at `bits` ("w2a4"), trellises with 2^`states` states.

    Modulation layers become INT4, as `orbitdit.quantize_` makes them. `statistics` by layer are needed for variants
    with `own_mean` or `own_balance`; `codes` are those of the same model, read and added to. Raises ConfigError for an
    unknown variant, for bits that it is not for and for missing statistics, and as `orbitdit.quantize_` does; the model
    is unchanged then.
    """
    if name not in VARIANTS:
        raise ConfigError(f"variant {name!r} is unknown; choose one of {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    options = {"seed": seed, "trellis_states": states, "scale": "unbiased-rows", "centred_bits": ()}
    config = OrbitQuantConfig(bits, **options)
    if config.label not in variant.bits:
        raise ConfigError(f"variant {name} is for {' and '.join(variant.bits)}, not for {config.label}")
    found = plan(model, config)
    if variant.allotted:
        of_layer = allotted(model, found.select("quantize"), config.weight_bits)
        rules = [(layer, f"w{b}a{config.activation_bits}") for layer, b in of_layer.items()]
        found = plan(model, OrbitQuantConfig(bits, rules=rules, trellis_bits=tuple(TRELLIS_ERRORS), **options))
    made: dict[str, nn.Module] = {}
    encodings: Encodings = {}
    for row in found.select("quantize", "int4"):
        linear = linear_named(model, row.name)
        check_weight(linear.weight, f"{row.name}.weight")
        if row.action == "int4":
            made[row.name] = quantize_layer(linear, row)
        else:
            own = (statistics or {}).get(row.name)
            made[row.name] = variant_layer(linear, row, variant, seed, own, encodings, codes)
    for layer, module in made.items():
        replace_module(model, layer, module)
