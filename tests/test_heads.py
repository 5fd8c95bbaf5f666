"""Heads: what they compute, files there and back, and which layer of a checkpoint is taken for one."""

import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from torchprobe.encoders import EncoderError, Head, load_head


def double(head, h):
    h, weight = h.double(), head.weight.detach().double()
    if head.normalize:
        h = h / h.pow(2).sum(-1, keepdim=True).sqrt()
    return h @ weight.T + (0 if head.bias is None else head.bias.detach().double())


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


# -- the layer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "offset"), [(1e-8, 0), (1, 0), (1, 1e4), (1e8, 0)])
def test_logits_equal_the_formula_in_float64(layer, normalize, bias, scale, offset):
    head = Head(layer.weight, layer.bias if bias else None, normalize=normalize)
    h = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)) * scale + offset
    want = double(head, h)
    assert torch.allclose(head(h).double(), want, rtol=1e-5, atol=1e-5 * want.abs().max().item())


def test_a_head_is_an_independent_copy(layer):
    head = Head(layer.weight, layer.bias)
    with torch.no_grad():
        layer.weight.zero_()
    assert head.weight.abs().sum() > 0 and head.weight.requires_grad


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(3), {}, r"shape \(classes, features\), got \(3,\)"),
        (torch.zeros(0, 3), {}, r"got \(0, 3\)"),
        (torch.zeros(2, 0), {}, r"got \(2, 0\)"),
        (torch.zeros(2, 3, dtype=torch.int64), {}, "floating, got torch.int64"),
        (torch.zeros(2, 3), {"bias": torch.zeros(3)}, r"2 classes must have the shape \(2,\), got \(3,\)"),
        (torch.zeros(2, 3), {"names": ["one"]}, "2 classes needs 2 names, got 1"),
        (torch.zeros(2, 3), {"names": "ab"}, "needs 2 names, got 1"),
    ],
)
def test_what_is_no_head(weight, options, message):
    with pytest.raises(ValueError, match=message):
        Head(weight, **options)


# -- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", [None, ["tench", 'a "quoted", name', "Käfer", ""]])
def test_there_and_back(tmp_path, layer, normalize, bias, names):
    head = Head(layer.weight, layer.bias if bias else None, normalize=normalize, names=names)
    head.save(tmp_path / "head.safetensors")
    back = load_head(tmp_path / "head.safetensors", features=6)
    assert torch.equal(back.weight, head.weight)
    assert (back.bias is None) is not bias and (not bias or torch.equal(back.bias, head.bias))
    assert (back.normalize, back.names) == (normalize, None if names is None else tuple(names))
    assert [file.name for file in tmp_path.iterdir()] == ["head.safetensors"]


def test_the_caller_has_the_last_word_on_normalization(tmp_path, layer):
    Head(layer.weight, normalize=True).save(tmp_path / "head.safetensors")
    assert not load_head(tmp_path / "head.safetensors", 6, normalize=False).normalize
    torch.save(layer.state_dict(), tmp_path / "head.pt")
    assert not load_head(tmp_path / "head.pt", 6).normalize
    assert load_head(tmp_path / "head.pt", 6, normalize=True).normalize


def test_strided_weights_and_other_endings(tmp_path):
    head = Head(torch.randn(6, 4).T)
    head.weight.data = torch.randn(6, 4).T
    head.save(tmp_path / "head.safetensors")
    assert torch.equal(load_head(tmp_path / "head.safetensors", 6).weight, head.weight)
    with pytest.raises(ValueError, match=r"saved in a .safetensors file, got '.*head.pt'"):
        head.save(tmp_path / "head.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_heads_are_read_in_float32(tmp_path, layer, dtype):
    torch.save(layer.to(dtype).state_dict(), tmp_path / "head.pt")
    assert load_head(tmp_path / "head.pt", 6).weight.dtype == torch.float32


@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize(
    "path",
    ["", "head", "fc", "classifier", "module.classification_head", "_orig_mod.fc", "model.heads.head", "net.classifier.6", "linear", "odd"],
)
def test_common_places(tmp_path, layer, nest, path):
    prefix = f"{path}." if path else ""
    state = {f"{prefix}{key}": value for key, value in layer.state_dict().items()}
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "w.pt")
    assert torch.equal(load_head(tmp_path / "w.pt", 6).weight, layer.weight)


def test_a_named_head_among_other_layers(tmp_path, layer):
    others = {f"blocks.{i}.fc1.weight": torch.zeros(24, 6) for i in range(3)} | {"conv.weight": torch.zeros(4, 6, 1, 1)}
    torch.save(others | {"head.weight": layer.weight.detach(), "aux.fc.weight": torch.zeros(4, 5)}, tmp_path / "w.pt")
    head = load_head(tmp_path / "w.pt", 6)
    assert torch.equal(head.weight, layer.weight) and head.bias is None


def test_the_last_of_a_stack(tmp_path, layer):
    stack = {f"classifier.{i}.weight": torch.zeros(6, 6) for i in (0, 2, 3)}
    torch.save({"classifier.10.weight": layer.weight.detach()} | stack, tmp_path / "w.pt")
    assert torch.equal(load_head(tmp_path / "w.pt", 6).weight, layer.weight)
    assert load_head(tmp_path / "w.pt", 6, key="classifier.2").weight.abs().sum() == 0


def test_several_are_named_and_chosen_by_key(tmp_path, layer):
    torch.save({"a.head.weight": torch.zeros(3, 6), "b.head.weight": layer.weight.detach()}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"several linear layers of 6 features: a\.head, b\.head; choose one with key="):
        load_head(tmp_path / "w.pt", 6)
    for key in ("b.head", "b.head.weight"):
        assert torch.equal(load_head(tmp_path / "w.pt", 6, key=key).weight, layer.weight)
    with pytest.raises(EncoderError, match=r"no linear layer 'c\.head'; it has a\.head, b\.head; did you mean"):
        load_head(tmp_path / "w.pt", 6, key="c.head")
    torch.save({"x.weight": torch.zeros(3, 6), "y.weight": torch.zeros(3, 6)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="several linear layers of 6 features: x, y"):
        load_head(tmp_path / "w.pt", 6)


def test_a_wrong_width_names_both(tmp_path, layer):
    torch.save({"fc.weight": layer.weight.detach()}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"representation of 512 features: fc takes 6$"):
        load_head(tmp_path / "w.pt", 512)
    with pytest.raises(EncoderError, match="512 features: fc takes 6$"):
        load_head(tmp_path / "w.pt", 512, key="fc")
    with pytest.raises(EncoderError, match=r"4 features: fc takes 6\. Is it transposed\?"):
        load_head(tmp_path / "w.pt", 4)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the code in the file was run')",)


def test_files_that_hold_no_head(tmp_path):
    with pytest.raises(EncoderError, match="no checkpoint at"):
        load_head(tmp_path / "none.pt", 6)
    torch.save({"conv.weight": torch.zeros(4, 6, 1, 1), "count.weight": torch.zeros(4, 6, dtype=torch.int64)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"no linear layer: expected a weight \(classes, 6\)"):
        load_head(tmp_path / "w.pt", 6)
    torch.save({"head.weight": torch.zeros(4, 6), "head.bias": torch.zeros(5)}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match=r"head cannot be a head: .*\(4,\), got \(5,\)"):
        load_head(tmp_path / "w.pt", 6)
    torch.save({"weight": torch.zeros(4, 6), "config": Bomb()}, tmp_path / "w.pt")
    with pytest.raises(EncoderError, match="not loaded"):
        load_head(tmp_path / "w.pt", 6)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(EncoderError, match=r"not loaded|cannot be read"):
        load_head(tmp_path / "bare.pt", 6)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"kind": "head"}, "metadata cannot be read: KeyError"),
        ({"kind": "head", "normalize": "yes", "names": "null"}, "metadata cannot be read: JSONDecodeError"),
        ({"kind": "head", "normalize": "true", "names": '["one"]'}, "4 classes needs 4 names, got 1"),
        ({"kind": "head", "normalize": "true", "names": "3"}, "metadata cannot be read"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path, layer, metadata, message):
    save_file(layer.state_dict(), tmp_path / "w.safetensors", metadata)
    with pytest.raises(EncoderError, match=message):
        load_head(tmp_path / "w.safetensors", 6)


def test_a_changed_byte_of_a_saved_head_is_an_error(tmp_path, layer):
    path = tmp_path / "head.safetensors"
    Head(layer.weight, layer.bias, normalize=True, names=list("abcd")).save(path)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    unused = {at for at in range(8, size) if content[at:size].isspace()}
    for at in set(range(8, len(content))) - unused:
        mutant = bytearray(content)
        mutant[at] ^= 1
        path.write_bytes(mutant)
        with pytest.raises(EncoderError, match="head.safetensors"):
            load_head(path, 6)


def test_a_saved_head_without_checksums_loads(tmp_path, layer):
    metadata = {"format": "1", "kind": "head", "normalize": "true", "names": "null"}
    save_file(layer.state_dict(), tmp_path / "head.safetensors", metadata)
    assert load_head(tmp_path / "head.safetensors", 6).normalize


def test_metadata_of_others_is_left_alone(tmp_path, layer):
    save_file(layer.state_dict(), tmp_path / "w.safetensors", {"format": "pt", "names": "?"})
    assert load_head(tmp_path / "w.safetensors", 6).names is None
    Head(layer.weight).save(tmp_path / "head.safetensors")
    with safe_open(tmp_path / "head.safetensors", framework="pt") as file:
        assert {key: file.metadata()[key] for key in file.metadata() if key != "checksums"} == {
            "format": "1",
            "kind": "head",
            "normalize": "false",
            "names": "null",
        }
