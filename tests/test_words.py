"""Words against the units of a network: planted units and labelers, files, resumed runs, and the result."""

from __future__ import annotations

import csv
import json
import os
import signal

import numpy as np
import pytest
import torch
from processes import FORKS, free_port
from torch import nn
from words_sets import WORDS, PlantedClip, PlantedUnits, dissect_on_rank, mixtures, preprocess, write_images

from torchprobe.datasets import DatasetError, image_folder
from torchprobe.dissection.words import (
    MEASURES,
    Concepts,
    RankReorder,
    SoftLabels,
    TopPrecision,
    WordDissection,
    builtin_concepts,
    dissect_words,
    embed_concepts,
    match,
    read_concepts,
    read_soft_labels,
)

PLANTED = [3, 0, 5, 7]
TEMPLATES = ["a photo of a {}.", "{}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "set", 120)


def pixels(folder):
    from PIL import Image

    return torch.stack([preprocess(Image.open(path)) for path in sorted(folder.iterdir())])


# -- the whole -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", [*MEASURES, RankReorder(share=0.5), TopPrecision(share=0.3)])
def test_planted_units_are_named(folder, measure):
    found = dissect_words(
        PlantedUnits(PLANTED), "maps", folder, PlantedClip(noise=0.02), WORDS, measure=measure, templates=TEMPLATES, permutations=39,
        preprocess=preprocess, batch_size=16,
    )["maps"]  # fmt: skip
    assert found.units == 10 and len(found.images) == 120
    if measure == "rank_reorder":  # the order of six images says nothing
        assert found.summary()["matched_units"] == 0
        return
    named = {row.unit: row.concept for row in found.best() if row.adjusted <= 0.05}
    if measure == "average_precision":  # six positives are few for Holm's correction
        assert named.items() <= {unit: WORDS[word] for unit, word in enumerate(PLANTED)}.items() and len(named) >= 2
        return
    assert named == {unit: WORDS[word] for unit, word in enumerate(PLANTED)}
    assert found.units_of("striped") == [0] and found.named() == {WORDS[word]: [unit] for unit, word in enumerate(PLANTED)}


def test_the_numbers_are_those_of_the_parts(folder):
    """Soft labels, activations, measure and top images, each computed here."""
    model, labeler = PlantedUnits(PLANTED).eval(), PlantedClip(noise=0.02)
    options = {"templates": TEMPLATES, "permutations": 9, "seed": 3, "pooling": "max", "top": 4, "keep_scores": True, "batch_size": 7}
    found = dissect_words(model, ["maps", "pool"], folder, labeler, WORDS, preprocess=preprocess, **options)
    images = pixels(folder)
    embedded = labeler(images).double()
    texts = labeler.directions.double()
    labels = nn.functional.normalize(embedded, dim=1) @ nn.functional.normalize(texts, dim=1).T
    assert torch.allclose(found["maps"].labels.double(), labels, atol=1e-6)
    maps = {}
    handle = model.maps.register_forward_hook(lambda module, args, output: maps.update(x=output))
    model(images)
    handle.remove()
    scores = maps["x"].amax((2, 3)).T
    assert torch.allclose(found["maps"].scores, scores, atol=1e-6)
    want = match(found["maps"].scores, found["maps"].labels, permutations=9, seed=3)
    assert torch.equal(found["maps"].score, want.score) and torch.equal(found["maps"].adjusted, want.adjusted)
    ids, values = found["maps"].top
    assert torch.equal(ids, scores.topk(4).indices) or torch.allclose(values, scores.topk(4).values, atol=1e-6)
    assert found["pool"].scores.shape == (10, 120) and found["pool"].images[5] == "0005.png"
    facts = found["maps"].metadata
    assert facts["labeler"] == "planted CLIP" and "may be wrong" in facts["caveat"] and not facts["labeler_is_model"]
    assert facts["measure"]["name"] == "soft_wpmi" and facts["templates"] == {"": TEMPLATES} and facts["permutations"] == 9
    assert json.loads(json.dumps(facts)) == facts


def test_the_labeler_itself(folder):
    clip = PlantedClip()
    clip.body = nn.Identity()
    clip.forward = lambda images: clip.body(mixtures(images) @ clip.directions)
    found = dissect_words(
        clip, "body", folder, clip, WORDS, templates=TEMPLATES, measure="cosine_cubed", permutations=9, basis=clip.directions
    )
    assert found["body"].score.argmax(1).tolist() == list(range(len(WORDS)))
    assert found["body"].metadata["labeler_is_model"]


def test_a_wrong_labeler_finds_nothing(folder):
    """A labeler that sees nothing of the images: no unit matches, planted or not, but for 5 % of the labelers."""
    model = PlantedUnits(PLANTED)
    first = dissect_words(
        model, "maps", folder, SoftLabels(torch.rand(120, 8), WORDS), permutations=1, preprocess=preprocess, keep_scores=True
    )
    for measure in ("soft_wpmi", "cosine_cubed"):
        false = 0
        for seed in range(20):
            labels = 0.2 + 0.05 * torch.randn(120, 8, generator=torch.Generator().manual_seed(seed))
            false += bool((match(first["maps"].scores, labels, measure, permutations=19, seed=seed).adjusted <= 0.05).any())
        assert false <= 4, measure  # 4 or fewer in 99.7 %


def test_open_clip_labels_images(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    from torchprobe.encoders import ClipEncoder

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
    }
    (tmp_path / "tiny-words.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    clip = open_clip.create_model("tiny-words", pretrained=None).eval()
    encoder = ClipEncoder(
        clip, open_clip.get_tokenizer("tiny-words"), features=24, preprocess=lambda image: preprocess(image.resize((32, 32)))
    )
    folder = write_images(tmp_path / "images", 40)
    words = Concepts(["cat", "dog", "red"], ["animal", "animal", "color"])
    found = dissect_words(encoder, "visual.transformer.resblocks.1", folder, encoder, words, permutations=3, batch_size=8, keep_scores=True)
    result = found["visual.transformer.resblocks.1"]
    assert result.score.shape == (64, 3) and bool(result.score.isfinite().all())
    texts, used = embed_concepts(encoder, words)
    head = encoder.zero_shot_head(["cat", "dog"], used["animal"])
    assert torch.allclose(texts[:2], head.weight.detach(), atol=1e-6) and used["color"] != used["animal"]
    from PIL import Image

    with torch.no_grad():
        image = encoder(encoder.preprocess(Image.open(folder / "0003.png"))[None])
    assert torch.allclose(result.labels[3], (nn.functional.normalize(image) @ texts.T)[0], atol=1e-5)
    assert result.metadata["labeler_is_model"]


def test_a_model_of_transformers_labels_images(folder):
    """In a wrapper of a few lines, as the documentation says."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**sizes, "vocab_size": 130, "max_position_embeddings": 40, "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**sizes, "image_size": 4, "patch_size": 2},
        projection_dim=16,
    )
    torch.manual_seed(0)

    class Labeler(nn.Module):
        def __init__(self):
            super().__init__()
            self.clip, self.preprocess, self.name = transformers.CLIPModel(config), preprocess, "tiny transformers CLIP"

        def forward(self, images):
            found = self.clip.get_image_features(pixel_values=images)
            return found if isinstance(found, torch.Tensor) else found.pooler_output

        def encode_text(self, texts):
            tokens = torch.tensor([[0, *(2 + ord(c) for c in text[:30]), *[1] * (31 - len(text[:30]))] for text in texts])
            found = self.clip.get_text_features(input_ids=tokens)
            return found if isinstance(found, torch.Tensor) else found.pooler_output

    found = dissect_words(PlantedUnits(PLANTED), "maps", folder, Labeler(), WORDS, permutations=3, preprocess=preprocess)["maps"]
    assert bool(found.score.isfinite().all()) and found.metadata["labeler"] == "tiny transformers CLIP"
    assert not found.metadata["labeler_is_model"]


# -- a labeler, or its labels --------------------------------------------------------------------------------------------


def test_soft_labels_are_saved_and_used_again(folder, tmp_path):
    model, labeler = PlantedUnits(PLANTED), PlantedClip()
    first = dissect_words(
        model, "maps", folder, labeler, WORDS, templates=TEMPLATES, permutations=9, preprocess=preprocess, keep_scores=True
    )
    labels = SoftLabels(first["maps"].labels, WORDS, first["maps"].images, "planted CLIP")
    labels.save(tmp_path / "labels.safetensors")
    back = read_soft_labels(tmp_path / "labels.safetensors", builtin_concepts())
    assert torch.equal(back.values, labels.values) and back.images == tuple(first["maps"].images) and back.concepts == labels.concepts
    np.save(tmp_path / "labels.npy", labels.values.numpy().astype(np.float64))
    from_array = read_soft_labels(tmp_path / "labels.npy", Concepts(WORDS))
    before = labeler.seen
    shuffled = SoftLabels(back.values.flip(0), WORDS, back.images[::-1])  # names decide, not the order
    for given in (back, from_array, shuffled):
        again = dissect_words(model, "maps", folder, given, permutations=9, preprocess=preprocess)
        assert torch.equal(again["maps"].score, first["maps"].score) and torch.equal(again["maps"].adjusted, first["maps"].adjusted)
    assert labeler.seen == before


def test_soft_labels_from_embeddings():
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(5, 16, generator=generator), torch.randn(3, 16, generator=generator)
    found = SoftLabels.from_embeddings(images * 1e-30, texts * 1e30, ["a", "b", "c"])
    assert torch.allclose(found.values, nn.functional.cosine_similarity(images[:, None], texts[None], dim=2), atol=1e-6)
    images[2] = 0
    with pytest.raises(ValueError, match="embedding of image 'c.png' is 0 or not finite"):
        SoftLabels.from_embeddings(images, texts, ["a", "b", "c"], [f"{x}.png" for x in "abcde"])
    with pytest.raises(ValueError, match=r"expected embeddings \(images, d\) and \(2 concepts, d\)"):
        SoftLabels.from_embeddings(images, texts, ["a", "b"])
    with pytest.raises(ValueError, match="soft label of image b.png for 'y' is nan"):
        SoftLabels(torch.tensor([[0.1, 0.2], [0.3, torch.nan]]), ["x", "y"], ["a.png", "b.png"])


def test_soft_labels_that_do_not_fit(folder, tmp_path):
    model = PlantedUnits(PLANTED)
    names = [f"{i:04}.png" for i in range(120)]
    with pytest.raises(DatasetError, match="7 rows of soft labels for 120 images"):
        dissect_words(model, "maps", folder, SoftLabels(torch.rand(7, 2), ["a", "b"]), preprocess=preprocess)
    with pytest.raises(DatasetError, match="1 of 120 images have no soft labels: 0119.png"):
        dissect_words(model, "maps", folder, SoftLabels(torch.rand(119, 2), ["a", "b"], names[:-1]), preprocess=preprocess)
    np.save(tmp_path / "a.npy", np.zeros((3, 4)))
    with pytest.raises(DatasetError, match=r"holds float64 \(3, 4\); expected numbers \(images, 2 concepts\)"):
        read_soft_labels(tmp_path / "a.npy", Concepts(["a", "b"]))
    np.save(tmp_path / "o.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DatasetError, match="cannot be read as a NumPy file"):
        read_soft_labels(tmp_path / "o.npy", Concepts(["a", "b"]))
    (tmp_path / "n.npy").write_bytes(b"no numbers")
    with pytest.raises(DatasetError, match="cannot be read as a NumPy file"):
        read_soft_labels(tmp_path / "n.npy", Concepts(["a", "b"]))


def test_labelers_that_are_none(folder):
    model = PlantedUnits(PLANTED)
    with pytest.raises(ValueError, match="must be a module with preprocess and encode_text, or SoftLabels; got str"):
        dissect_words(model, "maps", folder, "open_clip:ViT-B-32", preprocess=preprocess)
    blind = nn.Linear(2, 2)
    blind.preprocess = preprocess
    with pytest.raises(ValueError, match="must have encode_text, as CLIP encoders have; Linear has not"):
        dissect_words(model, "maps", folder, blind, preprocess=preprocess)
    with pytest.raises(ValueError, match=r"a template must have \{\} in the place of the concept, got 'a photo'"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, templates=["a photo"], preprocess=preprocess)
    mute = PlantedClip()
    mute.directions.data[2] = torch.nan
    with pytest.raises(ValueError, match="embedding of caption 'red' is 0 or not finite"):
        dissect_words(model, "maps", folder, mute, WORDS, templates=["{}"], preprocess=preprocess)


# -- images --------------------------------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_are_named(tmp_path):
    folder = write_images(tmp_path / "set", 60)
    for i in (0, 17, 59):
        (folder / f"{i:04}.png").write_bytes(b"not a picture")
    found = dissect_words(PlantedUnits(PLANTED), "maps", folder, PlantedClip(), WORDS, templates=TEMPLATES, permutations=9,
                          preprocess=preprocess, batch_size=16, measure="cosine_cubed")["maps"]  # fmt: skip
    assert len(found.images) == 57 and "0017.png" not in found.images
    assert [name for name, _ in found.metadata["unreadable"]] == ["0000.png", "0017.png", "0059.png"]
    assert "not a picture in one of the formats" in found.metadata["unreadable"][0][1]
    for path in folder.iterdir():
        path.write_bytes(b"not a picture")
    with pytest.raises(DatasetError, match="none of the 60 images can be read"):
        dissect_words(PlantedUnits(PLANTED), "maps", folder, PlantedClip(), WORDS, templates=TEMPLATES, preprocess=preprocess)


def test_a_nan_names_its_image(folder):
    model, bad = PlantedUnits(PLANTED), pixels(folder)[37].flatten()

    def hook(module, args):
        images = args[0].clone()
        images[(images.flatten(1) == bad).all(1)] = torch.nan
        return (images,)

    model.register_forward_pre_hook(hook)
    with pytest.raises(ValueError, match="layer 'maps' gives nan in unit 0 for image 0037.png"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, templates=TEMPLATES, preprocess=preprocess)


def test_one_image(tmp_path):
    folder = write_images(tmp_path / "set", 1)
    for measure in MEASURES:
        found = dissect_words(PlantedUnits(PLANTED), "maps", folder, PlantedClip(), WORDS, templates=TEMPLATES, measure=measure,
                              permutations=3, preprocess=preprocess)["maps"]  # fmt: skip
        assert found.summary()["matched_units"] == 0 and len(found.best()) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "sum"}, "pooling must be one of max, mean"),
        ({"positions": "none"}, "positions must be one of"),
        ({"top": -1}, "top must be at least 0"),
        ({"permutations": 0}, "permutations and batch_size at least 1"),
        ({"measure": "cosine"}, "measure must be one of"),
        ({"batch_size": 0}, "batch_size at least 1; got"),
        ({"preprocess": None}, "give preprocess="),
        ({"concepts": []}, "there are no concepts"),
        ({"concepts": ["a", "a"]}, "'a' is listed twice"),
        ({"basis": {"other": torch.eye(10)}}, "'other', which is not dissected"),
        ({"basis": torch.eye(3)}, r"must be \(directions, 10\), got \(3, 3\)"),
    ],
)
def test_arguments_that_do_not_fit(folder, options, message):
    with pytest.raises(ValueError, match=message):
        dissect_words(PlantedUnits(PLANTED), "maps", folder, PlantedClip(), **{"preprocess": preprocess, "concepts": WORDS} | options)


def test_folders_that_do_not_exist(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        dissect_words(PlantedUnits(PLANTED), "maps", tmp_path / "none", PlantedClip(), WORDS, preprocess=preprocess)


# -- resumed -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["labeler", "words", "permutations of maps"])
def test_interrupted_and_resumed(folder, tmp_path, stage):
    model = PlantedUnits(PLANTED)
    options = {"templates": TEMPLATES, "permutations": 9, "preprocess": preprocess, "batch_size": 16, "checkpoint_every": 0.0}
    whole = dissect_words(model, "maps", folder, PlantedClip(), WORDS, **options)["maps"]
    at = {"stage": "", "done": 0}

    def tell(progress):
        at.update(stage=progress.stage, done=progress.done)

    def stop():
        return at["stage"] == stage and at["done"] >= 5

    with pytest.raises(KeyboardInterrupt):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, checkpoint=tmp_path / "c", progress=tell, stop=stop, **options)
    with pytest.raises(ValueError, match="already holds a dissection"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, checkpoint=tmp_path / "c", **options)
    with pytest.raises(ValueError, match="made with another concepts"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS[:-1], checkpoint=tmp_path / "c", resume=True, **options)
    with pytest.raises(ValueError, match="made with another pooling: 'mean', now it is 'max'"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, checkpoint=tmp_path / "c", resume=True, pooling="max", **options)
    other = {**options, "preprocess": lambda image: preprocess(image) * 0.5}
    with pytest.raises(ValueError, match="made with another transform"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, checkpoint=tmp_path / "c", resume=True, **other)
    with pytest.raises(ValueError, match="preprocess is random"):
        dissect_words(
            model, "maps", folder, PlantedClip(), WORDS, **options | {"preprocess": lambda image: preprocess(image) * torch.rand(1)}
        )
    bytes_of, times = (folder / "0003.png").read_bytes(), os.stat(folder / "0003.png")
    (folder / "0003.png").write_bytes((folder / "0004.png").read_bytes())
    os.utime(folder / "0003.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(ValueError, match="made with another data"):
        dissect_words(model, "maps", folder, PlantedClip(), WORDS, checkpoint=tmp_path / "c", resume=True, **options)
    (folder / "0003.png").write_bytes(bytes_of)  # written again, with another date
    labeler = PlantedClip()
    again = dissect_words(model, "maps", folder, labeler, WORDS, checkpoint=tmp_path / "c", resume=True, **options)["maps"]
    assert (
        torch.equal(again.score, whole.score)
        and torch.equal(again.adjusted, whole.adjusted)
        and torch.equal(again.p_values, whole.p_values)
    )
    assert labeler.seen < 120


def processes(folder, out, ranks=1, resume=False, kill_after=0):
    """The exit codes of some processes that share a run."""
    port = free_port() if ranks > 1 else 0
    arguments = (folder, out, out / "checkpoint", resume, kill_after)
    started = [FORKS.Process(target=dissect_on_rank, args=(*arguments, rank, ranks, port)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


@pytest.mark.slow("starts six processes")
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this PyTorch has no gloo")
def test_killed_and_shared(folder, tmp_path):
    """Killed twice, in either pass, and resumed; and shared by two processes: the same result."""
    for name in ("alone", "killed", "shared"):
        (tmp_path / name).mkdir()
    assert processes(folder, tmp_path / "alone") == [0]
    whole = WordDissection.load(tmp_path / "alone/0.safetensors")
    assert processes(folder, tmp_path / "killed", kill_after=5) == [-signal.SIGKILL]
    assert processes(folder, tmp_path / "killed", kill_after=20, resume=True) == [-signal.SIGKILL]
    assert processes(folder, tmp_path / "killed", resume=True) == [0]
    assert processes(folder, tmp_path / "shared", ranks=2) == [0, 0]
    for file in ("killed/0", "shared/0", "shared/1"):
        found = WordDissection.load(tmp_path / f"{file}.safetensors")
        for name in ("score", "p_values", "adjusted"):
            assert torch.equal(getattr(found, name).nan_to_num(), getattr(whole, name).nan_to_num())
        assert found.density == whole.density and found.density.images == 120 and found.metadata == whole.metadata


# -- the result ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(folder):
    concepts = Concepts(WORDS, ["animal", "animal", "color", "texture", "nature", "plant", "adjective", "vehicle"])
    return dissect_words(PlantedUnits(PLANTED), "maps", folder, PlantedClip(noise=0.02), concepts, templates=TEMPLATES, permutations=39,
                         measure="cosine_cubed", preprocess=preprocess, top=3, keep_scores=True)["maps"]  # fmt: skip


def test_the_tables(result, tmp_path):
    best = result.best()
    assert sorted(row.unit for row in best) == list(range(10))
    assert [row.adjusted for row in best] == sorted(row.adjusted for row in best)
    first = best[0]
    assert first.score == float(result.score[first.unit].max()) == float(result.score[first.unit, first.index])
    assert first.kind == result.concepts.kinds[WORDS.index(first.concept)] and first.p == float(result.p_values[first.unit, first.index])
    assert int(result.matched().sum()) >= 4 and result.matched(1.0).all()
    with pytest.raises(ValueError, match="'zebra' is not one of the 8 concepts"):
        result.units_of("zebra")
    summary = result.summary()
    assert summary["matched_units"] == 4 and summary["matched_concepts"] == 4 and summary["undefined_units"] == 0
    assert json.loads(json.dumps(summary))["best"][0]["concept"] == first.concept
    rows = list(csv.DictReader(result.to_csv(tmp_path / "a.csv").read_text().splitlines()))
    assert len(rows) == 10 and list(rows[0])[:7] == ["layer", "unit", "description", "similarity", "kind", "p", "adjusted_p"]
    assert rows[0]["description"] == first.concept and float(rows[0]["similarity"]) == first.score and rows[0]["labeler"] == "planted CLIP"
    order = result.score[int(rows[0]["unit"])].argsort(descending=True).tolist()
    assert [rows[0][f"description_{i}"] for i in (2, 3, 4, 5)] == [WORDS[i] for i in order[1:5]]


def test_saved_and_loaded(result, tmp_path):
    path = tmp_path / "maps.safetensors"
    result.save(path)
    back = WordDissection.load(path)
    for name in ("score", "p_values", "adjusted", "scores", "labels"):
        assert torch.equal(getattr(back, name), getattr(result, name))
    assert all(torch.equal(a, b) for a, b in zip(back.top, result.top, strict=True))
    assert back.concepts == result.concepts and list(back.images) == list(result.images) and back.metadata == result.metadata
    assert back == result and back != Concepts(["a"])
    back.score[0, 0] += 1
    assert back != result and repr(back) == "WordDissection('maps': 10 units, 8 concepts, 120 images, cosine_cubed)"


def test_undefined_units(folder, tmp_path):
    class Dead(PlantedUnits):
        def forward(self, images):
            return super().forward(images) * torch.tensor([1.0, 0.0] + [1.0] * 8)

    found = dissect_words(Dead(PLANTED), "", folder, PlantedClip(), WORDS, templates=TEMPLATES, permutations=3, measure="cosine_cubed",
                          preprocess=preprocess)[""]  # fmt: skip
    last = found.best()[-1]
    assert (last.unit, last.concept, last.index, last.score, last.adjusted) == (1, "", -1, None, None)
    assert found.summary()["undefined_units"] == 1 and not bool(found.matched(1.0)[1].any())
    found.save(tmp_path / "a.safetensors")
    assert WordDissection.load(tmp_path / "a.safetensors").best() == found.best()
    assert list(csv.DictReader(found.to_csv(tmp_path / "a.csv").read_text().splitlines()))[-1]["description"] == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, v: t.pop("score"), "'score': missing"),
        (lambda t, v: t.update(p_values=t["p_values"] + 1), "'p_values': expected numbers from 0 to 1"),
        (lambda t, v: t.update(adjusted=t["adjusted"][:, 1:].contiguous()), "'adjusted': expected the shape"),
        (lambda t, v: t.update({"top/ids": t["top/ids"] + 999}), "'top/ids': expected positions of 120 images"),
        (lambda t, v: v.update(concepts=["a"] * 8), "'concepts': the concept 'a' is listed twice"),
        (lambda t, v: v.update(concepts=[1] * 8), "'concepts': expected at most"),
        (lambda t, v: v.update(images=[3]), "'images': expected names"),
        (lambda t, v: v.update(metadata=[]), "'metadata': expected dict"),
    ],
)
def test_damaged_files(result, tmp_path, change, message):
    from torchprobe.common import storage

    path = tmp_path / "a.safetensors"
    result.save(path)
    file = storage.File(path, "torchprobe.word_dissection")
    tensors, values = {key: file.tensor(key) for key in file.keys}, dict(file.values)
    change(tensors, values)
    storage.write(path, "torchprobe.word_dissection", tensors, values)
    with pytest.raises(ValueError, match=message):
        WordDissection.load(path)


# -- concepts ------------------------------------------------------------------------------------------------------------


def test_the_built_in_list():
    concepts = builtin_concepts()
    assert 900 < len(concepts) < 1200 and concepts.remarks == () and "" not in concepts.kinds
    kinds = list(dict.fromkeys(concepts.kinds))
    assert {"animal", "food", "body part", "material", "texture", "color", "adjective"} <= set(kinds)
    runs = [kind for i, kind in enumerate(concepts.kinds) if i == 0 or concepts.kinds[i - 1] != kind]
    assert runs == kinds  # sorted by kind
    by_kind = {kind: [n for n, k in zip(concepts.names, concepts.kinds, strict=True) if k == kind] for kind in kinds}
    assert all(names == sorted(names, key=str.casefold) for names in by_kind.values())
    assert concepts.of_kinds(["color"]).names[:2] == ("beige", "black")
    with pytest.raises(ValueError, match="no concepts of the kind 'colour'"):
        concepts.of_kinds(["colour"])


def test_files_of_concepts(tmp_path):
    file = tmp_path / "concepts.txt"
    file.write_bytes("\ufeff# mine\r\n\r\n  tabby   cat \r\ndog\r\nDog\r\n[color]\r\nred\r\ndog\r\n".encode())
    found = read_concepts(file)
    assert found.names == ("tabby cat", "dog", "red") and found.kinds == ("", "", "color")
    assert found.remarks == ("2 duplicates left out: Dog, dog",)
    for content, message in (
        (b"# nothing\n\n", "has no concepts"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (b"a" * 300, "line 1 is longer than 200 characters"),
        (b"ok\na\x1b[31m", "line 2 has characters that cannot be printed"),
    ):
        file.write_bytes(content)
        with pytest.raises(DatasetError, match=message):
            read_concepts(file)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_concepts(tmp_path / "none.txt")
    with open(file, "wb") as large:
        large.truncate(20 << 20)
    with pytest.raises(DatasetError, match="more than 16,777,216 bytes"):
        read_concepts(file)


def test_the_folder_is_read_in_order(folder):
    assert [path.name for path in image_folder(folder).paths] == [f"{i:04}.png" for i in range(120)]
