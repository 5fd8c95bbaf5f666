"""Importers of ADE20K, Pascal VOC, folders of masks and Hugging Face data sets: every pixel, every trap, every kind of damage."""

import json
import zlib

import numpy as np
import pytest
from import_sets import EXACT, assert_shows, colors, drawn, mask, photo, reasons, rows, shown, write_json
from PIL import Image

from torchprobe.datasets import (
    Broden,
    DatasetError,
    import_ade20k,
    import_binary_masks,
    import_hugging_face,
    import_label_maps,
    import_voc,
    validate,
)
from torchprobe.datasets.importers.pictures import index_map
from torchprobe.datasets.importers.report import ImportReport, Unusable
from torchprobe.datasets.importers.values import Values, read_names

MAP = drawn("00112233 00112233 00112233 44445555 44445555 44445555")
EMPTY = np.zeros((6, 8), int)


# -- values and names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "unlabeled", "void"),
    [
        ({1: "cat"}, {0}, {255}),
        ({0: "road", 1: "cat"}, set(), {255}),
        ({0: "road", 255: "sky"}, set(), set()),
        ({0: "__ignore__", 1: "_background_", 2: "cat"}, {1}, {0, 255}),
        ({0: "Background", 9: "Void", 2: "cat"}, {0}, {9, 255}),
        ({5: "background", 2: "cat"}, {0, 5}, {255}),
    ],
)
def test_what_means_no_label_by_default(names, unlabeled, void):
    values = Values(names)
    assert (values.unlabeled, values.void) == (unlabeled, void)
    assert values.labels == [names[value] for value in sorted(set(names) - unlabeled - void)]


def test_what_means_no_label_on_request():
    values = Values({0: "road", 1: "cat", 2: "dog"}, unlabeled=(2,), void=(0,))
    assert values.labels == ["cat"]
    assert Values({0: "road", 255: "sky"}, void=()).labels == ["road", "sky"]
    assert Values({1: "cat"}, unlabeled=(255,)).void == set()
    with pytest.raises(DatasetError, match="no label has a name"):
        Values({0: "background"})
    with pytest.raises(DatasetError, match="at once"):
        Values({1: "cat"}, unlabeled=(3,), void=(3,))


@pytest.mark.parametrize("wide", [0, 1 << 30])
def test_values_become_labels_whatever_their_range(wide):
    """Both ways of looking values up: a table, and sorting."""
    report = ImportReport("test", None)
    values = Values({-7: "below", 3: "cat", 300 + wide: "far"}, unlabeled=(0,), void=(255,))
    source = np.array([[-7, 0, 3], [300 + wide, 255, 17]])
    assert values.plane(source, "a", report).tolist() == [[1, 0, 2], [3, 0, 0]]
    assert [(remark.count, remark.examples) for remark in report.dropped] == [(1, ["value 17 in a"])]
    assert [(remark.count, remark.examples) for remark in report.changed] == [(1, ["value 255"])]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"0": "road", "7": "car"}', {0: "road", 7: "car"}),
        ("0 road\n7 car\n", {0: "road", 7: "car"}),
        ("0: road\n\n7:\tsports car\r\n", {0: "road", 7: "sports car"}),
        ("0,road\n7,car, automobile", {0: "road", 7: "car, automobile"}),
        ("\ufeff0=road", {0: "road"}),
    ],
)
def test_files_of_names_with_values(tmp_path, text, expected):
    path = tmp_path / "names.txt"
    path.write_text(text, encoding="utf-8")
    assert read_names(path) == expected


@pytest.mark.parametrize("text", ["background\ncat\n", '["background", "cat"]'])
def test_files_of_names_without_values_need_the_first_value(tmp_path, text):
    path = tmp_path / "names.txt"
    path.write_text(text)
    assert read_names(path, 0) == {0: "background", 1: "cat"}
    with pytest.raises(DatasetError, match="--first-value"):
        read_names(path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("1 cat\ndog\n", "no value in front"),
        ("1 cat\n1 dog\n", "there twice"),
        ("cat\n\ndog\n", "line 2 is empty"),
        ('{"1": "cat", "01": "dog"}', "there twice"),
        ('{"x": "cat"}', "not a value"),
        ('{"1": 5}', "name of a label"),
        ('{"1": " "}', "name of a label"),
        ('{"1": "a\\nb"}', "name of a label"),
        ('{"1": ', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_files_of_names_that_cannot_be_used(tmp_path, text, what):
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(DatasetError, match=what):
        read_names(path)
    with pytest.raises(DatasetError, match="missing"):
        read_names(tmp_path / "none.txt")


# -- masks as files ------------------------------------------------------------------------------------------------------------


def test_masks_of_every_depth(tmp_path):
    big = MAP * 200
    assert index_map(mask(tmp_path / "gray.png", MAP)).tolist() == MAP.tolist()
    assert index_map(mask(tmp_path / "palette.png", MAP, palette=True)).tolist() == MAP.tolist()
    assert index_map(mask(tmp_path / "deep.png", big)).tolist() == big.tolist()  # 16 bits: more than 255
    assert index_map(colors(tmp_path / "equal.png", MAP, MAP, MAP)).tolist() == MAP.tolist()
    Image.fromarray(MAP.astype(np.int32) * 70_000).save(tmp_path / "deeper.tif")
    assert index_map(tmp_path / "deeper.tif").tolist() == (MAP * 70_000).tolist()
    Image.fromarray(MAP % 2 == 1).save(tmp_path / "bits.png")
    assert index_map(tmp_path / "bits.png").tolist() == (MAP % 2).tolist()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("color.png", "colors"),
        ("alpha.png", "colors"),
        ("photo.jpg", "a JPEG"),
        ("truncated.png", "cannot be read"),
        ("damaged.png", "cannot be read"),
        ("text.png", "cannot be read"),
        ("none.png", "missing"),
        ("long.png", "size of 1 × 20000 pixels, more than"),
        ("huge.png", "exceeds limit of .*: make it smaller"),
    ],
)
def test_masks_that_cannot_be_used(tmp_path, monkeypatch, name, reason):
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)  # a truncated mask would be read as 0
    whole = mask(tmp_path / "whole.png", np.random.default_rng(0).integers(0, 255, (60, 60))).read_bytes()
    (tmp_path / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "damaged.png").write_bytes(whole[:100] + bytes(10) + whole[110:])
    (tmp_path / "text.png").write_text("no")
    colors(tmp_path / "color.png", MAP, MAP + 1, MAP)
    Image.fromarray(np.dstack([MAP, MAP + 1, MAP, MAP]).astype(np.uint8), "RGBA").save(tmp_path / "alpha.png")
    photo(tmp_path / "photo.jpg")
    mask(tmp_path / "long.png", np.zeros((1, 20_000)))
    header = b"IHDR" + (1 << 15).to_bytes(4, "big") * 2 + whole[24:29]
    (tmp_path / "huge.png").write_bytes(whole[:12] + header + zlib.crc32(header).to_bytes(4, "big") + whole[33:])
    with pytest.raises(Unusable, match=reason):
        index_map(tmp_path / name)


# -- folders of label maps -----------------------------------------------------------------------------------------------------

NAMES = {1: "cat", 2: "dog", 4: "sky", 5: "far"}


@pytest.fixture
def folders(tmp_path):
    photo(tmp_path / "photos" / "sub" / "a.jpg", 1)
    mask(tmp_path / "masks" / "sub" / "a.png", np.where(MAP == 5, 255, MAP), palette=True)
    photo(tmp_path / "photos" / "é b.png", 2)
    mask(tmp_path / "masks" / "é b.png", EMPTY)
    photo(tmp_path / "photos" / "c.bmp", 3)
    mask(tmp_path / "masks" / "c.png", MAP)
    photo(tmp_path / "photos" / "alone.png", 4)
    mask(tmp_path / "masks" / "stray.png", MAP)
    return tmp_path


def test_label_maps(folders):
    report = import_label_maps(folders / "photos", folders / "masks", NAMES, folders / "set", **EXACT)
    assert rows(folders / "set") == ["c.png", "sub/a.jpg", "é b.png"]
    labels = {NAMES[value]: value == MAP for value in NAMES}
    assert_shows(folders / "set", "c", {"object": labels})
    assert_shows(folders / "set", "sub/a", {"object": {name: labels[name] for name in ("cat", "dog", "sky")}})
    assert_shows(folders / "set", "é b", {"object": {}})
    assert (report.images, report.labels, report.empty) == (3, 4, 1)
    dropped = reasons(report.dropped)
    assert dropped["images: no mask, so it is not annotated"] == dropped["masks: no image of this name"] == 1
    assert dropped["pixels: a value without a name; they count as unlabeled"] == 2 * (MAP == 3).sum()
    assert next(remark for remark in report.changed if "void" in remark.reason).count == (MAP == 5).sum()
    assert validate(folders / "set") == []
    pixels = np.asarray(Broden(folders / "set").image([row.image for row in Broden(folders / "set").rows].index("c.png")))
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(folders / "photos" / "c.bmp")))  # without loss


def test_label_maps_with_suffixes(tmp_path):
    photo(tmp_path / "photos" / "x" / "a_leftImg8bit.png")
    mask(tmp_path / "masks" / "x" / "a_gtFine_labelIds.png", MAP)
    colors(tmp_path / "masks" / "x" / "a_gtFine_color.png", MAP, MAP + 1)
    suffixes = {"image_suffix": "_leftImg8bit", "mask_suffix": "_gtFine_labelIds"}
    import_label_maps(tmp_path / "photos", tmp_path / "masks", NAMES, tmp_path / "set", **suffixes, category="thing", **EXACT)
    assert_shows(tmp_path / "set", "x/a", {"thing": {NAMES[value]: value == MAP for value in NAMES}})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: mask(root / "masks" / "c.png", MAP.T), "different shapes"),
        (lambda root: colors(root / "masks" / "c.png", MAP, MAP + 1), "colors"),
        (lambda root: (root / "masks" / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n"), "cannot be read"),
        (lambda root: (root / "photos" / "c.bmp").write_text("x"), "image cannot be read"),
        (lambda root: mask(root / "masks" / "c.tif", MAP), "no mask"),
        (lambda root: (root / "photos" / "c.png").symlink_to(root / "photos" / "c.bmp"), None),
    ],
)
def test_a_bad_file_drops_its_image_only(folders, damage, reason):
    damage(folders)
    report = import_label_maps(folders / "photos", folders / "masks", NAMES, folders / "set", **EXACT)
    assert {"sub/a.jpg", "é b.png"} <= set(rows(folders / "set"))
    assert "c.png" not in rows(folders / "set")
    assert reason is None or any(remark.what == "images" and reason in remark.reason for remark in report.dropped), report.dropped
    if reason in (None, "no mask"):
        assert any("differ only in their ending" in remark.reason and remark.count == 2 for remark in report.dropped)


def test_links_that_leave_the_folder_are_dropped(folders):
    photo(folders / "elsewhere" / "d.png")
    (folders / "photos" / "d.png").symlink_to(folders / "elsewhere" / "d.png")
    mask(folders / "masks" / "d.png", MAP)
    report = import_label_maps(folders / "photos", folders / "masks", NAMES, folders / "set", **EXACT)
    assert "d.png" not in rows(folders / "set")
    assert reasons(report.dropped)["images: a link that leaves the folder"] == 1


# -- folders of binary masks ---------------------------------------------------------------------------------------------------


def test_binary_masks(tmp_path):
    for i, name in enumerate("abcd"):
        photo(tmp_path / "photos" / f"{name}.jpg", i)
    cat, dog = MAP == 1, MAP > 0
    mask(tmp_path / "masks" / "a cat" / "a.png", cat * 255)
    mask(tmp_path / "masks" / "dog" / "a.png", dog * 1)  # over the cat
    mask(tmp_path / "masks" / "dog" / "b.png", dog, palette=True)
    mask(tmp_path / "masks" / "a cat" / "c.png", EMPTY)
    Image.fromarray((np.kron(dog, np.ones((8, 8))) * 255).astype(np.uint8)).save(tmp_path / "masks" / "dog" / "c.jpg", quality=30)
    (tmp_path / "masks" / ".hidden").mkdir()
    mask(tmp_path / "masks" / "dog" / "stray.png", dog)
    report = import_binary_masks(tmp_path / "photos", tmp_path / "masks", tmp_path / "set", category="thing", **EXACT)
    assert rows(tmp_path / "set") == ["a.jpg", "b.jpg"]
    assert_shows(tmp_path / "set", "a", {"thing": {"a cat": cat, "dog": dog}})
    assert_shows(tmp_path / "set", "b", {"thing": {"dog": dog}})
    dropped = reasons(report.dropped)
    assert dropped["images: masks of different sizes"] == dropped["images: no mask of any concept, so it is not annotated"] == 1
    assert dropped["masks: no image of this name"] == 1
    assert reasons(report.changed)["masks of a concept: no file; the concept counts as absent"] == 1


def test_jpeg_masks_are_cut_at_half_of_the_range(tmp_path):
    dog = np.kron(MAP == 1, np.ones((8, 8), bool))
    photo(tmp_path / "photos" / "a.jpg", size=(48, 64))
    (tmp_path / "masks" / "dog").mkdir(parents=True)
    Image.fromarray((dog * 255).astype(np.uint8)).save(tmp_path / "masks" / "dog" / "a.jpg", quality=40)
    report = import_binary_masks(tmp_path / "photos", tmp_path / "masks", tmp_path / "set", segmentation_size=(48, 64))
    assert_shows(tmp_path / "set", "a", {"object": {"dog": dog}})
    assert any("upper half" in remark.reason for remark in report.changed)


def test_masks_of_classes_are_no_binary_masks(tmp_path):
    """Nothing of them is in the upper half, so the concept would silently be absent."""
    for name, values in {"a.png": MAP, "b.jpg": np.kron(MAP == 1, np.ones((8, 8), int)), "c.png": MAP == 1}.items():
        photo(tmp_path / "photos" / name, size=values.shape)
        mask(tmp_path / "masks" / "dog" / name, values)
    report = import_binary_masks(tmp_path / "photos", tmp_path / "masks", tmp_path / "set")
    assert (
        rows(tmp_path / "set") == ["c.png"]
        and reasons(report.dropped)["images: a binary mask must have 0 outside and one other value inside"] == 2
    )


def test_empty_binary_masks_are_annotations_and_odd_ones_are_refused(tmp_path):
    for name, values in {"a": MAP == 1, "b": EMPTY, "c": EMPTY + 7, "d": np.where(MAP == 1, 9, 4)}.items():
        photo(tmp_path / "photos" / f"{name}.png")
        mask(tmp_path / "masks" / "dog" / f"{name}.png", values)
    report = import_binary_masks(tmp_path / "photos", tmp_path / "masks", tmp_path / "set", **EXACT)
    assert_shows(tmp_path / "set", "b", {"object": {}})
    assert_shows(tmp_path / "set", "c", {"object": {"dog": np.ones((6, 8))}})
    assert rows(tmp_path / "set") == ["a.png", "b.png", "c.png"]
    assert reasons(report.dropped) == {"images: a binary mask must have 0 outside and one other value inside": 1}
    (tmp_path / "none").mkdir()
    with pytest.raises(DatasetError, match="no folders"):
        import_binary_masks(tmp_path / "photos", tmp_path / "none", tmp_path / "other")


# -- Pascal VOC ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def voc(tmp_path):
    root = tmp_path / "VOC2012"
    for i, name in enumerate(("2007_000032", "2007_000039", "2008_1", "unannotated")):
        photo(root / "JPEGImages" / f"{name}.jpg", i)
    mask(root / "SegmentationClass" / "2007_000032.png", np.choose(MAP, (0, 1, 15, 255, 20, 77)), palette=True)
    mask(root / "SegmentationClass" / "2007_000039.png", EMPTY, palette=True)
    mask(root / "SegmentationClass" / "2008_1.png", np.where(MAP == 1, 15, 0), palette=True)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("2007_000032\n2007_000039\n\n2007_000032\nmissing\n")
    return root


def test_voc(voc, tmp_path):
    report = import_voc(voc, tmp_path / "set", **EXACT)
    names = {1: "aeroplane", 2: "person", 4: "tvmonitor"}
    assert_shows(tmp_path / "set", "2007_000032", {"object": {name: value == MAP for value, name in names.items()}})
    assert_shows(tmp_path / "set", "2007_000039", {"object": {}})
    assert_shows(tmp_path / "set", "2008_1", {"object": {"person": MAP == 1}})
    assert next(remark for remark in report.changed if "void" in remark.reason).count == (MAP == 3).sum()
    dropped = reasons(report.dropped)
    assert dropped["images: no mask, so they are not annotated"] == 1
    assert dropped["pixels: a value without a name; they count as unlabeled"] == (MAP == 5).sum()
    assert dropped["labels: no pixel in any image"] == 17
    assert dropped["labels: the name of a value that is unlabeled"] == 1


def test_voc_splits_and_names(voc, tmp_path):
    report = import_voc(voc, tmp_path / "set", split="val", names=["bg", "one", *["x"] * 13, "fifteen"], **EXACT)
    assert rows(tmp_path / "set") == ["2007_000032.jpg", "2007_000039.jpg"]
    assert {"one", "fifteen"} <= set(shown(tmp_path / "set", "2007_000032")["object"])
    assert reasons(report.dropped)["images: no image of this name in JPEGImages"] == 1
    for split, what in (("trian", "are val"), ("../val", "not the name of a split")):
        with pytest.raises(DatasetError, match=what):
            import_voc(voc, tmp_path / "other", split=split)
    assert not (tmp_path / "other").exists()


# -- ADE20K --------------------------------------------------------------------------------------------------------------------

OBJECTS = """Idx\tRatio\tTrain\tVal\tName
1\t0.1576\t11664\t1172\twall
2\t0.1072\t6046\t612\tbuilding, edifice
3\t0.0878\t8265\t796\tscreen, silver screen
4\t0.0100\t10\t3\tscreen, crt screen
150\t0.0001\t5\t2\tflag
"""


@pytest.fixture
def scene_parsing(tmp_path):
    root = tmp_path / "ADEChallengeData2016"
    values = np.choose(MAP, (0, 1, 2, 3, 150, 151))
    photo(root / "images" / "training" / "ADE_train_00000001.jpg", 1)
    mask(root / "annotations" / "training" / "ADE_train_00000001.png", values)
    photo(root / "images" / "validation" / "ADE_val_00000001.jpg", 2)
    mask(root / "annotations" / "validation" / "ADE_val_00000001.png", EMPTY)
    (root / "objectInfo150.txt").write_text(OBJECTS)
    (root / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\nADE_train_00000009 street\n")
    return root


def test_ade20k_scene_parsing(scene_parsing, tmp_path):
    report = import_ade20k(scene_parsing, tmp_path / "set", **EXACT)
    names = {1: "wall", 2: "building", 3: "screen, silver screen", 4: "flag"}
    expected = {"object": {name: value == MAP for value, name in names.items()}, "scene": {"airport_terminal-s": True}}
    assert_shows(tmp_path / "set", "training/ADE_train_00000001", expected)
    assert_shows(tmp_path / "set", "validation/ADE_val_00000001", {"object": {}})  # not annotated for scenes
    broden = Broden(tmp_path / "set")
    assert broden.label("building").synonyms == ("edifice",)
    assert reasons(report.dropped)["pixels: a value without a name; they count as unlabeled"] == (MAP == 5).sum()
    assert not any("void" in remark.reason for remark in report.changed)


@pytest.mark.parametrize("text", ["", "Idx\tName\n1\twall\n", OBJECTS + "x\n"])
def test_ade20k_tables_that_cannot_be_used(scene_parsing, tmp_path, text):
    (scene_parsing / "objectInfo150.txt").write_text(text)
    with pytest.raises(DatasetError, match="objectInfo150.txt: expected the columns"):
        import_ade20k(scene_parsing, tmp_path / "set")
    (scene_parsing / "objectInfo150.txt").unlink()
    with pytest.raises(DatasetError, match="objectInfo150.txt: the file is missing"):
        import_ade20k(scene_parsing, tmp_path / "set")


def test_the_columns_of_the_table_may_be_those_of_the_csv(scene_parsing, tmp_path):
    """Some copies have the column Stuff, and spaces instead of tabs."""
    (scene_parsing / "objectInfo150.txt").write_text("Idx Ratio Train Val Stuff Name\n1 0.15 11664 1172 1 wall\n2 0.1 6046 612 0 edifice\n")
    import_ade20k(scene_parsing, tmp_path / "set", **EXACT)
    assert {"wall", "edifice"} == set(shown(tmp_path / "set", "training/ADE_train_00000001")["object"])


CODES = np.choose(MAP, (0, 1, 255, 256, 2978, 3))
"""Class numbers with one and two bytes, and one without a name."""
PARTS = [np.where(MAP == 2, 774, 0), np.where(MAP == 2, 5, 0)]


def ade_png(path, codes):
    return colors(path, codes // 256 * 10, codes % 256, np.arange(6)[:, None] * np.ones(8))


@pytest.fixture
def full(tmp_path):
    root = tmp_path / "ADE20K_2021_17_01" / "images" / "ADE" / "training" / "urban" / "street"
    for i, name in enumerate(("ADE_train_1", "ADE_train_2", "ADE_train_3")):
        photo(root / f"{name}.jpg", i)
    ade_png(root / "ADE_train_1_seg.png", CODES)
    ade_png(root / "ADE_train_1_parts_1.png", PARTS[0])
    ade_png(root / "ADE_train_1_parts_2.png", PARTS[1])
    ade_png(root / "ADE_train_2_seg.png", EMPTY)
    ade_png(root / "ADE_train_3_seg.png", np.where(MAP == 1, 1, 0))
    ade_png(root / "ADE_train_3_parts_1.png", EMPTY)
    mask(root / "ADE_train_1" / "instance_000_ADE_train_1.png", MAP)  # the release has these; they are not read
    objects = [(1, "wall"), (255, "dog, domestic dog"), (256, "sky"), (2978, "window"), (774, "door"), (5, "knob")]
    entries = [{"id": i, "name_ndx": number, "name": name, "parts": {"part_level": 0}} for i, (number, name) in enumerate(objects)]
    value = json.dumps({"annotation": {"object": entries, "caf\u00e9": "x"}}, ensure_ascii=False)
    (root / "ADE_train_1.json").write_bytes(value.encode("latin-1"))
    return tmp_path / "ADE20K_2021_17_01"


STREET = "images/ADE/training/urban/street/"


def test_ade20k_full(full, tmp_path):
    report = import_ade20k(full, tmp_path / "set", **EXACT)
    names = {1: "wall", 255: "dog", 256: "sky", 2978: "window"}
    objects = {name: code == CODES for code, name in names.items()}
    parts = {"door": MAP == 2, "knob": MAP == 2}
    assert_shows(tmp_path / "set", f"{STREET}ADE_train_1", {"object": objects, "part": parts})
    assert_shows(tmp_path / "set", f"{STREET}ADE_train_2", {"object": {}})  # not annotated for parts
    assert_shows(tmp_path / "set", f"{STREET}ADE_train_3", {"object": {"wall": MAP == 1}, "part": {}})  # annotated, without parts
    assert reasons(report.dropped)["pixels: a value without a name; they count as unlabeled"] == (MAP == 5).sum()
    assert Broden(tmp_path / "set").label("dog").synonyms == ("domestic dog",)
    assert validate(tmp_path / "set") == []


def test_ade20k_full_with_names(full, tmp_path):
    for path in full.rglob("*.json"):
        path.unlink()
    with pytest.raises(DatasetError, match="give the names"):
        import_ade20k(full, tmp_path / "set")
    names = [f"class {number}" for number in range(1, 3000)]
    import_ade20k(full, tmp_path / "set", names=names, **EXACT)
    found = shown(tmp_path / "set", f"{STREET}ADE_train_1")["object"]
    assert set(found) == {"class 1", "class 255", "class 256", "class 2978", "class 3"}


def test_ade20k_full_with_the_index_of_matlab(full, tmp_path):
    """The release of 2016: the position of a name, from 1, is the number of the class."""
    savemat = pytest.importorskip("scipy.io", reason="scipy is not installed").savemat
    for path in full.rglob("*.json"):
        path.unlink()
    names = np.array([f"class {number}, other name" for number in range(1, 3000)], object)
    savemat(full / "index_ade20k.mat", {"index": {"filename": np.array(["a.jpg"], object), "objectnames": names}})
    import_ade20k(full, tmp_path / "set", **EXACT)
    found = shown(tmp_path / "set", f"{STREET}ADE_train_1")["object"]
    assert set(found) == {"class 1", "class 255", "class 256", "class 2978", "class 3"}
    np.testing.assert_array_equal(found["class 2978"], CODES == 2978)
    (full / "index_ade20k.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    with pytest.raises(DatasetError, match="cannot be read as the index"):
        import_ade20k(full, tmp_path / "other", names=full / "index_ade20k.mat")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: colors(root / "ADE_train_1_seg.png", CODES // 256 * 10 + 3, CODES % 256), "red is not a multiple of 10"),
        (lambda root: mask(root / "ADE_train_1_seg.png", MAP), "no red, green and blue"),
        (lambda root: ade_png(root / "ADE_train_1_parts_1.png", PARTS[0]).write_bytes(b"x"), "cannot be read"),
        (lambda root: colors(root / "ADE_train_1_parts_1.png", EMPTY.T), "parts of different sizes"),
        (lambda root: (root / "ADE_train_1.jpg").unlink(), "a mask without an image"),
    ],
)
def test_a_bad_file_of_ade20k_drops_its_image_only(full, tmp_path, damage, reason):
    damage(full / STREET)
    report = import_ade20k(full, tmp_path / "set", **EXACT)
    assert rows(tmp_path / "set") == [f"{STREET}ADE_train_2.jpg", f"{STREET}ADE_train_3.jpg"]
    assert any(remark.what == "images" and reason in remark.reason for remark in report.dropped), report.dropped


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"annotation": {"object": [{"name_ndx": 1}]}}', "[" * 100_000])
def test_descriptions_of_ade20k_that_cannot_be_read_are_reported(full, tmp_path, text):
    (full / STREET / "ADE_train_2.json").write_text(text)
    report = import_ade20k(full, tmp_path / "set", **EXACT)
    assert reasons(report.dropped)["files of names: it cannot be read as the description of an image"] == 1


def test_a_folder_that_is_not_ade20k(tmp_path):
    photo(tmp_path / "in" / "a.png")
    with pytest.raises(DatasetError, match="neither annotations/ nor"):
        import_ade20k(tmp_path / "in", tmp_path / "set")


# -- Hugging Face --------------------------------------------------------------------------------------------------------------


def picture(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)


def encoded(path):
    return path.read_bytes()


def test_rows_of_every_kind(tmp_path):
    file, png = photo(tmp_path / "in" / "a.jpg", 5), mask(tmp_path / "in" / "m.png", MAP)
    sources = [
        {"image": picture(0), "label": MAP},
        {"image": Image.fromarray(picture(1)), "label": Image.fromarray(MAP.astype(np.uint8))},
        {"image": str(file), "label": str(png)},
        {"image": {"bytes": encoded(file), "path": None}, "label": {"bytes": encoded(png), "path": "m.png"}},
        {"image": {"bytes": None, "path": str(file)}, "label": MAP[..., None].tolist()},
        {"image": Image.fromarray(picture(2)).convert("L"), "label": MAP[None].astype(np.int64)},
        {"image": Image.open(file), "label": Image.open(png)},
    ]
    report = import_hugging_face(sources, tmp_path / "set", id2label={str(value): name for value, name in NAMES.items()}, **EXACT)
    assert report.images == len(sources) == len(Broden(tmp_path / "set"))
    for index in range(len(sources)):
        assert_shows(tmp_path / "set", f"{index:08}", {"object": {NAMES[value]: value == MAP for value in NAMES}})
    broden = Broden(tmp_path / "set")
    first = [row.image for row in broden.rows].index("00000000.png")
    np.testing.assert_array_equal(np.asarray(broden.image(first)), picture(0))  # without loss
    assert (tmp_path / "set" / "images" / "00000002.jpg").read_bytes() == encoded(file)


def test_reduced_labels(tmp_path):
    """The masks hold id + 1; the names are by id."""
    rows_ = [{"image": picture(), "annotation": MAP, "id": "x/1"}, {"image": picture(1), "annotation": EMPTY, "id": "x/1"}]
    report = import_hugging_face(rows_, tmp_path / "set", id2label=["wall", "building", "sky", "floor"], reduce_labels=True, **EXACT)
    names = ("wall", "building", "sky", "floor")
    assert_shows(tmp_path / "set", "x/1", {"object": {name: value == MAP for value, name in enumerate(names, 1)}})
    assert_shows(tmp_path / "set", "x/1-1", {"object": {}})
    assert next(remark for remark in report.changed if "void" in remark.reason).count == (MAP == 0).sum() + 48
    assert reasons(report.dropped)["pixels: a value without a name; they count as unlabeled"] == (MAP == 5).sum()


def test_reduced_labels_beyond_void_are_reported(tmp_path):
    names = {0: "wall", 254: "lost"}
    report = import_hugging_face([{"image": picture(), "label": MAP}], tmp_path / "set", id2label=names, reduce_labels=True)
    assert reasons(report.dropped)["labels: reduce_labels makes its value void"] == 1


def test_streams_and_splits(tmp_path):
    def stream():
        for seed in range(1000):
            yield {"pixel_values": picture(seed), "mask": MAP}

    path = write_json(tmp_path / "id2label.json", {str(value): name for value, name in NAMES.items()})
    calls = []
    options = {"id2label": path, "limit": 3, "progress": lambda done, total: calls.append((done, total)), **EXACT}
    assert import_hugging_face(stream(), tmp_path / "set", **options).images == 3
    assert calls == [(1, 3), (2, 3), (3, 3)]
    sets = {"train": [], "validation": [{"image": picture(), "label": MAP}]}
    assert import_hugging_face(sets, tmp_path / "val", split="validation", **options).images == 1
    for none in (3, None, {"train": 3}):
        with pytest.raises(DatasetError, match="expected a data set or another list of rows, got (int|NoneType)"):
            import_hugging_face(none, tmp_path / "other", split="train" if isinstance(none, dict) else None, **options)
    for split in (None, "test"):
        with pytest.raises(DatasetError, match="train, validation"):
            import_hugging_face(sets, tmp_path / "other", split=split, **options)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": picture(), "label": MAP.T}, "different shapes"),
        ({"image": picture(), "label": MAP.astype(float)}, "not an array of integers"),
        ({"image": picture(), "label": np.dstack([MAP] * 3)}, "not an array of integers"),
        ({"image": picture(), "label": None}, "not an array of integers"),
        ({"image": picture().astype(float), "label": MAP}, "not an array of uint8"),
        ({"image": {"bytes": b"x"}, "label": MAP}, "image cannot be read"),
        ({"image": None, "label": MAP}, "not an array of uint8"),
        ({"image": "/nowhere.png", "label": MAP}, "image is missing"),
        ({"image": picture(), "label": {"bytes": b"x"}}, "mask cannot be read"),
        ({"image": picture(), "label": Image.new("RGB", (8, 6), (1, 2, 3))}, "colors"),
        ({"image": Image.fromarray(np.zeros((6, 8), np.float32)), "label": MAP}, "image cannot be read"),
    ],
)
def test_a_bad_row_is_dropped(tmp_path, row, reason):
    report = import_hugging_face([row, {"image": picture(), "label": MAP}], tmp_path / "set", id2label=NAMES, **EXACT)
    assert rows(tmp_path / "set") == ["00000001.png"]
    assert any(remark.what == "images" and reason in remark.reason for remark in report.dropped), report.dropped


@pytest.mark.parametrize(
    ("row", "options", "what"),
    [
        ({"image": picture(), "seg": MAP}, {}, "which column is the label.*--label-column"),
        ({"image": picture(), "label": MAP, "mask": MAP}, {}, "label and mask may be it"),
        ({"image": picture(), "label": MAP}, {"image_column": "picture"}, "no column 'picture'"),
        ((picture(), MAP), {}, "expected a dict"),
    ],
)
def test_columns_that_are_not_there(tmp_path, row, options, what):
    with pytest.raises(DatasetError, match=what):
        import_hugging_face([row], tmp_path / "set", id2label=NAMES, **options)


@pytest.mark.slow("imports datasets, if it is installed")
@pytest.mark.filterwarnings("ignore")  # those of datasets and its dependencies
def test_a_folder_saved_to_disk(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    columns = {"image": [Image.fromarray(picture())], "label": [Image.fromarray(MAP.astype(np.uint8))]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features)}).save_to_disk(tmp_path / "saved")
    import_hugging_face(tmp_path / "saved", tmp_path / "set", id2label=NAMES, split="train", **EXACT)
    assert_shows(tmp_path / "set", "00000000", {"object": {NAMES[value]: value == MAP for value in NAMES}})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="save_to_disk"):
        import_hugging_face(tmp_path / "empty", tmp_path / "other", id2label=NAMES)
