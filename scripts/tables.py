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
from scripts.quality import FULL
from scripts.quality_page import read as read_quality
from scripts.quality_page import readme_table, share

ROOT = Path(__file__).parent.parent
GPU = "NVIDIA H200"
TWO_BITS = "W2A4 trellis compiled"
"""W2A4 as `OrbitQuantConfig("w2a4")` has it."""
SETTINGS = ("W4A6", "W4A4", "W3A6", "W3A3", "W2A6", "W2A4", "W2A3")


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


def runs(found: dict[tuple[str, str], Row], case: str, providers: tuple[str, ...]) -> list[dict[str, Row]]:
    """The runs of `case`, each of one commit, that hold the newest lines of `providers`: rows by provider."""
    newest = [found[case, provider]["beside"] for provider in providers if (case, provider) in found]
    return list({id(run): run for run in newest}.values())


def gain(run: dict[str, Row], provider: str, reference: str) -> str:
    """How many times faster than the reference in this run, "-" where one of them was not measured."""
    return ratio(run[provider], reference) if provider in run else "-"


def speed() -> str:
    """Milliseconds a step and peak memory of the models: a row is one run, of one commit."""
    found = measured("models")
    rows = []
    for case in dict.fromkeys(case for case, _ in found):
        for run in runs(found, case, ("W4A4 compiled", "torchao float8 compiled")):
            base, ours = run.get("bf16 compiled"), run.get("W4A4 compiled")
            if base is None or ours is None:
                continue
            kinds = ("bf16 compiled", "torchao float8 compiled", "W4A4 compiled")
            memory = [f"{run[kind]['peak_gb']:.1f}" if kind in run else "-" for kind in kinds]
            gains = [gain(run, kind, "bf16 compiled") for kind in (kinds[2], kinds[1])]
            times = [f"{r['median_us'] / 1e3:.1f}" for r in (base, ours)]
            rows.append([case, *times, *gains, " / ".join(memory), ours["commit"][:7]])
    head = ["bf16, ms", "W4A4, ms", "W4A4", "torchao float8"]
    return table([f"one step on {GPU}", *head, "peak GB: bf16 / float8 / W4A4", "commit"], rows)


def centred() -> str:
    """Steps with means inside the encoding beside W4A4, which has none: all of one run, of one commit."""
    found, rows = measured("models"), []
    for case in dict.fromkeys(case for case, _ in found):
        for run in runs(found, case, (TWO_BITS,)):
            base = run["W4A4 compiled"]
            for provider, row in run.items():
                apart = f"{row['graph_us'] / base['graph_us'] - 1:+.1%}" if row is not base else "-"
                times = [f"{row[kind] / 1e3:.1f}" for kind in ("graph_us", "median_us", "queue_us")]
                name = provider.removesuffix(" compiled").removesuffix(" trellis")
                rows.append([case, name, times[0], apart, *times[1:], f"{row['peak_gb']:.2f}", row["commit"][:7]])
    head = ["bits", "in a CUDA graph, ms", "over W4A4", "by the clock, ms", "host queues it, ms", "peak GB", "commit"]
    return table([f"one step on {GPU}", *head], rows)


def layers() -> str:
    """Single layers over bf16, ours and the best of the others: a row is the run that has most of them."""
    own = ("W4A4", "W2A4", "W4A6")
    others = ("torchao float8", "orbitquant W4A4", "orbitquant W2A4", "comfy-kitchen W4A4")
    found = measured("layers")
    cases = [case for case in dict.fromkeys(case for case, _ in found) if case.startswith("layer ")]
    rows = []
    for case in sorted(cases, key=lambda c: [int(n) for n in re.findall("[0-9]+", c)]):
        columns = (*own, *others)
        run = max(runs(found, case, columns), key=lambda run: sum(provider in run for provider in columns))
        gains = [gain(run, provider, "bf16") for provider in columns]
        base = run["bf16"]
        rows.append([case.removeprefix("layer "), f"{base['median_us']:.0f}", *gains, base["commit"][:7]])
    return table([f"tokens, in to out, on {GPU}", "bf16, us", *own, *others, "commit"], rows)


def bits() -> str:
    """Settings by what they keep of the pictures, what FLUX.1-dev takes with them, and its step as a CUDA graph."""
    lines = [row for row in read_quality(ROOT / "docs/quality")[0] if row["status"] == "ok"]
    fulls = {row["model"]: row for row in lines if row["method"] == FULL}
    with init_empty_weights():
        flux = MODELS[0].make()
    for parameter in flux.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    before = sum(p.numel() * p.element_size() for p in flux.parameters())
    (run,) = runs(measured("models"), MODELS[0].name, (TWO_BITS,))
    rows = []
    for setting in SETTINGS:
        chosen = [row for row in lines if (row["method"], row["bits"]) == ("orbitdit", setting)]
        own = {model: [row for row in chosen if row["model"] == model] for model in fulls}
        shares = [share(own[model], full, "orbitdit", setting).strip("*") for model, full in fulls.items()]
        commits = ", ".join(dict.fromkeys(row["commit"] for row in chosen)) or "-"
        found = plan(flux, OrbitQuantConfig(setting.lower()))
        provider = next((p for p in (f"{setting} trellis compiled", f"{setting} compiled") if p in run), "")
        size = f"{(before - found.bytes_before + found.bytes_after) / 1e9:.2f}"
        rows.append([setting, *shares, commits, size, f"{run[provider]['graph_us'] / 1e3:.1f}" if provider else "-"])
    step = f"step of {MODELS[0].name}, ms, {run['W4A4 compiled']['commit'][:7]}"
    return table(["bits", *(f"right pictures, {m}" for m in fulls), "commits", f"GB of {MODELS[0].name}", step], rows)


TABLES: dict[str, Callable[[], str]] = {
    "bits": bits,
    "families": families,
    "demo": demo,
    "quality": readme_table,
    "speed": speed,
    "centred": centred,
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
