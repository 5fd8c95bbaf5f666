"""Models of transformers: the representation is bitwise what transformers computes. Random weights, saved to a folder; no network."""

from __future__ import annotations

import hugging_face_models as models
import pytest
import torch
from safetensors.torch import load_file, save_file

import torchprobe
from torchprobe.encoders import ClipEncoder, Encoder, EncoderError, TextEncoder, load_encoder

TEXTS = ["a photo of a cat", "dogs", "the red car and the blue car"]


@pytest.fixture(autouse=True)
def without_network(monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def picture(width=90, height=70):
    from PIL import Image

    noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def pixels_of(folder):
    return models.transformers.AutoImageProcessor.from_pretrained(folder)(images=picture(), return_tensors="pt")


def features(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


# -- images --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", models.IMAGES)
def test_images_bit_for_bit(tmp_path, which):
    model = models.image_model(tmp_path, which)
    encoder = load_encoder(f"hf:{tmp_path}")
    inputs = pixels_of(tmp_path)
    assert torch.equal(encoder.preprocess(picture()), inputs["pixel_values"][0])
    with torch.no_grad():
        output = model(**inputs)
        pooled = output.pooler_output.flatten(1)
        assert encoder.representation == "pooler"
        assert torch.equal(encoder(inputs["pixel_values"]), pooled)
        assert encoder.features == pooled.shape[1] and encoder.head is None
        tokens = output.last_hidden_state
        if "class" in encoder.choices:
            assert torch.equal(encoder.choose("class")(inputs["pixel_values"]), tokens[:, 0])
        if tokens.dim() == 4:
            want = tokens.mean((2, 3))
        else:
            want = tokens[:, {"vit": 1, "dinov2": 1, "dinov2_registers": 4, "dinov3": 5, "beit": 1}.get(which, 0) :].mean(1)
        torch.testing.assert_close(encoder.choose("mean")(inputs["pixel_values"]), want, rtol=1e-6, atol=1e-6)
    with torchprobe.record(encoder) as rec, torch.no_grad():
        encoder(inputs["pixel_values"])
    assert len(rec.layers) > 2 and all(layer == "" or layer.startswith("visual.") for layer in rec.layers)


@pytest.mark.parametrize("which", ["vit", "beit", "convnext", "swin", "dinov2", "resnet"])
def test_a_classifier_becomes_the_head_over_what_it_sees(tmp_path, which):
    names = {0: "tench", 1: "goldfish", 2: "shark"}
    model = models.image_model(tmp_path, which, "ForImageClassification", num_labels=3, id2label=names)
    inputs = pixels_of(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    if which == "dinov2":  # its classifier sees the class token and the mean together
        assert encoder.head is None
        return
    assert encoder.head.names == tuple(names.values())
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder(inputs["pixel_values"])), model(**inputs).logits)
    other = load_encoder(f"hf:{tmp_path}", pretrained=False)
    assert other.head is None and other.representation == encoder.representation
    again = load_encoder(f"hf:{tmp_path}", tmp_path / "model.safetensors")
    assert torch.equal(again.head.weight, encoder.head.weight) and again.head.names == encoder.head.names
    with torch.no_grad():
        torch.testing.assert_close(again(inputs["pixel_values"]), encoder(inputs["pixel_values"]))


def test_a_pooler_without_weights_is_not_used(tmp_path):
    models.image_model(tmp_path, "vit", "ForMaskedImageModeling")
    encoder = load_encoder(f"hf:{tmp_path}")
    assert encoder.representation == "class" and "pooler" not in encoder.choices
    with pytest.raises(EncoderError, match=r"no representation 'pooler'; it has class, mean"):
        load_encoder(f"hf:{tmp_path}", representation="pooler")


def test_weights_that_are_not_complete_are_refused(tmp_path):
    models.image_model(tmp_path, "dinov2")
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(key for key in weights if "layer.1" in key)
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(EncoderError, match="lack 1 keys of Dinov2Model.*would fill them in at random"):
        load_encoder(f"hf:{tmp_path}")
    with pytest.raises(EncoderError, match="1 missing"):
        load_encoder(f"hf:{tmp_path}", tmp_path / "model.safetensors")


# -- two towers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", models.TOWERS)
def test_both_towers_bit_for_bit(tmp_path, which):
    model = models.two_towers(tmp_path, which)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert isinstance(encoder, ClipEncoder) and encoder.representation == "projection"
    inputs = pixels_of(tmp_path)
    siglip = which.startswith("siglip")
    tokens = models.transformers.AutoTokenizer.from_pretrained(tmp_path)(
        TEXTS, padding="max_length" if siglip else True, max_length=16, truncation=True, return_tensors="pt"
    )
    arguments = {"input_ids": tokens["input_ids"]} | ({} if siglip else {"attention_mask": tokens["attention_mask"]})
    with torch.no_grad():
        h = encoder(encoder.preprocess(picture())[None])
        assert torch.equal(h, features(model.get_image_features(**inputs)))
        assert torch.equal(encoder.encode_text(TEXTS), features(model.get_text_features(**arguments)))
        vision = model.vision_model(**inputs)
        if "pooler" in encoder.choices:
            assert torch.equal(encoder.choose("pooler")(encoder.preprocess(picture())[None]), vision.pooler_output)
    texts = encoder.for_texts()
    assert isinstance(texts, TextEncoder) and all(name.startswith("text.") for name, _ in texts.named_parameters())
    torch.testing.assert_close(texts.encode_text(TEXTS), encoder.encode_text(TEXTS))
    assert encoder.choose("projection").zero_shot_head(["cat"], ["a photo of a {}"]).in_features == encoder.features
    if which == "clip":
        with pytest.raises(EncoderError, match="pooler .*has no zero-shot head"):
            encoder.choose("pooler").zero_shot_head(["cat"], ["a photo of a {}"])


@pytest.mark.parametrize("which", ["clip", "blip", "siglip"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.clip."])
def test_a_checkpoint_of_both_towers(tmp_path, which, prefix):
    models.two_towers(tmp_path, which)
    want = load_encoder(f"hf:{tmp_path}")
    weights = {prefix + key: value for key, value in load_file(tmp_path / "model.safetensors").items()}
    torch.save(weights, tmp_path / "mine.pt")
    (tmp_path / "model.safetensors").unlink()
    found = load_encoder(f"hf:{tmp_path}", tmp_path / "mine.pt")
    x = want.preprocess(picture())[None]
    with torch.no_grad():
        torch.testing.assert_close(found(x), want(x))
        torch.testing.assert_close(found.encode_text(TEXTS), want.encode_text(TEXTS))
    assert load_encoder(f"hf:{tmp_path}", pretrained=False).name.endswith("(random weights)")


def test_the_image_tower_of_a_model_for_captions(tmp_path):
    from transformers import BlipConfig, BlipForConditionalGeneration

    _, kind, vision, text, own = models.TOWERS["blip"]
    torch.manual_seed(0)
    model = models.saved(BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text, **own)), tmp_path)
    models.processor(tmp_path, kind, 32)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert type(encoder) is Encoder and encoder.representation == "pooler"
    inputs = pixels_of(tmp_path)
    with torch.no_grad():
        assert torch.equal(encoder(inputs["pixel_values"]), model.vision_model(**inputs).pooler_output)


def test_a_tower_moves_copies_and_takes_half(tmp_path):
    import copy

    models.two_towers(tmp_path, "clip")
    encoder = load_encoder(f"hf:{tmp_path}")
    x = encoder.preprocess(picture())[None]
    twin = copy.deepcopy(encoder).double()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
        assert twin(x.double()).dtype == torch.float64 and twin.encode_text(TEXTS).shape == (3, 24)
        assert encoder(x).dtype == torch.float32
        torch.testing.assert_close(copy.deepcopy(encoder)(x), encoder(x))


# -- texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "way"),
    [
        ("GPT2LMHeadModel", "last"),
        ("BertModel", "mean"),
        ("BertForMaskedLM", "mean"),
        ("RobertaModel", "mean"),
        ("T5ForConditionalGeneration", "mean"),
    ],
)
def test_padding_has_no_effect(tmp_path, which, way):
    model = models.language_model(tmp_path, which)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert isinstance(encoder, TextEncoder) and encoder.representation == way
    together = encoder.encode_text(TEXTS)
    network = model.get_encoder() if which.startswith("T5") else getattr(model, model.base_model_prefix, model)
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, h in zip(TEXTS, together, strict=True):
        with torch.no_grad():
            tokens = tokenizer(text, return_tensors="pt")
            alone = network(input_ids=tokens["input_ids"]).last_hidden_state[0]
        torch.testing.assert_close(h, alone[-1] if way == "last" else alone.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(encoder.choose("class").encode_text([text])[0], alone[0], rtol=1e-5, atol=1e-6)
        encoder.choose(way)
    if which == "BertForMaskedLM":
        assert "pooler" not in encoder.choices


def test_a_long_text_is_cut_and_dicts_go_in(tmp_path):
    models.language_model(tmp_path, "RobertaModel")
    encoder = load_encoder(f"hf:{tmp_path}")
    assert encoder.encode_text(["cat " * 50]).isfinite().all()
    tokens = encoder.tokenizer(TEXTS)
    with torch.no_grad():
        torch.testing.assert_close(encoder(tokens), encoder.encode_text(TEXTS))
        assert torch.equal(encoder(torch.stack([tokens["input_ids"], tokens["attention_mask"]], 1)), encoder(tokens))
    with pytest.raises(TypeError, match="encodes texts, got Image"):
        encoder.preprocess(picture())


def test_the_head_of_a_language_model_is_not_part_of_the_encoder(tmp_path):
    """docs/quantization.md says so: no command ranks it."""
    saved = models.language_model(tmp_path, "GPT2LMHeadModel")
    assert any(name == "lm_head" for name, _ in saved.named_modules())
    assert not any("lm_head" in name for name, _ in load_encoder(f"hf:{tmp_path}").named_modules())


@pytest.mark.parametrize("which", ["GPT2LMHeadModel", "BertForMaskedLM", "BertModel"])
def test_a_checkpoint_of_a_language_model(tmp_path, which):
    models.language_model(tmp_path, which)
    want = load_encoder(f"hf:{tmp_path}")
    weights = load_file(tmp_path / "model.safetensors")
    torch.save({"epoch": 1, "state_dict": weights | {"x.position_ids": torch.arange(3)}}, tmp_path / "w.pt")
    found = load_encoder(f"hf:{tmp_path}", tmp_path / "w.pt")
    assert found.choices == want.choices
    torch.testing.assert_close(found.encode_text(TEXTS), want.encode_text(TEXTS))


@pytest.mark.parametrize("which", ["dinov2", "vit", "swin"])
def test_a_checkpoint_of_another_task(tmp_path, which):
    """The file of a classifier into the encoder alone: its layer is left out, since the pooler's output is not what it sees."""
    models.image_model(tmp_path / "classifier", which, "ForImageClassification", num_labels=3)
    models.image_model(tmp_path / "bare", which)
    file = tmp_path / "classifier" / "model.safetensors"
    found = load_encoder(f"hf:{tmp_path / 'bare'}", file)
    want = load_encoder(f"hf:{tmp_path / 'classifier'}").choose("mean")
    x = want.preprocess(picture())[None]
    with torch.no_grad():
        torch.testing.assert_close(found.choose("mean")(x), want(x))
    assert found.head is None


@pytest.mark.parametrize("kind", ["text", "image", "towers"])
def test_a_checkpoint_with_more_layers_is_refused(tmp_path, kind):
    if kind == "text":
        models.language_model(tmp_path, "GPT2LMHeadModel")
    elif kind == "image":
        models.image_model(tmp_path, "dinov2")
    else:
        models.two_towers(tmp_path, "clip")
    weights = load_file(tmp_path / "model.safetensors")
    part = {"text": ".h.1.", "image": "layer.1.", "towers": "vision_model.encoder.layers.1."}[kind]
    more = {key.replace(part, part.replace("1", "2")): value.clone() for key, value in weights.items() if part in key}
    save_file(weights | more, tmp_path / "w.safetensors")
    with pytest.raises(EncoderError, match="unexpected"):
        load_encoder(f"hf:{tmp_path}", tmp_path / "w.safetensors")


# -- names ---------------------------------------------------------------------------------------------------------------


def test_folders_that_do_not_hold_a_model(tmp_path):
    with pytest.raises(EncoderError, match="no folder at /no/such/folder"):
        load_encoder("hf:/no/such/folder")
    with pytest.raises(EncoderError, match="could not be built"):
        load_encoder(f"hf:{tmp_path}")
    models.image_model(tmp_path, "vit")
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(EncoderError, match=r"its image processor\) could not be built"):
        load_encoder(f"hf:{tmp_path}")


def test_a_name_that_cannot_be_fetched(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(models.transformers.AutoConfig, "from_pretrained", offline)
    with pytest.raises(EncoderError, match=r"could not be fetched.*Name or service not known.*hf:FOLDER"):
        load_encoder("hf:nobody/such-a-model")


# -- any module ----------------------------------------------------------------------------------------------------------


def test_outputs_of_any_module_are_unwrapped():
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = ViTModel(ViTConfig(**models.VIT)).eval()
    with torch.no_grad():
        output = model(x)
        encoder = Encoder(model, features=32, preprocess=lambda image: image)
        assert torch.equal(encoder(x), output.pooler_output)
        bare = ViTModel(ViTConfig(**models.VIT), add_pooling_layer=False).eval()
        with pytest.raises(EncoderError, match=r"last_hidden_state \(2, 17, 32\).*choose one of class, mean, last"):
            Encoder(bare, features=32, preprocess=lambda image: image)(x)
        mean = Encoder(bare, features=32, preprocess=lambda image: image, representation="mean", special_tokens=1)
        torch.testing.assert_close(mean(x), bare(x).last_hidden_state[:, 1:].mean(1))


@pytest.mark.parametrize(
    "wrap", [lambda h: h, lambda h: (h, h.sum()), lambda h: [h], lambda h: {"h": h}, lambda h: {"image_embeds": h, "x": h[0]}]
)
def test_tuples_and_dicts_are_unwrapped(wrap):
    class Wrapped(torch.nn.Module):
        def forward(self, x):
            return wrap(x.flatten(1))

    encoder = Encoder(Wrapped(), features=12, preprocess=lambda image: image)
    assert encoder(torch.ones(2, 3, 2, 2)).shape == (2, 12)


def test_an_output_with_several_tensors_is_refused():
    class Wrapped(torch.nn.Module):
        def forward(self, x):
            return {"a": x.flatten(1), "b": x.flatten(1)}

    with pytest.raises(EncoderError, match=r"a \(2, 12\), b \(2, 12\)"):
        Encoder(Wrapped(), features=12, preprocess=lambda image: image)(torch.ones(2, 3, 2, 2))
