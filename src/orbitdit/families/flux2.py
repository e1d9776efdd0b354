"""FLUX.2: one modulation outside serves all blocks; a single-stream block has one layer for q, k, v and its MLP."""

from orbitdit.families import Family, added_qkv, blocks, qkv

FAMILY = Family(
    models=("Flux2Transformer2DModel",),
    rules=blocks("transformer_blocks.*", "single_transformer_blocks.*"),
    shared=(qkv("attn"), added_qkv("attn")),
)
