"""Pages of the documentation are easy to read: their sentences are short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 20.0  # on average
LONGEST = 56  # of one sentence


def prose(markdown: str) -> list[str]:
    """The paragraphs and list items of a page: no code, tables, headings, comments or front matter; links as their text."""
    text = re.sub(r"\A---\n.*?\n---\n", "", markdown, flags=re.DOTALL)
    text = re.sub(r"^ *(```|~~~).*?^ *\1 *$", "\n", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->|<[^>]+>", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "Code", text)  # one word, which may begin a sentence
    lines = []
    for line in text.splitlines():
        if re.match(r" *(\||#|:::|!!!|\?\?\?|===)", line):
            lines.append("")
        elif re.match(r" *(\d+\.|[-*>]) ", line):
            lines += ["", re.sub(r"^ *(\d+\.|[-*>]) ", "", line)]
        else:
            lines.append(line)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", "\n".join(lines)))
    return [part for part in paragraphs if part]


def sentences(markdown: str) -> list[str]:
    """The sentences of a page. An abbreviation does not end one; a paragraph does."""
    found = []
    for paragraph in prose(markdown):
        text = re.sub(r"\b(et al|e\.g|i\.e|vs|cf|Fig|approx)\.", r"\1", paragraph)
        found += [part for part in re.split(r"(?<=[.!?])[\"”*_)]*\s+(?=[\"“*_(]*[A-Z0-9`])|(?<=[.!?])[\"”*_)]*$", text) if part.strip()]
    return found


def words(sentence: str) -> int:
    return len(re.findall(r"[^\W_][\w'’.,/–-]*", sentence))


def average(markdown: str) -> float:
    found = sentences(markdown)
    return sum(map(words, found)) / max(len(found), 1)


def test_how_sentences_are_counted() -> None:
    page = "# A heading\n\nOne two three. Four `five six`, as in Sun et al. 2024!\n\n* An item\n\n| a | table |\n\n```\ncode. code.\n```\n"
    assert [words(sentence) for sentence in sentences(page)] == [3, 8, 2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_sentences_are_short(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    longest = sorted(sentences(text), key=words, reverse=True)[:3]
    assert average(text) <= MOST_WORDS, f"{average(text):.1f} words a sentence; the longest: {longest}"
    assert not longest or words(longest[0]) <= LONGEST, f"{words(longest[0])} words: {longest[0]}"
