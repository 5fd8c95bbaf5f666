"""Any layer and any position as the representation, against hidden states read by hand."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.analysis import embed
from torchprobe.analysis.positions import LayerEncoder, special_tokens
from torchprobe.datasets import Texts
from torchprobe.encoders import Encoder, TextEncoder
from torchprobe.studies.scan import scan


def wrapped(network, features, **options):
    return Encoder(network.eval(), features=features, preprocess=lambda image: image, **options)


def hidden(network, module, inputs):
    """The output of a module, by a hook of our own; a copy, before anything can overwrite it."""
    found = []

    def keep(_, arguments, output):
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        network(**inputs) if isinstance(inputs, dict) else network(inputs)
    handle.remove()
    return found[-1]


def read(encoder, images, layer, position):
    return embed(encoder, list(images), layer=layer, position=position, batch_size=len(images))


def test_timm_transformer_with_registers():
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=0, reg_tokens=3).eval()
    encoder, images = wrapped(network, 192), torch.randn(4, 3, 48, 48)
    tokens = hidden(network, network.blocks[0], images)  # class token, 3 registers, 9 patches
    expected = {
        "class": tokens[:, 0],
        "patch": tokens[:, 4:].flatten(0, 1),
        "mean": tokens[:, 4:].mean(1),
        "all": tokens.flatten(0, 1),
    }
    for position, rows in expected.items():
        found = read(encoder, images, "visual.blocks.0", position)
        assert torch.equal(found.h, rows), position
        assert (found.provenance["layer"], found.provenance["position"]) == ("visual.blocks.0", position)
    assert read(encoder, images, "visual.blocks.0", "patch").ids[:2] == ["0@4", "0@5"]
    assert read(encoder, images, "visual.blocks.0", "all").ids[13] == "1@0"
    patches = hidden(network, network.patch_embed, images)  # without class token
    assert torch.equal(read(encoder, images, "visual.patch_embed", "mean").h, patches.mean(1))
    with pytest.raises(ValueError, match="has no class token"):
        read(encoder, images, "visual.patch_embed", "class")


def test_image_tower_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    tower = open_clip.model.VisionTransformer(image_size=32, patch_size=8, width=24, layers=2, heads=2, mlp_ratio=2.0, output_dim=16).eval()
    encoder = wrapped(tower, 16)
    for count in (3, 17):  # 17: as many images as positions
        images = torch.randn(count, 3, 32, 32)
        tokens = hidden(tower, tower.transformer.resblocks[0], images)
        tokens = tokens if tower.transformer.batch_first else tokens.transpose(0, 1)
        for position, rows in {"class": tokens[:, 0], "mean": tokens[:, 1:].mean(1), "all": tokens.flatten(0, 1)}.items():
            found = read(encoder, images, "visual.transformer.resblocks.0", position).h
            assert torch.allclose(found, rows, rtol=1e-5, atol=1e-6), (count, position)


def test_maps_and_what_overwrites_them():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.resnet18().eval()
    network.fc = nn.Identity()
    encoder, images = wrapped(network, 512), torch.randn(3, 3, 64, 64)
    for layer in ("layer3", "bn1", "layer1.0.bn1"):  # a batch norm is followed by a ReLU in place
        maps = hidden(network, network.get_submodule(layer), images)
        every = maps.flatten(2).transpose(1, 2)
        assert torch.allclose(read(encoder, images, f"visual.{layer}", "mean").h, maps.mean((2, 3)), rtol=1e-5, atol=1e-7)
        for position in ("all", "patch"):
            assert torch.equal(read(encoder, images, f"visual.{layer}", position).h, every.flatten(0, 1))
    assert (read(encoder, images, "visual.bn1", "all").h < 0).any()
    with pytest.raises(ValueError, match="no class token: choose a position, one of patch, mean, all"):
        read(encoder, images, "visual.layer3", "class")
    assert torch.equal(read(encoder, images, "visual.avgpool", None).h, hidden(network, network.avgpool, images).flatten(1))
    with pytest.raises(ValueError, match="one vector for each image, so it has no positions"):
        read(encoder, images, "visual.avgpool", "mean")


def test_mode_of_the_network_is_kept():
    encoder = small()  # in training mode itself, around a network in eval mode
    read(encoder, torch.randn(3, 3, 8, 8), "visual.0", "mean")
    assert encoder.training and not encoder.network.training


def test_mean_of_half_precision_is_taken_in_single_precision():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).to(torch.bfloat16)
    images = torch.randn(2, 3, 32, 32) + 100
    maps = hidden(network, network[0], images.to(torch.bfloat16))
    found = read(wrapped(network, 4), images, "visual.0", "mean").h
    assert torch.allclose(found.double(), maps.double().mean((2, 3)), rtol=1e-6)


@pytest.mark.parametrize("kind", ["GPT2Model", "BertModel"])
def test_texts_without_padding(kind):
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 30, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "GPT2Model":
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=24, **common)
    else:
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=24, **common
        )
    torch.manual_seed(0)
    network = getattr(transformers, kind)(config).eval()

    def tokenizer(texts):
        longest = max(map(len, texts))
        ids = torch.tensor([[3 + ord(c) % 20 for c in text] + [0] * (longest - len(text)) for text in texts])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in texts])}

    written = ["abc", "hello", "x", "abcd", "yz"]  # five texts of at most five tokens
    encoder = TextEncoder(network, tokenizer, features=32, representation="mean", choices={"mean": 32})
    layer, module = ("text.h.0", network.h[0]) if kind == "GPT2Model" else ("text.encoder.layer.0", network.encoder.layer[0])
    alone = [hidden(network, module, dict(tokenizer([text])))[0] for text in written]  # no padding at all
    expected = {
        "class": torch.stack([one[0] for one in alone]),
        "mean": torch.stack([one.mean(0) for one in alone]),
        "last": torch.stack([one[-1] for one in alone]),
        "all": torch.cat(alone),
    }
    for position, rows in expected.items():
        found = embed(encoder, Texts.of(written), layer=layer, position=position)
        assert found.h.shape == rows.shape
        assert torch.allclose(found.h, rows, atol=1e-5), position
    result = scan(encoder, Texts.of(written), [layer], layer=layer, position="all")
    assert result.vectors == result.representation.vectors == sum(map(len, written))
    with pytest.raises(ValueError, match="no position 'patch' for texts: choose one of class, last, mean, all"):
        embed(encoder, Texts.of(written), layer=layer, position="patch")


def small():
    return wrapped(nn.Sequential(nn.Conv2d(3, 40, 2, stride=2), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()), 40)


@pytest.mark.parametrize(
    ("layer", "position", "message"),
    [
        ("visual.00", "mean", "has no layer .visual.00.; did you mean .visual.0."),
        ("visual.*", "mean", "stands for 4 layers"),
        ("visual.0", None, "gives 16 positions for each image: choose a position, one of patch, mean, all"),
        ("visual.0", "last", "no position 'last' for images"),
        ("visual.0", "first", "position is one of class, patch"),
        ("visual.3", "all", "leave the position out"),
        (None, "mean", "name the layer too"),
    ],
)
def test_what_does_not_fit(layer, position, message):
    with pytest.raises(ValueError, match=message):
        read(small(), torch.randn(5, 3, 8, 8), layer, position)


def test_a_layer_needs_an_encoder():
    with pytest.raises(TypeError, match=r"read from a torchprobe\.Encoder, got Flatten"):
        embed(nn.Flatten(), [torch.zeros(3, 2, 2)], layer="", position="mean")
    with pytest.raises(ValueError, match="reads a layer already"):
        embed(LayerEncoder(small(), "visual.3", None, torch.zeros(1, 3, 8, 8)), [torch.zeros(3, 8, 8)], layer="visual.0", position="all")


def test_another_layer_is_not_continued(tmp_path):
    images, file = list(torch.randn(5, 3, 8, 8)), tmp_path / "h.safetensors"
    encoder = small()
    every = embed(encoder, images, layer="visual.0", position="all", path=file)
    assert len(every) == 80
    assert torch.equal(embed(encoder, images, layer="visual.0", position="all", path=file).h, every.h)
    for other in ({"layer": "visual.1", "position": "all"}, {"layer": "visual.0", "position": "patch"}, {}):
        with pytest.raises(ValueError, match="was made with another"):
            embed(encoder, images, **other, path=file)


def test_killed_between_batches_with_several_vectors(tmp_path):
    images, file, batches = list(torch.randn(9, 3, 8, 8)), tmp_path / "h.safetensors", []

    def stop():
        batches.append(1)
        return len(batches) > 1

    encoder, options = small(), {"layer": "visual.0", "position": "all", "batch_size": 4}
    assert embed(encoder, images, **options, path=file, stop=stop).partial
    whole, seen = embed(encoder, images, **options), []
    resumed = embed(encoder, images, **options, path=file, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(resumed.h, whole.h)
    assert resumed.ids == whole.ids
    assert seen == [(8, 9), (9, 9)]


def test_special_tokens_are_declared_not_guessed():
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    assert special_tokens(wrapped(network, 4), 17, False, {16}) == 0
    assert special_tokens(wrapped(network, 4, special_tokens=1), 17, False, {16}) == 1
    assert special_tokens(wrapped(network, 4, special_tokens=1), 16, False, {16}) == 0
    assert special_tokens(wrapped(network, 4, special_tokens=1), 17, True, {16}) == 0


def test_kurtosis_of_several_vectors_is_of_images(tmp_path):
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    from torchprobe.datasets import image_folder
    from torchprobe.studies.interpret.run import interpret

    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(6):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / "images" / f"{i}.png")
    encoder = small()
    encoder.preprocess = to_tensor
    images = image_folder(tmp_path / "images")
    found = interpret(encoder, images, tmp_path / "out", layer="visual.0", position="all")
    pixels = torch.stack([to_tensor(Image.open(path)) for path in images.paths])
    h = hidden(encoder.network, encoder.network[0], pixels).flatten(2).transpose(1, 2).double()
    deviation = h - h.mean(-1, keepdim=True)
    kappa = ((deviation**4).mean(-1) / (deviation**2).mean(-1) ** 2).mean(1)
    assert found.kurtosis == pytest.approx(kappa.tolist(), rel=1e-5)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["kurtosis"]["mean"] == pytest.approx(float(kappa.mean()), rel=1e-5)
    assert (results["data"]["imagenet"]["images"], results["about"]["layer"], results["about"]["position"]) == (6, "visual.0", "all")
    assert "sees its own representation, not visual.0" in results["skipped"]["accuracy"]
    scanned = scan(encoder, images, ["visual.0"], layer="visual.0", position="all")
    assert scanned.kurtosis == pytest.approx(kappa.numpy(), rel=1e-5)
    with pytest.raises(ValueError, match="gives several: choose a position"):
        interpret(encoder, images, tmp_path / "other", layer="visual.0", position="all", head=torch.ones(2, 40))
    with pytest.raises(ValueError, match="made with another encoder"):
        interpret(encoder, images, tmp_path / "out", layer="visual.1", position="all", resume=True)


def test_layer_table_names_outlier_features_and_where_they_live(tmp_path):
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    from torchprobe.datasets import image_folder
    from torchprobe.studies.scan_report import hidden_sentence, write_scan

    random = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / f"{i}.png")
    encoder = small()
    encoder.preprocess = to_tensor
    encoder.network[0].bias.data[[7, 3]] = 300.0
    encoder.network[0].weight.data[7] /= 1e3
    found = scan(encoder, image_folder(tmp_path), ["visual.0", "visual.3"])
    rows = {row["layer"]: row for row in found.rows()}
    assert rows["visual.0"]["outlier_indices"] == "3, 7 (positions)"
    assert rows["visual.3"]["outlier_indices"] == "3, 7 (vector)"
    assert rows[""]["outlier_indices"] == ""
    summary = found.summary()["hidden_states"]
    assert summary["inputs"] == 24 and sorted(summary["llm_int8"]) == [3, 7]
    assert "24 inputs, 2 features stand out" in hidden_sentence(found.hidden)
    page = write_scan(found, tmp_path / "out")["page"].read_text()
    assert "3, 7 (positions)" in page
    assert "3, 7 (positions)" in (tmp_path / "out" / "layers.csv").read_text()


def test_patches_that_are_padding_count_nowhere(tmp_path):
    import hugging_face_models as models
    from PIL import Image

    from torchprobe import load_encoder

    models.two_towers(tmp_path, "siglip2")
    encoder = load_encoder(f"hf:{tmp_path}")
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (*size, 3), np.uint8)) for size in ((40, 100), (64, 64))]
    images = torch.stack([encoder.preprocess(picture) for picture in pictures])
    kept = images[..., -3].bool()
    assert not kept[0].all() and torch.equal(encoder.mask(images), kept)
    layer = "visual.vision_model.encoder.layers.0"
    tokens = hidden(encoder.network, encoder.get_submodule(layer), images)
    assert torch.allclose(read(encoder, images, layer, "all").h, tokens[kept], atol=1e-6)
    mean = torch.stack([one[which].mean(0) for one, which in zip(tokens, kept, strict=True)])
    assert torch.allclose(read(encoder, images, layer, "mean").h, mean, atol=1e-6)
    assert len(read(encoder, images, layer, "patch").h) == int(kept.sum())


@pytest.mark.slow("three whole interpretations, two with concepts")
def test_a_layer_with_one_vector_goes_through_everything_with_a_head_of_its_own(tmp_path):
    import interpret_sets as sets

    from torchprobe.datasets import Broden, labeled_folder
    from torchprobe.studies.interpret.run import interpret

    encoder, images = sets.encoder(), labeled_folder(sets.write_classes(tmp_path / "images"))
    broden = Broden(sets.write_concepts(tmp_path / "broden"))
    given = {"head": sets.head(encoder), "broden": broden, "layer_images": 0}
    found = interpret(encoder, images, tmp_path / "out", layer="visual.blocks.1", **given)
    plain = interpret(encoder, images, tmp_path / "plain", **given)  # the last block is the output
    assert found.results.accuracy == plain.results.accuracy and found.kurtosis == plain.kurtosis
    assert found.results.about["layer"] == "visual.blocks.1" and "layer" not in plain.results.about
    assert torch.equal(found.concepts["units"].average_precision, plain.concepts["units"].average_precision)
    several = interpret(encoder, images, tmp_path / "all", layer="visual.blocks.1", layer_images=0)
    assert several.results.accuracy is None and "not visual.blocks.1" in several.results.skipped["accuracy"]
