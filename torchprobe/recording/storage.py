"""Recordings in files: safetensors, which hold only numbers and text.

Tensors: ``"{layer}/{name}"`` for every tensor in the ``state_dict`` of the running window, ``"{layer}/closed/{name}"`` for the closed
windows, ``"history"`` (steps, layers, fields), ``"history_histograms"`` (steps, layers, bins used). Metadata: ``format`` = "1", and the
JSON texts ``settings``, ``layers``, ``aliases``, ``history``.

Statistics other than Moments add to the metadata. ``statistics`` is the name of their class, or the list of names of several statistics.
``layers`` also holds the numbers and texts of their ``state_dict``.

``checksums`` in the metadata are those of :func:`torchprobe.common.storage.save_tensors`. Files of versions that wrote none still load.

A file may come from anywhere. Everything in it is checked before it is used. Whatever does not fit raises a ``ValueError`` that names the
file and the key.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from torchprobe.common.reading import parse_json
from torchprobe.common.storage import Checksums, save_tensors
from torchprobe.recording.history import check_steps
from torchprobe.recording.windows import Entry, Settings, Unread
from torchprobe.statistics import Moments, Norms, Quantile, Routing, Saturation, Several, Sparsity, Statistic, TopInputs
from torchprobe.statistics.dynamic import EarlierProtocol
from torchprobe.statistics.factory import classes_named
from torchprobe.statistics.saved import DamagedState
from torchprobe.statistics.tensors import is_plain

FORMAT = "1"
_MAX_LAYERS = 1 << 17
_MAX_FEATURES = 1 << 26
_MAX_HISTORY = 1 << 31  # numbers
_MAX_COUNT = 1 << 53
_LARGEST = 1e308  # larger whole numbers do not fit a float
_BUILT_IN = (Moments, Quantile, TopInputs, Norms, Sparsity, Saturation, Routing)  # imported here, so that `classes_named` finds them
_WIDTH = 3
_METADATA = {"format", "settings", "layers", "aliases", "unsure", "statistics", "history"}
_PARTS = {name: tuple(part.shape) for name, part in Moments(_WIDTH, "cpu").parts().items()}  # 3 stands for the features


@dataclass
class Saved:
    """The contents of a file. ``history`` is the argument of :meth:`torchprobe.recording.History.load_state_dict`, or None."""

    entries: list[Entry]
    settings: Settings
    aliases: dict[str, str]
    template: Statistic | None = None
    history: dict[str, Any] | None = None
    unread: Sequence[Unread] = ()


# -- writing ---------------------------------------------------------------------------------------------------------------


def save(saved: Saved, path: str | os.PathLike[str]) -> None:
    """Writes a recording. An existing file is replaced only when everything is written.

    Raises:
        FileNotFoundError: the folder does not exist.
        TypeError: a statistic has only the verbs of the earlier protocol, or its state_dict is more than tensors, numbers and text.
    """
    if not (folder := Path(path).resolve().parent).is_dir():
        raise FileNotFoundError(f"cannot save to {os.fspath(path)!r}: there is no folder {str(folder)!r}")
    if isinstance(saved.template, EarlierProtocol):
        raise TypeError(
            f"{saved.settings.statistic} cannot be saved: derive it from torchprobe.statistics.Statistic, see docs/statistics.md"
        )
    tensors: dict[str, Tensor] = {}
    layers = [_write_layer(entry, saved.settings, tensors) for entry in saved.entries]
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(asdict(saved.settings)),
        "layers": json.dumps(layers),
        "aliases": json.dumps(saved.aliases),
    }
    if saved.unread:
        metadata["unsure"] = json.dumps([[layer.name, layer.module] for layer in saved.unread])
    if isinstance(saved.template, Several):
        metadata["statistics"] = json.dumps([type(part).__name__ for part in saved.template])
    elif saved.settings.statistic != "Moments":
        metadata["statistics"] = json.dumps(saved.settings.statistic)
    if saved.history is not None:
        history = dict(saved.history)
        values, histograms = history.pop("values"), history.pop("histograms", None)
        if history["steps"]:
            tensors["history"] = values
            if histograms is not None:
                tensors["history_histograms"] = histograms
        metadata["history"] = json.dumps(history)
    save_tensors(path, tensors, metadata)


def _write_layer(entry: Entry, settings: Settings, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Adds the tensors of one layer, and returns the rest."""
    layer = {
        "name": entry.name,
        "module": entry.module,
        "features": entry.statistic.features,
        "feature_dim": entry.feature_dim,
        "feature_dim_by": entry.feature_dim_by,
        "of": entry.of,
        "closed": entry.closed is not None,
    }
    moments = type(entry.statistic) is Moments
    for which, prefix, statistic in (("window", "", entry.statistic), ("closed", "closed/", entry.closed)):
        if statistic is None:
            continue
        state = statistic.state_dict()
        on_disk = {name: part.detach().cpu().contiguous() for name, part in state.items() if isinstance(part, Tensor)}
        if moments:  # float32 on devices without float64
            on_disk = {name: part.double() for name, part in on_disk.items()}
        else:
            values = {name: value for name, value in state.items() if name not in on_disk}
            if unknown := [name for name, value in values.items() if not is_plain(value)]:
                what = f"{unknown[0]} is {type(values[unknown[0]]).__name__}; a file holds tensors, numbers and text"
                raise TypeError(f"layer {entry.name!r} cannot be saved: in the state_dict of {type(statistic).__name__}, {what}")
            layer[f"{which}_state"] = {"values": values, "tensors": list(on_disk)}
        for name, part in on_disk.items():
            if (key := f"{_key(entry.name)}/{prefix}{name}") in tensors:
                what = f"two tensors would be called {key!r}; rename {name!r} in its state_dict"
                raise TypeError(f"layer {entry.name!r} cannot be saved: of {type(statistic).__name__}, {what}")
            tensors[key] = part
    if not moments:
        layer["calls"] = entry.calls
    elif entry.statistic.setup()["outlier_sigma"] != settings.outlier_sigma:  # a function may choose it for each width
        layer["outlier_sigma"] = entry.statistic.setup()["outlier_sigma"]
    return layer


def _key(layer: str) -> str:
    """The name of a layer without "/", so that what precedes the first "/" of a key is the layer."""
    return layer.replace("%", "%25").replace("/", "%2F")


# -- reading ---------------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], statistic: Any = None) -> Saved:
    """Reads what :func:`save` wrote; the statistics are on the CPU.

    Args:
        path: of the file.
        statistic: the class of the statistics, or the list of their classes. Default: those with the names in the file.

    Raises:
        FileNotFoundError: the file does not exist.
        TypeError: ``statistic`` is something else.
        DamagedError: a part is not as it was written; a ``ValueError``.
        ValueError: it is not a recording, or something in it does not fit; the message names the file and the key.
    """
    kinds = None if statistic is None else _classes(statistic)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return _Reader(_File(file, os.fspath(path)), kinds).read()
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is not a safetensors file: {error}") from error


def holds_recording(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a recording, by its metadata; False for folders and other files.

    Raises:
        FileNotFoundError: there is nothing of that name.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    if not Path(path).is_file():
        return False
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            return {"settings", "layers", "history"} <= {*(file.metadata() or {})}
    except SafetensorError:
        return False


def _classes(statistic: Any) -> list[type[Statistic]]:
    kinds: list[Any] = list(statistic) if isinstance(statistic, (list, tuple)) else [statistic]
    kinds = [kind.func if isinstance(kind, functools.partial) else kind for kind in kinds]  # the file holds the arguments
    for kind in kinds:
        if not isinstance(kind, type) or not issubclass(kind, Statistic):
            raise TypeError(f"statistic= takes the class of the statistics, or a list of classes; got {kind!r}")
    return kinds


class _File:
    """An open file whose errors name it."""

    def __init__(self, file: Any, path: str) -> None:
        self.file, self.path = file, path
        self.keys = set(file.keys())
        self.metadata: Mapping[str, str] = file.metadata() or {}
        self.sums = Checksums(path, self.metadata, earlier=_METADATA if "settings" in self.metadata else None)
        self.sums.names(self.keys)

    def error(self, key: str, what: str) -> ValueError:
        return ValueError(f"{self.path}, {key!r}: {what}")

    def text(self, key: str, kind: type) -> Any:
        """A JSON text of the metadata."""
        if key not in self.metadata:
            raise self.error(key, "missing from the metadata; this is not a recording of torchprobe")
        try:
            value = parse_json(self.metadata[key])
        except ValueError as error:
            raise self.error(key, f"the metadata is not JSON ({error})") from error
        if not isinstance(value, kind):
            raise self.error(key, f"expected a JSON {kind.__name__}, got {type(value).__name__}")
        return value

    def tensor(self, key: str, shape: tuple[int, ...]) -> Tensor:
        """A float64 tensor of this shape, which is checked before the tensor is read."""
        if key not in self.keys:
            raise self.error(key, "missing")
        self.expect(key, shape)
        return self.take(key)

    def expect(self, key: str, shape: tuple[int, ...]) -> None:
        """Checks the type and shape in the header."""
        part = self.file.get_slice(key)
        if tuple(part.get_shape()) != shape or part.get_dtype() != "F64":
            raise self.error(key, f"expected F64 of shape {shape}, got {part.get_dtype()} of {tuple(part.get_shape())}")

    def take(self, key: str) -> Tensor:
        """A tensor of any shape."""
        self.keys.discard(key)
        tensor: Tensor = self.file.get_tensor(key)
        return self.sums.check(key, tensor)


class _Reader:
    """Reads the parts of one recording.

    Args:
        file: the open file.
        kinds: the classes of the statistics, or None for those that the file names.
    """

    def __init__(self, file: _File, kinds: Sequence[type[Statistic]] | None) -> None:
        if file.metadata.get("format") != FORMAT:
            raise file.error("format", f"expected {FORMAT!r}, got {file.metadata.get('format')!r}")
        self.file = file
        self.settings = self._settings()
        self.several = file.metadata.get("statistics", "").startswith("[")
        self.kinds = self._kinds(kinds)
        self.moments = self.kinds == [Moments] and not self.several

    def read(self) -> Saved:
        file = self.file
        layers = file.text("layers", list)
        if len(layers) > _MAX_LAYERS:
            raise file.error("layers", f"{len(layers)} layers are more than a model has")
        entries = [self._entry(layer) for layer in layers]
        if len({entry.name for entry in entries}) < len(entries):
            raise file.error("layers", "a name occurs twice")
        aliases = file.text("aliases", dict)
        if not all(isinstance(name, str) for name in aliases.values()):
            raise file.error("aliases", "an alias is not text")
        history = self._history()
        if file.keys:
            raise file.error(min(file.keys), "belongs to no layer")
        unsure = file.text("unsure", list) if "unsure" in file.metadata else []
        if not all(isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair) for pair in unsure):
            raise file.error("unsure", "expected pairs of the name and the class of a layer")
        unread = [Unread(name, module) for name, module in unsure]
        return Saved(entries, self.settings, aliases, entries[0].statistic if entries else None, history, unread)

    def _settings(self) -> Settings:
        found = self.file.text("settings", dict)
        expected = {field.name: str if field.name != "outlier_sigma" else (int, float) for field in fields(Settings)}
        if found.keys() != expected.keys() or not all(isinstance(found[key], kind) for key, kind in expected.items()):
            raise self.file.error("settings", f"expected {', '.join(expected)}, got {str(found)[:200]}")
        if not 0 < found["outlier_sigma"] < _LARGEST:
            raise self.file.error("settings", f"outlier_sigma must be positive, got {str(found)[:200]}")
        return Settings(**found)

    def _kinds(self, kinds: Sequence[type[Statistic]] | None) -> list[type[Statistic]]:
        """The classes of the statistics."""
        file = self.file
        found = file.text("statistics", list if self.several else str) if "statistics" in file.metadata else "Moments"
        names = found if isinstance(found, list) else [found]
        if not names or not all(isinstance(name, str) for name in names) or "+".join(names) != self.settings.statistic:
            raise file.error("statistics", f"expected the names in {self.settings.statistic!r}, got {str(names)[:200]}")
        if kinds is not None:
            if [kind.__name__ for kind in kinds] != names:
                raise file.error("statistics", f"recorded with {', '.join(names)}, not {', '.join(kind.__name__ for kind in kinds)}")
            return list(kinds)
        candidates = [classes_named(name) for name in names]
        for name, classes in zip(names, candidates, strict=True):
            if not classes:
                wanted = f"[{', '.join(names)}]" if self.several else name
                what = f"import the module that defines it, or call load(path, statistic={wanted})"
                raise file.error("statistics", f"recorded with {name}: {what}")
            if len(classes) > 1:
                modules = ", ".join(sorted(kind.__module__ for kind in classes))
                raise file.error("statistics", f"{name} is defined in {modules}: choose one with load(path, statistic=…)")
        return [classes[0] for classes in candidates]

    def _entry(self, layer: Any) -> Entry:
        file = self.file
        expected: dict[str, Any] = {"name": str, "module": str, "features": int, "feature_dim": (int, type(None)), "closed": bool}
        if not self.moments:
            expected |= {"window_state": dict, "calls": int}
            if isinstance(layer, dict) and layer.get("closed"):
                expected["closed_state"] = dict
        elif isinstance(layer, dict) and "outlier_sigma" in layer:
            expected["outlier_sigma"] = (int, float)
        if isinstance(layer, dict):  # missing from files of an earlier version
            expected |= {key: str for key in ("feature_dim_by", "of") if key in layer}
        if not isinstance(layer, dict) or layer.keys() != expected.keys():
            raise file.error("layers", f"each layer has {', '.join(expected)}; got {str(layer)[:200]}")
        if not all(isinstance(layer[key], kind) for key, kind in expected.items()):
            raise file.error("layers", f"a value is of the wrong kind: {str(layer)[:200]}")
        name, features, calls = layer["name"], layer["features"], layer.get("calls", 0)
        if not 0 < features <= _MAX_FEATURES:
            raise file.error("layers", f"layer {name!r} cannot have {features} features")
        if not 0 <= calls <= _MAX_COUNT:
            raise file.error("layers", f"layer {name!r} cannot have {calls} calls")
        sigma = layer.get("outlier_sigma", self.settings.outlier_sigma)
        if not 0 < sigma < _LARGEST:
            raise file.error("layers", f"outlier_sigma of layer {name!r} must be positive, got {sigma}")
        moments = {"values": {"features": features, "outlier_sigma": float(sigma)}, "tensors": list(_PARTS)}
        prefix = _key(name)
        if prefix != name and not any(key.startswith(f"{prefix}/") for key in file.keys):
            prefix = name  # as earlier versions wrote it
        closed = None
        if layer["closed"]:
            closed = self._statistic(f"{prefix}/closed/", layer.get("closed_state", moments), features)
        window = self._statistic(f"{prefix}/", layer.get("window_state", moments), features)
        by, of = layer.get("feature_dim_by", ""), layer.get("of", "")
        return Entry(name, layer["module"], layer["feature_dim"], window, closed, calls, by, of)

    def _statistic(self, prefix: str, saved: Mapping[str, Any], features: int) -> Statistic:
        file, values, names = self.file, saved.get("values"), saved.get("tensors")
        if not isinstance(values, dict) or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise file.error("layers", f"expected values and the names of tensors for {prefix!r}")
        for name in names:
            if prefix + name not in file.keys:
                raise file.error(prefix + name, "missing")
            if self.moments:
                file.expect(prefix + name, tuple(features if size == _WIDTH else size for size in _PARTS[name]))
        state = {**values, **{name: file.take(prefix + name) for name in names}}
        try:
            statistic = Several.from_states(self.kinds, state) if self.several else self.kinds[0].from_state(state)
        except DamagedState as error:
            raise file.error(prefix + error.part, error.what) from error
        except Exception as error:  # a constructor may fail in any way on values from a damaged file
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise file.error(prefix.rstrip("/"), what) from error
        if statistic.features != features:
            raise file.error(prefix.rstrip("/"), f"the statistic is {statistic.features} features wide, not {features}")
        return statistic

    def _history(self) -> dict[str, Any] | None:
        file = self.file
        state = file.text("history", dict)
        steps, layers, names = (state.get(key) for key in ("steps", "layers", "fields"))
        if not isinstance(steps, list) or not isinstance(layers, list) or not isinstance(names, list):
            raise file.error("history", "expected the lists steps, layers and fields")
        if not all(isinstance(name, str) for name in layers + names):
            raise file.error("history", "layers and fields are text")
        repeated = state.get("repeated", True)  # missing from files of an earlier version
        try:
            check_steps(steps, repeated)
        except ValueError as error:
            raise file.error("history", str(error)) from error
        if len(set(layers)) < len(layers) or len(steps) * len(layers) * len(names) > _MAX_HISTORY:
            raise file.error("history", "a layer occurs twice, or there are more numbers than a run can have")
        dropped = state.get("dropped", 0)  # missing from files of an earlier version
        if isinstance(dropped, bool) or not isinstance(dropped, int) or not 0 <= dropped <= _MAX_COUNT:
            raise file.error("history", f"dropped counts windows, got {str(dropped)[:200]}")
        if not steps:
            return None
        values = file.tensor("history", (len(steps), len(layers), len(names)))
        saved = {"steps": steps, "layers": layers, "fields": names, "dropped": dropped, "repeated": repeated, "values": values}
        if "history_histograms" in file.keys:
            shape = file.file.get_slice("history_histograms").get_shape()
            saved["histograms"] = file.tensor("history_histograms", (len(steps), len(layers), *shape[-1:]))
        return saved
