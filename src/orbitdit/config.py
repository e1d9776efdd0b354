"""What to do with a model, as one frozen value that travels with the checkpoint.

`OrbitQuantConfig("w4a4")` is all most people need. Everything else about a quantized model follows from this
value and the model's layer names and shapes (see `policy`), so a saved model stores it and nothing more.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from orbitdit.errors import ConfigError

FORMAT_VERSION = 4
"""Version 1 had no scales and codebooks to choose from: its models are those of the paper's recipe. What was
"unbiased" in version 2 is "unbiased-rows". Up to version 3 no tokens were centred."""
WEIGHT_BITS = (2, 3, 4, 6, 8)
ACTIVATION_BITS = (3, 4, 6, 8, 16)
ACTIONS = ("quantize", "int4", "keep")
SCALES = ("unbiased", "unbiased-rows", "norm")
CODEBOOKS = ("trellis", "scalar")
TRELLIS_BITS = (2, 3, 4)
TRELLIS_STATES = (8, 10, 12)
"""What there are trellises for: bits a weight, and log2 of the number of states."""
CENTRED_BITS, MEAN_TOKENS = (3, 4), 16
"""The activation bits at which tokens can be centred, and how many consecutive ones share a mean (see
`kernels.centring`)."""


class Recipe(NamedTuple):
    """How weights become codes: see the fields of the same names in `OrbitQuantConfig`."""

    scale: str
    trellis_bits: tuple[int, ...]
    centred_bits: tuple[int, ...]
    trellis_states: int = 12


RECIPES = {"best": Recipe("unbiased", (2, 3), (3,)), "paper": Recipe("norm", (), ())}
"""At 4 bits a trellis halves the weights' error too, but pictures came no closer (24 prompts of the embedded model).
Tokens of 4 bits are centred, too, beside weights of 2 bits: there it is worth its time (docs/quality.md)."""


class QuantMethod(str, Enum):
    """The name under which diffusers finds this quantizer."""

    ORBITDIT = "orbitdit"


def parse_bits(text: str) -> tuple[int, int]:
    """("w2a4") -> (2, 4), weight and activation bits. Raises ConfigError for anything else."""
    match = re.fullmatch(r"w([0-9]+)a([0-9]+)", text.lower()) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"bits {text!r} are not understood; write them as 'w4a4', 'w2a4' or 'w4a16'")
    bits = int(match[1]), int(match[2])
    _check_bits(*bits)
    return bits


def _check_bits(weight_bits: int, activation_bits: int) -> None:
    _check_choice("weight_bits", weight_bits, WEIGHT_BITS)
    _check_choice("activation_bits", activation_bits, ACTIVATION_BITS)


@dataclasses.dataclass(frozen=True)
class OrbitQuantConfig:
    """How to quantize: `OrbitQuantConfig("w4a4")`, or by name: `OrbitQuantConfig(weight_bits=4, activation_bits=4)`.

    Args:
        bits: shorthand for the two widths, such as "w2a4"; it excludes naming them.
        recipe: "best" (if left out) or "paper": what `scale`, `trellis_bits`, `trellis_states` and `centred_bits` are
            where they are not given.
        codebook: "trellis" or "scalar" for weights of `weight_bits`: shorthand for `trellis_bits`, and excludes it.
        weight_bits: 2, 3, 4, 6 or 8 bits a weight code.
        activation_bits: 3, 4, 6 or 8 bits an activation code; 16 leaves the activations unquantized.
        modulation_bits: 4 stores AdaLN modulation layers as INT4 in groups of 64; 16 leaves them alone.
        scale: of a weight row; "norm" is the paper's, "unbiased" undoes the shrinking of codes, the weights' and the
            tokens', and "unbiased-rows" only the weights' (see `quantize`).
        trellis_bits: the bits (2, 3, 4) at which weights are trellis codes (see `trellis`), not scalar ones, in layers
            with bits from a rule too; the paper's recipe has none, the best one 2 and 3.
        centred_bits: the activation bits (3, 4) at which tokens are encoded less the mean of 16, which takes time (see
            `kernels.centring`), in layers with bits from a rule too; the paper's recipe has none, the best one 3, and 4
            too for `weight_bits` of 2.
        trellis_states: L, for trellises of 2^L states: 8, 10 or 12. More states, less error, longer quantizing.
        seed: seed of the rotations, 0 <= seed < 2**64.
        rules: (glob, action) pairs over module names, tried before the built-in policy, first match first. An
            action is "quantize", "int4" (weight-only, as for modulation), "keep", or bits such as "w6a6".

    Raises ConfigError for anything else. `recipe` and `codebook` are settled here and not kept: a saved configuration
    says what was done, whatever the recipes of later versions are.
    """

    bits: dataclasses.InitVar[str | None] = None
    recipe: dataclasses.InitVar[str | None] = None
    codebook: dataclasses.InitVar[str | None] = None
    weight_bits: int = None  # type: ignore[assignment]  # settled by __post_init__
    activation_bits: int = None  # type: ignore[assignment]
    modulation_bits: int = 4
    scale: str = None  # type: ignore[assignment]
    trellis_bits: Sequence[int] = None  # type: ignore[assignment]
    trellis_states: int = None  # type: ignore[assignment]
    centred_bits: Sequence[int] = None  # type: ignore[assignment]
    seed: int = 0
    rules: Sequence[tuple[str, str]] = ()

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
        if chosen.centred_bits and self.weight_bits == 2:
            chosen = chosen._replace(centred_bits=CENTRED_BITS)
        self._settle(**chosen._asdict())
        _check_choice("scale", self.scale, SCALES)
        _check_choice("trellis_states", self.trellis_states, TRELLIS_STATES)
        for name, allowed in (("trellis_bits", TRELLIS_BITS), ("centred_bits", CENTRED_BITS)):
            object.__setattr__(self, name, _check_bits_list(name, getattr(self, name), allowed))
        if not isinstance(self.rules, Sequence) or isinstance(self.rules, str):
            raise ConfigError(f"rules={self.rules!r} is not a list of (glob, action) pairs")
        object.__setattr__(self, "rules", tuple(_check_rule(rule) for rule in self.rules))
        _check_choice("modulation_bits", self.modulation_bits, (4, 16))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed!r} is not supported; choose an integer, 0 <= seed < 2**64")

    def _settle(self, **values: Any) -> None:
        """Set the fields that are not given."""
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def states(self, weight_bits: int) -> int:
        """`trellis_states` if weights of so many bits are trellis codes, else 0: scalar ones."""
        return self.trellis_states if weight_bits in self.trellis_bits else 0

    def mean_tokens(self, activation_bits: int) -> int:
        """How many consecutive tokens of so many bits share a mean that is kept apart; 0 for none."""
        return MEAN_TOKENS if activation_bits in self.centred_bits else 0

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
        fields["rules"] = [list(rule) for rule in self.rules]
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
        if version == 1:
            values = RECIPES["paper"]._asdict() | values
        elif version == 2 and values.get("scale") in (None, "unbiased"):
            values["scale"] = "unbiased-rows"
        if version < 4:
            values.setdefault("centred_bits", [])
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ConfigError(f"unknown configuration key {unknown[0]!r}; known are: {', '.join(known)}")
        return cls(**values)


def _check_choice(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`, of the same type."""
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        choices = ", ".join(str(choice) for choice in allowed if choice is not None)
        raise ConfigError(f"{name}={value!r} is not supported; choose one of {choices}")


def _bits_of(codebook: str, weight_bits: int) -> tuple[int, ...]:
    """The `trellis_bits` that `codebook` stands for."""
    _check_choice("codebook", codebook, CODEBOOKS)
    if codebook == "scalar":
        return ()
    if weight_bits not in TRELLIS_BITS:
        allowed = ", ".join(map(str, TRELLIS_BITS))
        raise ConfigError(f"codebook='trellis' takes weights of {allowed} bits, not {weight_bits}: choose 'scalar'")
    return tuple(sorted({*RECIPES["best"].trellis_bits, weight_bits}))


def _check_bits_list(name: str, values: Any, allowed: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(values, list | tuple):
        raise ConfigError(f"{name}={values!r} is not a list of bits")
    for value in values:
        _check_choice(name, value, allowed)
    return tuple(sorted(set(values)))


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
