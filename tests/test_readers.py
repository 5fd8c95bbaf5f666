"""Images from shards, stores, data sets, loaders and streams: the same pictures, names and labels, whoever reads them."""

from __future__ import annotations

import functools
import http.server
import io
import itertools
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from shard_sets import numbers, pixels, png, samples, shards, tar, to_tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, TensorDataset, get_worker_info

from torchprobe.common import limits
from torchprobe.common.facts import UNIDENTIFIED
from torchprobe.datasets import DatasetError, ImageSet, open_images, open_shards
from torchprobe.datasets.readers import stored
from torchprobe.datasets.readers.hugging_face import HuggingFaceImages
from torchprobe.datasets.readers.items import Reading
from torchprobe.datasets.readers.stores import expanded, matching
from torchprobe.datasets.sampling import sample, shuffled


@pytest.fixture
def memory():
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


# -- shards ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 100])
def test_shards_hold_the_pictures_in_order_with_their_labels(tmp_path, size):
    images = open_shards(shards(tmp_path))
    assert isinstance(images, ImageSet) and images.root == tmp_path
    assert numbers(images, size) == list(images.labels) == [*range(9)]
    assert [images.name(path) for path in images.paths][2:4] == ["000.tar/00002.png", "001.tar/00003.png"]
    assert numbers(images, size, only=[0], workers=1) == [*range(min(size, 9))]
    assert [images.size(path) for path in images.paths] == [len(png(i)) for i in range(9)]
    assert images.picture(images.paths[5]).tobytes() == pixels(5).tobytes()


def test_images_that_lie_side_by_side_are_read_with_one_request(tmp_path, monkeypatch):
    images, asked = open_shards(shards(tmp_path)), []

    def counted(file, start, end):
        asked.append(Path(file).name)
        return read(file, start, end)

    read = stored.read_range
    monkeypatch.setattr(stored, "read_range", counted)
    assert numbers(images, 9) == [*range(9)]
    assert sorted(asked) == ["000.tar", "001.tar", "002.tar"]
    asked.clear()
    monkeypatch.setattr(stored, "RUN", 1)  # bytes of one request
    assert numbers(images, 9) == [*range(9)] and len(asked) == 9
    asked.clear()
    monkeypatch.setattr(stored, "RUN", 1 << 20)
    monkeypatch.setattr(stored, "GAP", 0)  # the labels lie between the pictures
    assert numbers(images, 9) == [*range(9)] and len(asked) == 9


def test_samples_and_orders_of_shards(tmp_path):
    images = open_shards(shards(tmp_path))
    assert numbers(images.take([7, 0, 3])) == list(images.take([7, 0, 3]).labels) == [7, 0, 3]
    mixed = shuffled(images)
    assert numbers(mixed) == list(mixed.labels) and sorted(mixed.labels) == [*range(9)] != list(mixed.labels)
    assert numbers(sample(images, 4, seed=1)) == list(sample(images, 4, seed=1).labels)
    few = open_images(f"{tmp_path}/*.tar", limit=4, seed=3)
    assert numbers(few) == list(few.labels) == sorted(few.labels) and len(few) == 4


@pytest.mark.parametrize("where", ["{000..002}.tar", "*.tar", "", "00[012].tar", "{000,001,002}.tar"])
def test_names_of_shards(tmp_path, where):
    shards(tmp_path)
    assert numbers(open_images(f"{tmp_path}/{where}")) == [*range(9)]
    assert numbers(open_images(f"file://{tmp_path}/{where}")) == [*range(9)]
    assert numbers(open_images([f"{tmp_path}/001.tar", f"{tmp_path}/000.tar"])) == [3, 4, 5, 6, 7, 0, 1, 2]


def test_braces():
    assert expanded("a{1..3}b{x,y}") == ["a1bx", "a1by", "a2bx", "a2by", "a3bx", "a3by"]
    assert expanded("{8..11}") == ["8", "9", "10", "11"] and expanded("{08..11}")[0] == "08"
    for pattern, message in {
        "{3..1}": "counts down",
        "{a}": "expected {a,b} or {000..009}, got {a}",
        "{0..99999999}": "more than 1,048,576 shards",
        "{0..999}{0..9999}": "more than 1,048,576 shards",
    }.items():
        with pytest.raises(DatasetError, match=message):
            expanded(pattern)


def test_a_shard_is_read_once(tmp_path):
    shards(tmp_path)
    with pytest.raises(DatasetError, match=r"names .*000.tar more than once"):
        matching(f"{tmp_path}/{{000,000}}.tar")
    with pytest.raises(DatasetError, match="nothing matches"):
        matching(f"{tmp_path}/x*.tar")


def test_what_cannot_be_read_is_counted_and_named(tmp_path):
    good, bad = png(1), b"damaged"
    first = tar(tmp_path / "0.tar", [("a.png", good), ("b.png", bad), ("../c.png", good), ("d.png", good)])
    second = tar(tmp_path / "1.tar", [("e.png", good), ("f.png", good)])
    second.write_bytes(second.read_bytes()[: 1024 + 512 + 20])
    images = open_shards([first, second])
    (batch,) = images.batches(to_tensor, 8)
    assert batch.names == ["0.tar/a.png", "0.tar/d.png", "1.tar/e.png"] and batch.indices == [0, 3, 4] and batch.files == 6
    reasons = dict(batch.unreadable)
    assert reasons["0.tar/b.png"].startswith("it is not a picture") and "out of the archive" in reasons["0.tar/../c.png"]
    assert "the rest of the shard cannot be read: the archive is truncated" in reasons["1.tar/(from byte 1024)"]
    with limits.changed(picture_bytes=10):
        (batch,) = images.batches(to_tensor, 8)
    assert "more than 10 bytes" in dict(batch.unreadable)["0.tar/a.png"]


def test_a_shard_that_vanishes_is_named(tmp_path):
    images = open_shards(shards(tmp_path))
    (tmp_path / "001.tar").unlink()
    batches = [*images.batches(to_tensor, 4)]
    assert sum(len(batch.names) for batch in batches) == 4
    assert {name[:3] for batch in batches for name, _ in batch.unreadable} == {"001"}
    assert "it cannot be read (FileNotFoundError" in batches[0].unreadable[0][1]


def test_content_counts_not_where_it_is_kept(tmp_path, memory):
    images = open_shards(shards(tmp_path / "a"))
    assert open_shards(shards(tmp_path / "b")).digest() == images.digest()
    for path in (tmp_path / "a").iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    assert open_images("memory://bucket/{000..002}.tar").digest() == images.digest()
    assert images.take([0, 1]).digest() != images.digest() != images.take([1, 0, *range(2, 9)]).digest()
    tar(tmp_path / "b" / "002.tar", samples([200]))
    assert open_images(str(tmp_path / "b")).digest() != images.digest()
    told = [open_shards(shards(tmp_path / "a"), identity=text).digest() for text in ("first", "first", "second")]
    assert told[0] == told[1] != told[2]


# -- stores ------------------------------------------------------------------------------------------------------------------


def test_shards_of_a_store(tmp_path, memory):
    for path in shards(tmp_path):
        memory.pipe(f"/bucket/a/{path.name}", path.read_bytes())
    for where in ("memory://bucket/a/{000..002}.tar", "memory://bucket/a/*.tar"):
        images = open_images(where)
        assert numbers(images) == list(images.labels) == [*range(9)] and images.root is None
        assert images.name(images.paths[0]) == "000.tar/00000.png"


def test_a_folder_of_a_store(memory):
    for number, name in enumerate(("b/x.png", "a.png", "c.PNG")):
        memory.pipe(f"/photos/{name}", png(number))
    memory.pipe("/photos/notes.txt", b"mine")
    images = open_images("memory://photos")
    assert [images.name(path) for path in images.paths] == ["a.png", "b/x.png", "c.PNG"]
    assert numbers(images) == [1, 0, 2] and images.remarks == ["left out: 1 other file"]
    before = images.digest()
    memory.pipe("/photos/a.png", png(9))
    assert open_images("memory://photos").digest() != before
    for where, message in {"memory://nothing": "it is empty, or does not exist", "memory://photos/notes.txt": "no images in"}.items():
        with pytest.raises(DatasetError, match=message):
            open_images(where)


def test_a_store_that_is_not_there():
    pytest.importorskip("fsspec")
    with pytest.raises(DatasetError, match="nonsense://"):
        open_images("nonsense://a/b.tar")
    with pytest.raises(DatasetError, match="there is no shard memory://nowhere/a.tar"):
        open_images("memory://nowhere/a.tar")
    with pytest.raises(DatasetError, match="names another machine, elsewhere"):
        open_images("file://elsewhere/a.tar")


class Server(http.server.SimpleHTTPRequestHandler):
    """A server of files that gives parts of them, unless ``whole``."""

    whole = False

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = part = path.read_bytes()
        span = self.headers.get("Range")
        if span and not self.whole:
            first, _, last = span.removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_of_a_web_server(tmp_path, whole):
    pytest.importorskip("aiohttp")
    shards(tmp_path)
    handler = functools.partial(type("Handler", (Server,), {"whole": whole}), directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        images = open_images(f"http://127.0.0.1:{server.server_port}/{{000..002}}.tar")
        assert list(images.labels) == [*range(9)]
        if not whole:
            assert numbers(images) == [*range(9)]
        else:  # other bytes must not be taken for those of the picture
            (batch,) = images.batches(to_tensor, 9)
            assert not batch.names and all("does not give parts of files" in why for _, why in batch.unreadable)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


# -- data sets and loaders ---------------------------------------------------------------------------------------------------


class Pictures(Dataset):
    """Items of several forms; the fourth cannot be read."""

    def __init__(self, form: str = "pair") -> None:
        self.form = form

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int):
        if index == 3:
            raise OSError("gone")
        picture = Image.fromarray(pixels(index))
        return {
            "pair": (picture, index),
            "alone": picture,
            "tensor": (to_tensor(picture), torch.tensor(index)),
            "mapping": {"image": picture, "label": index},
            "bytes": {"png": png(index), "cls": index},
            "array": (pixels(index), index),
            "hugging face": {"image": {"bytes": png(index), "path": None}, "fine_label": index},
        }[self.form]


@pytest.mark.parametrize("form", ["pair", "alone", "tensor", "mapping", "bytes", "array", "hugging face"])
def test_forms_of_items(form):
    images = open_images(Pictures(form))
    batches = [*images.batches(to_tensor, 3)]
    assert [batch.names for batch in batches] == [["0", "1", "2"], ["4", "5"], ["6"]]
    assert batches[1].unreadable == [("3", "OSError: gone")] and batches[1].indices == [4, 5] and batches[1].files == 3
    expected = [0, 1, 2, 4, 5, 6]
    assert [label for batch in batches for label in batch.labels] == (expected if form != "alone" else [-1] * 6)
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), torch.stack([to_tensor(pixels(i)) for i in expected]))
    few = images.take([6, 0])
    assert [batch.labels for batch in few.batches(to_tensor, 8)] == [[6, 0] if form != "alone" else [-1, -1]]


def test_columns_are_named_or_usual():
    items = [{"left": Image.fromarray(pixels(0)), "right": Image.fromarray(pixels(1)), "y": 5}]
    with pytest.raises(
        DatasetError, match="item 0 of the data set has no image under image or img .*it has left, right, y. Name the column"
    ):
        next(iter(open_images(items).batches(to_tensor, 1)))
    (batch,) = open_images(items, image="right", label="y").batches(to_tensor, 1)
    assert int(batch.pixels[0, 0, 0, 0]) == 1 and batch.labels == [5]


def collate(items):
    """Twice the images, as a transform of a user would be."""
    return {"image": torch.stack([image for image, _ in items]) * 2, "label": torch.tensor([label for _, label in items])}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow("starts processes"))])
def test_a_loader_gives_our_batches_with_its_processes_and_collate(workers):
    loader = DataLoader(Pictures("tensor"), batch_size=2, num_workers=workers, collate_fn=collate, drop_last=True)
    batches = [*open_images(loader).batches(None, 3)]
    assert [batch.labels for batch in batches] == [[0, 1, 2], [4, 5], [6]]
    assert batches[1].unreadable == [("3", "OSError: gone")]
    assert torch.equal(batches[2].pixels, 2 * to_tensor(pixels(6))[None])
    assert [batch.labels for batch in open_images(loader).batches(None, 3, only=[2, 0])] == [[6], [0, 1, 2]]


@pytest.mark.parametrize("options", [{}, {"batch_size": None}, {"collate_fn": list}, {"collate_fn": tuple}])
def test_forms_of_batches(options):
    data = TensorDataset(torch.arange(5 * 12.0).view(5, 3, 2, 2), torch.arange(5))
    batches = [*open_images(DataLoader(data, **options)).batches(None, 3)]
    assert torch.equal(torch.cat([batch.pixels for batch in batches]), data.tensors[0])
    assert [batch.labels for batch in batches] == [[0, 1, 2], [3, 4]]
    alone = [*open_images(DataLoader(data.tensors[0], **options)).batches(None, 5)]
    assert torch.equal(alone[0].pixels, data.tensors[0]) and alone[0].labels == [-1] * 5


@pytest.mark.parametrize(
    "options",
    [{"shuffle": True}, {"sampler": RandomSampler(range(7))}, {"batch_sampler": [[0, 1]]}, {"sampler": [3, 1]}],
)
def test_a_loader_in_another_order_is_refused(options):
    with pytest.raises(DatasetError, match="the loader has a .*: images need a fixed order"):
        open_images(DataLoader(Pictures(), **options))
    assert len(open_images(DataLoader(Pictures(), sampler=SequentialSampler(range(7))))) == 7


# -- streams -----------------------------------------------------------------------------------------------------------------


class Numbers(IterableDataset):
    """A stream of pictures, as ``give`` says."""

    def __init__(self, give=lambda: range(7)) -> None:
        self.give = give

    def __iter__(self):
        for number in self.give():
            yield {"image": png(number), "label": number}


@pytest.mark.parametrize("wrap", [lambda stream: stream, lambda stream: DataLoader(stream, batch_size=2, collate_fn=list)])
@pytest.mark.parametrize("count", [None, 7])
def test_a_stream_is_read_in_order(wrap, count):
    images = open_images(wrap(Numbers()), count=count)
    assert len(images) == 7 and numbers(images, 3) == [*range(7)] and numbers(images, 3) == [*range(7)]
    assert numbers(images, 2, only=[1, 3]) == [2, 3, 6]
    few = open_images(Numbers(), limit=3)
    assert numbers(few) == sorted(numbers(few)) and len(few) == 3
    assert [batch.labels for batch in images.take([1, 5]).batches(to_tensor, 8)] == [[1, 5]]
    assert images.digest() == open_images(Numbers()).digest() != open_images(Numbers(lambda: [1, 0, *range(2, 7)])).digest()


class Shared(Numbers):
    """A stream that its workers share."""

    def __iter__(self):
        info = get_worker_info()
        return itertools.islice(super().__iter__(), *((None,) if info is None else (info.id, None, info.num_workers)))


def test_a_loader_over_a_stream_gives_each_image_once():
    with pytest.raises(DatasetError, match="leaves out the last items of the stream: give it without drop_last=True"):
        open_images(DataLoader(Numbers(), batch_size=2, collate_fn=list, drop_last=True))
    with pytest.raises(DatasetError, match="each of the 2 workers of the loader gives the whole stream"):
        open_images(DataLoader(Numbers(), batch_size=2, collate_fn=list, num_workers=2))
    images = open_images(DataLoader(Shared(), batch_size=2, collate_fn=list, num_workers=2))
    for _ in range(3):
        assert sorted(numbers(images, 2)) == [*range(7)]  # a worker that fails at its end ends the pass, but not each time


def test_a_stream_that_differs_from_pass_to_pass_is_noticed():
    passes = iter([range(7), [0, 2, 1, 3, 4, 5, 6], range(6), range(8)])
    images = open_images(Numbers(lambda: next(passes)))
    for message in ("item 1 of the stream is not what it was", "ended before item 6; it had 7 items before", "more than 7 items"):
        with pytest.raises(DatasetError, match=message):
            numbers(images)


def test_what_a_stream_cannot_do():
    images = open_images(Numbers())
    with pytest.raises(DatasetError, match="can only be read in its order"):
        shuffled(images)
    with pytest.raises(DatasetError, match="--pictures 0"):
        images.picture(0)
    with pytest.raises(ValueError, match="only be read in order"):
        next(images.batches(to_tensor, 2, only=[1, 0]))
    with pytest.raises(TypeError, match=r"expected Images.*got generator"):
        open_images(i for i in range(3))
    with pytest.raises(DatasetError, match="the stream of images is empty"):
        open_images(Numbers(list))
    with pytest.raises(DatasetError, match="the stream of images failed after 0 items: ZeroDivisionError"):
        open_images(Numbers(lambda: 1 // 0))
    for thing in ({"a": 1}, 3, None):
        with pytest.raises(TypeError, match="expected Images"):
            open_images(thing)


# -- what stores and data sets may do ------------------------------------------------------------------------------------------


@functools.cache  # file systems are kept for the whole process
def slow_store():
    """A store that gives seven bytes at a time, or fails: its files, and its state."""
    fsspec = pytest.importorskip("fsspec")
    files: dict[str, bytes] = {}
    state = {"broken": False}

    class File(io.BytesIO):
        def read(self, size=-1):
            if state["broken"]:
                raise ConnectionError("reset")
            return super().read(min(size, 7) if size >= 0 else size)

    class Store(fsspec.AbstractFileSystem):
        protocol, cachable = "slow", False

        def _open(self, path, mode="rb", **options):
            if path not in files:
                raise FileNotFoundError(path)
            return File(files[path])

        def cat_file(self, path, start=None, end=None, **options):
            return files[path][start:end]

        def find(self, path, detail=True, **options):
            return {name: {"name": name, "size": state.get("size"), "type": "file"} for name in files if name.startswith(path)}

    fsspec.register_implementation("slow", Store, clobber=True)
    return files, state


def test_a_store_may_give_fewer_bytes_than_are_asked_for(tmp_path):
    files, _ = slow_store()
    files.update({f"photos/{i}.png": png(i) for i in range(3)})
    assert numbers(open_images("slow://photos")) == [0, 1, 2]
    (shard,) = shards(tmp_path, counts=(3,))
    files.update({"shards/0.tar": Path(shard).read_bytes(), "shards/classnames.txt": b"alpha\nbeta\ngamma\n"})
    images = open_images("slow://shards/0.tar")
    assert numbers(images) == [0, 1, 2] and images.names == ("alpha", "beta", "gamma")


def test_a_store_that_fails_for_the_digest_is_not_identified():
    files, state = slow_store()
    files["broken/0.png"], state["broken"], state["size"] = png(0), True, len(png(0))
    images = open_images("slow://broken")
    assert images.digest() == UNIDENTIFIED
    state.update(broken=False, size=None)
    assert images.digest() != UNIDENTIFIED


def test_an_address_in_an_item_is_read(memory, tmp_path):
    """As data sets of Hugging Face have it: in a store, or in an archive."""
    memory.pipe("/photos/1.png", png(1))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for i in (0, 2):
            archive.writestr(f"photos/{i}.png", png(i))
    chain = f"::{tmp_path}/a.zip"
    places = [f"zip://photos/0.png{chain}", "memory://photos/1.png", f"zip://photos/2.png{chain}", f"zip://photos/3.png{chain}"]
    images = open_images([({"bytes": None, "path": place}, i) for i, place in enumerate(places)])
    (batch,) = images.batches(to_tensor, 8)
    assert batch.labels == [0, 1, 2] and torch.equal(batch.pixels, torch.stack([to_tensor(pixels(i)) for i in range(3)]))
    assert batch.unreadable == [("3", f"zip://photos/3.png{chain} cannot be read (FileNotFoundError: photos/3.png)")]


@pytest.mark.parametrize("nothing", [None, {"bytes": None, "path": None}])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_item_without_an_image_is_counted_and_named(nothing, streamed):
    items = [{"image": png(0), "label": 0}, {"image": nothing, "label": 1}, {"image": png(2), "label": 2}]

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(items)

    images = open_images(Stream() if streamed else items)
    (batch,) = images.batches(to_tensor, 8)
    assert batch.labels == [0, 2] and batch.unreadable == [("1", "the item has no image (None)")]
    items[1]["image"] = "a.png"
    with pytest.raises(DatasetError, match="item 1 of the data set is str; expected a PIL image"):
        open_images(Stream())


# -- Hugging Face ------------------------------------------------------------------------------------------------------------


def test_an_item_that_cannot_be_made_is_named_and_part_of_the_digest():
    class Rows(Pictures):
        failing = (2,)

        def __getitem__(self, index):
            if index in self.failing:
                raise KeyError("no such row")
            return super().__getitem__(index)

    images = HuggingFaceImages(Rows(), range(7), Reading())
    unreadable = [named for batch in images.batches(to_tensor, 4) for named in batch.unreadable]
    assert unreadable == [("2", "KeyError: 'no such row'"), ("3", "OSError: gone")]
    first = images.digest()
    images.dataset.failing = (1,)
    assert images.digest() not in (first, UNIDENTIFIED)


@pytest.fixture
def rows():
    hf = pytest.importorskip("datasets")
    features = hf.Features({"text": hf.Value("string"), "picture": hf.Image(), "label": hf.ClassLabel(names=["a", "b", "c"])})
    items = [{"text": str(i), "picture": {"bytes": png(i) if i != 2 else b"damaged", "path": None}, "label": i % 3} for i in range(5)]
    return hf.Dataset.from_list(items, features=features)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_hugging_face_data_set(rows, streamed):
    images = open_images(rows.to_iterable_dataset(num_shards=2) if streamed else rows)
    batches = [*images.batches(to_tensor, 3)]
    assert [batch.labels for batch in batches] == [[0, 1], [0, 1]] and [batch.names for batch in batches] == [["0", "1"], ["3", "4"]]
    ((name, why),) = batches[0].unreadable
    assert name == "2" and "not a picture" in why
    assert torch.equal(batches[1].pixels, torch.stack([to_tensor(pixels(i)) for i in (3, 4)]))
    assert images.digest() == open_images(rows.to_iterable_dataset() if streamed else rows).digest()
    other = rows.select([0, 1, 2, 4, 3])
    assert images.digest() != open_images(other.to_iterable_dataset() if streamed else other).digest()
    if not streamed:
        assert images.names == ("a", "b", "c")
    with pytest.raises(DatasetError, match="has no column 'pictures'; did you mean picture"):
        open_images(rows, image="pictures")


def test_a_hugging_face_folder_by_name(rows, tmp_path):
    hf = pytest.importorskip("datasets")
    rows.save_to_disk(tmp_path / "one")
    hf.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    assert len(open_images(f"hf-datasets:{tmp_path}/one")) == 5
    assert len(open_images(f"hf-datasets:{tmp_path}/two@test")) == 1
    with pytest.raises(DatasetError, match="has the splits train, test: add @SPLIT"):
        open_images(f"hf-datasets:{tmp_path}/two")
    with pytest.raises(DatasetError, match="has no splits"):
        open_images(f"hf-datasets:{tmp_path}/one@test")


def test_arrays_are_pictures_wherever_they_come_from():
    """A stream of them can be hashed, and one of a data set can be shown."""
    arrays = [np.asarray(pixels(i)) for i in range(4)]

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(arrays)

    stream = open_images(Stream())
    assert [batch.names for batch in stream.batches(to_tensor, 3)] == [["0", "1", "2"], ["3"]]
    items = open_images(arrays)
    assert items.picture(items.paths[2]).tobytes() == pixels(2).tobytes()
    assert numbers(items, 3) == [*range(4)]


def test_a_loader_that_fails_is_told():
    sizes = [torch.zeros(3, 4 + i, 4) for i in range(2)]
    with pytest.raises(DatasetError, match="the loader failed: RuntimeError: stack expects"):
        next(iter(open_images(DataLoader(sizes)).batches(None, 2)))
