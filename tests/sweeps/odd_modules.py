"""Small modules with what real models have beside layers: metrics, samplers, outputs without features, structures of all kinds."""

from __future__ import annotations

import dataclasses
from collections import namedtuple
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, INNER = 16, 24

Pair = namedtuple("Pair", "hidden state")


@dataclasses.dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None
    loss: Tensor | None = None


class Body(nn.Module):
    """Two blocks; what stands around them is what each case is about."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Scalars(nn.Module):
    """(B,) from a head, as in value functions and regressions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), Squeezed()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).squeeze(-1)


class Similarity(nn.Module):
    """(B, B) logits, as in CLIP."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


class TwoTowers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.similarity = Body(), Body(), Similarity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.similarity(self.left(x).mean(1), self.right(x).amax(1))
        return logits, logits.T


class WithMetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from torchmetrics import Accuracy, MeanMetric, MetricCollection

        self.body, self.head = Body(), nn.Linear(WIDTH, 5)
        self.metrics = MetricCollection({"accuracy": Accuracy(task="multiclass", num_classes=5)})
        self.mean = MeanMetric()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x).mean(1))
        self.metrics(logits.detach(), y)
        self.mean(logits.detach().mean())
        return F.cross_entropy(logits, y)


class Sampler(nn.Module):
    """Returns token numbers, as samplers and quantizers do."""

    def forward(self, logits: Tensor) -> Tensor:
        return torch.distributions.Categorical(logits=logits).sample()


class Sampling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head, self.sampler = nn.Embedding(32, WIDTH), Body(), nn.Linear(WIDTH, 32), Sampler()

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(self.embedding(ids)))
        return logits, self.sampler(logits)


class Masks(nn.Module):
    """Bool, int and 0-dimensional outputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x > 0, (x * 10).long(), x.mean()


class BoolsAndInts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.masks, self.largest = Body(), Masks(), Largest()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        keep, _, mean = self.masks(x)
        return x * keep + mean + self.largest(x)[..., None]


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


class Nothing(nn.Module):
    """A hook or logger of the user: it returns None."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, x: Tensor) -> None:
        self.seen += 1


class Nones(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH), Nothing(), nn.Linear(WIDTH, WIDTH), Nothing(), Sometimes()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = layer(x)
            x = x if y is None else y
        return x


class Sometimes(nn.Module):
    """None for one batch and a tensor for the next."""

    def forward(self, x: Tensor) -> Tensor | None:
        return x * 2 if x.shape[0] % 2 else None


class Structures(nn.Module):
    """Dicts, dataclasses, named tuples and lists inside of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.dicts, self.answers, self.pairs, self.lists = AsDict(), AsDataclass(), AsPair(), AsList()

    def forward(self, x: Tensor) -> Answer:
        x = self.dicts(x)["last"]
        answer = self.answers(x)
        pair = self.pairs(answer.logits)
        return Answer(self.lists(pair.hidden)[-1], pair.state[0])


class AsDict(Body):
    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return {"mask": None, "step": 3, "all": [x], "last": super().forward(x)}


class AsDataclass(Body):
    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        y = super().forward(x)
        return Answer(y, x, y.mean())


class AsPair(Body):
    def forward(self, x: Tensor) -> Pair:  # type: ignore[override]
        y = super().forward(x)
        return Pair(y, (y.mean(1), None))


class AsList(Body):
    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [x, super().forward(x)]


class Generators(nn.Module):
    """A child that yields its outputs one by one, and empty structures."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.empty = Steps(), Empty()

    def forward(self, x: Tensor) -> Tensor:
        self.empty(x)
        for y in self.steps(x):
            x = y
        return x


class Steps(Body):
    def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
        for block in self.blocks:
            x = x + block(x)
            yield x


class Empty(nn.Module):
    def forward(self, x: Tensor) -> tuple[Any, ...]:
        return (), {}, [], x[:0], x.new_empty(x.shape[0], 0)


class Distributions(nn.Module):
    """Objects that are no structures."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.policy = Body(), Policy()

    def forward(self, x: Tensor) -> Tensor:
        return self.policy(self.body(x)).rsample()


class Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.linear(x), 1.0)


class Widths(nn.Module):
    """A layer that many widths go through, and lengths that come from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.act, self.drop = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.GELU(), nn.Dropout(0.1)
        self.softmax = nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.act(self.up(self.drop(self.act(self.down(x))))))
        return self.drop(self.softmax(y @ y.mT)) @ y


class Reused(nn.Module):
    """One module in two places, modules that return their input, modules that change it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.alias, self.identity, self.empty, self.relu = self.linear, nn.Identity(), nn.Sequential(), nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        h = self.relu(self.alias(h) + 1) + 3 * self.identity(h)
        return self.drop(self.empty(h)) + h


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **arguments: Any) -> None:
        super().__init__()
        self.rnn = kind(WIDTH, INNER, batch_first=True, **arguments)
        self.cell, self.head = nn.GRUCell(INNER, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(self.cell(y[:, -1, :INNER]))


class Packed(nn.Module):
    """Packed sequences are data classes of a kind that cannot be made from their fields in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.pack, self.rnn, self.head = Pack(), nn.LSTM(WIDTH, INNER, batch_first=True), nn.Linear(INNER, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed, _ = self.rnn(self.pack(x))
        return self.head(packed.data)


class Pack(nn.Module):
    def forward(self, x: Tensor) -> Any:
        lengths = torch.arange(x.shape[0]) % 3 + x.shape[1] - 2
        return nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Body(), Body(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self.first, x, use_reentrant=False)
        return self.head(checkpoint(self.second, y, use_reentrant=False))


class Functional(nn.Module):
    """A child that is called under ``no_grad``, in another precision and inside ``vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.student, self.low = Body(), Body(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.teacher(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = self.low(x)
        return self.student(y.float()) - target


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.spectrum = Body(), Spectrum()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.fft.irfft(self.spectrum(x), n=WIDTH))


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x)


class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, INNER))
        self.conv = nn.utils.parametrizations.spectral_norm(nn.Conv1d(INNER, WIDTH, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.linear(x).mT).mT


class OwnAttributes(nn.Module):
    """A module that refuses unknown attributes, and one that counts as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.pool = nn.ModuleDict({"a": Body(), "b/closed": Body()}), nn.AdaptiveAvgPool1d(1)

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        raise RuntimeError("a module is not true or false")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("forbidden"):
            raise RuntimeError(name)
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        for item in self.items.values():
            x = item(x)
        return self.pool(x.mT).squeeze(-1)
