"""Small models whose feature dimensions are known by construction, in shapes where sizes coincide.

Every model comes in several shapes: plain, as many positions as features, as many inputs in the batch as features, everything equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .case import Built, CannotBuild, Case, Inputs, randn

C = 12
"""The features of the layers in question."""

Axes = dict[str, int]


class Block1d(nn.Module):
    """A residual block over time; its output has no layer of its own at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.drop = nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C), nn.ReLU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.act(self.norm(self.conv(x))))


def conv1d() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(nn.Conv1d(C, C, 3, padding=1), nn.BatchNorm1d(C), nn.ReLU(), nn.Dropout(0.1), Block1d(), Block1d())
    return model, {name: 1 for name, _ in model.named_modules()}


def conv3d() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(nn.Conv3d(C, C, 3, padding=1), nn.BatchNorm3d(C), nn.ReLU(), nn.Dropout3d(0.1), nn.GELU(), nn.Conv3d(C, C, 1))
    return model, {name: 1 for name, _ in model.named_modules()}


class ChannelsLast(nn.Module):
    """A convolution inside of a block whose tensors are (batch, height, width, channels), as in ConvNeXt and MambaOut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.act, self.conv, self.down = (
            nn.LayerNorm(C),
            nn.Linear(C, 2 * C),
            nn.GELU(),
            Depthwise(),
            nn.Linear(2 * C, C),
        )
        self.path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.down(self.conv(self.act(self.up(self.norm(x))))))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * C, 2 * C, 3, padding=1, groups=2 * C)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ToLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


def channels_last() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(ToLast(), ChannelsLast(), ChannelsLast())
    axes = {name: 3 for name, _ in model.named_modules()}
    return model, {**axes, "1.conv.conv": 1, "2.conv.conv": 1}


class NormFirst(nn.Module):
    """Channels come first, without a convolution inside, as in stages of Swin v2 CR, NesT and PiT."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(C), nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(0, 2, 3, 1)
        return (y + self.mlp(self.norm(y))).permute(0, 3, 1, 2)


def norm_first() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(NormFirst(), NormFirst())
    axes = {name: 3 for name, _ in model.named_modules()}
    return model, {**axes, "": 1, "0": 1, "1": 1}


class Norm2d(nn.LayerNorm):
    """A layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def subclasses() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(nn.Conv2d(C, C, 1), Norm2d(C), nn.SiLU(), nn.Identity(), nn.Conv2d(C, C, 3, padding=1), Norm2d(C))
    return model, {name: 1 for name, _ in model.named_modules()}


class Tokens(nn.Module):
    """A hybrid: a convolutional stem, then tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C), nn.ReLU())
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(C, 3, 2 * C, batch_first=True, dropout=0.0) for _ in range(2))
        self.norm, self.act = nn.LayerNorm(C), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        for block in self.blocks:
            x = block(x)
        return self.act(self.norm(x))


def hybrid() -> tuple[nn.Module, Axes]:
    model = Tokens()
    axes = {"stem": 1, "stem.0": 1, "stem.1": 1, "stem.2": 1, "blocks.0": 2, "blocks.1": 2, "norm": 2, "act": 2, "": 2}
    return model, axes


class Mamba(nn.Module):
    """The shape of a Mamba block: a convolution over time between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.conv, self.act, self.out = (
            nn.RMSNorm(C),
            nn.Linear(C, 2 * C),
            nn.Conv1d(C, C, 4, groups=C, padding=3),
            nn.SiLU(),
            nn.Linear(C, C),
        )

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.into(self.norm(x)).chunk(2, -1)
        y = self.act(self.conv(y.mT)[..., : x.shape[1]].mT)
        return x + self.out(y * gate.sigmoid())


def mamba() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(Mamba(), Mamba())
    axes = {name: 2 for name, _ in model.named_modules()}
    return model, {**axes, "0.conv": 1, "1.conv": 1}


class Streams(nn.Module):
    """Two streams of one width and different lengths, as in SD3 and Flux."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last
        self.image, self.text = nn.Linear(C, C), nn.Linear(C, C)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor | None, Tensor]:
        text, image = text + self.text(text), image + self.image(image) + text.mean(1, keepdim=True)
        return (None if self.last else text), image


class TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Streams(False), Streams(False), Streams(True)])

    def forward(self, image: Tensor) -> Tensor:
        text: Tensor | None = image[:, :5]
        for block in self.blocks:
            text, image = block(text, image)
        return image


def two_streams() -> tuple[nn.Module, Axes]:
    model = TwoStreams()
    return model, {name: 2 for name, _ in model.named_modules()}


class Sequence(nn.Module):
    """Time comes first, then the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(C, 3, 2 * C, dropout=0.0) for _ in range(2))
        self.rnn = nn.GRU(C, C)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        y, _ = self.rnn(x)
        return y


def time_first() -> tuple[nn.Module, Axes]:
    model = Sequence()
    return model, {"": 2, "blocks.0": 2, "blocks.1": 2, "rnn": 2}


def mlp() -> tuple[nn.Module, Axes]:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.ReLU(), nn.Linear(C, C), nn.Softmax(-1))
    return model, {name: 1 for name, _ in model.named_modules()}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Axes]], str]] = {
    "conv1d": (conv1d, "bct"),
    "conv3d": (conv3d, "bcthw"),
    "channels last": (channels_last, "bchw"),
    "channels first without convolutions": (norm_first, "bchw"),
    "subclasses of layer norm": (subclasses, "bchw"),
    "hybrid": (hybrid, "bchw"),
    "mamba": (mamba, "btc"),
    "two streams": (two_streams, "btc"),
    "time first": (time_first, "tbc"),
    "mlp": (mlp, "bc"),
}
"""The model, and the layout of its input."""

SHAPES = {
    "plain": {"b": 4, "t": 10, "h": 6, "w": 7},
    "square": {"b": 4, "t": C, "h": C, "w": C},
    "batch of features": {"b": C, "t": 10, "h": 6, "w": 7},
    "one": {"b": 1, "t": 10, "h": 6, "w": 7},
    "all equal": {"b": C, "t": C, "h": C, "w": C},
}


def cases() -> Iterator[Case]:
    for name, (_, layout) in MODELS.items():
        for shape in SHAPES:
            if not (layout == "bc" and shape in ("square", "one")):
                yield Case("own", f"{name}/{shape}", lambda geometry, name=name, shape=shape: build(name, shape, geometry))  # type: ignore[misc]


def build(name: str, shape: str, geometry: int) -> Built:
    if geometry:
        raise CannotBuild("the truth is known by construction")
    make, layout = MODELS[name]
    model, axes = make()
    sizes = {"c": C, **SHAPES[shape]}

    def inputs(batch: int) -> Inputs:
        return (randn(*[sizes[letter] for letter in layout]),), {}

    torch.manual_seed(0)
    return Built(model, inputs, axes=axes, batched=False)
