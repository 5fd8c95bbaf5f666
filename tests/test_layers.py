"""Names, selection, and the dimension of the features."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchprobe
from torchprobe.recording import RecordingWarning
from torchprobe.recording.layers import canonical, named_layers, select_layers
from torchprobe.recording.leaves import leaf_dims, typed_dim


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.proj = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.qkv(x)[..., :4])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def names(model: nn.Module, layers: Any = None) -> list[str]:
    return [layer.name for layer in select_layers(model, layers)]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("blocks.*", ["blocks.0", "blocks.1", "blocks.2"]),
        ("blocks.1", ["blocks.1"]),
        ("blocks.*.mlp.*", [f"blocks.{i}.mlp.{j}" for i in range(3) for j in range(2)]),
        ("*", ["stem", "head"]),  # a ModuleList is never called, so patterns skip it
        ("**.qkv", [f"blocks.{i}.attn.qkv" for i in range(3)]),
        ("blocks.0.**", [f"blocks.0{s}" for s in ("", ".attn", ".attn.qkv", ".attn.proj", ".mlp", ".mlp.0", ".mlp.1")]),
        ("s*", ["stem"]),
        ("blocks.[02]", ["blocks.0", "blocks.2"]),
        ("blocks.?.at*", [f"blocks.{i}.attn" for i in range(3)]),
        ("", [""]),
        (["head", "blocks.1", "blocks.*", "head"], ["blocks.0", "blocks.1", "blocks.2", "head"]),
        (("stem",), ["stem"]),
        (re.compile(r"blocks\.\d"), ["blocks.0", "blocks.1", "blocks.2"]),
        (re.compile("stem|head"), ["stem", "head"]),
        (lambda name, module: isinstance(module, nn.Linear) and "mlp" in name, [f"blocks.{i}.mlp.0" for i in range(3)]),
    ],
)
def test_selection(layers: Any, expected: list[str]) -> None:
    assert names(Encoder(), layers) == expected


def test_two_stars_select_everything_that_is_called() -> None:
    model = Encoder()
    assert names(model, "**") == [name for name, _ in model.named_modules() if name != "blocks"]


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ("block.1", ValueError, "no layer 'block.1'; did you mean 'blocks.1'"),
        (["head", "blocks.0.atn"], ValueError, "no layer 'blocks.0.atn'; did you mean 'blocks.0.attn'"),
        ("zzz", ValueError, r"the layers are 'stem', 'blocks.0', .* \(23 in total\)"),
        ("blocks.*.nope", ValueError, r"'blocks.\*.nope' matches no layer"),
        (re.compile("blocks"), ValueError, "'blocks' matches no whole name"),
        (lambda name, module: False, ValueError, "predicate selects no layer"),
        ([], ValueError, "empty"),
        ("blocks", ValueError, r"'blocks' is a ModuleList, which is never called; select its children, 'blocks.\*'"),
        ([3], TypeError, "holds names and globs, not int"),
        (3, TypeError, "takes names, globs, a compiled regular expression or a predicate"),
        (nn.Linear(1, 1), TypeError, "not a module"),
    ],
)
def test_what_cannot_be_selected(layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select_layers(Encoder(), layers)


def test_default_layers_of_a_transformer_are_its_blocks_and_itself() -> None:
    assert names(Encoder()) == ["", "blocks.0", "blocks.1", "blocks.2"]


def test_default_layers_outermost_only() -> None:
    stage = lambda: nn.Sequential(nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU()))  # noqa: E731
    model = nn.ModuleDict({"a": stage(), "b": nn.Sequential(nn.Linear(1, 1), nn.ReLU()), "c": nn.Linear(1, 1)})
    assert names(nn.Sequential(model)) == ["", "0.a", "0.b", "0.c"]
    assert names(nn.Sequential(stage(), nn.Linear(1, 1))) == ["", "0.0", "0.1"]


def test_default_layers_of_torchvision_resnet() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None)
    assert names(model) == ["", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1))]


def test_default_layers_of_a_model_without_lists() -> None:
    assert names(nn.Linear(2, 2)) == [""]


def test_one_module_under_two_names() -> None:
    model = nn.Module()
    model.first = nn.Linear(2, 2)
    model.second = model.first
    assert [layer.names for layer in select_layers(model, ["first", "second"])] == [["first", "second"]]
    assert names(model, "second") == ["first"]


class DistributedDataParallel(nn.Module):  # the real one needs a process group, see tests/test_distributed.py
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrappers_leave_no_trace_in_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = list(named_layers(Encoder()))
    wrapped = Encoder()
    wrapped.blocks[1] = checkpoint_wrapper(wrapped.blocks[1])
    wrapped.blocks[2].mlp = torch.compile(wrapped.blocks[2].mlp)
    for model in (wrapped, torch.compile(wrapped), nn.DataParallel(wrapped), DistributedDataParallel(wrapped)):
        assert list(named_layers(model)) == plain
        assert named_layers(model)[""].module is wrapped
        assert names(model, "module._orig_mod.blocks.1") == ["blocks.1"]
    assert list(named_layers(torch.optim.swa_utils.AveragedModel(Encoder()))) == plain
    assert canonical("_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.attn") == "blocks.0.attn"


def test_wrapper_of_an_unknown_kind_keeps_its_own_output() -> None:
    class Scaled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return 128 * self.module(x)

    model = Scaled(Encoder())
    layers = named_layers(model)
    assert layers[""].module is model
    assert layers["module"].module is model.module
    assert layers["blocks.0"].module is model.module.blocks[0]
    with torchprobe.record(model, ["", "module"]) as rec:
        model(torch.randn(3, 4))
    assert torch.equal(rec[""].max, 128 * rec["module"].max)


def test_a_child_called_module_among_others_is_a_child() -> None:
    model = nn.ModuleDict({"module": nn.Linear(1, 1), "other": nn.Linear(1, 1)})
    assert list(named_layers(model)) == ["", "module", "other"]


def convolutional() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


class Norm2d(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class LayerNorm2d(Norm2d):
    pass


@pytest.mark.parametrize(
    ("module", "dims", "expected"),
    [
        (nn.Conv1d(1, 1, 1), 3, 1),
        (nn.Conv2d(1, 1, 1), 4, 1),
        (nn.Conv2d(1, 1, 1), 3, 0),  # without a batch dimension
        (nn.Conv2d(1, 1, 1), 2, None),
        (nn.Conv3d(1, 1, 1), 5, 1),
        (nn.ConvTranspose2d(1, 1, 1), 4, 1),
        (nn.BatchNorm1d(1), 2, 1),
        (nn.BatchNorm1d(1), 3, 1),
        (nn.BatchNorm2d(1), 4, 1),
        (nn.GroupNorm(1, 1), 4, 1),
        (nn.MaxPool2d(1), 4, 1),
        (nn.AdaptiveAvgPool2d(1), 4, 1),
        (nn.Linear(1, 1), 4, 3),
        (nn.Linear(1, 1), 2, 1),
        (nn.Linear(1, 1), 1, 0),  # without a batch dimension
        (nn.LayerNorm(1), 4, 3),
        (nn.LayerNorm((1, 1)), 4, None),
        (nn.RMSNorm(1), 4, 3),
        (nn.Embedding(1, 1), 4, 3),
        (nn.MultiheadAttention(1, 1), 3, 2),
        (nn.LSTM(1, 1), 3, 2),
        (nn.Flatten(), 2, 1),
        (nn.ReLU(), 4, None),
        (Attention(), 4, None),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 1, 1)), 4, 1),  # its class is replaced by a subclass
        (nn.utils.parametrizations.weight_norm(nn.Linear(1, 1)), 4, 3),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_dimension_by_type(module: nn.Module, dims: int, expected: int | None) -> None:
    assert typed_dim(module, dims) == expected


@pytest.mark.parametrize("norm", [LayerNorm2d, Norm2d])
def test_a_name_that_says_maps(norm: type[nn.Module]) -> None:
    """Although it is a LayerNorm, and other dimensions are as wide."""
    assert leaf_dims(norm(6), (2, 6, 5, 7)) == leaf_dims(norm(6), (2, 6, 6, 6)) == [1]
    assert leaf_dims(nn.LayerNorm(6), (2, 6, 6, 6)) == [3]


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (convolutional(), (2, 3, 6, 8), 1),
        (convolutional(), (3, 6, 8), 0),  # without a batch dimension
        (nn.Sequential(convolutional(), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (2, 3, 6, 8), -1),
        (nn.Sequential(convolutional(), nn.Flatten(2)), (2, 3, 6, 8), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.LayerNorm(48)), (2, 3, 6, 8), -1),  # the last child decides
        (nn.Sequential(convolutional(), nn.Dropout()), (2, 3, 6, 8), 1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), Norm2d(4)), (2, 3, 4, 4), 1),
        (Attention(), (2, 3, 5, 4), -1),
        (Attention(), (2, 3, 4), -1),
        (Attention(), (2, 4), -1),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 5, 1))), (2, 3, 6, 8), 1),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), (2, 5, 6, 3), -1),
    ],
)
def test_the_dimension_of_a_block(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    with torchprobe.record(module, "") as rec:
        out = module(torch.randn(shape))
    (row,) = rec.rows()
    assert (row["feature_dim"], row["features"]) == (expected, out.shape[expected])


def test_an_activation_function_follows_what_ran_before_it() -> None:
    x = torch.randn(2, 3, 6, 8)
    with torchprobe.record(maps := convolutional(), "1") as rec:
        maps(x)
    with torchprobe.record(tokens := nn.Sequential(Attention(), nn.ReLU()), "1") as other:
        tokens(torch.randn(2, 6, 8, 4))
    assert (rec.rows()[0]["feature_dim"], other.rows()[0]["feature_dim"]) == (1, -1)
    with pytest.warns(RecordingWarning, match="unsure"), torchprobe.record(alone := nn.Sequential(nn.ReLU()), "0") as rec:
        alone(x)
    assert rec.rows()[0]["feature_dim_by"] == "unsure"


def test_feature_dim_is_overridden_and_stated() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Conv2d(5, 7, 1), nn.ReLU())
    x = torch.randn(2, 3, 4, 6)
    with torchprobe.record(model, "*", feature_dim={"1": -1, "?": 3, "2": 2}) as rec:
        model(x)
    assert [(row["layer"], row["feature_dim"], row["features"]) for row in rec.rows()] == [
        ("0", -1, 6),
        ("1", -1, 6),
        ("2", 2, 4),
    ]
    assert {row["feature_dim_by"] for row in rec.rows()} == {"feature_dim="}
    with torchprobe.record(model, "*", feature_dim=1) as rec:
        model(x)
    assert [row["features"] for row in rec.rows()] == [5, 7, 7]


def test_feature_dim_of_an_unknown_layer() -> None:
    with pytest.raises(ValueError, match="feature_dim: 'heat' is not one of the selected layers; did you mean 'head'"):
        select_layers(Encoder(), feature_dim={"heat": 1}, layers="head")
    with pytest.raises(TypeError, match="must be an int"):
        select_layers(Encoder(), feature_dim={"": "last"})


def test_a_misspelled_glob_suggests_the_nearest():
    model = nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))})
    with pytest.raises(ValueError, match=r"'block\.\*' matches no layer; did you mean 'blocks\.\*'\?"):
        torchprobe.record(model, "block.*")


def test_the_name_in_tables_of_the_model_itself_is_accepted() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert [layer.name for layer in select_layers(model, "(output)")] == [""]
    with torchprobe.record(model, ["(output)", "0"]) as rec:
        model(torch.ones(3, 2))
    assert rec["(output)"].vectors == rec[""].vectors == 3


def test_a_glob_that_lacks_what_comes_before_it() -> None:
    model = nn.ModuleDict({"visual": nn.ModuleDict({"blocks": nn.Sequential(nn.Linear(2, 2), nn.ReLU())})})
    with pytest.raises(ValueError, match=r"'blocks.\*' matches no layer; did you mean 'visual.blocks.\*'\?"):
        select_layers(model, "blocks.*")
