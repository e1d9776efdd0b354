"""AuraFlow: a few blocks of two streams, then many of one; its feed-forward is gated."""

from orbitdit.families import Family, added_qkv, blocks, modulation, qkv

FAMILY = Family(
    models=("AuraFlowTransformer2DModel",),
    rules=(
        *modulation(
            "joint_transformer_blocks.*.norm1.linear",
            "joint_transformer_blocks.*.norm1_context.linear",
            "single_transformer_blocks.*.norm1.linear",
        ),
        *blocks("joint_transformer_blocks.*", "single_transformer_blocks.*"),
    ),
    shared=(
        qkv("attn"),
        added_qkv("attn"),
        ("ff.linear_1", "ff.linear_2"),
        ("ff_context.linear_1", "ff_context.linear_2"),
    ),
)
