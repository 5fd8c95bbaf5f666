"""Broden folders: every trap of the format read, every damage found, and written sets read back bit for bit."""

from __future__ import annotations

import csv
import os
import pickle
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from broden_sets import CATEGORIES, TrapRow, TrapSet, save_label_png, write_trap_set
from PIL import Image, ImageFile
from processes import python

from torchprobe.common import limits
from torchprobe.datasets import Broden, BrodenWriter, DatasetError, validate
from torchprobe.datasets.broden.image_files import read_labels, unsafe
from torchprobe.datasets.broden.index import image_hash, image_split
from torchprobe.datasets.broden.presence import load_presence
from torchprobe.datasets.pictures import FileError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> TrapSet:
    return write_trap_set(tmp_path_factory.mktemp("sets") / "broden", images=40)


@pytest.fixture
def trap(tmp_path) -> TrapSet:
    """A set that may be damaged."""
    return write_trap_set(tmp_path / "broden", images=16, seed=1)


def expected(row: TrapRow, categories=CATEGORIES) -> list[tuple[str, np.ndarray]]:
    out = []
    for category in categories:
        entries = row.labels.get(category, [])
        if planes := [entry for entry in entries if not isinstance(entry, int)]:
            out.append((category, np.stack(planes)))
        if numbers := [entry for entry in entries if isinstance(entry, int) and entry]:
            out.append((category, np.array(numbers)))
    return out


def assert_labels(got, want) -> None:
    assert [category for category, _ in got] == [category for category, _ in want]
    for (_, labels), (_, truth) in zip(got, want, strict=True):
        assert labels.dtype == torch.int32
        np.testing.assert_array_equal(labels.numpy(), truth)


# -- reading ---------------------------------------------------------------------------------------------------------------


def test_every_trap_is_read(pristine):
    broden = Broden(pristine.root)
    assert broden.categories == CATEGORIES
    assert [row.image for row in broden.rows] == [row.image for row in pristine.data_rows]
    for i, row in enumerate(pristine.data_rows):
        assert_labels(broden.image_labels(i), expected(row))
        mine = broden.rows[i]
        assert (mine.split, mine.height, mine.width) == (row.split, row.height, row.width)
        assert (mine.label_height, mine.label_width) == (row.label_height, row.label_width)
        assert broden[i].image.size == (row.width, row.height) and broden[i].image.mode == "RGB"


def test_the_set_holds_every_trap(pristine):
    """The other tests mean nothing without them."""
    rows = pristine.rows
    planes = [entry for row in rows for entries in row.labels.values() for entry in entries if not isinstance(entry, int)]
    assert len(pristine.data_rows) < len(rows)
    assert all(any((plane == number).any() for plane in planes) for number in (256, 319))
    assert {len(row.labels.get("part", [])) for row in rows} >= {0, 1, 2, 3, 4}
    assert any(entry == 0 for row in rows for entry in row.labels.get("scene", []) if isinstance(entry, int))
    assert len({(row.label_height, row.label_width) for row in rows}) >= 3
    text = (pristine.root / "index.csv").read_text(encoding="utf-8")
    assert ",0,\n" in text and "258;13" in text and ".png;260" in text and '""' in text


def test_lines_are_those_of_the_index(pristine):
    lines = (pristine.root / "index.csv").read_text(encoding="utf-8").splitlines()
    for row in Broden(pristine.root).rows:
        assert row.image.replace('"', '""') in lines[row.line - 1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_splits(pristine, split):
    rows = [row for row in pristine.data_rows if row.split == split]
    assert 0 < len(rows) < len(pristine.data_rows)
    broden = Broden(pristine.root, split=split)
    assert [row.image for row in broden.rows] == [row.image for row in rows]
    assert_labels(broden.image_labels(0), expected(rows[0]))


@pytest.mark.parametrize("categories", [["texture"], ["part", "object"], ["scene"], ["color", "material"]])
def test_chosen_categories(pristine, categories):
    """Rows without data in them are left out, and the order is that of category.csv whatever was asked for."""
    broden = Broden(pristine.root, categories=categories)
    order = [category for category in CATEGORIES if category in categories]
    rows = [row for row in pristine.rows if expected(row, order)]
    assert broden.categories == tuple(order)
    assert [row.image for row in broden.rows] == [row.image for row in rows]
    for i, row in enumerate(rows):
        assert_labels(broden.image_labels(i), expected(row, order))
    assert [label.number for label in broden.labels] == [n for n, own in pristine.membership.items() if set(own) & set(categories)]
    assert broden.label_size == len(pristine.names) + 1


def test_labels_and_primary_categories(pristine):
    broden = Broden(pristine.root)
    assert {label.number: label.name for label in broden.labels} == pristine.names
    assert {label.number: label.category for label in broden.labels} == pristine.primary
    assert {label.number: label.categories for label in broden.labels} == pristine.membership
    assert broden.primary.tolist() == [len(CATEGORIES) - 1] + [CATEGORIES.index(pristine.primary[n]) for n in sorted(pristine.names)]
    wall = broden.label("wall")
    assert (wall.number, wall.frequency, wall.coverage) == (3, 15, 51.0)
    # Among the chosen ones only: the door is mostly a part, but not if parts are left out.
    assert Broden(pristine.root, categories=["object"]).label("door").category == "object"
    only = Broden(pristine.root, categories=["object", "part"])
    assert [only.categories[only.primary[n]] for n in (0, 3, 4, 9, 13)] == ["part", "object", "part", "part", "part"]


def test_finding_labels(pristine):
    broden = Broden(pristine.root)
    assert broden.label("street-s") is broden.label(12) is broden.label("street")
    assert broden.label("red").number == 320 and broden.label("thing 20").number == 20
    with pytest.raises(KeyError, match=r"no label 'heatr'; did you mean 'heater'"):
        broden.label("heatr")
    with pytest.raises(KeyError, match="no label 999; numbers go from 1 to 330"):
        broden.label(999)


def test_titles_that_several_share(trap):
    edit(trap, "label.csv", "thing 20,", "black,")
    edit(trap, "label.csv", "thing 21,", "grey-c,")
    broden = Broden(trap.root)
    assert broden.label("black").number == 20 and broden.label("black-c").number == 2
    with pytest.raises(KeyError, match=r"may be 5 \(grey-c\) or 21 \(grey-c\)"):
        broden.label("grey-c")


def test_transform_and_workers(pristine):
    broden = Broden(pristine.root, transform=lambda image: torch.tensor(image.size))
    assert broden[0].image.tolist() == list(Broden(pristine.root)[0].image.size)
    other = pickle.loads(pickle.dumps(Broden(pristine.root)))
    assert_labels(other.image_labels(3), expected(pristine.data_rows[3]))
    loader = torch.utils.data.DataLoader(Broden(pristine.root), batch_size=4, collate_fn=list)
    assert sum(len(batch) for batch in loader) == len(pristine.data_rows)
    assert repr(other).startswith(f"Broden({len(pristine.data_rows)} images, 330 labels in object, color, part")


def test_optimized_pngs_mean_the_same(trap):
    """A palette or grayscale PNG holds the same colors."""
    numbers = np.random.default_rng(0).choice([0, 1, 319, 256], (20, 30))
    path = trap.root / "a.png"
    save_label_png(path, numbers)
    Image.fromarray(pixels_of(path)).quantize(8, dither=Image.Dither.NONE).save(path)
    assert pixels_of(path).ndim == 2
    np.testing.assert_array_equal(read_labels(path, 20, 30).numpy(), numbers)
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(path)
    assert not read_labels(path, 20, 30).any()


def test_every_number_of_16_bits(tmp_path):
    numbers = np.arange(1 << 16).reshape(256, 256)
    save_label_png(tmp_path / "a.png", numbers)
    np.testing.assert_array_equal(read_labels(tmp_path / "a.png", 256, 256).numpy(), numbers)


# -- concepts --------------------------------------------------------------------------------------------------------------


def share(row: TrapRow, number: int) -> float:
    """By pixels, over all maps of all categories; whole-image labels cover all."""
    flat = [entry for entries in row.labels.values() for entry in entries]
    if number in [entry for entry in flat if isinstance(entry, int)]:
        return 1.0
    maps = [entry == number for entry in flat if not isinstance(entry, int)]
    return float(np.any(maps, 0).mean()) if maps else 0.0


def test_presence(pristine):
    broden = Broden(pristine.root)
    steps = []
    presence = broden.presence(progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (len(broden), len(broden)) and len(presence) == len(broden)
    for i, row in enumerate(pristine.data_rows):
        start, end = presence.crow[i : i + 2].tolist()
        numbers = presence.number[start:end].tolist()
        assert numbers == sorted(row.numbers())
        np.testing.assert_allclose(presence.area[start:end], [share(row, n) for n in numbers], rtol=1e-6)


def test_concept_images(pristine):
    broden = Broden(pristine.root)
    assert broden.concept_images("fibrous") == [i for i, row in enumerate(pristine.data_rows) if 258 in row.numbers()]
    assert broden._presence is None  # whole-image labels need no picture
    for name in ("wall", "pane", 319, "glass", "thing 200"):
        number = broden.label(name).number
        assert broden.concept_images(name) == [i for i, row in enumerate(pristine.data_rows) if number in row.numbers()]
        assert broden.concept_images(name, 0.1) == [i for i, row in enumerate(pristine.data_rows) if share(row, number) >= 0.1]
    val = Broden(pristine.root, split="val")
    assert all(3 in [row for row in pristine.data_rows if row.split == "val"][i].numbers() for i in val.concept_images("wall"))


def test_presence_is_kept_in_a_file(pristine, tmp_path, monkeypatch):
    cache = tmp_path / "deep" / "presence.safetensors"
    first = Broden(pristine.root).presence(cache)
    other = Broden(pristine.root)
    monkeypatch.setattr(other, "image_labels", lambda index: pytest.fail("read again"))
    second = other.presence(cache)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in ("crow", "number", "area"))
    assert len(Broden(pristine.root, split="val").presence(cache)) < len(first)  # made from something else: made anew
    assert load_presence(cache, b"other") is None
    cache.write_bytes(b"nonsense")
    assert len(Broden(pristine.root).presence(cache)) == len(first)


def test_presence_reads_only_the_rows_asked_for(pristine, tmp_path, monkeypatch):
    whole = Broden(pristine.root).presence()
    broden, cache, read = Broden(pristine.root), tmp_path / "presence.safetensors", []
    labels = broden.image_labels
    monkeypatch.setattr(broden, "image_labels", lambda index: read.append(index) or labels(index))
    told = []
    some = broden.presence(cache, progress=lambda done, total: told.append((done, total)), rows=[7, 2, 30])
    assert sorted(read) == [2, 7, 30] and told == [(1, 3), (2, 3), (3, 3)] and broden._presence is None
    for i, row in enumerate((7, 2, 30)):
        for name in ("number", "area"):
            mine, all_ = (getattr(p, name)[p.crow[at] : p.crow[at + 1]] for p, at in ((some, i), (whole, row)))
            assert torch.equal(mine, all_)
        assert torch.equal(some.annotated[i], whole.annotated[row])
    for other in ([7, 2], [2, 7, 30], [7, 2, 31], None):  # the file does not mix parts: none of these is in it
        assert len(broden.presence(cache, rows=[7, 2, 30])) == 3
        before = len(read)
        assert len(broden.presence(cache, rows=other)) == (len(broden) if other is None else len(other))
        assert len(read) - before == (len(broden) if other is None else len(other))
    read.clear()
    assert torch.equal(broden.presence(rows=[7, 2, 30]).number, some.number) and not read  # all are known by now
    assert len(Broden(pristine.root).presence(rows=[])) == 0
    with pytest.raises(IndexError):
        broden.presence(rows=[len(broden)])


@pytest.mark.slow("starts a process to measure its memory")
def test_presence_needs_little_memory(tmp_path):
    """Kept results among large buffers once held 50 to 90 kB for each row. 1,500 rows that share a few maps."""
    with BrodenWriter(tmp_path / "set", {"object": [f"thing {i}" for i in range(1200)]}, size=224, image_format="png") as writer:
        rng = np.random.default_rng(0)
        for i in range(60):
            plane = np.kron(rng.integers(20 * i, 20 * i + 20, (14, 14)) + 1, np.ones((16, 16), int))
            writer.add(str(i), np.zeros((8, 8, 3), np.uint8), {"object": plane})
    lines = (tmp_path / "set" / "index.csv").read_text().splitlines()
    (tmp_path / "set" / "index.csv").write_text("\n".join([lines[0], *lines[1:] * 25]) + "\n")
    code = """
import re, sys
from pathlib import Path
from torchprobe.datasets import Broden
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
broden = Broden(sys.argv[1])
broden.presence(rows=range(256))  # workspaces are made
before = resident()
assert len(broden.presence()) == 1500
print(resident() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("needs Linux to read the memory")
    assert int(python(code, str(tmp_path / "set")).stdout) < 20_000  # kB


def test_captum_concepts(pristine):
    pytest.importorskip("captum")
    transform = lambda image: torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float()  # noqa: E731
    broden = Broden(pristine.root, transform=transform)
    concept = broden.captum_concept("wall", batch_size=3)
    assert (concept.id, concept.name) == (3, "wall")
    images = torch.cat(list(concept.data_iter))
    rows = broden.concept_images("wall")
    assert images.shape == (len(rows), 3, 8, 8) and torch.equal(images[0], broden[rows[0]].image)
    assert sum(len(batch) for batch in broden.captum_concept("wall", limit=2).data_iter) == 2
    sizes = iter(range(8, 100))
    unequal = Broden(pristine.root, transform=lambda image: torch.zeros(3, next(sizes), 8))
    with pytest.raises(ValueError, match=r"has shape \(3, 9, 8\), another image \(3, 8, 8\): the transform of Broden must resize"):
        list(unequal.captum_concept("wall").data_iter)
    with pytest.raises(ValueError, match="shows 'lamp' over at least 0.99"):
        broden.captum_concept("lamp", minimum_area=0.99)
    with pytest.raises(TypeError, match="give Broden a transform"):
        next(iter(Broden(pristine.root).captum_concept("wall").data_iter))


def test_captum_really_takes_them(pristine, tmp_path):
    captum = pytest.importorskip("captum.concept")
    torch.manual_seed(0)
    transform = lambda image: torch.from_numpy(np.array(image.resize((8, 8)))).permute(2, 0, 1).float() / 255  # noqa: E731
    broden = Broden(pristine.root, transform=transform)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # captum's own
        tcav = captum.TCAV(model, ["0"], save_path=str(tmp_path))
        concepts = [broden.captum_concept(name) for name in ("fibrous", "wall")]
        scores = tcav.interpret(torch.rand(5, 3, 8, 8), [concepts], target=0)
    assert scores["258-3"]["0"]["sign_count"].shape == (2,)


def test_importing_the_library_does_not_import_pil_or_captum():
    code = "import sys, torchprobe.datasets; print([m for m in ('PIL', 'captum', 'torchvision', 'jinja2') if m in sys.modules])"
    assert python(code).stdout == "[]\n"


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


# -- damage ----------------------------------------------------------------------------------------------------------------


def edit(trap: TrapSet, file: str, old: str, new: str, count: int = 1) -> None:
    path = trap.root / file
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def a_row(trap: TrapSet, category: str) -> tuple[int, Path]:
    """Index and first label map of a row that has the category as a file."""
    for i, row in enumerate(trap.data_rows):
        if any(not isinstance(entry, int) for entry in row.labels.get(category, [])):
            names = Broden(trap.root).rows[i].entries[CATEGORIES.index(category)]
            return i, trap.root / "images" / next(name for name in names if isinstance(name, str))
    raise AssertionError


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def cut_the_middle(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:50] + data[60:])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def bomb(path: Path) -> None:
    """A small file that claims to be enormous."""
    data = path.read_bytes()
    head = b"IHDR" + struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    path.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])


def blue(path: Path) -> None:
    pixels = pixels_of(path)
    pixels[3, 4, 2] = 1
    Image.fromarray(pixels).save(path)


def sixteen_bits(path: Path) -> None:
    Image.fromarray(np.zeros(pixels_of(path).shape[:2], np.uint16)).save(path)


def other_size(path: Path) -> None:
    Image.fromarray(pixels_of(path)).resize((7, 9)).save(path)


def jpeg(path: Path) -> None:
    Image.fromarray(pixels_of(path)).save(path, "JPEG")


def a_label_too_many(path: Path) -> None:
    save_label_png(path, np.full(pixels_of(path).shape[:2], 331))


def outward_link(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()
    outside = path.parents[3] / "outside.png"
    outside.write_bytes(data)
    path.symlink_to(outside)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    truncate: "truncated",
    cut_the_middle: "damaged|truncated",
    flip_a_bit: "damaged",
    bomb: "200000 × 200000 pixels, its row says sh × sw = 32 × 32",
    blue: "blue channel is not 0",
    sixteen_bits: "pixels of mode I;16",
    other_size: "9 × 7 pixels, its row says sh × sw = 32 × 32",
    jpeg: "not a PNG file",
    a_label_too_many: "label 331.*not in label.csv",
    outward_link: "leaves the folder",
    a_folder: "not a regular file",
    Path.unlink: "missing",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("forgiving", [False, True])
def test_damaged_label_maps_are_refused_with_their_row(trap, damage, forgiving, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", forgiving)  # as some training code sets it, for everybody
    i, path = a_row(trap, "part")
    damage(path)
    broden = Broden(trap.root)
    name = path.relative_to(trap.root / "images").as_posix()
    with pytest.raises(DatasetError, match=f"index.csv line {broden.rows[i].line}: images/{name}: .*{DAMAGES[damage]}"):
        broden.image_labels(i)
    (finding,) = validate(trap.root)
    assert (finding.row, finding.file) == (broden.rows[i].line, f"images/{name}") and finding.fix
    assert re.search(DAMAGES[damage], finding.what)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "cannot be decoded"), (Path.unlink, "missing"), (a_folder, "not a regular file"), (outward_link, "leaves the folder")],
)
def test_damaged_pictures_are_refused_with_their_row(trap, damage, message):
    broden = Broden(trap.root)
    damage(trap.root / "images" / broden.rows[2].image)
    with pytest.raises(DatasetError, match=f"index.csv line {broden.rows[2].line}: .*{message}"):
        broden[2]
    broden.image_labels(2)  # which are well
    (finding,) = validate(trap.root)
    assert message in finding.what and finding.row == broden.rows[2].line


def test_gray_pictures_of_16_bits_are_scaled(tmp_path):
    """A ramp over all values, in a file, as a path, and as an open image of either mode."""
    ramp = np.linspace(0, 65535, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    want = np.round(ramp / 257)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    sources = [tmp_path / "ramp.png", Image.fromarray(ramp), Image.fromarray(ramp.astype(np.int32)), Image.open(tmp_path / "ramp.png")]
    sources.append(Image.fromarray(ramp.astype(">u2")))
    with BrodenWriter(tmp_path / "set", {"object": ["a"]}, size=None, image_format="png") as writer:
        for i, source in enumerate(sources):
            writer.add(str(i), source, {"object": np.ones((64, 64), int)})
    broden = Broden(tmp_path / "set")
    for i in range(len(broden)):
        np.testing.assert_array_equal(np.array(broden.image(i)), np.stack([want] * 3, -1))
    Image.fromarray(ramp).save(tmp_path / "set" / "images" / "0.png")  # by someone else
    at = [row.image for row in broden.rows].index("0.png")
    np.testing.assert_array_equal(np.array(broden.image(at))[..., 1], want)
    dark = Image.fromarray(ramp // 257)
    dark.save(tmp_path / "set" / "images" / "0.png")
    np.testing.assert_array_equal(np.array(broden.image(at))[..., 1], (ramp // 257) >= 129)  # of 65535, nearly black


def test_pictures_of_unknown_range_are_refused(tmp_path):
    writer = BrodenWriter(tmp_path / "set", {"object": ["a"]})
    for image, message in (
        (Image.fromarray(np.ones((4, 4), np.float32)), "mode F are floating point"),
        (Image.fromarray(np.full((4, 4), 255, np.int32)), "mode I up to 255 may be meant as 8 or as 16 bits"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "mode I from -1 to 0 are not gray of 16 bits"),
        (Image.fromarray(np.full((4, 4), 65536, np.int32)), "mode I from 0 to 65536"),
    ):
        with pytest.raises(ValueError, match=f"x: pixels of {message}.*: convert them to"):
            writer.add("x", image, {"object": np.ones((4, 4), int)})
    writer.add("x", Image.fromarray(np.zeros((4, 4), np.int32)), {"object": np.ones((4, 4), int)})  # black, whatever is meant


def test_pictures_too_large_are_not_decoded(trap):
    with limits.changed(picture_pixels=1000), pytest.raises(DatasetError, match="64 × 64 pixels, more than"):
        Broden(trap.root)


def test_a_png_that_only_looks_whole(tmp_path, monkeypatch):
    """Every chunk right, but too little data within: the decoder must complain."""
    save_label_png(tmp_path / "a.png", np.zeros((64, 64), int))
    data = (tmp_path / "a.png").read_bytes()
    body = b"IDAT" + zlib.compress(b"\0" * 100)
    (tmp_path / "a.png").write_bytes(data[:33] + struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) + data[-12:])
    with pytest.raises(FileError, match="damaged"):
        read_labels(tmp_path / "a.png", 64, 64)


MAX_SIDE, MAX_PIXELS = (limits.LIMITS[name].default for name in ("picture_side", "picture_pixels"))
INDEX_DAMAGES = [
    (",64,64,32,32,", ",64,64,32,x,", r"ih, iw, sh, sw = '64', '64', '32', 'x'"),
    (",64,64,32,32,", ",64,64,32,-2,", "'-2'"),
    (",64,64,32,32,", ",64,64,0,32,", "0 × 32 pixels"),
    (",64,64,32,32,", f",{MAX_SIDE + 1},64,32,32,", f"{MAX_SIDE + 1} × 64 pixels, more than"),
    (",64,64,32,32,", ",64,64,16384,16384,", "16384 × 16384 pixels, more than"),
    (",64,64,32,32,", ",64,64,99999999999999999999,32,", "99999999999999999999"),
    (",train,", ",test,", "split 'test'"),
    ("\nset a/pic", "\n../set a/pic", "image '../set a/pic_.*' leaves the folder"),
    ("\nset a/pic", "\n/set a/pic", "leaves the folder"),
    ("\nset a/pic", "\nset a\\pic", "leaves the folder"),
    (",set a/pic", ",set a/../../../pic", "leaves the folder"),
    (",258;13", ",258;331", "label 331 is not in label.csv"),
    (",258;13", ",258;1300000000000000000", "label 1300000000000000000 is not in label.csv"),
    (",258;13", ",258;-1", "entry '-1'"),
    (",258;13", ",258;thirteen", "entry 'thirteen'"),
    (",258;13", ",258;²", "label ² is not"),
    (",258;13", ",258;13,", "13 fields"),
    (",train,", ",train\x00,", "split|fields|cannot be read"),
]


@pytest.mark.parametrize(("old", "new", "message"), INDEX_DAMAGES)
def test_rows_that_are_no_rows(trap, old, new, message):
    edit(trap, "index.csv", old, new)
    lines = (trap.root / "index.csv").read_text(encoding="utf-8").splitlines()
    line = next(i for i, text in enumerate(lines, 1) if new.strip("\n") in text)
    with pytest.raises(DatasetError, match=f"index.csv line {line}: .*{message}.*validate"):
        Broden(trap.root)
    findings = validate(trap.root)
    assert [finding.row for finding in findings] == [line] and findings[0].file == "index.csv"


def test_tables(trap):
    for file, old, new, message in [
        ("label.csv", "\n3,wall,", "\n70000,wall,", "label.csv line 4: number '70000', name 'wall'"),
        ("label.csv", "\n3,wall,", "\nx,wall,", "number 'x'"),
        ("label.csv", "\n3,wall,", "\n0,wall,", "number '0'"),
        ("label.csv", "\n3,wall,", "\n2,wall,", "label 2 is listed more than once"),
        ("label.csv", "\n3,wall,", "\n3,,", "name ''"),
        ("label.csv", "51.000000", "nan", "coverage 'nan'"),
        ("label.csv", "number,name", "no,name", "line 1: no column number; expected number,name"),
        ("c_part.csv", "50.000000", "lots", "coverage 'lots'"),
        ("category.csv", "\ncolor,", "\nimage,", "'image' cannot be the name of a category"),
        ("category.csv", "\ncolor,", "\n../c,", "'../c' cannot be the name"),
        ("category.csv", "\ncolor,", "\nobject,", "category 'object' is listed more than once"),
        ("category.csv", "\ncolor,", "\ncolour,", "c_colour.csv: the file is missing"),
        ("index.csv", "image,split", "file,split", "index.csv line 1: no column image"),
        ("index.csv", ",material,", ",stuff,", "no column material"),
    ]:
        whole = (trap.root / file).read_text(encoding="utf-8")
        edit(trap, file, old, new)
        with pytest.raises(DatasetError, match=message):
            Broden(trap.root)
        assert any(message in str(f) or message.split(": ")[-1] in str(f) for f in validate(trap.root)), message
        (trap.root / file).write_text(whole, encoding="utf-8")
    assert validate(trap.root) == []


@pytest.mark.parametrize("file", ["label.csv", "category.csv", "index.csv", "c_texture.csv"])
@pytest.mark.parametrize("how", ["missing", "binary", "empty", "folder"])
def test_tables_that_are_none(trap, file, how):
    path = trap.root / file
    path.unlink()
    if how == "binary":
        path.write_bytes(os.urandom(1000) + b"\xff\xfe")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "folder":
        path.mkdir()
    with pytest.raises(DatasetError, match=file):
        Broden(trap.root)
    assert any(finding.file == file for finding in validate(trap.root))


def test_contradictions_are_found(trap):
    edit(trap, "label.csv", "\n319,heater,", "\n329,heater,")  # 319 is gone, 329 there twice
    edit(trap, "c_texture.csv", ",13,cobwebbed,", ",14,cobwebbed,")
    edit(trap, "label.csv", "thing 30,", "thing 29,")
    text = "\n".join(map(str, validate(trap.root)))
    for what in (
        "label.csv line 330: label 329 is listed more than once",
        "c_object.csv: label 319 not in label.csv",
        "label 13 in the c_*.csv of no category",
        "label 13 in column texture, but c_texture.csv does not list it",
        "labels 29 and 30 are both called 'thing 29'",
        "label 319 not in label.csv; add them there",
    ):
        assert what in text, what


def test_a_label_that_its_category_does_not_list_can_be_read(trap):
    """The original's readers take it too; only the validator minds."""
    i, path = a_row(trap, "part")
    row = trap.data_rows[i]
    save_label_png(path, np.full((row.label_height, row.label_width), 2))
    broden = Broden(trap.root, categories=["part"])
    at = [mine.image for mine in broden.rows].index(row.image)
    assert (dict(broden.image_labels(at))["part"][0] == 2).all()
    (finding,) = validate(trap.root)
    assert "label 2 not in c_part.csv" in finding.what


def test_a_picture_twice_and_of_another_size(trap):
    lines = (trap.root / "index.csv").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if ",64,64,32,32," in line)
    lines.append(lines[at].replace(",64,64,32,32,", ",65,64,32,32,"))
    (trap.root / "index.csv").write_text("\n".join(lines), encoding="utf-8")
    findings = validate(trap.root)
    assert [finding.row for finding in findings] == [len(lines)] * 2
    assert f"is already in line {at + 1}" in findings[0].what
    assert "64 × 64 pixels, its row says ih × iw = 65 × 64" in findings[1].what


def test_everything_is_found_not_the_first_only(trap):
    broden = Broden(trap.root)
    several = {broden.rows[i].line for i in (0, 3, 5)}
    for i in (0, 3, 5):
        (trap.root / "images" / broden.rows[i].image).unlink()
    blue(a_row(trap, "color")[1])
    edit(trap, "label.csv", "\n300,thing 300,", "\n300,,")
    edit(trap, "category.csv", "\ntexture,", "\ntextures,")
    steps = []
    findings = validate(trap.root, progress=lambda done, total: steps.append((done, total)))
    assert several <= {finding.row for finding in findings if "missing" in finding.what}
    assert any("blue" in finding.what for finding in findings)
    assert {"label.csv", "c_textures.csv", "index.csv"} <= {finding.file for finding in findings}
    assert steps == [] or steps[-1][0] == steps[-1][1]


def test_wrong_folders(trap, tmp_path):
    with pytest.raises(DatasetError, match="is not there"):
        Broden(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="is a file"):
        Broden(trap.root / "index.csv")
    with pytest.raises(DatasetError, match=r"has no index.csv.*did you mean .*broden\?"):
        Broden(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match=r"has no index.csv.*label.csv, category.csv"):
        Broden(tmp_path / "empty")
    assert {f.file for f in validate(tmp_path / "nowhere")} >= {"category.csv", "label.csv", "index.csv", "images"}


def test_wrong_arguments(trap):
    with pytest.raises(ValueError, match="split must be 'train', 'val' or None, got 'test'"):
        Broden(trap.root, split="test")
    with pytest.raises(ValueError, match=r"no category 'colour' in .*; there are object, color"):
        Broden(trap.root, categories=["object", "colour"])
    with pytest.raises(ValueError, match="got the text 'object'"):
        Broden(trap.root, categories="object")


def test_unsafe_names():
    for name in ("../a", "a/../b", "/a", "a//b", "a/", "./a", "a/.", "C:/a", "c:a", "a\\b", "a\nb", "a\x00", "", ".", ".."):
        assert unsafe(name), name
    for name in ("a", "a/b.png", "a b/é.jpg", "a..b/c", "...", 'a,"b".jpg', "日本/語.png", "a:b"[1:] and "ab:c"):
        assert not unsafe(name), name


def test_a_linked_images_folder_is_fine(trap):
    (trap.root / "images").rename(trap.root.parent / "elsewhere")
    (trap.root / "images").symlink_to(trap.root.parent / "elsewhere")
    assert validate(trap.root) == [] and Broden(trap.root)[0]


@pytest.mark.slow("writes and reads an index of 63,305 rows")
def test_a_full_index_is_read_quickly(trap):
    """63,305 rows, the size of the release."""
    import time

    with open(trap.root / "index.csv", "w", encoding="utf-8") as file:
        file.write(f"image,split,ih,iw,sh,sw,{','.join(CATEGORIES)}\n")
        for i in range(63_305):
            stem = f"ade20k/ADE_train_{i:08d}"
            parts = f"{stem}_part_1.png;{stem}_part_2.png" if i % 2 else ""
            scene, material = 12 if i % 3 else 0, f"{stem}_material.png" if i % 4 == 0 else ""
            file.write(f"{stem}.jpg,train,224,224,112,112,{stem}_object.png,{stem}_color.png,{parts},{material},{scene},\n")
    start = time.process_time()
    assert len(Broden(trap.root)) == 63_305
    assert time.process_time() - start < 3


# -- writing ---------------------------------------------------------------------------------------------------------------

NAMES = {"object": ["cat", "dog", "wall"], "part": {7: "tail", 9: "wall", 300: "ear"}, "scene": ["street-s", "beach-s"]}


def write(root: Path, images: int = 30, seed: int = 0, **options):
    """A random set; returns what each image was given."""
    rng = np.random.default_rng(seed)
    given = {}
    with BrodenWriter(root, NAMES, **{"size": 32, "image_format": "png", **options}) as writer:
        for i in range(images):
            name = f"mine/{i % 3}/pic {i}"
            image = rng.integers(0, 256, (32, 32, 3), np.uint8)
            objects = rng.choice([0, 0, 1, 2, 3], (16, 16))
            parts = rng.choice([0, 7, 9, 300], (1 + i % 4, 16, 16))
            labels = {"object": objects, "part": parts, "scene": "street-s" if i % 2 else ["beach-s", "street-s"]}
            if i % 5 == 0:
                del labels["part"]
            if i % 7 == 0:
                labels = {"scene": "beach-s"}
            writer.add(name, image, labels)
            given[name + ".png"] = (image, labels)
    return given


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def named(broden: Broden, numbers: torch.Tensor) -> np.ndarray:
    names = np.array([broden._by_number[n].name if n in broden._by_number else "" for n in range(broden.label_size)])
    return names[numbers.numpy()]


def test_round_trip_bit_for_bit(tmp_path):
    given = write(tmp_path / "set")
    assert validate(tmp_path / "set") == []
    broden = Broden(tmp_path / "set")
    assert {row.image for row in broden.rows} == given.keys()
    lookup = {c: np.array([dict(enumerate(n, 1) if isinstance(n, list) else n).get(v, "") for v in range(301)]) for c, n in NAMES.items()}
    for i, row in enumerate(broden.rows):
        image, labels = given[row.image]
        np.testing.assert_array_equal(np.array(broden[i].image), image)
        found = dict(broden.image_labels(i))
        assert found.keys() == labels.keys()
        for category, value in labels.items():
            if category == "scene":
                assert named(broden, found[category]).tolist() == ([value] if isinstance(value, str) else value)
            else:
                np.testing.assert_array_equal(named(broden, found[category]), lookup[category][value.reshape(-1, 16, 16)])


def test_the_written_bytes(tmp_path):
    """Every rule of the format that the original's readers rely on."""
    given = write(tmp_path / "set")
    root = tmp_path / "set"
    assert {p.name for p in root.iterdir()} == {
        *("README.txt", "category.csv", "label.csv", "index.csv", "syns.txt", "images", "c_object.csv", "c_part.csv", "c_scene.csv")
    }
    rows = table(root / "index.csv")
    hashes = [TrapRow(row["image"], 0, 0, 0, 0) for row in rows]
    assert [h.hash for h in hashes] == sorted(h.hash for h in hashes)
    assert [row["split"] for row in rows] == [h.split for h in hashes] and {h.split for h in hashes} == {"train", "val"}
    assert all((row["ih"], row["iw"], row["sh"], row["sw"]) == ("32", "32", "16", "16") for row in rows)

    labels = table(root / "label.csv")
    assert [int(label["number"]) for label in labels] == list(range(1, len(labels) + 1))
    assert [int(label["frequency"]) for label in labels] == sorted((int(label["frequency"]) for label in labels), reverse=True)
    numbers = {label["name"]: int(label["number"]) for label in labels}
    wall = labels[numbers["wall"] - 1]
    having = [given[row["image"]][1] for row in rows]
    objects = sum((v["object"] == 3).any() for v in having if "object" in v)
    parts = sum((v["part"] == 9).any() for v in having if "part" in v)
    assert wall["category"] == f"object({objects});part({parts})" and int(wall["frequency"]) == objects + parts
    coverage = sum((v["object"] == 3).mean() for v in having if "object" in v)
    coverage += sum((v["part"] == 9).any(0).mean() for v in having if "part" in v)
    assert float(wall["coverage"]) == pytest.approx(coverage, abs=1e-6)

    categories = table(root / "category.csv")
    assert list(rows[0])[6:] == [row["name"] for row in categories]
    assert [int(row["first"]) for row in categories] == sorted(int(row["first"]) for row in categories)
    for row in categories:
        codes = table(root / f"c_{row['name']}.csv")
        own = sorted(int(code["number"]) for code in codes)
        assert (int(row["first"]), int(row["last"]), int(row["count"])) == (own[0], own[-1], len(own))
        assert int(row["frequency"]) == sum(int(code["frequency"]) for code in codes)
        assert [int(code["code"]) for code in codes] == list(range(1, len(codes) + 1))
        keys = [(-int(code["frequency"]), -float(code["coverage"])) for code in codes]
        assert keys == sorted(keys)
    for row in rows:
        stem = row["image"].removesuffix(".png")
        assert row["object"] in ("", f"{stem}_object.png")
        if row["part"]:
            assert row["part"].split(";") == [f"{stem}_part_{k}.png" for k in range(1, row["part"].count(";") + 2)]
    pixels = pixels_of(root / "images" / next(row["object"] for row in rows if row["object"]))
    assert pixels.dtype == np.uint8 and pixels.shape == (16, 16, 3) and not pixels[..., 2].any()


def test_split_and_order_of_the_release():
    """Real rows of the released index: both lie in the training split, in this order."""
    assert image_split("ade20k/ADE_train_00003891.jpg") == image_split("ade20k/ADE_train_00018550.jpg") == "train"
    shares = [image_hash(f"a/{i}.jpg") / 2**64 for i in range(4000)]
    assert abs(sum(share <= 0.7 for share in shares) / 4000 - 0.7) < 0.03


def test_numbers_above_255(tmp_path):
    names = [f"thing {i:03d}" for i in range(1, 601)]
    plane = np.arange(1, 601).reshape(20, 30)
    with BrodenWriter(tmp_path / "set", {"object": names}, size=None, segmentation_size=(20, 30)) as writer:
        writer.add("a", np.zeros((41, 60, 3), np.uint8), {"object": plane})
        writer.add("b", np.zeros((50, 70), np.uint8), {"object": np.tile(plane[:1], (20, 1))})
    broden = Broden(tmp_path / "set")
    assert [(row.height, row.width) for row in sorted(broden.rows)] and {(r.height, r.width) for r in broden.rows} == {(41, 60), (50, 70)}
    i = next(i for i, row in enumerate(broden.rows) if row.image == "a.jpg")
    ((_, planes),) = broden.image_labels(i)
    assert planes.max() == 600 and (named(broden, planes[0]).ravel() == names).all()
    assert broden.label("thing 001").number <= 30  # in both pictures


def test_sizes_and_resizing(tmp_path):
    """Half the picture, rounded down; maps by the nearest pixel."""
    plane = np.arange(12).reshape(3, 4) % 3
    with BrodenWriter(tmp_path / "set", {"object": ["a", "b"]}, size=(27, 25)) as writer:
        writer.add("x", Image.new("L", (100, 50)), {"object": plane})
    broden = Broden(tmp_path / "set")
    (row,) = broden.rows
    assert row[3:7] == (27, 25, 13, 12) and broden[0].image.size == (25, 27)
    want = np.array(Image.fromarray(plane.astype(np.uint8)).resize((12, 13), Image.Resampling.NEAREST))
    np.testing.assert_array_equal(named(broden, broden.image_labels(0)[0][1][0]), np.array(["", "a", "b"])[want])
    with BrodenWriter(tmp_path / "own", {"object": ["a", "b"]}, size=None) as writer:
        writer.add("x", Image.new("RGB", (101, 51)), {"object": plane})
    assert Broden(tmp_path / "own").rows[0][3:7] == (51, 101, 25, 50)


def test_filters(tmp_path):
    root = tmp_path / "set"
    with BrodenWriter(
        root, {"object": ["often", "rare", "small"], "scene": ["once-s"]}, size=20, min_frequency=2, min_coverage=0.5
    ) as writer:
        for i in range(4):
            plane = np.full((10, 10), 1)
            plane[0, 0] = 3
            if i == 0:
                plane[:, 5:] = 2
            writer.add(str(i), np.zeros((20, 20, 3), np.uint8), {"object": plane} | ({"scene": "once-s"} if i == 1 else {}))
    broden = Broden(root)
    assert [label.name for label in broden.labels] == ["often"] and broden.categories == ("object",)
    assert {int(n) for i in range(4) for _, planes in broden.image_labels(i) for n in planes.unique()} == {0, 1}
    assert validate(root) == []


def test_values_that_mean_nothing(tmp_path):
    plane = np.array([[0, 1], [2, 255]])
    with BrodenWriter(tmp_path / "voc", {"object": {1: "plane", 2: "bike"}}, size=4, unlabeled=(0, 255)) as writer:
        writer.add("a", np.zeros((4, 4, 3), np.uint8), {"object": Image.fromarray(plane.astype(np.uint8))})
    assert named(Broden(tmp_path / "voc"), Broden(tmp_path / "voc").image_labels(0)[0][1])[0].tolist() == [["", "plane"], ["bike", ""]]
    with BrodenWriter(tmp_path / "ade", {"object": {0: "wall", 1: "sky", 2: "tree"}}, size=4, unlabeled=(255,)) as writer:
        writer.add("a", np.zeros((4, 4, 3), np.uint8), {"object": torch.from_numpy(plane)})
    assert named(Broden(tmp_path / "ade"), Broden(tmp_path / "ade").image_labels(0)[0][1])[0].tolist() == [["wall", "sky"], ["tree", ""]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint16, np.int32, np.int64, np.uint64])
def test_any_integers_are_values(tmp_path, dtype):
    values = {-5: "minus", 1: "one", 70_000: "many", 2**40: "huge"}
    plane = np.array([[0, 1], [1, 0]] if dtype is bool else [[value for value in (1, 70_000) if value <= np.iinfo(dtype).max] * 2]).astype(
        dtype
    )
    if dtype is np.int64:
        plane = np.array([[-5, 1], [70_000, 2**40]])
    with BrodenWriter(tmp_path / "set", {"object": values}, size=4, segmentation_size=plane.shape) as writer:
        writer.add("a", np.zeros((4, 4, 3), np.uint8), {"object": plane})
    broden = Broden(tmp_path / "set")
    want = [[values.get(int(value), "") for value in row] for row in plane]
    assert named(broden, broden.image_labels(0)[0][1])[0].tolist() == want


def test_synonyms_and_hostile_names(tmp_path):
    names = ["<img src=x onerror=alert(1)>", 'oven, "old"', "=1+1"]
    with BrodenWriter(tmp_path / "set", {"object": names}, size=8, synonyms={names[1]: ["stove", "cooker"]}) as writer:
        writer.add('dir/a, "b"', np.zeros((8, 8, 3), np.uint8), {"object": np.array([[1, 2], [3, 0]])})
    broden = Broden(tmp_path / "set")
    assert {label.name for label in broden.labels} == set(names)
    assert broden.label(names[1]).synonyms == ("stove", "cooker") and validate(tmp_path / "set") == []


def test_a_trap_set_written_again_is_the_same(pristine, tmp_path):
    """Read with one, written with the other, read again."""
    broden = Broden(pristine.root)
    names = {category: {n: pristine.names[n] for n, own in pristine.membership.items() if category in own} for category in CATEGORIES}
    with BrodenWriter(tmp_path / "set", names, size=None, segmentation_size=16, image_format="png") as writer:
        for i, row in enumerate(broden.rows):
            labels = {}
            for category, found in broden.image_labels(i):
                if category not in labels:  # a category with both kinds is for the reader only
                    labels[category] = found if found.dim() == 3 else [pristine.names[n] for n in found.tolist()]
            writer.add(row.image, broden[i].image, labels)
    assert validate(tmp_path / "set") == []
    again = Broden(tmp_path / "set")
    assert [row.image.replace(".png", ".jpg") for row in again.rows] != []
    assert len(again) == len(broden)


def test_an_error_leaves_no_data_set(tmp_path):
    with pytest.raises(ValueError, match="scene has no label 'moon'"), BrodenWriter(tmp_path / "set", NAMES, size=8) as writer:
        writer.extend((name, np.zeros((8, 8, 3), np.uint8), {"scene": name}) for name in ("beach-s", "moon"))
    assert not (tmp_path / "set" / "index.csv").exists()


def test_the_writer_refuses(tmp_path):
    for arguments, message in [
        ({"categories": {"my object": ["a"]}}, "cannot be the name of a category"),
        ({"categories": {"image": ["a"]}}, "cannot be the name of a category"),
        ({"categories": {"object": "cat"}}, "got the text 'cat'"),
        ({"categories": {"object": ["a", ""]}}, "'' cannot be the name of a label"),
        ({"categories": {"object": ["a\nb"]}}, "cannot be the name of a label"),
        ({"categories": {"object": {0: "wall"}}}, "value 0 is 'wall' and unlabeled"),
        ({"categories": {"object": [f"{i}" for i in range(70_000)]}}, "70000 labels; the format has room for 65535"),
        ({"size": 1}, "a size of 1 × 1"),
        ({"size": (MAX_SIDE, MAX_PIXELS)}, "a size of"),
        ({"image_format": "gif"}, "'jpg' or 'png'"),
    ]:
        with pytest.raises(ValueError, match=message):
            BrodenWriter(tmp_path / "set", **{"categories": NAMES, **arguments})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("precious")
    with pytest.raises(DatasetError, match="not an empty folder"):
        BrodenWriter(tmp_path / "full", NAMES)

    writer = BrodenWriter(tmp_path / "set", NAMES, size=8)
    image = np.zeros((8, 8, 3), np.uint8)
    writer.add("a", image, {"scene": "beach-s"})
    plane = np.ones((4, 4), int)
    for name, picture, labels, message in [
        ("../b", image, {}, "cannot be a name"),
        ("b;c", image, {}, "cannot be a name"),
        ("/b", image, {}, "cannot be a name"),
        ("a", image, {}, "file a.jpg already exists"),
        ("A.JPG", image, {}, "already exists"),
        ("b", image, {"colour": plane}, "no category 'colour'; there are object, part, scene"),
        ("b", image, {"object": plane * 4}, "value 4 of the label map of object has no name"),
        ("b", image, {"object": plane * -1}, "value -1 "),
        ("b", image, {"object": plane * 1.5}, "got an array of float64"),
        ("b", image, {"object": np.ones(4, int)}, r"shape \(4,\)"),
        ("b", image, {"object": np.ones((0, 4), int)}, r"shape \(0, 4\)"),
        ("b", image, {"scene": "cat"}, "scene has no label 'cat'"),
        ("b", image.astype(float), {"object": plane}, "image is an array of float64"),
        ("b", image.transpose(2, 0, 1), {"object": plane}, r"shape \(3, 8, 8\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.add(name, picture, labels)
    writer.extend([("b", image, {"object": plane})])  # what was refused took no name
    writer.finish()
    with pytest.raises(ValueError, match="is finished"):
        writer.add("c", image, {"scene": "beach-s"})
    with pytest.raises(ValueError, match="is finished"):
        writer.finish()
    assert len(Broden(tmp_path / "set")) == 2
    with pytest.raises(ValueError, match="no label in the 0 images"), BrodenWriter(tmp_path / "none", NAMES):
        pass
