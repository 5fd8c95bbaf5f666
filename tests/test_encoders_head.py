"""The classification layer that an encoder loses becomes its head. Weights are random, stored where the libraries look for them."""

import copy

import pytest
import torch
from torch import nn

import torchprobe
from torchprobe.encoders import Encoder, EncoderError, Head, load_encoder


@pytest.fixture
def resnet(tmp_path, monkeypatch):
    """A random torchvision ResNet-18 that takes the place of the trained one in the cache."""
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = models.resnet18().eval()
    url = models.ResNet18_Weights.IMAGENET1K_V1.url
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(model.state_dict(), cache / url.rpartition("/")[2])
    return model


@pytest.fixture
def trained_timm(monkeypatch):
    """timm, with random weights where it would fetch trained ones."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    create = timm.create_model

    def offline(name, pretrained=False, **options):
        torch.manual_seed(0)
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    return timm


def encoder_with_head(**options):
    return Encoder(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), features=5, preprocess=lambda x: x, head=Head(torch.eye(3, 5)), **options)


# -- kept, but no layer ------------------------------------------------------------------------------------------------


def test_the_head_is_no_layer():
    encoder = encoder_with_head()
    bare = {"visual.1.weight", "visual.1.bias"}
    assert set(encoder.state_dict()) == bare == {name for name, _ in encoder.named_parameters()}
    assert not any("head" in name for name, _ in encoder.named_modules())
    with torchprobe.record(encoder, "**") as rec:
        encoder(torch.randn(4, 3, 2, 2))
    assert not any("head" in layer for layer in rec.layers)


def test_the_head_moves_with_the_encoder():
    encoder = encoder_with_head()
    assert encoder.double() is encoder
    assert encoder.head.weight.dtype == encoder.visual[1].weight.dtype == torch.float64
    assert encoder.to("meta").head.weight.device.type == "meta"


def test_a_copy_has_its_own_head():
    encoder = encoder_with_head()
    twin = copy.deepcopy(encoder)
    with torch.no_grad():
        twin.head.weight.zero_()
    assert encoder.head.weight.sum() == 3


def test_another_head_can_be_put_on():
    encoder = encoder_with_head()
    encoder.head = Head(torch.ones(2, 5))
    assert encoder.head.out_features == 2 and "head" not in dict(encoder.named_children())
    encoder.head = None
    assert encoder.head is None and encoder.half().head is None


def test_a_head_of_another_width():
    with pytest.raises(ValueError, match="the head of maps takes 4 features, its representation has 5"):
        Encoder(nn.Flatten(), features=5, preprocess=lambda x: x, name="maps", head=Head(torch.eye(4)))


@pytest.mark.parametrize("call", [lambda e: e.encode_text(["a cat"]), lambda e: e.zero_shot_head(["cat"], ["a {}"])])
def test_no_text_without_a_text_tower(call):
    with pytest.raises(EncoderError, match="toy has no text tower"):
        call(encoder_with_head(name="toy"))


# -- the three sources -------------------------------------------------------------------------------------------------


def test_torchvision_keeps_the_trained_layer_and_its_names(resnet):
    encoder = load_encoder("torchvision:resnet18/IMAGENET1K_V1")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder(x)), resnet(x))
    assert not encoder.head.normalize
    assert len(encoder.head.names) == 1000 and encoder.head.names[:2] == ("tench", "goldfish")
    with pytest.raises(EncoderError, match=r"encoder\.head.*load_head"):
        encoder.zero_shot_head()


@pytest.mark.parametrize("source", ["torchvision:resnet18", "timm:resnet18"])
def test_random_weights_have_no_trained_layer(source):
    pytest.importorskip(source.partition(":")[0], reason=f"{source} needs a package that is not installed")
    assert load_encoder(source, pretrained=False).head is None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_timm_keeps_the_trained_layer_and_its_names(trained_timm, name):
    model = trained_timm.create_model(name).eval()
    encoder = load_encoder(f"timm:{name}")
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder(x)), model(x))
    assert len(encoder.head.names) == 1000 and encoder.head.names[0].startswith("tench")


def test_two_layers_are_not_one(trained_timm):
    assert load_encoder("timm:deit_tiny_distilled_patch16_224").head is None  # averages two heads
    assert load_encoder("timm:test_vit2.r160_in1k").head is not None


# -- local weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
def test_the_head_of_a_checkpoint(tmp_path, prefix):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    source = models.resnet18(num_classes=7).eval()
    torch.save({"state_dict": {prefix + key: value for key, value in source.state_dict().items()}}, tmp_path / "w.pth")
    encoder = load_encoder("torchvision:resnet18", tmp_path / "w.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder(x)), source(x))
    assert encoder.head.names is None  # seven classes of what, the file does not say


def test_the_head_of_a_timm_checkpoint(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    source = timm.create_model("vit_tiny_patch16_224", num_classes=7).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder("timm:vit_tiny_patch16_224", tmp_path / "w.pth")
    assert torch.equal(encoder.head.weight, source.head.weight) and torch.equal(encoder.head.bias, source.head.bias)


def test_a_checkpoint_without_a_head_or_with_another(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    backbone = {key: value for key, value in models.resnet18().state_dict().items() if not key.startswith("fc.")}
    torch.save(backbone, tmp_path / "bare.pth")
    assert load_encoder("torchvision:resnet18", tmp_path / "bare.pth").head is None
    inner = {f"encoder.{key}": value for key, value in backbone.items()}
    torch.save(inner | {"head.weight": torch.ones(3, 512), "head.bias": torch.zeros(3)}, tmp_path / "outside.pth")
    assert load_encoder("torchvision:resnet18", tmp_path / "outside.pth").head.out_features == 3
    torch.save(inner | {"head.weight": torch.ones(3, 99)}, tmp_path / "narrow.pth")
    assert load_encoder("torchvision:resnet18", tmp_path / "narrow.pth").head is None
    projection = {"head.0.weight": torch.ones(512, 512), "head.2.weight": torch.ones(128, 512)}
    torch.save(inner | projection, tmp_path / "projection.pth")  # two layers are a projection, not a head
    assert load_encoder("torchvision:resnet18", tmp_path / "projection.pth").head is None


def test_a_checkpoint_of_the_known_classes_keeps_their_names(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    source = timm.create_model("vit_tiny_patch16_224").eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder("timm:vit_tiny_patch16_224", tmp_path / "w.pth")
    assert len(encoder.head.names) == 1000 and encoder.head.names[1].startswith("goldfish")


@pytest.mark.parametrize(
    ("name", "features"), [("resnet50_clip.openai", 1024), ("vit_base_patch32_clip_224.openai", 512), ("convnext_base.clip_laion2b", 640)]
)
def test_the_projection_of_a_clip_tower_is_no_head(trained_timm, name, features):
    with torch.device("meta"):
        encoder = load_encoder(f"timm:{name}")
    assert encoder.features == features and encoder.head is None
    assert encoder.network.get_classifier().out_features == features


def test_a_clip_tower_from_a_local_file_keeps_its_projection(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    source = timm.create_model("vit_base_patch32_clip_224.openai", pretrained=False).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder("timm:vit_base_patch32_clip_224.openai", tmp_path / "w.pth")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), source(x))
    assert encoder.head is None


def test_a_source_brings_its_own_key_mapping(tmp_path):
    """EfficientNet-Lite0 in the names of its package, as the file of the demo has them."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    source = timm.create_model("tf_efficientnet_lite0").eval()
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(source.blocks) for b in range(len(stage))]
    plain = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    wide = {
        "conv_pw": "_expand_conv",
        "bn1": "_bn0",
        "conv_dw": "_depthwise_conv",
        "bn2": "_bn1",
        "conv_pwl": "_project_conv",
        "bn3": "_bn2",
    }
    outside = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}
    weights = {}
    for key, value in source.state_dict().items():
        block = next((block for block in blocks if key.startswith(f"{block}.")), None)
        if block is None:
            layer, _, rest = key.partition(".")
            weights[f"{outside[layer]}.{rest}"] = value
        else:
            layer, _, rest = key[len(block) + 1 :].partition(".")
            names = wide if f"{block}.conv_pwl.weight" in source.state_dict() else plain
            weights[f"_blocks.{blocks.index(block)}.{names[layer]}.{rest}"] = value
    torch.save(weights, tmp_path / "w.pth")
    encoder = load_encoder("timm:tf_efficientnet_lite0", tmp_path / "w.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder(x)), source(x))


def test_a_linear_layer_as_a_head():
    layer = nn.Linear(5, 3)
    head = Head.of(layer)
    assert torch.equal(head.weight, layer.weight) and torch.equal(head.bias, layer.bias) and not head.normalize
    assert Head.of(head) is head
    assert Head.of(nn.Linear(5, 3, bias=False)).bias is None


def test_the_key_mapping_of_timm_itself(tmp_path):
    """DINOv2's own file has a mask token that timm leaves out."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch14_dinov2", img_size=28).eval()
    weights = {**source.state_dict(), "mask_token": torch.zeros(1, 384)}
    weights["pos_embed"] = torch.randn(1, 1370, 384)  # of 518 pixels, as timm builds it
    torch.save({"model": weights}, tmp_path / "w.pth")
    encoder = load_encoder("timm:vit_small_patch14_dinov2", tmp_path / "w.pth")
    assert torch.equal(encoder.network.pos_embed, weights["pos_embed"])


def test_position_embeddings_are_not_stretched_in_silence(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    source = timm.create_model("vit_small_patch14_dinov2", img_size=28).eval()
    torch.save({**source.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="pos_embed .*instead of"):
        load_encoder("timm:vit_small_patch14_dinov2", tmp_path / "w.pth")
