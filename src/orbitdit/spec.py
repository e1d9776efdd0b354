"""What one quantized layer is: a frozen value that the plan, checkpoints, layers and ops all take.

    LayerSpec(3072, 12288, WeightCode("trellis", 2, "unbiased", log2_states=12), TokenCode(4, group_size=16), seed=0)

Its `key` is the same thing as a short text, "3072x12288 trellis2.12.unbiased a4g16 s0". Keys are what crosses the
schemas of torch's custom ops and what checkpoints record; `LayerSpec.parse` reads them back.
"""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from orbitdit.errors import ConfigError

INT4 = "int4"
"""The codebook of weight-only layers (AdaLN modulation): symmetric round-to-nearest in groups of 64 inputs."""


@dataclass(frozen=True)
class WeightCode:
    """How a weight is coded: the name of a codebook, bits a weight, what the row scales hold (see `quantize`), and for
    a trellis the logarithm of its number of states. INT4 weights have no choice of scale."""

    codebook: str
    bits: int
    scale: str | None = None
    log2_states: int | None = None

    @property
    def key(self) -> str:
        """Such as "scalar4.norm", "trellis2.12.unbiased" or "int4"."""
        if self.codebook == INT4:
            return INT4
        states = "" if self.log2_states is None else f".{self.log2_states}"
        return f"{self.codebook}{self.bits}{states}.{self.scale}"


@dataclass(frozen=True)
class TokenCode:
    """How tokens are coded: bits a coordinate, and how many consecutive tokens of a sample share a mean whose code is
    added to theirs (None: tokens are not centred)."""

    bits: int
    group_size: int | None = None

    @property
    def key(self) -> str:
        """Such as "a4" or "a4g16"."""
        return f"a{self.bits}" if self.group_size is None else f"a{self.bits}g{self.group_size}"


@dataclass(frozen=True)
class LayerSpec:
    """One quantized layer of shape (in_features, out_features). `tokens` is None where they are not quantized. The
    rotation is drawn from `seed` (0 <= seed < 2^64) and the input width; INT4 layers have none."""

    in_features: int
    out_features: int
    weight: WeightCode
    tokens: TokenCode | None
    seed: int | None = 0

    @cached_property
    def key(self) -> str:
        """The whole value as text without spaces inside its parts; equal specs have equal keys."""
        tokens = "a16" if self.tokens is None else self.tokens.key
        seed = "" if self.seed is None else f" s{self.seed}"
        return f"{self.in_features}x{self.out_features} {self.weight.key} {tokens}{seed}"

    @property
    def label(self) -> str:
        """The usual short name: "W4A4", "W4A16" or "INT4"."""
        if self.weight.codebook == INT4:
            return "INT4"
        return f"W{self.weight.bits}A{16 if self.tokens is None else self.tokens.bits}"

    @property
    def encoding(self) -> tuple[int, TokenCode | None, str | None, int | None]:
        """What decides the encoding of this layer's tokens: layers that are equal in it can share it. (The scale
        decides by what factor the codes of means are multiplied.)"""
        return self.in_features, self.tokens, self.weight.scale, self.seed

    def encoding_on(self, grid: str) -> "Encoding":
        """How tokens are encoded on a number grid, or for "exact" as centroids."""
        assert self.tokens is not None
        assert self.seed is not None
        tokens, unbiased = self.tokens, self.weight.scale == "unbiased"
        return Encoding(self.in_features, tokens.bits, grid, self.seed, tokens.group_size, unbiased)

    @staticmethod
    def parse(key: str) -> "LayerSpec":
        """The spec that has this key. Raises ConfigError for any other text."""
        return _parse(key)


_KEY = re.compile(
    r"(?P<dim>[1-9]\d{0,8})x(?P<rows>[1-9]\d{0,8}) "
    r"(?:int4|(?P<codebook>[a-z_]+)(?P<bits>\d)(?:\.(?P<states>\d{1,2}))?\.(?P<scale>[a-z-]+)) "
    r"a(?P<token_bits>\d{1,2})(?:g(?P<group>\d{1,6}))?(?: s(?P<seed>\d{1,20}))?"
)


@lru_cache(maxsize=4096)
def _parse(key: str) -> LayerSpec:
    found = _KEY.fullmatch(key)
    if found is None:
        raise ConfigError(f"{key!r} describes no layer: it should read like '3072x3072 scalar4.unbiased a4 s0'")
    number = {name: None if text is None else int(text) for name, text in found.groupdict().items() if name in _NUMBERS}
    code = WeightCode(INT4, 4)
    if found["codebook"] is not None:
        code = WeightCode(found["codebook"], int(found["bits"]), found["scale"], number["states"])
    tokens = None if found["token_bits"] == "16" else TokenCode(int(found["token_bits"]), number["group"])
    return LayerSpec(int(found["dim"]), int(found["rows"]), code, tokens, number["seed"])


_NUMBERS = ("states", "group", "seed")


@dataclass(frozen=True)
class Encoding:
    """How tokens of `dim` coordinates become values on a number grid: C(dim, bits) on `grid`, after the rotation that
    `seed` draws. `group_size` consecutive ones of a sample share a mean (None: they are not centred), whose code is
    multiplied by a factor where the rows' scales undo the shrinking of tokens (`unbiased`; see
    `ops.rotate_encode.means`)."""

    dim: int
    bits: int
    grid: str
    seed: int = 0
    group_size: int | None = None
    unbiased: bool = False


@dataclass(frozen=True)
class Projection:
    """What one call of the op `linear` computes: layers side by side on the same tokens (they encode alike), the number
    grid that they are multiplied on, and the elementwise step that comes before the encoding ("" for none; see
    `ops.rotate_encode.reference.apply_prologue`)."""

    layers: tuple[LayerSpec, ...]
    grid: str
    prologue: str = ""

    @staticmethod
    def key_of(layer_keys: "tuple[str, ...] | list[str]", grid: str, prologue: str = "") -> str:
        """The text that `parse` reads back. Kept short of any search: it is made in every call of a layer."""
        return f"{grid}|{prologue}|{'+'.join(layer_keys)}"

    @staticmethod
    def parse(key: str) -> "Projection":
        """The projection that has this key. Raises ConfigError for any other text."""
        return _parse_projection(key)

    @property
    def first(self) -> LayerSpec:
        """The first of the layers: all encode as it does."""
        return self.layers[0]

    @cached_property
    def tokens(self) -> Encoding:
        """How the tokens are encoded."""
        return self.layers[0].encoding_on(self.grid)

    @cached_property
    def out_features(self) -> int:
        """Outputs of all layers together."""
        return sum(layer.out_features for layer in self.layers)

    @cached_property
    def decodes_together(self) -> bool:
        """Whether all weights have the same code, so that one kernel decodes them."""
        return all(layer.weight == self.layers[0].weight for layer in self.layers)


@lru_cache(maxsize=4096)
def _parse_projection(key: str) -> Projection:
    if key.count("|") != 2:
        raise ConfigError(f"{key!r} describes no projection: it should read like 'int8||3072x3072 scalar4.norm a4 s0'")
    grid, prologue, layers = key.split("|")
    return Projection(tuple(map(LayerSpec.parse, layers.split("+"))), grid, prologue)
