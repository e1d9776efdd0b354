"""Tiny random models of further classes of the families: one row a class, with what is expected of it."""

import diffusers
import torch

from families import Family

FLUX = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
}
HUNYUAN = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
}
COGVIEW = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "text_embed_dim": 24,
    "time_embed_dim": 32,
    "condition_dim": 8,
    "sample_size": 8,
}
SANA = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_layers": 2,
    "num_cross_attention_heads": 3,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 48,
    "caption_channels": 24,
    "sample_size": 8,
}


def flux(**others) -> dict:
    """Inputs of FLUX.1's kin: 12 image tokens, 5 text tokens."""
    return {
        "hidden_states": (2, 12, 8),
        "encoder_hidden_states": (2, 5, 24),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": torch.zeros(12, 3),
        "txt_ids": torch.zeros(5, 3),
        **others,
    }


def wan(**others) -> dict:
    """Inputs of Wan's kin: 2 latent frames of 8x8, 6 text tokens."""
    text = {"encoder_hidden_states": (1, 6, 16)}
    return {"hidden_states": (1, 4, 2, 8, 8), "timestep": torch.tensor([300]), **text, **others}


def hunyuan(**others) -> dict:
    """Inputs of HunyuanVideo's kin: 2 latent frames of 4x4, 6 text tokens."""
    return {
        "hidden_states": (1, 4, 2, 4, 4),
        "timestep": torch.tensor([300]),
        "encoder_hidden_states": (1, 6, 24),
        "encoder_attention_mask": torch.ones(1, 6),
        **others,
    }


def cogview() -> dict:
    size = torch.tensor([[64.0, 64.0]])
    return {
        "hidden_states": (1, 4, 8, 8),
        "encoder_hidden_states": (1, 6, 24),
        "timestep": torch.tensor([300]),
        "original_size": size,
        "target_size": size,
        "crop_coords": 0 * size,
    }


FURTHER = {
    "flux-controlnet": Family(
        diffusers.FluxControlNetModel,
        {**FLUX, "pooled_projection_dim": 32},
        lambda: flux(pooled_projections=(2, 32), controlnet_cond=(2, 12, 8)),
        counts=(22, 4, 10),
        encodings=12,
    ),
    "bria": Family(diffusers.BriaTransformer2DModel, FLUX, flux, counts=(22, 4, 6), encodings=12),
    "bria-fibo": Family(
        diffusers.BriaFiboTransformer2DModel,
        {**FLUX, "text_encoder_dim": 16},
        lambda: flux(text_encoder_layers=[(2, 5, 16)] * 3),
        counts=(22, 4, 9),
        encodings=12,
    ),
    "longcat-image": Family(
        diffusers.LongCatImageTransformer2DModel,
        {**FLUX, "pooled_projection_dim": 24},
        flux,
        counts=(22, 4, 6),
        encodings=12,
    ),
    "ovis-image": Family(
        diffusers.OvisImageTransformer2DModel,
        {**FLUX, "out_channels": 8},
        flux,
        counts=(22, 4, 6),
        encodings=12,
    ),
    "qwen-image-controlnet": Family(
        diffusers.QwenImageControlNetModel,
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        lambda: {
            "hidden_states": (1, 12, 8),
            "controlnet_cond": (1, 12, 8),
            "encoder_hidden_states": (1, 5, 24),
            "encoder_hidden_states_mask": torch.ones(1, 5),
            "timestep": torch.tensor([0.3]),
            "img_shapes": lambda: [[(1, 3, 4)]],
        },
        counts=(24, 4, 7),
        encodings=16,
    ),
    "z-image-omni": Family(
        diffusers.ZImageTransformer2DModel,
        {
            "in_channels": 16,
            "dim": 48,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 24,
            "siglip_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [256, 32, 32],
        },
        lambda: {
            "x": [[(16, 1, 8, 8), (16, 1, 8, 8)]],
            "t": torch.tensor([0.4]),
            "cap_feats": [[(7, 24), (5, 24)]],
            "siglip_feats": [[(2, 2, 24), (2, 2, 24)]],
            "image_noise_mask": lambda: [[0, 1]],
        },
        counts=(28, 2, 7),
        encodings=16,
    ),
    "sd3-controlnet": Family(
        diffusers.SD3ControlNetModel,
        {
            "sample_size": 8,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 48,
            "pooled_projection_dim": 32,
            "pos_embed_max_size": 4,
        },
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "controlnet_cond": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 24),
            "pooled_projections": (2, 32),
            "timestep": torch.tensor([300.0, 800.0]),
        },
        counts=(24, 4, 7),
        encodings=16,
    ),
    "hidream": Family(
        diffusers.HiDreamImageTransformer2DModel,
        {
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "caption_channels": [24, 32],
            "text_emb_dim": 16,
            "num_routed_experts": 2,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1],
        },
        lambda: {
            "hidden_states": (1, 4, 8, 8),
            "timesteps": torch.tensor([300]),
            "encoder_hidden_states_t5": (1, 5, 24),
            "encoder_hidden_states_llama3": [(1, 5, 32), (1, 5, 32)],
            "pooled_embeds": (1, 16),
        },
        counts=(33, 2, 10),
        encodings=20,
    ),
    "wan-image": Family(
        diffusers.WanTransformer3DModel,
        {**WAN, "added_kv_proj_dim": 48, "image_dim": 16},
        lambda: wan(encoder_hidden_states=(1, 512, 16), encoder_hidden_states_image=(1, 4, 16)),
        counts=(24, 0, 8),
        encodings=16,
    ),
    "wan-vace": Family(
        diffusers.WanVACETransformer3DModel,
        {**WAN, "vace_layers": [0, 1], "vace_in_channels": 8},
        lambda: wan(control_hidden_states=(1, 8, 2, 8, 8)),
        counts=(43, 0, 6),
        encodings=31,
    ),
    "wan-animate": Family(
        diffusers.WanAnimateTransformer3DModel,
        {
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "added_kv_proj_dim": 48,
            "image_dim": 16,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        lambda: wan(
            hidden_states=(1, 12, 2, 8, 8),
            encoder_hidden_states=(1, 512, 16),
            encoder_hidden_states_image=(1, 4, 16),
            pose_hidden_states=(1, 4, 1, 8, 8),
            face_pixel_values=(1, 3, 4, 16, 16),
        ),
        counts=(28, 0, 9),
        encodings=20,
    ),
    "chronoedit": Family(diffusers.ChronoEditTransformer3DModel, WAN, wan, counts=(20, 0, 6), encodings=14),
    "skyreels": Family(diffusers.SkyReelsV2Transformer3DModel, WAN, wan, counts=(20, 0, 6), encodings=14),
    "anyflow": Family(
        diffusers.AnyFlowTransformer3DModel,
        WAN,
        lambda: wan(
            hidden_states=(1, 2, 4, 8, 8), timestep=torch.tensor([[300, 300]]), r_timestep=torch.tensor([[200, 200]])
        ),
        counts=(20, 0, 8),
        encodings=14,
    ),
    "framepack": Family(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        {
            **HUNYUAN,
            "num_single_layers": 1,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
            "has_image_proj": True,
            "image_proj_dim": 16,
            "has_clean_x_embedder": True,
        },
        lambda: hunyuan(
            pooled_projections=(1, 8),
            guidance=torch.tensor([6000.0]),
            image_embeds=(1, 4, 16),
            indices_latents=torch.arange(2),
            latents_clean=(1, 4, 2, 4, 4),
            indices_latents_clean=torch.arange(2),
            latents_history_2x=(1, 4, 2, 4, 4),
            indices_latents_history_2x=torch.arange(2),
            latents_history_4x=(1, 4, 4, 8, 8),
            indices_latents_history_4x=torch.arange(4),
        ),
        counts=(17, 3, 22),
        encodings=11,
    ),
    "hunyuan-video-1.5": Family(
        diffusers.HunyuanVideo15Transformer3DModel,
        {**HUNYUAN, "text_embed_2_dim": 16, "image_embed_dim": 8, "rope_axes_dim": (4, 6, 6), "target_size": 16},
        lambda: hunyuan(
            timestep=torch.tensor([300.0], dtype=torch.bfloat16),
            encoder_hidden_states_2=(1, 3, 16),
            encoder_attention_mask_2=torch.ones(1, 3),
            image_embeds=(1, 4, 8),
        ),
        counts=(12, 2, 21),
        encodings=8,
    ),
    "hunyuan-image": Family(
        diffusers.HunyuanImageTransformer2DModel,
        {**HUNYUAN, "num_single_layers": 1, "rope_axes_dim": (8, 8)},
        lambda: hunyuan(timestep=torch.tensor([300.0], dtype=torch.bfloat16), hidden_states=(1, 4, 4, 4)),
        counts=(17, 3, 16),
        encodings=11,
    ),
    "cogview3plus": Family(
        diffusers.CogView3PlusTransformer2DModel,
        {**COGVIEW, "pos_embed_max_size": 8},
        cogview,
        counts=(12, 2, 8),
        encodings=8,
    ),
    "cogview4": Family(
        diffusers.CogView4Transformer2DModel,
        {**COGVIEW, "rope_axes_dim": (8, 8)},
        cogview,
        counts=(12, 2, 8),
        encodings=12,
    ),
    "allegro": Family(
        diffusers.AllegroTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": 16,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 2,
        },
        lambda: {
            "hidden_states": (1, 4, 2, 8, 8),
            "encoder_hidden_states": (1, 1, 5, 16),
            "timestep": torch.tensor([300]),
        },
        counts=(20, 0, 6),
        encodings=14,
    ),
    "ltx2": Family(
        diffusers.LTX2VideoTransformer3DModel,
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "cross_attention_dim": 64,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 4,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 16,
            "gated_attn": True,
            "rope_double_precision": False,
        },
        lambda: {
            "hidden_states": (2, 12, 8),
            "audio_hidden_states": (2, 3, 4),
            "encoder_hidden_states": (2, 5, 16),
            "audio_encoder_hidden_states": (2, 5, 16),
            "timestep": torch.tensor([300, 800]),
            "num_frames": 2,
            "height": 2,
            "width": 3,
            "audio_num_frames": 3,
        },
        counts=(56, 0, 32),
        encodings=40,
    ),
    "sana-video": Family(
        diffusers.SanaVideoTransformer3DModel,
        SANA,
        lambda: {
            "hidden_states": (1, 4, 2, 8, 8),
            "encoder_hidden_states": (1, 5, 24),
            "timestep": torch.tensor([300]),
        },
        counts=(16, 0, 6),
        encodings=10,
    ),
    "sana-controlnet": Family(
        diffusers.SanaControlNetModel,
        SANA,
        lambda: {
            "hidden_states": (2, 4, 8, 8),
            "encoder_hidden_states": (2, 5, 24),
            "controlnet_cond": (2, 4, 8, 8),
            "timestep": torch.tensor([300, 800]),
        },
        counts=(16, 0, 8),
        encodings=10,
    ),
}
