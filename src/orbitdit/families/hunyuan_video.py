"""HunyuanVideo and its kin: FLUX's blocks, after an embedder of the text that refines its tokens and is kept.

A single-stream block splits its normalized tokens for the attention, which joins them again: its MLP takes another
tensor than q, k and v.
"""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanImageTransformer2DModel",
    ),
    rules=(
        *modulation(
            "transformer_blocks.*.norm1.linear",
            "transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm.linear",
        ),
        *blocks("transformer_blocks.*", "single_transformer_blocks.*"),
    ),
    shared=(qkv("attn"), added_qkv("attn")),
)
