"""Routers of mixtures of experts: right values, padding, capacity, ranks, windows, and the routers of transformers."""

from __future__ import annotations

import functools
import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import group
from torch import nn

import torchprobe
from torchprobe.statistics import Routing
from torchprobe.statistics.routing import router_choices, router_logits


def reference(logits: np.ndarray, chosen: np.ndarray, top_k: int, dropped: float = 0.0) -> dict[str, float]:
    """Fields in float64 from logits and a table of 0 and 1, (tokens, experts)."""
    experts = logits.shape[1]
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    load = chosen.sum(0) / chosen.sum()
    return {
        "load_cv": load.std() / load.mean(),
        "load_max": load.max() / load.mean(),
        "dead_experts": int((chosen.sum(0) == 0).sum()),
        "dropped": dropped / (len(logits) * top_k),
        "router_entropy": -(shares * np.log(shares)).sum(1).mean() / math.log(experts),
        "balance_loss": experts * (load * shares.mean(0)).sum(),
        "tokens": len(logits),
        "invalid_tokens": 0,
    }


def largest(logits: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros_like(logits)
    np.put_along_axis(chosen, np.argsort(-logits, 1)[:, :k], 1, 1)
    return chosen


@pytest.mark.parametrize("top_k", [1, 3])
def test_right_values(top_k: int) -> None:
    logits = np.random.default_rng(0).normal(size=(200, 7)) * 3
    logits[:, 6] = -50  # dead
    routing = Routing(7, top_k=top_k)
    for part in np.array_split(logits, 4):
        routing.update(torch.from_numpy(part).float())
    expected = reference(logits.astype(np.float32).astype(np.float64), largest(logits, top_k), top_k)
    assert routing.summary() == pytest.approx(expected, rel=1e-5) and expected["dead_experts"] == 1
    assert routing.load.tolist() == pytest.approx((largest(logits, top_k).sum(0) / 200 / top_k).tolist())


def test_probabilities_and_choices() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(50, 5))
    scores = 1 / (1 + np.exp(-logits))
    routing = Routing(5, top_k=2, given="probabilities")
    routing.update(torch.from_numpy(scores))
    shares = scores / scores.sum(1, keepdims=True)
    assert routing.router_entropy == pytest.approx(-(shares * np.log(shares)).sum(1).mean() / math.log(5))
    assert routing.load_cv == pytest.approx(reference(logits, largest(logits, 2), 2)["load_cv"])
    chosen = largest(logits, 2)
    chosen[:10] = 0  # dropped tokens
    taken = Routing(5, top_k=2, given="choices")
    taken.update(torch.from_numpy(chosen * 0.3))
    assert taken.dropped == pytest.approx(0.2) and math.isnan(taken.router_entropy) and math.isnan(taken.balance_loss)
    assert taken.load_max == pytest.approx(5 * chosen.sum(0).max() / chosen.sum())


def test_capacity_padding_and_nonfinite() -> None:
    logits = torch.full((12, 4), -9.0)
    logits[:, 0] = 9.0
    logits[8:, 1] = 20.0
    routing = Routing(4, capacity_factor=1.0)
    routing.update(logits)  # capacity 3: 5 of 8 and 1 of 4 are dropped
    assert routing.dropped == pytest.approx(6 / 12)
    masked = Routing(4, capacity_factor=1.0)
    masked.update(logits, mask=torch.arange(12) < 8)  # capacity 2 of 8 tokens
    assert masked.dropped == pytest.approx(6 / 8) and masked.tokens == 8 and masked.dead_experts == 3
    logits[0, 0], logits[9, 2] = math.nan, math.inf
    bad = Routing(4)
    bad.update(logits)
    assert (bad.invalid_tokens, bad.tokens) == (2, 10) and bad.load.tolist() == [0.7, 0.3, 0, 0]
    assert all(math.isnan(value) for name, value in Routing(4).summary().items() if name in ("load_cv", "dropped", "dead_experts"))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="top_k=5 experts of 4"):
        Routing(4, top_k=5)
    with pytest.raises(ValueError, match="given must be one of 'logits'"):
        Routing(4, given="scores")
    with pytest.raises(ValueError, match="capacity_factor"):
        Routing(4, capacity_factor=0)
    with pytest.raises(ValueError, match="cannot merge Routing with top_k 1 and 2"):
        Routing(4).merge(Routing(4, top_k=2))
    with pytest.raises(TypeError, match=r"not clear which tensor holds the logits.*\(2, 3\).*select="):
        router_logits((torch.ones(2, 3), torch.ones(2, 3)))
    with pytest.raises(TypeError, match="not clear which tensor holds the choices"):
        router_choices(torch.ones(2, 3))
    damaged = Routing(4).state_dict() | {"assigned": torch.full((4,), 3.0, dtype=torch.float64)}
    with pytest.raises(ValueError, match="assigned"):
        Routing(4).load_state_dict(damaged)


# -- networks ----------------------------------------------------------------------------------------------------------------


class Mixture(nn.Module):
    """A mixture of experts that trains, with nothing of a framework."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(8, experts)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        outputs = torch.stack([expert(x) for expert in self.experts], -2)
        return (outputs.gather(-2, chosen[..., None].expand(*chosen.shape, 8)) * weights[..., None]).sum(-2)


STATISTIC = functools.partial(Routing, top_k=2)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow("compiles with inductor"))])
def test_a_training_run_with_windows_and_padding(compiled: bool, tmp_path: Any) -> None:
    model = Mixture()
    net = torch.compile(model) if compiled else model
    seen: list[torch.Tensor] = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    mask = torch.arange(6).expand(3, 6) < torch.tensor([[6], [4], [1]])
    with torchprobe.record(model, "router", statistic=STATISTIC) as rec:
        rec.mask(mask)
        for step in range(3):
            x = torch.randn(3, 6, 8)
            seen.append(nn.functional.linear(x, model.router.weight, model.router.bias).detach()[mask])
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rec.snapshot(step)
    for step, logits in enumerate(seen):
        expected = reference(logits.double().numpy(), largest(logits.numpy(), 2), 2)
        assert {name: rec.history[name][step, 0] for name in expected} == pytest.approx(expected, rel=1e-4)
    every = torch.cat(seen).double().numpy()
    assert rec.total["router"].summary() == pytest.approx(reference(every, largest(every, 2), 2), rel=1e-4)
    rec.save(tmp_path / "run.safetensors")
    assert torchprobe.load(tmp_path / "run.safetensors").total["router"].summary() == rec.total["router"].summary()


RANKS = """
import functools, json, sys, torch, torchprobe
from torch import distributed, nn
from torchprobe.statistics import Routing
distributed.init_process_group("gloo")
torch.manual_seed(0)
router, rank = nn.Linear(8, 4), distributed.get_rank()
with torchprobe.record(router, "", statistic=functools.partial(Routing, top_k=2)) as rec:
    router(torch.randn(20, 8, generator=torch.Generator().manual_seed(rank))[: 20 - 7 * rank])
print(json.dumps(rec.all_reduce()[""].summary()))
distributed.destroy_process_group()
"""


def test_two_ranks() -> None:
    found = [json.loads(rank.stdout.splitlines()[-1]) for rank in group(2, RANKS)]
    torch.manual_seed(0)
    router = nn.Linear(8, 4)
    inputs = [torch.randn(20, 8, generator=torch.Generator().manual_seed(rank))[: 20 - 7 * rank] for rank in range(2)]
    logits = router(torch.cat(inputs)).detach().double().numpy()
    assert found[0] == found[1] == pytest.approx(reference(logits, largest(logits, 2), 2), rel=1e-5)


def _routers() -> Iterator[Any]:
    common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    few, small = {"num_key_value_heads": 2}, {"moe_intermediate_size": 16}
    yield "Mixtral", {**common, **few, "num_local_experts": 8, "num_experts_per_tok": 2}, "**.gate"
    yield (
        "Qwen2Moe",
        {**common, **few, **small, "shared_expert_intermediate_size": 16, "num_experts": 6, "num_experts_per_tok": 3},
        "**.gate",
    )
    yield "Qwen3Moe", {**common, **few, **small, "head_dim": 8, "num_experts": 6, "num_experts_per_tok": 3}, "**.gate"
    yield "GptOss", {**common, **few, "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 3}, "**.router"
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    groups = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0}
    yield "DeepseekV3", {**common, **small, **latent, **groups, "num_key_value_heads": 4}, "**.gate"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "settings", "layers"), list(_routers()), ids=lambda value: value if isinstance(value, str) else "")
def test_routers_of_transformers(name: str, settings: dict[str, Any], layers: str) -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}ForCausalLM"):
        pytest.skip(f"this transformers has no {name}")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**settings)).eval()
    gates = [module for module_name, module in model.named_modules() if module_name.rpartition(".")[2] == layers[3:]]
    outputs: list[Any] = []
    for gate in gates:
        nn.init.normal_(gate.weight)
        gate.register_forward_hook(lambda module, args, output: outputs.append(output))
    if not isinstance(gates[0](torch.zeros(2, 32)), tuple):
        pytest.skip("its router gives logits only")
    outputs.clear()
    k = settings["num_experts_per_tok"]
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    mask[1, 4:] = False
    by_logits = torchprobe.record(model, layers, statistic=functools.partial(Routing, top_k=k), select=router_logits)
    chosen = functools.partial(Routing, top_k=k, given="choices")
    by_choices = torchprobe.record(model, layers, statistic=chosen, select=router_choices)
    with by_logits, by_choices, torch.no_grad(), warnings.catch_warnings():
        by_logits.mask(mask)
        by_choices.mask(mask)
        model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
    assert len(by_logits.layers) == 2
    for layer, output in zip(by_logits.layers, outputs, strict=True):
        logits, indices = output[0].double().numpy()[mask.flatten()], output[2].numpy()[mask.flatten()]
        taken = np.zeros_like(logits)
        np.put_along_axis(taken, indices, 1, 1)
        expected = reference(logits, taken, k)
        found = by_choices[layer].summary()
        for field in ("load_cv", "load_max", "dead_experts", "dropped", "tokens"):
            assert found[field] == pytest.approx(expected[field], rel=1e-6), field
        assert by_logits[layer].router_entropy == pytest.approx(expected["router_entropy"], rel=1e-5)
        if name != "DeepseekV3":  # it chooses groups of experts first
            assert by_logits[layer].load.tolist() == pytest.approx(by_choices[layer].load.tolist())


@pytest.mark.filterwarnings("ignore")
def test_a_router_that_drops() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "SwitchTransformersForConditionalGeneration"):
        pytest.skip("this transformers has no Switch Transformer")
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(d_model=32, d_ff=32, d_kv=8, num_layers=2, num_decoder_layers=2, num_heads=4,
                                                   num_experts=4, vocab_size=50, expert_capacity=2,
                                                   num_sparse_encoder_layers=1)  # fmt: skip
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    name = next(name for name, _ in model.named_modules() if name.startswith("encoder") and name.endswith("router"))
    seen: list[torch.Tensor] = []
    model.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(output[0]))
    ids = torch.randint(0, 50, (2, 9))
    statistic = functools.partial(Routing, given="choices")
    with torchprobe.record(model, name, statistic=statistic, select=router_choices) as rec, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
    assert rec[name].dropped == pytest.approx(1 - seen[0].sum().item() / 18) and rec[name].dropped > 0
    assert rec[name].assigned.tolist() == seen[0].sum((0, 1)).tolist()


@pytest.mark.filterwarnings("ignore")
def test_the_page_runs_as_written() -> None:
    transformers = pytest.importorskip("transformers")
    page = (Path(__file__).parents[1] / "docs/experts-and-attention.md").read_text(encoding="utf-8")
    experts, choices, attention = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    torch.manual_seed(0)
    config = transformers.MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, num_local_experts=8, vocab_size=50)  # fmt: skip
    tokens, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.bool)
    names = {"model": transformers.MixtralForCausalLM(config).eval(), "batches": [(tokens, mask)] * 2, "tokens": tokens}
    exec(experts, names)
    assert names["rec"].history["load_max"].shape == (2, 2)
    exec(choices, names)
    assert names["rec"]["model.layers.0.mlp.gate"].dropped == 0
    timm = pytest.importorskip("timm")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_heads=3)
    names |= {"model": vit, "batches": [torch.randn(1, 3, 32, 32)] * 2}
    exec(attention, names)
    assert names["rec"].history["max"].shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_capacity_does_not_depend_on_the_default_dtype(dtype: torch.dtype) -> None:
    logits = torch.zeros(1000, 8, dtype=torch.float32)
    logits[:, 0] = 1
    logits[300:, 1] = 2
    torch.set_default_dtype(dtype)
    try:
        routing = Routing(8, capacity_factor=1.25)  # capacity 157 of 1000 tokens; bfloat16 has no 157.25
        routing.update(logits)
        tenth = Routing(10, capacity_factor=1.1)  # 11 of 100, not 12
        tenth.update(torch.eye(10, dtype=torch.float32)[:1].expand(100, 10))
    finally:
        torch.set_default_dtype(torch.float32)
    assert routing.dropped == (1000 - 2 * 157) / 1000 and tenth.dropped == 0.89
