"""Weights between two models: exact ends, what is no float, ties, heads, batch norms, and models that do not fit together."""

from __future__ import annotations

import copy
import gc
import math
import weakref

import pytest
import torch
from torch import nn

from torchprobe.analysis.interpolation import interpolate, recalibrate_batch_norms
from torchprobe.encoders import Encoder, Head


class Net(nn.Module):
    """Batch norm, dropout, a tied weight, a mask with infinities, an integer buffer, a constant that is not saved."""

    def __init__(self, width=6):
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.first = nn.Linear(width, width)
        self.tied = nn.Linear(width, width)
        self.tied.weight = self.first.weight
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("mask", torch.full((width, width), -math.inf).triu(1))
        self.register_buffer("index", torch.randint(100, (3,)))
        self.register_buffer("constant", torch.randn(2), persistent=False)

    def forward(self, x):
        return self.dropout(self.norm(self.tied(self.first(x))))


def pair(make=Net):
    a, b = make(), make()
    for model in (a, b):
        for x in [*model.parameters(), *model.buffers()]:
            if x.is_floating_point() and x.isfinite().all():
                x.data.uniform_(0.1, 2)
    return a.eval(), b.eval()


def tensors(model):
    found = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: x.detach().clone() for name, x in found.items()}


def same(x, y):
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8)) if x.dim() else x.dtype == y.dtype and bool(x == y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_ends_are_exact_and_the_middle_is_the_formula(dtype):
    a, b = (model.to(dtype) for model in pair())
    before = tensors(a), tensors(b)
    for alpha, model in interpolate(a, b, [0, 0.3, 1]):
        for name, x in tensors(model).items():
            x_a, x_b = before[0][name], before[1][name]
            if alpha in (0, 1):
                assert same(x, (x_a, x_b)[int(alpha)]), name
            elif x.is_floating_point():
                expected = torch.where(x_a == x_b, x_a.double(), 0.7 * x_a.double() + 0.3 * x_b.double()).to(dtype)
                assert same(x, expected), name
            else:
                assert same(x, x_a), name
        assert model.tied.weight is model.first.weight
        assert model is not a and model is not b
    for model, saved in zip((a, b), before, strict=True):
        assert all(same(x, saved[name]) for name, x in tensors(model).items())


def test_a_model_and_itself():
    a = pair()[0]
    for _, model in interpolate(a, a, [0.1, 1 / 3, 0.5, 0.7, -1, 1.5]):
        assert all(same(x, tensors(a)[name]) for name, x in tensors(model).items())


def test_modes_and_gradients_are_those_of_the_first():
    a, b = pair()
    a.train()
    a.norm.eval()
    a.first.bias.requires_grad_(False)
    _, model = next(interpolate(a, b, [0.5]))
    assert [module.training for module in model.modules()] == [module.training for module in a.modules()]
    assert not model.first.bias.requires_grad
    model.first.weight.data.zero_()
    assert a.first.weight.all() and b.first.weight.all()


def test_one_copy_at_a_time():
    a, b = pair()
    kept = []
    for _, model in interpolate(a, b, [0.1, 0.2, 0.3]):
        kept.append(weakref.ref(model))
        del model
        gc.collect()
        assert sum(reference() is not None for reference in kept) <= 1  # the generator's own


def test_heads_are_interpolated():
    heads = [Head(torch.randn(3, 4), torch.randn(3), names=["x", "y", "z"]) for _ in range(2)]
    _, head = next(interpolate(*heads, [0.25]))
    torch.testing.assert_close(head.weight, 0.75 * heads[0].weight + 0.25 * heads[1].weight)
    assert head.names == ("x", "y", "z")
    both = [nn.ModuleDict({"encoder": nn.Linear(5, 4), "head": head}) for head in heads]
    _, model = next(interpolate(*both, [0.25]))
    torch.testing.assert_close(model["head"].bias, head.bias)
    with pytest.raises(ValueError, match="heads of which only one normalizes: the model"):
        interpolate(Head(torch.eye(2)), Head(torch.eye(2), normalize=True), [0.5])
    with pytest.raises(ValueError, match="heads of which only one normalizes: head"):
        interpolate(*(nn.ModuleDict({"head": Head(torch.eye(2), normalize=n)}) for n in (True, False)), [0.5])


def encoder(head=True):
    visual = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    return Encoder(
        visual, features=6, preprocess=lambda image: image, head=Head(torch.randn(2, 6), torch.randn(2)) if head else None
    ).eval()


def test_what_an_encoder_keeps_beside_its_layers():
    a, b = encoder(), encoder()
    ends = dict(interpolate(a, b, [0, 0.5, 1]))
    torch.testing.assert_close(ends[0.5].head.weight, (a.head.weight + b.head.weight) / 2)
    torch.testing.assert_close(ends[0.5].visual[0].weight, (a.visual[0].weight + b.visual[0].weight) / 2)
    assert same(ends[0].head.bias, a.head.bias) and same(ends[1].head.bias, b.head.bias)
    assert ends[0.5].preprocess is not None
    nested = dict(interpolate(nn.Sequential(a), nn.Sequential(b), [0.5]))
    torch.testing.assert_close(nested[0.5][0].head.weight, ends[0.5].head.weight)
    for one, other in ((a, encoder(head=False)), (encoder(head=False), b)):
        for _, model in interpolate(one, other, [0, 0.5]):
            assert model.head is None
    assert a.head is not None
    b.head = Head(torch.randn(3, 6), torch.randn(3))
    with pytest.raises(ValueError, match=r"head\.weight \(2, 6\) and \(3, 6\), head\.bias"):
        interpolate(a, b, [0.5])


# -- batch norms ---------------------------------------------------------------------------------------------------------


def test_batch_norms_are_recalibrated_without_dropout():
    a, b = pair(lambda: nn.Sequential(nn.Dropout(0.9), nn.Linear(3, 4), nn.BatchNorm1d(4)))
    for model in (a, b):
        model[2].num_batches_tracked.fill_(7)
    x = torch.randn(40, 3).split(10)
    before = tensors(a)
    for alpha, model in interpolate(a, b, [0, 0.5, 1], recalibrate=[(part, torch.zeros(10)) for part in x]):
        if alpha == 0.5:
            outputs = [model[1](part) for part in x]
            torch.testing.assert_close(model[2].running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0))
            torch.testing.assert_close(model[2].running_var, torch.stack([y.var(0) for y in outputs]).mean(0))
            assert model[2].momentum == 0.1
            assert not any(module.training for module in model.modules())
            assert model[2].weight.requires_grad
        else:
            assert same(model[2].running_mean, (a, b)[int(alpha)][2].running_mean)
    assert all(same(x, before[name]) for name, x in tensors(a).items())


def test_recalibration_of_parts_without_a_forward():
    a, b = (nn.ModuleDict({"visual": m, "head": nn.Linear(6, 2)}) for m in pair())
    x = torch.randn(20, 6)
    _, model = next(interpolate(a, b, [0.5], recalibrate=[x]))
    visual = model["visual"]
    torch.testing.assert_close(visual.norm.running_mean, visual.tied(visual.first(x)).mean(0))


def test_recalibration_that_cannot_be():
    a, b = pair()
    with pytest.raises(ValueError, match="an iterator, which can be used only once"):
        interpolate(a, b, [0.1, 0.2], recalibrate=iter([torch.randn(5, 6)]))
    assert len(list(interpolate(a, b, [0, 0.2, 1], recalibrate=iter([torch.randn(5, 6)])))) == 3
    with pytest.raises(ValueError, match="there are no batches"):
        list(interpolate(a, b, [0.5], recalibrate=[]))
    without = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert recalibrate_batch_norms(without, [None]) == 0
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.2)).train()
    with pytest.raises(ValueError, match="more than 1 value"):
        recalibrate_batch_norms(model, [torch.randn(1, 3)])
    assert model.training and model[0].training and model[0].momentum == 0.2


# -- models that do not fit together -------------------------------------------------------------------------------------


def test_everything_that_differs_is_named_at_once():
    a = nn.ModuleDict({"both": nn.Linear(2, 3), "mine": nn.Linear(1, 1, bias=False), "short": nn.Linear(1, 1, bias=False)})
    b = nn.ModuleDict({"both": nn.Linear(2, 4), "theirs": nn.BatchNorm1d(1, affine=False), "short": nn.Linear(1, 1, bias=False).half()})
    with pytest.raises(ValueError, match="cannot be interpolated") as error:
        interpolate(a, b, [0.5])  # at once, not when the first model is asked for
    for phrase in (
        "only in the first: mine.weight;",
        "only in the second: theirs.running_mean, theirs.running_var, theirs.num_batches_tracked;",
        "of different shapes: both.weight (3, 2) and (4, 2), both.bias (3,) and (4,);",
        "of different dtypes: short.weight torch.float32 and torch.float16",
    ):
        assert phrase in str(error.value)


def test_ties_that_differ():
    a, b = pair()
    b.tied.weight = nn.Parameter(torch.randn(6, 6))
    with pytest.raises(ValueError, match=r"first\.weight and tied\.weight are one tensor in the first model"):
        interpolate(a, b, [0.5])
    b.tied.weight = nn.Parameter(b.first.weight.detach().clone())
    _, model = next(interpolate(a, b, [0.5]))
    assert model.tied.weight is model.first.weight
    _, model = next(interpolate(b, a, [0.5]))
    assert model.tied.weight is not model.first.weight
    torch.testing.assert_close(model.tied.weight, model.first.weight)


@pytest.mark.parametrize("alphas", [[], [math.nan], [0.5, math.inf]])
def test_alphas_that_are_none(alphas):
    with pytest.raises(ValueError, match="finite numbers, at least one"):
        interpolate(*pair(), alphas)


def test_a_generator_of_alphas_and_a_copy_that_runs():
    a, b = pair()
    found = dict(interpolate(a, b, (i / 10 for i in range(11))))
    assert list(found) == [i / 10 for i in range(11)]
    x = torch.randn(4, 6)
    torch.testing.assert_close(found[1.0](x), copy.deepcopy(b)(x), rtol=0, atol=0)
