"""Inputs of different lengths: nested tensors, and padding masks. Every vector counts once, and padding never does."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from models import COMPILER_WARNINGS, Calls, Net, told
from torch import Tensor, nn

import torchprobe

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
LENGTHS = (3, 5, 1, 4)
POSITIONS = ("all", "class", "patch", "mean")
every_position = pytest.mark.parametrize("positions", POSITIONS)
both_layouts = pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "strided"])


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def parts(*lengths: int, width: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator) for length in lengths or LENGTHS]


def nested(tensors: list[Tensor], layout: Any = torch.jagged) -> Tensor:
    return torch.nested.nested_tensor(tensors, layout=layout)


def expected(tensors: list[Tensor], positions: str) -> Tensor:
    """The vectors of some parts, (tokens, features) each."""
    if positions == "mean":
        return torch.stack([part.double().mean(0) for part in tensors if len(part)])
    cut = {"all": slice(None), "class": slice(0, 1), "patch": slice(1, None)}[positions]
    return torch.cat([part[cut] for part in tensors])


def assert_near(got: Any, x: Tensor) -> None:
    """As the oracle, for vectors that were rounded on their way."""
    x = x.double()
    want = oracle.moments(x)
    assert (got.vectors, got.constant_vectors, got.invalid_vectors) == tuple(
        want[f"{name}vectors"] for name in ("", "constant_", "invalid_")
    )
    for name in ("mean", "min", "max", "mean_abs", "variance"):
        torch.testing.assert_close(getattr(got, name), torch.from_numpy(want[name]), rtol=1e-5, atol=1e-6)
    if got.vectors:
        assert got.vector_kurtosis == pytest.approx(want["vector_kurtosis"], rel=1e-4)


def read(x: Tensor, positions: str = "all", **options: Any) -> torchprobe.Recorder:
    model = nn.Identity()
    with told() as texts, torchprobe.record(model, "", positions=positions, **options) as rec:
        model(x)
        model(x)
    assert texts == [] or "'': its 2 calls had empty batches" in texts[0]
    return rec


def assert_read(rec: torchprobe.Recorder, tensors: list[Tensor], positions: str, times: int = 2, layer: str = "") -> None:
    vectors = expected(tensors, positions)
    if not len(vectors):
        assert layer not in rec or rec[layer].vectors == 0
    elif positions == "mean":
        assert_near(rec[layer], torch.cat([vectors] * times))
    else:
        oracle.assert_close(rec[layer], torch.cat([vectors] * times))


# -- nested tensors --------------------------------------------------------------------------------------------------------------


@both_layouts
@every_position
def test_a_layer_that_gives_what_it_was_given(positions: str, layout: Any) -> None:
    assert_read(read(nested(parts(), layout), positions), parts(), positions)


@both_layouts
@every_position
@pytest.mark.parametrize("lengths", [(3, 3), (4,), (1, 1, 1), (2, 0, 3), (8, 8, 8)])
def test_lengths_that_are_equal_or_nothing(lengths: tuple[int, ...], positions: str, layout: Any) -> None:
    """Parts may be empty, and as long as others, or as they are wide."""
    given = parts(*lengths)
    rec = read(nested(given, layout), positions, feature_dim=-1)
    assert_read(rec, given, positions)
    if len(set(lengths)) > 1:
        assert_read(read(nested(given, layout), positions), given, positions)


@every_position
def test_holes_of_a_jagged_tensor(positions: str) -> None:
    """Narrowed: only a part of each row counts."""
    base = torch.randn(2, 6, 8)
    starts, lengths = torch.tensor([0, 1]), torch.tensor([3, 5])
    x = torch.nested.narrow(base, 1, starts, lengths, layout=torch.jagged)
    assert_read(read(x, positions), [base[0, :3], base[1, 1:6]], positions)


@every_position
def test_holes_between_parts(positions: str) -> None:
    values, offsets, lengths = torch.randn(12, 8), torch.tensor([0, 4, 4, 9, 12]), torch.tensor([2, 0, 5, 1])
    x = torch.nested.nested_tensor_from_jagged(values, offsets=offsets, lengths=lengths)
    assert_read(read(x, positions), [values[0:2], values[4:4], values[4:9], values[9:10]], positions)


@both_layouts
@every_position
def test_chunks_of_features(positions: str, layout: Any) -> None:
    """As q, k and v are cut out of one projection."""
    for index in range(2):
        x = nested(parts(width=16), layout).chunk(2, -1)[index]
        assert_read(read(x, positions), [part.chunk(2, -1)[index] for part in parts(width=16)], positions)


def test_transposed_with_features_before_tokens() -> None:
    x = nested(parts()).transpose(1, 2)
    for options in ({}, {"feature_dim": 1}):
        rec = read(x, **options)
        assert rec[""].features == 8
        assert_read(rec, parts(), "all")
        assert [(row["feature_dim"], row["features"]) for row in rec.rows()] == [(1, 8)]
    strided = nested(parts(), torch.strided).transpose(1, 2)
    rec = read(strided)
    assert_read(rec, parts(), "all")


@both_layouts
def test_heads_of_attention(layout: Any) -> None:
    """(batch, tokens, heads, width) and (batch, heads, tokens, width)."""
    given = [torch.randn(length, 2, 4) for length in LENGTHS]
    x = nested(given, layout)
    flat = torch.cat([part.flatten(0, 1) for part in given])
    rec = read(x, feature_dim=-1)
    oracle.assert_close(rec[""], torch.cat([flat, flat]))
    rec = read(x.transpose(1, 2), feature_dim=-1)
    oracle.assert_close(rec[""], torch.cat([flat, flat]))
    rec = read(x, "mean", feature_dim=-1)
    means = torch.stack([part.double().mean((0, 1)) for part in given])
    assert_near(rec[""], torch.cat([means, means]))


@both_layouts
def test_several_fixed_sizes_are_unsure_without_layers(layout: Any) -> None:
    x = nested([torch.randn(length, 2, 4) for length in LENGTHS], layout)
    model = nn.Identity()
    with told() as texts, torchprobe.record(model, "**") as rec:
        model(x)
    assert rec.layers == []
    assert "unsure" in texts[-1] or "hold no features" in texts[-1]


@both_layouts
@pytest.mark.parametrize("positions", ["class", "patch"])
def test_positions_of_heads_are_refused(positions: str, layout: Any) -> None:
    x = nested([torch.randn(length, 2, 4) for length in LENGTHS], layout)
    with told(), pytest.raises(ValueError, match=f"layer '': positions=\"{positions}\" needs"):
        read(x, positions, feature_dim=-1)


@both_layouts
def test_a_nonfinite_value_spoils_its_own_part_only(layout: Any) -> None:
    given = parts()
    given[1][2, 3] = float("nan")
    rec = read(nested(given, layout), "mean")
    assert (rec[""].vectors, rec[""].invalid_vectors) == (6, 2)
    rec = read(nested(given, layout), "all")
    assert (rec[""].vectors, rec[""].invalid_vectors) == (24, 2)


@both_layouts
@pytest.mark.parametrize("of", ["output", "input", "gradient"])
def test_nested_tensors_in_a_model(of: str, layout: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    weights = [torch.randn(length, 4) for length in LENGTHS]
    want: dict[str, list[Tensor]] = {}
    for part, weight in zip(parts(), weights, strict=True):
        x = part.clone().requires_grad_()
        h = model[0](x)
        r = model[1](h)
        y = model[2](r)
        grads = torch.autograd.grad((y * weight).sum(), [h, r, y])
        for name, values in zip(("0", "1", "2"), {"output": (h, r, y), "input": (x, h, r), "gradient": grads}[of], strict=True):
            want.setdefault(name, []).append(values.detach())
    with told() as texts, torchprobe.record(model, "*", of=of) as rec:
        out = model(nested(parts(), layout))
        if of == "gradient":
            torch.cat([(part * weight).reshape(-1) for part, weight in zip(out.unbind(), weights, strict=True)]).sum().backward()
    assert texts == []
    for name, values in want.items():
        assert_near(rec[name], torch.cat(values))


@COMPILER_WARNINGS
@every_position
def test_nested_tensors_compiled(positions: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).double()
    x = nested([part.double() for part in parts()])
    recordings = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with told() as texts, torchprobe.record(model, "*", positions=positions) as rec:
            call(x)
        assert texts == []
        recordings.append(rec)
    for layer in recordings[0]:
        torch.testing.assert_close(recordings[1][layer].state, recordings[0][layer].state, rtol=1e-9, atol=1e-9)
    want = expected([model[0](part.double()).detach() for part in parts()], positions)
    assert_near(recordings[1]["0"], want)


def test_a_mask_leaves_nested_tensors_alone() -> None:
    model = nn.Identity()
    with torchprobe.record(model, "") as rec, rec.mask(torch.zeros(4, 5, dtype=torch.bool)):
        model(nested(parts()))
    assert rec[""].vectors == sum(LENGTHS)


def test_another_statistic_reads_nested_tensors() -> None:
    model = nn.Identity()
    with torchprobe.record(model, "", statistic=[torchprobe.Moments, torchprobe.statistics.TopInputs]) as rec:
        model(nested(parts()))
    assert rec[""]["Moments"].vectors == sum(LENGTHS)
    torch.testing.assert_close(rec[""]["Moments"].max, torch.cat(parts()).double().amax(0))


# -- masks: batch or tokens first ----------------------------------------------------------------------------------------------------


def masked(x: Tensor, mask: Tensor, positions: str) -> Tensor:
    """The vectors of (batch, tokens, features) that count."""
    if positions == "mean":
        return torch.stack([row[keep].double().mean(0) for row, keep in zip(x, mask, strict=True) if keep.any()])
    cut = {"all": slice(None), "class": slice(0, 1), "patch": slice(1, None)}[positions]
    return x[:, cut][mask[:, cut]]


@every_position
@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (1, 6), (6, 1), (2, 2)])
@pytest.mark.parametrize("batch_first", [True, False])
def test_masks_with_the_batch_first_or_second(batch_first: bool, shape: tuple[int, int], positions: str) -> None:
    """Also with as many tokens as inputs, where the shape does not say which is which."""
    batch, tokens = shape
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first).eval()
    x = torch.randn(batch, tokens, 8)
    mask = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(3)) > 0.4
    mask[0] = True
    with told() as texts, torchprobe.record(layer, ["", "linear1", "norm1"], positions=positions) as rec, rec.mask(mask):
        out = layer(x if batch_first else x.transpose(0, 1))
    kept = masked(out.detach() if batch_first else out.detach().transpose(0, 1), mask, positions)
    assert [text for text in texts if "in every call" not in text and "never fired" not in text] == []
    if len(kept):
        assert_near(rec[""], kept)
        assert rec["linear1"].vectors == rec["norm1"].vectors == len(kept)


@every_position
@pytest.mark.parametrize("tokens", [7, 5])
def test_positions_with_the_batch_second(positions: str, tokens: int) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).eval()
    x = torch.randn(tokens, 5, 8)
    with torchprobe.record(model, positions=positions) as rec:
        out = model(x).detach()
    assert_near(rec[""], masked(out.transpose(0, 1), torch.ones(5, tokens, dtype=torch.bool), positions))
    assert rec["layers.0"].vectors == rec[""].vectors


@pytest.mark.parametrize("of", ["input", "gradient"])
def test_inputs_and_gradients_with_the_batch_second(of: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    x = torch.randn(5, 5, 8, requires_grad=True)
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    with torchprobe.record(layer, "", of=of) as rec, rec.mask(mask):
        out = layer(x)
        out.retain_grad()
        out.pow(3).sum().backward()
    value = x if of == "input" else out.grad
    oracle.assert_close(rec[""], masked(value.transpose(0, 1), mask, "all"))


@COMPILER_WARNINGS
@pytest.mark.parametrize("positions", ["all", "mean", "class"])
def test_the_batch_second_compiled(positions: str) -> None:
    layer = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)).double()
    x, mask = torch.randn(5, 5, 8).double(), torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    compiled = torch.compile(layer, backend="aot_eager")
    with torchprobe.record(layer, "0", positions=positions) as rec, rec.mask(mask):
        out = compiled(x).detach()
    assert_near(rec["0"], masked(out.transpose(0, 1), mask, positions))


def test_a_recurrent_layer_takes_its_batch_second() -> None:
    model = Calls(lambda self, x: self.lstm(x)[0], lstm=nn.LSTM(8, 6))
    mask = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) > 0.4
    with torchprobe.record(model, "lstm") as rec, rec.mask(mask):
        out = model(torch.randn(4, 4, 8))
    oracle.assert_close(rec["lstm"], masked(out.detach().transpose(0, 1), mask, "all"))


def test_two_encoders_of_which_one_has_its_batch_second() -> None:
    kinds = {"image": nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), "text": nn.TransformerEncoderLayer(8, 2, 16)}
    model = Calls(lambda self, x: (self.image(x), self.text(x.transpose(0, 1))), **kinds).eval()
    x, mask = torch.randn(5, 5, 8), torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    with torchprobe.record(model, ["image", "text", "text.linear1"]) as rec, rec.mask(mask):
        image, text = model(x)
    oracle.assert_close(rec["image"], masked(image.detach(), mask, "all"))
    oracle.assert_close(rec["text"], masked(text.detach().transpose(0, 1), mask, "all"))
    assert rec["text.linear1"].vectors == int(mask.sum())


# -- masks for some layers -----------------------------------------------------------------------------------------------------------


class Translator(nn.Module):
    """An encoder of 6 tokens and a decoder of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.decoder = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        for layer in self.encoder:
            source = layer(source)
        for layer in self.decoder:
            target = layer(target) + source.mean(1, keepdim=True)
        return target


@pytest.mark.parametrize("tokens", [(6, 4), (6, 6), (3, 3)])
@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
def test_a_mask_for_each_part_of_a_model(compiled: bool, tokens: tuple[int, int]) -> None:
    model = Translator()
    source, target = torch.randn(3, tokens[0], 8), torch.randn(3, tokens[1], 8)
    first, second = torch.rand(3, tokens[0]) > 0.4, torch.rand(3, tokens[1]) > 0.4
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with told() as texts, torchprobe.record(model, "*.*") as rec:
        for given in (
            {"encoder.*": first, "decoder.*": second},
            {"encoder.*": first, "**": second},
            {"encoder.0": first, "encoder.1": first, "decoder.**": second},
        ):
            with rec.mask(given):
                call(source, target)
    assert texts == []
    assert {name: rec[name].vectors for name in rec} == {
        **{f"encoder.{i}": 3 * int(first.sum()) for i in range(2)},
        **{f"decoder.{i}": 3 * int(second.sum()) for i in range(2)},
    }
    oracle.assert_close(rec["encoder.0"], torch.cat([model.encoder[0](source).detach()[first]] * 3))
    oracle.assert_close(rec["decoder.0"], torch.cat([model.decoder[0](target).detach()[second]] * 3))


def test_layers_without_a_mask_have_none() -> None:
    model = Translator()
    source, target = torch.randn(3, 6, 8), torch.randn(3, 4, 8)
    mask = torch.rand(3, 6) > 0.4
    with torchprobe.record(model, "*.*") as rec, rec.mask({"encoder.1": mask}):
        model(source, target)
    assert {name: rec[name].vectors for name in rec} == {"encoder.0": 18, "encoder.1": int(mask.sum()), "decoder.0": 12, "decoder.1": 12}


def test_one_mask_for_all_leaves_out_what_it_does_not_fit() -> None:
    """T5 with the mask of its encoder: the decoder is told of, and left out; it is not an error."""
    model = Translator()
    source, target, mask = torch.randn(3, 6, 8), torch.randn(3, 4, 8), torch.rand(3, 6) > 0.4
    with told() as texts, torchprobe.record(model, "**") as rec, rec.mask(mask):
        out = model(source, target)
    torch.testing.assert_close(out, model(source, target))
    assert {name: rec[name].vectors for name in rec} == dict.fromkeys(("encoder.0", "encoder.1"), int(mask.sum()))
    assert "rec.mask({'decoder.0': mask})" in texts[0]
    assert "3 of 5 layers were not read" in texts[-1]
    assert "1 call left out: the mask" in texts[-1]
    assert len(texts) == 2


def test_masks_hold_until_they_are_changed() -> None:
    model, x = Translator(), (torch.randn(3, 6, 8), torch.randn(3, 4, 8))
    first, second = torch.zeros(3, 6, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)
    first[0], second[1, 2] = True, True
    seen = []
    with torchprobe.record(model, "*.0") as rec:

        def vectors() -> tuple[int, int]:
            rec.reset()
            model(*x)
            return rec["encoder.0"].vectors, rec["decoder.0"].vectors

        rec.mask({"encoder.*": first})
        seen.append(vectors())
        with rec.mask({"decoder.*": second}):
            seen.append(vectors())
        seen.append(vectors())
        rec.mask({})
        seen.append(vectors())
    assert seen == [(6, 12), (18, 1), (6, 12), (18, 12)]


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ({"encodr.*": torch.ones(3, 6, dtype=torch.bool)}, ValueError, r"mask: 'encodr.\*' is (not one|none) of the recorded layers"),
        ({"encoder.*": torch.ones(3, 6)}, TypeError, "bool tensor.*try mask.bool"),
        ({"encoder.*": torch.ones(3, dtype=torch.bool)}, ValueError, r"shape \(batch, tokens\), got \(3,\)"),
        ({"encoder.*": None}, TypeError, "got NoneType"),
    ],
)
def test_masks_that_are_refused(mask: Any, error: type[Exception], message: str) -> None:
    rec = torchprobe.record(Translator(), "*.*")
    with pytest.raises(error, match=message):
        rec.mask(mask)


# -- other forms of activations ------------------------------------------------------------------------------------------------------


@COMPILER_WARNINGS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (4, 4), (2, 8), (1, 6)])
def test_tokens_of_all_inputs_one_after_the_other(shape: tuple[int, int], compiled: bool) -> None:
    """(batch · tokens, features), as before a head or in a mixture of experts."""
    batch, tokens = shape
    model = Calls(lambda self, x: self.head(self.body(x).flatten(0, 1)), body=nn.Linear(8, 6), head=nn.Linear(6, 4))
    x, mask = torch.randn(batch, tokens, 8), torch.rand(batch, tokens, generator=torch.Generator().manual_seed(1)) > 0.4
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    with told() as texts, torchprobe.record(model, "*") as rec, rec.mask(mask):
        out = call(x)
    assert texts == []
    oracle.assert_close(rec["head"], out.detach()[mask.flatten()])
    assert rec["body"].vectors == int(mask.sum())


@pytest.mark.parametrize("order", ["heads first", "tokens first"])
def test_heads_of_attention_with_a_mask(order: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        h = self.body(x).unflatten(-1, (2, 3))
        return self.heads(h.transpose(1, 2) if order == "heads first" else h)

    model = Calls(forward, body=nn.Linear(8, 6), heads=nn.Linear(3, 5))
    x, mask = torch.randn(4, 7, 8), torch.rand(4, 7) > 0.4
    with told() as texts, torchprobe.record(model, "*") as rec, rec.mask(mask):
        out = model(x).detach()
    assert texts == []
    kept = out.transpose(1, 2) if order == "heads first" else out
    oracle.assert_close(rec["heads"], kept[mask].flatten(0, 1))


def test_as_many_heads_as_tokens_is_not_clear() -> None:
    model = Calls(lambda self, x: self.heads(x.unflatten(-1, (2, 3))), heads=nn.Linear(3, 5))
    with told() as texts, torchprobe.record(model, "**") as rec, rec.mask(torch.rand(4, 2) > 0.4):
        model(torch.randn(4, 2, 6))
    assert "heads" not in rec.layers
    assert "not clear which vectors count" in texts[-1] or "the mask has shape (4, 2)" in texts[-1]


def test_pooled_activations_count_whole() -> None:
    model = Calls(lambda self, x: self.head(self.body(x)[:, 0]), body=nn.Linear(8, 6), head=nn.Linear(6, 4))
    mask = torch.rand(4, 7) > 0.4
    for positions in ("all", "class", "mean"):
        with torchprobe.record(model, "*", positions=positions) as rec, rec.mask(mask):
            out = model(torch.randn(4, 7, 8))
        assert rec["head"].vectors == 4
        if positions == "all":
            oracle.assert_close(rec["head"], out.detach())


def test_generation_with_a_cache() -> None:
    """The prompt has padding. Then comes one token for each input, and each counts."""
    model = nn.Sequential(nn.Linear(8, 6), nn.GELU())
    prompt, following = torch.randn(4, 7, 8), [torch.randn(4, 1, 8) for _ in range(3)]
    mask = torch.rand(4, 7) > 0.4
    with told() as texts, torchprobe.record(model, "*") as rec, rec.mask(mask):
        for x in (prompt, *following):
            model(x)
    assert texts == []
    want = torch.cat([model[0](prompt)[mask], *[model[0](x)[:, 0] for x in following]])
    oracle.assert_close(rec["0"], want)


def test_generation_with_the_mask_of_all_tokens_so_far() -> None:
    """As ``generate`` passes it on: the mask grows with every token."""
    model = nn.Linear(8, 6)
    prompt, mask = torch.randn(4, 7, 8), torch.rand(4, 7) > 0.4
    with told() as texts, torchprobe.record(model, "") as rec:
        rec.mask(mask)
        want = [model(prompt)[mask]]
        for length in range(8, 11):
            rec.mask(torch.cat([mask, torch.ones(4, length - 7, dtype=torch.bool)], 1))
            x = torch.randn(4, 1, 8)
            want.append(model(x)[:, 0])
    assert texts == []
    oracle.assert_close(rec[""], torch.cat(want).detach())


@pytest.mark.parametrize("shape", [(3, 7, 8), (4, 6, 8), (4, 8, 8), (5, 4, 8), (2, 14, 8)])
def test_a_mask_of_another_batch(shape: tuple[int, ...]) -> None:
    """Shapes that do not fit are never guessed at: a written name is an error, another is told and left out, and nothing is kept."""
    model, mask = nn.Sequential(nn.Linear(8, 6)), torch.rand(4, 7) > 0.4
    rec = torchprobe.record(model, "0")
    why = r"layer '0': the mask has shape \(4, 7\).*activation has shape"
    with told(), pytest.raises(ValueError, match=why), rec, rec.mask(mask):
        model(torch.randn(shape))
    with told() as texts, torchprobe.record(model, "*") as rec, rec.mask(mask):
        model(torch.randn(shape))
        assert rec.layers == []
        model(torch.randn(4, 7, 8))
    assert rec["0"].vectors == int(mask.sum())
    assert "1 call left out: the mask has shape (4, 7)" in texts[-1]


def test_a_mask_without_any_token() -> None:
    model, x = Net(), torch.randn(5, 3, 6)
    for positions in POSITIONS:
        with told() as texts, torchprobe.record(model, "head", positions=positions) as rec, rec.mask(torch.zeros(5, 3, dtype=torch.bool)):
            model(x)
        assert rec["head"].vectors == 0
        assert "had empty batches, or batches that the mask leaves out" in texts[-1]


# -- steps ---------------------------------------------------------------------------------------------------------------------------


def test_a_step_is_read_whole_or_not_at_all() -> None:
    model = nn.Linear(8, 6)
    data = [torch.randn(4, 8) for _ in range(12)]
    with torchprobe.record(model, "", every=2) as rec:
        rec.step()  # what comes before the first step counts as one
        for index, x in enumerate(data):
            model(x)
            if index % 3 == 2:
                rec.step()
    want = [model(x) for index, x in enumerate(data) if (index // 3) % 2 == 1]
    oracle.assert_close(rec[""], torch.cat(want).detach())


@COMPILER_WARNINGS
def test_steps_compiled() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    data = [torch.randn(4, 8).double() for _ in range(12)]
    recordings = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        with told(), torchprobe.record(model, "*", every=3) as rec:
            for index, x in enumerate(data):
                call(x)
                if index % 2:
                    rec.step()
        recordings.append(rec)
    plain, seen = recordings
    assert plain["0"].calls == seen["0"].calls
    for layer in plain:
        torch.testing.assert_close(seen[layer].state, plain[layer].state, rtol=1e-9, atol=1e-9)


def test_every_without_steps_counts_calls() -> None:
    model = nn.Linear(8, 6)
    data = [torch.randn(4, 8) for _ in range(7)]
    with torchprobe.record(model, "", every=3) as rec:
        for x in data:
            model(x)
    oracle.assert_close(rec[""], torch.cat([model(x) for x in data[::3]]).detach())
