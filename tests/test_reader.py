"""The reader of layers: what it reads, what it refuses, and how it leaves the model."""

import pytest
import torch
from torch import Tensor, nn

from torchprobe.recording import select_layers
from torchprobe.recording.reader import LayerReader, Layout, device_of, eval_mode


def reader(model, layers="*", feature_dim=None):
    return LayerReader(model, select_layers(model, layers, feature_dim))


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    model[0].eval()
    with reader(model) as opened:
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        with pytest.raises(RuntimeError, match="shapes"):
            opened.activations(torch.zeros(2, 3))
    assert [module.training for module in model.modules()] == [True, False, True] and torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in model.modules())


def test_eval_mode_comes_back_for_every_module():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with eval_mode(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]


def test_other_forward_passes_are_ignored():
    shared = nn.Linear(3, 3)
    a, b = nn.Sequential(shared), nn.Sequential(nn.Identity(), shared)
    seen = []
    with reader(a) as one, reader(b):
        one.read(torch.ones(2, 3), lambda layer, x, layout: seen.append(layer.name))
        b(torch.zeros(2, 3))
    assert seen == ["0"]


class Overwritten(nn.Module):
    """What follows its layers writes into what they gave, in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(3, 5), nn.Linear(5, 5), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "relu":
            torch.relu_(y)
        elif self.how == "add":
            y += 1
        elif self.how == "view":
            y.view(-1)[::2] = 7
        elif self.how == "out":
            torch.mul(y, 2, out=y)
        elif self.how == "data":
            y.data.mul_(3)
        elif self.how == "numpy":
            y.detach().numpy()[:] = 0
        z = self.b(y)
        return z.mul_(0) if self.how == "later" else z


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("how", ["relu", "add", "view", "out", "data", "numpy", "later", "nothing"])
def test_activations_are_those_that_the_layer_gave(how, inference):
    model, batches = Overwritten(how), torch.randn(3, 4, 3)
    with torch.inference_mode(inference), reader(model) as opened:
        for x in batches:
            kept = opened.activations(x)
            torch.testing.assert_close(kept["a"][0], torch.nn.functional.linear(x, model.a.weight, model.a.bias))
            assert bool(kept["b"][0].any())


class Sometimes(nn.Module):
    """Writes into what its layer gave in some calls only: in every second one, or if the images say so."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.a, self.by, self.calls = nn.Linear(3, 5), by, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.a(x)
        return y.mul_(0) if (self.calls % 2 == 0 if self.by == "call" else float(x[0, 0]) > 0) else y


@pytest.mark.parametrize("by", ["call", "image"])
def test_what_is_overwritten_only_later(by):
    model = Sometimes(by)
    with reader(model, "a") as opened:
        for x in [-torch.ones(4, 3), torch.ones(4, 3), -torch.ones(4, 3), torch.ones(4, 3), torch.randn(4, 3)]:
            torch.testing.assert_close(opened.activations(x)["a"][0], torch.nn.functional.linear(x, model.a.weight, model.a.bias))


class Cut(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return {"slice": x[:, 1:6], "expand": x[:, :1].expand(-1, 5), "same": x, "flip": x.T.T}[self.how]


@pytest.mark.parametrize("how", ["slice", "expand", "same", "flip"])
def test_layers_that_return_views_of_what_is_overwritten(how):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.view = Cut(how)

        def forward(self, x):
            y = self.view(x)
            self.want = y.clone()
            return x.mul_(0)

    model = Net()
    with reader(model, "view") as opened:
        for _ in range(3):
            found = opened.activations(torch.randn(4, 7))["view"][0]
            assert torch.equal(found, model.want) and bool(found.any())


def test_a_model_that_writes_into_its_images_gets_them_as_they_were():
    class Normalizing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 5)

        def forward(self, x):
            return self.a(x.sub_(1).mul_(2)).relu_()

    model = Normalizing()
    with reader(model, "a") as opened:
        for x in torch.randn(3, 4, 3):
            before = x.clone()
            found = opened.activations(x)["a"][0]
            torch.testing.assert_close(found, torch.nn.functional.linear((before - 1) * 2, model.a.weight, model.a.bias))
            assert torch.equal(x, before)


@pytest.mark.parametrize("wrap", ["parallel", "compiled", "both", "outside", "one layer"])
def test_wrapped_models_are_read_before_what_writes_in_place(wrap):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 16, 16)
    want = torch.nn.functional.conv2d(x, model[0].weight, model[0].bias)

    def compiled(module):
        return torch.compile(module, backend="eager")

    if wrap == "one layer":
        model[0] = compiled(model[0])
    wrapped = {
        "parallel": nn.DataParallel,
        "compiled": compiled,
        "both": lambda module: nn.DataParallel(compiled(module)),
        "outside": lambda module: compiled(nn.DataParallel(module)),
        "one layer": lambda module: module,
    }[wrap](model)
    with torch.no_grad():
        wrapped(x)
    with reader(wrapped, ["0"]) as opened:
        for _ in range(2):
            assert torch.equal(opened.activations(x)["0"][0], want)


def test_only_what_is_overwritten_is_copied_and_one_pass_is_repeated():
    model, calls = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2)), []
    model.register_forward_hook(lambda module, args, output: calls.append(output))
    with reader(model) as opened:
        kept = [opened.activations(torch.randn(4, 3)) for _ in range(3)]
    assert len(calls) == 4 and kept[-1]["2"][0].data_ptr() == calls[-1].data_ptr()


def test_images_get_the_precision_of_the_model():
    with reader(nn.Sequential(nn.Linear(3, 5)).bfloat16()) as opened:
        assert opened.activations(torch.randn(4, 3))["0"][0].dtype == torch.bfloat16


def test_a_layer_that_runs_twice_counts_with_its_last_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = nn.Identity()

        def forward(self, x):
            return self.add(self.add(x) + 1)

    seen = []
    with reader(Twice(), "add") as opened:
        opened.read(torch.zeros(2, 1), lambda layer, x, layout: seen.append(float(x[0])))
        assert seen == [0, 1] and float(opened.activations(torch.zeros(2, 1))["add"][0][0]) == 1


def test_names_are_in_the_order_of_the_model_and_in_that_of_running():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(5, 2), nn.Linear(3, 5)

        def forward(self, x):
            return self.last(self.first(x))

    with reader(Backwards()) as opened:
        assert list(opened.activations(torch.zeros(1, 3))) == ["last", "first"] and opened.fired == ["first", "last"]


@pytest.mark.parametrize(("images", "tokens"), [(6, 4), (6, 6), (1, 4), (6, 1)])
@pytest.mark.parametrize("batch_dim", [0, 1])
def test_the_dimension_of_the_images(images, tokens, batch_dim):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 8)

        def forward(self, x):
            return self.linear(x.repeat_interleave(tokens, 0).unflatten(0, (len(x), tokens)).transpose(0, batch_dim))

    with reader(Tokens()) as opened:
        x, layout = opened.activations(torch.zeros(images, 3))["linear"]
        assert layout == Layout(3, batch_dim, 2) and layout.images_first(x).shape == (images, 8, tokens)


def test_layers_that_cannot_be_read():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.text, self.flat, self.windows = (nn.Identity() for _ in range(4))

        def forward(self, x):
            self.text(["no tensor"])
            self.flat(x.flatten())
            self.windows(x.reshape(-1, 2))
            return x

    for layer, message in (
        ("unused", "layer 'unused' is not called by the forward pass of Odd: leave it out"),
        ("text", "layer 'text' gives no tensor in the forward pass of Odd"),
        ("flat", r"layer 'flat' gives shape \(12,\); expected vectors, tokens or maps"),
        ("windows", r"layer 'windows' gives shape \(6, 2\) for 3 images: no dimension of the images was found"),
    ):
        with reader(Odd(), layer) as opened, pytest.raises(ValueError, match=message):
            opened.activations(torch.zeros(3, 4))
    with reader(Odd(), "text", feature_dim=5) as opened, pytest.raises(ValueError, match="gives no tensor"):
        opened.activations(torch.zeros(3, 4))
    with pytest.warns(FutureWarning, match="deprecated"):
        scripted = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="'0' is a scripted module, which takes no hooks"):
        reader(scripted, "0")


def test_device():
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("meta") and device_of(nn.ReLU()) == torch.device("cpu")
