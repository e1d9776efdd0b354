"""HiDream: blocks of two streams, then of one, with a mixture of gated feed-forwards for image tokens.

Each block takes another layer of its text encoder, through a projection of its own (`caption_projection`, kept).
"""

from orbitdit.families import Family, blocks, modulation, qkv

FAMILY = Family(
    models=("HiDreamImageTransformer2DModel",),
    rules=(
        *modulation(
            "double_stream_blocks.*.block.adaLN_modulation.1",
            "single_stream_blocks.*.block.adaLN_modulation.1",
        ),
        *blocks("double_stream_blocks.*", "single_stream_blocks.*"),
    ),
    shared=(qkv("attn1"), ("attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t"), ("w1", "w3")),
)
