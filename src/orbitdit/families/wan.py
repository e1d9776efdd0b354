"""Wan: self-attention, cross-attention to text (and an image), feed-forward. Modulation is a table in each block."""

from orbitdit.families import Family, blocks, kv, qkv

FAMILY = Family(
    models=("WanTransformer3DModel",),
    rules=blocks("blocks.*"),
    shared=(qkv("attn1"), kv("attn2"), ("attn2.add_k_proj", "attn2.add_v_proj")),
)
