"""Results for people: tables for the terminal, a labelled picture grid, JSON for everything else."""

import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from rich import box
from rich.table import Table

from orbitdit.atomic import write_new_file
from orbitdit.evaluate import Result
from orbitdit.policy import LayerPlan, Plan

PACKAGES = ("orbitdit", "torch", "diffusers", "numpy", "scipy")
TILE, GAP, BADGE, LABEL, ROWS, SHOWN = 112, 10, 18, 150, 12, 48
INK, PAPER, RIGHT, WRONG = "#1b1b1f", "#ffffff", "#1a7f37", "#c62828"


def plan_table(plan: Plan, wide: bool = True) -> Table:
    """One row for each kind of layer, with totals below; all columns need `wide`, about 110 characters."""
    quantized, int4, kept = plan.counts
    table = Table(
        title=f"{plan.model} at {plan.config.label}",
        caption=f"{quantized} layers quantized, {int4} INT4, {kept} kept.\n"
        f"{_codings(plan)}"
        f"Changed layers: {_megabytes(plan.bytes_before)} -> {_megabytes(plan.bytes_after)} MB; "
        f"{plan.effective_bits:.3f} stored bits per quantized weight.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("layers", no_wrap=True)
    for name in ("n", "to", "in x out", *(("h", "MB before") if wide else ()), "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("why", no_wrap=True)
    for pattern, count, row in plan.groups():
        block = str(row.block_size) if row.action == "quantize" else ""
        before, after = (_megabytes(count * size) for size in (row.bytes_before, row.bytes_after))
        size = f"{row.in_features} x {row.out_features}"
        more = ([block, before], [row.reason]) if wide else ([], [])
        table.add_row(pattern, str(count), row.label, size, *more[0], after, *more[1])
    return table


def _codings(plan: Plan) -> str:
    """A line that says how the quantized layers are coded."""
    kinds = sorted({(row.label, row.coding) for row in plan.select("quantize")})
    return f"{'; '.join(f'{label}: {coding}' for label, coding in kinds)}.\n" if kinds else ""


def plan_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan, layer by layer, ready for JSON."""
    quantized, int4, kept = plan.counts
    totals = {"quantized": quantized, "int4": int4, "kept": kept, "effective_bits": plan.effective_bits}
    totals |= {"bytes_before": plan.bytes_before, "bytes_after": plan.bytes_after}
    layers = [layer_dict(row) for row in plan.layers]
    return {"model": plan.model, "config": plan.config.to_dict(), "totals": totals, "layers": layers}


def layer_dict(row: LayerPlan) -> dict[str, Any]:
    """What becomes of one layer, ready for JSON: 16 bits where weights are kept or tokens are not coded, null for what
    a layer does not have."""
    code, tokens = (None, None) if row.spec is None else (row.spec.weight, row.spec.tokens)
    return {
        "name": row.name,
        "in_features": row.in_features,
        "out_features": row.out_features,
        "action": row.action,
        "weight_bits": 16 if code is None else code.bits,
        "activation_bits": 16 if tokens is None else tokens.bits,
        "codebook": None if code is None else code.codebook,
        "log2_states": None if code is None else code.log2_states,
        "scale": None if code is None else code.scale,
        "group_size": None if tokens is None else tokens.group_size,
        "block_size": row.block_size,
        "reason": row.reason,
        "bytes_before": row.bytes_before,
        "bytes_after": row.bytes_after,
    }


def results_table(results: Sequence[Result], prompts: Sequence[str]) -> Table:
    """One column for each setting; rows: share of right pictures in each category, PSNR, bytes, bits, seconds."""
    table = Table(title=f"{len(prompts)} prompts, each from the same noise for every model", box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    scores = [result.scores(prompts) for result in results]
    for result in results:
        table.add_column(result.label, justify="right", no_wrap=True)
    for category in scores[0]:
        table.add_row(f"right pictures: {category}", *(f"{score[category]:.2f}" for score in scores))
    rows = {
        "PSNR to full precision, dB": ["-" if r.psnr is None else f"{r.psnr:.1f}" for r in results],
        "quantized layers, MB": [_megabytes(r.layer_bytes) for r in results],
        "stored bits per quantized weight": [f"{r.effective_bits:.2f}" for r in results],
        "generation, seconds": [f"{r.seconds:.0f}" for r in results],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def results_dict(results: Sequence[Result], prompts: Sequence[str], **settings: Any) -> dict[str, Any]:
    """Everything that was measured, with versions and settings, ready for JSON."""
    rows = [{**figures(r, prompts), "right": r.right} for r in results]
    return {"environment": environment(), "settings": settings, "prompts": list(prompts), "results": rows}


def figures(result: Result, prompts: Sequence[str]) -> dict[str, Any]:
    """What was measured of one setting, ready for JSON."""
    return {
        "label": result.label,
        "scores": result.scores(prompts),
        "psnr_db": result.psnr,
        "ssim": result.ssim,
        "layer_bytes": result.layer_bytes,
        "effective_bits": result.effective_bits,
        "seconds": round(result.seconds, 2),
    }


def environment() -> dict[str, str]:
    """Versions of the packages that matter, the commit (in a checkout), Python, and the machine.

    Versions are those that the imported packages tell: torch's says which build it is ("2.14.1+cu130"), which the
    metadata of its wheel leaves out, and a checkout's metadata is as old as its installation.
    """
    found = {name: _version(name) for name in PACKAGES} | {"commit": _commit()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {**found, "python": platform.python_version(), "platform": platform.machine(), "device": device}


def write_json(values: dict[str, Any], path: Path) -> None:
    """Write `values` with stable formatting; raises CheckpointError when `path` cannot be written."""
    write_new_file(path, json.dumps(values, indent=1) + "\n")


def picture_grid(results: Sequence[Result], prompts: Sequence[str]) -> Image.Image:
    """Prompts as rows, settings as columns, in panels of ROWS rows side by side; right and wrong are marked.

    The first SHOWN prompts are drawn.
    """
    prompts = prompts[:SHOWN]
    panels = -(-len(prompts) // ROWS)
    rows = -(-len(prompts) // panels)
    head, step, across = 34, TILE + GAP, TILE + BADGE + GAP
    panel_width = LABEL + len(results) * across + GAP
    canvas = Image.new("RGB", (panels * panel_width, head + rows * step + GAP), PAPER)
    draw = ImageDraw.Draw(canvas)
    for panel in range(panels):
        for column, result in enumerate(results):
            x = panel * panel_width + LABEL + column * across
            draw.text((x + TILE / 2, head / 2), result.label, INK, _font(15), anchor="mm")
    for i, prompt in enumerate(prompts):
        panel, row = divmod(i, rows)
        left, top = panel * panel_width, head + row * step
        _wrapped(draw, prompt, (left + GAP, top + TILE / 2))
        for column, result in enumerate(results):
            x = left + LABEL + column * across
            tile = Image.fromarray(result.pictures[i])
            scaling = Image.Resampling.NEAREST if tile.width < TILE else Image.Resampling.LANCZOS
            canvas.paste(tile.resize((TILE, TILE), scaling), (x, top))
            _mark(draw, result.right[i], x, top)
    return canvas


def _mark(draw: ImageDraw.ImageDraw, right: bool | None, x: int, y: int) -> None:
    """A frame, and a badge beside it: a tick on green for right, a cross on red for wrong, nothing for unknown."""
    if right is None:
        return
    colour = RIGHT if right else WRONG
    draw.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), outline=colour, width=3)
    draw.rectangle((x + TILE, y - 3, x + TILE + BADGE, y - 3 + BADGE), fill=colour)
    cx, cy = x + TILE + BADGE / 2, y - 3 + BADGE / 2
    tick = [[(cx - 5, cy), (cx - 1, cy + 4), (cx + 6, cy - 5)]]
    cross = [[(cx - 5, cy - 5), (cx + 5, cy + 5)], [(cx - 5, cy + 5), (cx + 5, cy - 5)]]
    for line in tick if right else cross:
        draw.line(line, "white", 3)


def _wrapped(draw: ImageDraw.ImageDraw, text: str, at: tuple[float, float]) -> None:
    """`text` in the label column, vertically centred, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        fits = draw.textlength(longer, _font(14)) <= LABEL - 2 * GAP
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    draw.multiline_text(at, "\n".join(filter(None, lines[:5])), INK, _font(14), anchor="lm", spacing=4)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _commit() -> str:
    """The commit of the checkout that tracks this file, "-dirty" if anything differs; "unknown" elsewhere."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return git("describe", "--always", "--dirty", "--exclude", "*")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _version(name: str) -> str:
    told = getattr(sys.modules.get(name), "__version__", None)
    try:
        return str(told or version(name))
    except PackageNotFoundError:
        return "not installed"
