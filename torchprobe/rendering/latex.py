r"""Rows as a LaTeX table (booktabs), with numbers as on the page. Any text compiles with pdfLaTeX, XeLaTeX and LuaLaTeX."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from torchprobe.common.files import replacing
from torchprobe.rendering.tables import Column, Row, printable, shown, shown_columns

_SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': "''", "`": "{`}",
    "[": "{[}", "]": "{]}", "*": "{*}",  # after a line end, LaTeX would read these as options of it
    "−": "$-$", "–": "--", "—": "---", "…": r"\ldots{}", "→": r"$\rightarrow$", "±": r"$\pm$", "×": r"$\times$", "·": r"$\cdot$",
    "≥": r"$\geq$", "≤": r"$\leq$", "≈": r"$\approx$", "∞": r"$\infty$", "√": r"$\surd$", "²": "$^2$", "³": "$^3$", "°": r"$^\circ$",
    "“": "``", "”": "''", "„": ",,", "‘": "`", "’": "'", "ß": r"\ss{}", "ø": r"\o{}", "Ø": r"\O{}", "æ": r"\ae{}", "Æ": r"\AE{}",
    "œ": r"\oe{}", "Œ": r"\OE{}", "å": r"\aa{}", "Å": r"\AA{}", "ł": r"\l{}", "Ł": r"\L{}", "ı": r"\i{}", "\u00a0": "~",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "δ": r"$\delta$", "ε": r"$\varepsilon$", "θ": r"$\theta$", "κ": r"$\kappa$",
    "λ": r"$\lambda$", "μ": r"$\mu$", "µ": r"$\mu$", "π": r"$\pi$", "ρ": r"$\rho$", "σ": r"$\sigma$", "τ": r"$\tau$", "φ": r"$\varphi$",
    "χ": r"$\chi$", "ω": r"$\omega$", "Δ": r"$\Delta$", "Σ": r"$\Sigma$", "Ω": r"$\Omega$",
}  # fmt: skip
_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u", "\u0307": ".", "\u0308": '"',
    "\u030b": "H", "\u030c": "v", "\u0327": "c", "\u0323": "d",
}  # fmt: skip
_NUMBER = re.compile(r"([-−]?)([\d,.]+)(?:e([-+]\d+))?( %)?")


def escape(text: object) -> str:
    r"""``text`` for LaTeX. Characters that plain LaTeX has no sign for become their code point, such as ``{[}U+732B{]}``.

    >>> print(escape("50 % of R&D_1 ≥ é"))
    50 \% of R\&D\_1 $\geq$ \'{e}
    """
    text = printable(text)
    broken = ("{}" if one == before and one in "-,'" else "" for before, one in zip(f" {text}", text, strict=False))
    return "".join(f"{gap}{_character(one)}" for gap, one in zip(broken, text, strict=True))  # two of - , ' would become one sign


def _character(character: str) -> str:
    if character in _SPECIAL:
        return _SPECIAL[character]
    if character.isascii():
        return character
    base, *marks = list(unicodedata.normalize("NFD", character))
    if len(marks) == 1 and marks[0] in _ACCENTS and base.isascii() and base.isalpha():
        base = {"i": r"\i", "j": r"\j"}.get(base, base)
        return f"\\{_ACCENTS[marks[0]]}{{{base}}}"
    return f"{{[}}U+{ord(character):04X}{{]}}"


def latex_table(rows: Sequence[Row], columns: Sequence[Column], about: str = "") -> str:
    r"""A ``tabular`` for ``\input``; the preamble needs ``\usepackage{booktabs}``.

    Args:
        rows, columns: as for a table on a page; optional columns that are empty are left out.
        about: a comment at the top.

    >>> print(latex_table([{"set": "imagenet_r", "share": 0.5}], [Column("set", "images", "", "text"), Column("share", "%", "", "share")]))
    % \usepackage{booktabs}
    \begin{tabular}{lr}
    \toprule
    images & \% \\
    \midrule
    imagenet\_r & 50.0\,\% \\
    \bottomrule
    \end{tabular}
    <BLANKLINE>
    """
    columns = shown_columns(rows, columns)
    comments = [about, r"\usepackage{booktabs}", *(f"{column.title}: {column.help}" for column in columns if column.help)]
    head = [f"% {printable(comment)}" for comment in comments if comment]
    body = [_line([_cell(row, column) for column in columns]) for row in rows]
    places = "".join("r" if column.numeric else "l" for column in columns)
    names = _line([escape(column.title) for column in columns])
    lines = [*head, rf"\begin{{tabular}}{{{places}}}", r"\toprule", names, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def write_latex(rows: Sequence[Row], columns: Sequence[Column], path: str | os.PathLike[str], about: str = "") -> Path:
    """Writes :func:`latex_table` to ``path`` as UTF-8 and returns the path. A file of that name is replaced as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(latex_table(rows, columns, about), encoding="utf-8", errors="backslashreplace", newline="\n")
    return Path(path)


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _cell(row: Row, column: Column) -> str:
    text = shown(row, column)
    number = _NUMBER.fullmatch(text) if column.numeric else None
    if number is None:
        return escape(text)
    sign, digits, exponent, percent = number.groups()
    power = rf"$\times 10^{{{int(exponent)}}}$" if exponent else ""
    return ("$-$" if sign else "") + digits + power + (r"\,\%" if percent else "")
