"""``of="gradient"`` is what ``register_full_backward_hook`` sees, also where a module gives what it was given."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
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


def shortcut(layer: nn.Module) -> nn.Module:
    """The input of ``layer`` has another use, which must not count."""

    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.layer(h) + 3 * h

    return Calls(forward, fc=nn.Linear(8, 8), layer=layer)


class Pair(nn.Module):
    """Two tensors, of which the first feeds the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.first(x)
        return h, torch.tanh(self.second(h))


class Same(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return {"a": x, "b": [x]}


def both(layer: nn.Module) -> nn.Module:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.layer(x)
        return 2 * first.tanh() + 5 * second

    return Calls(forward, layer=layer)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "identity": lambda: shortcut(nn.Identity()),
    "empty sequential": lambda: shortcut(nn.Sequential()),
    "dropout in eval mode": lambda: shortcut(nn.Dropout(0.5)).eval(),
    "dropout of nothing": lambda: shortcut(nn.Dropout(0.0)),
    "nested identities": lambda: shortcut(nn.Sequential(nn.Identity(), nn.Sequential(nn.Identity()))),
    "its own input and more": lambda: shortcut(Calls(lambda self, x: x)),
    "a view of its input": lambda: shortcut(Calls(lambda self, x: x.view(x.shape))),
    "flatten of what is flat": lambda: shortcut(nn.Flatten()),
    "a layer": lambda: shortcut(nn.Linear(8, 8)),
    "relu": lambda: shortcut(nn.ReLU()),
    "used twice": lambda: Calls(lambda self, x: (lambda h: h.sin() + 3 * h.cos())(self.layer(x)), layer=nn.Linear(8, 8)),
    "called twice": lambda: Calls(lambda self, x: self.layer(x).sin() + 3 * self.layer(2 * x), layer=nn.Linear(8, 8)),
    "identity called twice": lambda: Calls(lambda self, x: self.layer(x).sin() + 3 * self.layer(x), layer=nn.Identity()),
    "identity after a layer": lambda: Calls(
        lambda self, x: (lambda h: self.layer(h).sin() * h)(self.fc(x)), fc=nn.Linear(8, 8), layer=nn.Identity()
    ),
}


def read(model: nn.Module, data: list[Tensor]) -> dict[str, list[Any]]:
    """The gradients of the outputs, in float64, by a hook of PyTorch."""
    with witnessed(model, "gradient") as seen:
        train(model, data)
    return seen


def train(call: Callable[[Tensor], Tensor], data: list[Tensor]) -> list[Tensor]:
    """Returns the gradients of the inputs."""
    grads = []
    for x in data:
        x = x.clone().requires_grad_()
        call(x).square().sum().backward()
        grads.append(x.grad)
    return grads


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in ((5, 8), (3, 8))]


def assert_read(rec: torchprobe.Recorder, seen: dict[str, list[Any]]) -> None:
    for layer in rec:
        if layer in seen:
            oracle.assert_close(rec[layer], together([grads[0] for grads in seen[layer]]))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_what_a_full_backward_hook_sees(make: Callable[[], nn.Module]) -> None:
    model, data = make(), batches()
    expected = read(model, data)
    model.zero_grad()
    plain = train(model, data)
    parameters = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for layers in ("layer", "**"):
        with told() as texts, torchprobe.record(model, layers, of="gradient") as rec:
            seen = train(model, data)
        assert texts == []
        assert "layer" in rec.layers
        assert_read(rec, expected)
        assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
        assert all(torch.equal(a, p.grad) for a, p in zip(parameters, model.parameters(), strict=True))
        model.zero_grad()


@COMPILER_WARNINGS
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_the_same_compiled(make: Callable[[], nn.Module]) -> None:
    model, data = make().double(), batches(torch.float64)[:1]
    expected, plain = read(model, data), train(model, data)
    call = torch.compile(model, backend="aot_eager", fullgraph=True)
    with told() as texts, torchprobe.record(model, "layer", of="gradient") as rec:
        seen = train(call, data)
    assert texts == []
    assert rec.layers == ["layer"]
    assert_read(rec, expected)
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)


def test_the_numbers_of_a_shortcut() -> None:
    """d(identity(h) + 3 h): 1 through the identity, and 4 in all."""
    model = shortcut(nn.Identity())
    with torchprobe.record(model, "layer", of="gradient") as rec:
        model(batches()[0]).sum().backward()
    assert rec["layer"].mean.tolist() == [1.0] * 8
    assert rec["layer"].max.tolist() == [1.0] * 8


def test_dropout_in_training() -> None:
    model = shortcut(nn.Dropout(0.5))
    with witnessed(model, "gradient") as seen, torchprobe.record(model, "**", of="gradient") as rec:
        train(model, batches())
    assert_read(rec, seen)


# -- modules that give several tensors -------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
def test_one_output_feeds_another(compiled: bool) -> None:
    """The gradient of the first is that of its uses outside of the module."""
    model, data = both(Pair()).double(), batches(torch.float64)
    expected, plain = read(model, data), train(model, data)
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else model
    with torchprobe.record(model, "layer", of="gradient") as rec:
        seen = train(call, data)
    assert rec.layers == ["layer:0", "layer:1"]
    for index in range(2):
        oracle.assert_close(rec[f"layer:{index}"], together([grads[index] for grads in expected["layer"]]))
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)


def test_one_tensor_under_two_names() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.layer(self.fc(x))
        return out["a"].sin() + out["b"][0]

    model, data = Calls(forward, fc=nn.Linear(8, 8), layer=Same()), batches()
    plain = train(model, data)
    with torchprobe.record(model, "layer", of="gradient") as rec:
        seen = train(model, data)
    assert rec["layer"].calls == 2
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


@pytest.mark.parametrize("container", [tuple, list, lambda pair: {"x": pair[0], "y": pair[1]}])
def test_the_container_stays_what_it_was(container: Callable[[Any], Any]) -> None:
    kinds = []

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.layer(x)
        kinds.append(type(out))
        values = list(out.values()) if isinstance(out, dict) else out
        return values[0] * 2 + values[1]

    model = Calls(forward, layer=Calls(lambda self, x: container(self.pair(x)), pair=Pair()))
    plain = train(model, batches()[:1])
    with torchprobe.record(model, "layer", of="gradient"):
        seen = train(model, batches()[:1])
    assert kinds[0] is kinds[1]
    assert len(plain) == len(seen)


def test_named_tuples_and_dataclasses_of_a_library() -> None:
    kinds = []

    def forward(self: Any, x: Tensor) -> Tensor:
        out = self.layer(x)
        kinds.append(out)
        return out.values * 2

    x = torch.randn(5, 8)
    model = Calls(forward, layer=Calls(lambda self, x: torch.max(self.fc(x)[:, None], 1), fc=nn.Linear(8, 8)))
    with torchprobe.record(model, "layer", of="gradient") as rec:
        train(model, [x])
    assert type(kinds[0]).__name__ == "max"
    assert rec["layer"].vectors == 5


# -- in place ------------------------------------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("before", [nn.Linear(8, 8), nn.Identity(), nn.Sequential(), nn.Dropout(0.0)], ids=lambda m: type(m).__name__)
def test_an_operation_in_place_after_the_layer(before: nn.Module, compiled: bool) -> None:
    """Without hooks the model runs. So it does with them, and the gradient is that of the layer's output, before the operation. Of a layer
    that gives its input it is lost in eager mode, and the report says so; a full backward hook would end the run."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.relu(self.layer(self.fc(x))) * 3

    model, data = Calls(forward, fc=nn.Linear(8, 8), layer=before, relu=nn.ReLU(inplace=True)).double(), batches(torch.float64)[:1]
    plain = train(model, data)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with told() as texts, torchprobe.record(model, ["fc", "layer", "relu"], of="gradient") as rec:
        seen = train(call, data)
    torch.testing.assert_close(seen, plain, rtol=1e-12, atol=1e-12)
    h = before(model.fc(data[0])).detach()
    outer = 2 * (3 * h.relu()) * 3
    oracle.assert_close(rec["relu"], outer)
    if compiled or isinstance(before, nn.Linear):
        assert texts == []
        oracle.assert_close(rec["layer"], outer * (h > 0))
    elif "layer" in rec:  # dropout may give a copy
        oracle.assert_close(rec["layer"], outer * (h > 0))
    else:
        assert "'layer': no gradient reached it" in texts[-1]
        assert "in place" in texts[-1]
    inner = outer * (h > 0)
    oracle.assert_close(rec["fc"], inner @ before.weight if isinstance(before, nn.Linear) else inner)


def test_an_operation_in_place_on_what_several_layers_gave() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.layer(x)
        first.mul_(2)
        return first + second

    pair = Calls(lambda self, x: (lambda h: (h, h + x))(self.fc(x)), fc=nn.Linear(8, 8))
    model, data = Calls(forward, layer=pair), batches()[:1]
    plain = train(model, data)
    with told() as texts, torchprobe.record(model, "layer", of="gradient") as rec:
        seen = train(model, data)
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))
    h = model.layer.fc(data[0])
    outer = 2 * (3 * h + data[0])  # of both: 2 (2 h + h + x)
    assert "'layer:0': no gradient reached it" in texts[-1]  # the operation in place took its place in the graph
    torch.testing.assert_close(rec["layer:1"].min, outer.double().amin(0), rtol=1e-5, atol=1e-5)


def test_chunks_that_are_changed_in_place() -> None:
    """Views of one tensor: PyTorch refuses to change some of them in place, with or without a recorder."""

    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.layer(x)
        return first + second.relu()

    model, data = Calls(forward, layer=Calls(lambda self, x: self.fc(x).chunk(2, -1), fc=nn.Linear(8, 16))), batches()
    expected = read(model, data)
    with torchprobe.record(model, "layer", of="gradient") as rec:
        train(model, data)
    for index in range(2):
        oracle.assert_close(rec[f"layer:{index}"], together([grads[index] for grads in expected["layer"]]))


# -- when gradients arrive -----------------------------------------------------------------------------------------------------------


def test_a_part_of_the_graph_without_gradients() -> None:
    model = Calls(lambda self, x: self.head(self.body(x).detach()), body=nn.Linear(8, 8), head=nn.Linear(8, 4))
    with told() as texts, torchprobe.record(model, "*", of="gradient") as rec:
        train_plain(model, batches())
    assert rec.layers == ["head"]
    assert "'body': no gradient reached it" in texts[-1]


def train_plain(model: nn.Module, data: list[Tensor]) -> None:
    for x in data:
        model(x).square().sum().backward()


def test_gradients_of_gradients() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Identity(), nn.Linear(8, 1)), torch.randn(5, 8, requires_grad=True)
    with torchprobe.record(model, "*", of="gradient") as rec:
        (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert rec["2"].calls >= 1
    plain = torch.autograd.grad(model(x).sum(), x)[0]
    torch.testing.assert_close(grad.detach(), plain)


def test_positions_and_masks_of_gradients() -> None:
    model, x = shortcut(nn.Identity()), torch.randn(4, 5, 8)
    mask = torch.rand(4, 5) > 0.4
    grads = {}
    for positions in ("all", "class", "patch", "mean"):
        with (
            witnessed(model, "gradient") as seen,
            torchprobe.record(model, "layer", of="gradient", positions=positions) as rec,
            rec.mask(mask),
        ):
            train(model, [x])
        grad = seen["layer"][0][0].double()
        grads = {
            "all": grad[mask],
            "class": grad[:, 0][mask[:, 0]],
            "patch": grad[:, 1:][mask[:, 1:]],
            "mean": torch.stack([g[m].mean(0) for g, m in zip(grad, mask, strict=True) if m.any()]),
        }
        assert rec["layer"].vectors == len(grads[positions])
        torch.testing.assert_close(rec["layer"].mean, grads[positions].mean(0), rtol=1e-5, atol=1e-7)


@COMPILER_WARNINGS
def test_several_tensors_and_graph_breaks() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        first, second = self.layer(x)
        torch._dynamo.graph_break()
        return 2 * first.tanh() + 5 * second

    model, data = Calls(forward, layer=Pair()).double(), batches(torch.float64)[:1]
    expected = read(model, data)
    call = torch.compile(model, backend="aot_eager")
    with torchprobe.record(model, "layer.*", of="gradient") as rec:
        train(call, data)
    assert_read(rec, expected)
    assert set(rec.layers) == {"layer.first", "layer.second"}
