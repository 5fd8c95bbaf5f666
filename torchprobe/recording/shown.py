"""How a recording is shown, in a terminal and in a notebook: the columns of its table, and what its running window does not say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchprobe.recording.history import History
    from torchprobe.statistics import Statistic


def table_options(fields: Mapping[str, str], template: Statistic | None, history: History, empty: bool) -> dict[str, Any]:
    """``columns`` and ``note`` of the table of layers; ``empty``: no layer has fired in the running window."""
    from torchprobe.rendering.tables import statistic_columns

    chosen = None if template is None else template.table_fields
    closed = len(history) + history.dropped
    return {
        "columns": statistic_columns({name: fields[name] for name in (fields if chosen is None else chosen)}),
        "note": f"This window is empty. total.table() shows all {closed} closed windows." if closed and empty else "",
    }
