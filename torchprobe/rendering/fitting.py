"""A table for a terminal that leaves out columns where the terminal is narrow, instead of breaking names and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from torchprobe.common.messages import counted

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult

NARROWEST = 12
"""A column of text is folded, but not below this width; names in the first column not below half of the terminal."""

_BESIDE = 3  # the space beside a column


class FittingTable(Table):
    """A table whose numbers are never broken, and whose names stay readable.

    Where it is wider than the terminal, columns of text fold, and then columns are left out. A line below says how many.

    Args:
        heads: the heads of the columns. The first column always stays.
        right: for each column, whether it holds numbers. Numbers are right-aligned and never folded.
        styles: for each column, the style of its cells.
        dispensable: indices of the columns that are left out first, the first one first. The others follow from the last one on.
        needed: indices of the columns that stay in any case.
        more: a sentence that says where all columns are.
        limit: the widest that the table may be, in characters.
        title: printed above the table.
        caption: printed below the table.
        head_style: the style of the heads.

    >>> from rich.console import Console
    >>> table = FittingTable([Text("layer"), Text("mean"), Text("std")], [False, True, True], more="rows() has all.")
    >>> table.add_row("blocks.0.attention", "1.234", "5.678")
    >>> with (console := Console(width=32)).capture() as printed:
    ...     console.print(table)
    >>> [line.strip() for line in printed.get().splitlines()][-2:]
    ['1 column does not fit. rows()', 'has all.']
    """

    def __init__(
        self,
        heads: Sequence[Text],
        right: Sequence[bool],
        *,
        styles: Sequence[str] = (),
        dispensable: Sequence[int] = (),
        needed: Sequence[int] = (),
        more: str = "",
        limit: int | None = None,
        title: Text | None = None,
        caption: str = "",
        head_style: str = "table.header",
    ) -> None:
        super().__init__(
            title=title,
            title_justify="left",
            caption=Text(caption) if caption else None,
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            header_style=head_style,
        )
        self._dispensable, self._needed = list(dispensable), {0, *needed}
        self._more, self._limit, self._said = more, limit, caption
        for index, head in enumerate(heads):
            style = styles[index] if styles else ""
            self.add_column(head, justify="right" if right[index] else "left", no_wrap=right[index], overflow="fold", style=style)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width, self._limit or options.max_width)
        widths = self._widths(console, options, width)
        if widths is None:
            yield from super().__rich_console__(console, options)
        else:
            yield from self._narrow(widths).__rich_console__(console, options.update(width=width))

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = min(options.max_width, self._limit or options.max_width)
        widths = self._widths(console, options, width)
        if widths is None:
            return super().__rich_measure__(console, options)
        wide = sum(each + _BESIDE for each in widths.values()) + 1
        return Measurement(wide, wide).with_maximum(options.max_width)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _widths(self, console: Console, options: ConsoleOptions, width: int) -> dict[int, int] | None:
        """The columns that fit, each with its width; None: all of them do, and need no help."""
        free = options.update(width=100_000, no_wrap=True)

        def measured(one: RenderableType) -> int:
            return Measurement.get(console, free, one).maximum

        cells = [max(map(measured, column.cells), default=0) for column in self.columns]
        heads = [measured(column.header) for column in self.columns]
        words = [max(map(len, str(column.header).split()), default=0) for column in self.columns]
        natural = [max(pair) for pair in zip(cells, heads, strict=True)]
        room = width - 1
        if sum(natural) + _BESIDE * len(natural) <= room:
            return None
        right = [column.justify == "right" for column in self.columns]  # columns may have been added since
        least = [
            max(cells[index], words[index])
            if right[index]
            else min(natural[index], max(width // 2 if index == 0 else NARROWEST, words[index]))
            for index in range(len(self.columns))
        ]
        last_first = [index for index in reversed(range(len(self.columns))) if index not in self._dispensable]
        left = dict(enumerate(least))
        for index in [*self._dispensable, *last_first]:
            if index in self._needed:
                continue
            if sum(left.values()) + _BESIDE * len(left) <= room:
                break
            del left[index]
        spare = room - sum(left.values()) - _BESIDE * len(left)
        if spare < 0 and not right[0]:  # nothing else to leave out
            left[0] = max(1, left[0] + spare)
        for index in left:
            given = max(0, min(spare, natural[index] - left[index]))
            left[index] += given
            spare -= given
        return left

    def _narrow(self, widths: dict[int, int]) -> Table:
        """The same with these columns only."""
        lost = len(self.columns) - len(widths)
        told = f"{counted(lost, 'column')} {'does' if lost == 1 else 'do'} not fit. {self._more}".rstrip() if lost else ""
        caption = " ".join(filter(None, [self._said, told]))
        table = Table(
            title=self.title,
            title_justify="left",
            caption=Text(caption) if caption else None,
            caption_justify="left",
            box=self.box,
            header_style=self.header_style,
        )
        for index, width in widths.items():
            column = self.columns[index]
            header = column.header.copy() if isinstance(column.header, Text) else Text(str(column.header))
            header.no_wrap = False  # a head may be broken between words where a number may not
            table.add_column(header, justify=column.justify, no_wrap=column.no_wrap, overflow="fold", style=column.style, width=width)
        cells = [list(self.columns[index].cells) for index in widths]
        for row, values in zip(self.rows, zip(*cells, strict=True), strict=True):
            table.add_row(*values, style=row.style, end_section=row.end_section)
        return table
