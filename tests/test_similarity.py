"""CKA of all pairs of layers: the float64 formula on hostile features, invariances, layouts, batches that are none, no hooks left."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from products import products_in_bfloat16
from torch import nn

from torchprobe.analysis.grams import gram
from torchprobe.analysis.similarity import cka, similarity
from torchprobe.common.precision import full_products


def hsic(k, l):  # noqa: E741
    """The formula, word for word, in float64."""
    n = len(k)
    k, l = (m - np.diag(np.diag(m)) for m in (k, l))  # noqa: E741
    one = np.ones(n)
    return (np.trace(k @ l) + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))


def exact(a, b):
    """CKA of lists over batches of lists over layers of features (n, …)."""

    def grams(batch):
        features = [x.double().flatten(1).numpy() for x in batch]
        features = [x - x.mean(0) for x in features]  # changes nothing but the rounding of the squares of large offsets
        return [x @ x.T for x in features]

    a, b = [grams(batch) for batch in a], [grams(batch) for batch in b]
    total = np.zeros((3, len(a[0]), len(b[0])))
    for ka, kb in zip(a, b, strict=True):
        total += [[[hsic(*pair) for y in kb for pair in [which(x, y)]] for x in ka] for which in (_cross, _first, _second)]
    return torch.from_numpy(total[0] / np.sqrt(total[1] * total[2]))


def _cross(x, y):
    return x, y


def _first(x, y):
    return x, x


def _second(x, y):
    return y, y


class Replay(nn.Module):
    """Gives stored features layer by layer; the input says which images."""

    def __init__(self, *features):
        super().__init__()
        self.layers = nn.ModuleList(Given(x) for x in features)

    def forward(self, numbers):
        for layer in self.layers:
            layer(numbers)
        return numbers.float()[:, None]


class Given(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.register_buffer("features", features)

    def forward(self, numbers):
        return self.features[numbers]


def replayed(a, b, sizes=(20, 20, 9), **options):
    """Ours and the exact one, for lists of features of all images."""
    parts = torch.arange(sum(sizes)).split(list(sizes))
    got = cka(Replay(*a), Replay(*b), parts, "layers.*", "layers.*", **options)
    return got, exact(*([[x[part] for x in features] for part in parts] for features in (a, b)))


def related(n=49, widths=(30, 7, 300)):
    """Layers that have something in common."""
    shared = torch.randn(n, 12)
    return [shared @ torch.randn(12, d) + 2 * torch.randn(n, d) for d in widths]


# -- the formula ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_it_is_the_formula(scale, offset):
    a, b = ([(x + offset * torch.randn(x.shape[1])) * scale for x in related()] for _ in range(2))
    got, expected = replayed(a, b)
    assert got.dtype == torch.float64
    assert got.shape == (3, 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype(dtype):
    a, b = ([x.to(dtype) for x in related()] for _ in range(2))
    got, expected = replayed(a, b)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if dtype == torch.float64:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_features_of_very_different_size():
    a, b = ([x * torch.logspace(-6, 6, x.shape[1]) for x in related()] for _ in range(2))
    a[0][0] *= 1e3  # one image far out, the first
    got, expected = replayed(a, b)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_wide_layers_are_read_in_blocks():
    a, b = (related(widths=(40_000, 2**18 // 12 + 1)) for _ in range(2))
    got, expected = replayed(a, b, sizes=(12, 37))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_smallest_batch_and_one_feature():
    a, b = [torch.randn(6, 7), torch.randn(6, 1)], [torch.randn(6, 2, 3, 4).to(memory_format=torch.channels_last)]
    got, expected = replayed(a, b, sizes=(4,))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_mean_does_not_matter_to_the_formula():
    x, y = (np.random.default_rng(i).normal(size=(9, 40)) for i in range(2))
    assert hsic((x + 3) @ (x + 3).T, y @ y.T) == pytest.approx(hsic((x - x.mean(0)) @ (x - x.mean(0)).T, y @ y.T), rel=1e-9)


@pytest.mark.parametrize("n", [4, 64, 65, 150])
def test_gram_matrices_above_the_diagonal(n):
    x = torch.randn(n, 40)
    near = x.double()[x.double().norm(dim=1).argsort()[:8]].mean(0)
    expected = ((x.double() - near) @ (x.double() - near).T).triu(1)
    torch.testing.assert_close(gram(x), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(gram(x.double()), expected, rtol=0, atol=1e-12)
    out = torch.full((n, n), 7.0, dtype=torch.float64)
    assert gram(x, out) is out
    assert torch.equal(out, gram(x))


def test_gram_matrices_of_constants_and_odd_strides():
    x = torch.randn(9, 40)
    assert gram(torch.full((5, 8), 0.1)).eq(0).all()
    for strided in (x.T.contiguous().T, torch.stack([x, x], 2)[..., 0], x.flip(1), x[:, :1].expand(9, 40)):
        torch.testing.assert_close(gram(strided), gram(strided.clone()), rtol=0, atol=1e-5)


# -- what CKA is ---------------------------------------------------------------------------------------------------------


def test_rotation_scale_and_shift_change_nothing():
    x = torch.randn(40, 16)
    rotation = torch.linalg.qr(torch.randn(16, 16)).Q
    a, b = Replay(x, x**3), Replay(x @ rotation * 7 + 3, x)
    numbers = torch.arange(40).split(20)
    values = cka(a, b, numbers, "layers.*", "layers.*")
    torch.testing.assert_close(values[0], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(values[1, 0], values[1, 1], rtol=0, atol=1e-5)
    assert values[1, 1] < 0.95
    torch.testing.assert_close(cka(b, a, numbers, "layers.*", "layers.*"), values.T, rtol=0, atol=1e-12)


def test_one_on_itself_with_one_forward():
    model = nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 5))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    found = similarity(model, model, torch.randn(30, 6).split(10), "*", ["2", "0"])
    assert len(calls) == 3
    assert (found.layers_a, found.layers_b) == (["0", "1", "2"], ["2", "0"])
    assert found.values[0, 1] == pytest.approx(1, abs=1e-12)
    assert found.values[2, 0] == pytest.approx(1, abs=1e-12)
    x = torch.randn(30, 6).split(10)
    twice = cka(model, nn.Sequential(*model), x, "*", "*")  # another module of the same layers: two forward passes
    torch.testing.assert_close(twice, cka(model, model, x, "*", "*"), rtol=0, atol=1e-12)


def test_independent_features_give_nothing_on_average():
    values = torch.stack(
        [cka(Replay(torch.randn(16, 50)), Replay(torch.randn(16, 50)), [torch.arange(16)], "layers.0", "layers.0") for _ in range(40)]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(40)
    assert (values < 0).any()  # unbiased


def test_features_can_be_left_out():
    a, b = torch.randn(24, 10), torch.randn(24, 10)
    far = torch.randn(24, 1) * 100
    a, b = torch.cat([a, far], 1), torch.cat([far, b], 1)
    numbers = [torch.arange(24)]
    dominated = cka(Replay(a), Replay(b), numbers, "layers.*", "layers.*")
    assert dominated > 0.99
    got = cka(Replay(a), Replay(b), numbers, "layers.*", "layers.*", drop_a=[10], drop_b={"layers.0": [0]})
    torch.testing.assert_close(got, exact([[a[:, :-1]]], [[b[:, 1:]]]), rtol=1e-5, atol=1e-5)
    model = Replay(a)
    once = cka(model, model, numbers, "layers.*", "layers.*", drop_a=[10])
    torch.testing.assert_close(once, exact([[a[:, :-1]]], [[a]]), rtol=1e-5, atol=1e-5)
    tokens = torch.randn(8, 5, 3)
    got = cka(Replay(tokens), Replay(tokens), [torch.arange(8)], "layers.*", "layers.*", drop_a=[1])
    torch.testing.assert_close(got, exact([[tokens[..., [0, 2]]]], [[tokens]]), rtol=1e-5, atol=1e-5)
    none = "'layer.0' matches none of"
    for drop, message in (([11], "features 0 to 10; 11"), (range(11), "all 11 features of layer"), ({"layer.0": [1]}, none)):
        with pytest.raises(ValueError, match=message):
            cka(Replay(a), Replay(b), numbers, "layers.*", "layers.*", drop_a=drop)


def test_what_is_constant_or_not_finite_is_nan():
    x = torch.randn(12, 4)
    bad = x.clone()
    bad[3, 1] = math.inf
    values = cka(Replay(x, torch.full((12, 3), 0.1), bad), Replay(x, x[:, :1]), [torch.arange(12)], "layers.*", "layers.*")
    assert values[0].isfinite().all()
    assert values[1:].isnan().all()


# -- maps and tokens -----------------------------------------------------------------------------------------------------


def test_pooling():
    maps, tokens = torch.randn(10, 6, 4, 4), torch.randn(10, 7, 5)
    numbers = [torch.arange(10)]
    convolution = nn.Conv2d(6, 6, 1, groups=6, bias=False)
    torch.nn.init.ones_(convolution.weight)
    a = nn.Sequential(Given(maps), convolution)
    for pooling, x, y in (("flatten", maps, tokens), ("mean", maps.mean((2, 3)), tokens.mean(1))):
        got = cka(a, Replay(tokens), numbers, "1", "layers.0", pooling=pooling)
        torch.testing.assert_close(got, exact([[x]], [[y]]), rtol=1e-5, atol=1e-5)
    got = cka(a, Replay(tokens), numbers, "0", "layers.0", pooling="mean", feature_dim_a=1, feature_dim_b={"layers.*": 1})
    torch.testing.assert_close(got, exact([[maps.mean((2, 3))]], [[tokens.mean(2)]]), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="has no dimension feature_dim=4"):
        cka(a, Replay(tokens), numbers, "0", "layers.0", feature_dim_a=4)
    with pytest.raises(ValueError, match='pooling is "flatten" or "mean"'):
        cka(a, a, numbers, pooling="max")


class SequenceFirst(nn.Module):
    """As some transformers do: (tokens, images, features)."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens
        self.linear = nn.Linear(3, 8)

    def forward(self, images):
        return self.linear(torch.stack([images * (i + 1) for i in range(self.tokens)])).sum(0)


@pytest.mark.parametrize("tokens", [1, 2, 5, 10])
def test_images_in_the_second_dimension(tokens):
    model = SequenceFirst(tokens).eval()
    images = torch.randn(20, 3)
    parts = images.split(10)
    with torch.no_grad():
        features = [[model.linear(torch.stack([part * (i + 1) for i in range(tokens)])).movedim(1, 0)] for part in parts]
    other = nn.Sequential(nn.Linear(3, 5))
    with torch.no_grad():
        expected = exact(features, [[other(part)] for part in parts])
    torch.testing.assert_close(cka(model, other, parts, "linear", "0"), expected, rtol=1e-5, atol=1e-5)


def test_images_that_cannot_be_told_apart():
    class Windows(nn.Module):
        def forward(self, x):
            return x.reshape(-1, 2)

    with pytest.raises(ValueError, match=r"layer '0' gives shape \(18, 2\) for 6 images: no dimension of the images was found"):
        cka(nn.Sequential(Windows()), nn.Sequential(nn.Linear(6, 2)), [torch.randn(6, 6)], "0", "0")
    with pytest.raises(ValueError, match=r"layer '0' gives shape \(6,\)"):
        cka(nn.Sequential(nn.Flatten(0)), nn.Sequential(nn.Linear(1, 2)), [torch.randn(6, 1)], "0", "0")


class InPlace(nn.Module):
    """The activation is overwritten, and one module is called twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.relu = nn.Linear(4, 9), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.relu(self.linear(x)) - 0.5)


def test_what_is_overwritten_later_is_read_before():
    model = InPlace().eval()
    x = torch.randn(16, 4)
    with torch.no_grad():
        linear = model.linear(x)
        expected = exact([[linear, (linear.relu() - 0.5).relu()]], [[x]])
    got = cka(model, nn.Sequential(nn.Identity()), [x], ["linear", "relu"], "0")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# -- layers, batches, hooks ----------------------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_a_list_or_in_that_of_running():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(5, 2), nn.Linear(3, 5)

        def forward(self, x):
            return self.last(self.first(x))

    model, batches = Backwards(), [torch.randn(8, 3)]
    found = similarity(model, model, batches, ["last", "first", "l*"], "*")
    assert (found.layers_a, found.layers_b) == (["last", "first"], ["first", "last"])
    torch.testing.assert_close(found.values.flip(0), cka(model, model, batches, "*", "*"))
    assert found.rows()[0] == {"layer_a": "last", "layer_b": "first", "cka": found.values[0, 0].item()}
    whole = similarity(model, nn.Sequential(model), batches)
    assert whole.layers_a == [""]
    with pytest.raises(ValueError, match="did you mean 'first'"):
        cka(model, model, batches, "frst")


def test_a_pair_for_models_that_preprocess_differently():
    a, b = nn.Sequential(nn.Linear(6, 4)), nn.Sequential(nn.Linear(3, 4))
    x, y = torch.randn(20, 6), torch.randn(20, 3)
    with torch.no_grad():
        expected = exact([[a(p)] for p in x.split(10)], [[b(p)] for p in y.split(10)])
    for make in (tuple, list):
        got = cka(a, b, (make(pair) for pair in zip(x.split(10), y.split(10), strict=True)), "0", "0")
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        expected = exact([[a(x[:10])]], [[a(x[10:])]])
    torch.testing.assert_close(cka(a, a, [(x[:10], x[10:])], "0", "0"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "no batch was given"),
        ([torch.zeros(3, 6)], ValueError, "at least 4 images; 3 images were given, in smaller batches"),
        (torch.zeros(8, 6), TypeError, r"give \[x\] for one batch"),
        ([(torch.zeros(8, 6), torch.zeros(7, 6))], ValueError, "batch 0 has 8 images for the first model and 7 for the second"),
        ([[torch.zeros(8, 6), torch.arange(8)]], TypeError, "looks like images and their labels"),
        ([[torch.zeros(8, 6)] * 3], TypeError, "neither a tensor nor a pair of tensors"),
        ([{"images": torch.zeros(8, 6)}], TypeError, "batch 0 is neither a tensor nor a pair.*dict"),
        ([torch.randn(8, 6), (torch.zeros(8, 6), torch.zeros(8, 6))], TypeError, "batch 1 is a pair, unlike the first"),
    ],
)
def test_batches_that_are_none(batches, error, message):
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(error, match=message):
        cka(model, model, batches, "0", "0")


def test_a_short_last_batch_is_left_out_and_counted():
    model, x = nn.Sequential(nn.Linear(6, 4)), torch.randn(23, 6)
    told = []
    with pytest.warns(UserWarning, match="3 images were left out, in batches of fewer than 4"):
        found = similarity(model, nn.Sequential(nn.Tanh()), x.split(10), "0", "0", progress=lambda *args: told.append(args))
    assert (found.images, found.batches, found.left_out) == (20, 2, 3)
    assert [done for done, _ in told] == [1, 2]
    torch.testing.assert_close(found.values, cka(model, nn.Sequential(nn.Tanh()), x[:20].split(10), "0", "0"))
    assert similarity(model, model, x[:14].split(10), "0", "0").batches == 2  # four are enough


class Breaks(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def hooks(*models):
    return [m for model in models for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_hooks_and_modes_are_as_before():
    good, broken = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Sequential(nn.Linear(4, 4), Breaks())
    good.train()
    good[0].eval()
    cka(good, good, [torch.randn(8, 4)])
    with pytest.raises(RuntimeError, match="broken"):
        cka(good, broken, [torch.randn(8, 4)])
    unused = Unused()
    with pytest.raises(ValueError, match="layer '1' is not called by the forward pass of Unused"):
        cka(good, unused, [torch.randn(8, 4)], None, ["0", "1"])
    assert not hooks(good, broken, unused)
    assert [module.training for module in good.modules()] == [True, False, True]
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


class Unused(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        return self[0](x)


def test_two_models_that_share_a_layer():
    shared = nn.Linear(4, 6)
    a, b = nn.Sequential(shared, nn.Tanh()), nn.Sequential(nn.Linear(4, 4), shared)
    x = torch.randn(12, 4)
    with torch.no_grad():
        expected = exact([[shared(x)]], [[b(x)]])
    torch.testing.assert_close(cka(a, b, [x], "0", "1"), expected, rtol=1e-5, atol=1e-5)


def test_reduced_precision_outside_does_not_reach_the_products():
    a, b = related(), related()
    with products_in_bfloat16():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = replayed(a, b)
        assert not full_products("cpu")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_heat_map_names_its_layers():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    axes = similarity(model, model, [torch.randn(8, 4)], "*", ["1"]).heat_map(name_a="small", width=4).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1"]
    assert axes.get_ylabel() == "small"


@pytest.mark.gpu
def test_the_device_is_waited_for_once_at_the_end():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).cuda(), torch.randn(32, 64)
    expected = cka(model.cpu(), model, x.split(16), "*", "*")
    batches = list(x.cuda().split(16))
    model.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            cka(model, model, batches, "*", "*")  # the copy of the result
        torch.cuda.set_sync_debug_mode("warn")
        with pytest.warns(UserWarning, match="synchroniz") as found:
            got = cka(model, model, batches, "*", "*")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
