"""PixArt: self-attention, cross-attention to text, feed-forward. One modulation for all blocks lies outside of them."""

from orbitdit.families import Family, blocks, kv, qkv

FAMILY = Family(
    models=("PixArtTransformer2DModel",),
    rules=blocks("transformer_blocks.*"),
    shared=(qkv("attn1"), kv("attn2")),
)
