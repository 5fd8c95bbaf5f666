"""Two models on the same input: exact differences, and planted faults that are named."""

from __future__ import annotations

import copy
import math
import re
import warnings

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import torchprobe
from torchprobe.recording.tensor_difference import difference

# -- two tensors -------------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_float64():
    rng = np.random.default_rng(0)
    a = torch.from_numpy(rng.normal(size=(3, 5, 700_000 // 15)).astype(np.float32))
    b = a.clone()
    b[1, 2, 7:] += torch.from_numpy(rng.normal(size=b[1, 2, 7:].shape).astype(np.float32)) * 1e-3
    found = difference(a, b)
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    assert found.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-12)
    assert found.max_abs == pytest.approx(abs(y - x).max(), rel=1e-15)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-12)
    assert found.equal_share == (x == y).mean() and found.first == np.unravel_index((x != y).argmax(), a.shape)
    assert found.first_values == (a[found.first].item(), b[found.first].item())
    steps = [np.where(z.view(np.int32) < 0, -(z.view(np.int32).astype(np.int64) + 2**31), z.view(np.int32)) for z in (a.numpy(), b.numpy())]
    assert found.ulps == abs(steps[0] - steps[1]).max()


def test_pieces_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(7, 11), torch.randn(7, 11)
    b[0, :5] = a[0, :5]
    whole = difference(a, b)
    monkeypatch.setattr("torchprobe.recording.tensor_difference._CHUNK", 4)
    pieces = difference(a.t().contiguous().t(), b)
    assert pieces.first == whole.first == (0, 5) and pieces.relative == pytest.approx(whole.relative, rel=1e-14)
    assert (pieces.ulps, pieces.equal_share, pieces.max_abs) == (whole.ulps, whole.equal_share, whole.max_abs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_units_in_the_last_place(dtype):
    x = torch.tensor([1.0, 0.0, -2.0, 1.0], dtype=dtype)
    one = torch.nextafter(x.double(), torch.tensor(9.0)) if dtype == torch.float64 else None
    up = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-23, torch.float64: 2**-52}[dtype]
    assert difference(x, x + torch.tensor([up, 0, 0, 0], dtype=dtype)).ulps == 1
    assert difference(x, x + torch.tensor([3 * up, 0, 0, 0], dtype=dtype)).ulps == 3
    small = torch.zeros(4, dtype=dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    tiny = torch.tensor([1, 0, 0, 0], dtype=bits).view(dtype)
    assert difference(small, tiny).ulps == 1 and difference(-tiny, tiny).ulps == 2
    assert difference(x, -x).ulps > 2**14 and (one is None or difference(x, one).ulps == 1)


def test_two_precisions():
    a = torch.tensor([1.0, 1.00390625, 3.0])
    found = difference(a, a.bfloat16())
    assert found.equal_share == pytest.approx(2 / 3) and found.first == (1,) and found.ulps == 0 and found.rounding == 2**-8
    large = difference(torch.tensor([1e6, 1.0]), torch.tensor([math.inf, 1.0]).half())
    assert large.nonfinite_b == large.nonfinite_differ == 1 and large.nonfinite_a == 0 and large.relative == 0


def test_nonfinite_zero_and_other_values():
    inf, nan = math.inf, math.nan
    found = difference(torch.tensor([nan, inf, -inf, 1.0, inf]), torch.tensor([nan, inf, inf, 2.0, 1.0]))
    assert (found.nonfinite_a, found.nonfinite_b, found.nonfinite_differ, found.first) == (4, 3, 2, (2,))
    assert found.relative == 1 and found.apart(10.0) and found.equal_share == pytest.approx(0.4)
    assert difference(torch.zeros(2), torch.zeros(2)).relative == 0 and difference(torch.zeros(2), torch.ones(2)).relative == inf
    assert difference(torch.tensor([0.0]), torch.tensor([-0.0])).equal_share == 0
    assert difference(torch.tensor([1e200], dtype=torch.float64), torch.tensor([3e200], dtype=torch.float64)).relative == pytest.approx(2)
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 4])).relative == pytest.approx(2 / math.sqrt(5))
    assert difference(torch.empty(0), torch.empty(0)).equal and math.isnan(difference(torch.tensor([1]), torch.tensor([1])).ulps)
    assert difference(torch.ones(2, 3), torch.ones(3, 2)).problem == "shapes (2, 3) and (3, 2)"
    assert difference(torch.ones(2), torch.ones(2).int()).apart() and difference(torch.ones(1) * 1j, torch.ones(1) * 1j).problem


class Counting(nn.Module):
    """Its output depends on a buffer that each call changes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        y = self.linear(x) * self.calls
        return {"logits": y, "ids": y.argmax(1), "positive": y > 0}


class Chosen(nn.Module):
    def __init__(self, more=0):
        super().__init__()
        self.linear, self.more = nn.Linear(4, 9), more

    def forward(self, x):
        return self.linear(x).argmax(1) + self.more


def test_a_model_with_a_state_is_its_own_equal():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Counting()

        def forward(self, x):
            return self.part(self.part(x)["logits"])

    model = Twice()
    found = torchprobe.record_pair(model, model, torch.randn(5, 4), isolate=True)
    assert found.first is None and found.culprit is None and model.part.calls == 0
    assert {row.place for row in found.rows} == {"", "logits", "ids", "positive"}


@pytest.mark.parametrize("tolerance", [0.0, 0.9])
@pytest.mark.parametrize("isolate", [False, True])
def test_chosen_tokens_are_compared(isolate, tolerance):
    a = Chosen()
    b = Chosen(more=1)
    b.load_state_dict(a.state_dict())
    found = torchprobe.record_pair(a, b, torch.randn(6, 4), isolate=isolate, tolerance=tolerance)
    assert found.first == found.culprit == "" and "6 of 6 whole numbers differ" in found.answer() and "nan" not in found.answer()
    assert torchprobe.record_pair(a, copy.deepcopy(a), torch.randn(6, 4), isolate=isolate).first is None


# -- networks ----------------------------------------------------------------------------------------------------------------


def vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=4, embed_dim=48, num_heads=3, num_classes=7)
    return model.eval(), torch.randn(2, 3, 32, 32)


def resnet():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=7)
    return model.eval(), torch.randn(2, 3, 32, 32)


def language():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=50, max_position_embeddings=32)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    return model, {"input_ids": torch.randint(0, 50, (2, 9))}


def perturbed(name, factor=1.05):
    def plant(model):
        with torch.no_grad():
            model.get_submodule(name).weight[0].mul_(factor)

    return plant


def replaced_forward(name, forward):
    def plant(model):
        module = model.get_submodule(name)
        module.forward = forward.__get__(module)

    return plant


def cast(module_forward):
    def forward(self, x, *args, **kwargs):
        return type(self).forward(self, x.bfloat16().to(x.dtype), *args, **kwargs)

    return forward


def without_residual_vit(self, x, attn_mask=None, **_):
    x = self.drop_path1(self.ls1(self.attn(self.norm1(x))))  # x + is missing
    return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def without_residual_resnet(self, x):
    return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


def without_residual_llama(self, hidden_states, **kwargs):
    hidden_states = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
    return self.mlp(self.post_attention_layernorm(hidden_states))


def transposed_heads_vit(self, x, attn_mask=None, **_):
    b, n, c = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = self.q_norm(q), self.k_norm(k)
    x = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).transpose(2, 3).reshape(b, n, c))))  # heads and channels swapped


def other_eps(name, eps):
    def plant(model):
        module = model.get_submodule(name)
        setattr(module, "eps" if hasattr(module, "eps") else "variance_epsilon", eps)

    return plant


def dropout_on(name):
    def plant(model):
        module = model.get_submodule(name)
        module.p = 0.3
        module.train()

    return plant


FAULTS = [
    (vit, "blocks.2.mlp.fc1", perturbed("blocks.2.mlp.fc1")),
    (vit, "blocks.1.attn.qkv", replaced_forward("blocks.1.attn.qkv", cast(None))),
    (vit, "blocks.2", replaced_forward("blocks.2", without_residual_vit)),
    (vit, "blocks.1.attn", replaced_forward("blocks.1.attn", transposed_heads_vit)),
    (vit, "blocks.3.norm2", other_eps("blocks.3.norm2", 0.1)),
    (vit, "blocks.1.mlp.drop1", dropout_on("blocks.1.mlp.drop1")),
    (resnet, "layer2.0.conv1", perturbed("layer2.0.conv1")),
    (resnet, "layer1.0", replaced_forward("layer1.0", without_residual_resnet)),
    (resnet, "layer3.0.bn1", other_eps("layer3.0.bn1", 0.2)),
    (resnet, "fc", perturbed("fc")),
    (language, "model.layers.1.mlp.up_proj", perturbed("model.layers.1.mlp.up_proj")),
    (language, "model.layers.1", replaced_forward("model.layers.1", without_residual_llama)),
    (language, "model.layers.2.input_layernorm", other_eps("model.layers.2.input_layernorm", 0.1)),
    (language, "model.layers.0.self_attn.k_proj", replaced_forward("model.layers.0.self_attn.k_proj", cast(None))),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("network", "place", "plant"), FAULTS, ids=[f"{n.__name__}-{p}" for n, p, _ in FAULTS])
def test_a_planted_fault_is_named(network, place, plant):
    model, batch = network()
    other = copy.deepcopy(model)
    plant(other)
    found = torchprobe.record_pair(model, other, batch, isolate=True)
    assert found.culprit == place and found.isolated
    assert found.first == place or found.first.startswith(f"{place}.")  # what runs inside of a block after the fault ends first
    own = [row for row in found.rows if row.own is not None and not row.own.equal]
    assert {row.layer for row in own} == {place}  # its followers add nothing by themselves
    assert not [row for row in found.rows if row.own_problem], found.remarks
    half = copy.deepcopy(other).bfloat16() if network is vit else None  # the same fault, in the noise of another precision
    if half is not None and place in ("blocks.2", "blocks.1.attn", "blocks.3.norm2", "blocks.1.mlp.drop1"):
        noisy = torchprobe.record_pair(model, half, batch, isolate=True)
        assert noisy.culprit == place and noisy.first != place


def test_right_values_of_inputs_outputs_and_own_errors():
    model, batch = vit()
    other = copy.deepcopy(model)
    perturbed("blocks.2.mlp.fc1")(other)
    seen = {}
    for name, one in (("a", model), ("b", other)):
        handles = [one.blocks[i].register_forward_hook(lambda m, x, y, key=(name, i): seen.__setitem__(key, (x[0].double(), y.double())))
                   for i in range(4)]  # fmt: skip
        with torch.no_grad():
            one(batch)
        [handle.remove() for handle in handles]
    found = torchprobe.record_pair(model, other, batch, "blocks.*", isolate=True)
    assert [row.layer for row in found.rows] == [f"blocks.{i}" for i in range(4)]
    for i, row in enumerate(found.rows):
        (x, y), (p, q) = seen["a", i], seen["b", i]
        assert row.output.relative == pytest.approx(float((q - y).norm() / y.norm()), rel=1e-9, abs=1e-15)
        assert row.given.relative == pytest.approx(float((p - x).norm() / x.norm()), rel=1e-9, abs=1e-15)
    with torch.no_grad():  # block 3 of b is healthy, block 2 is not
        expected = (other.blocks[2](seen["a", 2][0].float()).double() - seen["a", 2][1]).norm() / seen["a", 2][1].norm()
    assert found.rows[2].own.relative == pytest.approx(float(expected), rel=1e-9) and found.rows[3].own.equal
    assert found.rows[3].output.relative > 0 and found.culprit == found.first == "blocks.2"
    plain = torchprobe.record_pair(model, other, batch, "blocks.*")
    assert plain.culprit == "blocks.2" and plain.rows[0].own is None and "isolate=True tells" in plain.answer()


def test_equal_models_and_nothing_is_changed():
    model, batch = resnet()
    model.train()
    other = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in other.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = torchprobe.record_pair(model, other, batch, isolate=True)
    assert torch.equal(torch.rand(3), expected)
    assert found.first is None and found.culprit is None and found.answer().startswith("All ") and all(row.own.equal for row in found.rows)
    for one in (model, other):
        assert one.training and all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in other.modules()]
    assert [row.name for row in found.rows if row.layer == "layer1.0.relu"] == ["layer1.0.relu", "layer1.0.relu (call 2)"]


def test_precisions_and_a_tolerance():
    model, batch = vit()
    half = copy.deepcopy(model).bfloat16()
    found = torchprobe.record_pair(model, half, batch, isolate=True, tolerance=0.2)
    assert found.first is None and 0 < found.rows[-1].output.relative < 0.1
    assert all(row.own.relative < 8 * row.own.rounding for row in found.rows)  # rounding, and nothing else
    assert "agree to a relative error of 0.2" in found.answer()


def test_memory_is_bounded_by_further_passes():
    model, batch = vit()
    other = copy.deepcopy(model)
    perturbed("blocks.2.mlp.fc1")(other)
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    whole = torchprobe.record_pair(model, other, batch)
    assert len(runs) == 1
    parts = torchprobe.record_pair(model, other, batch, memory=100_000)
    assert 3 <= len(runs) < 40 and parts.summary() == whole.summary()
    one_by_one = torchprobe.record_pair(model, other, batch, "blocks.*", memory=1)
    assert [row.layer for row in one_by_one.rows] == [f"blocks.{i}" for i in range(4)]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.act, self.pair, self.unused = nn.Linear(6, 6), nn.ReLU(inplace=True), Pair(), nn.Linear(1, 1)

    def forward(self, x, scale=1.0):
        for _ in range(3):
            x = self.act(self.layer(x)) * scale
        return self.pair(x)


class Pair(nn.Module):
    def forward(self, x):
        return {"left": x + 1, "right": x * 2}


def test_repeated_calls_in_place_and_several_outputs():
    model = Twice()
    other = copy.deepcopy(model)
    replaced_forward("pair", lambda self, x: {"left": x + 1, "right": x * 2.5})(other)
    found = torchprobe.record_pair(model, other, (torch.randn(4, 6), 2.0), isolate=True)
    assert [row.name for row in found.rows][:4] == ["layer", "act", "layer (call 2)", "act (call 2)"]
    assert [row.name for row in found.rows if row.layer == "pair"] == ["pair:left", "pair:right"]
    assert found.first_row.name == found.culprit_row.name == "pair:right"
    assert found.culprit_row.own.relative == pytest.approx(0.25) and "1 layer did not run in both" in found.remarks[0]
    assert "pair:right" in str(_text(found.table())) and len(found.table(most=1).rows) == 1


def _text(table):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_dropout_left_on_in_one_place_of_a_training_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.0), nn.Linear(8, 8)).train()
    other = copy.deepcopy(model)
    assert torchprobe.record_pair(model, other, torch.randn(5, 8), isolate=True).first is None  # the same masks in both
    other[3].p = 0.2
    found = torchprobe.record_pair(model, other, torch.randn(5, 8), isolate=True)
    assert found.first == found.culprit == "3"


def test_the_layers_that_add_an_error_are_listed_before_those_that_pass_it_on():
    torch.manual_seed(0)
    model, batch = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8))), torch.randn(5, 8)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for layer, factor in ((1, 1.01), (3, 1.5), (6, 1.1)):
            other[layer].weight.mul_(factor)
    found = torchprobe.record_pair(model, other, batch, isolate=True)
    assert [row.layer for row in found.largest(3)] == ["3", "6", "1"] and len(found.largest()) == 8
    assert "3 adds the largest error by itself" in found.answer() and re.search(r"Then come 6 \(0.0\d+\), 1 \(0.0\d+\)\.", found.answer())
    table = found.table(most=3)
    assert [*table.columns[0].cells] and [str(cell) for cell in table.columns[0].cells] == ["1", "3", "6"]
    for width in (60, 200):  # also where columns are left out
        with (console := Console(width=width)).capture() as printed:
            console.print(table)
        assert "5 more rows differ less; rows has all." in printed.get()
    loud = torchprobe.record_pair(model, other, batch)
    kept = [str(cell) for cell in loud.table(most=2).columns[0].cells]
    sizes = sorted((row.output.relative for row in loud.rows), reverse=True)[:2]
    assert kept == [row.name for row in loud.rows if row.output.relative in sizes]


def test_another_mode_and_missing_layers_are_in_the_answer():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).train()
    other = copy.deepcopy(model).eval()
    found = torchprobe.record_pair(model, other, torch.randn(5, 8))
    assert "But all layers are in train mode in a and in eval mode in b" in found.answer() and found.remarks == found.caveats
    other.train()[1].eval()
    assert (
        "But 1 layer is in train mode in a and in eval mode in b, which is a difference by itself: 1."
        in torchprobe.record_pair(model, other, torch.randn(5, 8), isolate=True).answer()
    )
    lone = nn.Sequential(nn.Linear(8, 8)).train()
    assert "But 2 layers of a without a partner in b: 1, 2." in torchprobe.record_pair(model, lone, torch.randn(5, 8)).answer()
    assert not torchprobe.record_pair(model, copy.deepcopy(model), torch.randn(5, 8)).caveats


def test_names_wrappers_and_refusals():
    model, batch = vit()
    wrapped = nn.Sequential()
    wrapped.add_module("body", copy.deepcopy(model))
    found = torchprobe.record_pair(model, wrapped, batch)
    assert found.first is None and "without their prefix 'body.'" in found.remarks[0]
    other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    named = nn.ModuleDict({"x": nn.Linear(8, 8)})["x"]
    with pytest.raises(ValueError, match="no layer in common"):
        torchprobe.record_pair(other, named, torch.randn(2, 8), ["0", "1"])
    with pytest.raises(TypeError, match="model_b must be"):
        torchprobe.record_pair(other, print, torch.randn(2, 8))
    with pytest.raises(ValueError, match="tolerance"):
        torchprobe.record_pair(other, other, torch.randn(2, 8), tolerance=-1)
    with pytest.raises(ValueError, match="none of the layers ran"):
        torchprobe.record_pair(other, other, torch.randn(2, 8), "0", run=lambda model, batch: model[1](batch))
    broken = copy.deepcopy(other)
    broken[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        torchprobe.record_pair(other, broken, torch.randn(2, 8), isolate=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_another_width_inside():
    one = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    other = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8))
    found = torchprobe.record_pair(one, other, torch.randn(2, 8), isolate=True)
    assert found.first == "0" and found.rows[0].output.problem == "shapes (2, 16) and (2, 24)"
    assert found.rows[1].own_problem and "could not run alone" in found.remarks[0]


@pytest.mark.slow("compiles with inductor")
@pytest.mark.filterwarnings("ignore")
def test_eager_and_compiled():
    model, batch = vit()
    compiled = torch.compile(model)
    with torch.no_grad():
        compiled(batch)  # graphs without hooks exist already
    found = torchprobe.record_pair(model, compiled, batch, tolerance=1e-5)
    assert found.first is None and len([row for row in found.rows if row.layer.startswith("blocks.")]) > 40, found
    assert 0 < max(row.output.relative for row in found.rows) < 1e-5
    with pytest.raises(ValueError, match="give the model before torch.compile"):
        torchprobe.record_pair(model, compiled, batch, isolate=True)
    faulty = copy.deepcopy(model)
    perturbed("blocks.2.mlp.fc1")(faulty)
    found = torchprobe.record_pair(model, torch.compile(faulty), batch, tolerance=1e-5)
    assert found.first == "blocks.2.mlp.fc1"
