"""What a network is apart from its weights, as a fact: see :mod:`torchprobe.common.facts`."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

from torchprobe.common.facts import digest_of, told
from torchprobe.common.messages import stable_repr

_NOT_NUMBERS = ("transformers_version", "architectures", "id2label", "label2id", "problem_type")
"""Settings of a configuration that change no activation."""


def modules_fact(*networks: nn.Module) -> str:
    """A digest of the modules of networks and of their settings. With equal weights they still give other activations if, for instance, a
    nonlinearity, an epsilon or the number of attention heads is another one.

    What is known: what a network says of itself (:func:`torchprobe.common.facts.told`), the repr of all modules, and the configuration of
    networks of transformers.

    >>> modules_fact(nn.LayerNorm(4)) == modules_fact(nn.LayerNorm(4, eps=1e-6))
    False
    """
    return digest_of([[told(network), stable_repr(network), _settings(network)] for network in networks])


def modules_without(network: nn.Module, name: str) -> str:
    """The same without one of its children, such as a transform that happens to be a module.

    >>> modules_without(nn.Sequential(nn.ReLU(), nn.Tanh()), "1") == modules_without(nn.Sequential(nn.ReLU()), "1")
    True
    """
    children = [[own, stable_repr(child)] for own, child in network.named_children() if own != name]
    return digest_of([told(network), type(network).__qualname__, network.extra_repr(), children, _settings(network)])


def _settings(network: nn.Module) -> list[Any]:
    """The configurations of the modules of a network, each once."""
    configs = list[Any]()
    for module in network.modules():
        config = getattr(module, "config", None)
        if callable(getattr(config, "to_dict", None)) and not any(config is one for one in configs):
            configs.append(config)
    found = []
    for config in configs:
        settings = {str(key): value for key, value in config.to_dict().items() if not str(key).startswith("_") and key not in _NOT_NUMBERS}
        text = json.dumps(settings, sort_keys=True, default=_text)
        found.append([type(config).__name__, text, str(getattr(config, "_attn_implementation", None))])
    return found


def _text(value: object) -> Any:
    return sorted(map(stable_repr, value)) if isinstance(value, (set, frozenset)) else stable_repr(value)
