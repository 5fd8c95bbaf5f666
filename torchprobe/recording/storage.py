"""Recordings in files: safetensors, which holds nothing but numbers and text.

Tensors, all float64: ``"{layer}/{field}"`` for every field of :meth:`torchprobe.Moments.parts` of the running window,
``"{layer}/closed/{field}"`` for the windows that are closed, ``"history"`` (steps, layers, fields), ``"history_histograms"``
(steps, layers, bins used). Metadata: ``format`` = "1", and the JSON texts ``settings``, ``layers``, ``aliases``, ``history``.

A file may come from anywhere. Everything in it is checked before it is believed, and what does not fit is a ``ValueError``
that names the file and the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprobe.recording.recording import Entry, Recording, Settings, only_moments
from torchprobe.statistics import Moments
from torchprobe.statistics.moments import BINS

FORMAT = "1"
_MAX_LAYERS = 1 << 17
_MAX_FEATURES = 1 << 26
_MAX_HISTORY = 1 << 31  # numbers
_SIGNED = ("min", "max", "mean", "m3")


def save(recording: Recording, path: str | os.PathLike[str]) -> None:
    """Writes a recording; a file of that name is replaced only when everything is written."""
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot save to {os.fspath(path)!r}: there is no folder {str(Path(path).resolve().parent)!r}")
    entries = recording._entries()
    only_moments([entry.statistic for entry in entries])
    tensors = {}
    for entry in entries:
        for key, part in _parts(entry):
            tensors[key] = part.detach().to("cpu", torch.float64, copy=True)
    history = recording.history.state_dict()
    values, histograms = history.pop("values"), history.pop("histograms")
    if history["steps"]:
        tensors["history"], tensors["history_histograms"] = values, histograms
    described = [
        {
            "name": entry.name,
            "module": entry.module,
            "features": entry.statistic.features,
            "feature_dim": entry.feature_dim,
            "closed": entry.closed is not None,
        }
        for entry in entries
    ]
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(asdict(recording.settings)),
        "layers": json.dumps(described),
        "aliases": json.dumps(recording._aliases),
        "history": json.dumps(history),
    }
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _parts(entry: Entry) -> Iterator[tuple[str, Tensor]]:
    for prefix, statistic in ((f"{entry.name}/", entry.statistic), (f"{entry.name}/closed/", entry.closed)):
        if isinstance(statistic, Moments):
            for name, part in statistic.parts().items():
                yield prefix + name, part


def load(path: str | os.PathLike[str]) -> Recording:
    """Reads what :meth:`torchprobe.Recording.save` wrote: the same mapping, on the CPU, without hooks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no recording, or something in it does not fit; the message names the file and the key.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return _read(_File(file, os.fspath(path)))
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is no safetensors file: {error}") from error


class _File:
    """An open file that complains with its name."""

    def __init__(self, file: Any, path: str) -> None:
        self.file, self.path = file, path
        self.keys = set(file.keys())
        self.metadata: Mapping[str, str] = file.metadata() or {}

    def error(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.path}, {key!r}: {what}")

    def text(self, key: str, kind: type) -> Any:
        if key not in self.metadata:
            raise self.error(key, "missing from the metadata; this is no recording of torchprobe")
        try:
            value = json.loads(self.metadata[key])
        except (ValueError, RecursionError) as error:
            raise self.error(key, f"the metadata is not JSON ({error})") from error
        if not isinstance(value, kind):
            raise self.error(key, f"expected a JSON {kind.__name__}, got {type(value).__name__}")
        return value

    def tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """Checks what the header says before anything is read."""
        if key not in self.keys:
            raise self.error(key, "missing")
        self.keys.remove(key)
        part = self.file.get_slice(key)
        if tuple(part.get_shape()) != shape or part.get_dtype() != "F64":
            raise self.error(key, f"expected F64 of shape {shape}, got {part.get_dtype()} of {tuple(part.get_shape())}")
        tensor: Tensor = self.file.get_tensor(key)
        return tensor


def _read(file: _File) -> Recording:
    if file.metadata.get("format") != FORMAT:
        raise file.error("format", f"expected {FORMAT!r}, got {file.metadata.get('format')!r}")
    settings = _settings(file)
    described = file.text("layers", list)
    if len(described) > _MAX_LAYERS:
        raise file.error("layers", f"{len(described)} layers are more than a model has")
    entries = [_entry(file, layer, settings) for layer in described]
    names = {entry.name for entry in entries}
    if len(names) < len(entries):
        raise file.error("layers", "a name occurs twice")
    aliases = file.text("aliases", dict)
    if not all(isinstance(name, str) for name in aliases.values()):
        raise file.error("aliases", "an alias is no text")
    recording = Recording(entries, settings, aliases)
    _history(file, recording)
    if file.keys:
        raise file.error(min(file.keys), "belongs to no layer")
    return recording


def _settings(file: _File) -> Settings:
    found = file.text("settings", dict)
    expected = {field.name: str if field.name != "outlier_sigma" else (int, float) for field in fields(Settings)}
    if found.keys() != expected.keys() or not all(isinstance(found[k], kind) for k, kind in expected.items()):
        raise file.error("settings", f"expected {', '.join(expected)}, got {found}")
    if not 0 < found["outlier_sigma"] < float("inf") or found["statistic"] != "Moments":
        raise file.error("settings", f"outlier_sigma must be positive and the statistic Moments, got {found}")
    return Settings(**found)


def _entry(file: _File, layer: Any, settings: Settings) -> Entry:
    kinds: dict[str, Any] = {"name": str, "module": str, "features": int, "feature_dim": (int, type(None)), "closed": bool}
    if not isinstance(layer, dict) or layer.keys() != kinds.keys():
        raise file.error("layers", f"each layer has {', '.join(kinds)}; got {str(layer)[:200]}")
    if not all(isinstance(layer[key], kind) for key, kind in kinds.items()):
        raise file.error("layers", f"a value is of the wrong kind: {str(layer)[:200]}")
    name, features = layer["name"], layer["features"]
    if not 0 < features <= _MAX_FEATURES:
        raise file.error("layers", f"layer {name!r} cannot have {features} features")
    closed = _moments(file, f"{name}/closed/", features, settings) if layer["closed"] else None
    return Entry(name, layer["module"], layer["feature_dim"], _moments(file, f"{name}/", features, settings), closed)


def _moments(file: _File, prefix: str, features: int, settings: Settings) -> Moments:
    if prefix + "mean" not in file.keys or tuple(file.file.get_slice(prefix + "mean").get_shape()) != (features,):
        raise file.error(prefix + "mean", f"missing, or not {features} features wide")  # before anything is allocated
    moments = Moments(features, "cpu", settings.outlier_sigma)
    parts = moments.parts()
    for name, part in parts.items():
        value = file.tensor(prefix + name, tuple(part.shape))
        if name not in _SIGNED and not bool((value >= 0).all()):
            raise file.error(prefix + name, "holds negative numbers or nan")
        part.copy_(value)
    if float(parts["vector_kurtosis_histogram"].sum()) != moments.vectors:
        raise file.error(prefix + "vector_kurtosis_histogram", f"does not add up to the {moments.vectors} vectors counted")
    return moments


def _history(file: _File, recording: Recording) -> None:
    state = file.text("history", dict)
    lists = [state.get(key) for key in ("steps", "layers", "fields")]
    if not all(isinstance(part, list) for part in lists):
        raise file.error("history", "expected the lists steps, layers and fields")
    steps, layers, names = lists
    assert steps is not None and layers is not None and names is not None
    numbers = all(isinstance(step, (int, float)) and not isinstance(step, bool) for step in steps)
    if not numbers or not all(isinstance(name, str) for name in layers + names):
        raise file.error("history", "steps are numbers, layers and fields are text")
    if len(set(layers)) < len(layers) or len(steps) * len(layers) * len(names) > _MAX_HISTORY:
        raise file.error("history", "a layer occurs twice, or there is more than a run can hold")
    dropped = state.get("dropped", 0)  # missing from files of an earlier version
    if isinstance(dropped, bool) or not isinstance(dropped, int) or dropped < 0:
        raise file.error("history", f"dropped counts windows, got {dropped!r}")
    if steps:
        values = file.tensor("history", (len(steps), len(layers), len(names)))
        saved = {"steps": steps, "layers": layers, "fields": names, "dropped": dropped, "values": values}
        if "history_histograms" in file.keys:
            bins = file.file.get_slice("history_histograms").get_shape()[-1:]
            if bins and bins[0] > BINS:
                raise file.error("history_histograms", f"has {bins[0]} bins, at most {BINS} are known")
            saved["histograms"] = file.tensor("history_histograms", (len(steps), len(layers), *bins))
        recording.history.load_state_dict(saved)
