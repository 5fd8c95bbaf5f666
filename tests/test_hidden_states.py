"""Outlier features of hidden states by kind of position, against the rules applied to states read by hand."""

import pytest
import torch
from torch import nn

from torchprobe.analysis import outlier_features
from torchprobe.analysis.hidden_states import HiddenStates, hidden_outliers
from torchprobe.analysis.outliers import llm_int8_outliers, massive_activations
from torchprobe.encoders import Encoder, TextEncoder
from torchprobe.recording import select_layers

FEATURES, CLASS, PATCH, MASSIVE = 48, 7, 11, 30


class Add(nn.Module):
    """Adds to the tokens what is planted."""

    def __init__(self, special, positions, scale=1.0):
        super().__init__()
        planted = torch.zeros(positions, FEATURES)
        planted[:special, CLASS] = 40 * scale
        planted[special:, PATCH] = 40 * scale
        planted[0, MASSIVE] = 6000 * scale
        self.planted = nn.Parameter(planted)

    def forward(self, x):
        return x + self.planted[: x.shape[1]]


class Transformer(nn.Module):
    """Class token, two registers and 16 patches of an image, with outlier features in different kinds of positions."""

    num_prefix_tokens = 3

    def __init__(self):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, FEATURES, 2, stride=2)
        self.special = nn.Parameter(torch.randn(1, 3, FEATURES))
        self.blocks = nn.ModuleList([Add(1, 19, 0.0), Add(1, 19)])

    def forward(self, images):
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.special.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def test_where_the_outlier_features_of_images_live():
    torch.manual_seed(0)
    network, images = Transformer(), torch.randn(40, 3, 8, 8)
    encoder = Encoder(network, features=FEATURES, preprocess=lambda image: image)
    layers = select_layers(encoder, ["visual.patch_embed", "visual.blocks.*"])
    found = hidden_outliers(encoder, images.split(7), layers)
    assert [one.layer for one in found.layers] == ["visual.patch_embed", "visual.blocks.0", "visual.blocks.1"]
    maps, quiet, loud = found.layers
    assert maps.where == {"positions": []} and maps.vectors == {"positions": 40 * 16}
    assert quiet.where == {"class token": [], "registers": [], "patches": []}
    assert {kind: sorted(indices) for kind, indices in loud.where.items()} == {
        "class token": [CLASS, MASSIVE],
        "registers": [PATCH],
        "patches": [PATCH],
    }
    assert loud.vectors == {"class token": 40, "registers": 80, "patches": 640}
    assert set(loud.indices) == {CLASS, PATCH, MASSIVE}
    with torch.no_grad():
        x = network.patch_embed(images).flatten(2).transpose(1, 2)
        first = torch.cat([network.special.expand(40, -1, -1), x], 1)
        second = network.blocks[1](first)
    parts = {"class token": second[:, :1], "registers": second[:, 1:3], "patches": second[:, 3:]}
    for kind, part in parts.items():
        assert set(loud.where[kind]) == set(outlier_features(part.flatten(0, 1)).indices.tolist())
    massive = massive_activations(second.flatten(0, 1)).features
    assert loud.massive == {MASSIVE: int((massive == MASSIVE).sum())} and loud.massive_where == ["class token"]
    expected = llm_int8_outliers([x.flatten(0, 1), first.flatten(0, 1), second.flatten(0, 1)]).indices.tolist()
    assert found.llm_int8 == expected == [PATCH] and found.llm_int8_features == FEATURES and found.inputs == 40


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, FEATURES)
        self.block = Add(1, 9)

    def forward(self, input_ids, attention_mask):
        x = self.block(self.embedding(input_ids))
        return {"last_hidden_state": x.masked_fill(attention_mask[..., None] == 0, 1e6)}


def test_where_the_outlier_features_of_texts_live_without_padding():
    torch.manual_seed(0)
    network = Language()
    network.embedding.weight.data[0, 3] = 1e6  # the padding
    encoder = TextEncoder(network, lambda texts: torch.ones(1, 3), features=FEATURES, representation="mean")
    length = torch.randint(2, 9, (50,))
    mask = (torch.arange(9) < length[:, None]).long()
    ids = torch.randint(1, 20, (50, 9)) * mask
    found = hidden_outliers(encoder, [torch.stack([ids, mask], 1)], select_layers(encoder, "text.block")).layers[0]
    assert found.vectors == {"first token": 50, "other tokens": int(length.sum()) - 50}
    assert set(found.where["first token"]) == {CLASS, MASSIVE} and found.where["other tokens"] == [PATCH]
    assert found.massive == {MASSIVE: 50} and found.massive_where == ["first token"]


def test_no_inputs():
    encoder = Encoder(Transformer(), features=FEATURES, preprocess=lambda image: image)
    with pytest.raises(ValueError, match="no inputs"):
        hidden_outliers(encoder, [], select_layers(encoder, "visual.blocks.0"))


def test_nonfinite_vectors_are_left_out():
    network = nn.Sequential(nn.Flatten(), nn.Identity())
    encoder = Encoder(network, features=FEATURES, preprocess=lambda image: image)
    h = torch.randn(60, FEATURES)
    h[:, 5] = 1000
    h[:20, 8] = torch.nan
    found = hidden_outliers(encoder, [h[:, :, None, None]], select_layers(encoder, "visual.0")).layers[0]
    assert found.where == {"vector": [5]} and found.vectors == {"vector": 40}


class Maps(nn.Module):
    """A map of 40 features: feature 3 stands out everywhere, feature 7 on a third of the places, feature 9 on one place alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 1)
        self.body = nn.Identity()

    def forward(self, images):
        maps = self.stem(images).tanh()
        maps[:, 3] += 300
        maps[:, 7, ::3] += 50
        maps[:, 9, 5, 5] -= 9000
        return self.body(maps).mean((2, 3))


@pytest.mark.parametrize("parts", [1, 3])
def test_a_sample_of_the_positions_of_maps(parts):
    torch.manual_seed(0)
    encoder = Encoder(Maps().eval(), features=40, preprocess=lambda image: image)
    images = torch.randn(12, 3, 21, 21)
    layers = select_layers(encoder, "visual.body")

    def found(map_positions):
        with HiddenStates(encoder, layers, map_positions) as states, torch.no_grad():
            for some in images.chunk(parts):
                with states.following(some):
                    encoder(some)
        return states.result()

    (whole,), (some,) = found(None).layers, found(64).layers
    assert whole.vectors == {"positions": 12 * 441} and some.vectors == {"positions": 12 * 64}
    assert whole.where == some.where == {"positions": [3, 7]}
    assert some.massive == whole.massive and 9 in some.massive, "one place of each map, which a sample would miss"
    assert found(64).llm_int8 == found(None).llm_int8
    assert found(500).layers[0] == whole, "a map of fewer positions is read as a whole"
