"""The state of a recorder as plain numbers, text and tensors, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchprobe.recording import windows

if TYPE_CHECKING:
    from torchprobe.recording.recorder import Recorder

FORMAT = 1


def state_of(recorder: Recorder) -> dict[str, Any]:
    """What :meth:`Recorder.state_dict` gives."""
    layers = {
        entry.name: {
            "feature_dim": entry.feature_dim,
            "features": entry.statistic.features,
            "window": entry.statistic.state_dict(),
            "closed": None if entry.closed is None else entry.closed.state_dict(),
        }
        for entry in recorder._entries()
    }
    return {"format": FORMAT, "settings": asdict(recorder.settings), "layers": layers, "history": recorder.history.state_dict()}


def restore(recorder: Recorder, state: Mapping[str, Any]) -> None:
    """What :meth:`Recorder.load_state_dict` does."""
    if state.get("format") != FORMAT:
        raise ValueError(f"expected the state of a recorder, format {FORMAT}; got format {state.get('format')!r}")
    if state["settings"] != asdict(recorder.settings):
        raise ValueError(f"the state was recorded with {state['settings']}, this recorder has {asdict(recorder.settings)}")
    unknown = [name for name in state["layers"] if name not in recorder._hooks]
    if unknown:
        raise ValueError(f"the state holds layers that this recorder does not watch: {', '.join(map(repr, unknown))}")
    recorder.reset()
    for name, saved in state["layers"].items():
        hook = recorder._hooks[name]
        slot = recorder._slot(hook, saved["features"])
        slot.statistic.load_state_dict(saved["window"])
        hook.loaded_dim = saved["feature_dim"]
        if saved["closed"] is not None:
            slot.closed = windows.duplicate(slot.statistic)
            slot.closed.load_state_dict(saved["closed"])
    recorder.history.load_state_dict(state["history"])
