"""Which dimension of an activation holds the features: the right one, or "unsure", and never a wrong one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import COMPILER_WARNINGS, Calls, together, told, witnessed
from torch import Tensor, nn

import torchprobe


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def axes(rec: torchprobe.Recording) -> dict[str, tuple[int | None, int | None]]:
    """Layer → features, and their dimension."""
    return {row["layer"]: (row["features"], row["feature_dim"]) for row in rec.rows()}


def run(model: nn.Module, *batches: Any, call: Callable[..., Any] | None = None, layers: Any = "**", **options: Any) -> torchprobe.Recorder:
    """A recording with every number held against float64, for the dimension that the rows say."""
    of = options.get("of", "output")
    with told(), torchprobe.record(model, layers, **options) as rec, witnessed(model, of) if call is None else told() as seen:
        for batch in batches:
            arguments = batch if isinstance(batch, tuple) else (batch,)
            out = (model if call is None else call)(*[x.clone().requires_grad_() for x in arguments])
            if of == "gradient":
                out.square().sum().backward()
    if call is None:
        for layer, (_, dim) in axes(rec).items():
            if dim is not None and isinstance(seen.get(layer, [None])[0], Tensor):
                oracle.assert_close(rec[layer], together(seen[layer], dim))
    return rec


# -- one-dimensional convolutions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["output", "gradient", "input"])
@pytest.mark.parametrize("shape", [(8, 4, 100), (8, 4, 16), (16, 4, 100), (16, 4, 16), (1, 4, 9), (4, 4, 4)])
def test_convolutions_over_time(shape: tuple[int, ...], of: str) -> None:
    """Also where there are as many steps, or as many inputs, as channels."""
    model = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
    rec = run(model, torch.randn(shape), of=of)
    first = 4 if of == "input" else 16
    found = axes(rec)
    assert found.pop("") in ([(first, 1), (None, None)] if of == "input" and shape == (4, 4, 4) else [(first, 1)])
    assert found == {"0": (first, 1), "1": (16, 1), "2": (16, 1)}


@COMPILER_WARNINGS
@pytest.mark.parametrize("of", ["output", "gradient", "input"])
def test_convolutions_over_time_compiled(of: str) -> None:
    model = nn.Sequential(nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
    for shape in ((8, 4, 100), (8, 4, 16)):
        torch.compiler.reset()
        rec = run(model, torch.randn(shape), of=of, call=torch.compile(model, backend="aot_eager", fullgraph=True))
        known = {name: value for name, value in axes(rec).items() if value[0] is not None}
        first = 4 if of == "input" else 16
        expected = {"0": (first, 1), "1": (16, 1), "2": (16, 1), "": (first, 1)}
        assert known.items() <= expected.items()
        assert shape[-1] == 16 or known == expected


def test_convolutions_without_a_batch() -> None:
    rec = run(nn.Sequential(nn.Conv1d(4, 16, 3), nn.GELU(), nn.Conv1d(16, 5, 1)), torch.randn(4, 30))
    assert axes(rec) == {"0": (16, 0), "1": (16, 0), "2": (5, 0), "": (5, 0)}


@pytest.mark.parametrize(
    ("activation", "pooling"),
    [
        (nn.GELU(), nn.MaxPool1d(2)),
        (nn.LeakyReLU(), nn.AvgPool1d(2)),
        (nn.Dropout(0.5), nn.AdaptiveAvgPool1d(8)),
        (nn.Identity(), nn.Identity()),
    ],
)
def test_what_follows_a_convolution(activation: nn.Module, pooling: nn.Module) -> None:
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), activation, pooling, nn.Conv1d(8, 3, 1), nn.Tanh())
    for time in (32, 16, 8):
        rec = run(model, torch.randn(5, 4, time))
        assert axes(rec) == {"0": (8, 1), "1": (8, 1), "2": (8, 1), "3": (3, 1), "4": (3, 1), "": (3, 1)}


class Speech(nn.Module):
    """As Wav2Vec2: convolutions over a wave, then a transformer over their steps."""

    class Stage(nn.Module):
        def __init__(self, channels: int, norm: str) -> None:
            super().__init__()
            self.conv = nn.Conv1d(channels, 16, 3, stride=2)
            self.norm = nn.LayerNorm(16) if norm == "layer" else nn.GroupNorm(16, 16)
            self.act = nn.GELU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            last = isinstance(self.norm, nn.LayerNorm)
            x = self.norm(x.transpose(-2, -1)).transpose(-2, -1) if last else self.norm(x)
            return self.act(x)

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.stages = nn.ModuleList(self.Stage(1 if index == 0 else 16, norm) for index in range(3))
        self.proj = nn.Linear(16, 24)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(24, 2, 32, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        for stage in self.stages:
            x = stage(x)
        x = self.proj(x.transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("layers", [None, "**"])
@pytest.mark.parametrize("length", [200, 135, 131, 263, 71])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_speech_of_any_length(norm: str, length: int, layers: Any) -> None:
    """135 samples give 16 steps in the last stage, as many as channels; 71 give them in the second."""
    model = Speech(norm).eval()
    rec = run(model, torch.randn(2, length), layers=layers)
    found = axes(rec)
    for index in range(3):
        assert found[f"stages.{index}"] in ((16, 1), (None, None))
        if layers is not None:
            assert found[f"stages.{index}.conv"] == (16, 1)
            assert found[f"stages.{index}.norm"] == (16, -1 if norm == "layer" else 1)
            assert found[f"stages.{index}.act"] in ((16, 1), (None, None))
    if length not in (135, 71, 263):  # 263 gives as many steps as hidden features
        assert (None, None) not in found.values()
    assert found["blocks.1"] == found[""] == (24, -1)


# -- stages of vision models -------------------------------------------------------------------------------------------------


class ChannelsFirst(nn.Module):
    """A stage that gives maps, channels first, and holds no convolution."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm, self.mlp = (
            nn.LayerNorm(channels),
            nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, out)),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        tokens = self.mlp(self.norm(x.flatten(2).transpose(1, 2)))
        return tokens.transpose(1, 2).reshape(batch, -1, height, width)


class ChannelsLast(ChannelsFirst):
    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(x))


class Stages(nn.Module):
    def __init__(self, kind: type[ChannelsFirst], stem: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1) if stem else nn.Linear(3, 8)
        self.stages = nn.Sequential(kind(8, 12), kind(12, 12), kind(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


@pytest.mark.parametrize("of", ["output", "gradient"])
@pytest.mark.parametrize("size", [(7, 5), (9, 9), (12, 12), (16, 16), (12, 5), (8, 16)])
def test_stages_channels_first_without_convolutions(size: tuple[int, int], of: str) -> None:
    """Also where maps are as high, as wide, or both, as they have channels."""
    model = Stages(ChannelsFirst)
    found = axes(run(model, torch.randn(2, 3, *size), layers=None, of=of))
    widths = {"stages.0": 12, "stages.1": 12, "stages.2": 16, "": 16}
    assert {name: value for name, value in found.items() if value[0]}.items() <= {
        name: (width, 1) for name, width in widths.items()
    }.items()
    for name, width in widths.items():
        assert width in size or found[name] == (width, 1)


@pytest.mark.parametrize("of", ["output", "gradient"])
@pytest.mark.parametrize("size", [(7, 5), (9, 9), (12, 12), (16, 16), (12, 5), (8, 16)])
def test_stages_channels_last(size: tuple[int, int], of: str) -> None:
    model = Stages(ChannelsLast, stem=False)
    found = axes(run(model, torch.randn(2, *size, 3), layers=None, of=of))
    widths = {"stages.0": 12, "stages.1": 12, "stages.2": 16, "": 16}
    for name, width in widths.items():
        assert found[name] == (width, -1) or (width in size and found[name] == (None, None))  # as wide as the map


@COMPILER_WARNINGS
@pytest.mark.parametrize(("kind", "dim"), [(ChannelsFirst, 1), (ChannelsLast, -1)])
def test_stages_compiled(kind: type[ChannelsFirst], dim: int) -> None:
    model = Stages(kind, stem=dim == 1)
    for size in ((7, 5), (12, 12)):
        torch.compiler.reset()
        x = torch.randn(2, 3, *size) if dim == 1 else torch.randn(2, *size, 3)
        found = axes(run(model, x, layers=None, call=torch.compile(model, backend="eager", fullgraph=True)))
        assert {value for value in found.values() if value[0]} <= {(12, dim), (16, dim)}
        if size == (7, 5):
            assert len([value for value in found.values() if value[0]]) == 4


def test_a_convolutional_block_with_a_layer_norm_in_the_middle() -> None:
    """As ConvNeXt: channels last inside, and first outside; its activation function is inside."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        return x + self.pwconv2(self.act(self.pwconv1(self.norm(y)))).permute(0, 3, 1, 2)

    def block() -> nn.Module:
        parts = {"norm": nn.LayerNorm(8), "pwconv1": nn.Linear(8, 32), "act": nn.GELU(), "pwconv2": nn.Linear(32, 8)}
        return Calls(forward, dwconv=nn.Conv2d(8, 8, 3, padding=1, groups=8), **parts)

    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), block(), block())
    for size in ((28, 20), (32, 32)):
        found = axes(run(model, torch.randn(2, 3, *size)))
        for index in (1, 2):
            assert found[f"{index}.act"] == (32, -1)
            assert found[f"{index}.pwconv2"] == (8, -1)
            assert found[f"{index}"] in ([(8, 1)] if size == (28, 20) else [(8, 1), (None, None)])


def test_a_resnet_and_its_shared_activation_function() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    for size in (64, 96):
        rec = run(model, torch.randn(2, 3, size, size), layers=None)
        assert axes(rec) == {**{f"layer{i}.{j}": (32 * 2**i, 1) for i in (1, 2, 3, 4) for j in (0, 1)}, "": (10, -1)}
    with told() as texts, torchprobe.record(model, "**") as rec:
        model(torch.randn(2, 3, 64, 64))
    found = axes(rec)
    assert texts == []
    assert {dim for _, dim in found.values()} == {1, -1}
    assert [name for name, (_, dim) in found.items() if dim == -1] == ["fc", ""]
    assert found["avgpool"] == (512, 1)


# -- several tensors ---------------------------------------------------------------------------------------------------------


class Joint(nn.Module):
    """A block with two streams, as in SD3: text of 7 tokens, and an image of 9."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.text, self.image, self.last = nn.Linear(8, 8), nn.Linear(8, 8), last

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor | None, Tensor]:
        both = text.mean(1, keepdim=True) + image.mean(1, keepdim=True)
        return None if self.last else self.text(text + both), self.image(image + both)


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joint(), Joint(), Joint(last=True)])

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        for block in self.blocks:
            text, image = block(text, image)
        return image


def streams(seen: dict[str, list[Any]], of: str) -> dict[str, Tensor]:
    return {
        f"blocks.{i}:{j}": together([found[j] for found in seen[f"blocks.{i}"]])
        for i in range(3)
        for j in range(2)
        if seen[f"blocks.{i}"][0][j] is not None
    }


@pytest.mark.parametrize("tokens", [(7, 9), (9, 9)])
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_each_stream_has_a_row_of_its_own(of: str, tokens: tuple[int, int]) -> None:
    model, data = TwoStreams(), [(torch.randn(3, tokens[0], 8), torch.randn(3, tokens[1], 8)) for _ in range(2)]
    with torchprobe.record(model, of=of) as rec, witnessed(model, of) as seen:
        for text, image in data:
            model(text.requires_grad_(), image.requires_grad_()).square().sum().backward()
    expected = streams(seen, of)
    assert set(rec.layers) == {"blocks.0:0", "blocks.0:1", "blocks.1:0", "blocks.1:1", "blocks.2", ""}
    for name, x in expected.items():
        oracle.assert_close(rec[name], x)  # blocks.2 has one stream; its place is a name for it, too
    assert rec["blocks.2"].vectors + rec["blocks.2"].constant_vectors == 2 * 3 * tokens[1]


@COMPILER_WARNINGS
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_each_stream_has_a_row_of_its_own_compiled(of: str) -> None:
    model, data = TwoStreams().double(), [(torch.randn(3, 7, 8).double(), torch.randn(3, 9, 8).double()) for _ in range(2)]
    recordings = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with torchprobe.record(model, "blocks.*", of=of) as rec:
            for text, image in data:
                call(text.clone().requires_grad_(), image.clone().requires_grad_()).square().sum().backward()
        recordings.append(rec)
    plain, seen = recordings
    assert sorted(plain.layers) == sorted(seen.layers) == ["blocks.0:0", "blocks.0:1", "blocks.1:0", "blocks.1:1", "blocks.2"]
    for layer in plain:
        torch.testing.assert_close(seen[layer].state, plain[layer].state, rtol=1e-12, atol=1e-12)


def test_streams_in_files_resumed_and_merged(tmp_path: Path) -> None:
    model, data = TwoStreams(), [(torch.randn(3, 7, 8), torch.randn(3, 9, 8)) for _ in range(3)]
    with torchprobe.record(model) as whole:
        for batch in data:
            model(*batch)
    with torchprobe.record(model) as first:
        model(*data[0])
        first.snapshot(0)
    first.save(tmp_path / "run.safetensors")
    loaded = torchprobe.load(tmp_path / "run.safetensors")
    assert loaded.layers == first.layers == whole.layers
    rest = torchprobe.record(model)
    rest.load_state_dict(first.state_dict())
    with rest:
        for batch in data[1:]:
            model(*batch)
    assert rest.layers == whole.layers
    second = torchprobe.record(model)
    with second:
        for batch in data[1:]:
            model(*batch)
    merged = torchprobe.load(tmp_path / "run.safetensors").merge(second)
    fresh = torchprobe.record(model).merge(first).merge(second)
    for layer in whole:
        for other in (rest.total, merged.total, fresh.total):
            assert other[layer].vectors == whole[layer].vectors
            torch.testing.assert_close(other[layer].kurtosis, whole[layer].kurtosis, rtol=1e-9, atol=0)
    assert {name.rpartition("/")[0] for name in whole.metrics()} == set(whole)


def test_streams_with_a_recorder_of_several_kinds() -> None:
    model = TwoStreams()
    with torchprobe.record(model, "blocks.[01]", of=("output", "gradient")) as rec:
        model(torch.randn(3, 7, 8), torch.randn(3, 9, 8)).sum().backward()
    assert set(rec.layers) == {f"blocks.{i}:{j}{kind}" for i in (0, 1) for j in (0, 1) for kind in ("", "@gradient")}


@pytest.mark.parametrize("tokens", [5, 6])  # as many as features
@pytest.mark.parametrize("of", ["output", "gradient"])
def test_attention_weights_are_no_stream(of: str, tokens: int) -> None:
    model = Calls(lambda self, x: self.attn(x, x, x)[0], attn=nn.MultiheadAttention(6, 2, batch_first=True))
    with told() as texts, torchprobe.record(model, "attn", of=of) as rec:
        model(torch.randn(3, tokens, 6)).square().sum().backward()
    assert rec.layers == ["attn"]
    assert texts == []
    assert rec["attn"].vectors == 3 * tokens


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_give_their_steps(kind: type[nn.RNNBase], both: bool) -> None:
    """And not their last state, which is among the steps."""
    model = Calls(lambda self, x: self.layer(x)[0], layer=kind(8, 6, batch_first=True, bidirectional=both))
    x = torch.randn(3, 5, 8)
    with torchprobe.record(model, "**") as rec:
        out = model(x)
    assert axes(rec) == dict.fromkeys(["layer", ""], (12 if both else 6, -1))
    oracle.assert_close(rec["layer"], out)


def test_a_cache_and_hidden_states_beside_the_output() -> None:
    """As blocks of transformers give them: deeper structures do not count."""

    def forward(self: Any, x: Tensor) -> Any:
        y = self.layer(x)
        return y, (y[:, :2], y[:, 2:]), torch.softmax(y @ y.transpose(1, 2), -1)[:, None]

    model = nn.Sequential(Calls(forward, layer=nn.Linear(8, 8)))
    x = torch.randn(3, 5, 8)
    with torchprobe.record(model, ["0", "0.layer"]) as rec:
        out = model(x)[0]
    assert axes(rec) == {"0.layer": (8, -1), "0": (8, -1)}
    oracle.assert_close(rec["0"], out)


# -- equal sizes -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


@pytest.mark.parametrize("of", ["output", "gradient", "input"])
@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 6, 6), (6, 5, 6), (6, 6, 6), (12, 12, 6), (1, 1, 6)])
def test_as_many_tokens_or_inputs_as_features(shape: tuple[int, ...], of: str) -> None:
    model = nn.Sequential(*[Block(6) for _ in range(2)])
    found = axes(run(model, torch.randn(shape), of=of, exclude="**.out_proj"))
    for name, (features, dim) in found.items():
        inside = ("mlp.1", "mlp.2") if of == "input" else ("mlp.0", "mlp.1")
        assert (features, dim) in ((12 if name.endswith(inside) else 6, -1), (None, None)), name
    assert found["0.attn"] == found["0.norm"] == (6, -1)
    if shape == (3, 5, 6):
        assert (None, None) not in found.values()


@pytest.mark.parametrize("batch", [4, 6, 12])
def test_as_many_inputs_as_features_without_tokens(batch: int) -> None:
    """A square matrix may compare each input with each. Linear layers say that theirs do not."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), Calls(lambda self, x: x + self.layer(x), layer=nn.Linear(6, 6)), nn.Linear(6, 12))
    found = axes(run(model, torch.randn(batch, 8)))
    widths = {"0": 6, "1": 6, "2.layer": 6, "2": 6, "3": 12, "": 12}
    for name, width in widths.items():
        assert found[name] in ([(width, -1)] if batch != 6 or name != "2" else [(width, -1), (None, None)]), name
    with told(), torchprobe.record(model, "**") as rec:
        for size in (batch, batch + 1):
            model(torch.randn(size, 8))
    found = axes(rec)
    assert found == {name: (width, -1) for name, width in widths.items()}


@pytest.mark.parametrize("size", [(5, 7), (6, 6), (6, 7), (7, 6)])
@pytest.mark.parametrize("batch", [2, 6])
def test_maps_as_high_or_wide_as_they_have_channels(size: tuple[int, int], batch: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.GELU(),
        Calls(lambda self, x: x + self.norm(self.conv(x)), conv=nn.Conv2d(6, 6, 3, padding=1), norm=nn.BatchNorm2d(6)),
        nn.Dropout2d(0.1),
        nn.Conv2d(6, 6, 1),
    )
    found = axes(run(model, torch.randn(batch, 3, *size)))
    assert set(found.values()) == {(6, 1)}


def test_a_transposed_activation_follows_the_order_in_memory() -> None:
    """The layer norm gives (batch, 6 tokens, 6 features). Its transpose has the same shape, and other features."""
    model = Calls(lambda self, x: self.act(self.norm(x).transpose(1, 2)), norm=nn.LayerNorm(6), act=nn.GELU())
    for tokens in (5, 6):
        found = axes(run(model, torch.randn(3, tokens, 6)))
        assert found["norm"] == (6, -1)
        assert found["act"] in [(6, 1)] if tokens == 5 else [(6, 1), (None, None)]
        assert found[""] in [(6, 1)] if tokens == 5 else [(6, 1), (None, None)]


# -- what modules say themselves -----------------------------------------------------------------------------------------------


class Positions(nn.Module):
    """Adds something learned to tokens."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


@pytest.mark.parametrize("shape", [(1, 7, 16), (7, 16), (1, 1, 16), (16,)])
def test_learned_positions_follow_the_tokens(shape: tuple[int, ...]) -> None:
    for inputs in ((5, 7, 8), (16, 7, 8), (7, 7, 8)):
        found = axes(run(nn.Sequential(nn.Linear(8, 16), Positions(*shape)), torch.randn(inputs)))
        assert found == {"0": (16, -1), "1": (16, -1), "": (16, -1)}


class Matrix(nn.Module):
    """A linear layer of one's own, whose parameter has a name of its own: (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


@pytest.mark.parametrize("tokens", [7, 16, 8])
def test_a_matrix_of_ones_own(tokens: int) -> None:
    """As many tokens as input features are no features."""
    for model in (Matrix(16, 8), nn.Sequential(Matrix(16, 8), nn.ReLU()), nn.Sequential(nn.Linear(16, 16), Matrix(16, 8))):
        found = axes(run(model, torch.randn(5, tokens, 16)))
        found.pop("0") if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Linear) else None
        assert set(found.values()) <= {(8, -1), (None, None)}


class Scale(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (Scale(6), (2, 5, 6), -1),
        (Scale(6, 1, 1), (2, 6, 5, 7), 1),
        (Scale(1, 6, 1, 1), (2, 6, 6, 6), 1),
        (Scale(6, 1), (2, 6, 9), 1),
        (nn.GroupNorm(2, 6), (2, 6, 6), 1),
        (nn.GroupNorm(2, 6), (6, 6), -1),
        (nn.LayerNorm(6), (6, 6, 6, 6), -1),
        (nn.RMSNorm(6), (2, 6, 6), -1),
        (nn.InstanceNorm1d(6), (2, 6, 6), 1),
        (nn.PixelShuffle(2), (2, 24, 6, 6), 1),
        (nn.Bilinear(6, 6, 6), (2, 6, 6), -1),
        (nn.Embedding(6, 6), (6, 6), -1),
        (nn.EmbeddingBag(6, 6), (6, 6), -1),
        (nn.ConvTranspose1d(6, 6, 1), (6, 6, 6), 1),
        (nn.Conv3d(6, 6, 1), (6, 6, 6, 6, 6), 1),
        (nn.PReLU(6), (2, 6, 5), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_that_say_it(layer: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    model = Calls(lambda self, *x: self.layer(*x), layer=layer)
    x = torch.randint(0, 6, shape) if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) else torch.randn(shape)
    with torchprobe.record(model, "layer") as rec:
        model(*([x, x] if isinstance(layer, nn.Bilinear) else [x]))
    assert axes(rec) == {"layer": (6, expected)}


# -- unsure --------------------------------------------------------------------------------------------------------------------


def unclear() -> nn.Module:
    """The layer ``odd`` gives maps with 6 channels first. If they are as high and as wide, nothing says so."""
    odd = Calls(
        lambda self, x: self.layer(x.flatten(1, 2)).transpose(1, 2).reshape(len(x), 6, *x.shape[1:3]).contiguous(), layer=nn.Linear(8, 6)
    )
    return nn.Sequential(odd)


def maps(*sizes: tuple[int, int, int]) -> list[Tensor]:
    return [torch.randn(*size, 8) for size in sizes]


@pytest.mark.parametrize("of", ["output", "gradient"])
def test_unsure_is_said_everywhere(of: str, tmp_path: Path) -> None:
    model = unclear()
    with told() as texts, torchprobe.record(model, "**", of=of) as rec:
        for x in maps((5, 6, 6), (5, 6, 6)):
            model(x).square().sum().backward()
    assert rec.layers == ["0.layer"]
    assert "layer '0' was not read: unsure which dimension of its activations (5, 6, 6, 6) holds features" in texts[0]
    assert "Pass feature_dim={'0': …}" in texts[0]
    assert "  '0', '': 2 calls left out: unsure" in texts[-1] or "  '', '0': 2 calls left out: unsure" in texts[-1]
    assert len(texts) == 2
    rows = {row["layer"]: row for row in rec.rows()}
    assert list(rows) == ["0.layer", "0", ""]
    for name in ("0", ""):
        row = rows[name]
        assert (row["features"], row["feature_dim"], row["feature_dim_by"], row["of"]) == (None, None, "unsure", of)
        assert all(row[field] != row[field] for field in rec.fields)  # nan
        assert name not in rec
    assert rows["0.layer"]["feature_dim_by"] == "Linear"
    assert rec.table().row_count == 3
    assert "unsure" in "".join(str(cell) for column in rec.table().columns for cell in column.cells)
    with pytest.raises(KeyError, match="layer '0' is recorded, but could not be read: unsure"):
        rec["0"]
    assert {name.split("/")[0] for name in rec.metrics()} == {"0.layer"}
    rec.save(tmp_path / "run.safetensors")
    loaded = torchprobe.load(tmp_path / "run.safetensors")
    assert [(row["layer"], row["feature_dim_by"], row["of"]) for row in loaded.rows()] == [
        ("0.layer", "Linear", of),
        ("0", "unsure", of),
        ("", "unsure", of),
    ]
    assert loaded.layers == ["0.layer"]
    assert [row["layer"] for row in rec.total.rows()] == ["0.layer", "0", ""]


@COMPILER_WARNINGS
def test_unsure_compiled() -> None:
    model = unclear()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with told() as texts, torchprobe.record(model, "**") as rec:
        for x in maps((5, 6, 6), (5, 6, 6)):
            out = compiled(x)
    torch.testing.assert_close(out, model(x))
    assert rec.layers == ["0.layer"]
    assert {row["layer"] for row in rec.rows() if row["feature_dim_by"] == "unsure"} == {"0", ""}
    assert "unsure" in texts[-1]


@pytest.mark.parametrize("dim", [1, -1, 2])
def test_feature_dim_settles_it(dim: int) -> None:
    model, (x,) = unclear(), maps((5, 6, 6))
    for given in ({"0": dim, "": dim}, {"**": dim}, dim):
        with torchprobe.record(model, ["0", ""], feature_dim=given) as rec:
            out = model(x)
        for name in ("0", ""):
            oracle.assert_close(rec[name], out, dim)
        assert {row["feature_dim_by"] for row in rec.rows()} == {"feature_dim="}


@pytest.mark.parametrize("other", [(5, 5, 4), (5, 9, 7), (5, 1, 1), (2, 12, 5)])
def test_a_second_shape_settles_it(other: tuple[int, int, int]) -> None:
    """Maps may be higher or wider, features stay as many."""
    model = unclear()
    with told() as texts, torchprobe.record(model, "**") as rec, witnessed(model) as seen:
        for x in maps((5, 6, 6), (5, 6, 6), other, (5, 6, 6)):
            model(x)
    assert axes(rec) == {"0.layer": (6, -1), "0": (6, 1), "": (6, 1)}
    oracle.assert_close(rec["0"], together(seen["0"][2:], 1))  # what came before is left out
    rows = {row["layer"]: row for row in rec.rows()}
    assert rows["0"]["feature_dim_by"] == "width 6 in two shapes"
    assert "2 of 3 layers were not read in every call:" in texts[-1]
    assert "2 calls left out: unsure" in texts[-1]


def test_a_second_shape_may_leave_it_open() -> None:
    """Another batch says nothing of maps. Another height leaves two of three. The third shape settles it."""
    model = unclear()
    with told(), torchprobe.record(model, "**") as rec:
        for x in maps((5, 6, 6), (4, 6, 6), (6, 6, 6), (5, 4, 6)):
            model(x)
            assert rec.layers == ["0.layer"]
        model(maps((5, 4, 3))[0])
    assert axes(rec)["0"] == axes(rec)[""] == (6, 1)
    assert rec["0"].vectors == 5 * 12


def test_a_size_that_fits_nowhere_any_more_counts_no_features() -> None:
    odd = Calls(lambda self, x: self.layer(x)[:, :, : x.shape[1]], layer=nn.Linear(8, 6))  # (batch, tokens, tokens)
    model = nn.Sequential(odd)
    with told() as texts, torchprobe.record(model, "0") as rec:
        for tokens in (6, 5, 6):
            model(torch.randn(4, tokens, 8))
    assert rec.layers == []
    assert "'0'" in texts[-1]


def test_windows_before_and_after_it_is_settled() -> None:
    model = unclear()
    with told(), torchprobe.record(model, "**") as rec:
        for step, x in enumerate(maps((5, 6, 6), (5, 3, 2), (5, 6, 6))):
            model(x)
            rec.snapshot(step)
    column = rec.history["vectors"][:, rec.history.layers.index("0")].tolist()
    assert column[0] != column[0]
    assert column[1:] == [30.0, 180.0]
    assert rec.total["0"].vectors == 210


def test_a_resumed_recording_keeps_what_was_clear() -> None:
    """The state says which dimension it was. The new run has seen one shape only, and counts the same features."""
    model = unclear()
    with told(), torchprobe.record(model, "**") as first:
        for x in maps((5, 6, 6), (5, 4, 3)):
            model(x)
    second = torchprobe.record(model, "**")
    second.load_state_dict(first.state_dict())
    with told(), second, witnessed(model) as seen:
        model(maps((5, 6, 6))[0])
    assert axes(second) == axes(first)
    assert second["0"].vectors in (60, 60 + 180)
    if second["0"].vectors == 240:
        torch.testing.assert_close(second["0"].max, torch.maximum(first["0"].max, together(seen["0"], 1).amax(0)))


@pytest.mark.parametrize("kind", ["view", "copy"])
@pytest.mark.parametrize("tokens", [5, 6])
def test_a_block_that_transposes(tokens: int, kind: str) -> None:
    """A copy has an order in memory of its own, which says nothing."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.layer(x).transpose(1, 2)
        return y if kind == "view" else y.contiguous()

    model = nn.Sequential(Calls(forward, layer=nn.Linear(8, 6)))
    found = axes(run(model, torch.randn(5, tokens, 8)))
    assert found["0.layer"] == (6, -1)
    for name in ("0", ""):
        assert found[name] in ([(6, 1)] if tokens == 5 else [(6, 1), (None, None)])


@pytest.mark.parametrize("tokens", [5, 6])
def test_a_layer_without_parameters_that_transposes(tokens: int) -> None:
    model = nn.Sequential(
        nn.Linear(8, 6), Calls(lambda self, x: x.transpose(1, 2) + 0), Calls(lambda self, x: x.transpose(1, 2).contiguous())
    )
    found = axes(run(model, torch.randn(5, tokens, 8)))
    assert found["0"] == (6, -1)
    assert found["1"] in ([(6, 1)] if tokens == 5 else [(6, 1), (None, None)])
    assert found["2"] in ([(6, -1)] if tokens == 5 else [(6, -1), (None, None)])


@pytest.mark.parametrize("tokens", [5, 12])
@pytest.mark.parametrize(
    ("layer", "width"), [(nn.GLU(), 6), (Calls(lambda self, x: x[..., :5]), 5), (Calls(lambda self, x: torch.cat([x, x[..., :1]], -1)), 13)]
)
def test_a_layer_without_parameters_that_changes_the_width(layer: nn.Module, width: int, tokens: int) -> None:
    """There may be as many tokens as features before it."""
    found = axes(run(nn.Sequential(nn.Linear(8, 12), layer), torch.randn(3, tokens, 8)))
    assert found["0"] == (12, -1)
    assert found["1"] in [(width, -1), (None, None)]
    assert found[""] in [(width, -1), (None, None)]


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 6), (6, 6), (6,)])
def test_a_model_without_layers_has_conventions(shape: tuple[int, ...]) -> None:
    with told(), torchprobe.record(model := Calls(lambda self, x: x * 2), "**") as rec:
        model(torch.randn(shape))
    (row,) = rec.rows()
    assert row["feature_dim_by"].startswith("convention") or row["feature_dim_by"] == "unsure"
    assert row["feature_dim"] in (-1, None)


def test_the_row_says_by_what() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), Calls(lambda self, x: self.conv(x) + 1, conv=nn.Conv2d(6, 4, 1)))
    with torchprobe.record(model, "**") as rec:
        model(torch.randn(2, 3, 5, 7))
    by = {row["layer"]: row["feature_dim_by"] for row in rec.rows()}
    assert by == {"0": "Conv2d", "1": "as '0'", "2.conv": "Conv2d", "2": "as '2.conv'", "": "the output of '2'"}


def test_an_explicit_name_is_told_and_no_error() -> None:
    """Unsure is no mistake of the user."""
    model, (x,) = unclear(), maps((5, 6, 6))
    with told() as texts, torchprobe.record(model, ["0"]) as rec:
        out = model(x)
    assert out.shape == (5, 6, 6, 6)
    assert rec.layers == []
    assert len(texts) == 2
    with pytest.raises(ValueError, match="layer '0': unsure"), torchprobe.record(model, ["0"], on_error="raise"):
        model(x)


def test_hooks_that_look_for_the_dimension_are_gone_after_two_forwards() -> None:
    model = nn.Sequential(nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), nn.ReLU())
    x = torch.randn(5, 4, 9)
    with torchprobe.record(model, "2") as rec:
        assert len(model[0]._forward_hooks) == 1
        model(x)
        model(x)
        assert [len(layer._forward_hooks) for layer in model] == [0, 0, 1]
        model(x)
    assert rec["2"].vectors == 3 * 5 * 7


class Halved(nn.Module):
    """A fixed filter along time: its one buffer says nothing of the width."""

    def __init__(self, taps: int) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.ones(taps) / taps)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.kernel[None, None].expand(x.shape[1], 1, -1)
        return torch.nn.functional.conv1d(x, weight, stride=2, groups=x.shape[1])


@pytest.mark.parametrize("taps", [4, 8])
@pytest.mark.parametrize("length", [16, 20, 22])
def test_the_kernel_of_a_fixed_filter_is_no_width(taps: int, length: int) -> None:
    rec = run(nn.Sequential(nn.Conv1d(2, 32, 1), Halved(taps)), torch.randn(3, 2, length))
    assert axes(rec)["1"] in [(32, 1), (None, None)]


class Modulated(nn.Module):
    """A vector for each input, twice as wide as the features, scales and shifts the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.linear(x.mean(1)).chunk(2, dim=-1)
        return x * (1 + scale[:, None]) + shift[:, None]


@pytest.mark.parametrize("tokens", [7, 16, 32])
def test_a_vector_that_modulates_tokens_is_not_their_width(tokens: int) -> None:
    model = nn.Sequential(nn.Linear(3, 16), nn.LayerNorm(16), Modulated(16), nn.Linear(16, 5))
    rec = run(model, torch.randn(2, tokens, 3))
    assert axes(rec)["2"] == ((None, None) if tokens == 32 else (16, -1)) and axes(rec)["1"] == (16, -1)
