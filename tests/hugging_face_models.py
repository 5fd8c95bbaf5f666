"""Small models of transformers with random weights, saved to a folder with their processor and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS = ["a", "photo", "of", "cat", "dog", "the", "cats", "and", "dogs", "red", "blue", "car"]
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
VIT = TINY | {"image_size": 32, "patch_size": 8}
TEXT = TINY | {"vocab_size": 40, "max_position_embeddings": 16, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}

IMAGES: dict[str, tuple[str, dict[str, Any], str]] = {
    "vit": ("ViT", VIT, "ViTImageProcessor"),
    "dinov2": ("Dinov2", VIT | {"mlp_ratio": 2}, "BitImageProcessor"),
    "dinov2_registers": ("Dinov2WithRegisters", VIT | {"mlp_ratio": 2, "num_register_tokens": 3}, "BitImageProcessor"),
    "dinov3": ("DINOv3ViT", VIT | {"num_register_tokens": 4}, "DINOv3ViTImageProcessor"),
    "beit": ("Beit", VIT | {"use_mean_pooling": True}, "BeitImageProcessor"),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1], "image_size": 64}, "ConvNextImageProcessor"),
    "swin": (
        "Swin",
        {"image_size": 64, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
        "ViTImageProcessor",
    ),
    "resnet": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, "ConvNextImageProcessor"),
}
"""Encoders of images: name → the class of the model, its configuration, and its image processor."""

TOWERS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "clip": ("CLIP", "CLIPImageProcessor", VIT, TEXT, {"projection_dim": 24}),
    "siglip": ("Siglip", "SiglipImageProcessor", VIT, TEXT | {"projection_size": 32}, {}),
    "siglip2": ("Siglip2", "Siglip2ImageProcessor", TINY | {"patch_size": 8, "num_patches": 16}, TEXT | {"projection_size": 32}, {}),
    "blip": ("Blip", "BlipImageProcessor", VIT, TEXT | {"encoder_hidden_size": 32}, {"projection_dim": 24}),
    "altclip": ("AltCLIP", "CLIPImageProcessor", VIT, TEXT | {"project_dim": 32, "max_position_embeddings": 18}, {"projection_dim": 24}),
}
"""Models of two towers: name → the class, its image processor, the configurations of both towers, and its own."""


def saved(model: Any, folder: Path) -> Any:
    """The model, read back from the folder: where weights lie in memory changes the last bits of a product."""
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder).eval()


def tokenizer(folder: Path) -> None:
    """A tokenizer of single words, with a padding token that has no effect on what it marks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )
    made.save_pretrained(folder)


def processor(folder: Path, kind: str, size: int) -> Any:
    """The image processor ``kind`` for images of this size."""
    options: dict[str, Any] = {"size": {"height": size, "width": size}}
    if kind in ("CLIPImageProcessor", "BitImageProcessor"):
        options = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    elif kind == "ConvNextImageProcessor":
        options = {"size": {"shortest_edge": size}, "crop_pct": 0.875}
    elif kind == "VideoMAEImageProcessor":
        options = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    elif kind == "BeitImageProcessor":
        options |= {"crop_size": {"height": size, "width": size}}
    elif kind == "Siglip2ImageProcessor":
        options = {"patch_size": 8, "max_num_patches": 16}
    made = getattr(transformers, kind)(**options)
    made.save_pretrained(folder)
    return made


def image_model(folder: Path, which: str, task: str = "Model", **more: Any) -> Any:
    """One of :data:`IMAGES`, saved to ``folder``."""
    name, settings, kind = IMAGES[which]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{task}")(getattr(transformers, f"{name}Config")(**settings | more)).eval()
    model = saved(model, folder)
    processor(folder, kind, settings.get("image_size", 64))
    return model


def two_towers(folder: Path, which: str) -> Any:
    """One of :data:`TOWERS`, saved to ``folder``."""
    name, kind, vision, text, own = TOWERS[which]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **own)
    model = getattr(transformers, f"{name}Model")(config).eval()
    model = saved(model, folder)
    processor(folder, kind, 32)
    tokenizer(folder)
    return model


def language_model(folder: Path, which: str) -> Any:
    """GPT-2, BERT, RoBERTa or T5, saved to ``folder``."""
    torch.manual_seed(0)
    configs = {
        "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 16, "vocab_size": 40}),
        "BertModel": ("BertConfig", TEXT),
        "BertForMaskedLM": ("BertConfig", TEXT),
        "RobertaModel": ("RobertaConfig", TEXT | {"max_position_embeddings": 18}),
        "T5ForConditionalGeneration": (
            "T5Config",
            {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 1},
        ),
    }
    config, settings = configs[which]
    model = getattr(transformers, which)(getattr(transformers, config)(**settings)).eval()
    model = saved(model, folder)
    tokenizer(folder)
    return model
