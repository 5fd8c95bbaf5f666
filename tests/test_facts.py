"""What a result depends on: a change between a stop and a resume is refused, with the fact named, or computed anew. Nothing is mixed."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpret_sets as sets
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from torchprobe.analysis import Baseline, embed
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.identity import content_fact, transform_fact
from torchprobe.analysis.reading import Source
from torchprobe.common import facts, limits
from torchprobe.common.checked import DamagedError, read_checked, write_checked
from torchprobe.common.facts import UNIDENTIFIED, ChangedError, changed, file_digests, require_same
from torchprobe.common.networks import modules_fact
from torchprobe.common.runs import RunWarning
from torchprobe.datasets import Broden, BrodenWriter, image_folder, labeled_folder, text_file
from torchprobe.datasets.broden import broden_digest
from torchprobe.encoders import Encoder, Head
from torchprobe.studies.interpret import interpret
from torchprobe.studies.interpret.results import Stages


def picture(seed: int) -> Any:
    from PIL import Image

    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(12):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / "ab"[number % 2] / f"{number:02}.bmp")  # all of one size
    return folder


def to_tensor(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0) / 255


def encoder(preprocess: Callable[[Any], Tensor] = to_tensor, seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6)), features=6, preprocess=preprocess, name="small")


def stopped_after(batches: int) -> Callable[[], bool]:
    asked: list[int] = []
    return lambda: asked.append(1) is None and len(asked) > batches


def replaced_unnoticed(path: Path, seed: int) -> None:
    """Another picture of the same name, size and date."""
    before = path.stat()
    picture(seed).save(path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


# -- the list --------------------------------------------------------------------------------------------------------------


def test_the_first_difference_is_named_down_to_its_part() -> None:
    before = {"seed": 0, "data": {"images": 3, "digest": "a"}, "encoder": "x"}
    assert changed(before, dict(before)) is None
    assert changed(before, {**before, "seed": 1, "encoder": "y"}) == ("encoder", "x", "y")
    assert changed(before, {**before, "data": {"images": 3, "digest": "b"}}) == ("data: digest", "a", "b")
    assert changed(before, {"seed": 0, "encoder": "x"}) == ("data", before["data"], facts.NOT_NOTED)
    assert changed({"a": (1, 2)}, {"a": [1, 2]}) is None  # as JSON holds them


def test_what_cannot_be_told_is_not_the_same() -> None:
    with pytest.raises(
        ChangedError, match="nothing tells whether its data is still the same: give the object an attribute `identity`"
    ) as error:
        require_same("a.bin", {"data": UNIDENTIFIED}, {"data": UNIDENTIFIED}, "start over")
    assert (error.value.fact, str(error.value)[-10:]) == ("data", "start over")
    with pytest.raises(ChangedError, match="did not note its weights; start over"):
        require_same("a.bin", {}, {"weights": "a"}, "start over")


def test_digests_of_files_are_of_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bmp"
    picture(0).save(path)
    (first,) = file_digests([path])
    replaced_unnoticed(path, 1)
    (second,) = file_digests([path])
    assert first is not None and second is not None and first != second
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert file_digests([tmp_path / "pipe", tmp_path, tmp_path / "none"]) == [None, None, None]  # and it does not wait


def test_a_file_is_read_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{i}.bin" for i in range(40)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 1000)
    first = file_digests(paths, workers=4)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(facts.hashlib, "sha256", refuse)
    assert file_digests(paths, workers=4) == first


def test_digests_are_cheap(tmp_path: Path) -> None:
    """Against reading alone, in processor time: 64 MB in 200 files."""
    block = os.urandom(320_000)
    paths = [tmp_path / f"{i}.bin" for i in range(200)]
    for i, path in enumerate(paths):
        path.write_bytes(i.to_bytes(4, "big") + block)
    start = time.process_time()
    assert len(set(file_digests(paths))) == 200
    assert time.process_time() - start < 2  # 0.05 s on a quiet machine with SHA instructions


# -- what a data set and a transform are -------------------------------------------------------------------------------------


class Told(list):  # type: ignore[type-arg]
    identity = "mine, first edition"


def test_data_sets(photos: Path, tmp_path: Path) -> None:
    tensors = TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
    others = [
        TensorDataset(torch.arange(6.0).view(3, 2), torch.tensor([0, 2, 1])),
        [torch.zeros(2)],
        [(torch.zeros(2), 1)],
        [(torch.zeros(2), 2)],
        Subset(tensors, [0, 1]),
        Subset(tensors, [1, 0]),
        Told(),
        image_folder(photos),
        labeled_folder(photos),
    ]
    found = [content_fact(one) for one in (tensors, *others)]
    assert len(set(found)) == len(found) and UNIDENTIFIED not in found
    assert [content_fact(one) for one in (tensors, *others)] == found
    assert content_fact(["a.png"]) == content_fact(Subset(["a"], [0])) == UNIDENTIFIED  # type: ignore[arg-type]
    for text in ("a\nb\n", "a\nc\n"):
        (tmp_path / "t.txt").write_text(text)
        found.append(content_fact(text_file(tmp_path / "t.txt")))
    assert len(set(found)) == len(found)


def test_data_sets_of_torchvision(photos: Path) -> None:
    datasets = pytest.importorskip("torchvision.datasets")
    first = content_fact(datasets.ImageFolder(photos, to_tensor))
    assert content_fact(datasets.ImageFolder(photos, to_tensor)) == first != UNIDENTIFIED
    assert content_fact(datasets.ImageFolder(photos, lambda image: to_tensor(image) * 2)) not in (first, UNIDENTIFIED)
    assert content_fact(datasets.ImageFolder(photos, to_tensor, target_transform=lambda y: 1 - y)) == UNIDENTIFIED
    replaced_unnoticed(photos / "a" / "00.bmp", 99)
    assert content_fact(datasets.ImageFolder(photos, to_tensor)) not in (first, UNIDENTIFIED)


def test_transforms() -> None:
    def scaled(factor: float) -> Callable[[Any], Tensor]:
        return lambda image: to_tensor(image) * factor

    assert transform_fact(scaled(1)) == transform_fact(to_tensor) != transform_fact(scaled(2))
    assert transform_fact(lambda image: image) == UNIDENTIFIED and transform_fact(None) is None

    def tokens(extra: int) -> Callable[[Any], Tensor]:
        return lambda text: torch.tensor([[len(text) + extra], [1]])

    assert transform_fact(tokens(0), texts=True) == transform_fact(tokens(0), texts=True) != transform_fact(tokens(1), texts=True)
    assert transform_fact(to_tensor, texts=True) == UNIDENTIFIED


@pytest.fixture
def labeled(tmp_path: Path) -> Path:
    """A data set with a label map for each picture."""
    root, rng = tmp_path / "labeled", np.random.default_rng(0)
    with BrodenWriter(root, {"object": ["sky", "sea"]}, size=32) as writer:
        for number in range(6):
            planes = rng.integers(0, 3, (16, 16))
            writer.add(f"mine/{number}", rng.integers(0, 256, (32, 32, 3), np.uint8), {"object": planes})
    return root


def maps_of(root: Path) -> list[Path]:
    return [root / "images" / one for row in Broden(root).rows for entries in row.entries for one in entries if isinstance(one, str)]


def test_a_labeled_data_set(labeled: Path) -> None:
    before, part = broden_digest(Broden(labeled)), broden_digest(Broden(labeled), [0, 1])
    assert broden_digest(Broden(labeled)) == before != part
    row, maps = Broden(labeled).rows[5], maps_of(labeled)
    assert len(maps) == 6
    for path in (labeled / "label.csv", labeled / "index.csv", labeled / "category.csv", labeled / "images" / row.image, maps[5]):
        content, known = path.read_bytes(), Broden(labeled)
        path.write_bytes(content + b"\n")
        assert broden_digest(known) != before, path
        path.write_bytes(content)
    assert broden_digest(Broden(labeled)) == before
    maps[5].write_bytes(b"")
    assert broden_digest(Broden(labeled), [0, 1]) == part and broden_digest(Broden(labeled)) != before  # it is of another row


def test_a_cache_of_other_label_maps_is_not_used(labeled: Path, tmp_path: Path) -> None:
    cache, maps = tmp_path / "presence.safetensors", maps_of(labeled)
    first = Broden(labeled).presence(cache)
    assert torch.equal(Broden(labeled).presence(cache).area, first.area)
    contents = [path.read_bytes() for path in maps]
    for path, content in zip(maps, contents[1:] + contents[:1], strict=True):  # exchanged; the index is the same
        path.write_bytes(content)
    second = Broden(labeled).presence(cache)
    assert torch.equal(second.area, Broden(labeled).presence().area) and not torch.equal(second.area, first.area)


# -- embeddings ------------------------------------------------------------------------------------------------------------


def test_replaced_pictures_are_not_mixed(photos: Path, tmp_path: Path) -> None:
    path, options = tmp_path / "e.safetensors", {"batch_size": 4}
    assert embed(encoder(), image_folder(photos), path=path, stop=stopped_after(2), **options).partial
    files = {one: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
    for one in sorted(photos.rglob("*.bmp")):
        replaced_unnoticed(one, 100 + int(one.stem))
    with pytest.raises(ChangedError, match=r"e\.safetensors was made with another data: digest: .*resume=False") as error:
        embed(encoder(), image_folder(photos), path=path, **options)
    assert error.value.fact == "data: digest" and {one: one.read_bytes() for one in files} == files
    anew = embed(encoder(), image_folder(photos), path=path, resume=False, **options)
    assert torch.equal(anew.h, embed(encoder(), image_folder(photos), **options).h)
    replaced_unnoticed(photos / "a" / "00.bmp", 500)
    with pytest.raises(ChangedError, match="another data: digest"):  # of a complete file too
        embed(encoder(), image_folder(photos), path=path, **options)


@pytest.mark.parametrize("finished", [False, True])
def test_other_code_is_not_mixed(photos: Path, tmp_path: Path, finished: bool) -> None:
    def scaled(factor: float) -> Callable[[Any], Tensor]:
        return lambda image: to_tensor(image) * factor

    path = tmp_path / "e.safetensors"
    embed(encoder(scaled(1)), image_folder(photos), batch_size=4, path=path, stop=None if finished else stopped_after(2))
    with pytest.raises(ChangedError, match="another transform"):
        embed(encoder(scaled(2)), image_folder(photos), batch_size=4, path=path)
    assert len(embed(encoder(scaled(1)), image_folder(photos), batch_size=4, path=path)) == 12


@pytest.mark.parametrize("finished", [False, True])
def test_other_modules_of_the_same_weights_are_not_mixed(photos: Path, tmp_path: Path, finished: bool) -> None:
    def normalized(eps: float) -> Encoder:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.LayerNorm(8, eps=eps))
        return Encoder(network, features=8, preprocess=to_tensor).eval()

    path = tmp_path / "e.safetensors"
    embed(normalized(1e-5), image_folder(photos), batch_size=4, path=path, stop=None if finished else stopped_after(2))
    with pytest.raises(ChangedError, match="another modules"):
        embed(normalized(1e-2), image_folder(photos), batch_size=4, path=path)
    assert len(embed(normalized(1e-5), image_folder(photos), batch_size=4, path=path)) == 12


def test_settings_of_a_network_that_its_modules_do_not_show() -> None:
    transformers = pytest.importorskip("transformers")

    def network(**changed: Any) -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
        return transformers.ViTModel(transformers.ViTConfig(**sizes | {"num_attention_heads": 4} | changed))  # type: ignore[no-any-return]

    fact = modules_fact(network())
    assert fact == modules_fact(network()) == modules_fact(network(id2label={0: "cat"}, _name_or_path="elsewhere"))
    for change in ({"num_attention_heads": 2}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}):
        assert modules_fact(network(**change)) != fact


def test_another_version_is_not_mixed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.safetensors"
    embed(encoder(), image_folder(photos), batch_size=4, path=path, stop=stopped_after(1))
    monkeypatch.setattr("torchprobe.analysis.reading.VERSION", "99.0")
    with pytest.raises(ChangedError, match=r"another torchprobe: '0\.\d+\.\d+', now it is '99\.0'"):
        embed(encoder(), image_folder(photos), batch_size=4, path=path)


class Items:
    def __init__(self, identity: str | None) -> None:
        if identity is not None:
            self.identity = identity

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> Any:
        return picture(index)


def test_a_data_set_that_nothing_is_known_of_is_resumed_only_if_it_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "e.safetensors"
    embed(encoder(), Items(None), batch_size=4, path=path, stop=stopped_after(1))
    with pytest.raises(ChangedError, match="cannot be resumed, because nothing tells whether its data: digest is still the same"):
        embed(encoder(), Items(None), batch_size=4, path=path)
    embed(encoder(), Items("first"), batch_size=4, path=path, stop=stopped_after(1), resume=False)
    with pytest.raises(ChangedError, match="another data: digest"):
        embed(encoder(), Items("second"), batch_size=4, path=path)
    whole = embed(encoder(), Items("first"), batch_size=4, path=path)
    assert torch.equal(whole.h, embed(encoder(), Items(None), batch_size=4).h)
    assert "digest" not in Source(Items(None), to_tensor, 4, 1).identity(saved=False)


def test_changed_bytes_of_an_unfinished_file_give_the_same_or_an_error(photos: Path, tmp_path: Path) -> None:
    path, rng = tmp_path / "e.safetensors", random.Random(0)
    whole = embed(encoder(), labeled_folder(photos), batch_size=3)
    embed(encoder(), labeled_folder(photos), batch_size=3, path=path, stop=stopped_after(3))
    part, progress = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.progress")
    content = {one: one.read_bytes() for one in (part, progress)}
    fewer = 0
    for number in range(120):
        for one, data in content.items():
            one.write_bytes(data)
        target = progress if number % 3 else part
        damaged = bytearray(content[target])
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        target.write_bytes(damaged)
        path.unlink(missing_ok=True)
        batches: list[int] = []
        try:
            found = embed(encoder(), labeled_folder(photos), batch_size=3, path=path, progress=lambda done, _, b=batches: b.append(done))  # type: ignore[misc]
        except ChangedError:
            continue
        assert torch.equal(found.h, whole.h) and torch.equal(found.y, whole.y) and found.ids == whole.ids
        fewer += len(batches) > 1
    assert fewer > 60  # most damage is noticed and costs batches


def test_changed_bytes_of_a_complete_file_are_an_error(photos: Path, tmp_path: Path) -> None:
    path, rng = tmp_path / "e.safetensors", random.Random(0)
    whole = embed(encoder(), labeled_folder(photos), batch_size=3, path=path)
    content = path.read_bytes()
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = Embeddings.load(path)
        except ValueError:
            refused += 1
            continue
        assert torch.equal(found.h, whole.h) and torch.equal(found.y, whole.y) and found.ids == whole.ids and found.skipped == whole.skipped
        assert found.provenance == whole.provenance and found.classes == whole.classes and found.groups == whole.groups
    assert refused > 250  # the rest is space, or names of keys that are not read


# -- stages ------------------------------------------------------------------------------------------------------------------


def test_mutated_stages_are_never_taken(tmp_path: Path) -> None:
    rng = random.Random(1)
    right = {"values": [1.5, 2.25, -3.0], "names": ["a", "b"], "count": 12}
    stages = Stages(tmp_path)
    stages.run("one", {"weights": "abc", "seed": 0}, dict[str, Any], lambda: right)
    path = tmp_path / "stages" / "one.json"
    content, taken = path.read_bytes(), 0
    for _ in range(1000):
        damaged = bytearray(content)
        at = rng.randrange(len(damaged))
        kind = rng.randrange(3)
        if kind == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del damaged[at]
        else:
            damaged[at:at] = bytes([rng.choice(b'0123456789,[]{}" ')])
        path.write_bytes(damaged)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torchprobe.studies.interpret.results.warnings.warn", lambda *_, **__: None)
            known = Stages(tmp_path, resume=True).known("one", {"weights": "abc", "seed": 0}, dict[str, Any])
        assert known is None or known == right
        taken += known is not None
    assert taken < 400  # spaces between the keys


def test_a_stage_of_another_name_is_not_taken(tmp_path: Path) -> None:
    Stages(tmp_path).run("one", {"seed": 0}, dict[str, int], lambda: {"n": 1})
    (tmp_path / "stages" / "two.json").write_bytes((tmp_path / "stages" / "one.json").read_bytes())
    assert Stages(tmp_path, resume=True).known("two", {"seed": 0}, dict[str, int]) is None
    assert Stages(tmp_path, resume=True).known("one", {"seed": 0}, dict[str, int]) == {"n": 1}


@pytest.mark.parametrize(
    "text", ["[]", "3", "null", '"a"', "{}", '{"checksum": 3}', "[" * 100_000, "{", "\udcff".encode("utf-8", "surrogatepass")]
)
def test_hostile_json_is_an_error_that_names_the_file(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DamagedError, match=r"settings\.json is damaged"):
        read_checked(path)
    write_checked(path, {"a": float("nan"), "b": 1})
    assert read_checked(path) == {"a": None, "b": 1}
    with limits.changed(json_bytes=10), pytest.raises(limits.LimitError, match=r"settings\.json has more than 10 bytes"):
        read_checked(path)


def test_a_repeated_model_counts_once(tmp_path: Path) -> None:
    rows = ["a,60,47", "b,70,58", "c,80,71", "d,65,51"]
    table = tmp_path / "models.csv"
    fits = []
    for more in ([], ["b,70,58", "b,70,58"]):
        table.write_text("\n".join(["model,imagenet,imagenet_v2", *rows, *more]))
        fits.append(Baseline.from_csv(table).fit("imagenet_v2"))
    assert fits[0] == fits[1] and fits[0].n == 4
    table.write_text("\n".join(["model,imagenet,imagenet_v2", *rows, "b,70,59"]))
    with pytest.raises(ValueError, match=r"models\.csv is not a baseline: 'b' is listed twice, with imagenet_v2 58 and 59"):
        Baseline.from_csv(table)


# -- a whole run ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    sets.write_classes(folder / "images", each=6)
    sets.write_concepts(folder / "concepts", 24)
    return folder


def run(study: Path, out: Path, **options: Any) -> Any:
    model = sets.encoder()
    images = labeled_folder(study / "images", names=sets.CLASSES)
    given = {"head": sets.head(model), "broden": Broden(study / "concepts"), "batch_size": 8, "layer_images": 0}
    return interpret(model, images, out, **{**given, **options})


def blackened(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size).save(path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.slow("whole interpretations")
def test_an_interpretation_with_other_inputs_is_refused_or_computed_anew(study: Path, tmp_path: Path) -> None:
    first = run(study, tmp_path / "out")
    # Another label of the concepts, and black pictures of concepts: computed anew, and as in a run of its own.
    table = study / "concepts" / "label.csv"
    table.write_text(table.read_text().replace(sets.CLASSES[0], "renamed"))
    blackened(study / "concepts" / "images" / Broden(study / "concepts").rows[0].image)
    with pytest.warns(RunWarning, match="concepts-made, .*because of another dataset"):
        again = run(study, tmp_path / "out", resume=True)
    own = run(study, tmp_path / "own")
    assert again.results["concepts"] == own.results["concepts"] != first.results["concepts"]
    # Another head: computed anew.
    head = sets.head(sets.encoder())
    flipped = Head(head.weight.detach().flip(0), names=sets.CLASSES)
    with pytest.warns(RunWarning) as told:
        again = run(study, tmp_path / "out", head=flipped, resume=True)
    assert any("because of another head" in str(one.message) for one in told)
    own = run(study, tmp_path / "own", head=flipped, overwrite=True)
    assert {key: value for key, value in again.results.items() if key != "about"} == {k: v for k, v in own.results.items() if k != "about"}
    # Other pictures of the same names, sizes and dates: refused.
    results = (tmp_path / "out" / "results.json").read_bytes()
    blackened(next((study / "images").rglob("*.png")))
    with pytest.raises(ChangedError, match=r"imagenet\.safetensors was made with another data: digest"):
        run(study, tmp_path / "out", head=flipped, resume=True)
    with pytest.raises(ChangedError, match=r"was made with another weights"):
        interpret(sets.encoder(1), labeled_folder(study / "images", names=sets.CLASSES), tmp_path / "out", batch_size=8, resume=True)
    assert (tmp_path / "out" / "results.json").read_bytes() == results


@pytest.mark.usefixtures("undrawn")
def test_changed_results_are_an_error(study: Path, tmp_path: Path) -> None:
    from torchprobe.studies.compare import load_results

    out = run(study, tmp_path / "out", broden=None).folder
    assert load_results(out).name
    for name in ("results.json", "kurtosis.csv"):
        content = (out / name).read_bytes()
        at = content.rindex(b"5")
        (out / name).write_bytes(content[:at] + b"6" + content[at + 1 :])
        with pytest.raises(ValueError, match=rf"{name} is damaged"):
            load_results(out)
        (out / name).write_bytes(content)
    record = out / ".torchprobe" / "run.json"
    write_checked(record, {**read_checked(record), "finished": False})
    with pytest.raises(ValueError, match="is unfinished: continue it with --resume"):
        load_results(out)
    record.write_text(json.dumps({"finished": True}))
    with pytest.raises(DamagedError, match=r"run\.json is damaged: it has no checksum"):
        load_results(out)
