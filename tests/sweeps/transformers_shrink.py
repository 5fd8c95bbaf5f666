"""Tiny configurations of transformers: every size of a configuration made small, relations between sizes kept.

A configuration becomes a dict, and each entry goes through rules by its key. Widths become 64 with 4 heads of 16, lists of widths are
divided by one number, layers become 2, special tokens move into a small vocabulary. ``transformers_by_hand`` corrects what the rules
get wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

WIDTH = 64
HEADS = 4
HEAD = 16
INNER = 128
VOCABULARY = 128
SPECIAL = 100  # special tokens are renumbered from here, if they do not fit; inputs stay below
LAYERS = 2

Rule = tuple[str, Callable[[Any], Any]]


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _const(number: int) -> Callable[[int], int]:
    return lambda value: number if value else value


INTEGERS: list[Rule] = [
    # sizes that have a meaning of their own
    (
        r".*(sampling_rate|sample_rate|hop_length|num_channels|in_chans|audio_channels|num_labels|fps|_per_second|_kernel_size|kernel_size)",
        int,
    ),
    (r"(num_mel_bins|n_mel_bins|mel_dim|model_in_dim|input_feat_size|feature_size|input_size|num_bins|spec_size|max_bins|n_mels)", int),
    (r"(patch_size|temporal_patch_size|spatial_merge_size|merge_size|patch_length|stride|.*_stride|tubelet_size|output_stride)", int),
    (r"(num_feat_extract_layers|num_encoder_blocks|num_stages|num_nextn_predict_layers|first_k_dense_replace)", int),
    (r"(relative_attention_.*|.*_factor|.*_ratio|.*_expand|expand|.*_bins|block_size|num_buckets|.*_temperature|.*theta.*)", int),
    (r"(crop_size|image_size|img_size|pretrain_image_size|resolution|max_image_size|max_img_size|min_image_size)", int),
    # counts
    (r".*(vocab_size|codebook_size|num_embeddings|num_codevectors_per_group|vocabulary_size)(_per_layer_input)?", _const(VOCABULARY)),
    (r"(type_vocab_size|token_type_vocab_size)", int),
    (r".*(num|n)_(hidden_)?layers?|.*num_hidden_layers|(encoder|decoder)_layers|.*depth|layers|(n|num)_blocks?", _at_most(LAYERS)),
    (r"num_(encoder|decoder)_(layers|blocks)|.*_num_layers|num_.*_layers|.*_layers", _at_most(LAYERS)),
    (r".*(position_embeddings|n_positions|max_source_positions|max_target_positions|max_seq_len|seq_len|context_length)", _at_most(512)),
    (r".*(num_key_value_heads|n_kv_heads|num_kv_heads|kv_heads|key_value_heads)", lambda value: HEADS // 2 if value > 1 else value),
    (r".*(num_attention_heads|num_heads|attention_heads|n_heads?|_heads|nhead|num_key_heads|num_value_heads)", _at_most(HEADS)),
    (r".*(head_dim|head_size|d_kv|dim_head|d_head|head_width)", lambda value: HEAD if value >= HEAD else value),
    (r"(qk_rope_head_dim|rotary_dim)", _at_most(HEAD // 2)),
    (r".*(num_queries|num_denoising|num_query_tokens|num_image_tokens|num_latents|n_latents|num_proposals|num_candidates)", _at_most(10)),
    (r"(n_routed_experts|num_experts|num_local_experts|moe_num_experts)", _at_most(4)),
    (r"(num_experts_per_tok|moe_topk|top_k|moe_k|index_topk|num_experts_per_token)", _at_most(2)),
    (r"(n_group|topk_group|n_groups|num_expert_group)", _at_most(1)),
    (r".*(chunk_size|sliding_window|sliding_window_size|local_attention|attention_window|context_size)", _at_most(16)),
    (r"(num_codebooks|num_quantizers|n_codebooks|num_code_groups)", _at_most(4)),
    (r"num_conv_pos_embeddings", _at_most(16)),
    (r"num_conv_pos_embedding_groups", _at_most(4)),
    # widths
    (r".*(intermediate_size|ffn_dim|feedforward_dim|d_ff|mlp_dim|n_inner|ffn_hidden_size|dim_feedforward|_inner_dim)", _const(INNER)),
    (r"num_pos_feats", _const(WIDTH // 2)),
]
"""The first rule whose pattern is the whole key decides; other numbers of at least 64 become 64."""

DEPTHS = r".*(depths?|num_blocks|stage_num_blocks|blocks_per_stage|num_block_repeats|stage_numb_of_layers)"
WIDTHS = r".*(hidden_sizes|embed_dims?|_channels|channels|conv_dim|tdnn_dim|embed_dim_per_stage|channel_list|hidden_channels|_hidden_size)"
LAYER_NUMBERS = r".*(_indexes|_indices|layer_ids|subsample_layers|_layers|_blocks|index|visual_indexes|_idxs)"
TOKEN = r".*(token_id|token_index|_idx|token_ids|_token)"
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni", "glm4v", "glm_ocr", "glm_image", "paddleocr")
"""Types whose sections of rotary embeddings have a default outside of the configuration."""

DROPPED = (
    "out_features",
    "out_indices",
    "_out_features",
    "_out_indices",
    "stage_names",
    "transformers_version",
    "id2label",
    "label2id",
    "architectures",
)


def shrink(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None, geometry: int = 0) -> dict[str, Any]:
    """A tiny configuration for images of the size of a geometry.

    ``overrides`` maps dotted paths to values, or to functions of the geometry.
    """
    tiny = _shrink(dict(config), {}, geometry)
    for path, value in (overrides or {}).items():
        *parents, key = path.split(".")
        inner = tiny
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[key] = value(geometry) if callable(value) else value
    return tiny


def _shrink(config: dict[str, Any], tokens: dict[int, int], geometry: int) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in DROPPED}
    scale = _scale(config)
    layers = _kinds(config)
    tiny: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            nested = "model_type" in value or key.endswith("_config")
            tiny[key] = _shrink(value, tokens, geometry) if nested else _rope(value) if key.startswith("rope") else value
        elif isinstance(value, bool) or value is None or isinstance(value, (float, str)):
            tiny[key] = value
        elif isinstance(value, int):
            tiny[key] = _token(value, tokens) if re.fullmatch(TOKEN, key) else _integer(key, value)
        elif isinstance(value, (list, tuple)):
            tiny[key] = _list(key, value, scale, tokens)
        else:
            tiny[key] = value
    tiny.update(layers)
    tiny.update(_image_sizes(config, geometry))
    _keep_relations(config, tiny)
    heads = config.get("num_heads") or config.get("num_attention_heads")
    if isinstance(heads, (list, tuple)) and isinstance(config.get("embed_dim"), int):
        tiny["embed_dim"] = 8 * heads[0]
    return tiny


def _integer(key: str, value: int) -> int:
    for pattern, rule in INTEGERS:
        if re.fullmatch(pattern, key):
            return int(rule(value))
    return WIDTH if value >= WIDTH else value


def _token(value: int, tokens: dict[int, int]) -> int:
    """Special tokens of one value stay equal, in all parts of the configuration."""
    if value < 10:
        return value
    return tokens.setdefault(value, SPECIAL + len(tokens) % (VOCABULARY - SPECIAL))


def _list(key: str, value: Any, scale: int, tokens: dict[int, int]) -> Any:
    if not value or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        return list(value)
    if re.fullmatch(TOKEN, key):
        return [_token(item, tokens) for item in value]
    if re.fullmatch(DEPTHS, key):
        return [min(item, LAYERS) for item in value]
    if re.fullmatch(LAYER_NUMBERS, key):
        return [item for item in value if item < LAYERS] or list(range(LAYERS))[: len(value)]
    if re.fullmatch(WIDTHS, key):
        return [max(item // scale, 1) if item >= 16 else item for item in value]
    return list(value)


def _scale(config: Mapping[str, Any]) -> int:
    """What the lists of widths are divided by: the narrowest becomes about 16."""
    lists = [v for k, v in config.items() if re.fullmatch(WIDTHS, k) and isinstance(v, (list, tuple)) and v]
    widths = [w for v in lists for w in v if isinstance(w, int) and not isinstance(w, bool) and w >= 16]
    return max(1, min(widths, default=16) // 16)


def _image_sizes(config: Mapping[str, Any], geometry: int) -> dict[str, Any]:
    """Small images: a few patches a side."""
    patch = config.get("patch_size")
    patch = patch[0] if isinstance(patch, (list, tuple)) else patch
    staged = any(isinstance(config.get(key), (list, tuple)) for key in ("depths", "hidden_sizes", "embed_dims", "embed_dim"))
    side = (96, 128, 64)[geometry] if staged or not isinstance(patch, int) or patch < 8 else patch * (5, 7, 8)[geometry]
    found: dict[str, Any] = {}
    for key in ("image_size", "img_size", "pretrain_image_size"):
        value = config.get(key)
        if isinstance(value, int) and value >= 32:
            found[key] = side
        elif isinstance(value, (list, tuple)) and all(isinstance(item, int) for item in value):
            found[key] = [side] * len(value)
    return found


def _rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Sections of rotary embeddings fill half a head."""
    found = dict(rope)
    for key, value in rope.items():
        if isinstance(value, Mapping):
            found[key] = _rope(value)
        elif key == "mrope_section":
            half = int(HEAD * rope.get("partial_rotary_factor", 1.0)) // 2
            parts = [max(1, item * half // sum(value)) for item in value]
            parts[0] += half - sum(parts)
            found[key] = parts
    return found


def _keep_relations(config: Mapping[str, Any], tiny: dict[str, Any]) -> None:
    """Equal numbers of heads stay equal; outputs of a backbone stay as many; settings of layers that are gone go too."""
    for kv in [key for key in config if key.endswith("num_key_value_heads")]:
        heads = kv.replace("key_value", "attention")
        if isinstance(config[kv], int) and config[kv] == config.get(heads):
            tiny[kv] = tiny[heads]
    tiny.pop("per_layer_config", None)
    outputs = config.get("_out_indices") or config.get("out_indices")
    if isinstance(outputs, (list, tuple)):
        if any(
            isinstance(config.get(key), (list, tuple)) for key in ("depths", "hidden_sizes", "embed_dims", "stage_in_channels", "embed_dim")
        ):
            tiny["out_indices"] = list(outputs)
        elif len(outputs) > 1 and isinstance(config.get("num_hidden_layers"), int):
            tiny["num_hidden_layers"] = len(outputs)
            tiny["out_indices"] = list(range(1, len(outputs) + 1))
    if any(word in str(config.get("model_type")) for word in MROPE) and isinstance(tiny.get("rope_parameters"), dict):
        tiny["rope_parameters"] = {**tiny["rope_parameters"], "mrope_section": [2, 3, 3]}


def _kinds(config: Mapping[str, Any]) -> dict[str, Any]:
    """For models with several kinds of layers: one layer of each kind, in the order of the model."""
    found = {}
    for key in ("layer_types", "layers_block_type", "mlp_layer_types", "hybrid_override_pattern"):
        kinds = config.get(key)
        if isinstance(kinds, (list, tuple)) and kinds and all(isinstance(kind, str) for kind in kinds):
            found[key] = list(kinds)
    if not found:
        return {}
    length = min(map(len, found.values()))
    rows = list(zip(*[kinds[:length] for kinds in found.values()], strict=True))
    chosen = sorted({rows.index(row) for row in rows})[:4]
    while len(chosen) < min(LAYERS, length):
        chosen.append(next(i for i in range(length) if i not in chosen))
    chosen = sorted(chosen)
    result: dict[str, Any] = {key: [kinds[i] for i in chosen] for key, kinds in found.items()}
    for key in ("num_hidden_layers", "num_layers", "n_layer"):
        if key in config:
            result[key] = len(chosen)
    return result
