"""A comparison as one HTML page that needs nothing else: open it from disk, send it, read it on a phone.

The page is `page.html` with its placeholders filled. Pictures and figures are data URIs, each once; the page's
content security policy allows nothing else, so that it cannot ask for anything. All text that users give is escaped.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.table import Table

from orbitdit.errors import ConfigError
from orbitdit.evaluate import Result
from orbitdit.metrics import psnr
from orbitdit.policy import Plan
from orbitdit.report import SHOWN, plan_table, results_table

PIXEL_ART = 256
"""Pictures narrower than this are enlarged without smoothing."""
MARKS = {
    True: '<span class="mark right">&#10003;<span class="word"> right</span></span>',
    False: '<span class="mark wrong">&#10007;<span class="word"> wrong</span></span>',
    None: "",
}
KINDS = {b"\x89PNG\r\n\x1a\n": "png", b"<?xml": "svg+xml", b"<svg": "svg+xml"}
"""How a figure's file begins -> what it is."""


RIGHT = "A picture is right when it shows what the prompt asks for: nothing missing, nothing extra."


class Figure(NamedTuple):
    """A picture for the page: its caption and its data URI."""

    caption: str
    uri: str


def read_figure(path: Path) -> Figure:
    """The PNG or SVG file at `path`, captioned with its name. Raises ConfigError when it is missing or neither."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--figure {path} cannot be read ({error.strerror}): name a PNG or SVG file") from error
    kind = next((kind for start, kind in KINDS.items() if content.startswith(start)), None)
    if kind is None or (kind != "png" and b"<svg" not in content):
        raise ConfigError(f"--figure {path} is neither PNG nor SVG: convert it to one of them")
    return Figure(path.stem.replace("-", " ").replace("_", " "), _uri(kind, content))


def comparison_page(
    results: Sequence[Result],
    prompts: Sequence[str],
    plans: Sequence[Plan],
    record: dict[str, Any],
    figures: Sequence[Figure] = (),
) -> str:
    """The page for `results`, full precision first; `record` is theirs by `report.results_dict`.

    The first SHOWN prompts' pictures are shown.
    """
    names = [result.label for result in results]
    title = f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]
    classes = " and ".join(dict.fromkeys(plan.model for plan in plans))
    model = escape(f"{record['settings'].get('model', '')} ({classes or 'nothing quantized'})".strip())
    shown = prompts[:SHOWN]
    count = f"{len(prompts)} prompt{'s' * (len(prompts) != 1)}"
    fields = {
        "title": escape(title[0].upper() + title[1:]),
        "summary": f"{count}, each drawn from the same noise at every setting. Model: {model}. Drag the divider of a "
        "picture, or focus it and use the arrow keys.",
        "options": "".join(f'<option value="{i}">{i + 1}. {escape(text)}</option>' for i, text in enumerate(shown)),
        "viewers": "".join(_viewer(result, results[0], prompts) for result in results[1:]),
        "measured": f"Over all {count}. {RIGHT if results[0].scores(prompts) else ''}",
        "table": f'<div class="results">{_table(results_table(results, prompts))}</div>',
        "shown": ("" if len(shown) == len(prompts) else f"The first {len(shown)} of {len(prompts)} prompts. ")
        + "Choose one to see it above.",
        "settings": str(len(results)),
        "cards": "".join(_card(i, text, results) for i, text in enumerate(shown)),
        "figures": _figures(figures),
        "plans": "".join(_plan(plan) for plan in plans),
        "record": _record({**record["settings"], **record["environment"]}),
    }
    return Template(files("orbitdit").joinpath("page.html").read_text("utf-8")).substitute(fields)


def _viewer(result: Result, full: Result, prompts: Sequence[str]) -> str:
    """The divider for one setting; the script fills in its pictures."""
    label, score = escape(result.label), result.scores(prompts).get("overall")
    facts = [] if score is None else [f"{score:.0%} right"]
    facts += [] if result.psnr is None else [f"{result.psnr:.1f} dB PSNR"]
    facts += [f"{result.layer_bytes / 1e6:,.1f} of {full.layer_bytes / 1e6:,.1f} MB"]
    return f"""
<figure class="viewer">
<figcaption><b>{label}</b><span>{" &middot; ".join(facts)}</span></figcaption>
<div class="pair">
<img class="full" alt=""><img class="changed" alt="">
<span class="tag left" aria-hidden="true"></span><span class="tag end" aria-hidden="true"></span>
<input type="range" min="0" max="100" step="1" value="50" aria-label="Divider between {escape(full.label)} and {label}">
<span class="bar"><svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2.5" aria-hidden="true">
<path d="M8 5 2 12l6 7M16 5l6 7-6 7"/></svg></span>
</div>
<p class="hidden" aria-live="polite"></p>
</figure>"""


def _card(index: int, prompt: str, results: Sequence[Result]) -> str:
    """One prompt and its pictures at every setting, each with its mark and its distance to full precision."""
    pictures = []
    for result in results:
        picture, reference = (r.pictures[index : index + 1] for r in (result, results[0]))
        mark = MARKS[result.right[index]]
        distance = "" if result is results[0] else f" <small>{psnr(picture, reference):.1f}&nbsp;dB</small>"
        pixels = ' class="pixels"' * (picture.shape[2] < PIXEL_ART)
        height, width = picture.shape[1:3]
        pictures.append(
            f'<figure><img{pixels} src="{_png(picture[0])}" width="{width}" height="{height}" '
            f'alt="{escape(f"{prompt}, {result.label}")}">'
            f"<figcaption><b>{escape(result.label)}</b> {mark}{distance}</figcaption></figure>"
        )
    return (
        f'<article class="card"><h3><button type="button">{escape(prompt)}</button></h3>'
        f"<div>{''.join(pictures)}</div></article>\n"
    )


def _table(table: Table) -> str:
    """A table of the terminal report as HTML: the first column names the rows, in groups where it says "group: row"."""
    columns = [(str(c.header), ' class="number"' * (c.justify == "right"), list(c.cells)) for c in table.columns]
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for name, side, _ in columns)
    rows, last = [], ""
    for full_name, *cells in zip(*(cells for _, _, cells in columns), strict=True):
        group, _, name = str(full_name).rpartition(": ")
        if group and group != last:
            rows.append(f'<tr class="group"><th colspan="{len(columns)}" scope="colgroup">{escape(group)}</th></tr>\n')
        last, kind = group, " ".join(["member"] * bool(group) + ["total"] * (name == "overall"))
        values = zip(columns[1:], cells, strict=True)
        rows.append(
            f'<tr class="{kind}"><th scope="row">{escape(name)}</th>'
            + "".join(f"<td{side}>{escape(str(cell))}</td>" for (_, side, _), cell in values)
            + "</tr>\n"
        )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(str(table.title))}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{''.join(rows)}</tbody></table></div>"
    )


def _plan(plan: Plan) -> str:
    table = plan_table(plan)
    return (
        f'<details class="plan"><summary><b>{escape(plan.config.label)}</b>'
        f"<span>{escape(str(table.caption))}</span></summary>{_table(table)}</details>\n"
    )


def _figures(figures: Sequence[Figure]) -> str:
    if not figures:
        return ""
    shown = "".join(
        f'<figure><img src="{f.uri}" alt="{escape(f.caption)}"><figcaption>{escape(f.caption)}</figcaption></figure>'
        for f in figures
    )
    return f'<section>\n<h2>Figures</h2>\n<div class="figures">{shown}</div>\n</section>'


def _record(values: dict[str, Any]) -> str:
    return "".join(
        f"<div><dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(_plain(v))}</dd></div>" for k, v in values.items()
    )


def _plain(value: Any) -> str:
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _png(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png", optimize=True)
    return _uri("png", buffer.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
