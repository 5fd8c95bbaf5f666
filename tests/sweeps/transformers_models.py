"""Every model type of transformers that a tiny configuration can be made for."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .case import Built, CannotBuild, Case
from .transformers_by_hand import CLASSES, EXTRA, OVERRIDES
from .transformers_inputs import inputs_of
from .transformers_shrink import shrink

MOST_PARAMETERS = 30_000_000
"""A larger model means that a size was not found."""


def cases() -> Iterator[Case]:
    from transformers import CONFIG_MAPPING

    for kind in sorted(CONFIG_MAPPING.keys()):
        yield Case("transformers", kind, lambda geometry, kind=kind: build(kind, geometry))  # type: ignore[misc]


def build(kind: str, geometry: int = 0) -> Built:
    config = config_of(kind, geometry)
    model_class = class_of(kind, config)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config_of(kind, geometry)).parameters())
    if size > MOST_PARAMETERS:
        raise CannotBuild(f"{size / 1e6:.0f} million parameters with the tiny configuration")
    model = model_class(config)
    model.eval()
    inputs, note = inputs_of(model, config, geometry, EXTRA.get(kind))
    return Built(model, inputs, f"{model_class.__name__}, {note}")


def config_of(kind: str, geometry: int = 0) -> Any:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    return config_class.from_dict(shrink(config_class().to_dict(), OVERRIDES.get(kind), geometry))


def class_of(kind: str, config: Any) -> type[nn.Module]:
    """The model without a head if there is one."""
    import transformers
    from transformers.models.auto import modeling_auto

    if kind in CLASSES:
        return getattr(transformers, CLASSES[kind])  # type: ignore[no-any-return]
    tables = ["MODEL_MAPPING_NAMES", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_BACKBONE_MAPPING_NAMES"]
    tables += sorted(
        name for name in vars(modeling_auto) if name.endswith("MAPPING_NAMES") and name not in tables and name.startswith("MODEL")
    )
    for table in tables:
        name = getattr(modeling_auto, table).get(kind)
        name = name[0] if isinstance(name, (list, tuple)) else name
        found = getattr(transformers, name, None) if name else None
        if found is not None:
            return found  # type: ignore[no-any-return]
    return _search(type(config))


def _search(config_class: type) -> type[nn.Module]:
    package = config_class.__module__.rsplit(".", 1)[0]
    found: list[type[nn.Module]] = []
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if info.name.startswith("modeling_"):
            module = importlib.import_module(f"{package}.{info.name}")
            found += [c for c in vars(module).values() if isinstance(c, type) and c.__dict__.get("config_class", None) is config_class]
            found += [
                c
                for c in vars(module).values()
                if isinstance(c, type) and c.__module__ == module.__name__ and getattr(c, "config_class", None) is config_class
            ]
    found = [c for c in dict.fromkeys(found) if not c.__name__.endswith(("PreTrainedModel", "PretrainedModel"))]
    if not found:
        raise CannotBuild("no model class for this configuration")
    return min(found, key=lambda c: (not c.__name__.endswith("Model"), len(c.__name__)))
