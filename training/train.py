"""Train a model of RECIPES: `python training/train.py shapes --out runs/shapes`.

"shapes" is the embedded model; "glyphs" is a second one, of another architecture and world, for evaluation only, and
"glyphs-sd3" a third one of that world, narrow and fragile.

Rectified flow on endless scenes drawn on the GPU, classifier-free guidance by dropping a tenth of the
prompts, Muon for the blocks' matrices and AdamW for the rest, a warm-up / constant / decay schedule, and an
exponential moving average (EMA) that is what gets exported. A run stops at --steps or, at the latest, after
--stop-after seconds; the same command resumes it from the last state, which is saved every 1000 steps. With --fit
the number of steps is chosen, once, from the time of the first ones, so that the whole schedule ends by then; it is
logged, and --steps repeats it. Every draw comes from --seed and the step number.

The end of a run writes the pipeline in bf16 to OUT/pipeline and scores it on the fixed benchmark.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import Tensor, nn

from orbitdit.shapes.detector import detect, keeps
from orbitdit.shapes.pipeline import (
    CHANNELS,
    GRID,
    PATCH,
    ShapesPipeline,
    WordEncoder,
    initial_noise,
    patchify,
    predict,
)
from orbitdit.shapes.prompts import CATEGORIES, all_prompts, benchmark, tokenize, vocabulary
from orbitdit.shapes.scenes import SIZE, prompt_table, render, sample
from orbitdit.shapes.worlds import GLYPHS, SHAPES, World


class Recipe(NamedTuple):
    """What a model is and how it is trained: `config` is that of the transformer class `cls`, `width` the text
    table's, `batch` in pictures. Its seed, plus the step number, gives every draw."""

    world: World
    cls: type[nn.Module]
    config: dict[str, Any]
    width: int
    steps: int
    batch: int
    seed: int


RECIPES = {
    "shapes": Recipe(
        SHAPES,
        FluxTransformer2DModel,
        {
            "patch_size": 1,
            "in_channels": CHANNELS,
            "num_layers": 3,
            "num_single_layers": 8,
            "attention_head_dim": 64,
            "num_attention_heads": 4,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 256,
            "axes_dims_rope": (8, 28, 28),
        },
        width=256,
        steps=6933,
        batch=768,
        seed=0,
    ),
    # 384 = 3 * 128 inputs, as FLUX.1's 3072 = 3 * 1024, so that a rotation has more than one Hadamard block.
    "glyphs": Recipe(
        GLYPHS,
        PixArtTransformer2DModel,
        {
            "sample_size": SIZE,
            "patch_size": PATCH,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 5,
            "attention_head_dim": 64,
            "num_attention_heads": 6,
            "cross_attention_dim": 384,
            "caption_channels": 384,
            "use_additional_conditions": False,
        },
        width=384,
        steps=5000,
        batch=512,
        seed=1,
    ),
    # 192 = 3 * 64.
    "glyphs-sd3": Recipe(
        GLYPHS,
        SD3Transformer2DModel,
        {
            "sample_size": SIZE,
            "patch_size": PATCH,
            "in_channels": 3,
            "out_channels": 3,
            "num_layers": 10,
            "attention_head_dim": 64,
            "num_attention_heads": 3,
            "joint_attention_dim": 192,
            "caption_projection_dim": 192,
            "pooled_projection_dim": 192,
            "pos_embed_max_size": GRID,
            "qk_norm": "rms_norm",
        },
        width=192,
        steps=5000,
        batch=512,
        seed=1,
    ),
}
CATEGORY_WEIGHT = {"single": 1, "two": 2, "counting": 3, "colours": 2, "position": 4, "attribution": 4}
MUON_LR, ADAM_LR, WARMUP, DECAY_SHARE = 3e-3, 2e-3, 300, 0.35
PROMPT_DROP, EMA_DECAY = 0.1, 0.999
SIGMA_MEAN, SIGMA_STD = 0.3, 1.2
FINAL_SAMPLERS = [(2.0, 3.0, 12), (2.0, 3.0, 20), (1.0, 3.0, 12), (1.0, 3.0, 20), (1.0, 5.0, 20), (1.0, 2.0, 20)]
FIT_FROM, FIT_TO = 40, 140
"""Steps whose time --fit measures: compiling is over, and the rate is still warming up."""
SHARD = "15MB"


class Net(nn.Module):
    """Text table and transformer as one module, so that one state dict and one EMA cover both."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.text_encoder = WordEncoder(words=len(vocabulary(recipe.world)), dim=recipe.width)
        self.transformer = recipe.cls(**recipe.config)
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "norm" in name:
                    nn.init.zeros_(module.weight)
        if isinstance(self.transformer, PixArtTransformer2DModel):
            nn.init.zeros_(self.transformer.adaln_single.linear.weight)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.normal_(self.text_encoder.table.weight)

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
        return predict(self.transformer, x, sigma, *self.text_encoder(words))


class Batches:
    """Tokens and words of scenes for random prompts; `draw(step)` depends on the seed and the step alone."""

    def __init__(self, world: World, size: int, seed: int, device: str):
        self.world, self.size, self.seed, self.device = world, size, seed, device
        prompts = all_prompts(world)
        self.table = prompt_table(prompts, device, world)
        self.words = torch.tensor([tokenize(p.text, world) for p in prompts], device=device)
        in_category = {c: sum(p.category == c for p in prompts) for c in CATEGORIES}
        self.weight = torch.tensor([CATEGORY_WEIGHT[p.category] / in_category[p.category] for p in prompts])
        self.weight = self.weight.to(device)
        self.render = torch.compile(render, dynamic=False) if device == "cuda" else render

    def draw(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        g = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.multinomial(self.weight, self.size * 3 // 2, replacement=True, generator=g)
        scenes, placed = sample(type(self.table)(*(column[chosen] for column in self.table)), g, self.world)
        kept = placed.logical_not().to(torch.uint8).argsort(stable=True)[: self.size]
        words = self.words[chosen[kept]]
        dropped = torch.rand(self.size, 1, generator=g, device=self.device) < PROMPT_DROP
        pictures = self.render(type(scenes)(*(column[kept] for column in scenes)), self.world)
        return patchify(pictures), words.masked_fill(dropped, 0), g


def optimizers(net: Net) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, biases, norms, input and output."""
    matrices = [m.weight for n, m in net.named_modules() if isinstance(m, nn.Linear) and "blocks" in n]
    rest = [p for p in net.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=torch.cuda.is_available()),
    ]


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero over the last DECAY_SHARE of steps."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY_SHARE * steps))


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor, torch.Generator]) -> Tensor:
    x, words, g = batch
    normal = torch.randn(len(x), generator=g, device=x.device)
    sigma = (SIGMA_MEAN + SIGMA_STD * normal).sigmoid()
    noise = torch.randn(x.shape, generator=g, device=x.device)
    mixed = x + sigma[:, None, None] * (noise - x)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        velocity = net(mixed, sigma, words)
    return (velocity.float() - (noise - x)).square().mean()


def export(net: Net, world: World, shift: float = 2.0) -> ShapesPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline = ShapesPipeline(net.transformer, net.text_encoder, scheduler, world.name)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def score(pipeline: ShapesPipeline, per_category: int, batch: int = 600, **options) -> dict[str, float]:
    """Share of right pictures for each category and their mean, on the fixed benchmark from fixed noise."""
    prompts = benchmark(per_category, world=pipeline.world)
    right = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        noise = initial_noise(range(start, start + len(chunk)))
        pictures = pipeline([p.text for p in chunk], latents=noise, output_type="np", **options).images
        right += [keeps(p, detect(picture, pipeline.world)) for p, picture in zip(chunk, pictures, strict=True)]
    scores = {c: sum(r for p, r in zip(prompts, right, strict=True) if p.category == c) for c in CATEGORIES}
    scores = {c: n / per_category for c, n in scores.items()}
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=RECIPES)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, help="optimizer steps in all; the recipe's if left out")
    parser.add_argument("--batch", type=int, help="pictures in a step; the recipe's if left out")
    parser.add_argument("--seed", type=int, help="the recipe's if left out")
    parser.add_argument("--fit", type=float, help="seconds in which the whole schedule must end; chooses --steps")
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds until a checkpointed stop")
    parser.add_argument("--check-every", type=int, default=2000, help="steps between quick scores")
    parser.add_argument("--per-category", type=int, default=200, help="prompts of each category in the final score")
    parser.add_argument("--samplers", type=int, default=len(FINAL_SAMPLERS), help="how many samplers to score with")
    args = parser.parse_args()
    for name in ("steps", "batch", "seed"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(RECIPES[args.model], name))
    if args.fit is not None and args.steps <= FIT_TO:
        parser.error(f"--fit measures steps {FIT_FROM} to {FIT_TO}: --steps must be more")
    return args


class Run:
    """The state of a run (networks, optimizers, next step, steps in all), its files, and its clock."""

    def __init__(self, args: argparse.Namespace, device: str):
        self.started, self.out, self.device = time.monotonic(), args.out, device
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.recipe = RECIPES[args.model]
        self.net, self.ema = (Net(self.recipe).to(device) for _ in range(2))
        self.ema.requires_grad_(False).load_state_dict(self.net.state_dict())
        self.optimizers, self.step, self.steps, self.fitted = optimizers(self.net), 0, args.steps, args.fit is None
        self.state_file, self.log_file = self.out / "state.pt", self.out / "log.jsonl"
        if self.state_file.exists():
            state = torch.load(self.state_file, map_location=device, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.ema.load_state_dict(state["ema"])
            for optimizer, saved in zip(self.optimizers, state["opts"], strict=True):
                optimizer.load_state_dict(saved)
            self.step = state["step"]
            if args.fit is not None and state["fitted"]:
                self.steps, self.fitted = state["steps"], True

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def note(self, **row: Any) -> None:
        """One line of JSON, printed and logged."""
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        with self.log_file.open("a") as log:
            log.write(line + "\n")

    def save(self) -> None:
        state = {"net": self.net.state_dict(), "ema": self.ema.state_dict(), "step": self.step, "steps": self.steps}
        state |= {"opts": [o.state_dict() for o in self.optimizers], "fitted": self.fitted}
        torch.save(state, self.state_file.with_suffix(".part"))
        self.state_file.with_suffix(".part").replace(self.state_file)

    def advance(self, batch: tuple[Tensor, Tensor, torch.Generator]) -> Tensor:
        """One optimizer step; the loss before it."""
        loss = loss_of(self.net, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, (MUON_LR, ADAM_LR), strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate(self.step, self.steps)
            optimizer.step()
            optimizer.zero_grad()
        decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.net.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

    def finish(self, per_category: int, samplers: int) -> None:
        """Write the pipeline in bf16 to OUT/pipeline and note its scores with several samplers."""
        pipeline = export(self.ema, self.recipe.world).to(torch.bfloat16)
        pipeline.save_pretrained(self.out / "pipeline", max_shard_size=SHARD)
        for shift, guidance, steps in FINAL_SAMPLERS[:samplers]:
            pipeline.scheduler.set_shift(shift)
            options = {"guidance_scale": guidance, "num_inference_steps": steps}
            self.note(step=self.step, shift=shift, **options, **score(pipeline, per_category, **options))
        self.note(step=self.step, seconds=self.seconds)


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Run(args, device)
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # its compiled backward faults on an H200 with torch 2.11
        for name, module in run.net.transformer.named_modules():
            if name.rpartition(".")[0].endswith("transformer_blocks"):
                module.compile(dynamic=False)
    run.note(
        parameters=sum(p.numel() for p in run.net.transformer.parameters()),
        table=sum(p.numel() for p in run.net.text_encoder.parameters()),
        first_step=run.step,
        **{k: str(v) for k, v in vars(args).items()},
    )
    batches, losses, first, measured = Batches(run.recipe.world, args.batch, args.seed, device), [], run.step, 0.0
    while run.step < run.steps and run.seconds < args.stop_after:
        losses.append(run.advance(batches.draw(run.step)))
        if run.step % 250 == 0 or run.step == first + 20:
            run.note(step=run.step, loss=torch.stack(losses).mean().item(), seconds=run.seconds)
            losses = []
        if not run.fitted and run.step - first in (FIT_FROM, FIT_TO):
            losses[-1].item()  # wait for the device
            if run.step - first == FIT_TO:
                each = (run.seconds - measured) / (FIT_TO - FIT_FROM)
                run.steps, run.fitted = run.step + max(1, int((args.fit - run.seconds) / each)), True
                run.note(step=run.step, seconds_per_step=each, steps=run.steps)
            measured = run.seconds
        if run.step % args.check_every == 0:
            run.note(step=run.step, **score(export(run.ema, run.recipe.world), 50))
        if run.step % 1000 == 0:
            run.save()
    run.save()
    run.finish(args.per_category, args.samplers)


if __name__ == "__main__":
    main()
