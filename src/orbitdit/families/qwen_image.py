"""Qwen-Image: two streams and a joint attention, each stream with its own modulation and feed-forward."""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=("QwenImageTransformer2DModel", "QwenImageControlNetModel"),
    rules=(
        *modulation("transformer_blocks.*.img_mod.1", "transformer_blocks.*.txt_mod.1"),
        *blocks("transformer_blocks.*"),
    ),
    shared=(qkv("attn"), added_qkv("attn")),
)
