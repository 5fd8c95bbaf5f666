"""Tiny models of diffusers: UNets, autoencoders and transformers of one and of two streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .case import Built, CannotBuild, Case, Inputs, randn

SIDE = (16, 24, 32)  # of latent maps
LENGTH = (6, 9, 32)  # text tokens
WIDTH = 32

Make = Callable[[int], tuple[dict[str, Any], Callable[[int, int], dict[str, Any]]]]


def _time(batch: int) -> torch.Tensor:
    return torch.arange(1, batch + 1)


def _map(channels: int = 4) -> Callable[[int, int], dict[str, Any]]:
    return lambda batch, g: {"sample": randn(batch, channels, SIDE[g], SIDE[g] + 8 * (g == 1)), "timestep": _time(batch)}


def _text(width: int = WIDTH) -> Callable[[int, int], dict[str, Any]]:
    return lambda batch, g: {"encoder_hidden_states": randn(batch, LENGTH[g], width, seed=1)}


def _both(*parts: Callable[[int, int], dict[str, Any]]) -> Callable[[int, int], dict[str, Any]]:
    return lambda batch, g: {key: value for part in parts for key, value in part(batch, g).items()}


def _hidden(channels: int = 4) -> Callable[[int, int], dict[str, Any]]:
    return lambda batch, g: {"hidden_states": randn(batch, channels, SIDE[g], SIDE[g] + 8 * (g == 1)), "timestep": _time(batch)}


def _flux(batch: int, g: int) -> dict[str, Any]:
    tokens = (9, 16, 32)[g]
    return {
        "hidden_states": randn(batch, tokens, 4),
        "encoder_hidden_states": randn(batch, LENGTH[g], WIDTH, seed=1),
        "pooled_projections": randn(batch, WIDTH, seed=2),
        "timestep": _time(batch) / 10,
        "img_ids": randn(tokens, 3),
        "txt_ids": randn(LENGTH[g], 3),
        "guidance": None,
    }


def _video(channels: int = 4) -> Callable[[int, int], dict[str, Any]]:
    return lambda batch, g: {"sample": randn(batch, channels, (4, 6, 8)[g], SIDE[g], SIDE[g]), "timestep": _time(batch)}


_BLOCKS = {"block_out_channels": (16, 32), "norm_num_groups": 8}
_DOWN, _UP = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
_CROSS = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
_CODER = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_PATCHED = {"sample_size": 16, "patch_size": 2, "in_channels": 4, **_HEADS, "num_layers": 2}

MODELS: dict[str, tuple[dict[str, Any], Callable[[int, int], dict[str, Any]]]] = {
    "UNet1DModel": (
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "extra_in_channels": 64,
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
            "block_out_channels": (32, 32, 64),
        },
        lambda batch, g: {"sample": randn(batch, 4, (32, 48, 64)[g]), "timestep": 3},
    ),
    "UNet2DModel": ({"in_channels": 4, "out_channels": 4, "down_block_types": _DOWN, "up_block_types": _UP, **_BLOCKS}, _map()),
    "UNet2DConditionModel": ({**_CROSS, **_BLOCKS, "cross_attention_dim": WIDTH, "attention_head_dim": 4}, _both(_map(), _text())),
    "UNet3DConditionModel": (
        {
            "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
            "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
            **_BLOCKS,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 4,
        },
        _both(_video(), _text()),
    ),
    "ControlNetModel": (
        {"down_block_types": _CROSS["down_block_types"], **_BLOCKS, "cross_attention_dim": WIDTH, "attention_head_dim": 4},
        _both(_map(), _text(), lambda batch, g: {"controlnet_cond": randn(batch, 3, 8 * SIDE[g], 8 * (SIDE[g] + 8 * (g == 1)))}),
    ),
    "AutoencoderKL": ({**_CODER, **_BLOCKS, "latent_channels": 4}, lambda batch, g: {"sample": randn(batch, 3, SIDE[g], SIDE[g] + 16)}),
    "AsymmetricAutoencoderKL": (
        {
            **{key: _CODER[key] for key in ("down_block_types", "up_block_types")},
            "down_block_out_channels": (16, 32),
            "up_block_out_channels": (16, 32),
            "norm_num_groups": 8,
        },
        lambda batch, g: {"sample": randn(batch, 3, SIDE[g], SIDE[g] + 16)},
    ),
    "AutoencoderTiny": (
        {
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
            "num_encoder_blocks": (1, 2),
            "num_decoder_blocks": (2, 1),
        },
        lambda batch, g: {"sample": randn(batch, 3, SIDE[g], SIDE[g] + 16).sigmoid()},
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 4,
            "attention_head_dim": 8,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (16, 32),
            "decoder_block_out_channels": (16, 32),
            "encoder_layers_per_block": (1, 2),
            "decoder_layers_per_block": (2, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "downsample_block_type": "conv",
            "upsample_block_type": "interpolate",
        },
        lambda batch, g: {"sample": randn(batch, 3, SIDE[g], SIDE[g] + 16)},
    ),
    "AutoencoderOobleck": (
        {
            "encoder_hidden_size": 16,
            "downsampling_ratios": [2, 4],
            "decoder_channels": 16,
            "decoder_input_channels": 8,
            "channel_multiples": [1, 2],
        },
        lambda batch, g: {"sample": randn(batch, 2, (64, 96, 128)[g])},
    ),
    "VQModel": ({**_CODER, **_BLOCKS, "num_vq_embeddings": 32}, lambda batch, g: {"sample": randn(batch, 3, SIDE[g], SIDE[g] + 16)}),
    "DiTTransformer2DModel": (
        {**_PATCHED, "out_channels": 4, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 10},
        _both(
            lambda batch, g: {"hidden_states": randn(batch, 4, SIDE[g], SIDE[g])},
            lambda batch, g: {"timestep": _time(batch), "class_labels": _time(batch)},
        ),
    ),
    "PixArtTransformer2DModel": (
        {**_PATCHED, "out_channels": 8, "cross_attention_dim": WIDTH, "caption_channels": 24, "use_additional_conditions": False},
        _both(_hidden(), _text(24), lambda batch, g: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    ),
    "SD3Transformer2DModel": (
        {**_PATCHED, "joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH, "pooled_projection_dim": 24, "out_channels": 4},
        _both(_hidden(), _text(), lambda batch, g: {"pooled_projections": randn(batch, 24)}),
    ),
    "SD3ControlNetModel": (
        {**_PATCHED, "joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH, "pooled_projection_dim": 24, "out_channels": 4},
        _both(
            _hidden(),
            _text(),
            lambda batch, g: {"pooled_projections": randn(batch, 24), "controlnet_cond": randn(batch, 4, SIDE[g], SIDE[g] + 8 * (g == 1))},
        ),
    ),
    "FluxTransformer2DModel": (
        {
            "patch_size": 1,
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            **_HEADS,
            "joint_attention_dim": WIDTH,
            "pooled_projection_dim": WIDTH,
            "axes_dims_rope": [4, 4, 8],
            "guidance_embeds": False,
        },
        _flux,
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 32,
            "patch_size": 2,
            "in_channels": 4,
            "num_mmdit_layers": 2,
            "num_single_dit_layers": 2,
            **_HEADS,
            "joint_attention_dim": WIDTH,
            "caption_projection_dim": WIDTH,
            "out_channels": 4,
            "pos_embed_max_size": 512,
        },
        _both(
            lambda batch, g: {"hidden_states": randn(batch, 4, SIDE[g], SIDE[g])}, _text(), lambda batch, g: {"timestep": _time(batch) / 10}
        ),
    ),
    "SanaTransformer2DModel": (
        {
            **_PATCHED,
            "patch_size": 1,
            "out_channels": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 16,
            "cross_attention_dim": WIDTH,
            "caption_channels": 24,
        },
        _both(_hidden(), _text(24)),
    ),
    "CogVideoXTransformer3DModel": (
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 16,
            "text_embed_dim": WIDTH,
            "num_layers": 2,
            "sample_width": 16,
            "sample_height": 16,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
        },
        lambda batch, g: {
            "hidden_states": randn(batch, (1, 2, 3)[g], 4, 16, 16),
            "encoder_hidden_states": randn(batch, 8, WIDTH, seed=1),
            "timestep": _time(batch),
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            "in_channels": 4,
            "out_channels": 4,
            **_HEADS,
            "cross_attention_dim": WIDTH,
            "num_layers": 2,
            "caption_channels": 24,
            "qk_norm": "rms_norm_across_heads",
        },
        lambda batch, g: {
            "hidden_states": randn(batch, (2 * 3 * 3, 2 * 4 * 4, 2 * 4 * 4)[g], 4),
            "encoder_hidden_states": randn(batch, LENGTH[g], 24, seed=1),
            "timestep": _time(batch),
            "encoder_attention_mask": torch.ones(batch, LENGTH[g]),
            "num_frames": 2,
            "height": (3, 4, 4)[g],
            "width": (3, 4, 4)[g],
        },
    ),
    "WanTransformer3DModel": (
        {
            "patch_size": (1, 2, 2),
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 64,
        },
        lambda batch, g: {
            "hidden_states": randn(batch, 4, (2, 3, 2)[g], SIDE[g], SIDE[g]),
            "encoder_hidden_states": randn(batch, LENGTH[g], 24, seed=1),
            "timestep": _time(batch),
        },
    ),
    "HunyuanDiT2DModel": (
        {
            **_HEADS,
            "sample_size": 16,
            "patch_size": 2,
            "in_channels": 4,
            "num_layers": 4,
            "hidden_size": WIDTH,
            "cross_attention_dim": WIDTH,
            "cross_attention_dim_t5": WIDTH,
            "pooled_projection_dim": 4,
            "text_len": 4,
            "text_len_t5": 4,
            "activation_fn": "gelu-approximate",
        },
        lambda batch, g: {
            "hidden_states": randn(batch, 4, 16, 16),
            "timestep": _time(batch).float(),
            "encoder_hidden_states": randn(batch, 4, WIDTH, seed=1),
            "text_embedding_mask": torch.ones(batch, 4),
            "encoder_hidden_states_t5": randn(batch, 4, WIDTH, seed=2),
            "text_embedding_mask_t5": torch.ones(batch, 4),
            "image_meta_size": torch.ones(batch, 6),
            "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": [randn(64, 16), randn(64, 16, seed=1)],
        },
    ),
    "PriorTransformer": (
        {**_HEADS, "num_layers": 2, "embedding_dim": 24, "num_embeddings": 7, "additional_embeddings": 4},
        lambda batch, g: {
            "hidden_states": randn(batch, 24),
            "timestep": _time(batch),
            "proj_embedding": randn(batch, 24, seed=1),
            "encoder_hidden_states": randn(batch, 7, 24, seed=2),
        },
    ),
    "UVit2DModel": (
        {
            "hidden_size": WIDTH,
            "cond_embed_dim": 24,
            "micro_cond_encode_dim": 4,
            "micro_cond_embed_dim": 20,
            "encoder_hidden_size": 24,
            "vocab_size": 40,
            "codebook_size": 32,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 2,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "block_num_heads": 2,
            "intermediate_size": 48,
        },
        lambda batch, g: {
            "input_ids": torch.zeros(batch, SIDE[g], SIDE[g], dtype=torch.long),
            "encoder_hidden_states": randn(batch, LENGTH[g], 24),
            "pooled_text_emb": randn(batch, 24),
            "micro_conds": torch.ones(batch, 5),
        },
    ),
}


def cases() -> Iterator[Case]:
    for name in MODELS:
        yield Case("diffusers", name, lambda geometry, name=name: build(name, geometry))  # type: ignore[misc]


def build(name: str, geometry: int) -> Built:
    import diffusers

    config, make = MODELS[name]
    model_class = getattr(diffusers, name, None)
    if model_class is None:
        raise CannotBuild("this version of diffusers does not have it")

    def inputs(batch: int) -> Inputs:
        return (), make(batch, geometry)

    return Built(model_class(**config), inputs)
