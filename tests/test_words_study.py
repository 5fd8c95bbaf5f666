"""Words from a folder to a folder: the page, the files, and the command line. The labelers are small, with planted or random weights."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from words_sets import WORDS, PlantedClip, PlantedUnits, preprocess, write_images

from torchprobe import cli
from torchprobe.datasets import DatasetError, image_folder
from torchprobe.dissection.words import CAVEAT, Concepts, SoftLabels, WordDissection, dissect_words
from torchprobe.dissection.words.report import WordsReport
from torchprobe.encoders.errors import library_errors
from torchprobe.studies.words import LABELS, earlier_words, print_words, words_folder, write_word_pages

for package in ("PIL", "timm", "matplotlib", "jinja2", "open_clip"):
    pytest.importorskip(package, reason=f"{package} is not installed")

PLANTED = [3, 0, 5, 7]
HOSTILE = "<img src=x onerror=alert(1)>"
KINDS = ["animal", "animal", "color", "texture", "nature", "plant", "adjective", "vehicle"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "set", 150)


def dissected(folder, names=WORDS, **options):
    labels = PlantedClip()(torch.stack([preprocess(open_image(path)) for path in sorted(folder.iterdir())]))
    soft = SoftLabels.from_embeddings(labels.detach(), PlantedClip().directions.detach(), Concepts(names, KINDS), labeler="planted")
    options = {"measure": "cosine_cubed", "permutations": 39, "preprocess": preprocess} | options
    return dissect_words(PlantedUnits(PLANTED), "maps", folder, soft, **options)["maps"]


def open_image(path):
    from PIL import Image

    return Image.open(path)


# -- the page ------------------------------------------------------------------------------------------------------------


def test_what_the_page_says(folder, tmp_path):
    found = dissected(folder)
    report = WordsReport(found)
    assert [(bar.name, list(bar.concepts)) for bar in report.bars()] == [
        ("animal", [("cat", 1)]), ("texture", [("striped", 1)]), ("plant", [("tree", 1)]), ("vehicle", [("car", 1)]),
    ]  # fmt: skip
    facts = {fact.label: fact.value for fact in report.facts()}
    assert facts == {"Units": "10", "Matched with a word": "4", "Words matched": "4", "Images": "150"}
    units = report.units()
    assert [row.values["detector"] for row in units] == [True] * 4 + [False] * 6
    assert {row.values["unit"]: row.values["label"] for row in units[:4]} == {unit: WORDS[word] for unit, word in enumerate(PLANTED)}
    assert {row["concept"]: row["which"] for row in report.concepts()} == {"striped": "0", "cat": "1", "tree": "2", "car": "3"}
    text = found.report(tmp_path / "a.html", image_folder(folder)).read_text()
    assert "Labeler: planted." in text and CAVEAT[:60] in text and "maxT" in text and "matched only" in text
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert data["annotated"] is False and len(data["units"]) == 10 and all(len(shown) == 5 for shown in data["units"])
    first = units[0].values["unit"]
    names = [data["thumbnails"][entry[0]][0] for entry in data["units"][0]]
    assert names == [found.images[i] for i in found.top[0][first, :5].tolist()]
    assert [entry[1] for entry in data["units"][0]] == pytest.approx(found.top[1][first, :5].tolist())
    without = found.report(tmp_path / "b.html").read_text()
    assert "made without pictures" in without and '"thumbnails": []' in without


def test_some_pictures_only(folder, tmp_path):
    found = dissected(folder, top=3)
    text = found.report(tmp_path / "a.html", image_folder(folder), units=[2], top_images=9).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert sorted(map(len, data["units"])) == [0] * 9 + [3] and len(data["thumbnails"]) == 3
    with pytest.raises(ValueError, match="has the units 0 to 9, got 10"):
        found.report(tmp_path / "a.html", image_folder(folder), units=[10])
    other = write_images(tmp_path / "other", 3)
    with pytest.raises(DatasetError, match="of the top images are not among the images given"):
        found.report(tmp_path / "a.html", image_folder(other))
    same = shutil.copytree(folder, tmp_path / "same")
    assert found.report(tmp_path / "a.html", image_folder(same)).exists()
    (same / "0000.png").write_bytes((same / "0001.png").read_bytes() + b" ")
    with pytest.raises(DatasetError, match="these are not the images of the dissection, which are .* images of .*: some have other"):
        found.report(tmp_path / "a.html", image_folder(same))


def test_names_are_never_markup(folder, tmp_path):
    names = [HOSTILE if word == "cat" else word for word in WORDS]
    found = dissected(folder, names)
    found.layer = found.metadata["model"] = found.metadata["labeler"] = found.metadata["unreadable"] = HOSTILE
    found.metadata["unreadable"] = [[HOSTILE, HOSTILE]]
    found.metadata["concepts"]["remarks"] = [HOSTILE]
    found.concepts = Concepts(names, [HOSTILE] * 8)
    text = found.report(tmp_path / "a.html", image_folder(folder)).read_text()
    assert HOSTILE not in text and "&lt;img src=x" in text
    printed = io.StringIO()
    found.layer = found.metadata["labeler"] = "\x1b[31m[red]"
    print_words({"maps": found}, Console(file=printed, width=160))
    assert "\x1b" not in printed.getvalue() and "[red]" in printed.getvalue()


# -- the folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_for_a_folder(folder, tmp_path):
    out = tmp_path / "out"
    options = {"templates": ["{}"], "preprocess": preprocess, "permutations": 9, "measure": "cosine_cubed"}
    found = words_folder(PlantedUnits(PLANTED), folder, ["maps", "pool"], out, PlantedClip(), WORDS, **options)
    assert {path.name for path in out.glob("[!.]*")} == {
        "maps.safetensors", "maps.csv", "pool.safetensors", "pool.csv", "summary.json", LABELS,
    }  # fmt: skip
    for layer, result in found.items():
        back = WordDissection.load(out / f"{layer}.safetensors")
        assert torch.equal(back.score, result.score) and back.metadata == result.metadata
    summary = json.loads((out / "summary.json").read_text())
    assert [layer["file"] for layer in summary["layers"]] == ["maps", "pool"] and "may be wrong" in summary["layers"][0]["metadata"][
        "caveat"
    ]
    with pytest.raises(ValueError, match="is finished: there is nothing to resume"):
        words_folder(PlantedUnits(PLANTED), folder, "maps", out, PlantedClip(), WORDS, resume=True, **options)
    again = words_folder(PlantedUnits(PLANTED), folder, "maps", tmp_path / "again", SoftLabels.load(out / LABELS), **options)
    assert torch.equal(again["maps"].score, found["maps"].score) and not (tmp_path / "again" / LABELS).exists()
    printed = io.StringIO()
    print_words(found, Console(file=printed, width=160))
    assert "No null was given" in printed.getvalue()
    nulls = earlier_words([tmp_path / "again"])
    assert list(nulls) == ["again"] and torch.equal(nulls["again"]["maps"].score, found["maps"].score)
    files = write_word_pages(out, found, image_folder(folder), nulls)
    assert "again" in files["maps"].read_text() and "again" not in files["pool"].read_text()
    printed = io.StringIO()
    print_words(found, Console(file=printed, width=160), nulls)
    assert "  again" in printed.getvalue() and "No null" not in printed.getvalue()
    with pytest.raises(ValueError, match="does not hold a finished dissection"):
        earlier_words([folder])
    assert "may be wrong" in printed.getvalue().replace("\n", " ") and "planted CLIP" in printed.getvalue()


# -- the command ---------------------------------------------------------------------------------------------------------

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a CLIP model, as open_clip saves it."""
    import open_clip
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY}))
    (folder / "tiny-labeler.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-labeler", pretrained=None)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process; gives exit code, standard output and standard error."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


@pytest.mark.slow("loads open_clip models several times")
def test_the_command(run, folder, clip, tmp_path):
    concepts = tmp_path / "concepts.txt"
    concepts.write_text("[animal]\ncat\ndog\nCat\n[color]\nred\ngreen\n")
    common = ["words", "timm:test_resnet", "--random-init", "--images", folder, "--permutations", 3, "--limit", 40, "--device", "cpu"]
    code, out, err = run(
        *common, "--layers", "visual.layer4", "--labeler", f"open_clip:local-dir:{clip}", "--concepts", concepts, "--out", tmp_path / "a"
    )
    assert code == 0, err
    assert "1 duplicate left out: Cat" in err and "may be wrong" in " ".join(out.split()) and (tmp_path / "a/visual.layer4.html").exists()
    result = WordDissection.load(tmp_path / "a/visual.layer4.safetensors")
    assert result.concepts.names == ("cat", "dog", "red", "green") and len(result.images) == 40
    assert result.metadata["concepts"]["remarks"] == ["1 duplicate left out: Cat"]
    # The same labels, another measure, latents in place of units.
    encoder = {"W_enc": torch.randn(96, 20), "b_enc": torch.zeros(20), "b_dec": torch.zeros(96)}
    from safetensors.torch import save_file

    save_file(encoder, tmp_path / "sae.safetensors")
    code, out, err = run(
        *common, "--layers", "visual.layer4", "--labels", tmp_path / "a" / LABELS, "--measure", "cosine_cubed", "--basis",
        tmp_path / "sae.safetensors", "--out", tmp_path / "b", "--pictures", 0, "--json",
    )  # fmt: skip
    assert code == 0, err
    layer = json.loads(out)["layers"][0]
    assert layer["units"] == 20 and layer["density"]["dead"] >= 0 and layer["metadata"]["basis"]["name"] == "sae.safetensors"
    assert layer["metadata"]["measure"]["name"] == "cosine_cubed"
    np.save(tmp_path / "labels.npy", np.random.default_rng(0).random((40, 2)))
    code, _, err = run(*common, "--layers", "visual.layer4", "--labels", tmp_path / "labels.npy", "--out", tmp_path / "c")
    assert code == 1 and "holds float64 (40, 2); expected numbers (images, 1035 concepts)" in err
    assert "--concepts" in err


def test_a_labeler_without_weights_names_its_own_option(run, folder, tmp_path, monkeypatch):
    def unreachable(name, checkpoint=None, **options):
        with library_errors(name, fetching=True):
            raise OSError("no network")

    monkeypatch.setattr("torchprobe.encoders.load_encoder", unreachable)
    code, _, err = run(
        "words", "timm:test_resnet", "--layers", "visual", "--images", folder, "--labeler", "open_clip:RN50/openai", "--out", tmp_path / "o"
    )
    assert code == 1 and "pass it with --labeler-checkpoint FILE" in err and "--checkpoint" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --labeler, a CLIP encoder, or --labels"),
        (["--labeler", "open_clip:ViT-B-32/openai", "--labels", "x.npy"], "give either --labeler"),
        (["--labels", "x.npy", "--random-init", "--checkpoint", "w.pt"], "exclude each other"),
        (["--labels", "x.npy", "--rotate", "--basis", "w.pt"], "exclude each other"),
    ],
)
def test_wrong_usage(run, folder, arguments, message):
    code, _, err = run("words", "timm:test_resnet", "--layers", "visual", "--images", folder, *arguments)
    assert code == 2 and message in err


def test_files_that_are_missing(run, folder, tmp_path):
    base = ["words", "timm:test_resnet", "--layers", "visual", "--out", tmp_path / "o"]
    for arguments, message in (
        (["--images", folder, "--labels", tmp_path / "x.npy"], "cannot be read as a NumPy file"),
        (["--images", tmp_path / "none", "--labels", tmp_path / "x.npy"], "does not exist"),
        (["--images", folder, "--labels", "x.npy", "--concepts", tmp_path / "none.txt"], "the concepts cannot be read"),
        (["--images", folder, "--labels", "x.npy", "--kind", "colour"], "no concepts of the kind 'colour'"),
    ):
        code, _, err = run(*base, *arguments)
        assert code == 1 and message in err
    assert not (tmp_path / "o").exists()
