"""Docstrings for the site: examples are blocks of code, and names of other objects are links where the reference has them."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([^`]+)`")
EXAMPLE = re.compile(r"^( *)>>> .*?(?=\n\s*\n|\Z)", re.DOTALL | re.MULTILINE)
TOGETHER = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes the text of every docstring before it is parsed."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(_block, ROLE.sub(_link, TOGETHER.sub(_apart, obj.docstring.value)))


def _apart(match: re.Match[str]) -> str:
    """Arguments that are described together, each on a line of its own, as the parser wants them."""
    return "\n".join(f"{match[1]}{name}: {match[3]}" for name in match[2].split(", "))


def _link(match: re.Match[str]) -> str:
    name = match[2].rpartition(".")[2] if match[1] else match[2]
    return f'<autoref identifier="{match[2].rstrip("()")}" optional><code>{name}</code></autoref>'


def _block(match: re.Match[str]) -> str:
    return f"{match[1]}```pycon\n{match[0]}\n{match[1]}```"
