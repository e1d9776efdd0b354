"""Write docs/plans.md: what the plan decides for every transformer and ControlNet of diffusers, and why.

Models are built on the meta device, with their defaults or the settings below: no weights are needed.

    python -m scripts.plans
"""

import inspect
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import diffusers
from accelerate import init_empty_weights
from torch import nn

from orbitdit import OrbitQuantConfig, plan
from orbitdit.families import FAMILIES
from orbitdit.policy import Plan

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plans.md"
CONFIG = OrbitQuantConfig("w4a4")
PLACES = ("diffusers.models.transformers.", "diffusers.models.controlnets.")
BLOCK = re.compile(r"(.*?)\.(\d+)\.(.*)")

LATTE = {
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "caption_channels": 4096,
}
HUNYUAN_DIT = {"in_channels": 4, "patch_size": 2, "hidden_size": 1408}
U_NET_PART = {"num_attention_heads": 8, "attention_head_dim": 160, "in_channels": 1280, "num_layers": 10}
SETTINGS: dict[str, list[dict]] = {
    "ConsisIDTransformer3DModel": [{"is_train_face": True}],
    "ControlNetUnionModel": [{"num_attention_heads": 8, "addition_time_embed_dim": 256}],
    "CosmosTransformer3DModel": [{"use_crossattn_projection": True, "img_context_dim_in": 1152}],
    "DreamLiteTransformer2DModel": [U_NET_PART],
    "EasyAnimateTransformer3DModel": [{"in_channels": 16, "out_channels": 16, "patch_size": 2}],
    "HiDreamImageTransformer2DModel": [
        {"patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096], "llama_layers": [*range(32)] + [31] * 16}
    ],
    "HunyuanDiT2DModel": [{**HUNYUAN_DIT, "num_layers": 40}],
    "HunyuanDiT2DControlNetModel": [HUNYUAN_DIT],
    "HunyuanVideoFramepackTransformer3DModel": [{"has_image_proj": True, "has_clean_x_embedder": True}],
    "LTX2VideoTransformer3DModel": [{"gated_attn": True, "audio_gated_attn": True}],
    "LatteTransformer3DModel": [LATTE],
    "LuminaNextDiT2DModel": [{"num_layers": 24, "num_kv_heads": 8}],
    "MotifVideoTransformer3DModel": [
        {
            "image_embed_dim": 1152,
            "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        }
    ],
    "OmniGenTransformer2DModel": [{"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}],
    "PixArtTransformer2DModel": [{"caption_channels": 4096}],
    "SD3Transformer2DModel": [{}, {"num_layers": 24, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}],
    "SkyReelsV2Transformer3DModel": [{"inject_sample_info": True}],
    "Transformer2DModel": [{**U_NET_PART, "cross_attention_dim": 2048, "use_linear_projection": True}],
    "TransformerTemporalModel": [U_NET_PART],
    "WanTransformer3DModel": [{}, {"added_kv_proj_dim": 5120, "image_dim": 1280}],
    "ZImageControlNetModel": [
        {
            "control_layers_places": [0, 5, 10, 15, 20, 25],
            "control_refiner_layers_places": [0, 1],
            "control_in_dim": 16,
            "add_control_noise_refiner": "control_noise_refiner",
        }
    ],
    "ZImageTransformer2DModel": [{"siglip_feat_dim": 1152}],
}
"""Settings of the classes that cannot be built without, or that have more layers with some."""


def models() -> Iterator[tuple[str, dict]]:
    """Class names and settings of everything in diffusers' models.transformers and models.controlnets."""
    for name in sorted(dir(diffusers)):
        cls = getattr(diffusers, name)
        wanted = inspect.isclass(cls) and cls.__module__.startswith(PLACES) and issubclass(cls, diffusers.ModelMixin)
        if wanted and "Multi" not in name:  # several ControlNets side by side
            yield from ((name, settings) for settings in SETTINGS.get(name, [{}]))


def build(name: str, settings: dict) -> nn.Module:
    """The model of this class on the meta device."""
    with init_empty_weights():
        return getattr(diffusers, name)(**settings)


def braces(names: Iterable[str]) -> str:
    """Names in their order, what shares a beginning in braces: "attn.{to_q, to_k}, proj"."""
    groups: dict[str, list[str]] = {}
    for name in names:
        head, dot, tail = name.partition(".")
        groups.setdefault(head, []).extend([tail] if dot else [])
    if all(head.isdigit() and not tails for head, tails in groups.items()):
        return ", ".join(ranges([int(head) for head in groups]))
    parts = []
    for head, tails in groups.items():
        inner = braces(tails)
        several = len({tail.partition(".")[0] for tail in tails}) > 1
        parts.append(head + (f".{{{inner}}}" if several else f".{inner}" if tails else ""))
    return ", ".join(parts)


def ranges(numbers: list[int]) -> Iterator[str]:
    """Rising numbers, those in a row together: "0-18", "21"."""
    for _, row in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in row]
        yield f"{first}-{rest[-1]}" if rest else str(first)


def decisions(found: Plan) -> dict[str, str]:
    """The layers of each decision: "W4A4, block" -> "transformer_blocks.* x19: attn.{to_q, to_k}; ..."."""
    blocks: dict[str, dict[tuple[str, str], set[str]]] = {}
    for row in found.layers:
        match = BLOCK.match(row.name)
        place = (match[1], match[3]) if match else (row.name, "")
        number = match[2] if match else ""
        blocks.setdefault(f"{row.label}, {row.reason}", {}).setdefault(place, set()).add(number)
    return {decision: "; ".join(lines(places)) for decision, places in blocks.items()}


def lines(places: dict[tuple[str, str], set[str]]) -> Iterator[str]:
    """What is in the same blocks of a list together, after what is in no list."""
    alone = [prefix for prefix, inner in places if not inner]
    if alone:
        yield braces(alone)
    lists: dict[tuple[str, frozenset[str]], list[str]] = {}
    for (prefix, inner), numbers in places.items():
        if inner:
            lists.setdefault((prefix, frozenset(numbers)), []).append(inner)
    for (prefix, numbers), inner in lists.items():
        which = f"* x{len(numbers)}" if len(numbers) > 1 else next(iter(numbers))
        yield f"{prefix}.{which}: {braces(inner)}"


def section(name: str, settings: dict, found: Plan) -> str:
    """The part of the page for one model and its plan."""
    quantized, int4, kept = found.counts
    by = "its family" if name in FAMILIES else "structure"
    items = (f"- {decision}: `{layers}`\n" for decision, layers in decisions(found).items())
    return f"{title(name, settings)}\n\nBy {by}: {quantized} W4A4, {int4} INT4, {kept} kept.\n\n{''.join(items)}"


def title(name: str, settings: dict) -> str:
    """The heading of a model's part."""
    given = ", ".join(list(settings)[:3]) + (", ..." if len(settings) > 3 else "")
    return f"### {name}" + (f" with {given}" if given else "")


INTRODUCTION = f"""# What the plan decides

For every transformer and ControlNet of diffusers {diffusers.__version__}: the layers that are quantized (W4A4 here),
stored as INT4 or kept, and why. `*` stands for the numbers of blocks, with how many there are. Families have rules in
`src/orbitdit/families`; other classes are decided by the structure of their layers' names, which decides as the
families do where there are both. Settings other than the defaults stand in `scripts/plans.py`.

| reason | layers |
|---|---|
| block | attention and feed-forward in repeated blocks: they carry the tokens |
| AdaLN modulation | what makes scales, shifts and gates out of the time step, in repeated blocks |
| embedder | what embeds time steps, text or images, in repeated blocks |
| conditioning | repeated blocks of networks that make the conditioning: refiners of text, projections of captions |
| gate | gates of heads and routers of experts: a few numbers a token |
| outside blocks | everything else |

`python -m scripts.plans` writes this page; a test compares it.
"""


def main() -> None:
    """Build every model and write the page."""
    diffusers.utils.logging.set_verbosity_error()
    sections = (section(*model, plan(build(*model), CONFIG)) for model in models())
    PAGE.write_text("\n".join([INTRODUCTION, *sections]))


if __name__ == "__main__":
    main()
