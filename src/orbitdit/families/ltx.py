"""LTX-Video: PixArt's blocks for video. LTX-2 has a second, narrower stream of audio, and attention between the two."""

from orbitdit.families import Family, blocks, gates, kv, qkv

FAMILY = Family(
    models=("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
    rules=(
        *gates("*.to_gate_logits"),
        *blocks("transformer_blocks.*"),
    ),
    shared=(
        *map(qkv, ("attn1", "audio_attn1")),
        *map(kv, ("attn2", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")),
    ),
)
