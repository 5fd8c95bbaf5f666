"""Every link of the README and the docs leads somewhere: to a file, and to a heading of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
LARGEST = 300_000  # bytes of a picture or a notebook


def prose(page: Path) -> str:
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?m)^(?!#)(.*)$", lambda line: re.sub(r"`[^`]*`", "", line[0]), text)  # headings keep their code, for their names


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The names of the headings, as GitHub and the site make them; for a repeated one the first."""
    heads = re.findall(r"^#+ (.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", head).lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [page for page in PAGES if links(page)], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pictures_and_notebooks_are_small() -> None:
    files = [*(ROOT / "docs" / "images").iterdir(), *(ROOT / "examples" / "notebooks").glob("*.ipynb")]
    assert len(files) >= 8
    assert [file.name for file in files if file.stat().st_size > LARGEST] == []
