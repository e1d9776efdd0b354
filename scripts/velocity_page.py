"""The section of docs/quality.md on what was tried beyond trellis codes and unbiased rows, from lines of
`scripts.velocity` and of `scripts.quality --variants`."""

import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

from benchmarks.report import distinct, spread, table
from scripts.quality import FULL, ONLY_AT
from scripts.variants import VARIANTS
from scripts.velocity import ALL, BITS, ORACLE, PAPER, SHARED, TEXT, Run

Row = dict[str, Any]
TITLES = {PAPER: "the paper's recipe"} | {name: variant.title for name, variant in VARIANTS.items()}
BASE = "orbitdit-rows"
IN_TABLE = {("base", bits): BASE for bits in BITS}
IN_TABLE |= {("mean-16-constant", bits): "orbitdit" for bits in ONLY_AT["orbitdit-uncentred"]}
IN_TABLE |= {("token-constant", bits): "orbitdit-uncentred" for bits in ONLY_AT["orbitdit-uncentred"]}
"""Variants that the table of all methods has at some settings, as methods."""
LAYERS = {ALL: "all layers", TEXT: "text stream"}

HEAD = """## What was tried beyond

Changes to a recipe of trellis codes and unbiased rows' scales, at the same stored bits (balanced channels take one
factor for each input more), one or two at a time (`scripts/variants.py` says what each does). They are judged by the
velocity: along trajectories of the model in full precision, the squared error of the quantized model's velocity over
the squared velocity, mean over some of the steps (`scripts/velocity.py`), which takes few pictures; and some of them by
the 1,200 pictures themselves. The tables of the velocity give that error over the base's own from the same rotation
seed, mean ± standard deviation over the seeds; the base's error itself stands in its row, in brackets."""
GUIDED = "The velocity after guidance, which the sampler follows:"
RAW = "The velocity with and without prompt, before guidance:"
PICTURES = """What the pictures say: the share of full precision's score less the base's from the same rotation seeds,
and PSNR less the base's, in dB; in brackets how many seeds. The base and the two that became the default
recipe are as they ran on the GPU, means multiplied apart; the others multiply the same points, but rotate in TF32."""
VARIANTS_TEXT = """**What paid.** A *token scale that is unbiased on average*, as the rows' is each for itself: PSNR
rises at every setting on both models, and the score on glyphs, most at W3A3; on the embedded model the score stays, and
SSIM falls a little at 2 and 3 bits, for what is no longer shrunk has more noise. It is a constant that the rows' scales
carry, takes nothing when a model runs, and is in the recipe now. The guided velocity did not tell.

*Keeping a mean of the tokens apart* lowers the guided error everywhere. Alone it gains nothing in pictures: the mean is
then exact, what is left of the tokens shrinks, and their balance is off. With the unbiased scale it does on glyphs, and
on the embedded model PSNR rises. A mean of 16 consecutive tokens pays more than one of the whole picture, most where
tokens have 3 bits, and is in the recipe at these settings, by now as the sum of two codes (see above). It takes time in
each step (see the README). At W4A4 it raises PSNR by another decibel and no score: it is not in the recipe there.

**What needs more than weights.** Looking at pictures that the model draws without a prompt tells what weights do not:
a bias for what quantizing makes of the mean, and channels balanced by their energy (for 16 bits more for each input of
a layer), gain the most at 2-bit weights on glyphs. The recipe looks at nothing, so neither is in it.

**What did not pay.** A search for each token's best scale raises the guided error. A second round of rotation, and
mixing across the Hadamard blocks, change no more than another seed does. With a rotation for each block of the model
seeds differ less, and the mean is no better. Bits allotted to layers by the norms of their
weights do not help: weights alone tell neither means nor which channels are large."""
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


def section(rows: Sequence[Row], tried: Sequence[Row] = (), runs: Sequence[Row] = ()) -> str:
    """The whole section, from lines of the velocity, of variants' pictures and of the table; "" without lines. Of
    several lines for one run the last one counts."""
    last = list({tuple(row[key] for key in Run._fields): row for row in rows}.values())
    if not last:
        return ""
    variants, layers = ([r for r in last if (r["what"] == "variant") == wanted] for wanted in (True, False))
    parts = [HEAD, measured_with(last)]
    if variants:
        parts += [GUIDED, variants_table(variants, "guided"), RAW, variants_table(variants, "error")]
        if tried:
            parts += [PICTURES, pictures_table(tried, runs), drawn_with(tried)]
        parts.append(VARIANTS_TEXT)
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


def drawn_with(tried: Sequence[Row]) -> str:
    """What the variants' pictures were drawn with."""
    facts = (", ".join(distinct(str(row[key]) for row in tried)) for key in ("gpu", "torch", "commit", "date"))
    return "The variants' pictures: {}; torch {}, commit {}, {}.".format(*facts)


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
    return table(["error over the base's", *(f"{model}, {bits}" for model, bits in settings)], body)


def cell(name: str, key: str, rows: Sequence[Row]) -> str:
    base = {like(r): r[key] for r in rows if r["name"] == "base"}
    own = {like(r): r[key] for r in rows if r["name"] == name and like(r) in base}
    if not own:
        return "-"
    if name == "base":
        return f"1 ({spread(list(own.values()))})"
    return spread([error / base[run] for run, error in own.items()], 2)


def pictures_table(tried: Sequence[Row], runs: Sequence[Row]) -> str:
    """Variants by model and bits: how far their pictures are above those of the base."""
    found = {(r["model"], r["bits"], r["seed"], r["method"]): r for r in (*runs, *tried) if r["status"] == "ok"}
    settings = [(model, bits) for model in distinct(r["model"] for r in tried) for bits in ("W3A3", "W2A4", "W2A3")]
    body = []
    for name, variant in VARIANTS.items():
        cells = []
        for model, bits in settings:
            method = IN_TABLE.get((name, bits), name)
            if (model, "", 0, FULL) not in found:
                cells.append("-")
                continue
            full = found[model, "", 0, FULL]["scores"]["overall"]
            pairs = [
                (row, found[model, bits, seed, BASE])
                for (*setting, seed, own), row in found.items()
                if own == method != BASE and setting == [model, bits] and (model, bits, seed, BASE) in found
            ]
            share = [(a["scores"]["overall"] - b["scores"]["overall"]) / full for a, b in pairs]
            closer = [a["psnr_db"] - b["psnr_db"] for a, b in pairs]
            cells.append(f"{mean(share):+.3f}, {mean(closer):+.1f} dB ({len(pairs)})" if pairs else "-")
        if any(text != "-" for text in cells):
            body.append([variant.title, *cells])
    return table(["above the base", *(f"{model}, {bits}" for model, bits in settings)], body)


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
