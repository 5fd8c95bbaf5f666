"""What the rules for configurations and inputs of transformers do not find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .case import randint, randn

PATCHES = (5, 7, 8)
LENGTH, WORDS = (12, 20, 64), (10, 90)

_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16}
_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
_SMALL_NET = {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640}
_SERIES = {"prediction_length": 4, "context_length": lambda geometry: (16, 24, 64)[geometry]}
_WINDOW = {"window_size": 2}
_HIERA = {"hidden_size": 16, "window_size_per_stage": [8, 4, 7, 7], "global_attention_blocks": [2]}
_FOUR = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}


_DEFORMABLE = {"backbone_config.out_indices": [1, 2, 3, 4], "backbone_config.window_size": 2}


_DETR = {
    "backbone_config.hidden_sizes": [64, 128, 256, 512],
    "backbone_config.out_indices": [2, 3, 4],
    "encoder_in_channels": [128, 256, 512],
}


def _inside(key: str, overrides: dict[str, Any]) -> dict[str, Any]:
    return {f"{key}.{name}": value for name, value in overrides.items()}


OVERRIDES: dict[str, dict[str, Any]] = {
    "align": _inside("vision_config", _SMALL_NET),
    "align_vision_model": _SMALL_NET,
    "autoformer": _SERIES,
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bit": {"num_groups": 4},
    "bros": {"dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 16},
    "clap": {"audio_config.hidden_size": 512},
    "mobilevitv2": {"n_attn_blocks": [2, 2, 2]},
    "prompt_depth_anything": {**_inside("backbone_config", _FOUR), "neck_hidden_sizes": [16, 32, 48, 64]},
    "chameleon": {"vocabulary_map": {"<image>": 100}},
    "dbrx": {"attn_config.rope_theta": 10000.0},
    "deepseek_v2": _EXPERTS,
    "deit": {"num_hidden_layers": 2},
    "depth_anything": {**_inside("backbone_config", _FOUR), "neck_hidden_sizes": [16, 32, 48, 64]},
    "diffusion_gemma_text": {"num_experts": 4},
    "donut-swin": _WINDOW,
    "dots1": _EXPERTS,
    "efficientnet": _SMALL_NET,
    "emu3": {"vocabulary_map": {"<image>": 100}},
    "esm": {"vocab_size": 128, "pad_token_id": 1, "mask_token_id": 3},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"], "num_layers": 2},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "informer": _SERIES,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "layoutlmv3": {"input_size": lambda geometry: 16 * PATCHES[geometry], "coordinate_size": 11, "shape_size": 10},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    "mask2former": _DEFORMABLE,
    "maskformer-swin": _WINDOW,
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "oneformer": {**_DEFORMABLE, "task_seq_len": lambda geometry: LENGTH[geometry]},
    "patchtsmixer": {"context_length": lambda geometry: (32, 48, 64)[geometry], "patch_length": 8, "patch_stride": 8},
    "patchtst": {"context_length": lambda geometry: (32, 48, 64)[geometry], "patch_length": 8, "patch_stride": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 2},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4},
    "rt_detr": _DETR,
    "rt_detr_v2": _DETR,
    "cvt": {"depth": [1, 2, 3]},
    "lw_detr_vit": {"num_windows": 4, "num_windows_side": 2},
    "lw_detr": {"backbone_config.num_windows": 4, "backbone_config.num_windows_side": 2},
    "xlstm": {"qk_dim_factor": 1.0},
    "sam": {
        "prompt_encoder_config.image_embedding_size": lambda geometry: PATCHES[geometry],
        "prompt_encoder_config.image_size": lambda geometry: 16 * PATCHES[geometry],
    },
    "sam2_hiera_det_model": _HIERA,
    "sam2_vision_model": _inside("backbone_config", _HIERA),
    "seggpt": {"num_hidden_layers": 4, "merge_index": 0, "intermediate_hidden_state_indices": [1, 2, 3]},
    "superpoint": {"keypoint_decoder_dim": 65},
    "swin": _WINDOW,
    "swinv2": _WINDOW,
    "time_series_transformer": _SERIES,
    "timm_backbone": {"backbone": "test_resnet"},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zoedepth": {**_inside("backbone_config", _FOUR), "neck_hidden_sizes": [16, 32, 48, 64]},
}

CLASSES = {
    "speecht5": "SpeechT5ForSpeechToText",
    "musicgen_decoder": "MusicgenForCausalLM",
    "musicgen_melody_decoder": "MusicgenMelodyForCausalLM",
}
"""The class of a type, where the search would find another one."""

Extra = Callable[[Any, int, int], dict[str, Any]]


def _audio_flamingo(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    frames = 2 * config.max_source_positions
    return {"input_features": randn(batch, config.num_mel_bins, frames), "input_features_mask": torch.ones(batch, frames, dtype=torch.long)}


def _boxes(config: Any, batch: int, geometry: int, points: int = 4) -> dict[str, Any]:
    ids = randint(*WORDS, (batch, LENGTH[geometry]))
    return {"input_ids": ids, "bbox": randint(0, 9, (batch, LENGTH[geometry], 1)).expand(-1, -1, points).cumsum(-1)}


def _series(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": randn(batch, past),
        "past_time_features": randn(batch, past, config.num_time_features),
        "past_observed_mask": torch.ones(batch, past),
        "future_values": randn(batch, config.prediction_length, seed=1),
        "future_time_features": randn(batch, config.prediction_length, config.num_time_features),
    }


def _patched_series(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    return {"past_values": randn(batch, config.context_length, config.num_input_channels)}


def _flattened(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    inner = getattr(config, "vision_config", config)
    rows = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, PATCHES[geometry])).float()
    patches = randn(batch, len(rows), getattr(inner, "patch_embed_hidden_size", 768))
    return {
        "flattened_patches": torch.cat([rows.expand(batch, -1, -1), patches], -1),
        "attention_mask": torch.ones(batch, len(rows)),
        "decoder_input_ids": randint(*WORDS, (batch, 7)),
    }


def _decisions(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    length = LENGTH[geometry]
    return {
        "states": randn(batch, length, config.state_dim),
        "actions": randn(batch, length, config.act_dim),
        "rewards": randn(batch, length, 1),
        "returns_to_go": randn(batch, length, 1),
        "timesteps": torch.arange(length).expand(batch, -1),
        "attention_mask": torch.ones(batch, length),
    }


def _objects(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    count = (5, 7, 9)[geometry]
    return {
        "input_ids": randint(*WORDS, (batch, LENGTH[geometry])),
        "visual_feats": randn(batch, count, config.visual_feat_dim),
        "visual_pos": randn(batch, count, config.visual_pos_dim),
    }


def _clap(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    audio = getattr(config, "audio_config", config)
    frames = (128, 256, 128)[geometry]
    found = {"input_features": randn(batch, 1, frames, audio.num_mel_bins), "is_longer": torch.zeros(batch, 1, dtype=torch.bool)}
    if hasattr(config, "text_config"):
        found["input_ids"] = randint(*WORDS, (batch, LENGTH[geometry]))
    return found


def _siglip2(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    vision = getattr(config, "vision_config", config)
    side = PATCHES[geometry]
    found = {
        "pixel_values": randn(batch, side * side, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.long),
        "spatial_shapes": torch.tensor([[side, side]] * batch),
    }
    if hasattr(config, "text_config"):
        found["input_ids"] = randint(*WORDS, (batch, LENGTH[geometry]))
    return found


def _codebooks(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    return {"input_ids": randint(*WORDS, (batch * config.num_codebooks, LENGTH[geometry]))}


def _documents(config: Any, batch: int, geometry: int) -> dict[str, Any]:
    return {**_boxes(config, batch, geometry), "pixel_values": randn(batch, 3, config.input_size, config.input_size)}


EXTRA: dict[str, Extra] = {
    "audioflamingo3_encoder": _audio_flamingo,
    "autoformer": _series,
    "bros": lambda config, batch, geometry: _boxes(config, batch, geometry, 8),
    "clap": _clap,
    "clap_audio_model": _clap,
    "decision_transformer": _decisions,
    "informer": _series,
    "layoutlmv3": _documents,
    "kosmos_2_5_vision_model": _flattened,
    "lilt": _boxes,
    "lxmert": _objects,
    "musicgen_decoder": _codebooks,
    "musicgen_melody_decoder": _codebooks,
    "musicflamingo_encoder": _audio_flamingo,
    "patchtsmixer": _patched_series,
    "patchtst": _patched_series,
    "pix2struct": _flattened,
    "pix2struct_vision_model": _flattened,
    "siglip2": _siglip2,
    "siglip2_vision_model": _siglip2,
    "time_series_transformer": _series,
}
"""Inputs of some types; they are tried first."""
