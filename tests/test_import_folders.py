"""The folder that an import writes: whole or not there, never over something else; and the command line."""

import json
import os
import signal
import time

import numpy as np
import pytest
from import_sets import EXACT, assert_shows, drawn, mask, photo, reasons, rows, write_json
from PIL import Image
from processes import start

from torchprobe import cli
from torchprobe.datasets import Broden, BrodenWriter, DatasetError, import_binary_masks, import_hugging_face, import_label_maps

MAP = drawn("00112233 00112233 00112233 44445555 44445555 44445555")
NAMES = {1: "cat", 2: "dog", 4: "sky", 5: "far"}


@pytest.fixture
def source(tmp_path):
    for i in range(4):
        photo(tmp_path / "photos" / f"{i}.jpg", i)
        mask(tmp_path / "masks" / f"{i}.png", MAP)
    write_json(tmp_path / "names.json", NAMES)
    return tmp_path


def maps(source, out="set", **options):
    return import_label_maps(source / "photos", source / "masks", NAMES, source / out, **{**EXACT, **options})


def left(folder):
    """The entries of a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())


# -- whole or not there --------------------------------------------------------------------------------------------------------


def test_a_set_is_replaced_only_on_request(source):
    maps(source, limit=1)
    with pytest.raises(DatasetError, match="overwrite"):
        maps(source)
    assert len(rows(source / "set")) == 1
    maps(source, overwrite=True)
    assert len(rows(source / "set")) == 4
    assert left(source) == ["masks", "names.json", "photos", "set"]


def test_nothing_but_a_data_set_is_replaced(source):
    maps(source)
    (source / "set" / "notes.txt").write_text("mine")
    with pytest.raises(DatasetError, match="it has notes.txt"):
        maps(source, overwrite=True)
    (source / "home" / "images").mkdir(parents=True)
    with pytest.raises(DatasetError, match="not a complete data set"):
        maps(source, "home", overwrite=True)
    with pytest.raises(DatasetError, match="is a file"):
        maps(source, "names.json", overwrite=True)
    assert (source / "set" / "notes.txt").read_text() == "mine"


def test_an_empty_folder_and_missing_parents_are_fine(source):
    (source / "empty").mkdir()
    maps(source, "empty")
    maps(source, "new/deep/set")
    assert len(rows(source / "empty")) == len(rows(source / "new" / "deep" / "set")) == 4


@pytest.mark.parametrize("out", ["photos", "photos/set", "masks/set", "."])
def test_a_set_and_its_source_do_not_lie_in_each_other(source, out):
    with pytest.raises(DatasetError, match="lie in each other|not empty"):
        maps(source, out, overwrite=True)
    assert left(source) == ["masks", "names.json", "photos"]


def test_a_set_cannot_replace_its_own_source(source):
    """The images/ of a data set are a folder of images, too."""
    maps(source)
    with pytest.raises(DatasetError, match="lie in each other"):
        import_label_maps(source / "set" / "images", source / "masks", NAMES, source / "set", overwrite=True)
    assert len(rows(source / "set")) == 4


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError])
def test_an_error_in_the_middle_leaves_what_was_there(source, error):
    maps(source, limit=1)

    def fail(done, total):
        if done == 2:
            raise error

    with pytest.raises(error):
        maps(source, overwrite=True, progress=fail)
    with pytest.raises(error):
        maps(source, "other", progress=fail)
    assert left(source) == ["masks", "names.json", "photos", "set"] and len(rows(source / "set")) == 1


def test_inputs_that_cannot_be_used_make_no_folders(source):
    with pytest.raises(DatasetError, match="name of a label"):
        import_label_maps(source / "photos", source / "masks", {1: 5}, source / "new" / "deep" / "set")
    assert left(source) == ["masks", "names.json", "photos"]


def test_a_kill_leaves_only_a_hidden_folder_that_is_no_data_set(source):
    """And the same command then works."""
    code = """
import sys
from pathlib import Path
from torchprobe.datasets import import_label_maps
def wait(done, total):
    if done == 2:
        Path(sys.argv[1], "here").touch()
        import time; time.sleep(60)
root = Path(sys.argv[1])
import_label_maps(root / "photos", root / "masks", {1: "cat", 2: "dog", 4: "sky", 5: "far"}, root / "set", progress=wait)
"""
    running = start(code, source)
    until = time.monotonic() + 60
    while not (source / "here").exists() and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.join()
    parts = [name for name in left(source) if name.startswith(".")]
    assert len(parts) == 1 and not (source / "set").exists()
    with pytest.raises(DatasetError, match=r"no index.csv"):
        Broden(source / parts[0])
    maps(source)
    assert len(rows(source / "set")) == 4


def test_missing_inputs_are_named(source):
    for arguments in ((source / "none", source / "masks"), (source / "photos", source / "none")):
        with pytest.raises(DatasetError, match="none does not exist"):
            import_label_maps(*arguments, NAMES, source / "set")
        with pytest.raises(DatasetError, match="none does not exist"):
            import_binary_masks(*arguments, source / "set")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        maps(source, limit=0)
    with pytest.raises(TypeError, match="sise"):
        maps(source, sise=3)
    assert left(source) == ["masks", "names.json", "photos"]


def test_labels_that_are_too_rare_are_reported(source):
    mask(source / "masks" / "0.png", np.where(MAP == 5, 0, MAP))
    report = maps(source, min_frequency=4)
    assert {label.name for label in Broden(source / "set").labels} == {"cat", "dog", "sky"}
    dropped = [remark for remark in report.dropped if "min_frequency" in remark.reason]
    assert [(remark.what, remark.count, remark.examples) for remark in dropped] == [("labels", 1, ["far"])]
    assert report.labels == 3


def test_images_can_be_resized_and_converted(source):
    maps(source, size=(12, 10), segmentation_size=None, image_format="png")
    row = Broden(source / "set").rows[0]
    assert row.image.endswith(".png") and (row.height, row.width, row.label_height, row.label_width) == (12, 10, 6, 5)


# -- the writer keeps files ------------------------------------------------------------------------------------------------------


def test_the_writer_keeps_files_of_their_size(tmp_path):
    photo(tmp_path / "a.jpg", 1)
    photo(tmp_path / "lies.png", 2)
    (tmp_path / "lies.png").rename(tmp_path / "lies.jpg")
    with BrodenWriter(tmp_path / "set", {"object": ["x"]}, size=None, image_format="keep") as writer:
        for name, image in {"a": tmp_path / "a.jpg", "b": str(tmp_path / "lies.jpg"), "c": np.zeros((6, 8, 3), np.uint8)}.items():
            writer.add(name, image, {"object": np.ones((6, 8), int)})
    assert rows(tmp_path / "set") == ["a.jpg", "b.png", "c.png"]
    for written, original in (("a.jpg", "a.jpg"), ("b.png", "lies.jpg")):
        assert (tmp_path / "set" / "images" / written).read_bytes() == (tmp_path / original).read_bytes()


def test_the_writer_resizes_in_the_format_of_the_file(tmp_path):
    with BrodenWriter(tmp_path / "set", {"object": ["x"]}, size=4, image_format="keep") as writer:
        for name in ("a.jpg", "b.png"):
            writer.add(name, photo(tmp_path / name), {"object": np.ones((6, 8), int)})
    assert rows(tmp_path / "set") == ["a.jpg", "b.png"]
    for name, kind in (("a.jpg", "JPEG"), ("b.png", "PNG")):
        with Image.open(tmp_path / "set" / "images" / name) as image:
            assert (image.size, image.format) == ((4, 4), kind)
    with pytest.raises(ValueError, match="image_format must be"):
        BrodenWriter(tmp_path / "other", {"object": ["x"]}, image_format="gif")


def test_damaged_files_are_not_copied(tmp_path):
    whole = photo(tmp_path / "a.jpg", size=(60, 80)).read_bytes()
    (tmp_path / "b.jpg").write_bytes(whole[: len(whole) // 2])
    images = [{"image": tmp_path / name, "label": np.ones((60, 80), int), "id": name} for name in ("a.jpg", "b.jpg")]
    report = import_hugging_face(images, tmp_path / "set", id2label={1: "x"})
    assert rows(tmp_path / "set") == ["a.jpg"]
    assert report.dropped[0].examples[0].startswith("b.jpg")


# -- the command line ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command line in this process; gives exit code, standard output and standard error."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main(["concepts", "import", *(str(argument) for argument in arguments)])
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    return call


def command(source, *more):
    folders = ("--images", source / "photos", "--masks", source / "masks", "--out", source / "set")
    return ("label-maps", *folders, "--names", source / "names.json", *more)


def test_the_command_imports_and_reports(source, run):
    code, out, err = run(*command(source, "--segmentation-size", "6x8"))
    assert (code, err) == (0, "importing …\n")
    assert f"4 images with 4 labels in {source / 'set'}" in " ".join(out.split())
    assert "a value without a name; they count as unlabeled" in out and "(12.5%)" in out and "value 3 in 0" in out
    assert_shows(source / "set", "0", {"object": {NAMES[value]: value == MAP for value in NAMES}})
    code, out, err = run(*command(source))
    assert (code, out) == (1, "") and "--overwrite" in err and "Traceback" not in err
    code, out, _ = run(*command(source, "--overwrite", "--json", "--limit", 2, "--void", 4, "--unlabeled", 3))
    assert code == 0
    assert json.loads(out)["images"] == 2 == len(Broden(source / "set"))
    assert json.loads(out) == json.loads((source / "set" / "import.json").read_text())


@pytest.mark.parametrize("size", ["0", "x", "5x", "1x2x3", "-3", "99999", "½"])
def test_impossible_sizes_are_wrong_usage(source, run, size):
    code, out, err = run(*command(source, "--size", size))
    assert (code, out) == (2, "") and "is not a number of pixels" in err


def test_every_format_has_a_command_that_needs_its_paths(run):
    formats = {
        "coco": ["annotations", "images", "out"],
        "coco-panoptic": ["annotations", "segments", "images", "out"],
        "ade20k": ["root", "out"],
        "voc": ["root", "out"],
        "label-maps": ["images", "masks", "names", "out"],
        "binary-masks": ["images", "masks", "out"],
        "hugging-face": ["dataset", "id2label", "out"],
    }
    _, out, _ = run("--help")
    commands = out.partition("Commands:")[2].partition("Exit codes:")[0]
    listed = [line.split()[0] for line in commands.splitlines() if line.strip()]
    assert listed == sorted(formats)
    for name, paths in formats.items():
        page = run(name, "--help")[1]
        assert all(f"--{path}" in page for path in paths) and "Exit codes:" in page
        options = [part for path in paths for part in (f"--{path}", "/nowhere/in")]
        assert run(name, *options[2:])[0] == 2
        code, out, err = run(name, *options)
        assert (code, out) == (1, "") and err == "importing …\nError: /nowhere/in does not exist\n"


def test_names_of_files_cannot_move_the_cursor(source, run):
    photo(source / "photos" / "\x1b[31mred.png")
    code, out, _ = run(*command(source))
    assert code == 0 and "\x1b" not in out and "\\x1b[31mred" in out


def test_masks_that_no_image_has(source, tmp_path):
    """One of a single pixel, and one whose rows have different lengths: the image is left out, and the others are there."""
    for name in ("1", "2"):
        mask(source / "binary" / "cat" / f"{name}.png", np.ones((6, 8), np.uint8) if name == "1" else np.ones((1, 1), np.uint8))
    report = import_binary_masks(source / "photos", source / "binary", source / "set", **EXACT)
    assert report.images == 1 and reasons(report.dropped)["images: the mask is far too small for the image"] == 1
    image = Image.open(photo(source / "one.png", 3))
    ragged = {"image": image, "label": [[0, 1], [1]]}
    report = import_hugging_face([ragged, {"image": image, "label": MAP}], source / "rows", id2label=NAMES, **EXACT)
    assert report.images == 1 and reasons(report.dropped)["images: the mask is not an array of integers (height, width)"] == 1
