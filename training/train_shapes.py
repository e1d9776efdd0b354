"""Train the embedded model: `python training/train_shapes.py --out runs/shapes`.

Rectified flow on endless scenes drawn on the GPU, classifier-free guidance by dropping a tenth of the
prompts, Muon for the blocks' matrices and AdamW for the rest, a warm-up / constant / decay schedule, and an
exponential moving average (EMA) that is what gets exported. A run stops at --steps or, at the latest, after
--stop-after seconds; the same command resumes it from the last state, which is saved every 1000 steps. Every
draw comes from --seed and the step number.

The end of a run writes the pipeline in bf16 to OUT/pipeline and scores it on the fixed benchmark.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from orbitdit.shapes.detector import detect, keeps
from orbitdit.shapes.pipeline import CHANNELS, ShapesPipeline, WordEncoder, initial_noise, patchify, position_ids
from orbitdit.shapes.prompts import CATEGORIES, PROMPTS, benchmark, tokenize
from orbitdit.shapes.scenes import prompt_table, render, sample

MODEL = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 3,
    "num_single_layers": 8,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 256,
    "axes_dims_rope": (8, 28, 28),
}
CATEGORY_WEIGHT = {"single": 1, "two": 2, "counting": 3, "colours": 2, "position": 4, "attribution": 4}
MUON_LR, ADAM_LR, WARMUP, DECAY_SHARE = 3e-3, 2e-3, 300, 0.35
PROMPT_DROP, EMA_DECAY = 0.1, 0.999
SIGMA_MEAN, SIGMA_STD = 0.3, 1.2
FINAL_SAMPLERS = [(1.0, 2.0, 20), (1.0, 3.0, 20), (1.0, 5.0, 20), (2.0, 3.0, 20), (1.0, 3.0, 12), (2.0, 3.0, 12)]


class Net(nn.Module):
    """Text table and transformer as one module, so that one state dict and one EMA cover both."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = WordEncoder()
        self.transformer = FluxTransformer2DModel(**MODEL)
        for name, module in self.transformer.named_modules():
            if isinstance(module, nn.Linear) and "blocks" in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
                if "norm" in name:
                    nn.init.zeros_(module.weight)
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.normal_(self.text_encoder.table.weight)

    def forward(self, x: Tensor, sigma: Tensor, words: Tensor, ids: tuple[Tensor, Tensor]) -> Tensor:
        embedded, pooled = self.text_encoder(words)
        picture_ids, text_ids = ids
        return self.transformer(x, embedded, pooled, sigma, picture_ids, text_ids, return_dict=False)[0]


class Batches:
    """Tokens and words of scenes for random prompts; `draw(step)` depends on the seed and the step alone."""

    def __init__(self, size: int, seed: int, device: str):
        self.size, self.seed, self.device = size, seed, device
        self.table = prompt_table(PROMPTS, device)
        self.words = torch.tensor([tokenize(p.text) for p in PROMPTS], device=device)
        in_category = {c: sum(p.category == c for p in PROMPTS) for c in CATEGORIES}
        self.weight = torch.tensor([CATEGORY_WEIGHT[p.category] / in_category[p.category] for p in PROMPTS])
        self.weight = self.weight.to(device)
        self.render = torch.compile(render, dynamic=False) if device == "cuda" else render

    def draw(self, step: int) -> tuple[Tensor, Tensor, torch.Generator]:
        g = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.multinomial(self.weight, self.size * 3 // 2, replacement=True, generator=g)
        scenes, placed = sample(type(self.table)(*(column[chosen] for column in self.table)), g)
        kept = placed.logical_not().to(torch.uint8).argsort(stable=True)[: self.size]
        words = self.words[chosen[kept]]
        dropped = torch.rand(self.size, 1, generator=g, device=self.device) < PROMPT_DROP
        pictures = self.render(type(scenes)(*(column[kept] for column in scenes)))
        return patchify(pictures), words.masked_fill(dropped, 0), g


def optimizers(net: Net) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, biases, norms, input and output."""
    matrices = [p for n, p in net.named_parameters() if "blocks" in n and p.ndim == 2]
    rest = [p for n, p in net.named_parameters() if not ("blocks" in n and p.ndim == 2)]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.0, fused=torch.cuda.is_available()),
    ]


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up, constant, then linear to zero over the last DECAY_SHARE of steps."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY_SHARE * steps))


def loss_of(net: nn.Module, batch: tuple[Tensor, Tensor, torch.Generator], ids: tuple[Tensor, Tensor]) -> Tensor:
    x, words, g = batch
    normal = torch.randn(len(x), generator=g, device=x.device)
    sigma = (SIGMA_MEAN + SIGMA_STD * normal).sigmoid()
    noise = torch.randn(x.shape, generator=g, device=x.device)
    mixed = x + sigma[:, None, None] * (noise - x)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
        velocity = net(mixed, sigma, words, ids)
    return (velocity.float() - (noise - x)).square().mean()


def export(net: Net, shift: float = 2.0) -> ShapesPipeline:
    return ShapesPipeline(net.transformer, net.text_encoder, FlowMatchEulerDiscreteScheduler(shift=shift))


def score(pipeline: ShapesPipeline, per_category: int, batch: int = 600, **options) -> dict[str, float]:
    """Share of right pictures for each category and their mean, on the fixed benchmark from fixed noise."""
    prompts = benchmark(per_category)
    right = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        noise = initial_noise(range(start, start + len(chunk)))
        pictures = pipeline([p.text for p in chunk], latents=noise, output_type="np", **options).images
        right += [keeps(p, detect(picture)) for p, picture in zip(chunk, pictures, strict=True)]
    scores = {c: sum(r for p, r in zip(prompts, right, strict=True) if p.category == c) for c in CATEGORIES}
    scores = {c: n / per_category for c, n in scores.items()}
    return {**scores, "overall": sum(scores.values()) / len(scores)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=6933, help="optimizer steps in all")
    parser.add_argument("--batch", type=int, default=768, help="pictures in a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop-after", type=float, default=float("inf"), help="seconds until a checkpointed stop")
    parser.add_argument("--per-category", type=int, default=200, help="prompts of each category in the final score")
    return parser.parse_args()


def finish(ema: Net, out: Path, per_category: int, note: Callable[..., None]) -> None:
    """Write the pipeline in bf16 to OUT/pipeline and note its scores with several samplers."""
    pipeline = export(ema).to(torch.bfloat16)
    pipeline.save_pretrained(out / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    for shift, guidance, steps in FINAL_SAMPLERS:
        pipeline.scheduler.set_shift(shift)
        options = {"guidance_scale": guidance, "num_inference_steps": steps}
        note(shift=shift, **options, **score(pipeline, per_category, **options))


def main() -> None:
    args = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    net, ema = Net().to(device), Net().to(device).requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    opts, first = optimizers(net), 0
    state_file = args.out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        net.load_state_dict(state["net"])
        ema.load_state_dict(state["ema"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        first = state["step"]
    log = (args.out / "log.jsonl").open("a")

    def note(**row) -> None:
        line = json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()})
        print(line, flush=True)
        log.write(line + "\n")
        log.flush()

    def save(step: int) -> None:
        state = {"net": net.state_dict(), "ema": ema.state_dict(), "opts": [o.state_dict() for o in opts], "step": step}
        torch.save(state, state_file.with_suffix(".part"))
        state_file.with_suffix(".part").replace(state_file)

    if device == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # its compiled backward faults on an H200 with torch 2.11
        net.transformer.compile_repeated_blocks(dynamic=False)
    note(
        parameters=sum(p.numel() for p in net.transformer.parameters()),
        table=sum(p.numel() for p in net.text_encoder.parameters()),
        first_step=first,
        **{k: str(v) for k, v in vars(args).items()},
    )
    batches, ids, losses, step = Batches(args.batch, args.seed, device), position_ids(device), [], first
    for step in range(first, args.steps):
        loss = loss_of(net, batches.draw(step), ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt, lr in zip(opts, (MUON_LR, ADAM_LR), strict=True):
            opt.param_groups[0]["lr"] = lr * rate(step, args.steps)
            opt.step()
            opt.zero_grad()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        losses.append(loss.detach())
        if (step + 1) % 250 == 0 or step == first + 20:
            recent = torch.stack(losses).mean().item()
            note(step=step + 1, loss=recent, seconds=time.monotonic() - started)
            losses = []
        if (step + 1) % 2000 == 0:
            pipeline = export(ema)
            pipeline.set_progress_bar_config(disable=True)
            note(step=step + 1, **score(pipeline, 50))
        if (step + 1) % 1000 == 0:
            save(step + 1)
        if time.monotonic() - started > args.stop_after:
            break
    done = min(step + 1, args.steps)
    save(done)
    finish(ema, args.out, args.per_category, lambda **row: note(step=done, **row))
    note(step=done, seconds=time.monotonic() - started)


if __name__ == "__main__":
    main()
