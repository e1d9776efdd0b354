"""Show why one codebook serves all: `python -m scripts.mechanism --out docs/quality/FILE-mechanism.jsonl`.

For each quantized layer, denoising step and guidance branch: how far the coordinates of its tokens over their norms are
from the one density that the codebook is made for, before and after the rotation. The distance is Kolmogorov and
Smirnov's, the largest difference of the two distribution functions: 0 is the density itself, 1 the farthest there is.
One JSON line for each layer and branch, with a distance for each step (OrbitQuant, arXiv 2607.02461, figure 2).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import betainc
from torch import Tensor, nn

from orbitdit import OrbitQuantConfig, plan
from orbitdit.errors import ConfigError
from orbitdit.evaluate import BATCH, compute_dtype, generate
from orbitdit.integrations.folders import load_pipeline, transformers_in
from orbitdit.rotation import rotation
from orbitdit.shapes.prompts import CATEGORIES, benchmark
from scripts.quality import STEPS, environment, judged_world, models_of

BRANCHES = ("with prompt", "without")
"""What the halves of a guided batch are, in order; an unguided batch is all of the first."""
TOKENS = 256
"""Tokens of a layer, step and branch that are looked at."""
POINTS = 1 << 14


@lru_cache
def distribution(dim: int) -> tuple[float, Tensor]:
    """The distribution function of a coordinate of a random unit vector in R^dim at POINTS + 1 equal steps over
    [-reach, reach], which holds all but 1e-15 of it, and the reach."""
    reach = min(1.0, 8.5 / dim**0.5)
    z = np.linspace(-reach, reach, POINTS + 1)
    above = 0.5 * betainc((dim - 1) / 2, 0.5, 1 - z**2)
    return reach, torch.from_numpy(np.where(z > 0, 1 - above, above))


def ks_distance(values: Tensor, dim: int) -> float:
    """The Kolmogorov-Smirnov distance of `values` (n,) in [-1, 1] to the density of a coordinate in R^dim."""
    reach, table = distribution(dim)
    table = table.to(values.device)
    place = ((values.double().sort().values + reach) * (POINTS / (2 * reach))).clamp(0, POINTS)
    low = place.floor().clamp(max=POINTS - 1)
    below = table[low.long()]
    expected = below + (place - low) * (table[low.long() + 1] - below)
    rank = torch.arange(len(values) + 1, dtype=torch.float64, device=values.device) / len(values)
    return float(torch.maximum((rank[1:] - expected).max(), (expected - rank[:-1]).max()))


def distances(tokens: Tensor, seed: int = 0) -> tuple[float, float]:
    """Distances of `tokens` (n, dim) as they are and rotated; tokens of zeros have no direction and are left out."""
    x = tokens.float()
    x = x[x.norm(dim=1) > 0]
    if not len(x):
        return 1.0, 1.0
    unit = x / x.norm(dim=1, keepdim=True)
    dim = x.shape[1]
    return ks_distance(unit.flatten(), dim), ks_distance(rotation(dim, seed).apply(unit).flatten(), dim)


class _Watch:
    """Measures the inputs of one layer, call by call; a forward pre-hook. `rows` has a row for each branch."""

    def __init__(self, facts: dict[str, Any], pictures: int, seed: int):
        self.facts, self.pictures, self.seed = facts, pictures, seed
        self.generator = torch.Generator().manual_seed(0)
        self.rows: dict[str, dict[str, Any]] = {}

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        parts = args[0].chunk(len(BRANCHES)) if len(args[0]) > self.pictures else args[0][None]
        for branch, part in zip(BRANCHES, parts, strict=False):
            row = self.rows.setdefault(branch, {**self.facts, "branch": branch, "raw": [], "rotated": []})
            tokens = part.flatten(0, -2)
            chosen = torch.randint(len(tokens), (TOKENS,), generator=self.generator).to(tokens.device)
            raw, rotated = distances(tokens[chosen], self.seed)
            row["raw"].append(round(raw, 4))
            row["rotated"].append(round(rotated, 4))


@torch.no_grad()
def measure(
    pipeline: Any, components: Sequence[str], prompts: Sequence[str], steps: int, seed: int = 0
) -> list[dict[str, Any]]:
    """One row for each quantized layer and branch, from one generation of `prompts` in one batch: `raw` and `rotated`
    are lists with a distance for each step. Raises ConfigError for more prompts than a batch holds."""
    most = BATCH[pipeline.device.type]
    if len(prompts) > most:
        raise ConfigError(f"{len(prompts)} prompts are no single batch: choose at most {most}")
    watches, hooks = [], []
    for component in components:
        model = getattr(pipeline, component)
        for row in plan(model, OrbitQuantConfig("w4a4")).select("quantize"):
            facts = {"component": component, "layer": row.name, "dim": row.in_features}
            watches.append(_Watch(facts, len(prompts), seed))
            hooks.append(model.get_submodule(row.name).register_forward_pre_hook(watches[-1]))
    try:
        generate(pipeline, prompts, 0, "mechanism", num_inference_steps=steps)
    finally:
        for hook in hooks:
            hook.remove()
    return [row for watch in watches for row in watch.rows.values()]


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; written anew")
    parser.add_argument("--model", action="append", metavar="NAME=FOLDER", help="may be repeated; embedded if left out")
    parser.add_argument("--prompts", type=int, default=12, help="a multiple of six")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps")
    parser.add_argument("--commit", help="what to record where the checkout has no git directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    args = parser.parse_args(given)
    try:
        folders = models_of(args.model or ["embedded"])
        worlds = {name: judged_world(folder) for name, folder in folders.items()}
    except ConfigError as error:
        sys.exit(f"mechanism: {error}")
    shared = environment(args.device, args.commit)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for name, folder in folders.items():
            prompts = [p.text for p in benchmark(-(-args.prompts // len(CATEGORIES)), world=worlds[name])]
            pipeline = load_pipeline(folder, compute_dtype(args.device)).to(args.device)
            components = [component for component in transformers_in(folder) if component]
            for row in measure(pipeline, components, prompts, args.steps):
                file.write(json.dumps({"model": name, **row, **shared}) + "\n")
            print(f"{name}: done", flush=True)


if __name__ == "__main__":
    main()
