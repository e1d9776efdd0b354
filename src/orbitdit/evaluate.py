"""Generate the same prompts from the same noise at several settings, and judge the pictures.

Works for any diffusers pipeline folder. Pictures of a world of `orbitdit.shapes` are judged by its exact detector;
those of other models are compared with full precision by PSNR alone.
"""

import gc
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from orbitdit.config import OrbitQuantConfig
from orbitdit.errors import ConfigError
from orbitdit.integrations.folders import load_model, load_pipeline, skeleton, transformers_in
from orbitdit.metrics import WINDOW, psnr, ssim
from orbitdit.model import plan
from orbitdit.policy import effective_bits
from orbitdit.shapes.detector import detect, keeps
from orbitdit.shapes.prompts import CATEGORIES, find_prompt

BATCH = {"cpu": 12, "cuda": 240}
"""Pictures of the embedded model that are generated together."""
FULL_PRECISION = "full precision"


class Result(NamedTuple):
    """One setting's pictures (N, H, W, 3) uint8 and what was measured.

    `right` is None where a picture cannot be judged. `layer_bytes` are those of all layers that the plan
    changes, counted in bf16 for full precision; `effective_bits` the stored bits (codes and scales) per quantized
    weight; `psnr` in dB and `ssim` to full precision (None for itself); `seconds` of generation alone.
    """

    label: str
    pictures: np.ndarray
    right: list[bool | None]
    layer_bytes: int
    effective_bits: float
    psnr: float | None
    seconds: float
    ssim: float | None = None

    def scores(self, prompts: Sequence[str]) -> dict[str, float]:
        """See `scores`."""
        return scores(self.right, prompts)


def scores(right: Sequence[bool | None], prompts: Sequence[str]) -> dict[str, float]:
    """Share of right pictures for each category that was judged, and "overall", their mean; {} without any."""
    categories = [getattr(find_prompt(text), "category", None) for text in prompts]
    found = {}
    for category in CATEGORIES:
        marks = [r for c, r in zip(categories, right, strict=True) if c == category and r is not None]
        if marks:
            found[category] = sum(marks) / len(marks)
    return {**found, "overall": sum(found.values()) / len(found)} if found else {}


def compute_dtype(device: str) -> torch.dtype:
    """bf16 where the device has fast bf16 products, else fp32."""
    if device != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def compare(
    folder: Path,
    configs: Sequence[OrbitQuantConfig],
    prompts: Sequence[str],
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> list[Result]:
    """`results` as a list."""
    return list(results(folder, configs, prompts, seed, device, **options))


def results(
    folder: Path,
    configs: Sequence[OrbitQuantConfig],
    prompts: Sequence[str],
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> Iterator[Result]:
    """Full precision first, then each of `configs`, as soon as it is measured; `options` go to the pipeline's call.

    Raises ConfigError without prompts, and errors as `load_model` and `orbitdit.plan` do.
    """
    if not prompts:
        raise ConfigError("there is nothing to compare: give at least one prompt")
    components = {name: path for name, path in transformers_in(folder).items() if name}
    plans = [[plan(skeleton(path), config) for path in components.values()] for config in configs]
    dtype = compute_dtype(device)
    pipeline = load_pipeline(folder, dtype).to(device)
    pictures, seconds = generate(pipeline, prompts, seed, FULL_PRECISION, **options)
    judge = judge_for(pipeline, prompts)
    before = sum(p.bytes_before for p in plans[0]) if plans else 0
    full = pictures
    yield Result(FULL_PRECISION, full, judge(full), before, 16.0, None, seconds)
    for config, parts in zip(configs, plans, strict=True):
        for name in components:
            pipeline.register_modules(**{name: None})
        gc.collect()
        for name, path in components.items():
            pipeline.register_modules(**{name: load_model(path, config, dtype, device)})
        pictures, seconds = generate(pipeline, prompts, seed, config.label, **options)
        size, bits = sum(p.bytes_after for p in parts), effective_bits(row for p in parts for row in p.layers)
        distances = psnr(pictures, full), similarity(pictures, full, device)
        yield Result(config.label, pictures, judge(pictures), size, bits, distances[0], seconds, distances[1])


def generate(
    pipeline: Any, prompts: Sequence[str], seed: int, label: str = "", **options: Any
) -> tuple[np.ndarray, float]:
    """One picture (the first frame, for video) for each prompt, uint8 (N, H, W, 3), and the seconds it took.

    Picture i starts from the noise of seed + i, whatever the batch and the device. Raises ConfigError for an option
    that the pipeline does not take.
    """
    known = inspect.signature(pipeline.__call__).parameters
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise ConfigError(f"{type(pipeline).__name__} takes no option {unknown!r}: leave it out")
    own_noise = getattr(pipeline, "initial_noise", None)
    pictures, started = [], time.perf_counter()
    step = batch_of(pipeline)
    for start in range(0, len(prompts), step):
        chunk = list(prompts[start : start + step])
        done = f"{start + len(chunk)}/{len(prompts)}"
        pipeline.set_progress_bar_config(desc=f"{label} {done}".strip(), leave=False, disable=None)
        seeds = range(seed + start, seed + start + len(chunk))
        noise = {"latents": own_noise(seeds)} if own_noise else {"generator": torch.Generator().manual_seed(seeds[0])}
        output = pipeline(prompt=chunk, output_type="np", **noise, **options)
        images = output.images if hasattr(output, "images") else [video[0] for video in output.frames]
        pictures.append(np.rint(np.asarray(images) * 255).astype(np.uint8))
    return np.concatenate(pictures), time.perf_counter() - started


def batch_of(pipeline: Any) -> int:
    """How many pictures `generate` makes at a time."""
    return BATCH[pipeline.device.type] if hasattr(pipeline, "initial_noise") else 1


def similarity(pictures: np.ndarray, reference: np.ndarray, device: str = "cpu") -> float | None:
    """`ssim`, or None for pictures that are smaller than its window."""
    return ssim(pictures, reference, device) if min(pictures.shape[1:3]) >= WINDOW else None


def judge_for(pipeline: Any, prompts: Sequence[str]) -> Callable[[np.ndarray], list[bool | None]]:
    """A function from pictures to marks: right, wrong, or None where the world has no such prompt."""
    world: Any = getattr(pipeline, "world", None)
    known = [None if world is None else find_prompt(text, world) for text in prompts]

    def judge(pictures: np.ndarray) -> list[bool | None]:
        return [None if p is None else keeps(p, detect(x, world)) for p, x in zip(known, pictures, strict=True)]

    return judge
