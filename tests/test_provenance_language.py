"""Provenance in language models of transformers: norms that a library wrote itself, and blocks that add inside of their modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from torchprobe.analysis.provenance import Provenance, provenance
from torchprobe.analysis.provenance.norms import norm_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WIDTH, FEATURE = 32, 5
HIDDEN = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GROUPED = HIDDEN | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "GPT2": {"n_embd": WIDTH, "n_layer": 2, "n_head": 4},
    "Gemma": GROUPED,
    "Gemma2": GROUPED,
    "Gemma3Text": GROUPED,
    "Cohere": HIDDEN,
    "Olmo": HIDDEN,
    "Bloom": {"hidden_size": WIDTH, "n_layer": 2, "n_head": 4},
    "Mpt": {"d_model": WIDTH, "n_layers": 2, "n_heads": 4, "max_seq_len": 32},
    "OPT": HIDDEN | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    "T5Encoder": {"d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    "GPTNeoX": HIDDEN,
    "Falcon": {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mixtral": GROUPED | {"num_local_experts": 3},
    "Granite": GROUPED | {"residual_multiplier": 0.22},
    "Nemotron": HIDDEN | {"num_key_value_heads": 2},
    "NanoChat": HIDDEN | {"num_key_value_heads": 2},
}
# The module whose output the last MLP adds, and the norm after the blocks.
LAST = {
    "GPT2": ("h.1.mlp", "ln_f"),
    "Gemma": ("layers.1.mlp", "norm"),
    "Gemma2": ("layers.1.post_feedforward_layernorm", "norm"),
    "Gemma3Text": ("layers.1.post_feedforward_layernorm", "norm"),
    "Cohere": ("layers.1.mlp", "norm"),
    "Olmo": ("layers.1.mlp", "norm"),
    "Bloom": ("h.1.mlp.dense_4h_to_h", "ln_f"),
    "Mpt": ("blocks.1.ffn.down_proj", "norm_f"),
    "OPT": ("decoder.layers.1.fc2", "decoder.final_layer_norm"),
    "T5Encoder": ("encoder.block.1.layer.1.DenseReluDense", "encoder.final_layer_norm"),
    "GPTNeoX": ("layers.1.mlp", "final_layer_norm"),
    "Falcon": ("h.1.mlp", "ln_f"),
    "Mixtral": ("layers.1.mlp", "norm"),
    "Granite": ("layers.1.mlp", "norm"),
    "Nemotron": ("layers.1.mlp", "norm"),
    "NanoChat": ("layers.1.mlp", "norm"),
}
CENTERED = {"GPT2", "Cohere", "Olmo", "Bloom", "Mpt", "OPT", "GPTNeoX", "Falcon", "Nemotron"}
ONE_MORE = {"Gemma", "Gemma2", "Gemma3Text", "Nemotron"}  # the gain is 1 + weight


class Mean(nn.Module):
    """The mean over positions of the last hidden states."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        states: Tensor = self.network(input_ids=ids).last_hidden_state
        return states.mean(1)


def language(family: str) -> Mean:
    """A network with random gains and biases, too."""
    if not hasattr(transformers, f"{family.removesuffix('Encoder')}Config"):
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family.removesuffix('Encoder')}Config")(
        vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[family]
    )
    network = getattr(transformers, f"{family}Model")(config).eval()
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.3)
    return Mean(network)


def tokens() -> list[Tensor]:
    return list(torch.randint(3, 60, (5, 9), generator=torch.Generator().manual_seed(1)))


def found_in(encoder: nn.Module, **options: object) -> Provenance:
    return provenance(encoder, tokens(), [FEATURE], **{"changes": 0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_mlp_adds_what_the_formula_says(family: str) -> None:
    """With the output of the module whose output is added, and the norm after the blocks, by hand in float64."""
    encoder = language(family)
    found = found_in(encoder)
    assert found.error < 1e-12
    wide = copy.deepcopy(encoder).double()
    for module in wide.modules():
        if getattr(getattr(module, "config", None), "_experts_implementation", None):
            module.config._experts_implementation = "eager"  # type: ignore[union-attr]
    kept: dict[str, Tensor] = {}
    writes, norm = (wide.network.get_submodule(name) for name in LAST[family])
    writes.register_forward_hook(lambda module, args, out: kept.update(added=(out if isinstance(out, Tensor) else out[0]).clone()))
    norm.register_forward_pre_hook(lambda module, args: kept.update(stream=args[0]))
    with torch.no_grad():
        h = wide(torch.stack(tokens()))[:, FEATURE]
    factor = FAMILIES[family].get("residual_multiplier", 1.0)
    stream, added = kept["stream"].detach(), factor * kept["added"].detach().reshape(kept["stream"].shape)
    form = norm_of(norm)
    assert form is not None and form.centered == (family in CENTERED) and form.offset == float(family in ONE_MORE)
    if form.centered:
        stream, added = (x - x.mean(-1, keepdim=True) for x in (stream, added))
    gain = form.offset + norm.weight.detach()[FEATURE] if getattr(norm, "weight", None) is not None else 1.0
    want = (added[..., FEATURE] / (stream.square().mean(-1) + form.eps).sqrt()).mean(1) * gain * h.sign()
    one = next(row for row in found.parts if row["contribution"] == pytest.approx(float(want.mean()), rel=1e-4))
    # The layers of OPT stand in the block, whose name does not say what they do.
    assert one["kind"] == ("mlp" if family != "OPT" else "branch") and "1" in one["block"].split(".")


def plant(family: str, name: str, index: object, value: float) -> Mean:
    encoder = language(family)
    with torch.no_grad():
        encoder.network.get_parameter(name)[index] = value
    return encoder


@pytest.mark.parametrize(
    ("family", "name", "index", "value", "kind"),
    [
        ("GPT2", "h.1.mlp.c_proj.bias", FEATURE, 60.0, "bias"),
        ("GPT2", "h.0.attn.c_proj.weight", (slice(None), FEATURE), 3.0, "row"),  # x @ weight: a column writes a feature
        ("Bloom", "h.1.mlp.dense_4h_to_h.bias", FEATURE, 60.0, "bias"),
        ("OPT", "decoder.layers.0.fc2.bias", FEATURE, 60.0, "bias"),
        ("T5Encoder", "encoder.block.1.layer.1.DenseReluDense.wo.weight", FEATURE, 30.0, "row"),
        ("Gemma", "norm.weight", FEATURE, 80.0, "gain"),
        ("Gemma2", "layers.1.post_feedforward_layernorm.weight", FEATURE, 80.0, "gain"),
        ("Cohere", "norm.weight", FEATURE, 80.0, "gain"),
        ("Nemotron", "norm.weight", FEATURE, 80.0, "gain"),
        ("Granite", "layers.1.mlp.down_proj.weight", FEATURE, 30.0, "row"),
        ("NanoChat", "layers.1.mlp.fc2.weight", FEATURE, 30.0, "row"),
    ],
)
def test_a_planted_parameter_comes_first(family: str, name: str, index: object, value: float, kind: str) -> None:
    first = found_in(plant(family, name, index, value)).parameters[0]
    assert (first.parameter, first.index, first.kind) == (f"network.{name}", FEATURE, kind)
    if kind != "row":
        assert first.value == pytest.approx(value + (kind == "gain" and family in ONE_MORE))


def test_the_gain_of_gemma_is_changed_to_the_median_of_what_multiplies() -> None:
    encoder = plant("Gemma", "norm.weight", FEATURE, -80.0)
    found = found_in(encoder, changes=1)
    assert found.parameters[0].value == pytest.approx(79.0)
    with torch.no_grad():
        weight = encoder.network.norm.weight
        before = encoder(torch.stack(tokens())).abs().mean(0)
        weight[FEATURE] = -1 - (1 + weight).abs().median()
        after = encoder(torch.stack(tokens())).abs().mean(0)
    change = next(row for row in found.changes if row.how == "median")
    assert change.relative_size_before == pytest.approx(float(before[FEATURE] / before.mean()), rel=1e-4)
    assert change.relative_size == pytest.approx(float(after[FEATURE] / after.mean()), rel=1e-4)


def test_a_group_norm_before_the_blocks_is_no_norm_of_vectors() -> None:
    """For a vector it is a LayerNorm, and for maps it is not."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8))
            self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.blocks(self.stem(x).flatten(2).mT)).mean(1)

    assert norm_of(nn.GroupNorm(1, 8)) is not None
    torch.manual_seed(0)
    assert provenance(Net(), list(torch.randn(4, 3, 16, 16)), [2], changes=0).error < 1e-12


def test_norms_are_known_by_what_they_do_to_vectors_or_maps() -> None:
    class OfMaps(nn.Module):
        """As timm's RmsNorm2d: it takes nothing but maps."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.5, 2.0, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt() * self.weight.view(1, -1, 1, 1)

    class OneMore(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.layer_norm(x, (8,), 1 + self.weight, self.bias, self.eps)

    class Same(nn.LayerNorm):
        pass

    kinds = [norm_of(module) for module in (OfMaps(), OneMore(8), Same(8), nn.GroupNorm(2, 8), nn.Identity())]
    assert [None if norm is None else (norm.centered, norm.offset, norm.own) for norm in kinds] == [
        (False, 0.0, True),
        (True, 1.0, True),
        (True, 0.0, False),
        None,
        None,
    ]
