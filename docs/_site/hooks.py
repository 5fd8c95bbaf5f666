"""What mkdocs does with the pages: the README is the first one, files of the repository get a place, no page is left out.

Two marks are replaced, each on a line of its own: ``[reference PACKAGE]`` by every name that the package lists in ``__all__``, and
``[commands]`` by the help page of every command.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PLACE = "repository"  # where files from outside of docs/ are in the site
LINK = re.compile(r"(\]\()([^)#\s]+)(#[^)\s]*)?(\))")
REFERENCE = re.compile(r"^\[reference ([\w.]+)\]$", re.MULTILINE)
COMMANDS = re.compile(r"^\[commands\]$", re.MULTILINE)
FENCE = re.compile(r"^( *)(```|~~~).*?^\1\2 *$", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The navigation has every page: those that it does not name are in its last section. What it names and is not there is left out."""
    docs = Path(config.docs_dir)
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    config.nav = _present(config.nav, {*pages, "index.md"})
    missing = sorted(pages - {*_named(config.nav), "index.md"})
    if missing:
        config.nav.append({"More": missing})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The README is the first page. Files of the repository that a page links to are in the site, so that every link resolves."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    waiting = [(file.src_uri, file.content_string) for file in files if file.src_uri.endswith(".md")]
    while waiting:
        source, text = waiting.pop()
        for target in _outside(source, text):
            place = f"{PLACE}/{target}"
            if files.get_file_from_path(place) is None:
                path = ROOT / target
                content = path.read_text(encoding="utf-8") if path.suffix == ".md" else None
                made = File.generated(config, place, content=content) if content else File.generated(config, place, abs_src_path=str(path))
                files.append(made)
                if content:
                    waiting.append((place, content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of the repository become links of the site."""

    def replace(match: re.Match[str]) -> str:
        target = _target(page.file.src_uri, match[2])
        if target is None:
            return match[0]
        inside = PurePosixPath(target).relative_to("docs").as_posix() if target.startswith("docs/") else f"{PLACE}/{target}"
        inside = "index.md" if target == "README.md" else inside
        return f"{match[1]}{os.path.relpath(inside, PurePosixPath(page.file.src_uri).parent)}{match[3] or ''}{match[4]}"

    markdown = REFERENCE.sub(lambda match: _reference(match[1]), markdown)
    if COMMANDS.search(markdown):
        markdown = COMMANDS.sub(lambda match: _commands(), markdown)
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(replace, markdown[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, LINK.sub(replace, markdown[end:])])


def _reference(package: str) -> str:
    """A block of mkdocstrings for each name in ``__all__``, read without importing the package.

    A name may be that of a function and of the module that holds it; then the function is named where it is defined.
    """
    folder = ROOT / package.replace(".", "/")
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    named = (node for node in tree.body if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == ["__all__"])
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    places = {alias.asname or alias.name: f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    names = ast.literal_eval(next(named).value)
    modules = {name for name in names if (folder / f"{name}.py").is_file() or (folder / name).is_dir()}
    return "\n\n".join(f"::: {places[name] if name in modules else f'{package}.{name}'}" for name in names)


def _commands() -> str:
    """The help pages of all commands, as a terminal of 90 columns shows them."""
    import click

    from torchprobe.cli import cli

    def pages(command: click.Command, name: str) -> list[str]:
        context = click.Context(command, info_name=name, max_content_width=90, terminal_width=90)
        title = f"## {name}\n\n" if " " in name else "## torchprobe\n\n"
        found = [f"{title}```text\n{command.get_help(context)}\n```"]
        if isinstance(command, click.Group):
            for one in sorted(command.commands):
                found += pages(command.commands[one], f"{name} {one}")
        return found

    return "\n\n".join(pages(cli, "torchprobe"))


def _present(nav: list[Any], pages: set[str]) -> list[Any]:
    """The navigation without pages that do not exist."""
    kept: list[Any] = []
    for entry in nav:
        if isinstance(entry, dict):
            ((title, inside),) = entry.items()
            inside = _present(inside, pages) if isinstance(inside, list) else inside if inside in pages else None
            kept += [{title: inside}] if inside else []
        elif entry in pages:
            kept.append(entry)
    return kept


def _named(nav: Any) -> set[str]:
    if isinstance(nav, str):
        return {nav}
    parts = nav.values() if isinstance(nav, dict) else nav or []
    return set().union(*map(_named, parts))


def _target(source: str, link: str) -> str | None:
    """The path in the repository that a link of a page leads to; None for addresses and for what is not there."""
    if re.match(r"[a-z]+:", link):
        return None
    if source == "index.md":
        folder = PurePosixPath()
    elif source.startswith(f"{PLACE}/"):
        folder = PurePosixPath(source).relative_to(PLACE).parent
    else:
        folder = PurePosixPath("docs", source).parent
    path = os.path.normpath(folder / link)
    return path if not path.startswith("..") and (ROOT / path).is_file() else None


def _outside(source: str, text: str) -> set[str]:
    """The files outside of docs/ that a page links to."""
    found = {_target(source, match[2]) for match in LINK.finditer(FENCE.sub("", text))}
    return {path for path in found if path is not None and not path.startswith("docs/") and path != "README.md"}
