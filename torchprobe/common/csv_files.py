"""Tables in CSV: written so that no program takes a cell for a formula or a command, read within bounds.

Spreadsheets compute cells that begin with ``=``, ``+``, ``-`` or ``@``, and a terminal obeys control characters. A text of that kind gets
an apostrophe in front, which :func:`read_rows` takes away again. Control characters are written as ``\\x1b``. Numbers are written as they
are. (OWASP, CSV injection, https://owasp.org/www-community/attacks/CSV_Injection)
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from torchprobe.common import limits
from torchprobe.common.files import replacing
from torchprobe.common.reading import open_regular

_FORMULA = re.compile(r"'*[=+\-@\t]")
_QUOTED = re.compile(r"'+[=+\-@\t]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def write_rows(path: str | os.PathLike[str], rows: Iterable[Sequence[object]]) -> Path:
    """Writes a table; an older file is replaced as a whole. Returns the path.

    Cells are texts, numbers, or None for an empty cell. The encoding is UTF-8. What it cannot hold, half of a surrogate pair, is written as
    an escape.

    >>> import tempfile
    >>> file = write_rows(Path(tempfile.mkdtemp(), "a.csv"), [["name", "x"], ["=1+1", -1.5], ["a\\x1b[2J", None]])
    >>> file.read_text().splitlines()
    ['name,x', "'=1+1,-1.5", 'a\\\\x1b[2J,']
    """
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        csv.writer(file, lineterminator="\n").writerows([safe(cell) for cell in row] for row in rows)
    return path


def safe(cell: object) -> object:
    """A cell that no program takes for a formula or a command.

    >>> safe("=1+1"), safe("-c"), safe("-1.5"), safe(-1.5), safe("a-b")
    ("'=1+1", "'-c", '-1.5', -1.5, 'a-b')
    """
    if not isinstance(cell, str):
        return cell
    cell = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", cell)
    return f"'{cell}" if _FORMULA.match(cell) and not _is_number(cell) else cell


def read_rows(path: str | os.PathLike[str], strict: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The lines of a table with their numbers, from 1 on, without empty ones; a cell that :func:`write_rows` changed is as it was.

    Args:
        path: CSV in UTF-8.
        strict: refuse what the csv module would guess, such as text behind a closing quote.

    Raises:
        OSError: as for :func:`~torchprobe.common.reading.open_regular`.
        ValueError: it is not such a table, or larger than the limits ``table_bytes``, ``table_rows``, ``table_cell``; the message names the
            file and the line.
    """
    name = os.fspath(path)
    with open_regular(path) as file:
        limits.check("table_bytes", os.fstat(file.fileno()).st_size, name)
        most, widest = limits.value("table_rows"), limits.value("table_cell")
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=strict)
        try:
            for count, row in enumerate(reader, 1):
                if count > most:
                    limits.check("table_rows", count, name)
                if not row:
                    continue
                if (longest := max(map(len, row))) > widest:
                    limits.check("table_cell", longest, f"{name}, line {reader.line_num}: a cell")
                yield reader.line_num, [cell[1:] if cell[:1] == "'" and _QUOTED.match(cell) else cell for cell in row]
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not CSV in UTF-8: {error.reason} after line {reader.line_num}") from None
        except csv.Error as error:
            raise ValueError(f"{name} is not CSV in UTF-8: {error} in line {reader.line_num}") from error


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return not cell[:1].isspace()
