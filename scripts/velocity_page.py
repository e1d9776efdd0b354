"""The section of docs/quality.md on what was tried beyond the default recipe, from lines of `scripts.velocity`."""

import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.report import distinct, spread, table
from scripts.variants import VARIANTS
from scripts.velocity import ALL, BITS, ORACLE, PAPER, SHARED, TEXT, Run

Row = dict[str, Any]
TITLES = {PAPER: "the paper's recipe"} | {name: variant.title for name, variant in VARIANTS.items()}
LAYERS = {ALL: "all layers", TEXT: "text stream"}

HEAD = "## What was tried beyond"
VARIANTS_TEXT = "..."
LAYERS_TEXT = "..."


def section(rows: Sequence[Row]) -> str:
    """The whole section; "" without lines. Of several lines for one run the last one counts."""
    last = list({tuple(row[key] for key in Run._fields): row for row in rows}.values())
    if not last:
        return ""
    tables = [variants_table([r for r in last if r["what"] == "variant"])]
    parts = [HEAD, measured_with(last), *tables, VARIANTS_TEXT, "### Where the error comes from", LAYERS_TEXT]
    for model in distinct(r["model"] for r in last):
        own = [r for r in last if r["model"] == model and r["what"] != "variant"]
        parts += [f"{model}:", layers_table(own)] if own else []
    return "\n\n".join(parts)


def measured_with(rows: Sequence[Row]) -> str:
    """What all lines were measured with."""

    def values(key: str) -> str:
        return ", ".join(distinct(str(row[key]) for row in rows))

    prompts = ", ".join(distinct(str(6 * row["per_category"]) for row in rows))
    return (
        f"{prompts} prompts, {values('steps')} steps, trellises with 2^{values('states')} states, "
        f"seeds {values('seed')}; torch {values('torch')}, commit {values('commit')}, {values('date')}."
    )


def variants_table(rows: Sequence[Row]) -> str:
    """Variants by model and bits: the guided error over the base's of the same seed; the base's own."""
    settings = [
        (model, bits)
        for model in distinct(r["model"] for r in rows)
        for bits in BITS
        if any((r["model"], r["bits"]) == (model, bits) for r in rows)
    ]
    body = []
    for name, title in TITLES.items():
        cells = [cell(name, [r for r in rows if (r["model"], r["bits"]) == setting]) for setting in settings]
        if any(text != "-" for text in cells):
            body.append([title, *cells])
    return table(["guided error, to the default recipe's", *(f"{model}, {bits}" for model, bits in settings)], body)


def cell(name: str, rows: Sequence[Row]) -> str:
    base = {like(r): r["guided"] for r in rows if r["name"] == "base"}
    own = {like(r): r["guided"] for r in rows if r["name"] == name and like(r) in base}
    if not own:
        return "-"
    if name == "base":
        return f"1 ({spread(list(own.values()))})"
    return spread([error / base[key] for key, error in own.items()], 2)


def like(row: Row) -> tuple:
    """What two runs must share to be compared, beside the model."""
    return tuple(row[key] for key in ("seed", *SHARED))


def layers_table(rows: Sequence[Row]) -> str:
    """Layers of one model: what they are of the weights and of the error, and the bits that the oracle gives them."""
    whole = {like(r): r["guided"] for r in rows if r["name"] == ALL}
    compared = [r for r in rows if like(r) in whole]
    oracle = [r for r in compared if r["what"] == "oracle"]
    layers = {r["name"]: r for r in compared if r["what"] == "layers"}

    def shares(name: str) -> list[float]:
        return [100 * r["guided"] / whole[like(r)] for r in compared if r["name"] == name]

    kinds = [name for name in layers if name not in LAYERS and not is_block(name)]
    kinds.sort(key=lambda name: -mean(shares(name)))
    body = []
    for name in [*(n for n in LAYERS if n in layers), *kinds, *filter(is_block, layers)]:
        energy = layers[name]["mean_energy"]
        given = sorted({r["bits_of"][name] for r in oracle if name in r["bits_of"]})
        body.append(
            [
                LAYERS.get(name, f"block `{name}`" if is_block(name) else f"`{name}`"),
                f"{100 * layers[name]['weights']:.1f}",
                spread(shares(name), 1),
                "-" if energy is None else f"{100 * energy:.0f}",
                " or ".join(map(str, given)) or "-",
            ]
        )
    if oracle:
        average = f"{mean(r['average'] for r in oracle):.2f} on average"
        body.append(["all layers, the oracle's bits", "100.0", spread(shares(ORACLE), 1), "-", average])
    head = ["noise of 2 bits on", "% of weights", "% of the guided error", "% of input in mean tokens", "oracle's bits"]
    return table(head, body)


def is_block(name: str) -> bool:
    return re.fullmatch(r"\w+\.[0-9]+", name) is not None
