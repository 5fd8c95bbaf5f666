"""Recordings in files: safetensors, which holds nothing but numbers and text.

Tensors: ``"{layer}/{name}"`` for every tensor of the ``state_dict`` of the running window, ``"{layer}/closed/{name}"`` for the closed
windows, ``"history"`` (steps, layers, fields), ``"history_histograms"`` (steps, layers, bins used). Metadata: ``format`` = "1", and the
JSON texts ``settings``, ``layers``, ``aliases``, ``history``. With statistics other than Moments there is also ``statistics``, the names of
their classes, and ``layers`` holds the numbers and texts of their ``state_dict``.

A file may come from anywhere. Everything in it is checked before it is used. What does not fit is a ``ValueError`` that names the file and
the key.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from torchprobe.common.files import replacing
from torchprobe.recording.entries import Entry, Settings
from torchprobe.statistics import Moments, Several, Statistic
from torchprobe.statistics.factory import statistic_class

FORMAT = "1"
_MAX_LAYERS = 1 << 17
_MAX_FEATURES = 1 << 26
_MAX_HISTORY = 1 << 31  # numbers
_MAX_UNSEEN = 1 << 16  # the width of a statistic that keeps nothing for each feature
_WIDTH = 3
_PARTS = {name: tuple(part.shape) for name, part in Moments(_WIDTH, "cpu").parts().items()}  # 3 stands for the features
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class Saved:
    """What a file holds. ``history`` is what :meth:`torchprobe.recording.History.load_state_dict` takes, or None."""

    entries: list[Entry]
    settings: Settings
    aliases: dict[str, str]
    history: dict[str, Any] | None = None


def save(saved: Saved, path: str | os.PathLike[str]) -> None:
    """Writes a recording; a file of that name is replaced only when everything is written.

    Raises:
        FileNotFoundError: there is no such folder.
        TypeError: the ``state_dict`` of a statistic holds something else than tensors, numbers and text.
    """
    if not Path(path).resolve().parent.is_dir():
        raise FileNotFoundError(f"cannot save to {os.fspath(path)!r}: there is no folder {str(Path(path).resolve().parent)!r}")
    tensors: dict[str, Tensor] = {}
    described = []
    for entry in saved.entries:
        layer = {
            "name": entry.name,
            "module": entry.module,
            "features": entry.statistic.features,
            "feature_dim": entry.feature_dim,
            "closed": entry.closed is not None,
        }
        for key, statistic in (("", entry.statistic), ("closed/", entry.closed)):
            if statistic is not None:
                numbers, texts = _divided(statistic)
                tensors.update({f"{entry.name}/{key}{name}": tensor for name, tensor in numbers.items()})
                if type(statistic) is not Moments:
                    layer[f"{key.strip('/') or 'window'}_state"] = {"values": texts, "tensors": list(numbers)}
        if type(entry.statistic) is not Moments:
            layer["calls"] = entry.calls
        described.append(layer)
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(asdict(saved.settings)),
        "layers": json.dumps(described),
        "aliases": json.dumps(saved.aliases),
    }
    kinds = {tuple(_kinds(entry.statistic)) for entry in saved.entries} - {("Moments",)}
    if kinds:
        metadata["statistics"] = json.dumps(list(kinds.pop()))
    if saved.history is not None:
        history = dict(saved.history)
        values, histograms = history.pop("values"), history.pop("histograms", None)
        if history["steps"]:
            tensors["history"] = values
            if histograms is not None:
                tensors["history_histograms"] = histograms
        metadata["history"] = json.dumps(history)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def _kinds(statistic: Statistic) -> list[str]:
    parts: Sequence[Statistic] = list(statistic) if isinstance(statistic, Several) else [statistic]
    return [type(part).__name__ for part in parts]


def _divided(statistic: Statistic) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state as tensors, and as numbers and texts."""
    tensors, values = {}, {}
    for key, value in statistic.state_dict().items():
        if isinstance(value, Tensor):
            on_disk = value.detach().cpu().contiguous()
            tensors[key] = on_disk.double() if type(statistic) is Moments else on_disk  # float32 where the device has no float64
        elif isinstance(value, _PLAIN):
            values[key] = value
        else:
            name = type(statistic).__name__
            raise TypeError(f"{key} in the state_dict of {name} is {type(value).__name__}; a file holds tensors, numbers and text")
    return tensors, values


def load(path: str | os.PathLike[str], kinds: Sequence[type[Statistic]] | None = None) -> Saved:
    """Reads what :func:`save` wrote; the statistics are on the CPU.

    Args:
        path: of the file.
        kinds: the classes of the statistics; default: those of the names in the file, which must have been imported.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a recording, or something in it does not fit; the message names the file and the key.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return _read(_File(file, os.fspath(path)), kinds)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error


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
            raise self.error(key, "missing from the metadata; this is not a recording of torchprobe")
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
        self.expect(key, shape)
        return self.take(key)

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """Checks what the header says."""
        part = self.file.get_slice(key)
        if tuple(part.get_shape()) != shape or part.get_dtype() != "F64":
            raise self.error(key, f"expected F64 of shape {shape}, got {part.get_dtype()} of {tuple(part.get_shape())}")

    def take(self, key: str) -> Tensor:
        """A tensor of any shape, which is not larger than the file."""
        self.keys.discard(key)
        tensor: Tensor = self.file.get_tensor(key)
        return tensor


def _read(file: _File, kinds: Sequence[type[Statistic]] | None) -> Saved:
    if file.metadata.get("format") != FORMAT:
        raise file.error("format", f"expected {FORMAT!r}, got {file.metadata.get('format')!r}")
    settings = _settings(file)
    found = _found(file, settings, kinds)
    described = file.text("layers", list)
    if len(described) > _MAX_LAYERS:
        raise file.error("layers", f"{len(described)} layers are more than a model has")
    entries = [_entry(file, layer, settings, found) for layer in described]
    names = {entry.name for entry in entries}
    if len(names) < len(entries):
        raise file.error("layers", "a name occurs twice")
    aliases = file.text("aliases", dict)
    if not all(isinstance(name, str) for name in aliases.values()):
        raise file.error("aliases", "an alias is not text")
    history = _history(file)
    if file.keys:
        raise file.error(min(file.keys), "belongs to no layer")
    return Saved(entries, settings, aliases, history)


def _found(file: _File, settings: Settings, kinds: Sequence[type[Statistic]] | None) -> list[type[Statistic]]:
    """The classes of the statistics."""
    names = file.text("statistics", list) if "statistics" in file.metadata else ["Moments"]
    if not names or not all(isinstance(name, str) for name in names) or "+".join(names) != settings.statistic:
        raise file.error("statistics", f"expected the names in {settings.statistic!r}, got {names}")
    if kinds is not None:
        if [kind.__name__ for kind in kinds] != names:
            raise file.error("statistics", f"recorded with {', '.join(names)}, not {', '.join(kind.__name__ for kind in kinds)}")
        return list(kinds)
    found = [statistic_class(name) for name in names]
    for name, kind in zip(names, found, strict=True):
        if kind is None:
            raise file.error("statistics", f"recorded with {name}: import the module that defines it, or call load(path, statistic={name})")
    return [kind for kind in found if kind is not None]


def _settings(file: _File) -> Settings:
    found = file.text("settings", dict)
    expected = {field.name: str if field.name != "outlier_sigma" else (int, float) for field in fields(Settings)}
    if found.keys() != expected.keys() or not all(isinstance(found[k], kind) for k, kind in expected.items()):
        raise file.error("settings", f"expected {', '.join(expected)}, got {found}")
    if not 0 < found["outlier_sigma"] < float("inf"):
        raise file.error("settings", f"outlier_sigma must be positive, got {found}")
    return Settings(**found)


def _entry(file: _File, layer: Any, settings: Settings, kinds: list[type[Statistic]]) -> Entry:
    expected: dict[str, Any] = {"name": str, "module": str, "features": int, "feature_dim": (int, type(None)), "closed": bool}
    if kinds != [Moments]:
        expected |= {"window_state": dict, "calls": int}
        if isinstance(layer, dict) and layer.get("closed"):
            expected["closed_state"] = dict
    if not isinstance(layer, dict) or layer.keys() != expected.keys():
        raise file.error("layers", f"each layer has {', '.join(expected)}; got {str(layer)[:200]}")
    if not all(isinstance(layer[key], kind) for key, kind in expected.items()):
        raise file.error("layers", f"a value is of the wrong kind: {str(layer)[:200]}")
    name, features = layer["name"], layer["features"]
    if not 0 < features <= _MAX_FEATURES:
        raise file.error("layers", f"layer {name!r} cannot have {features} features")
    moments = {"values": {"features": features, "outlier_sigma": float(settings.outlier_sigma)}, "tensors": list(_PARTS)}
    closed = None
    if layer["closed"]:
        closed = _statistic(file, f"{name}/closed/", layer.get("closed_state", moments), features, kinds)
    window = _statistic(file, f"{name}/", layer.get("window_state", moments), features, kinds)
    return Entry(name, layer["module"], layer["feature_dim"], window, closed, layer.get("calls", 0))


def _statistic(file: _File, prefix: str, saved: Mapping[str, Any], features: int, kinds: list[type[Statistic]]) -> Statistic:
    values, names = saved.get("values"), saved.get("tensors")
    if not isinstance(values, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise file.error("layers", f"expected values and the names of tensors for {prefix!r}")
    for name in names:
        if prefix + name not in file.keys:
            raise file.error(prefix + name, "missing")
        if kinds == [Moments]:
            file.expect(prefix + name, tuple(features if size == _WIDTH else size for size in _PARTS[name]))
    shapes = [file.file.get_slice(prefix + name).get_shape() for name in names]
    if features > _MAX_UNSEEN and not any(features in shape for shape in shapes):  # before anything is allocated
        raise file.error(prefix.rstrip("/"), f"no tensor is {features} features wide")
    state = {**values, **{name: file.take(prefix + name) for name in names}}
    try:
        statistic = Several.from_states(kinds, state) if len(kinds) > 1 else kinds[0].from_state(state)
    except (KeyError, TypeError, ValueError) as error:
        raise file.error(prefix.rstrip("/"), str(error)) from error
    if statistic.features != features:
        raise file.error(prefix.rstrip("/"), f"the statistic is {statistic.features} features wide, not {features}")
    if problem := statistic.problem():
        raise file.error(prefix + problem[0], problem[1])
    return statistic


def _history(file: _File) -> dict[str, Any] | None:
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
    if not steps:
        return None
    values = file.tensor("history", (len(steps), len(layers), len(names)))
    saved = {"steps": steps, "layers": layers, "fields": names, "dropped": dropped, "values": values}
    if "history_histograms" in file.keys:
        shape = file.file.get_slice("history_histograms").get_shape()
        saved["histograms"] = file.tensor("history_histograms", (len(steps), len(layers), *shape[-1:]))
    return saved
