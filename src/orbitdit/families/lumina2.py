"""Lumina 2: one stream of image and text tokens, each refined by blocks of its own before; gated feed-forward."""

from orbitdit.families import Family, blocks, modulation, qkv

FAMILY = Family(
    models=("Lumina2Transformer2DModel",),
    rules=(
        *modulation("layers.*.norm1.linear", "noise_refiner.*.norm1.linear"),
        *blocks("layers.*", "noise_refiner.*", "context_refiner.*"),
    ),
    shared=(qkv("attn"), ("feed_forward.linear_1", "feed_forward.linear_3")),
)
