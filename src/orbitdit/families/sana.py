"""Sana: linear self-attention and cross-attention to text; the feed-forward is of convolutions, which stay."""

from orbitdit.families import Family, blocks, kv, qkv

FAMILY = Family(
    models=("SanaTransformer2DModel", "SanaVideoTransformer3DModel", "SanaControlNetModel"),
    rules=blocks("transformer_blocks.*"),
    shared=(qkv("attn1"), kv("attn2")),
)
