"""What is known of diffusers' model classes: one module a family, each a single value `FAMILY`, as data.

A module that is put here is found by itself. Nothing here loads torch or diffusers.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module

Rule = tuple[str, str, str]
"""A glob of layer names, what becomes of them ("quantize", "int4" or "keep"), and the reason."""

MODULATION = "AdaLN modulation"
BLOCK = "block"
GATE = "gate"
OUTSIDE = "outside blocks"


@dataclass(frozen=True)
class Family:
    """What is known of the models of one layout.

    `models` names their classes in diffusers. `rules` decide what becomes of a linear layer, by its full name: the
    first that matches does, and what none matches is kept. Without rules the structural rule of `policy` decides.
    `shared` has tuples of layers that take the same tensor, by their names within a block; names that a block lacks are
    passed over. Where these lie in one module of the block, that module's inputs are what they share; else it is the
    output of `source`. `pending` names norms, activations and feed-forwards of a block whose step runs inside the
    encoding of the layers that follow, and says which these are, in the order of their calls; `modulation_inputs` names
    modules that begin with AdaLN's input (see `fusion`).
    """

    models: tuple[str, ...]
    rules: tuple[Rule, ...] = ()
    shared: tuple[tuple[str, ...], ...] = ()
    source: str | None = None
    pending: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modulation_inputs: tuple[str, ...] = ()


def blocks(*globs: str) -> tuple[Rule, ...]:
    """Rules for layers that carry tokens: quantized."""
    return tuple((glob, "quantize", BLOCK) for glob in globs)


def modulation(*globs: str) -> tuple[Rule, ...]:
    """Rules for AdaLN modulation: INT4."""
    return tuple((glob, "int4", MODULATION) for glob in globs)


def gates(*globs: str) -> tuple[Rule, ...]:
    """Rules for layers that give a few numbers a token, such as gates of heads and routers of experts: kept."""
    return tuple((glob, "keep", GATE) for glob in globs)


def qkv(attention: str) -> tuple[str, ...]:
    """The names of query, key and value projections that share an input in the attention of this name."""
    return tuple(f"{attention}.to_{part}" for part in "qkv")


def kv(attention: str) -> tuple[str, ...]:
    """The same of a cross-attention, whose queries come from elsewhere."""
    return tuple(f"{attention}.to_{part}" for part in "kv")


def added_qkv(attention: str) -> tuple[str, ...]:
    """The names of the projections that share the other stream's tokens in a joint attention."""
    return tuple(f"{attention}.add_{part}_proj" for part in "qkv")


def _load() -> dict[str, Family]:
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = import_module(f"{__name__}.{module.name}").FAMILY
        found.update(dict.fromkeys(family.models, family))
    return found


FAMILIES = _load()
"""Families by the names of their classes."""
