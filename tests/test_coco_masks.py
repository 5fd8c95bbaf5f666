"""The pixels of COCO's polygons and run lengths: hand-made, and against COCO's own API."""

import numpy as np
import pytest
from import_sets import drawn

from torchprobe.datasets.images import DatasetError
from torchprobe.datasets.importers import json_arrays
from torchprobe.datasets.importers.coco_masks import LONGEST, decode_counts, draw, polygon_mask
from torchprobe.datasets.importers.planes import stack
from torchprobe.datasets.importers.report import Unusable


def pixels(mask):
    return mask.astype(int).tolist()


# -- polygons --------------------------------------------------------------------------------------------------------------

# The expected pixels were computed with pycocotools 2.0.11, so that this holds where it is not installed.
POLYGONS = {
    "a rectangle": ([1, 1, 4, 1, 4, 3, 1, 3], "........ .111.... .111.... ........ ........ ........"),
    "the other way around": ([1, 3, 4, 3, 4, 1, 1, 1], "........ .111.... .111.... ........ ........ ........"),
    "a triangle off the grid": ([1.5, 1.2, 4.6, 1, 4, 3.7], "........ ..11.... ...1.... ........ ........ ........"),
}


@pytest.mark.parametrize("name", POLYGONS)
def test_polygons_with_known_pixels(name):
    polygon, expected = POLYGONS[name]
    assert pixels(polygon_mask(polygon, 6, 8)) == drawn(expected).tolist()


def test_a_polygon_around_the_picture_covers_all_of_it_and_one_beside_it_nothing():
    assert polygon_mask([-5, -5, 20, -5, 20, 20, -5, 20], 6, 8).all()
    assert not polygon_mask([20, 1, 30, 1, 30, 3], 6, 8).any()
    assert not polygon_mask([-20, 1, -10, 1, -10, 3], 6, 8).any()
    half = polygon_mask([-5, -5, 4, -5, 4, 20, -5, 20], 6, 8)
    assert half[:, :4].all() and not half[:, 4:].any()


def test_polygons_are_united_and_one_that_crosses_itself_has_a_hole():
    two = draw([[0, 0, 2, 0, 2, 2, 0, 2], [1, 1, 3, 1, 3, 3, 1, 3]], 4, 4)
    assert pixels(two) == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    twice = [0, 0, 6, 0, 6, 6, 0, 6, 0, 0, 2, 2, 2, 4, 4, 4, 4, 2, 2, 2]
    assert not polygon_mask(twice, 6, 6)[2:4, 2:4].any() and polygon_mask(twice, 6, 6).sum() > 20


def hostile_polygons(kind: str, rng: np.random.Generator) -> tuple[list[float], int, int]:
    height, width = (int(side) for side in rng.integers(1, 60, 2))
    count = 2 * int(rng.integers(3, 14))
    if kind == "outside":
        return rng.uniform(-10, 70, count).tolist(), height, width
    if kind == "whole":
        return rng.integers(-5, 65, count).astype(float).tolist(), height, width
    if kind == "halves":
        return (rng.integers(-3, 130, count) / 2).tolist(), height, width
    if kind == "far, with a point twice":
        polygon = rng.uniform(-300, 300, count)
        polygon[2:4] = polygon[:2]
        return polygon.tolist(), height, width
    return np.round(rng.uniform(0, max(height, width), count), 2).tolist(), height, width


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools is older than numpy 2
@pytest.mark.parametrize("kind", ["inside", "outside", "whole", "halves", "far, with a point twice"])
def test_every_pixel_is_that_of_the_api(kind):
    api = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(len(kind))
    for _ in range(300):
        polygon, height, width = hostile_polygons(kind, rng)
        expected = api.decode(api.frPyObjects([polygon], height, width))[..., 0]
        np.testing.assert_array_equal(polygon_mask(polygon, height, width), expected.astype(bool), err_msg=f"{polygon}")


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, "no segmentation"),
        ("abc", "no segmentation"),
        ([], "empty"),
        ([[]], "fewer than 3 points"),
        ([[1, 1, 2, 2]], "fewer than 3 points"),
        ([[1, 1, 2, 2, 3]], "x and y"),
        ([1, 1, 4, 1, 4, 3], "x and y"),
        ([[1, 1, 4, 1, 4, "x"]], "list of numbers"),
        ([[[1, 1], [4, 1], [4, 3]]], "x and y"),
        ([[1, 1, 4, 1, 4, None]], "nan|list of numbers"),
        ([[1, 1, 4, 1, 4, float("nan")]], "nan"),
        ([[1, 1, 4, 1, float("inf"), 3]], "nan or inf"),
        ([[1, 1, 4, 1, 1e300, 3]], "far outside"),
        ([[1, 1, 4, 1, 10**400, 3]], "list of numbers"),
        ([[0, 0, 60_000, 0] * 100], "longer outline"),
    ],
)
def test_impossible_polygons_are_refused(segmentation, reason):
    with pytest.raises(Unusable, match=reason):
        draw(segmentation, 6, 8)
    assert LONGEST * 8 * 10 < 1 << 30  # the arrays of the longest outline fit


# -- run lengths -----------------------------------------------------------------------------------------------------------

SQUARE = drawn("........ ........ ...111.. ...111.. ...111.. ........")
CORNERS = drawn("......11 ......11 ........ ........ ........ 1.......")


@pytest.mark.parametrize(("text", "expected"), [("d033000:", SQUARE), ("51n01VO00", CORNERS)])  # by pycocotools 2.0.11
def test_run_lengths_with_known_pixels(text, expected):
    assert pixels(draw({"size": [6, 8], "counts": text}, 6, 8)) == expected.tolist()
    assert pixels(draw({"size": [6, 8], "counts": decode_counts(text, 48)}, 6, 8)) == expected.tolist()


def test_run_lengths_of_random_masks_are_those_of_the_api():
    api = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")
    rng = np.random.default_rng(0)
    for density in (0.001, 0.1, 0.5, 0.99):
        for _ in range(30):
            height, width = (int(side) for side in rng.integers(1, 200, 2))
            expected = rng.random((height, width)) < density
            counts = api.encode(np.asfortranarray(expected.astype(np.uint8)))["counts"].decode()
            np.testing.assert_array_equal(draw({"size": [height, width], "counts": counts}, height, width), expected)


@pytest.mark.parametrize(
    ("size", "counts", "reason"),
    [
        ([8, 6], [48], "another size"),
        (None, [48], "another size"),
        ([6, 8], [47], "cover the image exactly"),
        ([6, 8], [49], "whole numbers"),
        ([6, 8], [50, -2], "whole numbers"),
        ([6, 8], [24.0, 24.0], "whole numbers"),
        ([6, 8], [True] * 48, "whole numbers"),
        ([6, 8], None, "whole numbers"),
        ([6, 8], 48, "whole numbers"),
        ([6, 8], "d03300", "cover the image exactly"),
        ([6, 8], "d033000:é", "invalid characters"),
        ([6, 8], "d033000 ", "invalid characters"),
        ([6, 8], "d0330P", "middle of a number"),
        ([6, 8], "o" * 30, "invalid characters"),
        ([6, 8], "0" * 10_000, "cover the image exactly"),
    ],
)
def test_impossible_run_lengths_are_refused(size, counts, reason):
    with pytest.raises(Unusable, match=reason):
        draw({"size": size, "counts": counts}, 6, 8)


# -- planes ----------------------------------------------------------------------------------------------------------------


def test_planes_lose_nothing_and_share_where_they_can():
    rng = np.random.default_rng(0)
    for _ in range(30):
        masks = {int(n): rng.random((5, 7)) < rng.random() ** 2 for n in rng.choice(np.arange(1, 65_536), 9, replace=False)}
        planes = stack(masks, 5, 7)
        for number, mask in masks.items():
            np.testing.assert_array_equal((planes == number).any(0), mask)
        assert len(planes) <= max(1, len(masks))
    apart = {n: np.eye(5, dtype=bool)[[n - 1]].repeat(5, 0) for n in range(1, 6)}
    assert stack(apart, 5, 5).shape == (1, 5, 5)
    assert stack({}, 2, 3).tolist() == [[[0, 0, 0], [0, 0, 0]]]


def test_planes_beyond_memory_are_refused(monkeypatch):
    monkeypatch.setattr("torchprobe.datasets.importers.planes.MOST_VALUES", 100)
    with pytest.raises(Unusable, match="memory"):
        stack(dict.fromkeys(range(1, 6), np.ones((6, 6), bool)), 6, 6)


# -- JSON, element by element ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_elements_and_their_places(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_arrays, "CHUNK", chunk)
    path = tmp_path / "a.json"
    path.write_text(
        '\ufeff {"é😀": [1, {"images": 2}], "n": -12.5e3,\r\n "images" : [ {"é": "😀\\u00e9"}, [1],12345 , null], "a":[], "b":{}}', "utf-8"
    )
    found = list(json_arrays.elements(path, ["images", "a"]))
    assert [element.value for element in found] == [{"é": "😀é"}, [1], 12345, None]
    with open(path, "rb") as file:
        assert [json_arrays.read_element(file, start, size) for _, _, start, size in found] == [element.value for element in found]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"images": {}}', "not a list"),
        ('{"images": [{}, {"a": ', "byte"),
        ('{"images": [{} {}]}', "expected ,"),
        ('{"images": [{}', "expected ,"),
        ('{"images" [{}]}', "expected :"),
        ('{"images": [], 3: 4}', "byte"),
        ("{3: 4}", "expected a key, at byte"),
        ('{"images": [' + "[" * 100_000, "byte"),
        ('{"images": [' + "9" * 5000 + "]}", "byte"),
    ],
)
def test_damaged_files_are_refused_with_the_place(tmp_path, text, what):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=what):
        list(json_arrays.elements(path, ["images"]))


def test_files_that_are_not_text_are_refused(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"images": ["\xff\xfe"]}')
    with pytest.raises(DatasetError, match="UTF-8"):
        list(json_arrays.elements(path, ["images"]))
    with pytest.raises(DatasetError, match="cannot be read"):
        list(json_arrays.elements(tmp_path, ["images"]))
