"""A suite: many encoders to compare, with their roles, in a TOML file.

::

    [[encoder]]
    name = "ViT-B-32/openai, fine-tuned"      # unique
    role = "fine-tuned"                       # or zero-shot, supervised, imagenet-captions
    backbone = "ViT-B-32"                     # encoders of one backbone are compared
    pretraining = "OpenAI"                    # the data that it was trained on first
    source = "open_clip:ViT-B-32/openai"      # a name for load_encoder
    checkpoint = "weights/finetuned.pt"       # optional; relative to this file; "": to be filled in, and skipped until then
    head = "own"                              # or zero-shot, none, a file; default: own, or zero-shot if the role trains no head
    normalize = true                          # optional: whether the head sees vectors of length 1; default: as saved
    accuracy = { imagenet = 80.1, imagenet_v2 = 69.3 }   # optional; percent

The built-in suite is ``"paper"``: the 17 zero-shot CLIP encoders whose accuracies OpenCLIP publishes, their twins from torchvision and
timm, and rows to fill in.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchprobe.common import limits
from torchprobe.common.deprecation import renamed
from torchprobe.common.messages import did_you_mean, listing, reason
from torchprobe.common.reading import is_file, read_toml
from torchprobe.common.runs import CountCallback
from torchprobe.encoders.encoder import Encoder
from torchprobe.encoders.errors import EncoderError
from torchprobe.encoders.head import Head, load_head
from torchprobe.encoders.load import load_encoder
from torchprobe.encoders.sources import SOURCES

ROLES = {"zero-shot": "zero-shot", "fine-tuned": "own", "supervised": "own", "imagenet-captions": "zero-shot"}
"""The role of an encoder in a comparison → its default head."""

HEADS = ("zero-shot", "own", "none")
"""The heads that are not files: made from captions, the trained head of the encoder, no head."""

TEST_SETS = ("imagenet", "imagenet_v2", "imagenet_r", "imagenet_sketch", "objectnet", "imagenet_a")
"""The sets with published accuracies: ImageNet's validation set and its five shifts."""

PAPER = "paper"
"""The name of the built-in suite."""

_TEXTS = {"name": True, "role": True, "backbone": True, "pretraining": True, "source": True, "checkpoint": False, "head": False}
"""The keys of a row that are strings → whether they are required."""

_WITHOUT_TEXT = ("timm", "torchvision")  # sources of image encoders alone; of others, the encoder itself says whether it has a text tower

MOST_PROBLEMS = 20
"""Problems in one message."""

_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")

__getattr__ = renamed(__name__, {"Row": "SuiteRow"})


@dataclass(frozen=True)
class SuiteRow:
    """One encoder of a suite.

    Attributes:
        name: unique within the suite.
        role: one of :data:`ROLES`.
        backbone: the architecture; differences are taken within one backbone.
        pretraining: the data that it was trained on first.
        source: its name for :func:`~torchprobe.encoders.load_encoder`.
        checkpoint: a local file with its weights; None if the source has weights, ``""`` if it is to be filled in.
        head: one of :data:`HEADS`, or a file for :func:`~torchprobe.encoders.load_head`.
        normalize: whether an own head or a head from a file sees vectors of length 1. None: a layer in a CLIP checkpoint does, other heads
            as they were saved.
        accuracy: published accuracies, percent, by test set (:data:`TEST_SETS`); empty if there are none.
    """

    name: str
    role: str
    backbone: str
    pretraining: str
    source: str
    checkpoint: str | None = None
    head: str = "none"
    normalize: bool | None = None
    accuracy: Mapping[str, float] = field(default_factory=dict, hash=False)

    def missing(self) -> str | None:
        """Why this row must be skipped: its checkpoint is to be filled in, or a file is missing. None if it can be loaded."""
        if self.checkpoint == "":
            return "it needs your checkpoint: fill in its path"
        files = [self.checkpoint, None if self.head in HEADS else self.head]
        absent = [file for file in files if file is not None and not is_file(file)]
        return f"no file at {' and '.join(absent)}" if absent else None

    def load(self) -> Encoder:
        """The encoder, in eval mode on the CPU.

        Raises:
            EncoderError: as for :func:`~torchprobe.encoders.load_encoder`, and the reason of :meth:`missing`.
        """
        if (why := self.missing()) is not None:
            raise EncoderError(f"{self.name} cannot be loaded: {why}")
        return load_encoder(self.source, self.checkpoint)

    def load_head(self, encoder: Encoder, progress: CountCallback | None = None) -> Head | None:
        """The head of the encoder; None for ``head = "none"``.

        Args:
            encoder: from :meth:`load`; a zero-shot head is made on its device, over ImageNet's classes.
            progress: called with (classes done, classes in all) while a zero-shot head is made.

        Raises:
            EncoderError: there is no such head.
        """
        if self.head == "none":
            return None
        if self.head == "zero-shot":
            return encoder.zero_shot_head(progress=progress)
        if self.head != "own":
            return load_head(self.head, encoder.features, normalize=self.normalize)
        own = encoder.head
        if own is None:
            raise EncoderError(f"{self.name} has no trained head of one linear layer: give a file as its head, or none")
        return own if self.normalize is None else Head(own.weight, own.bias, normalize=self.normalize, names=own.names)


def load_suite(path: str | os.PathLike[str] = PAPER) -> list[SuiteRow]:
    """The rows of a suite, in the order of its file.

    Args:
        path: a TOML file as above, or ``"paper"``. Paths in it are relative to its folder.

    Raises:
        EncoderError: the file cannot be read, or has unknown keys, roles or heads, missing or repeated entries, or values of the wrong
            type. The message names the first 20 problems.

    >>> rows = load_suite("paper")
    >>> sum(row.role == "zero-shot" for row in rows)
    17
    >>> rows[0].source, rows[0].accuracy["imagenet"]
    ('open_clip:RN50/openai', 59.82)
    """
    file = Path(__file__).with_name("suite.toml") if path == PAPER else Path(path)
    try:
        content = read_toml(file)
    except FileNotFoundError as error:
        raise EncoderError(f"no suite at {file}: expected a TOML file, or {PAPER!r} for the built-in one") from error
    except (OSError, ValueError) as error:
        raise EncoderError(f"{file} cannot be read as TOML: {reason(error)}") from error
    entries = content.get("encoder")
    problems = [f"unknown key {key!r}" + did_you_mean(key, ["encoder"]) for key in content if key != "encoder"]
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        problems.append("expected at least one [[encoder]]")
        entries = []
    if why := limits.problem("suite_rows", len(entries)):
        raise EncoderError(f"{file} has {why}")
    for number, entry in enumerate(entries, start=1):
        where = f"encoder {number}" + (f" ({entry['name']!r})" if isinstance(entry.get("name"), str) else "")
        problems += [f"{where}: {problem}" for problem in _problems(entry)]
    problems += [f"the name {name!r} occurs {count} times" for name, count in _counts(entries, ["name"]).items() if count > 1]
    for (source, checkpoint, *_), count in _counts(entries, ["source", "checkpoint", "head"]).items():
        if count > 1 and checkpoint != "":  # checkpoints that are to be filled in will differ
            problems.append(f"{source!r} occurs {count} times with the same checkpoint and head")
    if problems:
        raise EncoderError(f"{file} is not a suite: " + listing(problems, MOST_PROBLEMS, "; "))
    return [_row(entry, file.parent) for entry in entries]


def _row(entry: Mapping[str, Any], folder: Path) -> SuiteRow:
    values = {"head": ROLES[entry["role"]], **entry}
    if checkpoint := values.get("checkpoint"):
        values["checkpoint"] = str(folder / checkpoint)
    if values["head"] not in HEADS:
        values["head"] = str(folder / values["head"])
    return SuiteRow(**values | {"accuracy": {key: float(value) for key, value in entry.get("accuracy", {}).items()}})


def _problems(entry: Mapping[str, Any]) -> list[str]:
    """The problems of one entry, without comparing it with others."""
    known = [*_TEXTS, "normalize", "accuracy"]
    problems = [f"unknown key {key!r}" + did_you_mean(key, known) for key in entry if key not in known]
    for key, required in _TEXTS.items():
        if key in entry and not isinstance(entry[key], str):
            problems.append(f"{key} must be a string, got {entry[key]!r}")
        elif required and not entry.get(key):
            problems.append(f"{key} is missing")
    if not isinstance(entry.get("normalize", True), bool):
        problems.append(f"normalize must be true or false, got {entry['normalize']!r}")
    texts = {key: value for key, value in entry.items() if key in _TEXTS and isinstance(value, str)}
    role, source, head = (texts.get(key, "") for key in ("role", "source", "head"))
    if role and role not in ROLES:
        problems.append(f"unknown role {role!r}, expected one of {', '.join(ROLES)}" + did_you_mean(role, ROLES))
    kind, _, rest = source.partition(":")
    if source and (kind not in SOURCES or not rest):
        problems.append(f"{source!r} is not the name of an encoder: expected one of {', '.join(f'{s}:NAME' for s in SOURCES)}")
    if "head" in texts and head not in HEADS and not head.endswith(_ENDINGS):
        problems.append(f"unknown head {head!r}, expected one of {', '.join(HEADS)}, or a file that ends in {', '.join(_ENDINGS)}")
    head = head or ROLES.get(role, "")
    if head == "zero-shot" and kind in _WITHOUT_TEXT:
        problems.append(f"{source!r} has no text tower for a zero-shot head: choose own, none or a file")
    return problems + _accuracy_problems(entry.get("accuracy", {}))


def _accuracy_problems(accuracy: object) -> list[str]:
    if not isinstance(accuracy, Mapping):
        return [f"accuracy must be a table of test sets, got {accuracy!r}"]
    problems = [f"unknown test set {key!r}" + did_you_mean(key, TEST_SETS) for key in accuracy if key not in TEST_SETS]
    for key, value in accuracy.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
            problems.append(f"the accuracy on {key} must be in percent, 0 to 100, got {value!r}")
    return problems


def _counts(entries: list[Any], keys: list[str]) -> Counter[Any]:
    """How often the values of ``keys`` occur, among the entries that have strings there."""
    rows = [tuple(entry.get(key) for key in keys) for entry in entries]
    whole = [row for row in rows if isinstance(row[0], str) and all(isinstance(value, (str, type(None))) for value in row)]
    return Counter(row[0] if len(keys) == 1 else row for row in whole)
