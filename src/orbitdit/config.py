"""What to do with a model, as one frozen value that travels with the checkpoint.

`OrbitQuantConfig("w4a4")` is all most people need. Everything else about a quantized model follows from this
value and the model's layer names and shapes (see `policy`), so a saved model stores it and nothing more.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from orbitdit.errors import ConfigError

FORMAT_VERSION = 1
WEIGHT_BITS = (2, 3, 4, 6, 8)
ACTIVATION_BITS = (3, 4, 6, 8, 16)
ACTIONS = ("quantize", "int4", "keep")


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
    for name, bits, allowed in (
        ("weight_bits", weight_bits, WEIGHT_BITS),
        ("activation_bits", activation_bits, ACTIVATION_BITS),
    ):
        if type(bits) is not int or bits not in allowed:
            raise ConfigError(f"{name}={bits!r} is not supported; choose one of {', '.join(map(str, allowed))}")


@dataclasses.dataclass(frozen=True)
class OrbitQuantConfig:
    """How to quantize: `OrbitQuantConfig("w4a4")`, or by name: `OrbitQuantConfig(weight_bits=4, activation_bits=4)`.

    Args:
        bits: shorthand for the two widths, such as "w2a4"; it excludes naming them.
        weight_bits: 2, 3, 4, 6 or 8 bits a weight code.
        activation_bits: 3, 4, 6 or 8 bits an activation code; 16 leaves the activations unquantized.
        modulation_bits: 4 stores AdaLN modulation layers as INT4 in groups of 64; 16 leaves them alone.
        seed: seed of the rotations, 0 <= seed < 2**64.
        rules: (glob, action) pairs over module names, tried before the built-in policy, first match first. An
            action is "quantize", "int4" (weight-only, as for modulation), "keep", or bits such as "w6a6".

    Raises ConfigError for anything else.
    """

    bits: dataclasses.InitVar[str | None] = None
    weight_bits: int = None  # type: ignore[assignment]  # settled by __post_init__
    activation_bits: int = None  # type: ignore[assignment]
    modulation_bits: int = 4
    seed: int = 0
    rules: Sequence[tuple[str, str]] = ()

    def __post_init__(self, bits: str | None) -> None:
        given = [b for b in (self.weight_bits, self.activation_bits) if b is not None]
        if bits is not None and given:
            raise ConfigError("give either bits ('w4a4') or weight_bits and activation_bits, not both")
        weight_bits, activation_bits = parse_bits(bits) if bits is not None else (4, 4)
        if self.weight_bits is None:
            object.__setattr__(self, "weight_bits", weight_bits)
        if self.activation_bits is None:
            object.__setattr__(self, "activation_bits", activation_bits)
        if not isinstance(self.rules, Sequence) or isinstance(self.rules, str):
            raise ConfigError(f"rules={self.rules!r} is not a list of (glob, action) pairs")
        object.__setattr__(self, "rules", tuple(_check_rule(rule) for rule in self.rules))
        _check_bits(self.weight_bits, self.activation_bits)
        if type(self.modulation_bits) is not int or self.modulation_bits not in (4, 16):
            raise ConfigError(f"modulation_bits={self.modulation_bits!r} is not supported; choose 4 or 16")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed={self.seed!r} is not supported; choose an integer, 0 <= seed < 2**64")

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
        fields["rules"] = [list(rule) for rule in self.rules]
        return {"quant_method": self.quant_method.value, "format_version": FORMAT_VERSION, **fields}

    to_diff_dict = to_dict

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OrbitQuantConfig":
        """Inverse of `to_dict`. Raises ConfigError for unknown keys, another method or a newer format version."""
        values = dict(values)
        method = values.pop("quant_method", QuantMethod.ORBITDIT)
        if method != QuantMethod.ORBITDIT:
            raise ConfigError(f"quant_method={method!r} is not orbitdit's; load this model with its own library")
        version = values.pop("format_version", FORMAT_VERSION)
        if type(version) is not int or version < 1:
            raise ConfigError(f"format_version={version!r} is no version: the configuration is damaged")
        if version > FORMAT_VERSION:
            raise ConfigError(f"format_version={version} is newer than this orbitdit reads: upgrade orbitdit")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ConfigError(f"unknown configuration key {unknown[0]!r}; known are: {', '.join(known)}")
        return cls(**values)


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
