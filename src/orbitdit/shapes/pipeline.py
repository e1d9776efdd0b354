"""A small model of a world as an ordinary diffusers pipeline: words -> transformer -> 64x64 picture.

The transformer is diffusers' own: `FluxTransformer2DModel` in the embedded model, others in those of training/; only
its surroundings are small. A 4x4 patch of pixels is one token (no VAE), and the text encoder is one trained table.
Sampling is rectified flow with the Euler scheduler and classifier-free guidance, as in the large models.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from scipy.special import ndtri
from torch import Tensor, nn

from orbitdit.errors import CheckpointError
from orbitdit.shapes.prompts import MAX_WORDS, tokenize, vocabulary
from orbitdit.shapes.scenes import SIZE
from orbitdit.shapes.worlds import SHAPES, WORLDS, World

PATCH = 4
GRID = SIZE // PATCH
CHANNELS = 3 * PATCH * PATCH

Transformer: TypeAlias = FluxTransformer2DModel | PixArtTransformer2DModel | SD3Transformer2DModel


class WordEncoder(ModelMixin, ConfigMixin):
    """Stands for the text encoder: a table with one row for each (place, word) pair.

    A row for each place, not one for each word, so that the pooled vector (the mean over places) still tells
    "a red circle and a blue square" from "a blue circle and a red square".
    """

    @register_to_config
    def __init__(self, words: int = len(vocabulary(SHAPES)), places: int = MAX_WORDS, dim: int = 256):
        super().__init__()
        self.table = nn.Embedding(places * words, dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Word indices (B, places) -> embeddings (B, places, dim) and their mean (B, dim)."""
        place = torch.arange(self.config.places, device=tokens.device)
        rows = self.table(tokens + place * self.config.words)
        return rows, rows.mean(1)


def patchify(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] -> tokens (B, 256, 48) in [-1, 1], row by row."""
    return _tokens(2 * pictures - 1)


def unpatchify(tokens: Tensor) -> Tensor:
    """Inverse of `patchify`, clamped to [0, 1]."""
    return (_pictures(tokens) / 2 + 0.5).clamp(0, 1)


def _tokens(x: Tensor) -> Tensor:
    """(B, 3, 64, 64) -> (B, 256, 48), values as they are."""
    x = x.unflatten(2, (GRID, PATCH)).unflatten(4, (GRID, PATCH))
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _pictures(tokens: Tensor) -> Tensor:
    """(B, 256, 48) -> (B, 3, 64, 64), values as they are."""
    x: Tensor = tokens.unflatten(1, (GRID, GRID)).unflatten(3, (3, PATCH, PATCH))
    return x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE)


def position_ids(device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Rotary ids of picture tokens (256, 3) as (0, row, column) and of text tokens (8, 3), all zero as in FLUX."""
    axis = torch.arange(GRID, device=device)
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    picture = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
    return picture, torch.zeros(MAX_WORDS, 3, dtype=torch.long, device=device)


def initial_noise(seeds: Sequence[int]) -> Tensor:
    """Standard normal tokens (B, 256, 48) in fp32, one picture for each seed, on the CPU.

    Raw Philox words through the normal quantile, so that a seed gives the same noise on every platform and
    with every version of every library (to the last bits of the quantile function).
    """
    shape = (GRID * GRID, CHANNELS)
    words = np.stack([np.random.Philox(key=seed).random_raw(np.prod(shape)) for seed in seeds])
    uniform = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    return torch.from_numpy(ndtri(uniform).astype(np.float32)).reshape(len(seeds), *shape)


def predict(transformer: Transformer, x: Tensor, sigma: Tensor, words: Tensor, pooled: Tensor) -> Tensor:
    """The velocity (B, 256, 48) that `transformer` predicts for tokens `x` at noise levels `sigma` (B,) in [0, 1].

    `words` and `pooled` are what `WordEncoder` gives. FLUX takes tokens and their rotary ids, the others whole
    pictures, and PixArt no pooled text.
    """
    text = {"encoder_hidden_states": words, "return_dict": False}
    if not isinstance(transformer, PixArtTransformer2DModel):
        text["pooled_projections"] = pooled
    if not isinstance(transformer, FluxTransformer2DModel):
        return _tokens(transformer(_pictures(x), timestep=1000 * sigma, **text)[0])
    picture_ids, text_ids = position_ids(x.device)
    velocity: Tensor = transformer(x, timestep=sigma, img_ids=picture_ids, txt_ids=text_ids, **text)[0]
    return velocity


class ShapesPipeline(DiffusionPipeline):
    """Pictures of a world (a name in `orbitdit.shapes.worlds.WORLDS`) from prompts of `orbitdit.shapes.prompts`."""

    model_cpu_offload_seq = "text_encoder->transformer"
    initial_noise = staticmethod(initial_noise)

    def __init__(
        self,
        transformer: Transformer,
        text_encoder: WordEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        world: str = SHAPES.name,
    ):
        super().__init__()
        if not isinstance(world, str) or world not in WORLDS:
            raise CheckpointError(f"world {world!r} is unknown to this version of orbitdit: it has {', '.join(WORLDS)}")
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)
        self.register_to_config(world=world)

    @property
    def world(self) -> World:
        """The world that the pictures show."""
        return WORLDS[self.config.world]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 12,
        guidance_scale: float = 3.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Generate one 64x64 picture for each prompt.

        `latents` are initial noise tokens (B, 256, 48), see `initial_noise`; without them noise is drawn from
        `generator`. `output_type` is "pil", "np" (B, 64, 64, 3) or "pt" (B, 3, 64, 64), both in [0, 1].
        Raises PromptError for a word the world does not know, ValueError for wrong latents or output types.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        shape = (len(prompts), GRID * GRID, CHANNELS)
        if latents is None:
            latents = torch.randn(shape, generator=generator, device=generator.device if generator else None)
        if latents.shape != shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; expected {shape}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type {output_type!r} is unknown; choose 'pil', 'np' or 'pt'")
        device, dtype = self._execution_device, self.transformer.dtype
        guided = guidance_scale != 1.0
        texts = prompts + [""] * len(prompts) * guided
        tokens = torch.tensor([tokenize(text, self.world) for text in texts], device=device)
        words, pooled = (e.to(dtype) for e in self.text_encoder(tokens))
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), device=device
        )
        x = latents.to(device, torch.float32)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            sigma = (timestep / 1000).expand(len(texts))
            tokens = torch.cat([x, x] if guided else [x]).to(dtype)
            velocity = predict(self.transformer, tokens, sigma, words, pooled).float()
            if guided:
                with_prompt, without = velocity.chunk(2)
                velocity = without + guidance_scale * (with_prompt - without)
            x = self.scheduler.step(velocity, timestep, x, return_dict=False)[0]
        pictures: Any = unpatchify(x).cpu()
        if output_type != "pt":
            pictures = pictures.permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            pictures = self.numpy_to_pil(pictures)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)
