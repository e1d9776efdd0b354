"""Measure every method at every setting on trained models: `python -m scripts.quality --out docs/quality/FILE.jsonl`.

A run is (model, method, bits, seed of the rotation): the fixed benchmark of the model's world, each picture from the
noise of its own number, the same for all. One JSON line a run, written at once; a run whose line is in the file is not
made again, so that the same command goes on after a stop. The most telling runs come first (see `runs_of`). With
--variants the runs are those of `scripts.variants`, which go to a file of their own.

The calibrated methods see other prompts and other noise than the benchmark's; the calibration is made when it is first
needed. Weights are quantized on the device, and fake-quantized layers compute in bf16 on a GPU.
"""

import argparse
import copy
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

import baselines
from baselines import METHODS
from benchmarks.records import cpu_name, git_commit, installed
from orbitdit import OrbitQuantConfig, quantize_, set_grid_
from orbitdit.errors import CheckpointError, ConfigError
from orbitdit.evaluate import compute_dtype, generate, judge_for, scores, similarity
from orbitdit.integrations.folders import load_pipeline, transformers_in, world_of
from orbitdit.lines import append_line, resume_lines
from orbitdit.metrics import psnr
from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.prompts import CATEGORIES, benchmark
from orbitdit.shapes.worlds import World
from scripts.variants import VARIANTS, quantize_variant_

R = TypeVar("R")
FULL = "full"
BITS = ("W2A4", "W3A3", "W4A4", "W2A3", "W4A6", "W3A6", "W2A6")
"""In the order in which they are measured."""
COMPARED_BITS = BITS[:5]
"""Those of all methods."""
SEEDS = (0, 1, 2)
OURS: dict[str, tuple[dict[str, Any], str]] = {
    "orbitdit": ({}, "auto"),
    "orbitdit-centred": ({"centred_bits": [3, 4]}, "auto"),
    "orbitdit-uncentred": ({"centred_bits": []}, "auto"),
    "orbitdit-rows": ({"scale": "unbiased-rows", "centred_bits": []}, "auto"),
    "paper": ({"recipe": "paper"}, "exact"),
}
"""Methods of this package: what OrbitQuantConfig takes beside bits and seed, and the number grid: as anybody gets it,
but the paper's recipe in the paper's arithmetic."""
ONLY_AT = {"orbitdit-centred": ("W4A4",), "orbitdit-uncentred": ("W2A4", "W3A3", "W2A3")}
"""Settings at which a method is another one than "orbitdit"."""
MEASURED_AT: dict[str, tuple[str, ...]] = {"orbitdit": BITS, **ONLY_AT}
"""Settings of a method, where they are not COMPARED_BITS."""
TITLES = {
    FULL: "full precision",
    "orbitdit": "orbitdit",
    "orbitdit-centred": "orbitdit, tokens of 4 bits centred too",
    "orbitdit-uncentred": "orbitdit, no tokens centred",
    "orbitdit-rows": "orbitdit, unbiased for rows alone, not centred",
    "paper": "OrbitQuant, the paper's recipe",
} | {name: method.title for name, method in METHODS.items()}
CALIBRATION_PROMPTS, CALIBRATION_PROMPT_SEED, CALIBRATION_NOISE = 120, 1, 1_000_000
"""Prompts of the calibration (fewer when the benchmark has), and what tells them and their noise from its own."""
UNPROMPTED = 12
"""Pictures without a prompt that some variants look at."""
STEPS = 12


class Run(NamedTuple):
    """One line to be: `bits` is "" for full precision."""

    model: str
    method: str
    bits: str
    seed: int

    @property
    def name(self) -> str:
        """What --only matches."""
        return f"{self.model}/{self.method}/{self.bits or '-'}/{self.seed}"


def runs_of(models: Iterable[str], variants: bool = False) -> list[Run]:
    """All runs, the most telling first: full precision; then seed 0 of every method, setting by setting in the order of
    BITS; then the other seeds of those that have a rotation. With `variants` those instead, without full precision."""
    models = list(models)
    seeds = dict.fromkeys(OURS, SEEDS) | {name: method.seeds for name, method in METHODS.items()}
    settings: Mapping[str, Sequence[str]] = MEASURED_AT
    if variants:
        seeds, settings = dict.fromkeys(VARIANTS, SEEDS), {name: variant.bits for name, variant in VARIANTS.items()}
    found = [] if variants else [Run(model, FULL, "", 0) for model in models]
    for seed in SEEDS:
        for bits in BITS:
            chosen = [n for n, own in seeds.items() if seed in own and bits in settings.get(n, COMPARED_BITS)]
            found += [Run(m, name, bits, seed) for name in chosen for m in models]
    return found


def judged_world(folder: Path) -> World:
    """The world whose pictures the pipeline in `folder` draws. Raises ConfigError for any other folder, or none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: training/README.md says how to get glyphs and glyphs-sd3")
    world = world_of(folder)
    if world is None:
        raise ConfigError(f"{folder} is no pipeline of a world of orbitdit.shapes: its pictures cannot be judged")
    return world


class Subject:
    """A model under test: its pipeline, its full-precision transformers and pictures, and its calibration."""

    def __init__(self, folder: Path, device: str, per_category: int, steps: int):
        self.device, self.world, self.steps = device, judged_world(folder), steps
        self.prompts = [p.text for p in benchmark(per_category, world=self.world)]
        self.pipeline = load_pipeline(folder, compute_dtype(device)).to(device)
        self.pipeline.initial_noise = cache(self.pipeline.initial_noise)  # over a second for all prompts
        self.originals: dict[str, nn.Module] = {
            name: getattr(self.pipeline, name) for name in transformers_in(folder) if name
        }
        self.judge = judge_for(self.pipeline, self.prompts)
        self.full, self.seconds = self.pictures()
        self.statistics: dict[bool, dict[str, dict[str, baselines.Statistics]]] = {}

    def pictures(self):
        """Pictures of the benchmark by the pipeline as it is, and the seconds they took."""
        return generate(self.pipeline, self.prompts, 0, num_inference_steps=self.steps)

    def calibration(self, component: str, prompted: bool = True) -> Mapping[str, baselines.Statistics]:
        """The calibration of `component` on prompts, or on a few empty ones, made when it is first asked for."""
        if prompted not in self.statistics:
            number = min(CALIBRATION_PROMPTS, len(self.prompts))
            texts = [p.text for p in benchmark(number // len(CATEGORIES), CALIBRATION_PROMPT_SEED, self.world)]
            self.statistics[prompted] = baselines.calibrate(
                self.pipeline,
                list(self.originals),
                texts if prompted else [""] * UNPROMPTED,
                self.steps,
                CALIBRATION_NOISE,
            )
        return self.statistics[prompted][component]

    def measure(self, run: Run) -> dict[str, Any]:
        """What is to be recorded of `run`."""
        if run.method == FULL:
            pictures, seconds, took = self.full, self.seconds, 0.0
            stored: dict[str, Any] = {"effective_bits": 16.0, "layer_bytes": None}
        else:
            for component in self.originals if is_calibrated(run.method) else ():
                self.calibration(component, run.method in METHODS)
            started = time.perf_counter()
            models = {component: copy.deepcopy(original) for component, original in self.originals.items()}
            for component, model in models.items():
                self.quantize(run, component, model)
            took = time.perf_counter() - started
            every = nn.ModuleList(models.values())
            stored = {"effective_bits": round(baselines.stored_bits(every), 4)}
            stored["layer_bytes"] = baselines.stored_bytes(every)
            self.pipeline.register_modules(**models)
            try:
                pictures, seconds = self.pictures()
            finally:
                self.pipeline.register_modules(**self.originals)
        own = run.method == FULL
        return {
            "scores": scores(self.judge(pictures), self.prompts),
            "psnr_db": None if own else psnr(pictures, self.full),
            "ssim": None if own else similarity(pictures, self.full, self.device),
            **stored,
            "seconds": round(seconds, 2),
            "quantize_s": round(took, 2),
        }

    def quantize(self, run: Run, component: str, model: nn.Module) -> None:
        if run.method in METHODS:
            baselines.quantize_(model, run.method, run.bits.lower(), self.calibration(component), run.seed)
        elif run.method in VARIANTS:
            known = self.calibration(component, prompted=False) if is_calibrated(run.method) else None
            quantize_variant_(model, run.method, run.bits.lower(), run.seed, known)
        else:
            options, grid = OURS[run.method]
            quantize_(model, OrbitQuantConfig(run.bits.lower(), seed=run.seed, **options), progress=False)
            set_grid_(model, grid)


def is_calibrated(method: str) -> bool:
    """Whether a pass over the model in full precision must precede it."""
    return method in METHODS or (method in VARIANTS and VARIANTS[method].looks)


def environment(device: str, commit: str | None) -> dict[str, Any]:
    """What all lines of a session share."""
    return {
        "gpu": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "diffusers": installed("diffusers"),
        "commit": commit or git_commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def measure_all(
    folders: Mapping[str, Path], todo: Sequence[Run], write: Callable[[dict], None], args: argparse.Namespace
) -> int:
    """Measure `todo` in order until the deadline; a run that fails is recorded with the reason. How many were left."""
    shared = {"per_category": args.per_category, "steps": args.steps, **environment(args.device, args.commit)}
    subjects: dict[str, Subject] = {}
    started, longest = time.monotonic(), 0.0
    for number, run in enumerate(todo):
        begun = time.monotonic()
        if begun + longest - started > args.deadline:
            return len(todo) - number
        try:
            if run.model not in subjects:
                subjects[run.model] = Subject(folders[run.model], args.device, args.per_category, args.steps)
            figures = {"status": "ok", **subjects[run.model].measure(run)}
        except Exception as problem:  # the other runs still count; whatever was raised is this run's result
            figures = {"status": "failed", "note": f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:300]}
        write({**run._asdict(), **figures, **shared})
        now = time.monotonic()
        longest = max(longest, now - begun)
        tell(number, todo, run, figures, (now - started) / (number + 1) * (len(todo) - number - 1))
    return 0


def tell(number: int, todo: Sequence[Run], run: Run, figures: Mapping[str, Any], left: float) -> None:
    """One line of progress."""
    told = figures.get("note")
    if figures["status"] == "ok":
        distance = "" if figures["psnr_db"] is None else f", {figures['psnr_db']:.1f} dB"
        took = f"{figures['quantize_s']:.1f} + {figures['seconds']:.1f} s"
        told = f"score {figures['scores'].get('overall', float('nan')):.3f}{distance}, "
        told += f"{figures['effective_bits']:.2f} bits, {took}"
    print(f"[{number + 1}/{len(todo)}] {run.name}: {told}; about {left / 60:.0f} min left", flush=True)


def models_of(values: Sequence[str]) -> dict[str, Path]:
    """--model NAME=FOLDER, or "embedded"."""
    folders = {}
    for value in values:
        name, separator, folder = value.partition("=")
        if not separator and name != "embedded":
            raise ConfigError(f"--model {value!r} is not NAME=FOLDER, nor the word embedded")
        folders[name] = Path(folder) if separator else MODEL_DIR
    return folders


def selected(runs: Mapping[str, R], only: Sequence[str] | None) -> list[R]:
    """--only GLOB, over the names of `runs`: those that match one, or all without any."""
    chosen = [run for name, run in runs.items() if any(fnmatch(name, glob) for glob in only or ["*"])]
    if not chosen:
        raise ConfigError(f"--only {' '.join(only or ())} matches no run, such as {next(iter(runs))}")
    return chosen


def shard_of(value: str, runs: Sequence[Run]) -> list[Run]:
    """--shard I/N: every Nth run, from the Ith."""
    match = re.fullmatch(r"([1-9][0-9]*)/([1-9][0-9]*)", value)
    if match is None or int(match[1]) > int(match[2]):
        raise ConfigError(f"--shard {value!r} is not I/N with I from 1 to N, such as 1/4")
    return list(runs[int(match[1]) - 1 :: int(match[2])])


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; read, repaired and added to")
    parser.add_argument("--model", action="append", metavar="NAME=FOLDER", help="may be repeated; embedded if left out")
    parser.add_argument("--only", action="append", metavar="GLOB", help="over model/method/BITS/seed, may be repeated")
    parser.add_argument(
        "--shard", default="1/1", metavar="I/N", help="every Nth run from the Ith, for N processes with a file each"
    )
    parser.add_argument("--deadline", type=float, default=float("inf"), metavar="SECONDS", help="stop before it passes")
    parser.add_argument("--per-category", type=int, default=200, help="prompts of each of the six categories")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps")
    parser.add_argument("--variants", action="store_true", help="what was tried beyond, instead of the methods")
    parser.add_argument("--commit", help="what to record where the checkout has no git directory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> None:
    args = arguments(given)
    try:
        folders = models_of(args.model or ["embedded"])
        chosen = selected({run.name: run for run in runs_of(folders, args.variants)}, args.only)
        for model in dict.fromkeys(r.model for r in chosen):
            judged_world(folders[model])
        wanted = shard_of(args.shard, chosen)
        rows, repaired = resume_lines(args.out)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"quality: {error}")
    if args.variants:
        torch.set_float32_matmul_precision(
            "high"
        )  # TF32: exact for the points of e4m3, 11 bits where tokens are rotated
    if repaired:
        print(repaired, flush=True)
    alike = [r for r in rows if (r.get("per_category"), r.get("steps")) == (args.per_category, args.steps)]
    there = {Run(r["model"], r["method"], r["bits"], r["seed"]) for r in alike if r["status"] == "ok"}
    todo = [r for r in wanted if r not in there]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} runs are in {args.out} already", flush=True)
    left = measure_all(folders, todo, lambda line: append_line(args.out, line), args)
    if left:
        print(f"the deadline left {left} runs: the same command goes on with them", flush=True)


if __name__ == "__main__":
    main()
