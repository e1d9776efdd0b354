"""Wan 2.1 and 2.2 and their kin: self-attention, cross-attention to text (and an image), feed-forward.

Modulation is a table in each block. VACE has blocks for control beside them; Animate lets tokens attend to faces.
"""

from orbitdit.families import Family, blocks, kv, qkv

FAMILY = Family(
    models=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "AnyFlowTransformer3DModel",
    ),
    rules=blocks("blocks.*", "vace_blocks.*", "face_adapter.*"),
    shared=(qkv("attn1"), kv("attn2"), ("attn2.add_k_proj", "attn2.add_v_proj")),
    pending={"norm1": qkv("attn1"), "norm3": ("ffn.net.0.proj",)},
)
