"""Z-Image: one stream of image and text tokens, each refined by two blocks of its own before.

The omni model also takes tokens of SigLIP, refined alike.
"""

from orbitdit.families import Family, blocks, modulation, qkv

FAMILY = Family(
    models=("ZImageTransformer2DModel",),
    rules=(
        *modulation("layers.*.adaLN_modulation.0", "noise_refiner.*.adaLN_modulation.0"),
        *blocks("layers.*", "noise_refiner.*", "context_refiner.*", "siglip_refiner.*"),
    ),
    shared=(qkv("attention"), ("feed_forward.w1", "feed_forward.w3")),
    pending={
        "attention_norm1": qkv("attention"),
        "ffn_norm1": ("feed_forward.w1", "feed_forward.w3"),
        "feed_forward": ("feed_forward.w2",),
    },
    modulation_inputs=("adaLN_modulation",),
)
