"""Labeled folders, and the ImageNet sets in the layouts of their releases; the lists come from timm."""

import importlib
import json
from importlib import resources

import numpy as np
import pytest
import torch

from torchprobe.datasets import DatasetError, LabeledImages, imagenet_set, labeled_folder
from torchprobe.datasets.imagenet import KINDS, imagenet_wnids

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")


def picture(path, size=(6, 5), value=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def listed(file):
    return (resources.files("timm.data") / "_info" / file).read_text().split()


def by_name(images):
    return {images.name(path): label for path, label in zip(images.paths, images.labels, strict=True)}


def refusal(*args, **kwargs):
    with pytest.raises(DatasetError) as caught:
        (imagenet_set if len(args) > 1 else labeled_folder)(*args, **kwargs)
    return str(caught.value)


# -- folders -------------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_image_folder(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    for name in ("zebra/1.png", "Ant/2.png", "Ant/deep/er/3.JPEG", "bee/4.png", "10/5.png", "9/6.png"):
        picture(tmp_path / name)
    ours = labeled_folder(tmp_path)
    theirs = torchvision.datasets.ImageFolder(str(tmp_path))
    assert list(ours.names) == theirs.classes == ["10", "9", "Ant", "bee", "zebra"]
    assert {str(path): label for path, label in zip(ours.paths, ours.labels, strict=True)} == dict(theirs.samples)
    assert ours.classes is None and ours.groups is None and ours.remarks == []


def test_empty_class_folders_and_other_files_are_remarked_on_and_keep_their_numbers(tmp_path):
    picture(tmp_path / "a" / "1.png")
    (tmp_path / "b").mkdir()
    picture(tmp_path / "c" / "1.png")
    (tmp_path / "c" / "notes.txt").touch()
    (tmp_path / ".cache").mkdir()
    images = labeled_folder(tmp_path)
    assert images.labels == [0, 2] and images.names == ("a", "b", "c")
    assert images.remarks == ["1 class folder without images: b", "left out: 1 file that is not an image"]


def test_a_limit_takes_some_at_random_and_says_so(tmp_path):
    for i in range(20):
        picture(tmp_path / "ab"[i % 2] / f"{i}.png")
    whole, some, same, other = (labeled_folder(tmp_path, limit=n, seed=s) for n, s in ((None, 0), (6, 0), (6, 0), (6, 1)))
    assert len(some) == 6 and some.remarks == ["6 of 20 images, chosen at random"]
    assert by_name(some) == by_name(same) != by_name(other)
    assert by_name(some).items() <= by_name(whole).items()
    with pytest.raises(ValueError, match="limit"):
        labeled_folder(tmp_path, limit=0)


def test_folders_are_matched_to_the_rows_of_a_head(tmp_path):
    for name in ("tench", "Great_White-shark"):
        picture(tmp_path / name / "1.png")
    images = labeled_folder(tmp_path, names=["gold fish", "great white shark", "tench"])
    assert by_name(images) == {"Great_White-shark/1.png": 1, "tench/1.png": 2}
    assert images.classes == (1, 2)
    assert labeled_folder(tmp_path, names=["great white shark", "tench"]).classes is None


@pytest.mark.parametrize(
    ("folders", "names", "message"),
    [
        (["tenhc"], ["tench", "crane"], "class folder 'tenhc' is not one of the 2 classes of the head; did you mean 'tench'"),
        (["crane"], ["crane", "crane"], r"class folder 'crane' matches several rows of the head, \[0, 1\]"),
        (["a b", "a_b"], ["A B"], "'a b' and 'a_b' match the same class of the head, 'A B'"),
    ],
)
def test_folders_that_match_no_row_or_several(tmp_path, folders, names, message):
    for name in folders:
        picture(tmp_path / name / "1.png")
    with pytest.raises(DatasetError, match=message):
        labeled_folder(tmp_path, names=names)


def test_roots_that_cannot_be_used(tmp_path):
    assert "does not exist; expected a folder with one folder for each class" in refusal(tmp_path / "nowhere")
    assert "it is empty" in refusal(tmp_path)
    picture(tmp_path / "1.png")
    assert "it has 1 image outside class folders" in refusal(tmp_path)
    assert "is a file" in refusal(tmp_path / "1.png")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").touch()
    assert "no images in the 1 class folder of" in refusal(tmp_path)


def test_labeled_images_are_checked():
    with pytest.raises(ValueError, match="a label for each path, got 1 labels and 0 paths"):
        LabeledImages([], labels=[1])
    for groups, message in (({3: (2, 3)}, "lowest"), ({1: (1, 2), 2: (2, 5)}, "row 2 is in two groups"), ({1: ()}, "lowest")):
        with pytest.raises(ValueError, match=message):
            LabeledImages([], labels=[], groups=groups)


def test_the_british_names_still_work():
    from torchprobe import datasets

    with pytest.warns(DeprecationWarning, match="datasets.LabelledImages is deprecated, use torchprobe.datasets.LabeledImages"):
        assert datasets.LabelledImages is LabeledImages
    with pytest.warns(DeprecationWarning, match="datasets.labelled_folder is deprecated, use torchprobe.datasets.labeled_folder"):
        assert datasets.labelled_folder is labeled_folder


# -- ImageNet and its relatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("within", [".", "val", "imagenet-sketch"])
@pytest.mark.parametrize("kind", ["imagenet", "imagenet_sketch"])
def test_wnid_folders(tmp_path, kind, within):
    wnids = imagenet_wnids()
    assert len(wnids) == 1000 and wnids == listed("imagenet_synsets.txt")
    for row in (999, 0, 407):
        picture(tmp_path / within / wnids[row] / "x.JPEG")
    if within == "val":
        picture(tmp_path / "train" / wnids[5] / "x.JPEG")
    images = imagenet_set(tmp_path, kind)
    assert by_name(images) == {f"{wnids[row]}/x.JPEG": row for row in (0, 407, 999)}
    assert images.classes is None
    assert images.remarks == [f"997 of the 1000 classes of {kind} have no folder: {', '.join(wnids[1:6])} … and 992 more"]


def test_names_are_those_of_open_clip(tmp_path):
    metadata = importlib.import_module("open_clip.zero_shot_metadata")
    picture(tmp_path / imagenet_wnids()[0] / "x.JPEG")
    assert imagenet_set(tmp_path, "imagenet").names == tuple(metadata.IMAGENET_CLASSNAMES)


def test_the_folders_of_v2_are_numbers_and_not_words(tmp_path):
    for row in (0, 2, 10, 999):
        picture(tmp_path / "imagenetv2-matched-frequency-format-val" / str(row) / "x.jpeg")
    images = imagenet_set(tmp_path, "imagenet_v2")
    assert images.labels == [0, 2, 10, 999]
    assert by_name(images)["10/x.jpeg"] == 10
    (tmp_path / "imagenetv2-matched-frequency-format-val" / "1000").mkdir()
    assert "1000 is not a class of imagenet_v2: the name of every folder must be a class number from 0 to 999" in refusal(
        tmp_path, "imagenet_v2"
    )


@pytest.mark.parametrize(("kind", "letter"), [("imagenet_r", "r"), ("imagenet_a", "a")])
def test_subsets_of_200_classes(tmp_path, kind, letter):
    wnids, subset = imagenet_wnids(), listed(f"imagenet_{letter}_synsets.txt")
    beside = next(wnid for wnid in wnids if wnid not in subset)
    for wnid in subset[:199]:
        picture(tmp_path / wnid / "x.jpg")
    picture(tmp_path / beside / "x.jpg")
    images = imagenet_set(tmp_path, kind)
    assert images.classes == tuple(map(int, listed(f"imagenet_{letter}_indices.txt")))
    assert by_name(images) == {f"{wnid}/x.jpg": wnids.index(wnid) for wnid in subset[:199]}
    assert images.remarks == [
        f"1 of the 200 classes of {kind} have no folder: {subset[199]}",
        f"left out: 1 folder of other classes: {beside}",
    ]


def test_folders_that_are_not_classes(tmp_path):
    picture(tmp_path / imagenet_wnids()[0] / "x.JPEG")
    picture(tmp_path / "tench" / "x.JPEG")
    message = refusal(tmp_path, "imagenet")
    assert f"{tmp_path / 'tench'} is not a class of imagenet: the name of every folder must be a WordNet id of ImageNet" in message
    picture(tmp_path / "other" / "n00000001" / "x.JPEG")
    assert "none of the 1 folders" in refusal(tmp_path / "other", "imagenet") and "n00000001" in refusal(tmp_path / "other", "imagenet")
    picture(tmp_path / "flat" / "ILSVRC2012_val_00000001.JPEG")
    assert "it has 1 image outside class folders" in refusal(tmp_path / "flat", "imagenet")
    with pytest.raises(ValueError, match="kind must be one of imagenet, imagenet_v2"):
        imagenet_set(tmp_path, "imagenet_c")


def objectnet(tmp_path, shared=None, folders=("alarm_clock", "banana", "air_freshener")):
    """A release with three of its classes; the mapping is as in the original, of which these are three entries."""
    for folder in folders:
        picture(tmp_path / "images" / folder / "x.png")
    (tmp_path / "mappings").mkdir(exist_ok=True)
    names = {"alarm_clock": "Alarm clock", "banana": "Banana", "air_freshener": "Air freshener", "bicycle": "Bicycle"}
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text(json.dumps(names))
    shared = shared or {
        "Alarm clock": "analog clock; digital clock",
        "Banana": "banana",
        "Bicycle": "mountain bike, all-terrain bike, off-roader; bicycle-built-for-two, tandem bicycle, tandem",
    }
    (tmp_path / "mappings" / "objectnet_to_imagenet_1k.json").write_text(json.dumps(shared))


@pytest.mark.parametrize("within", [".", "objectnet-1.0"])
def test_a_class_of_objectnet_stands_for_several_of_imagenet(tmp_path, within):
    objectnet(tmp_path / within)
    images = imagenet_set(tmp_path, "objectnet")
    analog, digital, banana, tandem, mountain = 409, 530, 954, 444, 671
    assert by_name(images) == {"alarm_clock/x.png": analog, "banana/x.png": banana}
    assert images.groups == {analog: (analog, digital), tandem: (tandem, mountain)}
    assert images.classes == (analog, tandem, digital, mountain, banana)
    assert images.remarks == [
        "2 pixels are cut from each side, where ObjectNet has a red frame",
        "1 of the 3 classes that ObjectNet shares with ImageNet have no folder: bicycle",
        "left out: 1 folder of classes that are not in ImageNet",
    ]


def test_the_red_frame_of_objectnet_is_cut(tmp_path):
    objectnet(tmp_path)
    frame = np.full((9, 8, 3), 7, np.uint8)
    frame[[0, 1, -1, -2]] = frame[:, [0, 1, -1, -2]] = (255, 0, 0)
    Image.fromarray(frame).save(tmp_path / "images" / "banana" / "x.png")
    picture(tmp_path / "images" / "alarm_clock" / "x.png", (3, 9))

    def read(border):
        images = imagenet_set(tmp_path, "objectnet", border=border)
        return next(images.batches(lambda image: torch.from_numpy(np.array(image)), 1, only=[1])), next(
            images.batches(lambda image: torch.from_numpy(np.array(image)), 1)
        )

    banana, clock = read(2)
    assert banana.pixels.shape == (1, 5, 4, 3) and (banana.pixels == 7).all()
    assert clock.unreadable == [("alarm_clock/x.png", "ValueError: 9 × 3 pixels are too small to cut 2 pixels from each side")]
    assert read(0)[0].pixels.shape == (1, 9, 8, 3)
    with pytest.raises(ValueError, match="border must be at least 0"):
        imagenet_set(tmp_path, "objectnet", border=-1)


def test_an_objectnet_that_is_not_as_released(tmp_path):
    picture(tmp_path / "images" / "banana" / "x.png")
    assert "expected the folders images and mappings of its release" in refusal(tmp_path, "objectnet")
    objectnet(tmp_path, {"Banana": "banana; no such thing"})
    assert "maps the folder banana to 'no such thing', which is not the name of one class of ImageNet" in refusal(tmp_path, "objectnet")
    objectnet(tmp_path, {"Banana": "crane"})  # the bird and the machine
    assert "not the name of one class" in refusal(tmp_path, "objectnet")
    objectnet(tmp_path)
    picture(tmp_path / "images" / "bananas" / "x.png")
    assert "bananas is not a class of ObjectNet" in refusal(tmp_path, "objectnet")
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text("{")
    assert "cannot be read" in refusal(tmp_path, "objectnet")
    (tmp_path / "mappings" / "folder_to_objectnet_label.json").write_text('{"a": 1}')
    assert "expected a JSON object from names to names" in refusal(tmp_path, "objectnet")


def test_without_timm(tmp_path, monkeypatch):
    picture(tmp_path / imagenet_wnids()[0] / "x.JPEG")

    def absent(name, *rest):
        if name.startswith("timm"):
            raise ModuleNotFoundError("No module named 'timm'", name="timm")
        return real(name, *rest)

    real = importlib.import_module
    monkeypatch.setattr(importlib, "import_module", absent)
    assert "read from timm (ImageNetInfo), which is missing: No module named 'timm'. pip install timm" in refusal(tmp_path, "imagenet")


def test_every_kind_refuses_an_empty_root(tmp_path):
    for kind in KINDS:
        assert "it is empty" in refusal(tmp_path, kind)


def test_images_of_different_shapes_after_preprocessing(tmp_path):
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "a" / "2.png", (9, 9))
    images = labeled_folder(tmp_path)
    with pytest.raises(DatasetError, match=r"a/1.png becomes \(6, 5, 3\), a/2.png \(9, 9, 3\); resize and crop"):
        next(images.batches(lambda image: torch.from_numpy(np.array(image)), 2))
