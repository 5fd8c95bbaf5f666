"""What a dissection refuses, and how it leaves the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from broden_sets import write_trap_set
from dissection_models import Net, preprocess
from torch import nn

from torchprobe.datasets import Broden, DatasetError
from torchprobe.datasets.geometry import GeometryError
from torchprobe.dissection import dissect
from torchprobe.dissection.taps import find_sites
from torchprobe.encoders import Encoder
from torchprobe.recording import select_layers
from torchprobe.recording.reader import LayerReader


@pytest.fixture(scope="module")
def broden(tmp_path_factory):
    return Broden(write_trap_set(tmp_path_factory.mktemp("broden"), images=24, seed=0).root)


# -- the model is left as it was -------------------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was(broden):
    model = Net()
    model.norm.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def broken(image):
        raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        dissect(model, "norm", broden, preprocess=broken)
    dissect(model, "norm", broden, preprocess=preprocess)
    assert model.training and model.conv.training and not model.norm.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_compiled_models_run_eagerly_meanwhile(broden):
    model = torch.compile(Net().eval(), backend="eager")
    model(torch.zeros(2, 3, 32, 32))  # a graph that knows of no hook
    found = dissect(model, "norm", broden, preprocess=preprocess)["norm"]
    assert torch.equal(found.counts.intersection, dissect(Net(), "norm", broden, preprocess=preprocess)["norm"].counts.intersection)
    torch._dynamo.reset()


def test_layers_that_cannot_be_read():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused, self.text, self.volume = nn.Linear(1, 1), nn.Identity(), nn.Identity()

        def forward(self, x):
            self.text([])
            self.volume(x[None])
            return x

    for layer, feature_dim, message in (
        ("unused", None, "'unused' is not called"),
        ("text", None, "gives no tensor"),
        ("volume", None, "unsure which of its dimensions holds features"),
        ("volume", 1, "neither maps, nor tokens"),
    ):
        model = Odd()
        with LayerReader(model, select_layers(model, layer, feature_dim)) as reader, pytest.raises(ValueError, match=message):
            find_sites(reader, torch.zeros(1, 3, 8, 8))


# -- refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "magic"}, "mode must be one of default"),
        ({"score": "f1"}, "score must be some of iou, ap"),
        ({"score": ()}, "score must be some"),
        ({"pooling": "sum"}, "pooling must be"),
        ({"sign": "0"}, "sign must be"),
        ({"minimum_area": 2.0}, "share between 0 and 1"),
        ({"top": -1}, "top must be"),
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"rows": [0, 0]}, "distinct rows"),
        ({"rows": [10**6]}, "distinct rows"),
        ({"preprocess": None}, "give preprocess="),
        ({"basis": "sideways"}, "\"rotation\", got 'sideways'"),
        ({"basis": torch.eye(5)}, r"must be \(directions, 12\), got \(5, 5\)"),
        ({"basis": torch.zeros(2, 12)}, "row 0 of the basis"),
        ({"basis": {"conv1": torch.eye(12)}}, "'conv1', which is not dissected"),
        ({"thresholds": {"norm": torch.zeros(3)}}, r"thresholds of shape \(12,\), got \(3,\)"),
        ({"layers": "nrom"}, "did you mean 'norm'"),
        ({"quantile": 1.5}, "quantile must be between"),
    ],
)
def test_arguments_that_do_not_fit(broden, options, message):
    with pytest.raises(ValueError, match=message):
        dissect(Net(), broden=broden, **{"layers": "norm", "preprocess": preprocess, **options})


def test_pictures_that_cannot_be_used(tmp_path):
    trap = write_trap_set(tmp_path, images=8)
    broken = trap.data_rows[3]
    (trap.root / "images" / broken.image).write_bytes(b"no picture")
    with pytest.raises(DatasetError, match="index.csv line.*not a picture in one of the formats"):
        dissect(Net(), "norm", Broden(tmp_path), preprocess=preprocess, top=0)
    good = Broden(write_trap_set(tmp_path / "good", images=8).root)
    sizes = iter(range(8, 2000))
    with pytest.raises(ValueError, match="preprocess is random"):
        dissect(Net(), "norm", good, preprocess=lambda image: torch.zeros(3, next(sizes), 8), batch_size=4)
    with pytest.raises(ValueError, match="preprocess must resize"):
        dissect(
            Net(), "norm", good, preprocess=lambda image: preprocess(image)[:, : 8 + int(np.array(image)[0, 0, 0]) % 7], geometry="whole"
        )
    with pytest.raises(
        GeometryError, match="it cannot be told which part of a .* picture the preprocessing shows: black and white pictures"
    ):
        dissect(Net(), "norm", good, preprocess=lambda image: torch.zeros(3, 8, 8))
    with pytest.raises(GeometryError, match="it turns, mirrors or bends pictures"):
        dissect(Net(), "norm", good, preprocess=lambda image: preprocess(image).flip(2))
    with pytest.raises(ValueError, match="one of whole, encoder"):
        dissect(Encoder(Net(), features=1, preprocess=preprocess), "visual.norm", good, preprocess="crop")


def test_a_nan_cannot_be_ranked(broden):
    class Nan(Net):
        def forward(self, x):
            return super().forward(x.where(x.mean((1, 2, 3), keepdim=True) < 0.5, torch.nan))

    with pytest.raises(ValueError, match="layer 'norm' gives nan for image "):
        dissect(Nan(), "norm", broden, preprocess=preprocess)
    with pytest.warns(UserWarning, match="layer 'norm' gives nan, first for image .*: such positions count as not active") as told:
        assert dissect(Nan(), "norm", broden, preprocess=preprocess, score="iou")["norm"].counts.intersection.sum() > 0
    assert len([warning for warning in told if "gives nan" in str(warning.message)]) == 1
