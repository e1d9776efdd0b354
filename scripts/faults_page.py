"""Write docs/reliability.md from the lines of `scripts.faults` and `scripts.loading`: `python -m scripts.faults_page`.

With --check nothing is written, and the exit code says whether the page is up to date.
"""

import json
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.report import table

ROOT = Path(__file__).parent.parent
LINES, PAGE = ROOT / "docs" / "reliability.jsonl", ROOT / "docs" / "reliability.md"
CONVERSIONS = ROOT / "benchmarks/results/2026-11-28-cpu-convert.jsonl"

HEAD = """# Reliability

What happens to damaged saved models. Made by `make faults` (`scripts/faults.py` says what each fault is); the format
and its checks are described in [format.md](format.md).

Each fault is done to a copy of a small saved FLUX (W4A4 and W2A4; as a folder, in shards, and as one file), which is
then loaded in each way there is. A load is *refused* by one line of orbitdit; refused by *another error*, where
diffusers fails before it asks orbitdit; *identical*, with every tensor and the output as they were, bit for bit;
*passed by*, where config.json no longer says that orbitdit should load the model, so diffusers loads what it can; or
*silent*: the model loads and gives another output. *Missed* counts faults that `orbitdit verify` does not find, of
those that were not identical. Counts are of loads; a fault is loaded in each way."""
PASSED = """**Passed by** are edits of `quantization_config`, the key itself: diffusers then loads a model without
asking orbitdit, as it does for an unquantized one, and warns that weights are missing. `orbitdit verify` and orbitdit's
own loader, which the command line uses, find all of them. The same goes for files of a pipeline that orbitdit does not
write, such as the scheduler's JSON: the pipeline's listing, `orbitdit-files.json`, has them."""
BESIDE = """The same faults, done to the same model unquantized, in diffusers alone:"""
MEMORY = "Resident MB before and after, with the garbage collector off:"
WRITING = """Conversions and saves that are interrupted, `scripts/faults_writing.py`. None of the tries left a folder
that loads and is not what was asked for:"""
CONVERTING = """`orbitdit quantize` reads its source block by block. A transformer of the size of {case} with random
weights, on a machine that other work shared ({gpu}): {source:.1f} GB read and {result:.1f} GB written with {peak} MB
beyond the {rss} MB of the imports, in {cpu:.0f} s of the CPU's time, of which encoding alone takes {encode:.0f} s, and
{seconds:.0f} s by the clock (commit {commit})."""
LOADING = """Loading a random FLUX, `from_pretrained` in a fresh process, until every byte of the weights has been read
(they are mapped: before that, loading a file costs nothing however large it is), with and without verification, which
hashes in threads beside. Median of the runs, which alternate. *Cold*: the files are dropped from the page cache first.
*Read alone*: the bytes of the files, in blocks, into nothing. *Copied*: with `disable_mmap=True`."""


def read(path: Path = LINES) -> list[dict[str, Any]]:
    """The committed lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def converted(line: dict[str, Any]) -> str:
    """A sentence about a line of `benchmarks.convert`."""
    facts = {
        "case": line["case"].split()[1],
        "source": line["source_bytes"] / 1e9,
        "result": line["bytes"] / 1e9,
        "peak": line["peak_mb"],
        "rss": line["rss_mb"],
        "cpu": line["user_s"] + line["system_s"],
        "encode": line["encode_s"],
    }
    told = CONVERTING.format(**facts, **{name: line[name] for name in ("gpu", "seconds", "commit")})
    return textwrap.fill(" ".join(told.split()), 120)


def faults_table(lines: list[dict[str, Any]], verified: bool) -> str:
    """Counts by kind and layout, over all subjects and ways to load."""
    rows = []
    groups = dict.fromkeys((line["kind"], line["subject"].partition(", ")[2]) for line in lines)
    for kind, layout in sorted(groups, key=lambda group: list(dict.fromkeys(k for k, _ in groups)).index(group[0])):
        chosen = [line for line in lines if (line["kind"], line["subject"].partition(", ")[2]) == (kind, layout)]
        rows.append([kind, layout, *cells(chosen, verified)])
    rows.append(["**all**", "", *cells(lines, verified)])
    head = ["faults", "saved as", "tried", "loads", "refused", "by another error", "identical", "passed by", "silent"]
    return table(head + (["missed"] if verified else []), rows)


def cells(lines: list[dict[str, Any]], verified: bool) -> list[str]:
    """Faults, loads, and what these ended in."""
    counts: Counter[str] = Counter()
    for line in lines:
        for way in line["ways"].values():
            counts.update(way)
    names = ("refused", "refused unclearly", "identical", "passed by", "silent")
    found = [sum(line["tried"] for line in lines), sum(counts.values()), *(counts[name] for name in names)]
    return [f"{n:,}" for n in (*found, *([sum(line["missed by verify"] for line in lines)] if verified else []))]


def page() -> str:
    """The whole page."""
    lines = read()
    faults = [line for line in lines if "kind" in line]
    ours = [line for line in faults if not line["subject"].startswith("unquantized")]
    theirs = [line for line in faults if line["subject"].startswith("unquantized")]
    parts = [HEAD, faults_table(ours, True), PASSED, BESIDE, faults_table(theirs, False)]
    outcomes = [
        [line["writing"], str(line["tried"]), "; ".join(f"{name}: {n}" for name, n in line["outcomes"].items())]
        for line in lines
        if "writing" in line
    ]
    parts += ["## Writing", WRITING, table(["fault", "tried", "ends in"], outcomes)] if outcomes else []
    parts += ["## Converting", *map(converted, read(CONVERSIONS))]
    memory = [line for line in lines if line.get("memory")]
    rows = [
        [line["subject"], f"{line[name]['count']:,} {name}", *(f"{mb:.1f}" for mb in line[name]["mb"])]
        for line in memory
        for name in ("forwards", "loads")
    ]
    parts += ["## Memory", MEMORY, table(["model", "", "before", "after"], rows)]
    times = [line for line in lines if "loading" in line]
    rows = []
    for line in times:
        seconds = [line.get("read"), line["without"], line["with"]]
        told = ["" if s is None else f"{s:.2f} s" for s in seconds]
        what = f"{line['gb']:.2f} GB, {line['files']} files"
        rows.append([what, line["loading"], *told, f"{line['with'] / line['without']:.2f}", str(line["runs"])])
    head = ["folder", "page cache", "read alone", "without", "with verification", "ratio", "runs"]
    parts += ["## Time", LOADING, table(head, rows)] if rows else []
    told = lines[0]["environment"]
    parts.append(f"torch {told['torch']}, diffusers {told['diffusers']}, Python {told['python']}; {told['device']}.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page, or check it."""
    text = page()
    if "--check" in sys.argv:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == text else "docs/reliability.md is out of date")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
