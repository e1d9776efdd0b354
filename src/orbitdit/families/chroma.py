"""Chroma: FLUX.1 without modulation in its blocks: a network of its own, `distilled_guidance_layer`, gives it.

That network is small, and its errors reach every block: it is kept.
"""

from orbitdit.families import Family, added_qkv, blocks, qkv

FAMILY = Family(
    models=("ChromaTransformer2DModel",),
    rules=blocks("transformer_blocks.*", "single_transformer_blocks.*"),
    shared=((*qkv("attn"), "proj_mlp"), added_qkv("attn")),
    source="norm",
)
