"""How a model runs, as rows and as a text."""

import re
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LayerRun:
    """How one linear layer runs.

    `label` is "W4A4", "INT4" or "kept". `route` is "e4m3 kernel", "int8 kernel", "exact", "INT4 kernel", "INT4 torch",
    "torch" (a layer that is kept) or "not run". `prologue` is the step before the layer that its encoding computes
    ("layer_norm", "rms_norm", "gelu", "silu"; "" for none), `siblings` the number of other layers that the encoding
    serves, `group_size` how many tokens share a mean (None: they are not centred). `reasons` has a text for each thing
    that could be faster.
    """

    name: str
    in_features: int
    out_features: int
    label: str
    route: str
    prologue: str = ""
    siblings: int = 0
    group_size: int | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """How a model runs: one row for each linear layer, in the model's order, and notes that hold for all of them.

    As a text it is a table in which layers that differ in block numbers alone are one row.
    """

    model: str
    device: str
    dtype: str
    layers: tuple[LayerRun, ...]
    notes: tuple[str, ...]

    def groups(self) -> list[tuple[str, int, LayerRun]]:
        """Rows that differ in block numbers alone, as (pattern, how many, one of them)."""
        found: dict[LayerRun, list[LayerRun]] = defaultdict(list)
        for row in self.layers:
            found[replace(row, name=re.sub(r"\.\d+(?=\.)", ".*", row.name, count=1))].append(row)
        return [(key.name if len(rows) > 1 else rows[0].name, len(rows), rows[0]) for key, rows in found.items()]

    def __str__(self) -> str:
        groups = self.groups()
        numbers: dict[str, int] = {}
        for _, _, row in groups:
            for reason in row.reasons:
                numbers.setdefault(reason, len(numbers) + 1)
        lines = [("layers", "n", "to", "runs", "fused", "shares", "centred", "why not")]
        for pattern, count, row in groups:
            shares, centred = str(row.siblings or ""), str(row.group_size or "")
            why = " ".join(str(numbers[reason]) for reason in row.reasons)
            lines.append((pattern, str(count), row.label, row.route, row.prologue, shares, centred, why))
        texts = [f"{self.model}: {self.dtype} inputs on {self.device}", "", *_table(lines, right=(1, 5, 6)), ""]
        texts += [textwrap.fill(f"{n}. {reason}", 100, subsequent_indent="   ") for reason, n in numbers.items()]
        notes = [textwrap.fill(note, 100) for note in self.notes]
        return "\n".join([*texts, *([""] if numbers and notes else []), *notes])


def _table(lines: Sequence[tuple[str, ...]], right: Sequence[int]) -> list[str]:
    """`lines` of cells with their columns aligned, to the right for the columns `right`; a rule below the first."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = []
    for line in lines:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        texts.append("  ".join(cells).rstrip())
    return [texts[0], "-" * max(map(len, texts)), *texts[1:]]
