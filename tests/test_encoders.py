"""Encoders by name, and weights from local files. Nothing is fetched: weights are random, or saved here first."""

import argparse
import logging
import pickle

import pytest
import torch
from torch import nn

from torchprobe.encoders import Encoder, EncoderError, load_encoder, load_weights, read_checkpoint

pytest.importorskip("PIL", reason="pillow is not installed")


def image():
    from PIL import Image

    return Image.linear_gradient("L").convert("RGB").resize((300, 200))


def shape(name, device):
    """Shape of the representation of one image; on the meta device nothing is computed."""
    with torch.device(device):
        encoder = load_encoder(name, pretrained=False)
    assert not encoder.training
    with torch.no_grad():
        h = encoder(encoder.preprocess(image())[None].to(device))
    assert h.shape == (1, encoder.features)
    return encoder.features


TINY_CLIP = """{
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2}
}"""


@pytest.fixture
def tiny_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    (tmp_path / "tiny-clip.json").write_text(TINY_CLIP)
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    return open_clip.create_model("tiny-clip", pretrained=None).eval()


# -- the three sources -------------------------------------------------------------------------------------------------

TORCHVISION = {
    "resnet18": 512,
    "mobilenet_v3_small": 1024,
    "convnext_tiny": 768,
    "shufflenet_v2_x0_5": 1024,
    "swin_t": 768,
}
TIMM = {
    "resnet18": 512,
    "vit_tiny_patch16_224": 192,
    "tf_efficientnet_lite0": 1280,
    "deit_tiny_distilled_patch16_224": 192,
}


@pytest.mark.parametrize(("name", "features"), TORCHVISION.items())
def test_torchvision_gives_what_the_head_sees(name, features):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert shape(f"torchvision:{name}", "meta") == features


@pytest.mark.parametrize(("name", "features"), TIMM.items())
def test_timm_gives_what_the_head_sees(name, features):
    pytest.importorskip("timm", reason="timm is not installed")
    assert shape(f"timm:{name}", "cpu") == features


def test_the_representation_times_the_head_is_the_model():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224").eval()
    torch.manual_seed(0)
    encoder = load_encoder("timm:vit_tiny_patch16_224", pretrained=False)
    x = encoder.preprocess(image())[None]
    with torch.no_grad():
        torch.testing.assert_close(model.head(encoder(x)), model(x))


def test_open_clip_gives_the_projected_image_before_normalization(tmp_path, tiny_clip):
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": {f"module.{k}": v for k, v in tiny_clip.state_dict().items()}},
        tmp_path / "clip.pt",
    )
    encoder = load_encoder("open_clip:tiny-clip", tmp_path / "clip.pt")
    x = encoder.preprocess(image())[None]
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), tiny_clip.encode_image(x, normalize=False))
    assert encoder.features == 24
    assert all(name.startswith("visual.") for name, _ in encoder.named_parameters())


def test_open_clip_tags_choose_the_activation_and_the_preprocessing(monkeypatch, tiny_clip):
    registry = pytest.importorskip("open_clip.pretrained")._PRETRAINED
    tags = {"quick": {"quick_gelu": True, "mean": (0.1, 0.2, 0.3)}, "plain": {"quick_gelu": False}}
    monkeypatch.setitem(registry, "tiny-clip", tags)
    quick, plain = (load_encoder(f"open_clip:tiny-clip/{tag}", pretrained=False) for tag in tags)
    assert "QuickGELU" in {type(module).__name__ for module in quick.modules()}
    assert "QuickGELU" not in {type(module).__name__ for module in plain.modules()}
    assert tuple(quick.preprocess.transforms[-1].mean) == (0.1, 0.2, 0.3)
    assert quick.preprocess(image()).shape == (3, 32, 32)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet50", "tim:resnet50", "timm:", ":resnet50", ""])
def test_a_name_without_a_known_source(name):
    with pytest.raises(EncoderError, match="timm:NAME"):
        load_encoder(name)


@pytest.mark.parametrize(
    ("package", "name", "message"),
    [
        ("timm", "timm:resnet5O", "did you mean .*resnet5"),
        ("torchvision", "torchvision:resnet5O", "did you mean .*resnet5"),
        ("torchvision", "torchvision:resnet50/IMAGENET", "IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision", "torchvision:squeezenet1_0", "no linear head"),
        ("open_clip", "open_clip:ViT-B-3", "did you mean .*ViT-B-32"),
        ("open_clip", "open_clip:ViT-B-32/laion", "laion2b_s34b_b79k"),
        ("open_clip", "open_clip:ViT-B-32", "several weights.*openai"),
    ],
)
def test_unknown_models_and_weights_name_the_known(package, name, message):
    pytest.importorskip(package, reason=f"{package} is not installed")
    with pytest.raises(EncoderError, match=message):
        load_encoder(name, pretrained="open_clip" in name)


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(EncoderError, match=r"pip install 'torchprobe-interp\[vision\]'"):
        load_encoder("timm:resnet18")


@pytest.mark.parametrize(
    ("name", "function"),
    [("timm:resnet18", "timm.create_model"), ("torchvision:resnet18", "torchvision.models.get_model")],
)
def test_weights_that_cannot_be_fetched_name_the_cache_and_the_flag(monkeypatch, name, function):
    pytest.importorskip(function.split(".")[0], reason=f"{function.split('.')[0]} is not installed")

    def offline(*args, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(function, offline)
    with pytest.raises(EncoderError, match=r"Name or service not known.*local caches are .*(hub|checkpoints).*--checkpoint"):
        load_encoder(name)


def test_nothing_is_left_on_the_root_logger(tiny_clip):
    before = list(logging.getLogger().handlers), logging.getLogger().level
    load_encoder("open_clip:tiny-clip", pretrained=False)
    assert before == (list(logging.getLogger().handlers), logging.getLogger().level)


def test_an_encoder_must_pool():
    encoder = Encoder(nn.Conv2d(3, 4, 1), features=4, preprocess=lambda x: x, name="maps")
    with pytest.raises(EncoderError, match=r"maps returned \(1, 4, 8, 8\), expected \(images, 4\)"):
        encoder(torch.zeros(1, 3, 8, 8))


def test_a_new_source_takes_one_function_and_one_line(monkeypatch, tmp_path):
    from torchprobe.encoders import sources
    from torchprobe.encoders.encoder import Built

    def from_mine(name, model, pretrained):
        visual = nn.Sequential(nn.Flatten(), nn.Linear(12, int(model)))
        return Built(Encoder(visual, features=int(model), preprocess=lambda image: image, name=name), ("head.weight", "head.bias"))

    monkeypatch.setitem(sources.SOURCES, "mine", from_mine)
    assert load_encoder("mine:5", pretrained=False).name == "mine:5 (random weights)"
    torch.save({"1.weight": torch.ones(5, 12), "1.bias": torch.zeros(5), "head.weight": torch.ones(2, 5)}, tmp_path / "w.pt")
    encoder = load_encoder("mine:5", tmp_path / "w.pt")
    assert encoder(torch.ones(1, 3, 2, 2)).tolist() == [[12.0] * 5]
    assert encoder.head.weight.shape == (2, 5) and not encoder.head.normalize


def test_every_command_knows_a_new_source(monkeypatch, tmp_path, capsys):
    """As CONTRIBUTING says: a file with a function, and a line."""
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    import interpret_sets as sets

    from torchprobe.cli import main
    from torchprobe.encoders import sources
    from torchprobe.encoders.encoder import Built
    from torchprobe.encoders.suite import load_suite

    def from_mine(name, model, pretrained):
        visual = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, int(model)))
        return Built(Encoder(visual, features=int(model), preprocess=sets.pixels, name=name))

    monkeypatch.setitem(sources.SOURCES, "mine", from_mine)
    sets.write_classes(tmp_path / "images", each=3)
    images = ["--images", str(tmp_path / "images"), "--device", "cpu", "--out"]
    for command in (["layers"], ["scan", *images, str(tmp_path / "scan")], ["interpret", *images, str(tmp_path / "interpret")]):
        with pytest.raises(SystemExit) as left:
            main([command[0], "mine:48", *command[1:], "--json"])
        assert left.value.code == 0 and "mine:48" in capsys.readouterr().out
    row = '[[encoder]]\nname = "a"\nrole = "zero-shot"\nbackbone = "b"\npretraining = "p"\nsource = "mine:48"\n'
    (tmp_path / "suite.toml").write_text(row)
    assert load_suite(tmp_path / "suite.toml")[0].head == "zero-shot"  # whether it has a text tower, the encoder says
    with pytest.raises(EncoderError, match="expected one of timm:NAME, .*mine:NAME; did you mean mine"):
        load_encoder("min:48")


# -- local weights -----------------------------------------------------------------------------------------------------


class Tower(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Linear(3, width)
        self.blocks = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))


def save(weights, path):
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors").torch.save_file(weights, path)
    else:
        torch.save(weights, path)


@pytest.mark.parametrize("ending", [".safetensors", ".pt", ".pth", ".ckpt"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.visual.", "module._orig_mod.image_encoder."])
def test_prefixes_are_stripped(tmp_path, ending, prefix):
    source, target = Tower(), Tower()
    weights = {prefix + key: value for key, value in source.state_dict().items()}
    if "visual" in prefix:
        weights["model.text.weight"] = torch.zeros(2)
    save(weights, tmp_path / f"w{ending}")
    load_weights(target, tmp_path / f"w{ending}")
    for key, value in source.state_dict().items():
        assert torch.equal(value, target.state_dict()[key]), key


@pytest.mark.parametrize("nest", ["state_dict", "model", "model_state_dict"])
def test_nested_checkpoints_and_names_within_wrappers(tmp_path, nest):
    source, target = Tower(), Tower()
    weights = {key.replace("blocks.", "blocks._checkpoint_wrapped_module."): value for key, value in source.state_dict().items()}
    torch.save({"epoch": 1, "args": argparse.Namespace(lr=0.1), nest: weights}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert torch.equal(target.stem.weight, source.stem.weight)
    assert torch.equal(target.blocks[0].weight, source.blocks[0].weight)


def test_a_mismatch_lists_the_keys_shortly(tmp_path):
    weights = {f"extra.{i}": torch.zeros(1) for i in range(50)} | Tower(width=5).state_dict()
    del weights["stem.bias"]
    torch.save(weights, tmp_path / "w.pt")
    target = Tower()
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(EncoderError) as caught:
        load_weights(target, tmp_path / "w.pt")
    text = str(caught.value)
    for part in (
        "1 missing: stem.bias",
        "50 unexpected: extra.0, ",
        "and 42 more",
        "stem.weight (5, 3) instead of (4, 3)",
    ):
        assert part in text
    assert len(text) < 1500
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_a_head_of_any_width_is_left_aside(tmp_path):
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    source = models.resnet18(num_classes=7).eval()
    weights = {key: value for key, value in source.state_dict().items() if "num_batches_tracked" not in key}  # as old files have it
    torch.save(weights, tmp_path / "w.pth")
    encoder = load_encoder("torchvision:resnet18/IMAGENET1K_V1", tmp_path / "w.pth")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(source.fc(encoder(x)), source(x))


def test_keys_to_ignore_and_the_old_name_of_the_argument(tmp_path):
    weights = Tower().state_dict() | {"head.weight": torch.zeros(2, 4)}
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"1 unexpected: head\.weight"):
        load_weights(Tower(), tmp_path / "w.pt")
    load_weights(target := Tower(), tmp_path / "w.pt", ignore=["head.weight"])
    assert torch.equal(target.stem.weight, weights["stem.weight"])
    with pytest.warns(DeprecationWarning, match="load_weights: the argument 'aside' is deprecated, use 'ignore'"):
        load_weights(Tower(), tmp_path / "w.pt", aside=["head.weight"])


def test_an_encoder_that_is_there_twice_is_refused(tmp_path):
    state = Tower().state_dict()
    torch.save({f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"twice, under 'student\.' and 'teacher\.'"):
        load_weights(Tower(), tmp_path / "w.pt")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the code in the file was run')",)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"state_dict": Tower().state_dict(), "hparams": Bomb()}, tmp_path / "w.ckpt")
    with pytest.raises(EncoderError, match="not loaded"):
        read_checkpoint(tmp_path / "w.ckpt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EncoderError, match=r"not loaded|cannot be read"):
        read_checkpoint(tmp_path / "bare.pt")


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with pytest.raises(EncoderError, match=r"TorchScript.*state_dict"):
        read_checkpoint(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("file", "content"),
    [("w.pt", b""), ("w.pt", b"hello"), ("w.safetensors", b"\x08\0\0\0\0\0\0\0nonsense"), ("w.safetensors", b"")],
)
def test_files_that_are_no_checkpoints(tmp_path, file, content):
    (tmp_path / file).write_bytes(content)
    with pytest.raises(EncoderError, match="cannot be read"):
        read_checkpoint(tmp_path / file)


def test_checkpoints_without_tensors_or_file(tmp_path):
    torch.save({"epoch": 1}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="no state_dict"):
        read_checkpoint(tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "none.pt")


def test_a_wrong_checkpoint_is_found_before_the_network_is_built(monkeypatch, tmp_path):
    from torchprobe.encoders import load

    monkeypatch.setitem(load.SOURCES, "timm", lambda *arguments: pytest.fail("the network was built"))
    with pytest.raises(EncoderError, match="no checkpoint at"):
        load_encoder("timm:resnet50", checkpoint=tmp_path / "none.pt")
