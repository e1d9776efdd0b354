"""PixArt and its kin: self-attention, cross-attention to text, feed-forward; one modulation serves all blocks."""

from orbitdit.families import Family, blocks, kv, qkv

FAMILY = Family(
    models=("PixArtTransformer2DModel", "AllegroTransformer3DModel"),
    rules=blocks("transformer_blocks.*"),
    shared=(qkv("attn1"), kv("attn2")),
)
