"""All streams of one recorder: found by name, as the entries of a recording, and filled from saved states."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.common.numbers import shown, whole
from torchprobe.ops.observe import MOST_FEATURES
from torchprobe.recording import masks, windows
from torchprobe.recording.control import NOTHING_TO_READ, Control, Skipped, Slot, keep_contents
from torchprobe.recording.hook import Hook
from torchprobe.recording.stream import Stream
from torchprobe.recording.transfer import Part
from torchprobe.recording.windows import Entry, Unread, check_mergeable
from torchprobe.statistics import Statistic
from torchprobe.statistics.saved import check_keys, check_mapping

_LATER = ("feature_dim_by", "calls")  # missing from states of earlier versions
_WIDE = 1 << 16  # features that are believed whatever the size of the state


class Bank:
    """The streams behind some hooks.

    Args:
        hooks: of one recorder.
        control: which they share.
        model: which they watch; it is not kept alive.
    """

    def __init__(self, hooks: Sequence[Hook], control: Control, model: nn.Module) -> None:
        self.hooks = {hook.main.name: hook for hook in hooks}
        self.control = control
        self._model = weakref.ref(model)

    def streams(self) -> Iterator[Stream]:
        """All streams. Other threads may add some meanwhile, as they may add slots."""
        return chain.from_iterable(list(hook.streams.values()) for hook in self.hooks.values())

    def slots(self) -> list[Slot]:
        return [slot for stream in self.streams() for slot in list(stream.slots.values())]

    def keep_traced(self, modules: set[int]) -> Callable[[], None]:
        """Remembers what the compiled hooks of these modules, given by their ids, have counted; the result restores it."""
        hooks = [hook for hook in self.hooks.values() if Skipped.TRACED in hook.main.skipped and id(hook.layer.alive) in modules]
        return keep_contents([slot for hook in hooks for stream in hook.streams.values() for slot in stream.slots.values()], True)

    def entries(self) -> list[Entry]:
        """The streams that have fired, in the order of firing."""
        entries = (entry_of(stream) for stream in self._in_order())
        return [entry for entry in entries if entry is not None]

    def _in_order(self) -> list[Stream]:
        return sorted(self.streams(), key=lambda stream: stream.order)

    def close_window(self, note: Callable[[list[str], Sequence[Part]], None]) -> None:
        """Closes the running window of every stream, and starts the next one.

        What a window held is taken out in one step, so that a call of another thread is in one window or in the next. If this is
        interrupted, it is put back.

        Args:
            note: gets the names of the streams, and for each group of them the names with their summaries, as
                :func:`torchprobe.recording.windows.summaries` gives them.
        """
        held = [(stream, slot) for stream in self._in_order() for slot in list(stream.slots.values())]
        running, taken = [slot.statistic for _, slot in held], dict[int, Statistic]()
        try:
            windows.take(running, taken)
            by_name = dict[str, list[Statistic]]()
            for index, (stream, _) in enumerate(held):
                by_name.setdefault(stream.name, []).append(taken[index])
            whole = [parts[0] if len(parts) == 1 else windows.merged(parts) for parts in by_name.values()]
            summaries = windows.summaries([one for one in whole if one is not None], True)
            closed = windows.join([taken[index] for index in range(len(held))], [slot.closed for _, slot in held])
        except BaseException:
            windows.put_back(running, taken)
            raise
        for (_, slot), statistic in zip(held, closed, strict=True):
            slot.closed = statistic
        names = list(by_name)
        note(names, [([names[index] for index in group], part) for group, part in summaries])

    def unread(self) -> list[Unread]:
        """The streams that were called, but where nothing decides which dimension holds the features."""
        unsure = (stream for stream in self.streams() if stream.unsure and not stream.slots)
        return [Unread(stream.name, stream.layer.kind) for stream in sorted(unsure, key=lambda stream: stream.order)]

    def silent(self) -> list[str]:
        """The names of the streams that have never fired, and may still do so."""
        waiting = (s for s in self.streams() if not s.slots and not s.skipped & NOTHING_TO_READ and not s.failure)
        return [stream.name for stream in waiting]

    def names(self) -> list[str]:
        """The names of all streams, of those that have not fired, too."""
        return [stream.name for stream in self.streams()]

    def find(self, name: str) -> Stream | None:
        """The stream of a name. The name of a layer leads to its first stream; its only tensor is also found by its place."""
        if (hook := self.hooks.get(name)) is not None:
            return hook.main if "" in hook.streams else next(iter(hook.streams.values()))
        found = self._split(name)
        if found is None:
            return None
        hook, label = found
        main = hook.streams.get("")
        return hook.streams.get(label) or (main if main is not None and main.place == label else None)

    def named(self, name: str) -> Stream | None:
        """The stream of a name in a saved state; it is made if the layer has several tensors."""
        hook = self.hooks.get(name)
        if hook is not None:
            hook.streams[""] = hook.main
            return hook.main
        found = self._split(name)
        return None if found is None else found[0].stream(found[1])

    def knows(self, name: str) -> bool:
        """Whether a layer of this name may be in a saved state."""
        return name in self.hooks or self._split(name) is not None

    def _split(self, name: str) -> tuple[Hook, str] | None:
        """The hook and the label in "layer:label@kind"."""
        stem, at, kind = name.rpartition("@")
        for base, suffix in ((stem, at + kind), (name, "")):
            layer, colon, label = base.rpartition(":")
            if colon and label and (hook := self.hooks.get(layer + suffix)) is not None:
                return hook, label
        return None

    def masks(self, mask: Tensor | Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The masks by name or glob.

        Raises:
            TypeError, ValueError: it is not a mask, or a name is unknown.
        """
        given = {} if mask is None else dict(mask) if isinstance(mask, Mapping) else {"**": mask}
        for pattern, one in given.items():
            masks.check(one)
            names = [[*stream.layer.names, stream.name] for stream in self.streams()]
            if pattern != "**" and not any(masks.pattern_for(own, [pattern]) for own in names):
                near = difflib.get_close_matches(pattern, [name for own in names for name in own], n=1)
                raise ValueError(f"mask: {pattern!r} is none of the recorded layers" + (f"; did you mean {near[0]!r}?" if near else ""))
        return given

    # -- saved states ------------------------------------------------------------------------------------------------------

    def restore(self, entries: Sequence[Entry]) -> None:
        """Fills streams that are empty with what :meth:`trial` has read."""
        for entry in entries:
            stream = self.named(entry.name)
            assert stream is not None
            slot = self.slot(stream, entry.statistic.features)
            slot.statistic.load_state_dict(entry.statistic.state_dict())
            if entry.closed is not None:
                slot.closed = self.control.factory(entry.closed.features, slot.statistic.device)
                slot.closed.load_state_dict(entry.closed.state_dict())
            slot.calls = entry.calls
            stream.loaded = entry.feature_dim, entry.feature_dim_by

    def trial(self, name: str, saved: Any) -> Entry:
        """A saved layer, read apart from the streams.

        Raises:
            ValueError: something in it does not fit.
        """
        try:
            check_mapping("a layer", saved)
            check_keys("a layer", {**dict.fromkeys(_LATER), **saved}, (*_LATER, "feature_dim", "features", "window", "closed"))
            features = whole("features", saved["features"], 1, MOST_FEATURES)
            by, calls, dim = saved.get("feature_dim_by", ""), whole("calls", saved.get("calls", 0)), saved["feature_dim"]
            if not isinstance(by, str) or (dim is not None and type(dim) is not int):
                raise ValueError(f"feature_dim is a whole number or None, and feature_dim_by a text; got {shown(dim)} and {shown(by)}")
            window, closed = (None if saved[key] is None else self._read(features, saved[key]) for key in ("window", "closed"))
            if window is None:
                raise ValueError("window is None")
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return Entry(name, "", dim, window, closed, calls, by)

    def _read(self, features: int, state: Any) -> Statistic:
        """A saved statistic."""
        check_mapping("a window", state)
        widest = max((value.numel() for value in state.values() if isinstance(value, Tensor)), default=0)
        template = self.control.factory.template
        light = bool(template.tensors()) and sum(tensor.numel() for tensor in template.tensors().values()) < template.features
        if features > max(widest, _WIDE) and not light:  # before any memory is allocated
            raise ValueError(f"features is {features}, but the largest tensor of the saved state has {widest} elements")
        statistic = self.control.factory(features, torch.device("cpu"))
        statistic.load_state_dict(state)
        return statistic

    def check_mergeable(self, theirs: Sequence[Entry]) -> None:
        """Raises ValueError for entries that :meth:`absorb` could not add."""
        check_mergeable(self.entries(), theirs)
        for entry in theirs:
            stream = self.find(entry.name)
            if stream is None or not stream.slots:
                empty = self.control.factory(entry.statistic.features, torch.device("cpu"))
                check_mergeable([Entry(entry.name, "", None, empty)], [entry])

    def absorb(self, theirs: Entry) -> None:
        """Adds an entry of another recording."""
        stream = self.named(theirs.name)
        assert stream is not None
        slot = self.slot(stream, theirs.statistic.features)
        slot.statistic.merge(theirs.statistic)
        if theirs.closed is not None:
            if slot.closed is None:
                slot.closed = self.control.factory(theirs.closed.features, slot.statistic.device)
            slot.closed.merge(theirs.closed)
        slot.calls += theirs.calls
        stream.loaded = stream.loaded or (theirs.feature_dim, theirs.feature_dim_by)

    def slot(self, stream: Stream, features: int) -> Slot:
        """The slot of a stream. If it has not fired yet, it is made on its most likely device: that of the parameters around it."""
        if not stream.slots:
            modules = [module for module in (stream.layer.alive, self._model()) if module is not None]
            devices = (tensor.device for module in modules for tensor in module.parameters())
            device = next((device for device in devices if device.type != "meta"), torch.device("cpu"))  # weights may be offloaded
            stream.allocate(features, device, 0)
        return next(iter(stream.slots.values()))


def entry_of(stream: Stream) -> Entry | None:
    """A stream that has fired, as an entry of a recording; None if it has not."""
    slots = list(stream.slots.values())
    if not slots:
        return None
    statistic, closed = slots[0].statistic, slots[0].closed
    if len(slots) > 1:
        together = windows.merged([slot.statistic for slot in slots])
        assert together is not None
        statistic, closed = together, windows.merged([slot.closed for slot in slots])
    calls = sum(slot.calls for slot in slots)
    return Entry(stream.name, stream.layer.kind, stream.feature_dim, statistic, closed, calls, stream.feature_dim_by, stream.of)
