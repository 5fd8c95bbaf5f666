"""The origin of outlier features as a part of an interpretation: run, files, page, resume, several ranks, and networks without a stream."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import interpret_sets as sets
import numpy as np
import pytest
import torch
from processes import group
from torch import nn

from torchprobe.common.runs import Progress, RunWarning
from torchprobe.datasets import Images, image_folder, labeled_folder
from torchprobe.encoders import Encoder, Head
from torchprobe.studies.interpret import Interpretation, interpret

pytestmark = pytest.mark.usefixtures("undrawn")

FEATURE, BIAS = 11, "visual.blocks.1.mlp.1.bias"


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(d), nn.Sequential(nn.GELU(), nn.Linear(d, d))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Residual(nn.Module):
    """A residual network over patches whose outlier feature is written by one bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.patches = nn.Conv2d(3, 48, 4, stride=4)
        self.blocks = nn.Sequential(*[Block(48) for _ in range(3)])
        self.norm = nn.LayerNorm(48)
        self.runs = 0
        with torch.no_grad():
            self.blocks[1].mlp[1].bias[FEATURE] = 60  # type: ignore[index, union-attr]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        return self.norm(self.blocks(self.patches(images).flatten(2).transpose(1, 2)).mean(1))


def encoder() -> Encoder:
    return Encoder(Residual(), features=48, preprocess=sets.pixels, name="residual").eval()


def head() -> Head:
    return Head(torch.randn(3, 48, generator=torch.Generator().manual_seed(1)), names=sets.CLASSES)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Images:
    return labeled_folder(sets.write_classes(tmp_path_factory.mktemp("images"), each=8), names=sets.CLASSES)


@pytest.fixture
def found(images: Images, tmp_path: Path) -> Interpretation:
    return interpret(encoder(), images, tmp_path / "out", head=head(), batch_size=8, layer_images=8, provenance_images=12)


def test_the_planted_bias_is_named_with_what_its_change_does(found: Interpretation, images: Images) -> None:
    origin = found.results.provenance
    assert origin is not None and origin.found is not None and origin.features == 1
    assert found.results.outliers.indices == origin.found.features == [FEATURE] and origin.found.images == 12
    assert (origin.found.parts[0].block, origin.found.parts[0].kind) == ("visual.blocks.1", "mlp")
    first = origin.found.parameters[0]
    assert (first.parameter, first.index, first.value) == (BIAS, FEATURE, 60)
    assert origin.found.error < 1e-12
    network, sample = encoder(), [dict(zip(found.ids, images.paths, strict=True))[name] for name in found.ids]
    assert {row.how for row in origin.found.changes} == {"median", "zero"}
    for row in origin.found.changes:
        assert row.outlier_share_before == 1 and row.outlier_share == 0
        assert 0 <= row.accuracy <= 1 and 0 <= row.agreement <= 1 and row.accuracy_before == pytest.approx(_accuracy(network, found, 12))
    assert len(sample) == 24


def _accuracy(network: Encoder, found: Interpretation, count: int) -> float:
    """Of the head on the first images of the representations, which are the sample."""
    from torchprobe.analysis import Embeddings, evaluate

    saved = Embeddings.load(found.folder / "embeddings" / "imagenet.safetensors")
    return evaluate(head(), saved.select([i < count for i in range(len(saved))])).accuracy


def content(saved: dict[str, Any]) -> dict[str, Any]:
    """The results in a file, without its checksums."""
    return {key: value for key, value in saved.items() if key not in ("checksum", "tables")}


def test_files_and_page(found: Interpretation) -> None:
    page = (found.folder / "index.html").read_text()
    assert "Where the outlier features come from" in page and f"It hangs most on {BIAS}[{FEATURE}]" in page
    assert "does not say why training led there" in page
    parameters = (found.folder / "provenance-parameters.csv").read_text().splitlines()
    assert parameters[0].startswith("feature,parameter,index") and parameters[1].startswith(f"{FEATURE},{BIAS},{FEATURE}")
    for name in ("parts", "changes"):
        assert (found.folder / f"provenance-{name}.csv").is_file() and (found.folder / f"provenance-{name}.tex").is_file()
    saved = json.loads((found.folder / "results.json").read_text())
    assert content(saved) == found.results and saved["provenance"]["found"]["features"] == [FEATURE]


def test_resumed_without_a_run_and_computed_anew_for_other_features(found: Interpretation, images: Images) -> None:
    given = {"head": head(), "batch_size": 8, "layer_images": 8, "provenance_images": 12, "resume": True}
    again = encoder()
    assert interpret(again, images, found.folder, **given).results == found.results  # type: ignore[arg-type]
    assert again.network.runs == 0
    with pytest.warns(RunWarning, match="another chosen_features"):
        other = interpret(encoder(), images, found.folder, **given, features=[3, 5]).results  # type: ignore[arg-type]
    assert other.provenance is not None and other.provenance.found is not None and other.provenance.found.features == [3, 5]
    with pytest.warns(RunWarning, match="another chosen_features"):
        fewer = interpret(encoder(), images, found.folder, **given | {"provenance_images": 5}).results  # type: ignore[arg-type]
    assert fewer.provenance is not None and fewer.provenance.found is not None and fewer.provenance.found.images == 5
    none = interpret(encoder(), images, found.folder, **given | {"provenance_images": 0}).results  # type: ignore[arg-type]
    assert none.provenance is None and none.skipped["provenance"].startswith("no images were asked for")
    assert not (found.folder / "provenance-parts.csv").exists()


def test_interrupted_and_resumed(found: Interpretation, images: Images, tmp_path: Path) -> None:
    given = {"head": head(), "batch_size": 8, "layer_images": 8, "provenance_images": 12}
    stages: list[str] = []

    def stop() -> bool:
        return "provenance" in stages

    with pytest.raises(KeyboardInterrupt):
        interpret(encoder(), images, tmp_path / "o", **given, progress=lambda p: stages.append(p.stage), stop=stop)  # type: ignore[arg-type]
    assert interpret(encoder(), images, tmp_path / "o", **given, resume=True).results == found.results  # type: ignore[arg-type]


def test_progress_over_all_passes(images: Images, tmp_path: Path) -> None:
    told: list[Progress] = []
    interpret(encoder(), images, tmp_path, layer_images=0, provenance_images=12, batch_size=8, progress=told.append)
    own = [(one.done, one.total) for one in told if one.stage == "provenance"]
    assert own[-1] == (48, 48) and [done for done, _ in own] == sorted(done for done, _ in own)  # sum, before, median, zero


def test_no_head_decides_unless_it_was_given(images: Images, tmp_path: Path) -> None:
    model = encoder()
    model.head = head()
    origin = interpret(model, images, tmp_path, layer_images=0, provenance_images=6).results.provenance
    assert origin is not None and origin.found is not None and np.isnan(origin.found.changes[0].agreement)
    assert model.head is not None


def test_the_features_that_stand_out_most_are_followed(images: Images, tmp_path: Path) -> None:
    origin = interpret(encoder(), images, tmp_path, layer_images=0, provenance_images=6, features=list(range(9))).results.provenance
    assert origin is not None and origin.found is not None and origin.found.features == list(range(6)) and origin.features == 9
    assert "Of 9 features, the 6 that stand out most were followed." in (tmp_path / "index.html").read_text()


class Doubtful(Residual):
    """Runs in float32 alone."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images.float())


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (sets.encoder, {}, "no list of blocks"),
        (lambda: Encoder(Doubtful(), features=48, preprocess=sets.pixels).eval(), {}, "in double precision does not run (RuntimeError"),
        (encoder, {"layer": "visual.blocks.2", "position": "mean"}, "the representation is one of its layers"),
    ],
)
def test_a_network_that_cannot_be_followed_is_one_sentence(model, options, why, images: Images, tmp_path: Path) -> None:
    found = interpret(model(), image_folder(images.root), tmp_path, layer_images=0, **options)  # type: ignore[arg-type]
    assert found.results.outliers.indices and found.results.provenance is None
    assert why in found.results.skipped["provenance"]
    page = (tmp_path / "index.html").read_text()
    assert len(re.findall(r'<td class="section[^"]*">provenance</td>', page)) == 1 and "Where the outlier features come from" not in page


def test_an_error_of_ours_is_seen_and_ends_nothing(images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("a mistake of ours")

    given = {"head": head(), "batch_size": 8, "layer_images": 0, "provenance_images": 6}
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["torchprobe.analysis.provenance.run"], "entries", broken)  # the function hides its package
        with pytest.warns(UserWarning, match="(?s)Traceback.*in broken.*TypeError: a mistake of ours"):
            found = interpret(encoder(), images, tmp_path / "told", **given)  # type: ignore[arg-type]
        assert found.results.accuracy  # and where warnings are errors:
        found = interpret(encoder(), images, tmp_path, **given)  # type: ignore[arg-type]
    assert found.results.accuracy and found.results.provenance is None
    why = found.results.skipped["provenance"]
    assert why.startswith("the search for the origin of the outlier features failed (TypeError: a mistake of ours)")
    assert "the search for the origin of the outlier features failed" in (tmp_path / "index.html").read_text()
    again = interpret(encoder(), images, tmp_path, **given, resume=True)  # type: ignore[arg-type]
    assert again.results.provenance is not None, "a resumed run tries again"


def test_ranks_find_what_one_process_finds(found: Interpretation, images: Images, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import interpret_sets as sets
import test_interpret_provenance as here
from torchprobe.common.ranks import torchrun
from torchprobe.datasets import labeled_folder
from torchprobe.analysis import provenance
from torchprobe.studies.interpret import interpret

with torchrun() as (rank, _):
    images = labeled_folder({str(images.root)!r}, names=sets.CLASSES)
    given = dict(head=here.head(), batch_size=8, layer_images=8, provenance_images=12)
    interpret(here.encoder(), images, {str(tmp_path / "two")!r}, **given)
    if rank == 1:  # alone, while the other rank is elsewhere
        assert provenance(here.encoder(), images).features == [here.FEATURE]
"""
    for done in group(2, code):
        assert done.returncode == 0, done.stderr[-3000:]
    assert content(json.loads((tmp_path / "two" / "results.json").read_text())) == found.results
