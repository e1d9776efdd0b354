"""Which layer gets what: module names and shapes in, a Plan out. Rules are data; tensors are never seen.

A rule is (glob, action, reason); the first that matches a layer's name decides. The user's rules come first,
then those of the model's family (see `families`), and for a class of no family a structural rule: repeated
blocks are quantized, modulation inside them is INT4, and everything outside them is kept, as are embedders and
repeated blocks that do not carry the model's tokens.
Source: OrbitQuant, arXiv 2607.02461 (which layers), diffusers' module names.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import NamedTuple

from orbitdit.config import OrbitQuantConfig, parse_bits
from orbitdit.errors import ConfigError
from orbitdit.families import BLOCK, FAMILIES, GATE, OUTSIDE, Rule
from orbitdit.families import MODULATION as _MODULATION
from orbitdit.packing import GROUP, packed_width
from orbitdit.spec import INT4, LayerSpec, TokenCode, WeightCode

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_EMBEDDER = re.compile(r"embed|(^|[._])emb([._]|$)")
_MODULATION_NAME = re.compile(r"(^|[._])(ada|film|mod(?!al|el|ule)|norm|scale|shift)", re.IGNORECASE)
_IN_MODULATION = re.compile(r"(^|[._])(ada\w*|mod(ulation)?|norm\d*(_context)?)\.[^.]+$", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention|mha|(^|[._])w?(q|qkv|query)([._]|$)", re.IGNORECASE)
_GATE_NAME = re.compile(r"beta|bias|gate|logits|router", re.IGNORECASE)
_EXPERT = re.compile(r"\.experts\.\d+(\.|$)")
_U_NET = re.compile(r"(down|mid|up)_block")


class Layer(NamedTuple):
    """What the policy sees of a linear layer: `itemsize` is the bytes of one stored weight, `plain` whether it is an
    `nn.Linear` itself (a subclass may use its weight in ways of its own, and is kept)."""

    name: str
    in_features: int
    out_features: int
    bias: bool
    itemsize: int = 2
    plain: bool = True


@dataclass(frozen=True)
class LayerPlan:
    """One layer's fate: `spec` is what it becomes, None if it is kept. Bytes count weight, scales and bias."""

    name: str
    in_features: int
    out_features: int
    spec: LayerSpec | None
    reason: str
    bytes_before: int
    bytes_after: int

    @property
    def action(self) -> str:
        """ "quantize", "int4" or "keep"."""
        if self.spec is None:
            return "keep"
        return "int4" if self.spec.weight.codebook == INT4 else "quantize"

    @property
    def weights(self) -> int:
        """Number of weights, biases not counted."""
        return self.in_features * self.out_features

    @property
    def block_size(self) -> int:
        """h, the size of the rotation's Hadamard blocks."""
        return self.in_features & -self.in_features

    @property
    def label(self) -> str:
        """The fate in a word: "W4A4", "INT4" or "kept"."""
        return "kept" if self.spec is None else self.spec.label

    @property
    def coding(self) -> str:
        """How a quantized layer is coded: "trellis 2^12, unbiased, centred by 16" or "scalar, norm"; else empty."""
        if self.spec is None or self.action == "int4":
            return ""
        code, tokens = self.spec.weight, self.spec.tokens
        states = "" if code.log2_states is None else f" 2^{code.log2_states}"
        centred = "" if tokens is None or tokens.group_size is None else f", centred by {tokens.group_size}"
        return f"{code.codebook}{states}, {code.scale}{centred}"


@dataclass(frozen=True)
class Plan:
    """One row for each linear layer of a model, in the model's order, and their totals."""

    model: str
    config: OrbitQuantConfig
    layers: tuple[LayerPlan, ...]

    def select(self, *actions: str) -> list[LayerPlan]:
        """The rows with one of these actions."""
        return [row for row in self.layers if row.action in actions]

    @property
    def counts(self) -> tuple[int, int, int]:
        """Numbers of layers quantized, stored as INT4, and kept."""
        quantized, int4, kept = (len(self.select(action)) for action in ("quantize", "int4", "keep"))
        return quantized, int4, kept

    @property
    def recorded(self) -> OrbitQuantConfig:
        """The configuration with a record of what each layer becomes, as a quantized model has it."""
        return replace(self.config, layers=tuple((row.name, row.spec.key) for row in self.layers if row.spec))

    @property
    def bytes_before(self) -> int:
        """Bytes of all changed layers (quantized and INT4) before."""
        return sum(row.bytes_before for row in self.select("quantize", "int4"))

    @property
    def bytes_after(self) -> int:
        """Bytes of all changed layers (quantized and INT4) after."""
        return sum(row.bytes_after for row in self.select("quantize", "int4"))

    @property
    def effective_bits(self) -> float:
        """See `effective_bits`."""
        return effective_bits(self.layers)

    def groups(self) -> list[tuple[str, int, LayerPlan]]:
        """Rows that differ in block numbers alone, as (pattern, how many, one of them)."""
        found: dict[tuple[object, ...], list[LayerPlan]] = {}
        for row in self.layers:
            pattern = re.sub(r"\.\d+(?=\.)", ".*", row.name, count=1)
            key = (pattern, row.in_features, row.out_features, row.label, row.reason)
            found.setdefault(key, []).append(row)
        return [(str(key[0]) if len(rows) > 1 else rows[0].name, len(rows), rows[0]) for key, rows in found.items()]


def effective_bits(layers: Iterable[LayerPlan]) -> float:
    """Stored bits (codes and scales) per weight of the quantized layers, or of the INT4 ones if there are no others."""
    rows = list(layers)
    chosen = [r for r in rows if r.action == "quantize"] or [r for r in rows if r.action == "int4"]
    stored = sum(coded_size(r.spec) for r in chosen if r.spec is not None)
    return 8 * stored / max(1, sum(r.weights for r in chosen))


def build_plan(model: str, layers: Iterable[Layer], config: OrbitQuantConfig) -> Plan:
    """The plan for a model of class name `model` with these linear layers (in order).

    Raises ConfigError for a rule of the configuration that matches no layer.
    """
    layers = list(layers)
    for glob, _ in config.rules:
        if not any(fnmatchcase(layer.name, glob) for layer in layers):
            raise ConfigError(f"rule {glob!r} matches no linear layer of {model}: see orbitdit plan for their names")
    own = tuple((glob, action, f"rule {glob!r}") for glob, action in config.rules)
    family = FAMILIES.get(model)
    if family and family.rules:
        found: Iterable[tuple[Rule, ...]] = [(*family.rules, ("*", "keep", OUTSIDE))] * len(layers)
    else:
        found = [(rule,) for rule in _structural_rules(layers)]
    rows = [_decide(layer, (*own, *rules), config) for layer, rules in zip(layers, found, strict=True)]
    return Plan(model, config, tuple(_centred_where_it_pays(rows)))


def _centred_where_it_pays(rows: list[LayerPlan]) -> Iterator[LayerPlan]:
    """Without means for tokens that are wider than most: those behind a feed-forward's activation gain little by them,
    and are the dearest to centre (docs/quality.md). Nor for experts, which get tokens of all samples as one."""
    widths = Counter(row.in_features for row in rows if row.action == "quantize")
    usual = max(widths, key=lambda width: widths[width], default=0)
    for row in rows:
        spec, without = row.spec, row.in_features > usual or _EXPERT.search(row.name)
        if spec and spec.tokens and spec.tokens.group_size and without:
            row = replace(row, spec=replace(spec, tokens=TokenCode(spec.tokens.bits)))
        yield row


def as_stored(plan: Plan, stored: Mapping[str, bool]) -> Plan:
    """The plan of a model whose packed layers are `stored`: names, and whether each is INT4.

    What the configuration records of each layer counts; without a record (up to format version 4) what is stored does,
    whatever the rules say today. Raises ConfigError for a packed layer that the record does not have, or has in another
    shape.
    """
    recorded = {name: LayerSpec.parse(key) for name, key in plan.config.layers}
    rows = []
    for row in plan.layers:
        shape, spec = (row.in_features, row.out_features), row.spec
        if plan.config.layers:
            spec = recorded.get(row.name)
            if spec is None and row.name in stored:
                raise ConfigError(f"the configuration has no record of the packed layer {row.name!r}: it is damaged")
            if spec is not None and (spec.in_features, spec.out_features) != shape:
                raise ConfigError(f"the configuration records {row.name!r} as {spec.key!r}; its shape is {shape}")
        elif row.name not in stored:
            spec = None
        elif stored[row.name]:
            spec = LayerSpec(*shape, WeightCode(INT4, 4), None, None)
        elif spec is None or row.action == "int4":
            spec = plan.config.layer(shape)
        else:  # they were centred whatever their width
            spec = plan.config.layer(shape, (spec.weight.bits, spec.tokens.bits if spec.tokens else 16))
        rows.append(row if spec == row.spec else replace(row, spec=spec, reason="as stored"))
    return replace(plan, layers=tuple(rows))


def _decide(layer: Layer, rules: Sequence[Rule], config: OrbitQuantConfig) -> LayerPlan:
    action, reason = next((a, r) for glob, a, r in rules if fnmatchcase(layer.name, glob))
    if not layer.plain:
        action, reason = "keep", "subclass of nn.Linear"
    if reason == _MODULATION and config.modulation_bits == 16:
        action, reason = "keep", "modulation_bits=16"
    shape = layer.in_features, layer.out_features
    spec: LayerSpec | None = None
    if action == "int4":
        spec = LayerSpec(*shape, WeightCode(INT4, 4), None, None)
    elif action != "keep":
        spec = config.layer(shape, None if action == "quantize" else parse_bits(action))
    bias = layer.out_features * layer.itemsize * layer.bias
    before = layer.out_features * layer.in_features * layer.itemsize
    after = before if spec is None else coded_size(spec)
    return LayerPlan(layer.name, *shape, spec, reason, before + bias, after + bias)


def coded_size(spec: LayerSpec) -> int:
    """Bytes of codes and bf16 scales."""
    scales = -(-spec.in_features // GROUP) if spec.weight.codebook == INT4 else 1
    return spec.out_features * (packed_width(spec.in_features, spec.weight.bits) + 2 * scales)


def _structural_rules(layers: Sequence[Layer]) -> list[Rule]:
    """A rule for each layer of a class of no family, from repeated module lists, names and shapes."""
    places = _places([layer.name for layer in layers])
    lists: dict[str, list[tuple[str, Layer]]] = {}
    for layer in layers:
        if layer.name in places:
            prefix, inner = places[layer.name]
            lists.setdefault(prefix, []).append((inner, layer))
    token_lists = _token_lists(lists)
    return [_structural_rule(layer, *places.get(layer.name, ("", "")), token_lists) for layer in layers]


def _structural_rule(layer: Layer, prefix: str, inner: str, token_lists: set[str]) -> Rule:
    if not prefix:
        return "*", "keep", OUTSIDE
    if _EMBEDDER.search(layer.name):
        return "*", "keep", "embedder"
    if prefix not in token_lists:
        return "*", "keep", "conditioning"
    if _is_modulation(inner, layer):
        return "*", "int4", _MODULATION
    if _GATE_NAME.search(inner) and 4 * layer.out_features <= layer.in_features:
        return "*", "keep", GATE
    return "*", "quantize", BLOCK


def _places(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The outermost repeated module list of each name that is in one, and what the name is within its block.

    A list is repeated if two of its blocks have a layer of the same name.
    """
    found = {name: [(name[: m.start()], m[1], name[m.end() + 1 :]) for m in _NUMBER.finditer(name)] for name in names}
    numbers: dict[tuple[str, str], set[str]] = {}
    for places in found.values():
        for prefix, number, inner in places:
            numbers.setdefault((prefix, inner), set()).add(number)
    repeated = {prefix for (prefix, _), seen in numbers.items() if len(seen) > 1}
    inside = {
        name: [(prefix, inner) for prefix, _, inner in places if prefix in repeated] for name, places in found.items()
    }
    return {name: places[0] for name, places in inside.items() if places}


def _token_lists(lists: dict[str, list[tuple[str, Layer]]]) -> set[str]:
    """Which of these module lists carry the tokens; the others belong to networks that make their conditioning.

    Tokens run through blocks with attention (if there is any) that lie in the model itself, or all equally deep in a
    part of it. A list that lies deeper is part of a network of its own, such as a refiner of text or what guesses
    modulation, unless its blocks are those of a list that carries tokens, or it is a stage of a U-Net.
    """
    weights = {p: sum(layer.in_features * layer.out_features for _, layer in rows) for p, rows in lists.items()}
    attending = [p for p, rows in lists.items() if any(_ATTENTION.search(f"{p}.{inner}") for inner, _ in rows)]

    def outweigh(some: Sequence[str], others: Iterable[str]) -> bool:
        return 10 * sum(weights[p] for p in some) >= sum(weights[p] for p in others)

    found = attending if outweigh(attending, lists) else list(lists)
    depths = sorted({p.count(".") for p in found})
    upper = [[p for p in found if p.count(".") <= depth] for depth in depths]
    shallow = next((some for some in upper if outweigh(some, found)), [])
    shapes = {p: {(inner, layer.in_features, layer.out_features) for inner, layer in lists[p]} for p in found}
    return {p for p in found if p in shallow or _U_NET.match(p) or any(shapes[p] == shapes[q] for q in shallow)}


def _is_modulation(inner: str, layer: Layer) -> bool:
    """In a norm or a modulation inside its block, or named as one: then not if it is square, since it can give no shift
    beside a scale."""
    square = layer.out_features == layer.in_features
    return bool((_IN_MODULATION if square else _MODULATION_NAME).search(inner))
