"""Wan: self-attention, cross-attention to text (and an image), feed-forward. Modulation is a table in each block."""

from orbitdit.families import Family, blocks, qkv

FAMILY = Family(
    models=("WanTransformer3DModel",),
    rules=blocks("blocks.*"),
    shared=(qkv("attn1"), ("attn2.to_k", "attn2.to_v"), ("attn2.add_k_proj", "attn2.add_v_proj")),
)
