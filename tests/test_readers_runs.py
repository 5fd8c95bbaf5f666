"""Runs over shards, stores and data sets: the numbers of a folder, ranks, kills, changed content, and the commands."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import interpret_sets as sets
import pytest
import torch
from PIL import Image
from processes import group, torchrun
from shard_sets import numbers, pixels, png, samples, shards, tar, to_tensor
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.common.facts import ChangedError
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import DatasetError, image_folder, labeled_folder, open_images, open_shards
from torchprobe.datasets.images import Batch
from torchprobe.encoders import Encoder as AnyEncoder
from torchprobe.studies.interpret.inputs import Inputs
from torchprobe.studies.interpret.run import interpret


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 6)
        nn.init.orthogonal_(self.linear.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.linear.bias)
        self.preprocess = to_tensor

    def forward(self, x):
        return self.linear(x.flatten(1))


class Tensors(Dataset):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int):
        return to_tensor(pixels(index)), index


def same(one: Embeddings, other: Embeddings) -> bool:
    return torch.equal(one.h, other.h) and torch.equal(one.y, other.y)


def test_embeddings_do_not_depend_on_where_the_images_are(tmp_path):
    system = pytest.importorskip("fsspec").filesystem("memory")
    (tmp_path / "files").mkdir()
    for number in range(9):
        (tmp_path / "files" / f"{number}.png").write_bytes(png(number))
    expected = embed(Encoder(), image_folder(tmp_path / "files"), batch_size=4)
    for path in shards(tmp_path / "shards"):
        system.pipe(f"/runs/{path.name}", path.read_bytes())
    for source in (
        f"{tmp_path}/shards/{{000..002}}.tar",
        "memory://runs/*.tar",
        [(Image.fromarray(pixels(i)), i) for i in range(9)],
        DataLoader([(to_tensor(pixels(i)), i) for i in range(9)]),
    ):
        found = embed(Encoder(), source, batch_size=4)
        assert torch.equal(found.h, expected.h) and found.y.tolist() == [*range(9)]
    assert torch.equal(embed(Encoder(), str(tmp_path / "files"), batch_size=4).h, expected.h)


class Own:
    """An image set of a user: no base class, and what the protocol asks for."""

    root = None
    paths = ("red", "green")

    def __len__(self):
        return 2

    def name(self, path):
        return path

    def size(self, path):
        return None

    def digest(self):
        return "mine"

    def take(self, numbers):
        return self

    def picture(self, path):
        return Image.new("RGB", (4, 4), path)

    def batches(self, preprocess, size, workers=2, only=None):
        return iter([Batch(2, torch.stack([preprocess(self.picture(one)) for one in self.paths]), [*self.paths], [0, 1])])


def test_a_set_of_your_own(tmp_path):
    found = embed(Encoder(), Own(), path=tmp_path / "e.safetensors")
    assert found.ids == ["red", "green"] and found.provenance["data"]["digest"] == "mine"
    own = Own()
    assert open_images(own) is own


def test_a_run_over_changed_shards_is_not_resumed(tmp_path):
    shards(tmp_path / "s")
    where, path = f"{tmp_path}/s/*.tar", tmp_path / "e.safetensors"
    embed(Encoder(), where, path=path)
    assert same(embed(Encoder(), where, path=path), Embeddings.load(path))
    tar(tmp_path / "s" / "002.tar", samples([77]))
    with pytest.raises(ChangedError, match="another data: digest"):
        embed(Encoder(), where, path=path)


def double(items):
    return torch.stack([image for image, _ in items]) * 2, torch.tensor([label for _, label in items])


def test_what_cannot_be_identified_is_not_resumed_without_being_told(tmp_path):
    loader = DataLoader(Tensors(), collate_fn=double)
    embed(Encoder(), loader, path=tmp_path / "a.safetensors")
    with pytest.raises(ChangedError, match=r"nothing tells whether its data: digest is still the same.*identity"):
        embed(Encoder(), loader, path=tmp_path / "a.safetensors")
    loader.identity = "my pictures, doubled"
    embed(Encoder(), loader, path=tmp_path / "b.safetensors")
    assert len(embed(Encoder(), loader, path=tmp_path / "b.safetensors")) == 6
    tensors = DataLoader(TensorDataset(torch.ones(4, 3, 4, 4)))  # tensors have a digest, and the usual collate_fn changes nothing
    embed(Encoder(), tensors, path=tmp_path / "c.safetensors")
    assert len(embed(Encoder(), tensors, path=tmp_path / "c.safetensors")) == 4


# -- ranks -------------------------------------------------------------------------------------------------------------------

RUN = """
import json, os, signal, sys, torch
sys.path.insert(0, {tests!r})
from test_readers_runs import Encoder, embed
from torchprobe.common.ranks import Ranks, torchrun
from torchprobe.datasets import open_images

class Mortal(Encoder):
    left = {kill}

    def forward(self, x):
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        seen.extend(int(one) for one in x[:, 0, 0, 0])
        return super().forward(x)

torch.set_num_threads(1)
seen = []
with torchrun() as (rank, local):
    with Ranks() as ranks:
        images = open_images({where!r}, ranks=ranks)
    found = embed(Mortal(), images, batch_size=4, path={path!r})
    with open({seen!r} + str(rank), "w") as file:
        file.write(json.dumps([seen, found.ids, found.y.tolist()]))
"""


def code(where: Path, path: Path, seen: Path, kill: int = -1) -> str:
    """A run over shards; each rank notes the numbers of the pictures that it saw, and is killed before its batch ``kill``."""
    return RUN.format(tests=str(Path(__file__).parent), where=str(where), path=str(path), seen=str(seen), kill=kill)


@pytest.mark.parametrize("size", [1, 2])
def test_ranks_share_uneven_shards_and_go_on_after_a_kill(tmp_path, size):
    shards(tmp_path / "s", (3, 11, 1, 6))  # 21 pictures: 6 batches, the last one of a single picture
    where, path = tmp_path / "s", tmp_path / "e.safetensors"
    done = group(size, code(where, path, tmp_path / "whole"))
    assert [one.returncode for one in done] == [0] * size, done
    shares = [json.loads((tmp_path / f"whole{rank}").read_text()) for rank in range(size)]
    assert sorted(number for share in shares for number in share[0]) == [*range(21)]  # each once, none twice
    names = [open_images(str(where)).name(path) for path in open_images(str(where)).paths]
    assert all(share[1:] == [names, [*range(21)]] for share in shares)
    expected = embed(Encoder(), str(where), batch_size=4)
    torch.testing.assert_close(Embeddings.load(path).h, expected.h, rtol=1e-5, atol=1e-3)

    killed = tmp_path / "k.safetensors"
    assert 0 not in [one.returncode for one in group(size, code(where, killed, tmp_path / "killed", kill=2))]
    assert not killed.exists() and not [*tmp_path.glob("killed*")]
    done = group(size, code(where, killed, tmp_path / "resumed"))
    assert [one.returncode for one in done] == [0] * size, done
    assert same(Embeddings.load(killed), Embeddings.load(path))
    again = [json.loads((tmp_path / f"resumed{rank}").read_text())[0] for rank in range(size)]
    assert 0 < sum(map(len, again)) < 21  # the batches of before were kept


@pytest.mark.slow("starts torchrun")
def test_under_torchrun(tmp_path):
    shards(tmp_path / "s", (3, 11, 1, 6))
    script = tmp_path / "script.py"
    script.write_text(code(tmp_path / "s", tmp_path / "e.safetensors", tmp_path / "seen"))
    torchrun(2, script)
    shares = [json.loads((tmp_path / f"seen{rank}").read_text()) for rank in range(2)]
    assert sorted(number for share in shares for number in share[0]) == [*range(21)]


def test_an_error_of_one_rank_is_that_of_all(tmp_path):
    paths = shards(tmp_path)
    ranks = SimpleNamespace(rank=0, size=2, to_first=lambda mine: ["002.tar is damaged"], from_first=lambda together: together)
    with pytest.raises(DatasetError, match="002.tar is damaged"):
        open_shards(paths, ranks=ranks)
    with Ranks() as alone:
        assert numbers(open_shards(paths, ranks=alone)) == [*range(9)]


# -- the commands ------------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    from torchprobe.cli import main

    with pytest.raises(SystemExit) as found:
        raise SystemExit(main([str(one) for one in arguments]))
    return int(found.value.code or 0)


@pytest.mark.parametrize("name", ["{000..002}.tar", ""])
def test_scan_reads_shards(tmp_path, capsys, name):
    pytest.importorskip("timm")
    pytest.importorskip("matplotlib")
    shards(tmp_path / "s")
    where = f"{tmp_path}/s/{name}"
    assert run("scan", "timm:test_vit", "--images", where, "--random-init", "--out", tmp_path / "out", "--device", "cpu", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["images"] == where.rstrip("/")
    assert "9" in json.dumps(found["images"])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("nothing/{0..1}.tar", "there is no shard nothing/0.tar"),
        ("a.tar.gz", "there is no shard a.tar.gz"),
        ("memory://nothing", "no images in memory://nothing"),
        ("hf-datasets:/nowhere/at/all", "hf-datasets:/nowhere/at/all"),
    ],
)
def test_what_is_not_there_is_an_error_in_one_sentence(tmp_path, capsys, monkeypatch, where, message):
    pytest.importorskip("matplotlib")
    pytest.importorskip("fsspec")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("scan", "timm:test_vit", "--images", where, "--random-init", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# -- a whole interpretation --------------------------------------------------------------------------------------------------


def classes_in_shards(folder: Path) -> tuple[Path, Path]:
    """The same pictures in class folders, and in shards of 10."""
    files = sets.write_classes(folder / "files")
    members = []
    for label, name in enumerate(sets.CLASSES):
        for path in sorted((files / name).iterdir()):
            key = f"{name}/{path.stem}"
            members += [(f"{key}.png", path.read_bytes()), (f"{key}.cls", str(label).encode())]
    for number in range(0, len(members), 20):
        tar(folder / "shards" / f"{number // 20:03}.tar", members[number : number + 20])
    return files, folder / "shards"


def test_an_interpretation_of_shards_is_that_of_the_folder(tmp_path):
    files, packed = classes_in_shards(tmp_path)
    options = {"head": sets.head(sets.encoder()), "layer_images": 0, "provenance_images": 0}
    ours = interpret(sets.encoder(), open_images(str(packed)), tmp_path / "a", **options).results
    theirs = interpret(sets.encoder(), labeled_folder(files, names=sets.CLASSES), tmp_path / "b", **options).results
    assert ours.accuracy["imagenet"].accuracy == theirs.accuracy["imagenet"].accuracy > 0.4
    assert ours.outliers.indices == theirs.outliers.indices == [sets.OUTLIER]
    files = (Embeddings.load(tmp_path / one / "embeddings" / "imagenet.safetensors") for one in "ab")
    assert same(*files)


def test_the_labels_of_shards_need_a_head_whose_rows_they_are(tmp_path):
    _, packed = classes_in_shards(tmp_path)
    encoder = sets.encoder()
    trained = AnyEncoder(encoder.visual, features=sets.FEATURES, preprocess=encoder.preprocess, head=sets.head(encoder))
    inputs = Inputs(images=packed)
    assert inputs.subject(trained).head.out_features == 3
    with pytest.raises(DatasetError, match=r"made from the names of classes, and the labels of .*shards are numbers.*classnames.txt"):
        inputs.subject(trained, "zero-shot")
    (packed / "classnames.txt").write_text("blue\ngreen\nred\nviolet\n")
    with pytest.raises(DatasetError, match="has the names of 4 classes, but the head has 3 rows"):
        inputs.subject(trained)
    (packed / "classnames.txt").write_text("blue\ngreen\nred\n")
    subject = inputs.subject(trained)
    assert subject.images.names == ("blue", "green", "red") and subject.head is not None
