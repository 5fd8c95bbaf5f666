"""Families of transformers that are laid out unlike CLIP, ViT and BERT: each gives what transformers computes, or says why it cannot."""

from __future__ import annotations

import hugging_face_models as models
import pytest
import torch

from torchprobe.analysis import provenance
from torchprobe.datasets.texts import Texts
from torchprobe.encoders import EncoderError, load_encoder

TEXTS = ["a photo of a cat", "dogs", "the red car and the blue car"]


def save(folder, which, config, processor="ViTImageProcessor", size=32, shake=0.05, **settings):
    torch.manual_seed(0)
    transformers = models.transformers
    model = getattr(transformers, which)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += shake * torch.randn_like(parameter)  # a bias of 0 hides what is added twice
    model = models.saved(model, folder)
    models.processor(folder, processor, size) if processor else models.tokenizer(folder)
    return model


def pictures(encoder, count=3):
    from PIL import Image

    noise = torch.randint(0, 256, (count, 70, 90, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return torch.stack([encoder.preprocess(Image.fromarray(one.numpy())) for one in noise])


def test_a_masked_autoencoder_sees_every_patch(tmp_path):
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
    model = save(tmp_path, "ViTMAEForPreTraining", "ViTMAEConfig", **models.VIT, **decoder)
    encoder = load_encoder(f"hf:{tmp_path}")
    x = pictures(encoder)
    model.vit.config.mask_ratio = 0.0
    with torch.no_grad():
        want = model.vit(x, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
        assert encoder.special_tokens == 1 and torch.equal(encoder(x), want[:, 0]) and torch.equal(encoder(x), encoder(x))
        torch.testing.assert_close(encoder.choose("mean")(x), want[:, 1:].mean(1))


def test_an_output_that_is_random_in_eval_mode_is_refused(tmp_path, monkeypatch):
    from transformers import ViTModel

    save(tmp_path, "ViTModel", "ViTConfig", **models.VIT)
    forward = ViTModel.forward

    def noisy(self, pixel_values, **options):
        output = forward(self, pixel_values, **options)
        output["last_hidden_state"] = output.last_hidden_state + torch.rand(1)
        return output

    monkeypatch.setattr(ViTModel, "forward", noisy)
    with pytest.raises(EncoderError, match="another output each time for the same picture"):
        load_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("which", ["PvtForImageClassification", "CLIPForImageClassification", "SiglipForImageClassification"])
def test_classifiers_whose_class_token_or_name_is_elsewhere(tmp_path, which):
    towers = {"vision_config": models.VIT, "text_config": models.TEXT | {"projection_size": 32}}
    stages = {"image_size": 64, "hidden_sizes": [8, 16, 16, 24], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 2]}
    kind, settings = ("PvtConfig", stages) if which.startswith("Pvt") else (which.replace("ForImageClassification", "Config"), towers)
    model = save(tmp_path, which, kind, size=64 if which.startswith("Pvt") else 32, num_labels=5, **settings)
    encoder = load_encoder(f"hf:{tmp_path}")
    x = pictures(encoder)
    assert encoder.representation == ("class" if which.startswith("Pvt") else "mean")
    assert encoder.special_tokens == (0 if which.startswith("Siglip") else 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder(x)), model(x).logits)
    again = load_encoder(f"hf:{tmp_path}", tmp_path / "model.safetensors")
    assert torch.equal(again.head.weight, encoder.head.weight)


def test_flava_projects_every_position_and_the_class_token_counts(tmp_path):
    image = {"image_config": models.VIT, "text_config": models.TEXT, "multimodal_config": models.TINY, "image_codebook_config": {}}
    model = save(tmp_path, "FlavaModel", "FlavaConfig", **image, projection_dim=24, hidden_size=32)
    models.tokenizer(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    x = pictures(encoder)
    tokens = models.transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    arguments = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(encoder(x), model.get_image_features(x).pooler_output[:, 0])
        assert torch.equal(encoder.encode_text(TEXTS), model.get_text_features(**arguments).pooler_output[:, 0])
        assert encoder.special_tokens == 1 and "class" in encoder.choices


def test_the_vision_model_of_siglip_2_alone(tmp_path):
    model = save(
        tmp_path, "Siglip2VisionModel", "Siglip2VisionConfig", "Siglip2ImageProcessor", **models.TINY, patch_size=8, num_patches=16
    )
    encoder = load_encoder(f"hf:{tmp_path}")
    inputs = models.transformers.AutoImageProcessor.from_pretrained(tmp_path)
    from PIL import Image

    picture = Image.new("RGB", (90, 40), (200, 30, 10))
    with torch.no_grad():
        found, want = encoder(encoder.preprocess(picture)[None]), model(**inputs(images=picture, return_tensors="pt")).pooler_output
    assert torch.equal(found, want) and list(encoder.choices) == ["pooler"]


def test_blip_2_has_no_vector_of_texts_so_its_images_have_no_projection(tmp_path):
    opt = {"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 40}
    asks = models.TINY | {"encoder_hidden_size": 32, "vocab_size": 40}
    parts = {"vision_config": models.VIT, "qformer_config": asks, "text_config": opt | {"word_embed_proj_dim": 32}}
    save(tmp_path, "Blip2Model", "Blip2Config", **parts, num_query_tokens=4)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert encoder.representation == "pooler" and "projection" not in encoder.choices
    with pytest.raises(EncoderError, match="has no text tower"):
        encoder.for_texts()


def test_a_pooled_map_is_not_a_vector(tmp_path):
    save(tmp_path, "TextNetModel", "TextNetConfig", size=64)
    encoder = load_encoder(f"hf:{tmp_path}")
    assert list(encoder.choices) == ["mean"] and encoder(pictures(encoder)).shape == (3, encoder.features)


@pytest.mark.parametrize(
    ("which", "config", "processor", "more", "message"),
    [
        ("VideoMAEModel", "VideoMAEConfig", "VideoMAEImageProcessor", {"num_frames": 4}, "as of a video .1, 3, .*no encoder of images"),
        ("TimesformerModel", "TimesformerConfig", "VideoMAEImageProcessor", {"num_frames": 4}, "no encoder of images"),
        ("YolosModel", "YolosConfig", "ViTImageProcessor", {"image_size": [32, 32], "num_detection_tokens": 5}, "is a detector"),
        (
            "EfficientNetModel",
            "EfficientNetConfig",
            "ViTImageProcessor",
            {"hidden_dim": 64},
            "cannot be run on one input alone: RuntimeError",
        ),
    ],
)
def test_what_is_no_encoder_of_images_is_refused_with_a_reason(tmp_path, which, config, processor, more, message):
    settings = ({"width_coefficient": 0.25, "depth_coefficient": 0.2} if "hidden_dim" in more else models.VIT) | more
    save(tmp_path, which, config, processor, **settings)
    with pytest.raises(EncoderError, match=message):
        load_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("which", "config", "more"),
    [
        ("T5EncoderModel", "T5Config", {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}),
        ("XLNetModel", "XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 48}),
        ("DPRQuestionEncoder", "DPRConfig", models.TEXT | {"projection_dim": 0}),
    ],
)
def test_encoders_of_texts_alone_without_a_limit_or_without_positions(tmp_path, which, config, more):
    model = save(tmp_path, which, config, None, **{"vocab_size": 40} | more)
    encoder = load_encoder(f"hf:{tmp_path}")
    tokens = models.transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    arguments = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**arguments)
    counted = arguments["attention_mask"][..., None]
    want = output.pooler_output if which.startswith("DPR") else (output.last_hidden_state * counted).sum(1) / counted.sum(1)
    torch.testing.assert_close(encoder.encode_text(TEXTS), want)


@pytest.mark.parametrize("length", [None, 5])
def test_a_tokenizer_without_a_limit(tmp_path, length):
    """As that of BLOOM is saved: transformers writes 1e30, which the tokenizer itself refuses. Texts are cut only where one is set."""
    model = save(tmp_path, "BloomModel", "BloomConfig", None, hidden_size=32, n_layer=2, n_head=2, vocab_size=40)
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_max_length = length or int(1e30)
    tokenizer.save_pretrained(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    with torch.no_grad():
        want = [model(**tokenizer([text], truncation=bool(length), return_tensors="pt")).last_hidden_state[0, -1] for text in TEXTS]
    torch.testing.assert_close(encoder.encode_text(TEXTS), torch.stack(want), rtol=1e-4, atol=1e-5)


def test_a_text_network_that_takes_no_mask_is_refused(tmp_path):
    settings = {key: value for key, value in models.TEXT.items() if key != "num_attention_heads"}
    save(tmp_path, "FNetModel", "FNetConfig", None, **settings)
    with pytest.raises(EncoderError, match="depends on its padding, so on the other texts of its batch"):
        load_encoder(f"hf:{tmp_path}")


def test_a_text_alone_has_the_vector_that_it_has_among_longer_ones(tmp_path):
    """The text tower of AIMv2 is causal only if something is padded, unless its attention takes every mask."""
    save(tmp_path, "Aimv2Model", "Aimv2Config", vision_config=models.VIT, text_config=models.TEXT, projection_dim=24)
    models.tokenizer(tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    alone = torch.cat([encoder.encode_text([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.encode_text(TEXTS), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "EuroBert"])
def test_provenance_follows_an_rms_norm_that_a_library_wrote_itself(tmp_path, name):
    """It computes in float32, in a copy in float64 too. The part of the last MLP is that of the formula."""
    settings = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 48}
    model = save(tmp_path, f"{name}Model", f"{name}Config", None, **settings, vocab_size=40, pad_token_id=1)
    encoder = load_encoder(f"hf:{tmp_path}").choose("last")
    found = provenance(encoder, Texts.of(TEXTS), [3])
    kept = {}
    model.layers[1].mlp.register_forward_hook(lambda module, arguments, output: kept.update(mlp=output))
    model.norm.register_forward_pre_hook(lambda module, arguments: kept.update(stream=arguments[0]))
    tokenizer = models.transformers.AutoTokenizer.from_pretrained(tmp_path)
    wants, sizes = [], []
    for text in TEXTS:
        with torch.no_grad():
            h = model(tokenizer([text], return_tensors="pt")["input_ids"]).last_hidden_state[0, -1].double()
        stream, mlp = (kept[key].detach()[0, -1].double() for key in ("stream", "mlp"))
        scale = (stream.square().mean() + model.norm.variance_epsilon).sqrt()
        wants.append(float(h[3].sign() * model.norm.weight.detach()[3] * mlp[3] / scale))
        sizes.append(float(h[3].abs()))
    one = next(row for row in found.parts if row["block"].endswith("layers.1") and row["part"] == "mlp")
    assert one["contribution"] == pytest.approx(sum(wants) / 3, abs=1e-5)
    assert sum(row["contribution"] for row in found.parts) == pytest.approx(sum(sizes) / 3, abs=1e-5)
