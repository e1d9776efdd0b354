"""Measure what a change of the recipe does to a model's velocity: `python -m scripts.velocity --out FILE.jsonl`.

Pictures tell small changes from chance only by the thousand; the velocity does with a few. The full-precision model, in
fp32 on the CPU, draws pictures of the benchmark; at some of the steps the quantized model gets the same inputs, and its
error is |v_q - v|^2 / |v|^2, of both guidance branches (`error`) and of the guided velocity (`guided`), mean over the
steps. One JSON line each, of three kinds:

- variant: the paper's recipe and what was tried beyond trellis codes and unbiased rows (`scripts.variants`), with
  weights and activations quantized;
- layers: noise of the size of a 2-bit trellis' error on the weights of one kind of layer, or of one block, the rest in
  full precision; with its share of the weights, and, for the inputs of these layers, the share of their energy that a
  picture's mean token holds;
- oracle: the same noise on all layers, at the bits of each kind that make the error least at 2 bits on average. It has
  measured the kinds' errors on these very prompts: what allocating bits could give at best.

A run whose line is in the file is not made again, so that the same command goes on after a stop.
"""

import argparse
import copy
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import baselines
from orbitdit import OrbitQuantConfig, plan, quantize_, set_grid_
from orbitdit.config import TRELLIS_STATES
from orbitdit.errors import CheckpointError, ConfigError
from orbitdit.evaluate import BATCH, generate
from orbitdit.integrations.folders import load_pipeline, skeleton, transformers_in
from orbitdit.lines import append_line, resume_lines
from orbitdit.shapes.prompts import CATEGORIES, benchmark
from scripts.quality import CALIBRATION_NOISE, SEEDS, STEPS, UNPROMPTED, environment, judged_world, models_of, selected
from scripts.variants import TRELLIS_ERRORS, VARIANTS, Codes, allocated, quantize_variant_

BITS = ("W3A3", "W2A4")
PAPER = "paper"
ALL, TEXT, ORACLE = "all", "text stream", "oracle"
TIMES = 5
"""Steps at which the velocity is looked at, evenly from the first to the last."""
GUIDANCE = 3.0
NOISE = {bits: d / (1 - d) for bits, d in {1: 0.272, **TRELLIS_ERRORS}.items()}
"""Squared error over a row's energy, by bits: an unbiased scale makes D / (1 - D) of the error D of 2^12 states on
normal rows. orbitdit has no code of 1 bit, for which D is an estimate between the bound's 0.25 and a scalar code's
0.363."""
SHARED = ("per_category", "steps", "states")


class Run(NamedTuple):
    """One line to be; `what` is its kind, `name` the variant, or the layers, that it is of."""

    model: str
    what: str
    name: str
    bits: str
    seed: int

    @property
    def label(self) -> str:
        """What --only matches."""
        return f"{self.model}/{self.name}/{self.bits}/{self.seed}"


def groups_of(layers: Sequence[str]) -> dict[str, list[str]]:
    """Named groups of `layers`, names of modules in full: all, the text stream where there is one apart, every kind
    (the name less the number of the block), and the first, middle and last block of every stack."""
    kinds: dict[str, list[str]] = {}
    stacks: dict[str, dict[str, list[str]]] = {}
    for layer in layers:
        kinds.setdefault(kind_of(layer), []).append(layer)
        if match := re.match(r"(.+?)\.([0-9]+)\.", layer):
            stacks.setdefault(match[1], {}).setdefault(match[2], []).append(layer)
    text = [layer for layer in layers if re.search(r"\badd_|_add_|_context\b", layer)]
    found = {ALL: list(layers), **({TEXT: text} if text else {}), **kinds}
    for stack, blocks in stacks.items():
        numbers = sorted(blocks, key=int)
        found |= {f"{stack}.{n}": blocks[n] for n in (numbers[0], numbers[len(numbers) // 2], numbers[-1])}
    return found


def kind_of(layer: str) -> str:
    """`layer` less the number of its block."""
    return re.sub(r"(.+?)\.[0-9]+\.", r"\1.", layer, count=1)


def planned(model: nn.Module) -> dict[str, int]:
    """The layers whose weights are quantized, and how many weights they have."""
    return {row.name: row.weights for row in plan(model, OrbitQuantConfig("w2a4")).select("quantize")}


def runs_of(folders: Mapping[str, Path], seeds: Sequence[int] = SEEDS) -> list[Run]:
    """All runs, the most telling first: seed by seed, the variants at each of BITS, then layers, then the oracle."""
    groups = {m: groups_of(list(planned(skeleton(transformer_of(folder)[1])))) for m, folder in folders.items()}
    found = []
    for seed in seeds:
        for bits in BITS:
            names = [PAPER, *(name for name, variant in VARIANTS.items() if bits in variant.bits)]
            found += [Run(model, "variant", name, bits, seed) for model in folders for name in names]
        for model, own in groups.items():
            found += [Run(model, "layers", name, "W2", seed) for name in own]
            found.append(Run(model, "oracle", ORACLE, "W2", seed))
    return found


def transformer_of(folder: Path) -> tuple[str, Path]:
    """The name and the folder of the pipeline's transformer, the first of several."""
    return next((name, path) for name, path in transformers_in(folder).items() if name)


class Subject:
    """A model in full precision, its calls along the benchmark's trajectories, and what was found out about it."""

    def __init__(self, folder: Path, per_category: int, steps: int, states: int):
        self.steps, self.states = steps, states
        self.pipeline = load_pipeline(folder, torch.float32)
        self.component = transformer_of(folder)[0]
        self.model: nn.Module = getattr(self.pipeline, self.component)
        self.weights = planned(self.model)
        self.groups = groups_of(list(self.weights))
        self.calls: list[tuple[tuple, dict[str, Any], Tensor]] = []
        self.mean_energy: dict[str, list[float]] = {name: [] for name in self.weights}
        self.watch([p.text for p in benchmark(per_category, world=judged_world(folder))])
        self.statistics: Mapping[str, baselines.Statistics] | None = None
        self.codes: tuple[int, Codes] = -1, {}
        self.noise_errors: dict[tuple, dict[str, float]] = {}

    def watch(self, prompts: Sequence[str]) -> None:
        """Fill `calls` and `mean_energy` from one generation of `prompts`."""
        kept = set(np.linspace(0, self.steps - 1, TIMES).round().astype(int).tolist())
        step = iter(range(self.steps))

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: tuple[Tensor]) -> None:
            if next(step) in kept:
                self.calls.append((args, kwargs, output[0]))

        def energy(name: str, x: Tensor) -> None:
            if x.ndim > 2:
                self.mean_energy[name].append(mean_energy(x))

        hooks = [self.model.register_forward_hook(keep, with_kwargs=True)]
        for name in self.weights:
            layer = self.model.get_submodule(name)
            hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: energy(name, args[0])))
        try:
            generate(self.pipeline, prompts, 0, "full precision", num_inference_steps=self.steps)
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def error(self, model: nn.Module) -> dict[str, float]:
        """Of `model` in place of the one in full precision: `error` and `guided`, see the module's docstring."""
        found = [(model(*args, **kwargs)[0], velocity) for args, kwargs, velocity in self.calls]
        return {
            "error": mean(relative(v, target) for v, target in found),
            "guided": mean(relative(guided(v), guided(target)) for v, target in found),
        }

    def measure(self, run: Run) -> dict[str, Any]:
        """What is to be recorded of `run`."""
        if run.what == "variant":
            return self.error(self.quantized(run))
        if run.what == "oracle":
            of_kind = self.oracle(run.seed)
            bits = {name: of_kind[kind_of(name)] for name in self.weights}
            average = sum(self.weights[name] * b for name, b in bits.items()) / sum(self.weights.values())
            return {**self.noise_error(bits, run.seed), "average": round(average, 4), "bits_of": of_kind}
        layers = self.groups[run.name]
        shares = [mean(self.mean_energy[name]) for name in layers if self.mean_energy[name]]
        return {
            **self.noise_error(dict.fromkeys(layers, 2), run.seed),
            "weights": round(sum(self.weights[name] for name in layers) / sum(self.weights.values()), 4),
            "mean_energy": round(median(shares), 4) if shares else None,
        }

    def quantized(self, run: Run) -> nn.Module:
        """A copy of the model, quantized as `run` says."""
        model = copy.deepcopy(self.model)
        if run.name == PAPER:
            quantize_(model, OrbitQuantConfig(run.bits.lower(), seed=run.seed, recipe="paper"), progress=False)
            set_grid_(model, "exact")
            return model
        if VARIANTS[run.name].looks and self.statistics is None:
            prompts = [""] * UNPROMPTED
            found = baselines.calibrate(self.pipeline, [self.component], prompts, self.steps, CALIBRATION_NOISE)
            self.statistics = found[self.component]
        if self.codes[0] != run.seed:
            self.codes = run.seed, {}
        options = run.seed, self.statistics, self.states, self.codes[1]
        quantize_variant_(model, run.name, run.bits.lower(), *options)
        return model

    def noise_error(self, bits: Mapping[str, int], seed: int) -> dict[str, float]:
        """`error` with noise on the layers in `bits`, measured once."""
        key = seed, *bits.items()
        if key not in self.noise_errors:
            with noisy(self.model, self.weights, bits, seed):
                self.noise_errors[key] = self.error(self.model)
        return self.noise_errors[key]

    def oracle(self, seed: int) -> dict[str, int]:
        """Bits of each kind of layer, 2 on average: see `allocated`."""
        kinds = {kind: self.groups[kind] for kind in map(kind_of, self.weights)}
        errors = {kind: self.noise_error(dict.fromkeys(layers, 2), seed)["guided"] for kind, layers in kinds.items()}
        sizes = {kind: sum(self.weights[name] for name in layers) for kind, layers in kinds.items()}
        return allocated(errors, sizes, 2, NOISE)


def relative(found: Tensor, target: Tensor) -> float:
    return float((found - target).double().square().sum() / target.double().square().sum())


def mean_energy(x: Tensor) -> float:
    """How much of the energy of `x` (..., tokens, dim) is that of each picture's mean token, put on all its tokens."""
    return float(x.mean(-2).square().sum() * x.shape[-2] / x.square().sum())


def guided(velocity: Tensor) -> Tensor:
    """Of both branches (2 B, ...), with prompt first, the velocity (B, ...) that the sampler follows."""
    with_prompt, without = velocity.chunk(2)
    return without + GUIDANCE * (with_prompt - without)


@contextmanager
def noisy(model: nn.Module, layers: Iterable[str], bits: Mapping[str, int], seed: int) -> Iterator[None]:
    """`model` with normal noise on the weights of the layers in `bits`, as large as the error of so many bits, row by
    row. What noise a layer of `layers` gets depends on its place there and on the seed alone."""
    before = {}
    for number, name in enumerate(layers):
        if name in bits:
            weight = model.get_submodule(name).weight.data
            before[name] = weight.clone()
            generator = torch.Generator().manual_seed(seed << 16 | number)  # of which the CPU's takes 32 bits
            size = (weight.square().mean(1, keepdim=True) * NOISE[bits[name]]).sqrt()
            weight += size * torch.randn(weight.shape, generator=generator)
    try:
        yield
    finally:
        for name, weight in before.items():
            model.get_submodule(name).weight.data.copy_(weight)


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; read, repaired and added to")
    parser.add_argument("--model", action="append", metavar="NAME=FOLDER", help="may be repeated; embedded if left out")
    parser.add_argument("--only", action="append", metavar="GLOB", help="over model/name/BITS/seed, may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of rotations and of noise")
    parser.add_argument("--states", type=int, choices=TRELLIS_STATES, default=12, help="log2 of a trellis' states")
    parser.add_argument("--per-category", type=int, default=1, help="prompts of each of the six categories, 1 or 2")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps")
    parser.add_argument("--commit", help="what to record where the checkout has no git directory")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    try:
        if args.per_category * len(CATEGORIES) > BATCH["cpu"]:
            raise ConfigError(f"--per-category {args.per_category} is more than a batch of {BATCH['cpu']} pictures")
        folders = models_of(args.model or ["embedded"])
        for folder in folders.values():
            judged_world(folder)
        runs = runs_of(folders, args.seeds)
        wanted = selected({run.label: run for run in runs}, args.only)
        rows, repaired = resume_lines(args.out)
        if any("what" not in row for row in rows):
            raise ConfigError(f"{args.out} holds other lines than those of scripts.velocity: choose another file")
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"velocity: {error}")
    if repaired:
        print(repaired, flush=True)
    shared = {key: getattr(args, key) for key in SHARED}
    facts = environment("cpu", args.commit)
    there = {tuple(r[key] for key in Run._fields) for r in rows if all(r[key] == shared[key] for key in SHARED)}
    todo = [r for r in wanted if r not in there]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are in {args.out} already", flush=True)
    subjects: dict[str, Subject] = {}
    started = time.monotonic()
    for number, run in enumerate(todo, 1):
        if run.model not in subjects:
            subjects[run.model] = Subject(folders[run.model], **shared)
        figures = subjects[run.model].measure(run)
        append_line(args.out, {**run._asdict(), **figures, **shared, **facts})
        left = (time.monotonic() - started) / number * (len(todo) - number)
        told = f"error {figures['error']:.3g}, guided {figures['guided']:.3g}"
        print(f"[{number}/{len(todo)}] {run.label}: {told}; about {left / 60:.0f} min left", flush=True)


if __name__ == "__main__":
    main()
