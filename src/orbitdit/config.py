"""What to do with a model, as one frozen value that travels with the checkpoint.

`OrbitQuantConfig("w4a4")` is all most people need. Everything else about a quantized model follows from this
value and the model's layer names and shapes (see `policy`), so a saved model stores it and nothing more.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from orbitdit.errors import ConfigError
from orbitdit.spec import LayerSpec, TokenCode, WeightCode

FORMAT_VERSION = 5
"""What each version changed: see `MIGRATIONS`."""
WEIGHT_BITS = (2, 3, 4, 6, 8)
ACTIVATION_BITS = (3, 4, 6, 8, 16)
ACTIONS = ("quantize", "int4", "keep")
SCALES = ("unbiased", "unbiased-rows", "norm")
CODEBOOKS = ("trellis", "scalar", "uniform")
"""Names of codebooks that weights can have (see `codebooks`)."""
TRELLIS_BITS = (2, 3, 4)
TRELLIS_STATES = (8, 10, 12)
"""What there are trellises for: bits a weight, and log2 of the number of states."""
CENTRED_BITS, MEAN_TOKENS = (3, 4), 16
"""The activation bits at which tokens can be centred, and how many consecutive ones share a mean (see
`ops.rotate_encode.means`)."""


class Recipe(NamedTuple):
    """How weights become codes: see the fields of the same names in `OrbitQuantConfig`."""

    scale: str
    trellis_bits: tuple[int, ...]
    centred_bits: tuple[int | str, ...]
    trellis_states: int = 12


RECIPES = {"best": Recipe("unbiased", (2, 3), (3, "w2a4")), "paper": Recipe("norm", (), ())}
"""At 4 bits a trellis halves the weights' error too, but pictures came no closer (24 prompts of the embedded model).
Tokens of 4 bits are centred beside weights of 2 bits alone: there it is worth its time (docs/quality.md)."""


class QuantMethod(str, Enum):
    """The name under which diffusers finds this quantizer."""

    ORBITDIT = "orbitdit"


def parse_bits(text: str) -> tuple[int, int]:
    """("w2a4") -> (2, 4), weight and activation bits. Raises ConfigError for anything else."""
    match = re.fullmatch(r"w([0-9]{1,3})a([0-9]{1,3})", text.lower()) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"bits {text!r:.80} are not understood; write them as 'w4a4', 'w2a4' or 'w4a16'")
    bits = int(match[1]), int(match[2])
    _check_bits(*bits)
    return bits


def _check_bits(weight_bits: int, activation_bits: int) -> None:
    _check_choice("weight_bits", weight_bits, WEIGHT_BITS)
    _check_choice("activation_bits", activation_bits, ACTIVATION_BITS)


SETTLED: Any = None
"""The default of fields that the recipe or the shorthand settles, if they are not given."""


@dataclasses.dataclass(frozen=True)
class OrbitQuantConfig:
    """How to quantize: `OrbitQuantConfig("w4a4")`, or by name: `OrbitQuantConfig(weight_bits=4, activation_bits=4)`.

    Args:
        bits: shorthand for the two widths, such as "w2a4"; it excludes naming them.
        recipe: "best" (if left out) or "paper": what `scale`, `trellis_bits`, `trellis_states` and `centred_bits` are
            where they are not given.
        codebook: "trellis" for weights of `weight_bits`, or one for all weights, such as "scalar": shorthand for
            `trellis_bits` and `scalar_codebook`; it excludes the former, and another value of the latter.
        weight_bits: 2, 3, 4, 6 or 8 bits a weight code.
        activation_bits: 3, 4, 6 or 8 bits an activation code; 16 leaves the activations unquantized.
        modulation_bits: 4 stores AdaLN modulation layers as INT4 in groups of 64; 16 leaves them alone.
        scale: of a weight row; "norm" is the paper's, "unbiased" undoes the shrinking of codes, the weights' and the
            tokens', and "unbiased-rows" only the weights' (see `quantize`).
        trellis_bits: the bits (2, 3, 4) at which weights are trellis codes (see `trellis`), not scalar ones, in layers
            with bits from a rule too; the paper's recipe has none, the best one 2 and 3.
        centred_bits: where the codes of tokens are sums, of that of a mean of 16 and of what is left without it, which
            takes time (see `ops.rotate_encode.means`): activation bits (3, 4), or both widths such as "w2a4". It goes
            by the bits of each layer, those from a rule too; tokens that are wider than most of the model's never are
            (see `policy`). The paper's recipe has none, the best one (3, "w2a4").
        trellis_states: L, for trellises of 2^L states: 8, 10 or 12. More states, less error, longer quantizing.
        scalar_codebook: the codebook of weights that are no trellis codes (see `codebooks`): "scalar", which is
            Lloyd-Max, if left out.
        seed: seed of the rotations, 0 <= seed < 2**64.
        rules: (glob, action) pairs over module names, tried before the built-in policy, first match first. An
            action is "quantize", "int4" (weight-only, as for modulation), "keep", or bits such as "w6a6".
        layers: of a quantized model, what each layer became: pairs of names and keys of specs (see `spec`). A saved
            model has this record, and is loaded by it; quantizing does not look at it.
        fingerprint: in the configuration of a saved model, that of its manifest (see docs/format.md).

    Raises ConfigError for anything else. `recipe` and `codebook` are settled here and not kept: a saved configuration
    says what was done, whatever the recipes of later versions are.
    """

    bits: dataclasses.InitVar[str | None] = None
    recipe: dataclasses.InitVar[str | None] = None
    codebook: dataclasses.InitVar[str | None] = None
    weight_bits: int = SETTLED
    activation_bits: int = SETTLED
    modulation_bits: int = 4
    scale: str = SETTLED
    trellis_bits: Sequence[int] = SETTLED
    trellis_states: int = SETTLED
    centred_bits: Sequence[int | str] = SETTLED
    scalar_codebook: str = SETTLED
    seed: int = 0
    rules: Sequence[tuple[str, str]] = ()
    layers: Sequence[tuple[str, str]] = dataclasses.field(default=(), compare=False, repr=False)
    fingerprint: str = dataclasses.field(default="", compare=False, repr=False)

    def __post_init__(self, bits: str | None, recipe: str | None, codebook: str | None) -> None:
        given = [b for b in (self.weight_bits, self.activation_bits) if b is not None]
        if bits is not None and given:
            raise ConfigError("give either bits ('w4a4') or weight_bits and activation_bits, not both")
        weight_bits, activation_bits = parse_bits(bits) if bits is not None else (4, 4)
        self._settle(weight_bits=weight_bits, activation_bits=activation_bits)
        _check_bits(self.weight_bits, self.activation_bits)
        _check_choice("recipe", recipe, (None, *RECIPES))
        chosen = RECIPES[recipe or "best"]
        if codebook is not None:
            if self.trellis_bits is not None:
                raise ConfigError("give either codebook ('trellis' or 'scalar') or trellis_bits, not both")
            chosen = chosen._replace(trellis_bits=_bits_of(codebook, self.weight_bits))
            if codebook != "trellis":
                self._settle(scalar_codebook=codebook)
                if self.scalar_codebook != codebook:
                    raise ConfigError(
                        f"codebook={codebook!r} and scalar_codebook={self.scalar_codebook!r}: give one of them"
                    )
        self._settle(scalar_codebook="scalar")
        _check_choice("scalar_codebook", self.scalar_codebook, [name for name in CODEBOOKS if name != "trellis"])
        self._settle(**chosen._asdict())
        _check_choice("scale", self.scale, SCALES)
        _check_choice("trellis_states", self.trellis_states, TRELLIS_STATES)
        object.__setattr__(self, "trellis_bits", _check_trellis_bits(self.trellis_bits))
        object.__setattr__(self, "centred_bits", _check_centred_bits(self.centred_bits))
        if not isinstance(self.rules, Sequence) or isinstance(self.rules, str):
            raise ConfigError(f"rules={self.rules!r} is not a list of (glob, action) pairs")
        object.__setattr__(self, "rules", tuple(_check_rule(rule) for rule in self.rules))
        object.__setattr__(self, "layers", _check_layers(self.layers))
        if not isinstance(self.fingerprint, str):
            raise ConfigError(f"fingerprint={self.fingerprint!r} is no text: the configuration is damaged")
        _check_choice("modulation_bits", self.modulation_bits, (4, 16))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed!r} is not supported; choose an integer, 0 <= seed < 2**64")

    def _settle(self, **values: Any) -> None:
        """Set the fields that are not given."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def layer(self, shape: tuple[int, int], bits: tuple[int, int] | None = None) -> LayerSpec:
        """What a quantized layer of `shape` (in, out) becomes, at its own `bits` (weight, activation) or this value's.

        The recipe goes by the bits of the layer: a rule "w2a4" gives what `OrbitQuantConfig("w2a4")` does.
        """
        weight_bits, activation_bits = bits or (self.weight_bits, self.activation_bits)
        trellis = weight_bits in self.trellis_bits
        states = self.trellis_states if trellis else None
        code = WeightCode("trellis" if trellis else self.scalar_codebook, weight_bits, self.scale, states)
        if activation_bits == 16:
            return LayerSpec(*shape, code, None, self.seed)
        centred = activation_bits in self.centred_bits or f"w{weight_bits}a{activation_bits}" in self.centred_bits
        return LayerSpec(*shape, code, TokenCode(activation_bits, MEAN_TOKENS if centred else None), self.seed)

    @property
    def label(self) -> str:
        """The usual short name of the two widths, such as "W4A4"."""
        return f"W{self.weight_bits}A{self.activation_bits}"

    @property
    def quant_method(self) -> QuantMethod:
        """The name that diffusers asks for."""
        return QuantMethod.ORBITDIT

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, with the method's name and the format version."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields |= {"trellis_bits": list(self.trellis_bits), "centred_bits": list(self.centred_bits)}
        fields |= {"rules": [list(rule) for rule in self.rules], "layers": dict(self.layers)}
        for name in ("layers", "fingerprint"):
            if not fields[name]:
                del fields[name]
        return {"quant_method": self.quant_method.value, "format_version": FORMAT_VERSION, **fields}

    to_diff_dict = to_dict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OrbitQuantConfig":
        """Inverse of `to_dict`; what is missing takes its default, in older versions what they did.

        Raises ConfigError for unknown keys, another method or a newer format version.
        """
        values = dict(values)
        method = values.pop("quant_method", QuantMethod.ORBITDIT)
        if method != QuantMethod.ORBITDIT:
            raise ConfigError(f"quant_method={method!r} is not orbitdit's; load this model with its own library")
        version = values.pop("format_version", FORMAT_VERSION)
        if type(version) is not int or version < 1:
            raise ConfigError(f"format_version={version!r} is no version: the configuration is damaged")
        if version > FORMAT_VERSION:
            raise ConfigError(f"format_version={version} is newer than this orbitdit reads: upgrade orbitdit")
        for old in range(version, FORMAT_VERSION):
            values = MIGRATIONS[old](values)
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ConfigError(f"unknown configuration key {unknown[0]!r}; known are: {', '.join(known)}")
        return cls(**values)


def _paper_recipe(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 had no scales and codebooks to choose from: its models are those of the paper's recipe."""
    return {**RECIPES["paper"]._asdict(), **values}


def _unbiased_rows(values: dict[str, Any]) -> dict[str, Any]:
    """What was "unbiased" in version 2 is "unbiased-rows"."""
    scale = values.get("scale")
    return {**values, "scale": "unbiased-rows" if scale in (None, "unbiased") else scale}


def _uncentred(values: dict[str, Any]) -> dict[str, Any]:
    """Up to version 3 no tokens were centred."""
    return {"centred_bits": [], **values}


def _centred_by_activation_bits(values: dict[str, Any]) -> dict[str, Any]:
    """Up to version 4 the recipe went by the weight bits of the whole model, and `centred_bits` had no widths such as
    "w2a4"."""
    return {"centred_bits": [3, 4] if values.get("weight_bits") == 2 else [3], **values}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {
    1: _paper_recipe,
    2: _unbiased_rows,
    3: _uncentred,
    4: _centred_by_activation_bits,
}
"""By format version: its dictionary in, that of the next version out."""


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise ConfigError(f"{name}={value!r} is not supported; choose one of {choices}")


def _bits_of(codebook: str, weight_bits: int) -> tuple[int, ...]:
    """The `trellis_bits` that `codebook` stands for."""
    _check_choice("codebook", codebook, CODEBOOKS)
    if codebook != "trellis":
        return ()
    if weight_bits not in TRELLIS_BITS:
        allowed = ", ".join(map(str, TRELLIS_BITS))
        raise ConfigError(f"codebook='trellis' takes weights of {allowed} bits, not {weight_bits}: choose 'scalar'")
    return tuple(sorted({*RECIPES["best"].trellis_bits, weight_bits}))


def _check_trellis_bits(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"trellis_bits={values!r} is not a list of bits")
    for value in values:
        _check_choice("trellis_bits", value, TRELLIS_BITS)
    return tuple(sorted(set(values)))


def _check_centred_bits(values: Any) -> tuple[int | str, ...]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"centred_bits={values!r} is not a list of bits")
    for value in values:
        _check_choice("centred_bits", parse_bits(value)[1] if isinstance(value, str) else value, CENTRED_BITS)
    return tuple(sorted({v.lower() if isinstance(v, str) else v for v in values}, key=str))


def _check_layers(values: Any) -> tuple[tuple[str, str], ...]:
    pairs = list(values.items()) if isinstance(values, Mapping) else values
    if not isinstance(pairs, list | tuple):
        raise ConfigError(f"layers={values!r} is no record of layers: the configuration is damaged")
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ConfigError(f"{pair!r} is no record of a layer: the configuration is damaged")
        LayerSpec.parse(pair[1])
    return tuple((name, key) for name, key in pairs)


def _check_rule(rule: Any) -> tuple[str, str]:
    if not isinstance(rule, list | tuple) or len(rule) != 2 or not all(isinstance(part, str) for part in rule):
        raise ConfigError(f"rule {rule!r} is not a (glob, action) pair")
    glob, action = rule
    if action not in ACTIONS:
        try:
            parse_bits(action)
        except ConfigError:
            raise ConfigError(
                f"rule for {glob!r}: action {action!r} is unknown; choose {', '.join(ACTIONS)} or bits such as 'w6a6'"
            ) from None
    return glob, action
