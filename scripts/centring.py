"""Which layers gain by centred tokens: `python -m scripts.centring --out docs/quality/centring/embedded.jsonl`.

The embedded model is quantized once for each setting and rotation seed, and draws the same prompts with centring
nowhere, in all layers, and in those whose tokens are no wider than the model's (what the plan does), by groups of 16
and of 8. A line has the PSNR of the pictures to full precision.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.records import cpu_name, git_commit, installed
from orbitdit import OrbitQuantConfig, quantize_
from orbitdit.evaluate import compute_dtype, generate
from orbitdit.fusion import connect
from orbitdit.integrations.folders import load_pipeline
from orbitdit.lines import append_line
from orbitdit.metrics import psnr
from orbitdit.model import packed_layers
from orbitdit.shapes import MODEL_DIR
from orbitdit.shapes.prompts import benchmark

WHERE = {"nowhere": (0, None), "all layers": (1 << 30, 16), "as planned": (0, 16), "as planned, by 8": (0, 8)}
"""Widths up to which tokens are centred (0: as the plan has it), and how many tokens share a mean."""


def set_groups(model: torch.nn.Module, widest: int, size: int | None) -> None:
    """Centre the tokens of layers up to a width, in groups of `size`."""
    for _, layer in packed_layers(model):
        if layer.spec.tokens is not None:
            chosen = size if layer.in_features <= widest else None
            layer.spec = replace(layer.spec, tokens=replace(layer.spec.tokens, group_size=chosen))
            layer.key = layer.spec.key
    connect(model)


def lines(bits: str, seed: int, per_category: int, steps: int, full: Any) -> Iterator[dict[str, Any]]:
    """One line for each of WHERE."""
    pipeline = load_pipeline(MODEL_DIR, compute_dtype("cpu"))
    quantize_(pipeline.transformer, OrbitQuantConfig(bits, seed=seed), progress=False)
    prompts = [prompt.text for prompt in benchmark(per_category)]
    width = min(layer.in_features for _, layer in packed_layers(pipeline.transformer))
    for name, (widest, size) in WHERE.items():
        set_groups(pipeline.transformer, widest or width, size)
        pictures, _ = generate(pipeline, prompts, 0, num_inference_steps=steps)
        yield {"centred": name, "bits": bits.upper(), "seed": seed, "psnr_db": psnr(pictures, full)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; added to")
    parser.add_argument("--per-category", type=int, default=4, help="prompts of each of the six categories")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the rotation")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    prompts = [prompt.text for prompt in benchmark(args.per_category)]
    pipeline = load_pipeline(MODEL_DIR, compute_dtype("cpu"))
    full, _ = generate(pipeline, prompts, 0, num_inference_steps=args.steps)
    facts = {
        "model": "embedded",
        "prompts": len(prompts),
        "steps": args.steps,
        "gpu": cpu_name(),
        "commit": git_commit(),
    }
    facts |= {"torch": torch.__version__, "diffusers": installed("diffusers")}
    for seed in range(args.seeds):
        for bits in ("w3a3", "w2a4", "w2a3"):
            for line in lines(bits, seed, args.per_category, args.steps, full):
                append_line(args.out, line | facts)
                print(line, flush=True)


if __name__ == "__main__":
    main()
