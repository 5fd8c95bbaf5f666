"""Attention: the largest logit and the entropy of each head, against float64, in the libraries that compute it."""

from __future__ import annotations

import contextlib
import json
import math
import warnings

import numpy as np
import pytest
import torch
from processes import group
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

import torchprobe
from torchprobe.recording.attention_rows import of_logits, of_queries


def reference(q, k, mask=None, causal=False, scale=None):
    """(largest logit, entropy), (batch, queries, heads) each, in float64 NumPy; nan where nothing is attended to."""
    q, k = (np.asarray(x.detach(), dtype=np.float64) for x in (q, k))
    k = np.repeat(k, q.shape[1] // k.shape[1], 1)
    logits = q @ k.swapaxes(-1, -2) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if causal:
        logits = np.where(np.tril(np.ones(logits.shape[-2:], dtype=bool)), logits, -np.inf)
    if mask is not None:
        mask = np.asarray(mask)
        logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        largest = logits.max(-1)
        p = np.exp(logits - largest[..., None])
        p /= p.sum(-1, keepdims=True)
        entropy = -np.where(p > 0, p * np.log(p), 0).sum(-1)
    dead = np.isneginf(largest)
    return np.where(dead, np.nan, largest).swapaxes(1, 2), np.where(dead, np.nan, entropy).swapaxes(1, 2)


class Attention(nn.Module):
    """Calls the function as it is told."""

    def forward(self, q, k, v, **options):
        return sdpa(q, k, v, **options)


def check(rec, name, expected, rel=1e-5):
    for field, values in zip(("max_logit", "entropy"), expected, strict=True):
        m = rec[f"{name}.{field}" if name else field]
        flat = values.reshape(-1, values.shape[-1])
        seen = flat[~np.isnan(flat).any(1)]
        assert m.features == values.shape[-1] and m.count.tolist() == [len(seen)] * values.shape[-1]
        assert m.nonfinite.tolist() == np.isnan(flat).sum(0).tolist()
        assert m.mean.numpy() == pytest.approx(seen.mean(0), rel=rel, abs=1e-6)
        assert m.max.numpy() == pytest.approx(seen.max(0), rel=rel, abs=1e-6)
        assert m.std.numpy() == pytest.approx(seen.std(0), rel=1e-3, abs=1e-5)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.7},
    "bool mask": {"attn_mask": torch.rand(2, 1, 9, 11, generator=torch.Generator().manual_seed(1)) < 0.6},
    "added mask": {"attn_mask": torch.randn(9, 11, generator=torch.Generator().manual_seed(2))},
    "padding": {"attn_mask": (torch.arange(11) < torch.tensor([[11], [6]]))[:, None, None]},
    "nothing to attend to": {"attn_mask": torch.ones(9, 11, dtype=torch.bool).index_fill(0, torch.tensor([3]), False)},
    "dropout": {"dropout_p": 0.4, "is_causal": True},
}


@pytest.mark.parametrize("heads", [4, 2], ids=["all heads", "grouped"])
@pytest.mark.parametrize("kernel", ["chosen", "math"])
@pytest.mark.parametrize("name", OPTIONS)
def test_right_values(name, kernel, heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 9, 8) * 3, torch.randn(2, heads, 11, 8), torch.randn(2, heads, 11, 8)
    options = {**OPTIONS[name], **({"enable_gqa": True} if heads < 4 else {})}
    model = Attention()
    expected = model(q, k, v, **options) if "dropout_p" not in options else None
    with torchprobe.record_attention(model) as rec, sdpa_kernel(SDPBackend.MATH) if kernel == "math" else contextlib.nullcontext():
        found = model(q, k, v, **options)
    assert expected is None or torch.allclose(found, expected, atol=1e-6, equal_nan=True)
    check(rec, "", reference(q, k, options.get("attn_mask"), options.get("is_causal", False), options.get("scale")))


def test_pieces_rows_and_precisions(monkeypatch):
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 70, 8)
    largest, entropy = of_queries(q, k, causal=True)
    monkeypatch.setattr("torchprobe.recording.attention_rows._AT_ONCE", 4 * 2 * 70 * 7)
    again = of_queries(q, k, causal=True)
    assert torch.allclose(again[0], largest, atol=1e-6) and torch.allclose(again[1], entropy, atol=1e-6)
    some = of_queries(q, k, causal=True, rows=8)
    chosen = np.round(np.linspace(0, 49, 8)).astype(int)
    assert torch.allclose(some[0], largest[:, chosen], atol=1e-6) and some[0].shape == (2, 8, 4)
    double = of_queries(q.double(), k.double(), causal=True)
    expected = reference(q, k, causal=True)
    assert double[0].numpy() == pytest.approx(expected[0], rel=1e-12) and double[1].numpy() == pytest.approx(expected[1], abs=1e-12)
    half = of_queries(q.bfloat16(), k.bfloat16())
    assert half[0].numpy() == pytest.approx(reference(q.bfloat16().float(), k.bfloat16().float())[0], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_masked_with_the_smallest_number(dtype):
    logits = torch.randn(1, 2, 3, 5).to(dtype)
    masked = logits.clone()
    masked[:, :, 0, 2:] = torch.finfo(dtype).min
    masked[:, :, 1] = torch.finfo(dtype).min
    largest, entropy = of_logits(masked)
    assert largest[0, 1].isnan().all() and entropy[0, 1].isnan().all() and not largest[0, [0, 2]].isnan().any()
    two = logits[0, :, 0, :2].double().softmax(-1)
    assert entropy[0, 0].tolist() == pytest.approx((-(two * two.log()).sum(-1)).tolist(), rel=1e-5)


def projected(module, x):
    """Queries and keys of ``nn.MultiheadAttention``, (batch, heads, tokens, width)."""
    parts = nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).detach().chunk(3, -1)
    return [part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in parts[:2]]


# -- libraries ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(weights, training, batch_first):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 3, batch_first=batch_first).train(training)
    x = torch.randn(2, 7, 24)
    padding = torch.arange(7) >= torch.tensor([[7], [4]])
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1)
    given = x if batch_first else x.transpose(0, 1)
    fast = torch.backends.mha.get_fastpath_enabled()
    with torchprobe.record_attention(module) as rec, torch.set_grad_enabled(training):
        module(given, given, given, key_padding_mask=padding, attn_mask=causal, need_weights=weights)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    q, k = projected(module, x)
    check(rec, "", reference(q, k, ~(padding[:, None, None] | causal)))


def test_encoder_layers_of_torch_in_inference():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, batch_first=True), 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = model(x)  # by the fused path
        with torchprobe.record_attention(model) as rec:
            found = model(x)
    assert torch.allclose(found, expected, atol=1e-5)
    assert rec.layers == [f"layers.{i}.self_attn.{what}" for i in range(2) for what in ("max_logit", "entropy")]
    attention = model.layers[0].self_attn
    check(rec, "layers.0.self_attn", reference(*projected(attention, x)))


@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3).eval()
    inputs = []
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.attn.register_forward_hook(lambda module, args, output: inputs.append(module.qkv(args[0])))
    with torchprobe.record_attention(model) as rec, torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    for i in range(2):
        q, k, _ = inputs[i].reshape(2, 17, 3, 3, 16).permute(2, 0, 3, 1, 4)
        check(rec, f"blocks.{i}.attn", reference(q, k))
    assert {row["features"] for row in rec.rows()} == {3} and {row["module"] for row in rec.rows()} == {"MaxLogit", "Entropy"}


@pytest.mark.filterwarnings("ignore")
def test_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=50, max_position_embeddings=32)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.weight)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    given = {"input_ids": torch.randint(0, 50, (2, 9)), "attention_mask": mask.long(), "use_cache": False}
    found = {}
    for how in ("eager", "sdpa"):
        model.set_attn_implementation(how)
        with torchprobe.record_attention(model) as rec, torch.no_grad():
            rec.mask(mask)
            output = model(**given, output_attentions=how == "eager")
        found[how] = rec
        if how == "eager":
            weights = [layer.double().numpy() for layer in output.attentions]
    assert found["eager"].layers == found["sdpa"].layers
    for i in range(2):
        p = weights[i]
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1).transpose(0, 2, 1)[mask.numpy()]
        name = f"model.layers.{i}.self_attn"
        for rec in found.values():
            assert rec[f"{name}.entropy"].vectors + rec[f"{name}.entropy"].constant_vectors == 14
            assert rec[f"{name}.entropy"].mean.numpy() == pytest.approx(entropy.mean(0), rel=1e-5, abs=1e-6)
        one, other = (rec[f"{name}.max_logit"] for rec in found.values())
        assert one.max.tolist() == pytest.approx(other.max.tolist(), rel=1e-5)
        assert one.mean.tolist() == pytest.approx(other.mean.tolist(), rel=1e-4, abs=1e-5)


# -- runs --------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_training_run_with_windows(compiled, tmp_path):
    model = Net()
    net = torch.compile(model, backend="eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    net(torch.randn(2, 3, 8))
    expected = []
    with torchprobe.record_attention(model) as rec:
        for step in range(3):
            x = torch.randn(4, 6, 8)
            expected.append(reference(*projected(model.attention, x)))
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.snapshot(step)
    assert rec.history.layers == ["attention.max_logit", "attention.entropy"]
    for step, (largest, _) in enumerate(expected):
        assert rec.history["max"][step, 0] == pytest.approx(largest.max(), rel=1e-5)
    check(rec.total, "attention", [np.concatenate(parts) for parts in zip(*expected, strict=True)])
    rec.save(tmp_path / "run.safetensors")
    assert torchprobe.load(tmp_path / "run.safetensors").total["attention.entropy"].vectors == rec.total["attention.entropy"].vectors
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_checkpoints_count_once_and_some_rows():
    model = Net()
    x = torch.randn(2, 9, 8, requires_grad=True)
    with torchprobe.record_attention(model, rows=4) as rec:
        checkpoint(model, x, use_reentrant=False).sum().backward()
    assert rec["attention.entropy"].count.tolist() == [8, 8]
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torchprobe.record_attention(model):
        model(x)
    model.head._forward_hooks.clear()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


HIDDEN = "attention of 0 was not read: flash_attention_for_test hides its queries and keys; with 1 other layer: 1"


def test_what_is_hidden_is_said():
    class Linear(nn.Module):
        def forward(self, q):
            return q

    class HiddenAttention(nn.Module):
        def forward(self, q):
            return flash(q)

    class StrangeAttention(nn.Module):
        def forward(self, q):
            return q.flatten(1, 2).softmax(-1)

    model = nn.Sequential(HiddenAttention(), StrangeAttention())
    with pytest.warns(torchprobe.RecordingWarning, match=HIDDEN) as found, torchprobe.record_attention(model) as rec:
        model(torch.randn(2, 3, 4, 5))
    assert rec.layers == [] and len(found) == 1
    with pytest.warns(torchprobe.RecordingWarning, match="whose heads are not known"), torchprobe.record_attention(model[1]):
        model[1](torch.randn(2, 3, 4, 5))
    plain = Linear()
    with pytest.warns(torchprobe.RecordingWarning, match="no operator that computes"), torchprobe.record_attention(plain, ""):
        plain(torch.randn(2))
    with pytest.raises(ValueError, match="no module whose class .*: pass layers="), torchprobe.record_attention(nn.Linear(2, 2)):
        pass
    with pytest.raises(ValueError, match="rows"), torchprobe.record_attention(Net(), rows=0):
        pass
    net = nn.Sequential(Attention())
    with pytest.warns(torchprobe.RecordingWarning, match="1 layer did not run: 0"), torchprobe.record_attention(net):
        pass


@torch.library.custom_op("torchprobe_tests::flash_attention_for_test", mutates_args=())
def flash(q: torch.Tensor) -> torch.Tensor:
    return q.clone()


RANKS = """
import json, torch, torchprobe
from torch import distributed, nn
distributed.init_process_group("gloo")
torch.manual_seed(0)
model, rank = nn.MultiheadAttention(8, 2, batch_first=True), distributed.get_rank()
x = torch.randn(4, 5, 8)[2 * rank : 2 * rank + 2]
with torchprobe.record_attention(model) as rec:
    model(x, x, x)
merged = rec.all_reduce()
print(json.dumps([merged["max_logit"].max.tolist(), merged["entropy"].mean.tolist(), merged["entropy"].count.tolist()]))
distributed.destroy_process_group()
"""


def test_two_ranks():
    found = [json.loads(rank.stdout.splitlines()[-1]) for rank in group(2, RANKS)]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(4, 5, 8)
    largest, entropy = reference(*projected(module, x))
    assert found[0] == found[1] and found[0][2] == [20, 20]
    assert found[0][0] == pytest.approx(largest.max((0, 1)), rel=1e-5) and found[0][1] == pytest.approx(entropy.mean((0, 1)), rel=1e-5)


def test_padding_of_float16_in_a_softmax_of_float32():
    """Models in float16 mask with its smallest number, and widen the logits before the softmax."""
    logits = torch.randn(1, 2, 3, 4).half()
    logits[:, :, 1] += torch.finfo(torch.float16).min  # a row of padding
    logits[:, :, 2, 2:] = torch.finfo(torch.float16).min
    largest, entropy = of_logits(logits.float())
    assert largest[0, 1].isnan().all() and entropy[0, 1].isnan().all()
    expected = of_logits(logits)
    assert torch.equal(largest[0, ::2], expected[0][0, ::2]) and torch.equal(entropy[0, ::2], expected[1][0, ::2])
    far = torch.full((1, 1, 2, 3), -7e4)
    far[0, 0, 1] = -6e4
    assert of_logits(far)[0].flatten().tolist() == [-7e4, -6e4]  # logits of a run that diverges


@pytest.mark.parametrize("shape", [(6, 5, 8), (5, 8), (2, 3, 4, 5, 8)])
def test_a_dimension_that_may_be_the_batch_is_not_taken_for_the_heads(shape):
    module = Attention()
    with pytest.warns(torchprobe.RecordingWarning, match="whose heads are not known"), torchprobe.record_attention(module) as rec:
        module(*[torch.randn(shape)] * 3)
    with torchprobe.record_attention(module) as rec:
        module(*[torch.randn(2, 6, 5, 8)] * 3)
    assert len(rec["max_logit"].max) == 6
