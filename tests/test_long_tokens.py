"""Tokens that are long among the tokens of their input: planted ones are found, in images and texts, and no others."""

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.analysis.hidden_states import LayerOutliers, hidden_outliers
from torchprobe.analysis.long_tokens import RATIO, long_tokens
from torchprobe.encoders import Encoder, TextEncoder
from torchprobe.recording import select_layers

FEATURES, REGISTERS = 48, (5, 11)


def planted(n=20, positions=40, d=32, times=8.0, at=(3, 17)):
    tokens = torch.randn(n, positions, d, dtype=torch.float64)
    tokens[:, at] *= times
    return tokens


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("times", [4.0, 1e6])
def test_planted_tokens_are_found_and_no_others(scale, times):
    torch.manual_seed(0)
    long, relative = long_tokens(planted(times=times) * scale)
    assert long.nonzero()[:, 1].unique().tolist() == [3, 17] and int(long.sum()) == 40
    assert relative[long].median() == pytest.approx(times, rel=0.1) and relative[~long].median() == pytest.approx(1, abs=0.05)


def test_it_is_its_definition():
    tokens = planted(5, 30, 16, 3.0)
    norm = np.linalg.norm(tokens.numpy(), axis=-1)
    long, relative = long_tokens(tokens)
    np.testing.assert_allclose(relative, norm / np.quantile(norm, 0.5, axis=1, keepdims=True), rtol=1e-12)
    bulk = np.array([np.delete(row, [3, 17]) for row in norm])  # the other 28 are the bulk
    beyond = norm - bulk.mean(1, keepdims=True) > 6 * bulk.std(1, keepdims=True)
    np.testing.assert_array_equal(long, beyond & (norm >= RATIO * np.quantile(norm, 0.5, axis=1, keepdims=True)))


@pytest.mark.parametrize("d", [8, 64, 768])
def test_tokens_without_registers_have_none(d):
    torch.manual_seed(0)
    kinds = {
        "Gaussian": torch.randn(40, 197, d),
        "one offset": torch.randn(40, 197, d) + 3,
        "normalized": nn.functional.layer_norm(torch.randn(40, 197, d), (d,)),
        "equal": torch.ones(40, 197, d),
        "zero": torch.zeros(40, 197, d),
        "an outlier feature in every token": torch.randn(40, 197, d) + 100 * (torch.arange(d) == 3),
        "lengths that differ by their nature": torch.randn(40, 197, d) * torch.rand(40, 197, 1),
    }
    for name, tokens in kinds.items():
        assert not long_tokens(tokens)[0].any(), name


def test_a_small_difference_is_not_a_register():
    tokens = nn.functional.normalize(torch.randn(10, 50, 32, dtype=torch.float64), dim=-1)
    tokens[:, 4] *= 1.5  # far outside a bulk of equal lengths, but hardly longer
    assert not long_tokens(tokens)[0].any() and long_tokens(tokens, ratio=1.2)[0].nonzero()[:, 1].unique().tolist() == [4]


def test_short_tokens_are_not_long():
    tokens = planted(times=1e-3)
    assert not long_tokens(tokens)[0].any()


def test_padding_and_nonfinite_tokens_do_not_count():
    tokens = planted(6, 40, 32)
    mask = torch.ones(6, 40, dtype=torch.bool)
    tokens[:, 30:], mask[:, 30:] = 1e9, False
    tokens[0, 2] = torch.nan
    long, relative = long_tokens(tokens, mask)
    assert long.nonzero()[:, 1].unique().tolist() == [3, 17] and relative[:, 30:].isnan().all() and relative[0, 2].isnan()
    assert torch.equal(long[:, :30], long_tokens(tokens[:, :30])[0])
    assert not long_tokens(tokens, torch.zeros_like(mask))[0].any()
    assert long_tokens(tokens[:0])[0].shape == (0, 40)
    with pytest.raises(ValueError, match="expected tokens"):
        long_tokens(tokens[0])
    with pytest.raises(ValueError, match="a mask"):
        long_tokens(tokens, mask[:, :3])


class Lengthen(nn.Module):
    """A block that makes some positions long in random directions, so that no feature stands out."""

    def __init__(self, at, times):
        super().__init__()
        self.at, self.times = list(at), times

    def forward(self, x):
        factor = torch.ones(x.shape[1])
        factor[self.at] = self.times
        return x * factor[:, None]


class Transformer(nn.Module):
    num_prefix_tokens = 1

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, FEATURES, 2, stride=2)
        self.class_token = nn.Parameter(torch.randn(1, 1, FEATURES) / 4)
        self.blocks = nn.ModuleList([nn.Identity(), Lengthen(REGISTERS, 20.0), Lengthen((0, *REGISTERS), 100.0)])

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def test_registers_of_images():
    torch.manual_seed(0)
    network, images = Transformer(), torch.randn(12, 3, 16, 16)
    encoder = Encoder(network, features=FEATURES, preprocess=lambda image: image)
    found = hidden_outliers(encoder, images.split(5), select_layers(encoder, ["visual.patch_embed", "visual.blocks.*"]))
    maps, quiet, middle, last = found.layers
    for one in (maps, quiet):
        assert (one.long, one.registers) == ({}, {}) and np.isnan(one.long_ratio)
    assert middle.long == {"patches": 24} and middle.indices == [] and middle.long_ratio == pytest.approx(20, rel=0.2)
    assert last.long == {"class token": 12, "patches": 24} and last.long_ratio > 90
    with torch.no_grad():  # the threshold of Darcet et al. on states read by hand
        x = network.patch_embed(images).flatten(2).transpose(1, 2)
        x = network.blocks[2](network.blocks[1](torch.cat([network.class_token.expand(12, -1, -1), x], 1)))
    beyond = torch.linalg.vector_norm(x, dim=-1) > 150
    assert last.registers == {kind: int(n) for kind, n in {"class token": beyond[:, :1].sum(), "patches": beyond[:, 1:].sum()}.items() if n}
    assert last.registers["patches"] == 24


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.block = nn.Embedding(20, FEATURES), Lengthen((0,), 50.0)

    def forward(self, input_ids, attention_mask):
        return {"last_hidden_state": self.block(self.embedding(input_ids)).masked_fill(attention_mask[..., None] == 0, 1e6)}


def test_the_first_token_of_texts_without_padding():
    torch.manual_seed(0)
    encoder = TextEncoder(Language(), lambda texts: torch.ones(1, 3), features=FEATURES, representation="mean")
    mask = (torch.arange(30) < torch.randint(15, 30, (25, 1))).long()
    inputs = torch.stack([torch.randint(1, 20, (25, 30)), mask], 1)
    (found,) = hidden_outliers(encoder, [inputs], select_layers(encoder, "text.block")).layers
    assert found.long == {"first token": 25} and found.long_ratio == pytest.approx(50, rel=0.2)
    assert found.registers == {"first token": 25}


def test_in_words():
    found = LayerOutliers(
        "blocks.1", 48, {}, {"class token": 4, "patches": 64}, {}, [], {"class token": 2, "patches": 5}, 7.34, {"patches": 3}
    )
    assert found.long_in_words == "7, 7.3 × (class token, patches)"
    assert LayerOutliers("blocks.0", 48, {}, {}, {}, []).long_in_words == ""


def test_a_scan_names_them(tmp_path):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from PIL import Image
    from torchvision.transforms.functional import to_tensor

    from torchprobe.datasets import image_folder
    from torchprobe.studies.scan import scan
    from torchprobe.studies.scan_report import hidden_sentence, layer_columns

    torch.manual_seed(0)
    random = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(random.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f"{i}.png")
    encoder = Encoder(Transformer(), features=FEATURES, preprocess=to_tensor)
    found = scan(encoder, image_folder(tmp_path), "visual.blocks.*")
    rows = {row["layer"]: row["long_tokens"] for row in found.rows()}
    assert rows["visual.blocks.0"] == "" and rows["visual.blocks.1"].startswith("24, 2") and rows["visual.blocks.1"].endswith("× (patches)")
    assert "60 tokens of all layers are at least twice as long" in hidden_sentence(found.hidden)
    assert "long_tokens" in [column.key for column in layer_columns()]
