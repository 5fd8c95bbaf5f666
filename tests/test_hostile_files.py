"""Files that are none, pictures that are others, cells that are formulas, and values of other types."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import resource
import socket
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from PIL import Image

from torchprobe.analysis import Baseline, Embeddings, embed
from torchprobe.analysis.embeddings_file import KIND
from torchprobe.analysis.given_files import open_given
from torchprobe.common import limits, storage
from torchprobe.common.arrays import open_arrays
from torchprobe.common.csv_files import read_rows, write_rows
from torchprobe.common.reading import open_regular, read_json
from torchprobe.datasets import Broden, BrodenWriter, DatasetError, image_folder, text_file
from torchprobe.datasets.images import Images, image_files
from torchprobe.datasets.importers import import_coco
from torchprobe.datasets.photos import read_photo
from torchprobe.datasets.pictures import FileError, opened
from torchprobe.dissection.sparse_file import read_basis
from torchprobe.dissection.words import read_concepts
from torchprobe.encoders import EncoderError, load_head
from torchprobe.encoders.checkpoint import read_checkpoint
from torchprobe.encoders.suite import SuiteRow, load_suite


def broden(folder: Path) -> object:
    with BrodenWriter(folder / "set", {"object": ["sky"]}, size=16, image_format="png") as writer:
        writer.add("a/1", np.zeros((16, 16, 3), np.uint8), {"object": np.ones((2, 8, 8), int)})
    return Broden(folder / "set").image_labels(0)


def baseline(path: Path) -> object:
    return Baseline.from_csv(path)


# -- special files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def special(tmp_path: Path) -> list[Path]:
    """Names of a pipe, a socket, a folder and a link that leads nowhere."""
    if not hasattr(os, "mkfifo"):
        pytest.skip("there are no pipes with names")
    folder = tmp_path / "special"
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    place = os.getcwd()
    os.chdir(folder)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket")
    finally:
        os.chdir(place)
    (folder / "folder").mkdir()
    (folder / "nowhere").symlink_to(folder / "none")
    return [folder / name for name in ("pipe", "socket", "folder", "nowhere")] + [Path("/dev/zero")]


def test_special_files_are_refused_by_every_reader(special: list[Path], tmp_path: Path) -> None:
    """Nothing hangs, and each reader raises the error that it documents."""
    readers: dict[str, Callable[[Path], object]] = {
        ".png": read_photo, ".npy": open_arrays, ".npz": open_arrays, ".safetensors": read_checkpoint, ".pt": read_checkpoint,
        ".head.pt": lambda path: load_head(path, 3), ".toml": load_suite, ".csv": baseline, ".txt": read_concepts, ".jsonl": text_file,
        ".sae.npy": read_basis, ".given.npz": open_given, ".json": read_json,
        ".coco": lambda path: import_coco(path, tmp_path, tmp_path / "out"),
    }  # fmt: skip
    for suffix, read in readers.items():
        for path in special:
            link = tmp_path / f"{path.name}{suffix}"
            link.symlink_to(path)
            with pytest.raises((OSError, ValueError, DatasetError, EncoderError)):
                read(link)


def test_special_files_in_a_folder_are_left_out(special: list[Path], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "more").mkdir(parents=True)
    Image.new("RGB", (4, 3)).save(photos / "a.png")
    Image.new("RGB", (4, 3)).save(photos / "more" / "b.png")
    for path in special:
        (photos / f"{path.name}.png").symlink_to(path)
    (photos / "again").symlink_to(photos)
    paths, others = image_files(photos)
    assert [path.relative_to(photos).as_posix() for path in paths] == ["a.png", "more/b.png"]
    assert others == 4  # the folder is one of its folders
    (batch,) = Images([photos / "pipe.png", *paths]).batches(lambda image: torch.zeros(3, 1, 1), 3)
    assert batch.unreadable == [(str(photos / "pipe.png"), "the file cannot be read (not a regular file)")] and len(batch.names) == 2


def test_a_regular_file_is_read_as_ever(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1]}')
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    assert read_json(tmp_path / "link.json") == {"a": [1]}
    with open_regular(tmp_path / "a.json") as file:
        assert not os.get_inheritable(file.fileno()) and file.read(1) == b"{"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "b.json")
    with pytest.raises(OSError, match="null"):
        open_regular("a\0b")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_while_a_file_is_opened_is_not_lost(tmp_path: Path) -> None:
    """Ctrl-C at any moment: it arrives, and the descriptor is closed once (a second time, it could be the file of another thread)."""
    path = tmp_path / "a.json"
    path.write_text("[1]")
    before, moment, ended = len(os.listdir("/dev/fd")), 0, False
    while not ended:
        left = moment = moment + 1

        def interrupt(frame: FrameType, event: str, value: object) -> None:
            nonlocal left
            nobodys = value is os.open or (event == "return" and frame.f_code.co_name == "_regular")  # the descriptor has no owner yet
            left -= frame.f_code.co_filename != __file__ and not nobodys
            if left == 0:
                left = -1
                raise KeyboardInterrupt

        sys.setprofile(interrupt)
        try:
            open_regular(path).close()
            ended = left > 0
        except KeyboardInterrupt:
            pass
        finally:
            sys.setprofile(None)
    assert moment > 8 and len(os.listdir("/dev/fd")) == before


def test_an_absurd_length_takes_no_memory(tmp_path: Path) -> None:
    """A decoder asks for 4 GB, or for 2^56 bytes, of a file of a few hundred."""
    Image.new("RGB", (10, 12)).save(tmp_path / "a.png")
    torch.save({"weight": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    for name, read, at, length in (("a.png", read_photo, b"IDAT", b"\xff" * 4), ("a.pt", read_checkpoint, b"protocol", b"\xff" * 4)):
        data = (tmp_path / name).read_bytes()
        before = data.index(at) - 4
        (tmp_path / name).write_bytes(data[:before] + length + data[before + 4 :])
        tracemalloc.start()
        with contextlib.suppress(DatasetError, EncoderError):
            read(tmp_path / name)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert most < 1 << 24, name


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    name = "a" * 5000
    with pytest.raises(EncoderError, match="no checkpoint"):
        read_checkpoint(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Embeddings.load(tmp_path / name)
    row = SuiteRow("one", "zero-shot", "ViT-B-32", "OpenAI", "open_clip:ViT-B-32", checkpoint=name)
    assert str(row.missing()).startswith("no file at aaa")


def test_a_sparse_file_is_not_read_whole(tmp_path: Path) -> None:
    for name, read in {"a.toml": load_suite, "a.txt": read_concepts, "a.csv": baseline, "a.png": read_photo, "a.json": read_json}.items():
        with open(tmp_path / name, "wb") as file:
            file.truncate(1 << 40)
        with pytest.raises((ValueError, DatasetError, EncoderError), match="TORCHPROBE_LIMITS="):
            read(tmp_path / name)


# -- pictures ----------------------------------------------------------------------------------------------------------------


def test_no_other_program_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is drawn by Ghostscript, which Pillow calls whatever the name of the file is."""
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    Image.new("RGB", (4, 3)).save(photos / "b.png", "TGA")
    (batch,) = image_folder(photos).batches(lambda image: torch.zeros(3, 1, 1), 2)
    assert [why for _, why in batch.unreadable] == ["it is not a picture in one of the formats JPEG, PNG, BMP, GIF, PPM, TIFF, WEBP"] * 2
    with pytest.raises(DatasetError, match="not a picture in one of the formats"):
        read_photo(photos / "a.png")
    assert not (tmp_path / "called").exists()


def test_pictures_are_opened_in_one_place() -> None:
    package = Path(limits.__file__).parents[1]
    found = [path.name for path in package.rglob("*.py") if re.search(r"\b(Image|pil)\.open\(", path.read_text(encoding="utf-8"))]
    assert found == ["pictures.py"]


class Flat(torch.nn.Flatten):
    """An encoder that takes the pixels as they are."""

    @staticmethod
    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).movedim(2, 0).float()


def test_the_warning_of_pillow_is_not_filtered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 150)
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    with pytest.warns(Image.DecompressionBombWarning):
        found = embed(Flat(), image_folder(tmp_path))
    assert found.h.shape == (1, 600)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DatasetError, match="exceeds limit"):
        read_photo(tmp_path / "a.png")


def test_texts_and_profiles_of_a_png_are_bounded(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    data, bomb = (tmp_path / "a.png").read_bytes(), zlib.compress(bytes(1 << 27))
    for kind, content in ((b"zTXt", b"a\0\0" + bomb), (b"iCCP", b"a\0\0" + bomb)):
        chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        (tmp_path / "b.png").write_bytes(data[:33] + chunk + data[33:])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with contextlib.suppress(FileError), opened(tmp_path / "b.png") as image:
            assert len(image.info.get("icc_profile") or b"") <= 1 << 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16  # kilobytes


def test_a_large_picture_is_decoded_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many threads one decodes a large picture at a time; small ones do not wait."""
    monkeypatch.setattr("torchprobe.datasets.pictures._LARGE", 100)
    Image.new("RGB", (20, 10)).save(tmp_path / "large.png")
    Image.new("RGB", (2, 1)).save(tmp_path / "small.png")
    inside, most, lock = [0], [0], threading.Lock()

    def preprocess(image: Image.Image) -> torch.Tensor:
        if image.width == 20:
            with lock:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
            threading.Event().wait(0.02)
            with lock:
                inside[0] -= 1
        return torch.zeros(3, 1, 1)

    batches = list(Images([tmp_path / "large.png", tmp_path / "small.png"] * 6).batches(preprocess, 4, workers=4))
    assert most == [1] and sum(len(batch.names) for batch in batches) == 12


# -- CSV ---------------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "=1+1",
    "+1-1",
    "-c",
    "@SUM(A1)",
    "\t=1",
    "'=1",
    "''@x",
    "'plain",
    "-1.5",
    "-",
    "plain",
    'a "b", c',
    "a\nb",
    "",
    "−5",
    " =1",
]


def test_no_cell_is_a_formula_and_all_come_back(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.csv", [["name", "x"], *([text, -1.5] for text in HOSTILE)])
    with open(path, newline="", encoding="utf-8") as file:
        cells = [row[0] for row in csv.reader(file)][1:]
    for cell in cells:
        assert cell[:1] not in ("=", "+", "@", "\t", "\r") and (cell[:1] != "-" or cell == "-1.5"), cell
    back = [row for _, row in read_rows(path)]
    assert back == [["name", "x"], *([text, "-1.5"] for text in HOSTILE)]


def test_control_characters_are_written_as_escapes(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.csv", [["a\x1b[2J\x07\x9b\r", "b\udcff", None, float("nan"), True]])
    assert path.read_bytes() == b"a\\x1b[2J\\x07\\x9b\\x0d,b\\udcff,,nan,True\n"


def test_names_of_labels_that_look_like_formulas_survive(tmp_path: Path) -> None:
    with BrodenWriter(tmp_path / "set", {"object": ["=sky", "-sea"]}, size=16, image_format="png") as writer:
        writer.add("a/1", np.zeros((16, 16, 3), np.uint8), {"object": np.arange(64).reshape(8, 8) % 3})
    assert [label.name for label in Broden(tmp_path / "set").labels] in (["=sky", "-sea"], ["-sea", "=sky"])
    assert "'=sky" in (tmp_path / "set" / "label.csv").read_text()


def test_an_empty_table_of_categories_is_named(tmp_path: Path) -> None:
    broden(tmp_path)
    (tmp_path / "set" / "category.csv").write_text("name,first,last,count,frequency\n")
    with pytest.raises(DatasetError, match="category.csv: it lists no category"):
        Broden(tmp_path / "set")


# -- embeddings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": "12"}, "classes: expected list"),
        ({"classes": [1, "2"]}, r"classes\[1\]: expected int"),
        ({"classes": [True]}, r"classes\[0\]: expected int"),
        ({"groups": {"0": "02"}}, "groups.0: expected list"),
        ({"groups": {"x": [0]}}, "damaged"),
        ({"groups": {"-1": [-1, 1]}}, "row -1"),
        ({"partial": "no"}, "partial: expected bool"),
    ],
)
def test_values_of_embeddings_have_their_types(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    Embeddings(torch.eye(2), torch.tensor([0, 1]), ["a", "b"], classes=(0, 1)).save(tmp_path / "h.safetensors")
    file = storage.File(tmp_path / "h.safetensors", KIND)
    tensors = {key: file.tensor(key) for key in file.keys}
    storage.write(tmp_path / "i.safetensors", KIND, tensors, {**file.values, **changes})
    with pytest.raises(ValueError, match=message):
        Embeddings.load(tmp_path / "i.safetensors")
    names = torch.frombuffer(bytearray(json.dumps({"ids": ["a", "a"], "skipped": []}).encode()), dtype=torch.uint8)
    storage.write(tmp_path / "j.safetensors", KIND, {**tensors, "names": names}, file.values)
    with pytest.raises(ValueError, match="'a' twice"):
        Embeddings.load(tmp_path / "j.safetensors")
