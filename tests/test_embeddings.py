"""Embeddings: what is kept of each image, files that survive a kill, ranks that share the batches."""

import json
import os
import traceback
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import FORKS, free_port, python
from threads import threads
from torch import distributed, nn
from torch import multiprocessing as mp
from torch.utils.data import TensorDataset

from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.common.checked import sealed, unsealed
from torchprobe.common.messages import stable_repr
from torchprobe.common.storage import digest
from torchprobe.datasets import DatasetError, Images, LabeledImages, image_folder, labeled_folder
from torchprobe.encoders import Encoder

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32) / 255).permute(2, 0, 1)


def small_encoder(features=6, seed=0, name="small"):
    torch.manual_seed(seed)
    visual = nn.Sequential(nn.Conv2d(3, 8, 2), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(72, features))
    return Encoder(visual, features=features, preprocess=to_tensor, name=name)


@pytest.fixture
def photos(tmp_path):
    """Two classes, 23 images, two of them unreadable."""
    rng = np.random.default_rng(0)
    for i in range(23):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8)).save(path)
    (tmp_path / "photos" / "a" / "06.png").write_bytes(b"no image")
    (tmp_path / "photos" / "b" / "13.png").write_bytes(b"")
    return tmp_path / "photos"


def same(a, b):
    assert torch.equal(a.h.nan_to_num(7), b.h.nan_to_num(7)) and torch.equal(a.y, b.y)
    assert (a.ids, a.skipped, a.classes, a.groups, a.partial) == (b.ids, b.skipped, b.classes, b.groups, b.partial)
    return True


FINGERPRINT = 6
"""Pictures that a preprocessing is asked for, twice three, to tell it from others."""


class Counting:
    """A preprocessing that remembers how often it was asked, and passes for another."""

    def __init__(self):
        self.times = 0

    def __call__(self, image):
        self.times += 1
        return to_tensor(image)

    def __repr__(self):
        return repr(to_tensor)


def counted(encoder):
    encoder.__dict__["preprocess"] = Counting()
    return encoder


# -- what is kept --------------------------------------------------------------------------------------------------------


def test_every_image_once_with_its_label(photos):
    encoder, images = small_encoder(), labeled_folder(photos)
    found = embed(encoder, images, batch_size=4)
    encoder.eval()
    for h, y, name in zip(found.h, found.y, found.ids, strict=True):
        with Image.open(photos / name) as image:
            expected = encoder(to_tensor(image.convert("RGB"))[None])[0]
        torch.testing.assert_close(h, expected.detach(), rtol=1e-5, atol=1e-6)
        assert y == "ab".index(name[0])
    assert len(found) == 21 and found.ids == sorted(found.ids) and found.h.dtype == torch.float32 and found.y.dtype == torch.int64
    assert [name for name, _ in found.skipped] == ["a/06.png", "b/13.png"]
    assert all("not a picture in one of the formats" in why for _, why in found.skipped)
    assert repr(found) == "Embeddings(21 × 6, 21 with a label, 2 skipped)"


def test_images_without_labels_have_none(photos):
    found = embed(small_encoder(), image_folder(photos), batch_size=5)
    assert (found.y == -1).all() and len(found.labeled()) == 0 and len(found) == 21


def test_classes_and_groups_are_taken_over(photos):
    plain = labeled_folder(photos)
    images = LabeledImages(plain.paths, plain.root, plain.labels, classes=(0, 1, 4), groups={1: (1, 4)})
    found = embed(small_encoder(), images)
    assert found.classes == (0, 1, 4) and found.groups == {1: (1, 4)}


def test_the_encoder_is_put_back_and_the_result_may_be_trained_on(photos):
    encoder = small_encoder().train()
    encoder.visual[1].eval()
    before = digest([*encoder.parameters(), *encoder.buffers()])
    found = embed(encoder, image_folder(photos))
    assert [part.training for part in encoder.visual] == [True, False, True, True, True] and encoder.training
    assert digest([*encoder.parameters(), *encoder.buffers()]) == before
    assert not found.h.is_inference() and not found.h.requires_grad
    nn.Linear(6, 2)(found.h).sum().backward()


class Items:
    """A map-style data set of whatever it is given; an exception is raised."""

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], Exception):
            raise self.items[index]
        return self.items[index]


def picture(value=9):
    return Image.fromarray(np.full((4, 4, 3), value, np.uint8))


def test_data_sets_of_pictures_tensors_with_and_without_labels():
    pixels = to_tensor(picture())
    items = Items(
        (picture(), 3), [pixels, torch.tensor(2)], picture(), pixels, (picture(), np.int64(1), "more"), (pixels, None),
        OSError("a hole in the disk\nand more"), (pixels, True), (Image.fromarray(np.zeros((4, 4), np.float32)), 1),
    )  # fmt: skip
    found = embed(small_encoder(), items, batch_size=2)
    assert found.y.tolist() == [3, 2, -1, -1, 1, -1, 1] and found.ids == ["0", "1", "2", "3", "4", "5", "7"]
    assert (found.h - found.h[0]).abs().max() < 1e-6
    assert found.skipped[0] == ("6", "OSError: a hole in the disk") and "range is unknown" in found.skipped[1][1]


def test_a_torch_data_set_and_a_bare_module():
    data = TensorDataset(torch.randn(7, 3, 2, 2), torch.arange(7))
    found = embed(nn.Flatten(), data, batch_size=3)
    assert torch.equal(found.h, data.tensors[0].flatten(1)) and torch.equal(found.y, data.tensors[1])


def test_half_precision_and_nonfinite_rows_are_kept():
    data = torch.randn(5, 4)
    data[1, 2], data[3, 0] = float("nan"), float("inf")
    found = embed(nn.Identity(), TensorDataset(data.half(), torch.arange(5)), batch_size=2)
    assert found.h.dtype == torch.float32 and torch.equal(found.h.nan_to_num(7), data.half().float().nan_to_num(7))
    assert found.nonfinite == 2


@pytest.mark.parametrize(
    ("encoder", "dataset", "error", "message"),
    [
        (nn.Flatten(), Items(), DatasetError, "the data set is empty"),
        (nn.Flatten(), Images([]), DatasetError, "the data set is empty"),
        (nn.Flatten(), iter([1]), TypeError, r"a PyTorch data set with len\(\) and \[index\], got list_iterator"),
        (nn.Flatten(), Images([Path("a.png")]), ValueError, "the encoder has no .preprocess"),
        (nn.Flatten(), Items(picture()), DatasetError, "item 0 of the data set is a PIL image, and the encoder has no .preprocess"),
        (nn.Flatten(), Items(torch.ones(1), (np.zeros(3), 1)), DatasetError, "item 1 of the data set is ndarray; expected a PIL image"),
        (nn.Flatten(), Items((torch.ones(1), "cat")), DatasetError, "the label of item 0 of the data set is 'cat'; expected a whole"),
        (nn.Flatten(), Items((torch.ones(1), torch.tensor(1.5))), DatasetError, "the label of item 0"),
        (nn.Flatten(), Items((torch.ones(1), -2)), DatasetError, "the label of item 0 of the data set is -2"),
        (nn.Flatten(), Items(torch.ones(1), torch.ones(2)), DatasetError, r"0 becomes \(1,\), 1 \(2,\); resize and crop"),
        (nn.Flatten(), Items(OSError("gone"), OSError()), DatasetError, "none of the 2 images could be read; the first, 0: OSError: gone"),
        (nn.Identity(), Items(torch.ones(2, 2)), ValueError, r"the encoder returned torch.float32 \(1, 2, 2\) for 1 images; expected"),
        (nn.Identity(), Items(torch.ones(2, dtype=torch.int64)), ValueError, "torch.int64"),
    ],
)  # fmt: skip
def test_what_cannot_be_embedded(encoder, dataset, error, message, tmp_path):
    for path in (None, tmp_path / "e.safetensors"):
        with pytest.raises(error, match=message):
            embed(encoder, dataset, path=path)
    assert not (tmp_path / "e.safetensors").exists()


def test_batches_and_workers_must_be_at_least_one(photos):
    for given in ({"batch_size": 0}, {"workers": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            embed(small_encoder(), image_folder(photos), **given)


def test_two_transforms_with_one_repr_are_two(photos, tmp_path):
    def scaled(factor):
        def transform(image):
            return factor * to_tensor(image)

        return transform

    def encoder(preprocess):
        found = small_encoder()
        found.__dict__["preprocess"] = preprocess
        return found

    images, path = image_folder(photos), tmp_path / "e.safetensors"
    once = embed(encoder(scaled(1)), images, path=path)
    assert stable_repr(scaled(1)) == stable_repr(scaled(2))  # the trap
    with pytest.raises(ValueError, match="was made with another transform: '[0-9a-f]{16}', now it is '[0-9a-f]{16}'"):
        embed(encoder(scaled(2)), images, path=path)
    assert same(embed(encoder(scaled(1)), images, path=path), once)
    twice = embed(encoder(scaled(2)), images, path=path, resume=False)
    assert not torch.equal(twice.h, once.h)
    assert twice.provenance["transform"] != embed(encoder(scaled(1)), images).provenance["transform"]


def test_a_random_transform_is_not_kept(photos, tmp_path):
    def noisy(image):
        return to_tensor(image) + torch.rand(())

    encoder = small_encoder()
    encoder.__dict__["preprocess"] = noisy
    assert embed(encoder, image_folder(photos)).provenance["transform"] is None
    with pytest.raises(ValueError, match="preprocess is random"):
        embed(encoder, image_folder(photos), path=tmp_path / "e.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_progress_and_stop(photos, tmp_path):
    images, told = labeled_folder(photos), []
    embed(small_encoder(), images, batch_size=10, progress=lambda *done: told.append(done))
    assert told == [(10, 23), (20, 23), (23, 23)]
    path = tmp_path / "e.safetensors"
    whole = embed(small_encoder(), images, batch_size=4)
    for where in (None, path):
        asked = []
        part = embed(small_encoder(), images, batch_size=4, path=where, stop=lambda asked=asked: asked.append(1) or len(asked) > 3)
        assert part.partial and "partial" in repr(part) and len(part.ids) == 11
        assert torch.equal(part.h, whole.h[:11]) and part.skipped == whole.skipped[:1]
    assert not path.exists()
    encoder = counted(small_encoder())
    assert same(embed(encoder, images, batch_size=4, path=path, resume=False), whole)
    assert encoder.preprocess.times == 21 + FINGERPRINT  # from the beginning


def test_an_interruption_keeps_what_is_there(photos, tmp_path):
    def interrupt(after):
        count = iter(range(100))

        def stop():
            if next(count) == after:
                raise KeyboardInterrupt
            return False

        return stop

    images = labeled_folder(photos)
    assert len(embed(small_encoder(), images, batch_size=4, stop=interrupt(2))) == 8 - 1
    with pytest.raises(KeyboardInterrupt):
        embed(small_encoder(), images, path=tmp_path / "e.safetensors", stop=interrupt(0))


# -- files ---------------------------------------------------------------------------------------------------------------


def test_a_file_holds_the_same_and_is_mapped(photos, tmp_path):
    images, path = labeled_folder(photos), tmp_path / "e.safetensors"
    whole = embed(small_encoder(), images, batch_size=4)
    found = embed(small_encoder(), images, batch_size=4, path=path)
    assert same(found, whole) and same(Embeddings.load(path), whole)
    del found.provenance["data"]["digest"]  # of every file, only if it can be resumed
    assert found.provenance == whole.provenance
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]
    if Path("/proc/self/maps").exists():
        assert str(path) in Path("/proc/self/maps").read_text()
    again = counted(small_encoder())
    assert same(embed(again, images, batch_size=4, path=path), whole) and again.preprocess.times == FINGERPRINT
    whole.save(tmp_path / "saved.safetensors")
    assert same(Embeddings.load(tmp_path / "saved.safetensors"), whole)


def halfway(photos, path, batches=3):
    asked = []
    embed(small_encoder(), labeled_folder(photos), batch_size=4, path=path, stop=lambda: asked.append(1) or len(asked) > batches)
    return path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.progress")


def damage_nothing(part, progress):
    return 3


def tear_the_last_line(part, progress):
    progress.write_bytes(progress.read_bytes()[:-20])
    return 2


def tear_between_lines(part, progress):
    progress.write_bytes(progress.read_bytes()[:-1])
    return 2


def lose_rows(part, progress):
    os.truncate(part, part.stat().st_size - 6)
    return 2


def spoil_the_second_batch(part, progress):
    content = bytearray(part.read_bytes())
    content[-1 - 4 * 6 * (4 + 3)] ^= 1  # of 11 rows
    part.write_bytes(content)
    return 1


def spoil_a_line(part, progress):
    lines = progress.read_bytes().splitlines(keepends=True)
    lines[2] = b'{"y": 3}\n'
    progress.write_bytes(b"".join(lines))
    return 1


def spoil_the_first_line(part, progress):
    progress.write_bytes(b"{" + progress.read_bytes())
    return 0


def lose_the_part(part, progress):
    part.unlink()
    return 0


def lose_the_progress(part, progress):
    progress.unlink()
    return 0


def add_to_the_part(part, progress):  # rows whose line was not written any more
    with part.open("ab") as file:
        file.write(bytes(1000))
    return 3


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing, tear_the_last_line, tear_between_lines, lose_rows, spoil_the_second_batch, spoil_a_line, spoil_the_first_line,
        lose_the_part, lose_the_progress, add_to_the_part,
    ],
)  # fmt: skip
def test_a_run_goes_on_after_its_last_whole_batch(photos, tmp_path, damage):
    images, path = labeled_folder(photos), tmp_path / "e.safetensors"
    part, progress = halfway(photos, path)
    batches, told = damage(part, progress), []
    found = embed(small_encoder(), images, batch_size=4, path=path, progress=lambda *done: told.append(done))
    assert told[0] == (4 * batches + 4, 23)
    assert same(found, embed(small_encoder(), images, batch_size=4))
    assert not part.exists() and not progress.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"skipped": [1]},
        {"skipped": [["a"]]},
        {"d": -1, "sum": 0},
        {"d": 3},
        {"d": "6"},
        {"d": 10**400},
        {"y": [0]},
        {"y": ["0"] * 4},
        {"ids": 3},
    ],
)
def test_lines_that_do_not_fit_are_not_counted_in_part(photos, tmp_path, change):
    """Their checksum fits, so that only what they say tells."""
    images, path = labeled_folder(photos), tmp_path / "e.safetensors"
    part, progress = halfway(photos, path)
    lines = progress.read_bytes().splitlines()
    changed = unsealed(json.loads(lines[2]), "") | change
    if "d" in change and isinstance(change["d"], int) and change["d"] == 3:  # the rows are there, and have another width
        start = 4 * 6 * 4
        size = 4 * 3 * len(changed["ids"])
        at = json.loads(lines[0])["start"] + start
        changed["sum"] = zlib.crc32(part.read_bytes()[at : at + size])
    lines[2] = json.dumps(sealed(changed)).encode()
    progress.write_bytes(b"\n".join(lines) + b"\n")
    told = []
    found = embed(small_encoder(), images, batch_size=4, path=path, progress=lambda *done: told.append(done))
    assert told[0] == (8, 23)
    assert same(found, embed(small_encoder(), images, batch_size=4))


KILLED = """
import os, signal, sys
import torch
from torch import nn
from torch.utils.data import TensorDataset
from torchprobe.analysis import embeddings_file
from torchprobe.analysis.embeddings import embed

torch.set_num_threads(1)
data = TensorDataset(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50))

def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)

class Deadly(nn.Module):
    left = 10**9

    def forward(self, x):
        self.left -= 1
        return kill() if self.left < 0 else x * 2

def run(number):
    encoder = Deadly()
    encoder.left = 3
    if number == 4:
        os.fsync = kill
    elif number == 5:
        os.replace = kill
    elif number == 6:
        embeddings_file.GrowingFile.discard = kill
    embed(encoder, data, batch_size=5, path=sys.argv[1])
    os._exit(0)

ends = []
for number in range(1, 8):
    if not (child := os.fork()):
        run(number)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert ends == 6 * [-signal.SIGKILL] + [0], ends
found = embed(Deadly(), data, batch_size=5, path=sys.argv[1])
assert torch.equal(found.h, data.tensors[0] * 2) and torch.equal(found.y, data.tensors[1]) and found.ids == [str(i) for i in range(50)]
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
def test_a_run_that_is_killed_again_and_again_ends_well(tmp_path):
    """Three batches a run, then before the file has its name, before it gets it, and before the rest is removed."""
    done = python(KILLED, tmp_path / "e.safetensors")
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["e.safetensors"]


def other_weights(photos):
    return {"encoder": small_encoder(seed=1)}, "another weights: '"


def other_name(photos):
    return {"encoder": small_encoder(name="large")}, "another encoder: 'small', now it is 'large'"


def other_batch_size(photos):
    return {"batch_size": 5}, "another batch_size: 4, now it is 5"


def other_preprocessing(photos):
    encoder = small_encoder()
    encoder.__dict__["preprocess"] = lambda image: to_tensor(image)
    return {
        "encoder": encoder
    }, "another preprocessing: '<function to_tensor>', now it is '<function other_preprocessing.<locals>.<lambda>>'"


def other_labels(photos):
    plain = labeled_folder(photos)
    return {"dataset": LabeledImages(plain.paths, plain.root, [1 - y for y in plain.labels])}, "another data: digest: '"


def other_classes(photos):
    plain = labeled_folder(photos)
    return {"dataset": LabeledImages(plain.paths, plain.root, plain.labels, classes=(0, 1))}, "another data: digest: '"


def no_labels(photos):
    return {"dataset": image_folder(photos)}, "another data: digest: '"


def a_changed_file(photos):
    picture().save(photos / "a" / "00.png")
    return {"dataset": labeled_folder(photos)}, "another data: digest: '"


def other_data(photos):
    return {"dataset": Items(picture())}, "another data: images: 23, now it is 1"


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        other_weights, other_name, other_batch_size, other_preprocessing, other_labels, other_classes, no_labels, a_changed_file,
        other_data,
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused_with_what_differs(photos, tmp_path, change, finished):
    path = tmp_path / "e.safetensors"
    given = {"encoder": small_encoder(), "dataset": labeled_folder(photos), "batch_size": 4}
    if finished:
        embed(**given, path=path)
    else:
        halfway(photos, path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    changed, message = change(photos)
    with pytest.raises(ValueError, match=f"e.safetensors was made with {message}"):
        embed(**{**given, **changed}, path=path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before
    assert len(embed(**{**given, **changed}, path=path, resume=False)) > 0
    assert len(list(tmp_path.iterdir())) == 2


def test_no_other_file_is_replaced(photos, tmp_path):
    path = tmp_path / "precious.txt"
    path.write_text("precious")
    for resume in (True, False):
        with pytest.raises(ValueError, match="precious.txt is not a safetensors file"):
            embed(small_encoder(), image_folder(photos), path=path, resume=resume)
    assert path.read_text() == "precious"
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        embed(small_encoder(), image_folder(photos), path=tmp_path / "no" / "e.safetensors")
    part = embed(small_encoder(), image_folder(photos), stop=iter([False, True]).__next__, batch_size=4)
    part.save(tmp_path / "part.safetensors")
    assert Embeddings.load(tmp_path / "part.safetensors").partial
    with pytest.raises(ValueError, match="holds only a part of the embeddings"):
        embed(small_encoder(), image_folder(photos), batch_size=4, path=tmp_path / "part.safetensors")


def test_two_processes_do_not_write_one_file(photos, tmp_path):
    pytest.importorskip("fcntl")
    path, images = tmp_path / "e.safetensors", image_folder(photos)

    def second():
        with pytest.raises(ValueError, match="e.safetensors is in use by process"):
            embed(small_encoder(), images, batch_size=4, path=path)
        return False

    assert len(embed(small_encoder(), images, batch_size=4, path=path, stop=second)) == 21


def damaged(path, edit):
    """The file with another header."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    del header["__metadata__"]["checksums"]  # as the version before wrote it
    header["__metadata__"]["format"] = "1"
    body = edit(header, bytearray(content[8 + size :]))
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + (content[8 + size :] if body is None else body))


def spoil_names(header, body):
    body[header["names"]["data_offsets"][0]] = 0
    return body


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda h, b: h["__metadata__"].update(kind="other"), "kind 'other', format '1'; expected 'torchprobe.embeddings'"),
        (lambda h, b: h["__metadata__"].update(values="{"), "'values': the metadata is not JSON"),
        (lambda h, b: h["h"].update(shape=[3, 2, 4]), r"'h': expected the shape \(None, None\), got \(3, 2, 4\)"),
        (lambda h, b: h["h"].update(shape=[4, 6]), r"'y': expected the shape \(4,\), got \(3,\)"),
        (lambda h, b: h["h"].update(dtype="I32"), "'h': expected torch.float32, got torch.int32"),
        (lambda h, b: h.update(g=h.pop("h")), "'h': missing"),
        (spoil_names, "'names': is damaged"),
        (lambda h, b: h["__metadata__"].update(values='{"made": 3}'), "made: expected dict"),
        (lambda h, b: h["__metadata__"].update(values='{"made": {}, "classes": ["a"]}'), "is damaged"),
        (lambda h, b: h["__metadata__"].update(values='{"made": {}, "groups": {"1": [0]}}'), "is damaged: the label of a group"),
        (lambda h, b: b[:-3], "is not a safetensors file"),
    ],
)
def test_damaged_files_are_named_with_the_part(tmp_path, edit, message):
    path = tmp_path / "e.safetensors"
    Embeddings(torch.randn(3, 8), torch.tensor([0, 1, -1]), ["a", "b", "c"]).save(path)
    damaged(path, edit)
    with pytest.raises(ValueError, match=f"e.safetensors.*{message}"):
        Embeddings.load(path)


def test_a_file_with_too_few_names_is_damaged(tmp_path):
    path = tmp_path / "e.safetensors"
    Embeddings(torch.randn(3, 8), torch.tensor([0, 1, -1]), ["a", "b", "c"]).save(path)
    path.write_bytes(path.read_bytes().replace(b'"ids": ["a", "b", "c"]', b'"ids": ["a", "b"     ]'))
    with pytest.raises(ValueError, match="e.safetensors is damaged: the checksum of 'names' does not fit its content"):
        Embeddings.load(path)
    damaged(path, lambda header, body: None)
    with pytest.raises(ValueError, match="ids has 2 names for 3 representations"):
        Embeddings.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        Embeddings.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is above 2³¹ − 1"):
        Embeddings(torch.randn(1, 8), torch.tensor([1 << 31]), ["a"]).save(path)


# -- parts and wholes ----------------------------------------------------------------------------------------------------


def embeddings(n=6, d=3, first=0, **more):
    return Embeddings(torch.arange(float(n * d)).reshape(n, d) + first, torch.arange(n) % 3 - 1, [str(first + i) for i in range(n)], **more)


def test_select():
    e = embeddings(skipped=[("x", "gone")], classes=(0, 1))
    for index in (torch.tensor([4, 1, 4]), [4, 1, 4], np.array([4, 1, 4]), [-2, 1, -2]):
        part = e.select(index)
        assert part.ids == ["4", "1", "4"] and torch.equal(part.h, e.h[[4, 1, 4]]) and part.y.tolist() == [0, 0, 0]
    assert part.classes == (0, 1) and part.skipped == [("x", "gone")]
    mask = torch.tensor([True, False, False, False, False, True])
    assert e.select(mask).ids == e.select(mask.tolist()).ids == e.select(mask.numpy()).ids == ["0", "5"]
    cut = e.select(slice(1, 4))
    assert cut.ids == ["1", "2", "3"] and cut.h.untyped_storage().data_ptr() == e.h.untyped_storage().data_ptr()
    assert len(e.select([])) == 0 and e.select([]).nonfinite == 0
    assert e.labeled().ids == ["1", "2", "4", "5"] and e.labeled().labeled().ids == ["1", "2", "4", "5"]
    for index, message in (
        (mask[:3], "a bool for each of the 6 rows"),
        ([6], "indices of the 6 rows"),
        ([-7], "indices"),
        ([0.5], "indices"),
    ):
        with pytest.raises(ValueError, match=message):
            e.select(index)


def test_merge():
    whole = embeddings(skipped=[("x", "gone")]).merge(embeddings(2, first=6, skipped=[("x", "gone"), ("z", "torn")]))
    assert whole.ids == [str(i) for i in range(8)] and whole.h.shape == (8, 3) and whole.skipped == [("x", "gone"), ("z", "torn")]
    for other, message in (
        (embeddings(d=4, first=9), "of 3 and 4 features"),
        (embeddings(first=9, classes=(1,)), "different classes"),
        (embeddings(first=5), "3 common images, such as '5'"),
    ):
        with pytest.raises(ValueError, match=message):
            whole.merge(other)
    with pytest.raises(ValueError, match="different weights: 'a' and 'b'"):
        embeddings(provenance={"weights": "a"}).merge(embeddings(first=9, provenance={"weights": "b"}))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((torch.zeros(3), torch.zeros(3, dtype=torch.int64), ["a"] * 3), r"\(n, d\), got torch.float32 \(3,\)"),
        ((torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), ["a"] * 3), "torch.int64"),
        ((torch.zeros(3, 2), torch.zeros(3), ["a"] * 3), "expected 3 whole numbers as labels, got torch.float32"),
        ((torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64), ["a"] * 3), r"got torch.int64 \(2,\)"),
        ((torch.zeros(3, 2), torch.tensor([0, 1, -2]), ["a"] * 3), "or -1 if unknown, got -2"),
        ((torch.zeros(3, 2), torch.tensor([0, 1, 2]), ["a"]), "expected 3 ids, got 1"),
    ],
)
def test_embeddings_are_checked(given, message):
    with pytest.raises(ValueError, match=message):
        Embeddings(*given)


# -- ranks ---------------------------------------------------------------------------------------------------------------


class Fails:
    """The sixth batch of four cannot be made: rank 2 of 3."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        return torch.ones(3) if index < 20 else "not an image"


def _rank(rank, size, port, photos, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size, timeout=timedelta(minutes=1))
    try:
        encoder, images = small_encoder(), labeled_folder(photos)
        seen = []
        encoder.visual.register_forward_hook(lambda module, args, output: seen.append(len(output)))
        told = []
        embed(encoder, images, batch_size=4, progress=lambda *done: told.append(done)).save(folder / f"memory-{rank}.safetensors")
        assert told[-1] == (23, 23), told
        (folder / f"seen-{rank}").write_text(json.dumps(seen))
        asked = []
        part = embed(
            encoder, images, batch_size=4, path=folder / "file.safetensors", stop=lambda: asked.append(1) or (rank == 1 and len(asked) > 1)
        )
        part.save(folder / f"part-{rank}.safetensors")
        distributed.barrier()
        embed(encoder, images, batch_size=4, path=folder / "file.safetensors").save(folder / f"file-{rank}.safetensors")
        for error, message, given in (
            (DatasetError, r"rank \d: item 20 of the data set is str", (nn.Identity(), Fails())),
            (ValueError, "was made with another weights", (small_encoder(seed=2), images)),
        ):
            with pytest.raises(error, match=message):
                embed(*given, batch_size=4, path=folder / "file.safetensors" if error is ValueError else None)
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="this PyTorch has no gloo")
@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow("starts three processes"))])
def test_ranks_share_the_batches_and_all_have_the_whole(photos, tmp_path, size):
    folder = tmp_path / "out"
    folder.mkdir()
    with threads(1):
        alone = embed(small_encoder(), labeled_folder(photos), batch_size=4)
    mp.start_processes(_rank, (size, free_port(), photos, folder), nprocs=size, start_method=FORKS.get_start_method())
    assert not list(folder.glob("error-*"))
    shares = [json.loads((folder / f"seen-{rank}").read_text()) for rank in range(size)]
    assert [len(share) for share in shares] == [len(range(rank, 6, size)) for rank in range(size)]
    assert sum(map(sum, shares)) == 21
    for rank in range(size):
        assert same(Embeddings.load(folder / f"memory-{rank}.safetensors"), alone)
        assert same(Embeddings.load(folder / f"file-{rank}.safetensors"), alone)
        part = Embeddings.load(folder / f"part-{rank}.safetensors")
        assert part.partial and torch.equal(part.h, alone.h[: len(part)]) and 0 < len(part) < 21
        assert same(part, Embeddings.load(folder / "part-0.safetensors"))
