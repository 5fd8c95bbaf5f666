"""COCO instances and panoptic sets: every pixel, every trap, every kind of damage; and a dissection of such a set by hand."""

import copy
import json

import numpy as np
import pytest
import torch
from import_sets import EXACT, assert_shows, colors, drawn, photo, reasons, rows, shown, write_json
from PIL import Image
from torch import nn

from torchprobe.datasets import Broden, DatasetError, import_coco, import_coco_panoptic, validate
from torchprobe.dissection import dissect

CATEGORIES = [
    {"id": 90, "name": "cat", "supercategory": "animal"},
    {"id": 7, "name": "dog", "supercategory": "animal"},
    {"id": 1000, "name": "person", "supercategory": "person"},
    {"id": 12, "name": "mouse", "supercategory": "animal"},
    {"id": 74, "name": "mouse", "supercategory": "electronic"},
    {"id": 3, "name": "unused", "supercategory": "animal"},
]
CAT = drawn("........ .111.... .111.... ........ ........ ........")
DOG = drawn("........ ........ ..11.... ..11.... ........ ........")
CROWD = drawn("........ ........ ...111.. ...111.. ...111.. ........")
CORNERS = drawn("......11 ......11 ........ ........ ........ 1.......")


def box(left, top, right, bottom):
    return [[left, top, right, top, right, bottom, left, bottom]]


def instances():
    """One of everything: images out of order, overlaps, both kinds of run lengths, a crowd, an image without objects."""
    annotations = [
        {"id": 1, "image_id": 10, "category_id": 90, "segmentation": box(1, 1, 4, 3), "iscrowd": 0},
        {"id": 2, "image_id": 3, "category_id": 74, "segmentation": {"size": [6, 8], "counts": "51n01VO00"}},
        {"id": 3, "image_id": 10, "category_id": 7, "segmentation": {"size": [6, 8], "counts": [14, 2, 4, 2, 26]}, "iscrowd": 0},
        {"id": 4, "image_id": 10, "category_id": 1000, "segmentation": {"size": [6, 8], "counts": "d033000:"}, "iscrowd": 1},
        {"id": 5, "image_id": 3, "category_id": 12, "segmentation": [*box(0, 0, 1, 1), *box(7, 5, 12, 12)], "iscrowd": 0},
        {"id": 6, "image_id": 3, "category_id": 12, "segmentation": box(0, 0, 2, 1), "iscrowd": 0},
    ]
    images = [
        {"id": 10, "file_name": "a.png", "height": 6, "width": 8},
        {"id": 3, "file_name": "sub folder/é 2.jpg", "height": 6, "width": 8},
        {"id": 4, "file_name": "nothing.png", "height": 6, "width": 8},
    ]
    return {"info": {"year": 2017}, "annotations": annotations, "images": images, "categories": copy.deepcopy(CATEGORIES)}


@pytest.fixture
def coco(tmp_path):
    """Writes a file, and the images that it lists; imports it."""

    def call(value, **options):
        for seed, image in enumerate(instances()["images"]):
            photo(tmp_path / "photos" / image["file_name"], seed)
        path = write_json(tmp_path / "instances.json", value)
        return import_coco(path, tmp_path / "photos", tmp_path / "set", **{**EXACT, **options})

    call.root, call.photos = tmp_path / "set", tmp_path / "photos"
    return call


# -- instances -------------------------------------------------------------------------------------------------------------


def test_every_pixel_of_every_label(coco):
    report = coco(instances())
    assert rows(coco.root) == ["a.png", "nothing.png", "sub folder/é 2.jpg"]
    assert_shows(coco.root, "a", {"object": {"cat": CAT, "dog": DOG, "person": CROWD}})
    mouse = drawn("11...... ........ ........ ........ ........ .......1")
    assert_shows(coco.root, "sub folder/é 2", {"object": {"mouse": mouse, "mouse (74)": CORNERS}})
    assert_shows(coco.root, "nothing", {"object": {}})  # annotated, and empty
    assert validate(coco.root) == []
    assert (report.images, report.labels, report.empty, report.pixels) == (3, 5, 1, 3 * 48)
    assert reasons(report.dropped) == {"labels: no pixel in any image": 1}
    assert report.dropped[0].examples == ["unused"]
    assert [(remark.what, remark.count, remark.examples) for remark in report.changed] == [
        ("labels", 1, ["mouse (74)"]),
        ("annotations", 1, ["annotation 4"]),
    ]
    assert json.loads((coco.root / "import.json").read_text()) == json.loads(json.dumps(report.summary()))


def test_images_are_copied_byte_by_byte(coco):
    coco(instances())
    for image in instances()["images"]:
        name = image["file_name"]
        assert (coco.root / "images" / name).read_bytes() == (coco.photos / name).read_bytes()


def test_order_of_the_file_and_of_the_lists_does_not_matter(coco, tmp_path):
    coco(instances())
    value = instances()
    value["annotations"].reverse()
    import_coco(
        write_json(tmp_path / "b.json", {key: value[key] for key in ("categories", "images", "annotations")}),
        coco.photos,
        tmp_path / "other",
        **EXACT,
    )
    for image in ("a", "nothing", "sub folder/é 2"):
        assert_shows(tmp_path / "other", image, shown(coco.root, image))


def test_crowds_can_be_dropped(coco):
    report = coco(instances(), crowd="drop")
    assert_shows(coco.root, "a", {"object": {"cat": CAT, "dog": DOG}})
    assert any("crowd" in remark.reason and remark.count == 1 for remark in report.dropped)


def test_supercategories(coco):
    report = coco(instances(), supercategories=True)
    found = shown(coco.root, "a")["supercategory"]
    assert set(found) == {"animal"}  # "person" is the same as its only category
    np.testing.assert_array_equal(found["animal"], (CAT | DOG).astype(bool))
    assert set(shown(coco.root, "sub folder/é 2")["supercategory"]) == {"animal", "electronic"}
    assert shown(coco.root, "nothing") == {"object": {}, "supercategory": {}}
    assert reasons(report.dropped)["supercategories: the same as its only category"] == 1


def test_a_supercategory_with_the_name_of_a_label_stays_apart(coco):
    value = instances()
    value["categories"] = [{**category, "supercategory": "cat"} for category in CATEGORIES]
    coco(value, supercategories=True)
    assert set(shown(coco.root, "a")["supercategory"]) == {"cat (all)"}
    assert_shows(coco.root, "a", {"object": {"cat": CAT, "dog": DOG, "person": CROWD}, "supercategory": {"cat (all)": CAT | DOG | CROWD}})


def test_ids_may_be_text(coco):
    value = instances()
    for image in value["images"]:
        image["id"] = f"i{image['id']}"
    for annotation in value["annotations"]:
        annotation["image_id"] = f"i{annotation['image_id']}"
    coco(value)
    assert_shows(coco.root, "a", {"object": {"cat": CAT, "dog": DOG, "person": CROWD}})


def test_names_of_labels_that_fit_two_digits_of_red(coco):
    """More than 255 labels: numbers need two bytes."""
    value = instances()
    value["categories"] = [{"id": 5 * i, "name": f"label {i}"} for i in range(400)]
    value["annotations"] = [
        {"id": i, "image_id": 10, "category_id": 5 * i, "segmentation": {"size": [6, 8], "counts": [i % 48, 1, 47 - i % 48]}}
        for i in range(400)
    ]
    coco(value)
    found = shown(coco.root, "a")["object"]
    assert len(found) == 400
    assert all(found[f"label {i}"].T.ravel().nonzero()[0].tolist() == [i % 48] for i in range(400))


def test_label_maps_have_the_size_of_broden_by_default(coco):
    coco(instances(), segmentation_size=112)
    row = Broden(coco.root).rows[0]
    assert (row.height, row.width, row.label_height, row.label_width) == (6, 8, 112, 112)


def test_labels_that_vanish_in_small_maps_are_reported(coco):
    report = coco(instances(), segmentation_size=(1, 1))
    vanished = [remark for remark in report.dropped if "smaller than a pixel" in remark.reason]
    assert [remark.what for remark in vanished] == ["labels of an image"]
    center = {label for image in ("a", "sub folder/é 2") for label in shown(coco.root, image)["object"]}
    assert vanished[0].count == 5 - len(center) and center == {"person"}  # the pixel (3, 4)


def test_a_limit_takes_always_the_same_images(coco, tmp_path):
    report = coco(instances(), limit=2)
    first = rows(coco.root)
    assert len(first) == 2 and reasons(report.dropped)["images: beyond the limit"] == 1
    coco(instances(), limit=2, overwrite=True)
    assert rows(coco.root) == first


def test_resized_copies_of_the_images_are_accepted_and_said(coco, tmp_path):
    value = instances()
    photo(tmp_path / "photos" / "half.png", size=(3, 4))
    value["images"][0]["file_name"] = "half.png"
    report = coco(value)
    assert_shows(coco.root, "half", {"object": {"cat": CAT, "dog": DOG, "person": CROWD}})
    assert any("another size than the image, in the same shape" in remark.reason for remark in report.changed)


def test_federated_annotations_are_said(coco):
    """LVIS names its images by their addresses."""
    value = instances()
    value["images"][0]["neg_category_ids"] = [7]
    value["images"][1] |= {"coco_url": "http://images.cocodataset.org/sub folder/é 2.jpg"}
    del value["images"][1]["file_name"]
    report = coco(value)
    assert rows(coco.root) == ["a.png", "nothing.png", "sub folder/é 2.jpg"]
    assert any("LVIS" in remark.reason and remark.count == 1 for remark in report.changed)


# -- damage ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"segmentation": None}, "a box is not a mask"),
        ({"segmentation": []}, "empty segmentation"),
        ({"segmentation": [[1, 1, 2]]}, "list of x and y"),
        ({"segmentation": box(50, 50, 60, 60)}, "no pixel inside the image"),
        ({"segmentation": {"size": [8, 6], "counts": [48]}}, "another size"),
        ({"segmentation": {"size": [6, 8], "counts": [5]}}, "cover the image"),
        ({"category_id": 4}, "category that the file does not list"),
        ({"category_id": None}, "category that the file does not list"),
        ({"category_id": [90]}, "category that the file does not list"),
        ({"image_id": 999}, "image that the file does not list"),
        ({"image_id": None}, "no valid image_id"),
        ({"image_id": {}}, "no valid image_id"),
    ],
)
def test_a_bad_annotation_is_dropped_and_the_others_stay(coco, change, reason):
    value = instances()
    value["annotations"][2] |= change
    report = coco(value)
    assert_shows(coco.root, "a", {"object": {"cat": CAT, "person": CROWD}})
    dropped = [remark for remark in report.dropped if remark.what == "annotations"]
    assert [remark.count for remark in dropped] == [1] and reason in dropped[0].reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file_name": "../../x.png"}, "leaves the folder"),
        ({"file_name": "/etc/passwd"}, "leaves the folder"),
        ({"file_name": "C:\\x.png"}, "leaves the folder"),
        ({"file_name": "a\u0000.png"}, "leaves the folder"),
        ({"file_name": "link.png"}, "leaves the folder"),
        ({"file_name": "missing.png"}, "image is missing"),
        ({"file_name": "nothing.png"}, "the same file as another image"),
        ({"file_name": "truncated.png"}, "image cannot be used"),
        ({"file_name": "text.png"}, "image cannot be read"),
        ({"file_name": "turned.png"}, "different shapes"),
        ({"file_name": None}, "no file name"),
        ({"file_name": 5}, "no file name"),
        ({"height": 0}, "impossible height"),
        ({"height": 6.5}, "impossible height"),
        ({"height": 1 << 30}, "impossible height"),
        ({"id": None}, "no valid id"),
        ({"id": 3}, "the id of another image"),
    ],
)
def test_a_bad_image_is_dropped_and_the_others_stay(coco, change, reason, tmp_path):
    value = instances()
    value["images"].append({**value["images"].pop(0), **change})  # the last one, so that it is the second of two with one name
    photos = tmp_path / "photos"
    whole = photo(photos / "whole.png").read_bytes()
    (photos / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (photos / "text.png").write_text("not an image")
    photo(photos / "turned.png", size=(8, 6))
    photo(tmp_path / "outside.png")
    (photos / "link.png").symlink_to(tmp_path / "outside.png")
    report = coco(value)
    assert rows(coco.root) == ["nothing.png", "sub folder/é 2.jpg"]
    assert any(remark.what == "images" and reason in remark.reason for remark in report.dropped), report.dropped


def test_more_masks_than_memory_should_hold_drop_the_image(coco, monkeypatch):
    monkeypatch.setattr("torchprobe.datasets.importers.coco.MOST_MEMORY", 100)
    report = coco(instances())
    assert rows(coco.root) == ["nothing.png", "sub folder/é 2.jpg"]  # of two labels each at most
    assert reasons(report.dropped)["images: more labels than memory should hold for an image of this size"] == 1


def test_names_from_windows_are_read(coco):
    value = instances()
    value["images"][1]["file_name"] = "sub folder\\é 2.jpg"
    value["images"][0]["file_name"] = "./a.png"
    coco(value)
    assert rows(coco.root) == ["a.png", "nothing.png", "sub folder/é 2.jpg"]


def test_names_that_are_taken_or_impossible_are_changed_and_said(coco, tmp_path):
    value = instances()
    names = ["b;c.png", "a.jpg", "a_object.png", "A.png", "long" * 50 + ".png"]
    for i, name in enumerate(names):
        photo(tmp_path / "photos" / name, i)
        value["images"].append({"id": 100 + i, "file_name": name, "height": 6, "width": 8})
    report = coco(value)
    assert report.images == 8
    assert set(rows(coco.root)) >= {"a.png", "b_c.png", "a-2.jpg", "a_object-2.png", "A-3.png"}
    assert reasons(report.changed)["images: renamed, because the name is taken or impossible"] == 5
    assert validate(coco.root) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"categories": []}, "categories is missing or empty"),
        ({"images": []}, "images is missing or empty"),
        ({"images": {}}, "not a list"),
        ({"categories": [{"name": "cat"}]}, "no valid id"),
        ({"categories": [{"id": 90}]}, "cannot be the name of a label"),
        ({"categories": [{"id": 90, "name": "a\nb"}]}, "cannot be the name of a label"),
        ({"categories": [{"id": 90, "name": "cat"}, {"id": 90, "name": "dog"}]}, "both 'cat' and 'dog'"),
        ({"categories": ["cat"]}, "no category"),
        ({"annotations": []}, "none of the 3 images has a label"),
    ],
)
def test_files_that_cannot_be_used_leave_nothing(coco, change, what, tmp_path):
    with pytest.raises(DatasetError, match=what):
        coco(instances() | change)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["instances.json", "photos"]


WORTHLESS = [None, 0, -1, 1.5, 1e400, 10**30, "", "../a", [], {}, [[]], True, [1, 2, 3], "\ud800", "\0", {"size": [6, 8], "counts": "zz"}]


def places(value, path=()):
    """The path to every value in nested lists and objects."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], (*path, key))


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_is_an_error_or_a_valid_set(coco, seed, tmp_path):
    rng, value = np.random.default_rng(seed), instances()
    for _ in range(rng.integers(1, 6)):
        paths = list(places(value))
        *way, last = paths[rng.integers(len(paths))]
        inner = value
        for key in way:
            inner = inner[key]
        inner[last] = copy.deepcopy(WORTHLESS[rng.integers(len(WORTHLESS))])
    try:
        coco(value | {"info": 1}, supercategories=seed % 2 == 1)
    except DatasetError:
        assert sorted(path.name for path in tmp_path.iterdir()) == ["instances.json", "photos"]
    else:
        assert validate(coco.root) == []


def test_elements_that_are_no_objects_are_dropped(coco):
    value = instances()
    value["annotations"].insert(0, 5)
    value["images"].insert(0, [1])
    report = coco(value)
    assert reasons(report.dropped)["annotations: not an object"] == reasons(report.dropped)["images: not an object"] == 1
    assert report.images == 3


def test_orientations_of_photos_are_said(coco, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.zeros((6, 8, 3), np.uint8))
    (tmp_path / "photos").mkdir()
    image.save(tmp_path / "photos" / "turned.jpg", exif=exif)
    value = instances()
    value["images"][0]["file_name"] = "turned.jpg"
    report = coco(value)
    assert any("EXIF" in remark.reason and remark.examples == ["turned.jpg"] for remark in report.changed)


# -- panoptic --------------------------------------------------------------------------------------------------------------

SEGMENTS = drawn("11112222 11112222 1111.... 33334444 33334444 33334455")
IDS = np.array([0, 300, 65536 * 3 + 7, 255, 4, 999])
"""The id of each digit; 999 is not in the file."""


def panoptic():
    segments = [
        {"id": 300, "category_id": 90, "iscrowd": 0},
        {"id": 65536 * 3 + 7, "category_id": 7, "iscrowd": 1},
        {"id": 255, "category_id": 90, "iscrowd": 0},
        {"id": 4, "category_id": 12345, "iscrowd": 0},
        {"id": 5, "category_id": 1000, "iscrowd": 0},
    ]
    return {
        "images": [{"id": 10, "file_name": "a.png", "height": 6, "width": 8}, {"id": 3, "file_name": "nothing.png"}],
        "annotations": [
            {"image_id": 10, "file_name": "a.png", "segments_info": segments},
            {"image_id": 3, "file_name": "b.png", "segments_info": []},
        ],
        "categories": copy.deepcopy(CATEGORIES),
    }


@pytest.fixture
def panoptic_set(tmp_path):
    ids = IDS[SEGMENTS]

    def call(value, **options):
        for name in ("a", "nothing"):
            photo(tmp_path / "photos" / f"{name}.png")
        colors(tmp_path / "png" / "a.png", ids % 256, ids // 256 % 256, ids // 65536)
        if not (tmp_path / "png" / "b.png").exists():
            colors(tmp_path / "png" / "b.png", np.zeros((6, 8)))
        path = write_json(tmp_path / "panoptic.json", value)
        return import_coco_panoptic(path, tmp_path / "png", tmp_path / "photos", tmp_path / "set", **{**EXACT, **options})

    call.root, call.png = tmp_path / "set", tmp_path / "png"
    return call


def test_panoptic_segments(panoptic_set):
    report = panoptic_set(panoptic())
    cat, dog = np.isin(SEGMENTS, (1, 3)), SEGMENTS == 2
    assert_shows(panoptic_set.root, "a", {"object": {"cat": cat, "dog": dog}})
    assert_shows(panoptic_set.root, "nothing", {"object": {}})
    dropped, changed = reasons(report.dropped), reasons(report.changed)
    assert dropped["segments: a category that the file does not list"] == 1
    assert dropped["segments: no pixel in the PNG file"] == 1
    assert dropped["pixels: a segment that the file does not list; they count as unlabeled"] == 2
    assert dropped["labels: no pixel in any image"] == 4
    assert next(count for reason, count in changed.items() if "void" in reason) == 4 + 48
    assert next(count for reason, count in changed.items() if "crowd" in reason) == 1


def test_panoptic_supercategories_and_crowds(panoptic_set):
    panoptic_set(panoptic(), supercategories=True, crowd="drop")
    cat = np.isin(SEGMENTS, (1, 3))
    assert_shows(panoptic_set.root, "a", {"object": {"cat": cat}, "supercategory": {"animal": cat}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file_name": "../b.png"}, "leaves the folder"),
        ({"file_name": "c.png"}, "the mask is missing"),
        ({"file_name": "gray.png"}, "no red, green and blue"),
        ({"file_name": "truncated.png"}, "the mask cannot be read"),
        ({"file_name": "turned.png"}, "different shapes"),
        ({"image_id": 7}, "no annotation of the image"),
        ({"segments_info": None}, "no annotation of the image"),
    ],
)
def test_a_bad_panoptic_annotation_drops_the_image(panoptic_set, change, reason):
    value = panoptic()
    value["annotations"][1] |= change
    whole = colors(panoptic_set.png / "whole.png", np.zeros((6, 8))).read_bytes()
    (panoptic_set.png / "truncated.png").write_bytes(whole[:-20])
    colors(panoptic_set.png / "turned.png", np.zeros((8, 6)))
    Image.new("L", (8, 6)).save(panoptic_set.png / "gray.png")
    report = panoptic_set(value)
    assert rows(panoptic_set.root) == ["a.png"]
    assert any(remark.what == "images" and reason in remark.reason for remark in report.dropped), report.dropped


# -- a dissection of such a set -----------------------------------------------------------------------------------------------


class Red(nn.Module):
    """One unit that is the mean red of 4 × 4 pixels, and one that is its opposite."""

    def __init__(self):
        super().__init__()
        self.mean = nn.AvgPool2d(4)

    def forward(self, x):
        return self.mean(torch.cat([x[:, :1], -x[:, :1]], 1))


def test_a_planted_unit_gets_the_iou_that_numpy_computes(tmp_path):
    """Red rectangles, some of them in the file as polygons, others as run lengths, with a second label on top and images without any."""
    rng, size, n = np.random.default_rng(0), 32, 24
    truth = np.zeros((n, size, size), bool)
    corner = np.zeros_like(truth)
    pixels = rng.integers(0, 60, (n, size, size, 3)).astype(np.uint8)
    images, annotations = [], []
    for i in range(n):
        images.append({"id": 100 + 7 * i, "file_name": f"{i}.png", "height": size, "width": size})
        if i % 4 == 3:
            Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
            continue
        (top, left), (height, width) = rng.integers(0, 16, 2), rng.integers(5, 15, 2)
        truth[i, top : top + height, left : left + width] = True
        corner[i, top : top + 3, left : left + 3] = True
        pixels[i][truth[i]] = (230, 20, 20)
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
        flat = truth[i].T.ravel()
        counts = np.diff([0, *np.flatnonzero(np.diff(flat, prepend=False)), flat.size]).tolist()
        polygon = box(int(left), int(top), int(left + width), int(top + height))
        shape = polygon if i % 2 else {"size": [size, size], "counts": counts}
        annotations += [
            {"id": 2 * i, "image_id": 100 + 7 * i, "category_id": 5, "segmentation": shape, "iscrowd": 0},
            {
                "id": 2 * i + 1,
                "image_id": 100 + 7 * i,
                "category_id": 900,
                "segmentation": box(int(left), int(top), int(left + 3), int(top + 3)),
            },
        ]
    categories = [{"id": 5, "name": "red"}, {"id": 900, "name": "corner"}]
    path = write_json(tmp_path / "set.json", {"images": images, "annotations": annotations, "categories": categories})
    import_coco(path, tmp_path, tmp_path.parent / f"{tmp_path.name}-set", segmentation_size=size)
    broden = Broden(tmp_path.parent / f"{tmp_path.name}-set")
    for i in range(n):
        found = shown(broden.root, str(i))["object"]
        np.testing.assert_array_equal(found.get("red", np.zeros_like(truth[i])), truth[i])

    def to_tensor(image):
        return torch.from_numpy(np.array(image)).movedim(2, 0) / 255

    layer = dissect(Red(), "mean", broden, preprocess=to_tensor, score="iou", quantile=0.1, mode="global")["mean"]
    means = (pixels[..., 0] / 255).reshape(n, 8, 4, 8, 4).mean((2, 4))  # the reference, in float64
    across = halfway(8, size)
    maps = np.stack([across @ means @ across.T, -(across @ means @ across.T)], 1)
    active = maps > np.asarray(layer.thresholds, np.float64).reshape(1, 2, 1, 1)
    names = [label.name for label in layer.labels]
    for label, shape in (("red", truth), ("corner", corner)):
        for unit in range(2):
            expected = (active[:, unit] & shape).sum() / (active[:, unit] | shape).sum()
            assert float(layer.iou[unit, names.index(label)]) == pytest.approx(expected, abs=1e-12)
    assert float(layer.iou[0, names.index("red")]) > 0.5 > 0.1 > float(layer.iou[1].max())


def halfway(old, new):
    """The matrix of bilinear resizing with half-pixel centers."""
    at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.minimum(at.astype(int), old - 2)
    matrix = np.zeros((new, old))
    matrix[np.arange(new), low], matrix[np.arange(new), low + 1] = 1 - (at - low), at - low
    return matrix
