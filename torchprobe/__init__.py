"""Attach to any layer of any encoder, read each activation once, and say what the representation has learned.

>>> import torch, torchprobe
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
>>> with torchprobe.record(model) as rec:
...     _ = model(torch.randn(32, 8))
>>> rec.layers
['0', '1', '2', '']
>>> rec["0"].kurtosis.shape
torch.Size([16])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchprobe import ops, statistics
from torchprobe.common.version import VERSION
from torchprobe.recording import Recorder, Recording, RecordingWarning, detach_all, load, record, record_attention, record_pair
from torchprobe.statistics import Moments

if TYPE_CHECKING:
    from torchprobe import analysis, datasets, dissection, encoders, integrations
    from torchprobe.encoders import Encoder, load_encoder

__version__ = VERSION
__all__ = [
    "record",
    "record_pair",
    "record_attention",
    "load",
    "detach_all",
    "Recorder",
    "Recording",
    "RecordingWarning",
    "Moments",
    "load_encoder",
    "Encoder",
    "analysis",
    "datasets",
    "dissection",
    "encoders",
    "integrations",
    "ops",
    "statistics",
]

_LAZY = {name: f"torchprobe.{name}" for name in ("analysis", "datasets", "dissection", "encoders", "integrations")}
_LAZY |= dict.fromkeys(("Encoder", "load_encoder"), "torchprobe.encoders")


def __getattr__(name: str) -> Any:
    """Imports the packages that training does not need when they are first used."""
    if name not in _LAZY:
        raise AttributeError(f"module 'torchprobe' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    return module if _LAZY[name] == f"torchprobe.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
