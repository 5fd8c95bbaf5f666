"""All streams of one recorder: found by name, as the entries of a recording, and filled from saved states."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from torchprobe.recording import masks, windows
from torchprobe.recording.control import NOTHING_TO_READ, Control, Slot
from torchprobe.recording.hook import Hook
from torchprobe.recording.stream import Stream
from torchprobe.recording.windows import Entry, Unread, check_mergeable


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
        return chain.from_iterable(hook.streams.values() for hook in self.hooks.values())

    def slots(self) -> list[Slot]:
        return [slot for stream in self.streams() for slot in stream.slots.values()]

    def entries(self) -> list[Entry]:
        """The streams that have fired, in the order of firing."""
        return [entry_of(stream) for stream in sorted((s for s in self.streams() if s.slots), key=lambda stream: stream.order)]

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

    def restore(self, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Fills streams that are empty from saved layers, which :meth:`trial` has checked."""
        for name, saved in layers.items():
            stream = self.named(name)
            assert stream is not None
            slot = self.slot(stream, saved["features"])
            slot.statistic.load_state_dict(saved["window"])
            if saved["closed"] is not None:
                slot.closed = self.control.factory(saved["features"], slot.statistic.device)
                slot.closed.load_state_dict(saved["closed"])
            slot.calls = saved.get("calls", 0)
            stream.loaded = saved["feature_dim"], saved.get("feature_dim_by", "")

    def trial(self, name: str, saved: Mapping[str, Any]) -> Entry:
        """A saved layer, loaded apart from the streams.

        Raises:
            ValueError: something in it does not fit.
        """
        statistic = self.control.factory(saved["features"], torch.device("cpu"))
        try:
            for state in (saved["closed"], saved["window"]):
                if state is not None:
                    statistic.load_state_dict(state)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        return Entry(name, "", saved["feature_dim"], statistic)

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


def entry_of(stream: Stream) -> Entry:
    """A stream that has fired, as an entry of a recording."""
    slots = list(stream.slots.values())
    statistic, closed = slots[0].statistic, slots[0].closed
    if len(slots) > 1:
        together = windows.merged([slot.statistic for slot in slots])
        assert together is not None
        statistic, closed = together, windows.merged([slot.closed for slot in slots])
    calls = sum(slot.calls for slot in slots)
    return Entry(stream.name, stream.layer.kind, stream.feature_dim, statistic, closed, calls, stream.feature_dim_by, stream.of)
