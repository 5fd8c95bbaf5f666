"""The suite: the built-in one against the published table and the installed libraries; files of one's own, and what is wrong with them."""

import csv
import os
from pathlib import Path

import pytest
import torch

from torchprobe.encoders import EncoderError, Head, load_encoder
from torchprobe.encoders.suite import ROLES, TEST_SETS, SuiteRow, load_suite

GOLDEN = os.environ.get("TORCHPROBE_GOLDEN")
PUBLISHED = [row for row in load_suite() if row.role == "zero-shot"]
TWINS = [row for row in load_suite() if row.role != "zero-shot"]

ENTRY = """
[[encoder]]
name = "a"
role = "supervised"
backbone = "RN18"
pretraining = "ImageNet-1k"
source = "torchvision:resnet18"
"""


def suite(tmp_path, text):
    (tmp_path / "suite.toml").write_text(text, encoding="utf-8")
    return load_suite(tmp_path / "suite.toml")


def problem(tmp_path, text):
    with pytest.raises(EncoderError) as caught:
        suite(tmp_path, text)
    return str(caught.value)


# -- the built-in suite ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN, reason="TORCHPROBE_GOLDEN does not name the folder of published accuracies")
def test_the_zero_shot_rows_are_the_published_table():
    with open(Path(GOLDEN, "openclip_zero_shot_accuracies.csv"), newline="", encoding="utf-8") as file:
        table = {f"open_clip:{row.pop('architecture')}/{row.pop('pretrained')}": row for row in csv.DictReader(file)}
    assert [row.source for row in PUBLISHED] == list(table)
    for row in PUBLISHED:
        assert dict(row.accuracy) == {key: float(value) for key, value in table[row.source].items()}, row.name


@pytest.mark.skipif(not GOLDEN, reason="TORCHPROBE_GOLDEN does not name the folder of published accuracies")
def test_the_accuracies_of_twins_are_the_testbeds():
    with open(Path(GOLDEN, "imagenet_testbed_standard_models.csv"), newline="", encoding="utf-8") as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    known = [row for row in TWINS if row.accuracy]
    assert len(known) == 2
    for row in known:
        published = table[row.source.removeprefix("torchvision:").partition("/")[0]]
        assert dict(row.accuracy) == {key: pytest.approx(float(published[key]), abs=0.005) for key in TEST_SETS}, row.name


def test_the_built_in_rows():
    rows = load_suite("paper")
    assert len(PUBLISHED) == 17 and {row.role for row in rows} == set(ROLES)
    assert {row.backbone for row in PUBLISHED} == {"RN50", "RN101", "ViT-B-32", "ViT-B-16", "ViT-L-14"}
    for role in ("supervised", "fine-tuned"):  # nobody has a supervised ViT-L/14
        assert {row.backbone for row in PUBLISHED} - {row.backbone for row in rows if row.role == role} <= {"ViT-L-14"}
    assert all(row.missing() is None for row in PUBLISHED)
    assert {row.role for row in rows if row.missing()} == {"fine-tuned", "supervised", "imagenet-captions"}


@pytest.mark.parametrize("row", [row for row in TWINS if row.source.startswith("timm:")], ids=lambda row: row.name)
def test_timm_has_the_twins(row):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    name = row.source.removeprefix("timm:")
    assert name in timm.list_pretrained() and timm.get_pretrained_cfg(name).num_classes == 1000
    assert (timm.get_pretrained_cfg(name).hf_hub_id or timm.get_pretrained_cfg(name).url) is not None


@pytest.mark.parametrize("row", [row for row in TWINS if row.source.startswith("torchvision:")], ids=lambda row: row.name)
def test_torchvision_has_the_twins(row):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    name, _, weights = row.source.removeprefix("torchvision:").partition("/")
    assert weights in models.get_model_weights(name).__members__


@pytest.mark.parametrize("row", [row for row in TWINS if row.source.startswith("open_clip:")], ids=lambda row: row.name)
def test_rows_to_fill_in_have_an_architecture(row):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    assert row.checkpoint == "" and row.source.removeprefix("open_clip:").partition("/")[0] in open_clip.list_models()


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_quick_gelu_where_the_weights_were_trained_with_it(monkeypatch, row):
    """OpenAI's, YFCC15M's, CC12M's and the ViT-B-32 of LAION-400M; with GELU they would be plausible and wrong."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    create = open_clip.create_model
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **options: create(*args, **options, device="meta"))
    with torch.device("meta"):
        encoder = load_encoder(row.source, pretrained=False)
    quick = row.pretraining in ("OpenAI", "YFCC15M", "CC12M") or (row.backbone, row.pretraining) == ("ViT-B-32", "LAION-400M")
    towers = [encoder.text] if row.backbone.startswith("RN") else [encoder.text, encoder.visual]  # CLIP's ResNets have ReLUs
    for tower in towers:
        activations = {type(module).__name__ for module in tower.modules()} & {"GELU", "QuickGELU"}
        assert activations == {"QuickGELU" if quick else "GELU"}
    assert row.source.removeprefix("open_clip:").partition("/")[2] in open_clip.list_pretrained_tags_by_model(
        row.source.removeprefix("open_clip:").partition("/")[0]
    )


# -- files of one's own ------------------------------------------------------------------------------------------------


def test_defaults_and_paths(tmp_path):
    (row,) = suite(tmp_path, ENTRY)
    assert row == SuiteRow("a", "supervised", "RN18", "ImageNet-1k", "torchvision:resnet18", head="own") and hash(row)
    (row,) = suite(tmp_path, ENTRY + 'checkpoint = "w/a.pt"\nhead = "h.safetensors"\nnormalize = true\naccuracy = {imagenet = 70}\n')
    assert (row.checkpoint, row.head) == (str(tmp_path / "w/a.pt"), str(tmp_path / "h.safetensors"))
    assert row.normalize is True and row.accuracy == {"imagenet": 70.0}
    assert row.missing() == f"no file at {tmp_path / 'w/a.pt'} and {tmp_path / 'h.safetensors'}"
    (row,) = suite(tmp_path, ENTRY.replace("torchvision:resnet18", "open_clip:RN50/openai").replace("supervised", "zero-shot"))
    assert row.head == "zero-shot"


def test_a_row_loads_its_encoder_and_its_head(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.save(models.resnet18(num_classes=7).state_dict(), tmp_path / "w.pth")
    Head(torch.ones(3, 512), names=["x", "y", "z"]).save(tmp_path / "h.safetensors")
    places = [("a", "own", ""), ("b", "h.safetensors", "normalize = true"), ("c", "none", ""), ("d", "own", "normalize = true")]
    rows = suite(
        tmp_path,
        "".join(
            ENTRY.replace('"a"', f'"{name}"') + f'checkpoint = "{"./" * i}w.pth"\nhead = "{head}"\n{more}\n'
            for i, (name, head, more) in enumerate(places)
        ),
    )
    encoder = rows[0].load()
    own, file, none, normalized = (row.load_head(encoder) for row in rows)
    assert own is encoder.head and own.out_features == 7 and not own.normalize
    assert file.names == ("x", "y", "z") and file.normalize
    assert none is None
    assert normalized.normalize and torch.equal(normalized.weight, own.weight) and torch.equal(normalized.bias, own.bias)
    encoder.head = None
    with pytest.raises(EncoderError, match="a has no trained head of one linear layer"):
        rows[0].load_head(encoder)


def test_a_row_without_its_file_says_so(tmp_path):
    (row,) = suite(tmp_path, ENTRY + 'checkpoint = ""\n')
    assert row.missing() == "it needs your checkpoint: fill in its path"
    with pytest.raises(EncoderError, match="a cannot be loaded: it needs your checkpoint"):
        row.load()


def test_every_problem_is_named(tmp_path):
    text = problem(
        tmp_path,
        "encoders = 1\n"
        + ENTRY.replace("supervised", "superviced").replace("backbone", "backbones")
        + ENTRY.replace("torchvision:resnet18", "resnet18")
        + 'head = "trained"\nnormalize = 1\nchekpoint = "w.pt"\naccuracy = {imagenet = 101, imagenet_v3 = 5, objectnet = "60"}\n'
        + ENTRY.replace('"a"', "3").replace("supervised", "zero-shot"),
    )
    for part in (
        "suite.toml is not a suite: unknown key 'encoders'; did you mean encoder?",
        "encoder 1 ('a'): unknown key 'backbones'; did you mean backbone?",
        "backbone is missing",
        "unknown role 'superviced', expected one of zero-shot, fine-tuned, supervised, imagenet-captions; did you mean supervised?",
        "encoder 2 ('a'): unknown key 'chekpoint'; did you mean checkpoint?",
        "normalize must be true or false, got 1",
        "'resnet18' is not the name of an encoder: expected one of timm:NAME",
        "unknown head 'trained', expected one of zero-shot, own, none, or a file",
        "unknown test set 'imagenet_v3'; did you mean imagenet_v2",
        "the accuracy on imagenet must be in percent, 0 to 100, got 101",
        "the accuracy on objectnet must be in percent, 0 to 100, got '60'",
        "encoder 3: name must be a string, got 3",
        "'torchvision:resnet18' has no text tower for a zero-shot head",
        "the name 'a' occurs 2 times",
    ):
        assert part in text, part


def test_what_occurs_twice(tmp_path):
    assert "'torchvision:resnet18' occurs 2 times with the same checkpoint and head" in problem(
        tmp_path, ENTRY + ENTRY.replace('"a"', '"b"')
    )
    empty = 'checkpoint = ""\n'
    assert len(suite(tmp_path, ENTRY + empty + ENTRY.replace('"a"', '"b"') + empty)) == 2


@pytest.mark.parametrize("text", ["", "encoder = 3", "encoder = [1]", "[encoder]\nname = 'a'"])
def test_files_without_encoders(tmp_path, text):
    assert "expected at least one [[encoder]]" in problem(tmp_path, text)


def test_files_that_cannot_be_read(tmp_path):
    assert "cannot be read as TOML: TOMLDecodeError" in problem(tmp_path, "[[encoder")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(EncoderError, match="cannot be read as TOML: .*not text in UTF-8"):
        load_suite(tmp_path / "bytes.toml")
    with pytest.raises(EncoderError, match="cannot be read as TOML"):
        load_suite(tmp_path)
    with pytest.raises(EncoderError, match=r"no suite at .*: expected a TOML file, or 'paper'"):
        load_suite(tmp_path / "none.toml")
