"""The widths that libraries publish for their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .case import Built

Widths = dict[str, set[int]]


def published_of(library: str) -> Callable[[Built], Widths]:
    return {"timm": of_timm, "transformers": of_configurations, "diffusers": of_diffusers}.get(library, lambda built: {})


def of_timm(built: Built) -> Widths:
    """The channels of every stage in ``feature_info``."""
    info: Any = getattr(built.model, "feature_info", None)
    names = {name for name, _ in built.model.named_modules()}
    found: Widths = {}
    for stage in info if isinstance(info, (list, tuple)) else getattr(info, "info", []):
        if stage.get("module") in names:
            found[stage["module"]] = {stage["num_chs"]}
    return found


_SINGLE = (
    "hidden_size",
    "d_model",
    "n_embd",
    "dim",
    "hidden_dim",
    "embed_dim",
    "encoder_hidden_size",
    "decoder_hidden_size",
    "patch_embeds_hidden_size",
)
_LISTS = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "embed_dim", "embed_dim_per_stage")


def widths_of_configuration(config: Any) -> set[int]:
    """The hidden sizes that one configuration states, without those of the configurations inside it."""
    found: set[int] = set()
    for name in _SINGLE:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            found.add(value)
    for name in _LISTS:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            found.update(item for item in value if isinstance(item, int))
    depths = getattr(config, "depths", None)
    if isinstance(depths, (list, tuple)):  # stages that double
        found.update([width * 2**i for width in found for i in range(len(depths))])
    return found


def of_configurations(built: Built) -> Widths:
    """The hidden sizes in the configuration of the innermost model around each block.

    A block is a module with children in a list of modules.
    """
    found: Widths = {}

    def visit(module: nn.Module, name: str, config: Any, listed: bool) -> None:
        config = getattr(module, "config", None) or config
        if listed and config is not None and len(list(module.children())) > 1 and (widths := widths_of_configuration(config)):
            found[name] = widths
        for key, child in module.named_children():
            visit(child, f"{name}.{key}" if name else key, config, isinstance(module, nn.ModuleList))

    visit(built.model, "", None, False)
    return found


def of_diffusers(built: Built) -> Widths:
    """The inner width of transformer blocks, and the channels of stages."""
    config = getattr(built.model, "config", {})
    heads, head = config.get("num_attention_heads"), config.get("attention_head_dim")
    found: Widths = {}
    for name, module in built.model.named_modules():
        if isinstance(heads, int) and isinstance(head, int) and "Block" in type(module).__name__ and "transformer_blocks." in f"{name}.":
            found[name] = {heads * head}
    return found
