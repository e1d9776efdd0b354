"""Layers, specs of layers and keys of projections from bits, in one call each."""

from torch import nn

from orbitdit import Int4Linear, OrbitLinear
from orbitdit.spec import INT4, LayerSpec, Projection, TokenCode, WeightCode


def code(bits: int, states: int | None = None, scale: str = "norm") -> WeightCode:
    """Trellis codes of 2^`states` states, or scalar ones."""
    return WeightCode("scalar" if states is None else "trellis", bits, scale, states)


def spec(
    dim: int,
    rows: int,
    weight_bits: int = 4,
    token_bits: int = 4,
    seed: int = 0,
    group_size: int | None = None,
    **coding,
) -> LayerSpec:
    """A layer with weights as `code` says, which takes the rest; tokens of 16 bits are not coded."""
    tokens = None if token_bits == 16 else TokenCode(token_bits, group_size)
    return LayerSpec(dim, rows, code(weight_bits, **coding), tokens, seed)


def int4_spec(dim: int, rows: int) -> LayerSpec:
    """A layer of weight-only INT4."""
    return LayerSpec(dim, rows, WeightCode(INT4, 4), None, None)


def key_of(*specs: LayerSpec, grid: str, prologue: str = "") -> str:
    """The key of the projection of these layers, side by side."""
    return Projection.key_of([each.key for each in specs], grid, prologue)


def tokens_key(dim: int, bits: int, grid: str, seed: int = 0) -> str:
    """A key by which the op `rotate_encode` takes tokens: C(dim, bits) on `grid`."""
    return key_of(spec(dim, 16, 4, bits, seed), grid=grid)


def orbit(
    linear: nn.Linear, weight_bits: int = 4, token_bits: int = 4, seed: int = 0, name: str = "weight", **coding
) -> OrbitLinear:
    """`linear` quantized; see `spec`."""
    shape = linear.in_features, linear.out_features
    return OrbitLinear.from_linear(linear, spec(*shape, weight_bits, token_bits, seed, **coding), name)


def int4(linear: nn.Linear, name: str = "weight") -> Int4Linear:
    """`linear` in INT4."""
    return Int4Linear.from_linear(linear, int4_spec(linear.in_features, linear.out_features), name)
