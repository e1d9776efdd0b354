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

HEAD = """## What was tried beyond

Changes to the default recipe at the same stored bits (balanced channels take one factor for each input more), one or
two at a time (`scripts/variants.py` says what each does).
Pictures tell small changes from chance only by the thousand, so these are judged by the velocity: along trajectories
of the model in full precision, the squared error of the quantized model's velocity over the squared velocity, mean
over some of the steps (`scripts/velocity.py`). The tables give that error over the default recipe's own from the same
rotation seed, mean ± standard deviation over the seeds; the recipe's error itself stands in its row, in brackets."""
GUIDED = "The velocity after guidance, which the sampler follows:"
RAW = "The velocity with and without prompt, before guidance:"
VARIANTS_TEXT = """**What paid.** Keeping a picture's mean token apart, in 8 bits, lowers the guided error at every
setting, and most where activations have few bits: the mean is a large part of what a layer sees (below), and without
it the tokens' codes have only the rest to tell. It needs no data and no stored bits. It is not in the recipe yet: the
mean has to be known before the first token is encoded, which is one more pass over each layer's input.

**What did not.** A token scale that is unbiased, as the rows' is, can lower the error of the branches but not the
guided one, alone or with the mean apart, and a search for the best scale raises that. A second round of rotation, and
mixing across the Hadamard blocks, change no more than another seed does. Bits allotted to layers by the norms of their
weights do not help: weights alone tell neither means nor which channels are large. Looking at pictures that the model
draws without a prompt does tell: a bias for what quantizing makes of the mean pays at 2-bit weights, and balanced
channels pay on some models, for 16 bits more for each input of a layer. But both lower the guided error less than the
mean token apart, which looks at nothing.

**What this does not tell.** How errors add up over the steps: a bias adds up and noise averages out, so that shrunken
weights, as the paper's recipe has them, may cost more in pictures than they do here."""
LAYERS_TEXT = """Noise of the size of a 2-bit trellis' error on the weights of one kind of layer, or of one block, the
rest in full precision; as a share of the guided error that it makes on all layers. Beside it, how much of the energy
of those layers' inputs is in pictures' mean tokens. The oracle gives each kind of layer 1 to 4 bits, 2 on average
over all weights, such that the error is least, and knows the errors of the kinds on these very prompts.

Feed-forwards make most of the error, and, on the models measured so, the first and the last block more than the middle
ones; queries and keys make little, and what looks at the text next to nothing, whatever its share of the weights: a
text stream, or the keys and values of cross-attention. So the oracle takes bits from there, and the more weights are
there, the further the error of the weights falls. No statistic of weights alone tells this, and it need not be so
elsewhere: here a text is a few words of a small vocabulary. In a model whose text matters more, 1 bit would harm what
nobody measured. It is not built."""


def section(rows: Sequence[Row]) -> str:
    """The whole section; "" without lines. Of several lines for one run the last one counts."""
    last = list({tuple(row[key] for key in Run._fields): row for row in rows}.values())
    if not last:
        return ""
    variants, layers = ([r for r in last if (r["what"] == "variant") == wanted] for wanted in (True, False))
    parts = [HEAD, measured_with(last)]
    if variants:
        parts += [GUIDED, variants_table(variants, "guided"), RAW, variants_table(variants, "error"), VARIANTS_TEXT]
    if layers:
        parts += ["### Where the error comes from", LAYERS_TEXT]
    for model in distinct(r["model"] for r in layers):
        parts += [f"{model}:", layers_table([r for r in layers if r["model"] == model])]
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


def variants_table(rows: Sequence[Row], key: str) -> str:
    """Variants by model and bits: their error `key` over the base's of the same seed; the base's own."""
    settings = [
        (model, bits)
        for model in distinct(r["model"] for r in rows)
        for bits in BITS
        if any((r["model"], r["bits"]) == (model, bits) for r in rows)
    ]
    body = []
    for name, title in TITLES.items():
        cells = [cell(name, key, [r for r in rows if (r["model"], r["bits"]) == setting]) for setting in settings]
        if any(text != "-" for text in cells):
            body.append([title, *cells])
    return table(["error over the default recipe's", *(f"{model}, {bits}" for model, bits in settings)], body)


def cell(name: str, key: str, rows: Sequence[Row]) -> str:
    base = {like(r): r[key] for r in rows if r["name"] == "base"}
    own = {like(r): r[key] for r in rows if r["name"] == name and like(r) in base}
    if not own:
        return "-"
    if name == "base":
        return f"1 ({spread(list(own.values()))})"
    return spread([error / base[run] for run, error in own.items()], 2)


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
