"""Where features come from: the sum over parts on networks of several libraries, and planted parameters that must come first."""

import copy
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from provenance_models import CNNS, SIDE, TRANSFORMERS, hf_resnet, images, open_clip, resnet, scattered, timm_vit, torchvision_vit
from torch import nn

from torchprobe.analysis import outlier_features, provenance, vector_kurtosis
from torchprobe.analysis.provenance import Provenance, UnknownStructure, deviations
from torchprobe.encoders import Encoder, Head
from torchprobe.studies.interpret.provenance import provenance_section, write_provenance

GOLDEN = os.environ.get("TORCHPROBE_GOLDEN", "")
FEATURE = 11


def largest(model: nn.Module, count: int = 2) -> list[int]:
    with torch.no_grad():
        return model(torch.stack(images())).abs().mean(0).topk(count).indices.tolist()


def plant(model: nn.Module, name: str, index: object, value: float) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name)[index] = value
    return model


# -- the sum -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRANSFORMERS, *CNNS])
def test_parts_sum_to_the_feature(name: str) -> None:
    model = scattered({**TRANSFORMERS, **CNNS}[name]())
    before = copy.deepcopy(model.state_dict())
    features = largest(model)
    found = provenance(model, images(), features, changes=0, batch_size=2)
    assert found.error < 1e-13
    h = model(torch.stack(images())).detach().double()
    for feature, size in zip(features, found.sizes, strict=True):
        rows = [row for row in found.parts if row.feature == feature]
        assert sum(row.contribution for row in rows) == pytest.approx(size, rel=1e-12)
        assert sum(row.mean for row in rows) == pytest.approx(float(h[:, feature].mean()), rel=1e-4)  # the model itself is float32
        assert sum(row.share for row in rows) == pytest.approx(1, rel=1e-12)
    kinds = {row.kind for row in found.parts}
    assert kinds >= ({"attention", "mlp", "stem"} if name in TRANSFORMERS else {"shortcut"})
    if name in TRANSFORMERS:
        stem = {row.feature: row.contribution for row in found.parts if row.kind == "stem"}
        for feature in features:
            assert sum(r.contribution for r in found.stem if r.feature == feature) == pytest.approx(stem[feature], rel=1e-9, abs=1e-12)
    assert found.remarks == []
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules() if "transformers" not in name)


def test_parts_are_those_of_the_formula() -> None:
    """Against the formula in plain numpy: P_fᵀ γ (c − mean c) / σ, with σ of the whole stream."""
    model = scattered(open_clip(ls_init_value=0.4)).double()
    pixels = torch.stack(images()).double()
    kept: dict[str, np.ndarray] = {}
    names = [f"transformer.resblocks.{i}.{ls}" for i in range(3) for ls in ("ls_1", "ls_2")]
    for name in ["ln_pre", "ln_post", *names]:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: kept.update(
                {name: out.detach().numpy()[:, 0], f"{name} in": args[0].detach().numpy()[:, 0]}
            )
        )
    h = model(pixels).detach().numpy()
    model_before_hooks = scattered(open_clip(ls_init_value=0.4))
    model_before_hooks.load_state_dict(model.state_dict())
    found = provenance(model_before_hooks, images(), [FEATURE], changes=0)
    gamma, projection = model.ln_post.weight.detach().numpy(), model.proj.detach().numpy()
    stream = kept["ln_post in"]
    sigma = np.sqrt(stream.var(1, keepdims=True) + model.ln_post.eps)
    sign = np.where(h[:, FEATURE] < 0, -1, 1)
    rows = {(row.block, row.part): row for row in found.parts}
    total = np.zeros(len(h))
    for name in ["ln_pre", *names]:
        part = (gamma * (kept[name] - kept[name].mean(1, keepdims=True)) / sigma) @ projection[:, FEATURE]
        total += part
        block, _, scale = name.rpartition(".")
        row = rows["", "(before the blocks)"] if name == "ln_pre" else rows[block, "attn" if scale == "ls_1" else "mlp"]
        assert row.mean == pytest.approx(part.mean(), rel=1e-5)
        assert row.std == pytest.approx(part.std(), rel=1e-4)
        assert row.contribution == pytest.approx((part * sign).mean(), rel=1e-4, abs=1e-7)
    bias = float(model.ln_post.bias.detach().numpy() @ projection[:, FEATURE])
    np.testing.assert_allclose(total + bias, h[:, FEATURE], rtol=1e-10)
    assert rows["", "ln_post.bias"].mean == pytest.approx(bias, rel=1e-5)


@pytest.mark.parametrize("kind", ["gain", "bias", "row", "mlp bias", "mlp row", "scale"])
def test_excess_is_the_change_of_the_direct_path(kind: str) -> None:
    """The median in place of a parameter of the last block or after it: only the scale of the LayerNorm is not held by the network."""
    model = scattered(timm_vit(init_values=0.5, global_pool="avg", fc_norm=False)).double()
    name = {
        "gain": "norm.weight",
        "bias": "norm.bias",
        "row": "patch_embed.proj.weight",
        "mlp bias": "blocks.2.mlp.fc2.bias",
        "mlp row": "blocks.2.mlp.fc2.weight",
        "scale": "blocks.2.ls2.gamma",
    }[kind]
    index = FEATURE
    with torch.no_grad():
        model.get_parameter(name)[index] += 1e-3  # so small that the scale hardly changes
    found = provenance(model, [x.double() for x in images()], [FEATURE], most=5000, changes=0)
    (row,) = (row for row in found.parameters if (row.parameter, row.index) == (name, index))
    values = model.get_parameter(name).detach()
    current = values.flatten(1).norm(dim=1) if values.dim() > 1 else values
    assert (row.value, row.median) == pytest.approx((float(current[index]), float(current.median())))
    if kind in ("gain", "bias"):
        pixels = torch.stack(images()).double()
        before = model(pixels).detach()[:, FEATURE]
        with torch.no_grad():
            values[index] = current.median()
        after = model(pixels).detach()[:, FEATURE]
        assert row.excess == pytest.approx(float(((before - after) * before.sign()).mean()), rel=1e-9)
    elif kind != "row":
        share = 1 - row.median / row.value
        part = next(part for part in found.parts if part.part == "mlp" and part.block == "blocks.2")
        assert abs(row.excess) <= abs(share) * 50 * (abs(part.contribution) + 1)
        assert row.excess == pytest.approx(row.contribution * share, rel=1e-9)


# -- planted parameters ----------------------------------------------------------------------------------------------------

PLANTED = [
    ("a LayerNorm gain", torchvision_vit, "encoder.ln.weight", FEATURE, 40.0, None),
    ("a LayerNorm bias", torchvision_vit, "encoder.ln.bias", FEATURE, 40.0, "encoder.ln.bias"),
    ("an MLP bias", torchvision_vit, "encoder.layers.encoder_layer_1.mlp.3.bias", FEATURE, 60.0, "mlp"),
    ("an attention bias", torchvision_vit, "encoder.layers.encoder_layer_0.self_attention.out_proj.bias", FEATURE, -60.0, "self_attention"),
    ("a position", torchvision_vit, "encoder.pos_embedding", (0, 0, FEATURE), 60.0, "(before the blocks)"),
    ("a class token", timm_vit, "cls_token", (0, 0, FEATURE), 60.0, "(before the blocks)"),
    ("positions, mean", TRANSFORMERS["timm, mean"], "pos_embed", (0, slice(None), FEATURE), 60.0, "(before the blocks)"),
    ("an MLP bias, DINOv2", TRANSFORMERS["transformers, DINOv2"], "model.encoder.layer.1.mlp.fc2.bias", FEATURE, 80.0, "mlp"),
    ("an attention bias, CLIP", TRANSFORMERS["timm, CLIP"], "blocks.2.attn.proj.bias", FEATURE, 80.0, "attn"),
    ("a batch norm gain", resnet, "layer4.1.bn2.weight", FEATURE, -90.0, "bn2"),
    ("a batch norm bias", CNNS["torchvision, bottlenecks"], "layer4.1.bn3.bias", FEATURE, 90.0, "bn3"),
    ("a batch norm gain, transformers", hf_resnet, "model.encoder.stages.3.layers.1.layer.1.normalization.weight", FEATURE, 90.0, "layer"),
]


@pytest.mark.parametrize(("name", "build", "parameter", "index", "value", "part"), PLANTED, ids=[row[0] for row in PLANTED])
def test_a_planted_parameter_comes_first(name, build, parameter, index, value, part) -> None:
    model = plant(scattered(build()), parameter, index, value)
    found = provenance(model, images(), [FEATURE])
    first = found.parameters[0]
    assert (first.parameter, first.index) == (parameter, FEATURE)
    assert first.value == pytest.approx(abs(value) if first.kind == "gain" else value) and abs(first.deviation) > 20
    if part:
        assert found.parts[0].part == part and abs(found.parts[0].share) > 0.5
        assert found.parts[0].block == "" or parameter.startswith(found.parts[0].block)
    median = found.changes[0]
    assert (median.parameter, median.how) == (parameter, "median")
    assert median.relative_size < median.relative_size_before / 3
    assert parameter in found.summary() and f"Feature {FEATURE}" in found.summary()


@pytest.mark.parametrize("build", [open_clip, TRANSFORMERS["transformers, CLIP"]])
def test_a_planted_projection_row_comes_first(build) -> None:
    model = scattered(build())
    name = "proj" if hasattr(model, "proj") else "model.visual_projection.weight"
    with torch.no_grad():
        row = model.get_parameter(name)
        (row[:, FEATURE] if name == "proj" else row[FEATURE]).mul_(30)
        if name != "proj":  # transformers starts it 50 times as large as everything else
            model.model.vision_model.embeddings.class_embedding.mul_(0.02)
    found = provenance(model, images(), [FEATURE])
    first = found.parameters[0]
    assert (first.parameter, first.index, first.kind) == (name, FEATURE, "row")
    assert first.value / first.median > 10 and first.excess_share == pytest.approx(1 - first.median / first.value, rel=1e-6)
    assert found.changes[0].relative_size < 5 < found.changes[0].relative_size_before


def test_a_parameter_behind_a_projection_is_named_by_its_own_entry() -> None:
    """The stream has its own features: a bias of feature 3 of the stream is read by feature 11 of the representation."""
    model = scattered(open_clip())
    with torch.no_grad():
        model.transformer.resblocks[1].mlp.c_proj.bias[3] = 500
        model.proj[3] = 0
        model.proj[3, FEATURE] = 20
    found = provenance(model, images())
    assert found.features == [FEATURE]
    rows = [(row.parameter, row.index) for row in found.parameters[:2]]
    assert ("transformer.resblocks.1.mlp.c_proj.bias", 3) in rows
    assert found.parts[0].block == "transformer.resblocks.1" and found.parts[0].part == "mlp"


# -- changes ---------------------------------------------------------------------------------------------------------------


def test_changes_run_the_whole_network() -> None:
    model = plant(scattered(torchvision_vit()), "encoder.layers.encoder_layer_1.mlp.3.bias", FEATURE, 60.0)
    head = Head(torch.randn(5, 48))
    pairs = [(x, i % 5) for i, x in enumerate(images(12))]
    found = provenance(model, pairs, head=head, changes=2)
    assert found.features == [FEATURE] and len(found.changes) == 4
    pixels = torch.stack([x for x, _ in pairs])
    before = model(pixels).detach()
    changed = copy.deepcopy(model)
    bias = changed.get_parameter("encoder.layers.encoder_layer_1.mlp.3.bias").data
    for row, value in zip(found.changes, (bias.median().item(), 0.0), strict=False):
        bias[FEATURE] = value
        after = changed(pixels).detach()
        expected = {
            "relative_size": after.abs().mean(0)[FEATURE] / after.abs().mean(),
            "relative_size_before": before.abs().mean(0)[FEATURE] / before.abs().mean(),
            "vector_kurtosis": vector_kurtosis(after).mean(),
            "vector_kurtosis_before": vector_kurtosis(before).mean(),
            "cosine": torch.cosine_similarity(before, after).mean(),
            "agreement": (head(before).argmax(1) == head(after).argmax(1)).double().mean(),
            "accuracy": (head(after).argmax(1) == torch.arange(12) % 5).double().mean(),
            "accuracy_before": (head(before).argmax(1) == torch.arange(12) % 5).double().mean(),
        }
        for key, number in expected.items():
            assert getattr(row, key) == pytest.approx(float(number), rel=1e-4), key
        assert row.outlier_share_before == 1 and row.outlier_share == 0
    assert [row.how for row in found.changes] == ["median", "zero"] * 2


def test_labels_and_heads_are_not_needed() -> None:
    model = plant(scattered(torchvision_vit()), "encoder.ln.bias", FEATURE, 60.0)
    row = provenance(model, images()).changes[0]
    assert np.isnan([row.accuracy, row.agreement]).all() and 0 < row.cosine < 1
    agreed = provenance(model, images(), head=torch.randn(4, 48)).changes[0]
    assert 0 <= agreed.agreement <= 1 and np.isnan(agreed.accuracy)


# -- results ---------------------------------------------------------------------------------------------------------------


def test_the_file_and_the_tables(tmp_path: Path) -> None:
    from rich.console import Console

    model = plant(scattered(torchvision_vit()), "encoder.ln.bias", FEATURE, 60.0)
    found = provenance(model, images())
    found.save(tmp_path / "found.json")
    assert Provenance.load(tmp_path / "found.json") == found
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found.table(most=3))
    text = console.export_text()
    assert "encoder.ln.bias" in text and "5 images" in text and "= median" in text
    assert found.rows()[0]["parameter"] == "encoder.ln.bias"
    for content in ("{", "[]", "{}", json.dumps({**json.loads((tmp_path / "found.json").read_text()), "format": 2})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="bad.json"):
            Provenance.load(tmp_path / "bad.json")
    with pytest.raises(FileNotFoundError):
        Provenance.load(tmp_path / "none.json")


def test_the_page(tmp_path: Path) -> None:
    model = plant(scattered(timm_vit()), "norm.bias", FEATURE, 60.0)
    encoder = Encoder(model, features=48, preprocess=lambda image: image, name="<b>small</b>")
    found = provenance(encoder, images())
    page = write_provenance(found, tmp_path / "page.html").read_text()
    assert "visual.norm.bias" in page and "&lt;b&gt;small" in page and "<b>small" not in page
    assert len(provenance_section(provenance(encoder, images(), [])).tables) == 0


def test_text_towers() -> None:
    """Tokens are inputs like any other: the row of the token, the position, and the projection of a text tower."""
    from open_clip.transformer import TextTransformer

    tower = TextTransformer(context_length=9, vocab_size=30, width=48, heads=3, layers=2, mlp_ratio=2, output_dim=40)
    model = plant(scattered(tower), "positional_embedding", (8, 3), 300.0)
    with torch.no_grad():
        model.text_projection[3] = 0
        model.text_projection[3, FEATURE] = 5
    tokens = torch.randint(1, 29, (6, 9))
    tokens[:, -1] = 29
    found = provenance(model, list(tokens))
    assert found.features == [FEATURE] and found.error < 1e-13
    assert ("positional_embedding", 3) in [(row.parameter, row.index) for row in found.parameters[:2]]
    assert found.parts[0].kind == "stem" and found.stem[0].parameter == "positional_embedding"


def test_nothing_stands_out() -> None:
    model = scattered(timm_vit())
    assert not len(outlier_features(model(torch.stack(images())).detach()))
    found = provenance(model, images())
    assert (found.features, found.parts, found.changes, found.error) == ([], [], [], 0)
    assert "none is an outlier feature" in found.summary()


def test_a_network_as_it_starts_has_parameters_too() -> None:
    """All gains are 1 and all biases 0, so only rows differ from their peers."""
    found = provenance(resnet().eval(), images(), [5], changes=0)
    assert found.parameters and all(row.contribution for row in found.parameters)


def test_deviations_of_equal_values() -> None:
    assert deviations(torch.tensor([1.0, 1.0, 1.0, 5.0])).tolist() == [0, 0, 0, float("inf")]
    assert deviations(torch.full((3,), 2.0)).tolist() == [0, 0, 0]


# -- what is not known -------------------------------------------------------------------------------------------------------


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = nn.Linear(48, 48), nn.LayerNorm(48)

    def forward(self, x):
        return self.norm(x + self.mlp(x))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: timm_vit(global_pool="map", class_token=False), "follows 'blocks.2' is not linear"),
        (lambda: open_clip(attentional_pool=True), "follows 'transformer.resblocks.2' is not linear"),
        (lambda: nn.Sequential(timm_vit(), nn.Tanh()), "follows '0.blocks.2' is not linear"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 50)), "it has no list of blocks"),
        (
            lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE**2, 48), nn.Sequential(PostNorm(), PostNorm())),
            r"not a known structure: the blocks of 2 \(PostNorm\) do not add",
        ),
    ],
)
def test_an_unknown_structure_is_refused(build, message: str) -> None:
    with pytest.raises(UnknownStructure, match=message):
        provenance(scattered(build()), images(), [3], changes=0)


def test_arguments() -> None:
    model = scattered(timm_vit())
    with pytest.raises(ValueError, match="features are indices from 0 to 47"):
        provenance(model, images(), [48])
    with pytest.raises(ValueError, match="most must be at least 1"):
        provenance(model, images(), [1], most=0)
    with pytest.raises(ValueError, match="expected one vector each"):
        provenance(nn.Sequential(nn.Identity()), images(), [1])
    with pytest.raises(ValueError, match="the network has nan or inf for some images"):
        provenance(model, [*images(2), torch.full((3, SIDE, SIDE), torch.nan)], [1])
    with pytest.raises(KeyboardInterrupt):
        provenance(model, images(), [1], stop=lambda: True)
    seen: list[tuple[int, int]] = []
    provenance(model, images(), [1], changes=0, batch_size=2, progress=lambda *pair: seen.append(pair))
    assert seen == [(2, 5), (4, 5), (5, 5)]


# -- real projections --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not GOLDEN, reason="TORCHPROBE_GOLDEN does not name the folder of published arrays")
@pytest.mark.parametrize(("side", "rows"), [("image", [644, 413]), ("text", [316, 440])])
def test_the_projections_of_l14(side: str, rows: list[int]) -> None:
    """The longest rows of the last projections of OpenAI's ViT-L/14 are those of its outlier features, and are found behind a network."""
    with np.load(Path(GOLDEN, "clip", "openai_vit_l14_projections.npz"), allow_pickle=False) as file:
        weight = torch.from_numpy(file[side].astype(np.float32))
    far = deviations(weight.norm(dim=1))
    assert far.topk(2).indices.tolist() == rows and float(far[rows].min()) > 4
    import open_clip as library

    model = library.transformer.VisionTransformer(SIDE, 16, weight.shape[1], 1, 4, 0.25, output_dim=weight.shape[0])
    model.proj = nn.Parameter(weight.T.contiguous())
    found = provenance(scattered(model), images(3), rows)
    assert found.error < 1e-13
    for feature in rows:
        first = next(row for row in found.parameters if row.feature == feature)
        assert (first.parameter, first.index, first.kind) == ("proj", feature, "row")
        assert first.value == pytest.approx(float(weight[feature].norm()), rel=1e-5)
        change = next(row for row in found.changes if row.feature == feature)
        ratio = first.median / first.value
        assert change.relative_size / change.relative_size_before == pytest.approx(ratio, rel=0.05)
