"""Write the tables in README.md from committed results and the real configurations: `python -m scripts.tables`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`. With --check nothing is written and the exit code
says whether the file is up to date.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights

from benchmarks.families import MODELS
from benchmarks.report import Row, ratio, read, table
from orbitdit import OrbitQuantConfig, plan
from orbitdit.shapes.prompts import CATEGORIES
from scripts.quality_page import readme_table

ROOT = Path(__file__).parent.parent
GPU = "NVIDIA H200"


def families() -> str:
    """What `orbitdit plan` says of the four families: counts of layers, and bytes of the transformer."""
    rows = []
    for case in MODELS:
        with init_empty_weights():
            model = case.make()
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        before = sum(p.numel() * p.element_size() for p in model.parameters())
        plans = [plan(model, OrbitQuantConfig(bits)) for bits in ("w4a4", "w2a4")]
        sizes = [before, *(before - found.bytes_before + found.bytes_after for found in plans)]
        counts = " / ".join(map(str, plans[0].counts))
        rows.append([case.name, f"{before / 2e9:.2f} B", counts, *(f"{size / 1e9:.2f}" for size in sizes)])
    return table(
        ["transformer", "parameters", "quantized / INT4 / kept layers", "GB in bf16", "GB at W4A4", "GB at W2A4"], rows
    )


def demo() -> str:
    """The table that the demo printed."""
    results = json.loads((ROOT / "docs/demo/results.json").read_text(encoding="utf-8"))
    columns = results["results"]
    rows = [[f"right pictures: {c}", *(f"{r['scores'][c]:.2f}" for r in columns)] for c in (*CATEGORIES, "overall")]
    rows += [
        ["PSNR to full precision, dB", *("-" if r["psnr_db"] is None else f"{r['psnr_db']:.1f}" for r in columns)],
        ["quantized layers, MB", *(f"{r['layer_bytes'] / 1e6:.1f}" for r in columns)],
        ["stored bits per quantized weight", *(f"{r['effective_bits']:.2f}" for r in columns)],
        ["generation, seconds", *(f"{r['seconds']:.0f}" for r in columns)],
    ]
    return table([f"{len(results['prompts'])} prompts", *(r["label"] for r in columns)], rows)


def measured(suite: str) -> dict[tuple[str, str], Row]:
    """The lines of the performance page by case and provider: those of `suite` that have times, of one kind of GPU."""
    rows = [r for r in read(ROOT / "benchmarks/results") if r["suite"] == suite and r["gpu"] == GPU]
    return {(r["case"], r["provider"]): r for r in rows if r["status"] == "ok"}


def gain(found: dict[tuple[str, str], Row], case: str, provider: str, reference: str) -> str:
    """How many times faster than the reference, "-" where one of them was not measured."""
    row = found.get((case, provider))
    return ratio(row, reference) if row else "-"


def speed() -> str:
    """Milliseconds a step and peak memory of the models."""
    found = measured("models")
    rows = []
    for case in dict.fromkeys(case for case, _ in found):
        base, ours = found.get((case, "bf16 compiled")), found.get((case, "W4A4 compiled"))
        if base is None or ours is None:
            continue
        kinds = [f"{kind} compiled" for kind in ("bf16", "torchao float8", "W4A4", "W2A4 trellis")]
        memory = [f"{found[case, kind]['peak_gb']:.1f}" if (case, kind) in found else "-" for kind in kinds]
        gains = [gain(found, case, kind, "bf16 compiled") for kind in kinds[2:] + kinds[1:2]]
        eager = gain(found, case, "W4A4", "bf16")
        rows.append([case, *(f"{r['median_us'] / 1e3:.1f}" for r in (base, ours)), *gains, eager, " / ".join(memory)])
    head = ["bf16, ms", "W4A4, ms", "W4A4", "W2A4", "torchao float8", "W4A4 eager over bf16 eager"]
    return table([f"one step on {GPU}", *head, "peak GB: bf16 / float8 / W4A4 / W2A4"], rows)


def layers() -> str:
    """Single layers over bf16, ours and the best of the others."""
    own = ("W4A4", "W2A4", "W2A4 trellis", "W4A6")
    found, others = measured("layers"), ("torchao float8", "orbitquant W4A4", "orbitquant W2A4", "comfy-kitchen W4A4")
    cases = [case for case in dict.fromkeys(case for case, _ in found) if case.startswith("layer ")]
    rows = [
        [
            case.removeprefix("layer "),
            f"{found[case, 'bf16']['median_us']:.0f}",
            *(gain(found, case, provider, "bf16") for provider in (*own, *others)),
        ]
        for case in sorted(cases, key=lambda c: [int(n) for n in re.findall("[0-9]+", c)])
    ]
    return table([f"tokens, in to out, on {GPU}", "bf16, us", *own, *others], rows)


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "demo": demo,
    "quality": readme_table,
    "speed": speed,
    "layers": layers,
}


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = text
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(new):
            sys.exit(f"README.md has no place for the table {name!r}")
        new = pattern.sub(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", new)
    if "--check" in sys.argv[1:]:
        sys.exit(new != text)
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
