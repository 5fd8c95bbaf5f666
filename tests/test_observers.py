"""torchprobe::observe_gradient: the identity whose backward shows the gradient."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from torchprobe.ops.observers import register_observer

observe_gradient = torch.ops.torchprobe.observe_gradient


class Keep:
    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def gradient(self, grad: Tensor, mask: Tensor | None) -> None:
        self.seen.append((grad.clone(), mask))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "expanded"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(layout: str, masked: bool) -> None:
    x = torch.randn(2, 3, 4, 5)
    x = {
        "contiguous": x,
        "transposed": x.transpose(1, 3),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "expanded": x[:1].expand(2, 3, 4, 5),
    }[layout]
    observer = Keep()
    mask = torch.ones(2, 3, 4, dtype=torch.bool) if masked else None
    number = register_observer(observer)
    torch.library.opcheck(observe_gradient.default, (x.detach().requires_grad_(), number, mask))
    torch.library.opcheck(torch.ops.torchprobe.observe_gradient_backward.default, (x, number, mask))


def test_identity_that_shows_the_gradient_with_its_mask() -> None:
    observer = Keep()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, False, True, True])
    y = observe_gradient(x, register_observer(observer), mask)
    assert torch.equal(y, x)
    (y**3).sum().backward()
    ((seen, seen_mask),) = observer.seen
    assert torch.equal(seen, 3 * x.detach() ** 2)
    assert torch.equal(x.grad, seen)
    assert torch.equal(seen_mask, mask)


def test_gradients_of_gradients_pass_through() -> None:
    observer = Keep()
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    number = register_observer(observer)
    assert torch.autograd.gradgradcheck(lambda t: observe_gradient(t, number) ** 3, (x,))
    (first,) = torch.autograd.grad((observe_gradient(x, number) ** 3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach())


def test_without_its_observer_it_is_the_identity() -> None:
    observer = Keep()
    number = register_observer(observer)
    x = torch.ones(3, requires_grad=True)
    y = observe_gradient(x, number)
    del observer
    gc.collect()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(3))


class Calls:
    """Remembers what calls show."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def called(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> None:
        self.seen.append((len(inputs), len(outputs)))


def test_a_call_shows_all_its_tensors_and_counts() -> None:
    observer, token = Calls(), torch.zeros(())
    x = torch.randn(3, 4, requires_grad=True)
    number = register_observer(observer)
    torch.ops.torchprobe.observe_call_(token, [x, x * 2], [x.detach()], number)
    torch.ops.torchprobe.observe_call_(token, [], [x], number)
    assert observer.seen == [(2, 1), (0, 1)] and token == 2
    torch.library.opcheck(torch.ops.torchprobe.observe_call_.default, (torch.zeros(()), [torch.randn(3)], [torch.randn(2, 2)], number))
