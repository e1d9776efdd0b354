"""Which layers gain by centred tokens: `python -m scripts.centring --out docs/quality/centring/embedded.jsonl`.

The embedded model is quantized once for each setting and rotation seed, and draws the same prompts with centring
nowhere, in all layers by groups of 16 and of 8, and in those whose tokens are no wider than the model's by groups of 16
(what the plan does). A line has the PSNR of the pictures to full precision.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from itertools import product
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

WHERE = {"nowhere": (0, None), "all layers": (1 << 30, 16), "as planned": (256, 16), "all layers, by 8": (1 << 30, 8)}
"""Widths up to which tokens are centred (the model is 256 wide), and how many tokens share a mean."""


def set_groups(model: torch.nn.Module, widest: int, size: int | None) -> None:
    """Centre the tokens of layers up to a width, in groups of `size`."""
    for _, layer in packed_layers(model):
        if layer.spec.tokens is not None:
            chosen = size if layer.in_features <= widest else None
            layer.spec = replace(layer.spec, tokens=replace(layer.spec.tokens, group_size=chosen))
            layer.key = layer.spec.key
    connect(model)


def lines(pipeline: Any, bits: str, seed: int, draw: Callable[[Any], Any], full: Any) -> Iterator[dict[str, Any]]:
    """One line for each of WHERE."""
    quantize_(pipeline.transformer, OrbitQuantConfig(bits, seed=seed), progress=False)
    for name, (widest, size) in WHERE.items():
        set_groups(pipeline.transformer, widest, size)
        pictures = draw(pipeline)
        yield {"centred": name, "bits": bits.upper(), "seed": seed, "psnr_db": psnr(pictures, full)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; added to")
    parser.add_argument("--per-category", type=int, default=40, help="prompts of each of the six categories")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2, help="seeds of the rotation")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    args = parser.parse_args()
    prompts = [prompt.text for prompt in benchmark(args.per_category)]

    def loaded() -> Any:
        return load_pipeline(MODEL_DIR, compute_dtype(args.device)).to(args.device)

    def draw(pipeline: Any) -> Any:
        return generate(pipeline, prompts, 0, num_inference_steps=args.steps)[0]

    full = draw(loaded())
    name = torch.cuda.get_device_name() if args.device == "cuda" else cpu_name()
    facts = {"model": "embedded", "prompts": len(prompts), "steps": args.steps, "gpu": name, "commit": git_commit()}
    facts |= {"torch": torch.__version__, "diffusers": installed("diffusers"), "date": f"{date.today()}"}
    for bits, seed in product(("w4a4", "w3a3", "w2a4", "w2a3"), range(args.seeds)):
        for line in lines(loaded(), bits, seed, draw, full):
            append_line(args.out, line | facts)
            print(line, flush=True)


if __name__ == "__main__":
    main()
