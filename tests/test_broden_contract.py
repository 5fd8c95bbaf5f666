"""Broden folders: what counts as annotated, other indexes, what is left out, and what the writer refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from broden_sets import CATEGORIES, TrapSet, write_trap_set
from PIL import Image
from test_broden import assert_labels, edit

from torchprobe.datasets import Broden, BrodenWriter, DatasetError, validate
from torchprobe.datasets.broden.index import image_split


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> TrapSet:
    return write_trap_set(tmp_path_factory.mktemp("sets") / "broden", images=40)


@pytest.fixture
def trap(tmp_path) -> TrapSet:
    """A set that may be damaged."""
    return write_trap_set(tmp_path / "broden", images=16, seed=1)


# -- what is annotated -------------------------------------------------------------------------------------------------------


def test_empty_masks_are_annotations_and_empty_cells_are_not(tmp_path):
    black, ones = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), int)
    with BrodenWriter(tmp_path / "set", {"lesion": ["x"], "scene": ["a-s", "rare-s"]}, size=8, min_coverage=2) as writer:
        for name, labels in {
            "both": {"lesion": ones, "scene": "a-s"},
            "empty": {"lesion": ones * 0, "scene": []},
            "lesion alone": {"lesion": ones},
            "scene alone": {"scene": ["a-s"]},
            "rare": {"scene": ["rare-s"]},
            "planes": {"lesion": np.zeros((2, 8, 8), int)},
            "nothing": {},
        }.items():
            writer.add(name, black, labels)
    broden = Broden(tmp_path / "set")
    assert [label.name for label in broden.labels] == ["a-s", "x"] and validate(tmp_path / "set") == []
    found = {row.image[:-4]: annotated for row, annotated in zip(broden.rows, broden.annotated().tolist(), strict=True)}
    assert broden.categories == ("scene", "lesion") and found == {
        "both": [True, True], "empty": [True, True], "lesion alone": [False, True], "scene alone": [True, False],
        "rare": [True, False], "planes": [False, True],
    }  # fmt: skip
    presence = broden.presence()
    assert torch.equal(presence.annotated, broden.annotated())
    assert len(presence.images(1)) == len(presence.images(2)) == 2
    at = [row.image for row in broden.rows].index("empty.jpg")
    assert_labels(broden.image_labels(at), [("scene", np.zeros((1, 4, 4))), ("lesion", np.zeros((1, 4, 4)))])
    assert Broden(tmp_path / "set", categories=["lesion"]).annotated().all() and len(Broden(tmp_path / "set", categories=["lesion"])) == 4
    cached = Broden(tmp_path / "set").presence(tmp_path / "cache"), Broden(tmp_path / "set").presence(tmp_path / "cache")
    assert all(torch.equal(one.annotated, broden.annotated()) for one in cached)


def test_the_trap_set_says_what_is_annotated(pristine):
    found = Broden(pristine.root).annotated().tolist()
    assert found == [[any(not isinstance(e, int) or e for e in row.labels.get(c, [])) for c in CATEGORIES] for row in pristine.data_rows]


def test_rows_that_are_left_out_are_noted(trap):
    lines = (trap.root / "index.csv").read_text(encoding="utf-8").splitlines()
    left_out = [row for row in trap.rows if not row.has_data]
    numbers = [2 + trap.rows.index(row) for row in left_out]
    (note,) = validate(trap.root, notes=True)
    assert note.note and note.what.startswith(f"{len(numbers)} of {len(trap.rows)} rows are left out")
    assert note.what.endswith("lines " + ", ".join(map(str, numbers))) and str(note).startswith("Note: index.csv: ")
    kept = [line for at, line in enumerate(lines, 1) if at not in numbers]
    (trap.root / "index.csv").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert validate(trap.root, notes=True) == []


def test_a_set_without_images_says_why(tmp_path):
    from torchprobe.dissection import dissect

    model = torch.nn.Conv2d(3, 1, 1)
    with BrodenWriter(tmp_path / "set", {"object": ["a"], "scene": ["b"]}, size=8) as writer:
        for i in [i for i in range(30) if image_split(f"{i}.jpg") == "train"][:5]:
            writer.add(str(i), np.zeros((8, 8, 3), np.uint8), {"object": np.ones((8, 8), int)})
        writer.add("more", np.zeros((8, 8, 3), np.uint8), {"scene": "b"})
    assert image_split("more.jpg") == "train"
    broden = Broden(tmp_path / "set", split="val")
    assert len(broden) == 0
    with pytest.raises(DatasetError, match=r"index.csv: none of the \d rows belongs to the split 'val': use another split"):
        dissect(model, "", broden, preprocess=torch.tensor)
    index = tmp_path / "set" / "index.csv"
    index.write_text("".join(line for line in index.read_text().splitlines(keepends=True) if line.startswith(("image,", "more."))))
    with pytest.raises(DatasetError, match=r"index.csv: in none of the \d rows a label map or a label other than 0 is given for object"):
        Broden(tmp_path / "set", categories=["object"]).require_images()
    index.write_text(index.read_text().splitlines()[0] + "\n")
    with pytest.raises(DatasetError, match="the index has no rows"):
        Broden(tmp_path / "set").require_images()


# -- another index -----------------------------------------------------------------------------------------------------------


def test_another_index(trap, tmp_path):
    whole = Broden(trap.root)
    lines = (trap.root / "index.csv").read_text(encoding="utf-8").splitlines(keepends=True)
    (trap.root / "index_sm.csv").write_text("".join([lines[0], *lines[3:9]]), encoding="utf-8")
    small = Broden(trap.root, index="index_sm.csv")
    kept = [i for i, row in enumerate(whole.rows) if 4 <= row.line <= 9]
    assert [row.image for row in small.rows] == [whole.rows[i].image for i in kept] and small.labels == whole.labels
    cache = tmp_path / "presence.safetensors"
    assert len(whole.presence(cache)) != len(small.presence(cache)) == len(kept)  # each index makes its own
    assert torch.equal(small.presence().number, whole.presence().take(kept).number)
    assert validate(trap.root, index="index_sm.csv") == []

    assert [str(f) for f in validate(trap.root, index="index_md.csv")] == [
        "index_md.csv: the file is missing; did you mean index_sm.csv or index.csv?"
    ]
    assert "the folder" in validate(tmp_path / "nowhere")[0].what
    (trap.root / "index.csv").unlink()
    assert len(Broden(trap.root, index="index_sm.csv")) == len(kept)
    with pytest.raises(DatasetError, match=r"has no index.csv.*; there are index_sm.csv"):
        Broden(trap.root)
    (trap.root / "images" / small.rows[2].image).unlink()
    (finding,) = validate(trap.root, index="index_sm.csv")
    assert str(finding).startswith(f"images/{small.rows[2].image} (index_sm.csv line {small.rows[2].line}): the file is missing; replace")
    with pytest.raises(DatasetError, match=rf"index_sm.csv line {small.rows[2].line}: images/.*missing; .*index='index_sm.csv'\) lists"):
        small.image(2)
    edit(trap, "index_sm.csv", ",train,", ",trial,")
    with pytest.raises(DatasetError, match=r"index_sm.csv line \d+: split 'trial'; write train or val"):
        Broden(trap.root, index="index_sm.csv")
    assert any(finding.file == "index_sm.csv" and finding.row for finding in validate(trap.root, index="index_sm.csv"))


def test_an_index_stays_in_the_folder(trap):
    for name in ("../index.csv", "/etc/passwd", "a\\index.csv", "..", ""):
        for read in (lambda name: Broden(trap.root, index=name), lambda name: validate(trap.root, index=name)):
            with pytest.raises(DatasetError, match="the path leaves the folder of the data set; give the name of a CSV file in"):
                read(name)
    (trap.root.parent / "outside.csv").write_text("image\n")
    (trap.root / "linked.csv").symlink_to(trap.root.parent / "outside.csv")
    with pytest.raises(DatasetError, match="a link that leaves the folder of the data set"):
        Broden(trap.root, index="linked.csv")
    with pytest.raises(DatasetError, match="not a CSV file"):
        Broden(trap.root, index="images")


# -- what the writer refuses ---------------------------------------------------------------------------------------------------


def test_a_color_picture_is_no_label_map(tmp_path):
    writer = BrodenWriter(tmp_path / "set", {"object": {i: f"thing {i}" for i in range(1, 256)}}, size=None)
    image = np.zeros((48, 60, 3), np.uint8)
    for mask in (np.ones((48, 60, 3), np.uint8), np.ones((48, 60, 4), np.uint8), Image.new("RGB", (60, 48)), Image.new("RGBA", (60, 48))):
        with pytest.raises(ValueError, match=r"x: object got a label map of shape \(48, 60, [34]\), which may be a picture in color; give"):
            writer.add("x", image, {"object": mask})
    for shape in ((48, 60, 7), (60, 48, 3), (1, 48, 1), (2, 60, 48), (2, 48, 48)):
        with pytest.raises(ValueError, match=r"x: object got a label map of shape"):
            writer.add("x", image, {"object": np.ones(shape, np.uint8)})
    for at, shape in enumerate([(48, 60), (3, 48, 60), (1, 48, 60), (4, 24, 30), (2, 25, 31), (10, 10), (2, 480, 600)]):
        writer.add(str(at), image, {"object": np.ones(shape, np.uint8)})
    narrow = np.zeros((5, 3, 3), np.uint8)  # as wide as it has colors
    writer.add("narrow", narrow, {"object": np.ones((2, 5, 3), np.uint8)})
    palette = Image.new("P", (60, 48), 7)
    writer.add("palette", image, {"object": palette})
    writer.finish()
    assert {label.name for label in Broden(tmp_path / "set").labels} == {"thing 1", "thing 7"}


def test_synonyms_read_back_as_given(tmp_path):
    given = ["tom, dick", "  spaced ", '"quoted"', "é|/x"]
    with BrodenWriter(tmp_path / "set", {"object": ["cat"]}, size=8, synonyms={"cat": given}) as writer:
        writer.add("x", np.zeros((8, 8, 3), np.uint8), {"object": np.ones((8, 8), int)})
    assert list(Broden(tmp_path / "set").label("cat").synonyms) == given
    for synonyms, message in (
        ({"cat": ["tom;cat"]}, "'tom;cat' cannot be a synonym of 'cat': give texts without semicolons"),
        ({"cat": [""]}, "'' cannot be a synonym"),
        ({"cat": ["a\nb"]}, "cannot be a synonym"),
        ({"cat": "tom"}, "must be a list, got the text 'tom'"),
        ({"cta": ["tom"]}, "synonyms names 'cta', which is not a label; did you mean 'cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            BrodenWriter(tmp_path / "other", {"object": ["cat"]}, synonyms=synonyms)


def test_the_writer_says_what_to_do(tmp_path):
    image, plane = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), int)
    writer = BrodenWriter(tmp_path / "set", {"object": ["cat", "dog"], "scene": ["street-s"]}, size=8, min_frequency=5)
    (tmp_path / "torn.png").write_bytes(b"no picture")
    for arguments, message in (
        ((image, {"scene": "stret-s"}), "x: scene has no label 'stret-s'; did you mean 'street-s'?"),
        ((image, {"scene": "moon"}), "x: scene has no label 'moon'; there are street-s"),
        (
            (image, {"object": plane * 3}),
            "x: value 3 of the label map of object has no name.*; name it in categories, or add it to unlabeled=",
        ),
        ((tmp_path / "none.png", {"object": plane}), r"x: .*none.png: the file is missing"),
        ((tmp_path / "torn.png", {"object": plane}), r"x: .*torn.png: cannot be decoded|not a picture"),
        ((np.zeros((1, 1, 3), np.uint8), {"object": plane}), None),
    ):
        if message is not None:
            with pytest.raises(ValueError, match=message):
                writer.add("x", *arguments)
    writer.add("x", image, {"object": plane})
    with pytest.raises(ValueError, match=r"1 labels, but none as frequent as min_frequency=5 and min_coverage=0 ask in the 1 images"):
        writer.finish()
