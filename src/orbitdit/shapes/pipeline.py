"""The embedded model as an ordinary diffusers pipeline: words -> FLUX transformer -> 64x64 picture.

The transformer is diffusers' own `FluxTransformer2DModel`; only its surroundings are small. A 4x4 patch of
pixels is one token (no VAE), and the text encoder is one trained table. Sampling is rectified flow with the
Euler scheduler and classifier-free guidance, as in the large models.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from scipy.special import ndtri
from torch import Tensor, nn

from orbitdit.shapes.prompts import MAX_WORDS, VOCABULARY, tokenize
from orbitdit.shapes.scenes import SIZE

PATCH = 4
GRID = SIZE // PATCH
CHANNELS = 3 * PATCH * PATCH


class WordEncoder(ModelMixin, ConfigMixin):
    """Stands for the text encoder: a table with one row for each (place, word) pair.

    A row for each place, not one for each word, so that the pooled vector (the mean over places) still tells
    "a red circle and a blue square" from "a blue circle and a red square".
    """

    @register_to_config
    def __init__(self, words: int = len(VOCABULARY), places: int = MAX_WORDS, dim: int = 256):
        super().__init__()
        self.table = nn.Embedding(places * words, dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Word indices (B, places) -> embeddings (B, places, dim) and their mean (B, dim)."""
        place = torch.arange(self.config.places, device=tokens.device)
        rows = self.table(tokens + place * self.config.words)
        return rows, rows.mean(1)


def patchify(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) in [0, 1] -> tokens (B, 256, 48) in [-1, 1], row by row."""
    x = pictures.unflatten(2, (GRID, PATCH)).unflatten(4, (GRID, PATCH))
    return (2 * x - 1).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: Tensor) -> Tensor:
    """Inverse of `patchify`, clamped to [0, 1]."""
    x = tokens.unflatten(1, (GRID, GRID)).unflatten(3, (3, PATCH, PATCH))
    return (x.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIZE, SIZE) / 2 + 0.5).clamp(0, 1)


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


class ShapesPipeline(DiffusionPipeline):
    """Pictures of coloured shapes from prompts; see `orbitdit.shapes.prompts` for the words it knows."""

    model_cpu_offload_seq = "text_encoder->transformer"
    initial_noise = staticmethod(initial_noise)

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        text_encoder: WordEncoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

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
    ) -> ImagePipelineOutput | tuple:
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
        tokens = torch.tensor([tokenize(text) for text in texts], device=device)
        words, pooled = (e.to(dtype) for e in self.text_encoder(tokens))
        picture_ids, text_ids = position_ids(device)
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1 / num_inference_steps, num_inference_steps), device=device
        )
        x = latents.to(device, torch.float32)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            velocity = self.transformer(
                hidden_states=torch.cat([x, x] if guided else [x]).to(dtype),
                encoder_hidden_states=words,
                pooled_projections=pooled,
                timestep=(timestep / 1000).expand(len(texts)).to(dtype),
                img_ids=picture_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0].float()
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
