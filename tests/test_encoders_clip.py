"""CLIP: both towers, captions, and the head they make; against float64 and open_clip's own. Small models of open_clip, random weights."""

import copy
import json

import pytest
import torch

import torchprobe
from torchprobe.encoders import ClipEncoder, EncoderError, load_encoder, load_head

open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
NAMES = ["tench", "goldfish", "great white shark", "tiger shark", "hammerhead shark", "electric ray", "stingray"]
TEMPLATES = ["a photo of a {}.", lambda name: f"a {name} in the {{wild}}", "{}", "art of the {}, a {}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Configurations of our own, known to open_clip; as in its folders, one file per model."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "tiny-digits.json").write_text(json.dumps(TINY))
    (folder / "tiny-custom.json").write_text(json.dumps(TINY | {"custom_text": True}))
    (folder / "tiny-digits-quickgelu.json").write_text(json.dumps(TINY | {"quick_gelu": True}))
    (folder / "tiny-words.json").write_text(json.dumps(TINY | {"text_cfg": TINY["text_cfg"] | {"vocab_size": 64}}))
    resnet = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 16}
    (folder / "tiny-resnet.json").write_text(json.dumps(TINY | {"vision_cfg": resnet}))
    open_clip.add_model_config(folder)
    return folder


@pytest.fixture
def clip(folder):
    torch.manual_seed(0)
    return open_clip.create_model("tiny-digits", pretrained=None).eval()


@pytest.fixture
def encoder(clip, tmp_path):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    return load_encoder("open_clip:tiny-digits", tmp_path / "clip.pt")


def captions(name):
    return [template.replace("{}", name) if isinstance(template, str) else template(name) for template in TEMPLATES]


def double_head(clip, names):
    """Radford et al. 2021, 3.1.4, one class at a time, in float64."""
    clip, tokenizer = copy.deepcopy(clip).double(), open_clip.get_tokenizer("tiny-digits")
    rows = []
    with torch.no_grad():
        for name in names:
            each = clip.encode_text(tokenizer(captions(name)))
            mean = (each / each.norm(dim=-1, keepdim=True)).mean(0)
            rows.append(mean / mean.norm())
    return torch.stack(rows)


# -- captions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 256])
def test_text_is_embedded_before_normalization(clip, encoder, batch_size):
    texts = [caption for name in NAMES for caption in captions(name)]
    tokens = open_clip.get_tokenizer("tiny-digits")(texts)
    assert tokens.shape == (28, 16)
    found = encoder.encode_text(texts, batch_size=batch_size)
    with torch.no_grad():
        want = copy.deepcopy(clip).double().encode_text(tokens)
    assert found.dtype == torch.float32 and found.shape == (28, 24) and not found.requires_grad
    assert torch.allclose(found.double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_no_texts_and_bad_arguments(encoder):
    assert encoder.encode_text([]).shape == (0, 24)
    with pytest.raises(ValueError, match=r"got one string: \['a cat'\]"):
        encoder.encode_text("a cat")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        encoder.encode_text(["a cat"], batch_size=0)


def test_long_captions_are_cut_to_the_context(encoder):
    assert encoder.encode_text(["very " * 100 + "long"]).isfinite().all()


def test_text_follows_the_encoders_precision(encoder):
    assert encoder.to(torch.bfloat16).encode_text(["a cat"]).dtype == torch.float32
    assert {parameter.dtype for parameter in encoder.text.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in encoder.to("meta").text.parameters()} == {"meta"}


def test_the_text_tower_is_no_layer(encoder, clip):
    assert set(encoder.state_dict()) == {key for key in clip.state_dict() if key.startswith("visual.")}
    assert all(name.startswith("visual") for name, _ in encoder.named_modules() if name)
    with torchprobe.record(encoder, ["*", "*.*", "*.transformer.*.*"]) as rec:
        encoder(torch.randn(2, 3, 32, 32))
        encoder.encode_text(["a cat"])
    assert all(layer.startswith("visual") for layer in rec.layers if layer)


def test_a_model_at_hand_can_be_wrapped(clip):
    encoder = ClipEncoder(clip, open_clip.get_tokenizer("tiny-digits"), features=24, preprocess=lambda x: x)
    assert "visual" in dict(clip.named_children()) and encoder.visual is clip.visual
    with torch.no_grad():
        clip.text_projection.mul_(2)  # shared, not copied
        want = clip.encode_text(open_clip.get_tokenizer("tiny-digits")(["a cat"]))
    torch.testing.assert_close(encoder.encode_text(["a cat"]), want)


# -- the zero-shot head ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 8, 1000])
def test_the_head_equals_float64(clip, encoder, batch_size):
    steps = []
    head = encoder.zero_shot_head(NAMES, TEMPLATES, batch_size=batch_size, progress=lambda *step: steps.append(step))
    want = double_head(clip, NAMES)
    assert torch.allclose(head.weight.double(), want, rtol=0, atol=1e-6)
    assert head.normalize and head.bias is None and head.names == tuple(NAMES)
    assert torch.allclose(head.weight.norm(dim=1), torch.ones(7))
    assert steps[-1] == (7, 7) and len(steps) == -(-7 // max(1, batch_size // 4))


def test_the_head_equals_open_clips(clip, encoder):
    templates = [t for t in TEMPLATES if isinstance(t, str) and t.count("{}") == 1]
    theirs = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer("tiny-digits"), NAMES, templates)
    assert torch.allclose(encoder.zero_shot_head(NAMES, templates).weight, theirs.T, atol=1e-6)


def test_the_defaults_are_open_clips(monkeypatch, clip, encoder):
    names, templates = open_clip.IMAGENET_CLASSNAMES, open_clip.OPENAI_IMAGENET_TEMPLATES
    assert (len(names), len(templates)) == (1000, 80)
    theirs = open_clip.build_zero_shot_classifier(clip, open_clip.get_tokenizer("tiny-digits"), names[:3], templates)
    assert torch.allclose(encoder.zero_shot_head(names[:3]).weight, theirs.T, atol=1e-6)
    head = encoder.zero_shot_head(templates=["{}"])
    assert head.names == tuple(names)


def test_the_head_can_be_trained_and_saved(encoder, tmp_path):
    head = encoder.zero_shot_head(NAMES, TEMPLATES)
    head(torch.randn(2, 24)).sum().backward()
    assert head.weight.grad is not None
    head.save(tmp_path / "head.safetensors")
    back = load_head(tmp_path / "head.safetensors", encoder.features)
    assert torch.equal(back.weight, head.weight) and back.normalize and back.names == tuple(NAMES)


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "classnames: expected a list with at least one entry"),
        ("tench", ["{}"], "classnames: expected a list"),
        (["tench"], [], "templates: expected a list with at least one entry"),
        (["tench"], "a {}", "templates: expected a list"),
        (["tench"], ["a photo"], "in the place of the class name, got 'a photo'"),
    ],
)
def test_what_makes_no_head(encoder, names, templates, message):
    with pytest.raises(ValueError, match=message):
        encoder.zero_shot_head(names, templates)


def test_weights_that_give_no_numbers_are_named(encoder):
    with torch.no_grad():
        encoder.text.text_projection[0] = torch.nan
    with pytest.raises(EncoderError, match="not finite for 1 classes: tench"):
        encoder.zero_shot_head(["tench"], ["{}"])


# -- local weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "image_encoder.model."])
@pytest.mark.parametrize("model", ["tiny-digits", "tiny-custom", "tiny-resnet"])
def test_a_whole_model_fills_both_towers(folder, tmp_path, prefix, model):
    clip = open_clip.create_model(model, pretrained=None).eval()
    torch.save({"state_dict": {prefix + key: value for key, value in clip.state_dict().items()}}, tmp_path / "clip.pt")
    encoder = load_encoder(f"open_clip:{model}", tmp_path / "clip.pt")
    size = clip.visual.image_size
    x, tokens = torch.randn(2, 3, *(size if isinstance(size, tuple) else (size, size))), open_clip.get_tokenizer(model)(NAMES)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), clip.encode_image(x))
        torch.testing.assert_close(encoder.encode_text(NAMES), clip.encode_text(tokens))
    assert encoder.text.logit_scale == clip.logit_scale and encoder.head is None


def test_a_custom_text_tower_takes_the_old_names(clip, tmp_path):
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    encoder = load_encoder("open_clip:tiny-custom", tmp_path / "clip.pt")
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_text(NAMES), clip.encode_text(open_clip.get_tokenizer("tiny-digits")(NAMES)))


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (lambda key: key.startswith("visual."), r"lacks it: use a checkpoint of the whole CLIP model.*load_head"),
        (lambda key: not key.startswith("transformer."), r"lacks 24 of its 29 keys \(transformer\.resblocks\.0"),
    ],
)
def test_an_image_tower_alone_says_what_is_missing(clip, tmp_path, keep, reason):
    torch.save({key: value for key, value in clip.state_dict().items() if keep(key)}, tmp_path / "visual.pt")
    encoder = load_encoder("open_clip:tiny-digits", tmp_path / "visual.pt")
    with torch.no_grad():
        torch.testing.assert_close(encoder(torch.ones(1, 3, 32, 32)), clip.encode_image(torch.ones(1, 3, 32, 32)))
    assert encoder.text is None and encoder.half().text is None
    for call in (lambda: encoder.encode_text(["a cat"]), lambda: encoder.zero_shot_head(["cat"], ["{}"])):
        with pytest.raises(EncoderError, match=r"tiny-digits \(visual\.pt\) has no text tower, because .*visual\.pt " + reason):
            call()


def test_the_visual_tower_bare(clip, tmp_path):
    torch.save(clip.visual.state_dict(), tmp_path / "bare.pt")
    encoder = load_encoder("open_clip:tiny-digits", tmp_path / "bare.pt")
    assert encoder.text is None and encoder.head is None


@pytest.mark.parametrize("prefix", ["", "module.", "image_encoder.model."])
@pytest.mark.parametrize("whole", [False, True])
def test_a_fine_tuned_file_brings_its_head(clip, tmp_path, whole, prefix):
    state = {prefix + key: value for key, value in clip.state_dict().items() if whole or key.startswith("visual.")}
    torch.save(state | {"classification_head.weight": torch.ones(5, 24), "classification_head.bias": torch.zeros(5)}, tmp_path / "w.pt")
    encoder = load_encoder("open_clip:tiny-digits", tmp_path / "w.pt")
    assert encoder.head.out_features == 5 and encoder.head.normalize
    assert (encoder.text is not None) is whole


def test_a_bare_tower_with_a_head(clip, tmp_path):
    torch.save(clip.visual.state_dict() | {"head.weight": torch.ones(5, 24)}, tmp_path / "w.pt")
    assert load_encoder("open_clip:tiny-digits", tmp_path / "w.pt").head.out_features == 5


def test_openais_files_want_quick_gelu(folder, clip, tmp_path):
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(16), "vocab_size": torch.tensor(49408)}
    torch.save(clip.state_dict() | numbers, tmp_path / "openai.pt")
    with pytest.raises(EncoderError, match=r"openai\.pt is in OpenAI's format.*open_clip:tiny-digits has GELU: .*-quickgelu"):
        load_encoder("open_clip:tiny-digits", tmp_path / "openai.pt")
    encoder = load_encoder("open_clip:tiny-digits-quickgelu", tmp_path / "openai.pt")
    assert encoder.encode_text(["a cat"]).isfinite().all()


def test_tokens_beyond_the_vocabulary(folder):
    encoder = load_encoder("open_clip:tiny-words", pretrained=False)
    with pytest.raises(EncoderError, match=r"tokens up to 49407, its text tower has 64: set vocab_size"):
        encoder.encode_text(["a cat"])


def test_a_model_in_a_folder_of_its_own(clip, tmp_path):
    settings = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": settings}))
    source = f"open_clip:local-dir:{tmp_path}"
    with pytest.raises(EncoderError, match="could not be built: RuntimeError: Required pretrained weights"):
        load_encoder(source)
    torch.save(clip.state_dict(), tmp_path / "open_clip_model.pth")
    for encoder in (load_encoder(source), load_encoder(source, tmp_path / "open_clip_model.pth")):
        assert tuple(encoder.preprocess.transforms[-1].mean) == (0.5, 0.5, 0.5)
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode_text(NAMES), clip.encode_text(open_clip.get_tokenizer("tiny-digits")(NAMES)))
    with pytest.raises(EncoderError, match="could not be built: FileNotFoundError"):
        load_encoder(f"open_clip:local-dir:{tmp_path / 'none'}")


def test_a_tokenizer_that_cannot_be_fetched(monkeypatch, encoder):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(EncoderError, match="tiny-digits .its tokenizer.* could not be fetched"):
        encoder.encode_text(["a cat"])


# -- the real architectures --------------------------------------------------------------------------------------------


@pytest.mark.slow("builds four CLIP models of full size")
@pytest.mark.parametrize("name", ["RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14"])
def test_published_architectures_from_a_local_file(tmp_path, name):
    torch.manual_seed(0)
    clip = open_clip.create_model(name, pretrained=None).eval()
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    encoder = load_encoder(f"open_clip:{name}", tmp_path / "clip.pt")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        want = clip.encode_image(x), clip.encode_text(open_clip.get_tokenizer(name)(NAMES[:1]))
        found = encoder(x), encoder.encode_text(NAMES[:1])
    torch.testing.assert_close(found, want)
    assert found[0].shape == (1, encoder.features)
