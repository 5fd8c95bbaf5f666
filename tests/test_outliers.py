"""Outlier features by the classical rule, with their table against numpy in float64, and the definitions of others on planted examples.

``test_outlier_rule`` has the robust rule.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.analysis import inputs as blocks_module
from torchprobe.analysis.embeddings import Embeddings
from torchprobe.analysis.outliers import (
    FEATURE_COLUMNS,
    PEAK,
    layer_norm_outliers,
    llm_int8_outliers,
    massive_activations,
    outlier_features,
    registers,
    rms_kurtosis,
)
from torchprobe.rendering.tables import shown


def planted(n=300, d=128):
    """Feature 11 far out in every vector, 70 in every third, 5 in one; the sign does not matter."""
    h = torch.randn(n, d)
    h[:, 11] = 20
    h[::3, 70] = -20
    h[4, 5] = 40
    return h


# -- the classical rule ------------------------------------------------------------------------------------------------------------


def classical(h, **options):
    return outlier_features(h, rule="classical", **options)


def test_how_often_decides():
    h = planted()
    assert classical(h).indices.tolist() == [11]
    assert classical(h).indices.dtype == torch.int64
    assert classical(h, frequency=0.3).indices.tolist() == [11, 70]
    assert classical(h, frequency=0).indices.tolist() == [11, 70, 5]
    assert classical(h, frequency=299 / 300).indices.tolist() == [11]
    assert classical(h, frequency=1).indices.tolist() == []  # the 40 hides it once
    assert classical(h, sigma=12, frequency=0).indices.tolist() == []
    assert classical(torch.randn(100, 64), frequency=0).indices.tolist() == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_table_is_that_of_numpy(monkeypatch, dtype, scale):
    monkeypatch.setattr(blocks_module.blocks, "__defaults__", (128 * 50,))
    h = (planted() * scale).to(dtype)
    found = classical(h)
    wide = h.double().numpy()
    deviation = abs(wide - wide.mean(1, keepdims=True)) / wide.std(1, keepdims=True)
    expected = {
        "outlier_share": (deviation > 6).mean(0),
        "peak": (abs(wide) / abs(wide).mean(1, keepdims=True)).max(0),
        "relative_size": abs(wide).mean(0) / abs(wide).mean(),
        "energy_share": (wide**2).sum(0) / (wide**2).sum(),
        "extreme_share": np.bincount(abs(wide).argmax(1), minlength=128) / 300,
        "mean": wide.mean(0),
        "std": wide.std(0),
    }
    rows = found.rows()
    order = [row["feature"] for row in rows]
    assert sorted(order) == list(range(128))
    for key, values in expected.items():
        np.testing.assert_allclose([row[key] for row in rows], values[order], rtol=1e-5, atol=1e-9 * abs(values).max(), err_msg=key)
    assert order[: len(found)] == found.indices.tolist()
    assert found.energy_share == pytest.approx(expected["energy_share"][11], rel=1e-5)
    assert (len(found), found.features, found.vectors, found.invalid_vectors, found.constant_vectors) == (1, 128, 300, 0, 0)


def test_columns_say_what_the_rows_hold():
    found = classical(planted(), sigma=4.5)
    assert {column.key for column in found.columns} == set(found.rows()[0])
    assert "4.5 std" in found.columns[2].help and "6 std" in FEATURE_COLUMNS[1].help
    assert [shown(found.rows()[0], column) for column in found.columns][:3] == ["11", "100 %", "100 %"]
    assert found.columns[-1] is PEAK


def test_what_is_left_out_is_counted():
    h = planted()
    spoiled = torch.cat([h, torch.full((2, 128), 3.0), torch.full((1, 128), math.nan), h[:1].clone().fill_(math.inf)])
    found, clean = classical(spoiled), classical(h)
    assert (found.vectors, found.constant_vectors, found.invalid_vectors) == (302, 2, 2)
    assert found.rows()[0]["outlier_share"] == clean.rows()[0]["outlier_share"] == 299 / 300
    assert found.indices.tolist() == clean.indices.tolist()
    one = classical(h[:1], frequency=1)
    assert one.indices.tolist() == [11, 70]


def test_nothing_and_too_few_features():
    empty = classical(torch.randn(0, 64), frequency=0)
    assert len(empty) == 0 and math.isnan(empty.rows()[0]["peak"]) and empty.energy_share == 0
    h = torch.randn(50, 37)
    h[:, 3] = 1000
    few = classical(h, frequency=0)
    assert len(few) == 0 and math.isnan(few.rows()[0]["outlier_share"])
    assert few.rows()[0]["feature"] == 3
    assert classical(h, sigma=5).indices.tolist() == [3]
    zeros = classical(torch.zeros(4, 64))
    assert zeros.constant_vectors == 4 and zeros.rows()[0]["peak"] == 0


def test_embeddings_are_taken_and_nonsense_is_not():
    h = planted()
    assert classical(Embeddings(h, torch.zeros(300, dtype=torch.int64), ["x"] * 300)).indices.tolist() == [11]
    with pytest.raises(ValueError, match=r"frequency is a share of the vectors, in \[0, 1\], got 50"):
        classical(h, frequency=50)
    with pytest.raises(ValueError, match="rule is one of 'robust', 'classical', got 'median'"):
        outlier_features(h, rule="median")
    with pytest.raises(ValueError, match="alpha is a probability above 0, got 0"):
        outlier_features(h, alpha=0)
    with pytest.raises(ValueError, match="outlier_sigma must be positive"):
        classical(h, sigma=0)
    with pytest.raises(ValueError, match=r"expected representations \(n, d\)"):
        classical(h[0])


# -- the definitions of others ---------------------------------------------------------------------------------------------


def test_llm_int8_asks_for_layers_and_positions():
    layers = [torch.zeros(100, 8) for _ in range(8)]
    for layer in layers[:2]:
        layer[:, 1] = -6.0  # 25 % of the layers, all positions of those
        layer[:10, 2] = 9.0  # 25 % of the layers, 2.5 % of all positions
    layers[0][:, 3] = 50.0  # one layer
    for layer in layers:
        layer[:6, 4] = 6.0
        layer[:, 5] = 5.99
        layer[:5, 6] = math.inf  # 5 % of the positions
        layer[:, 7] = math.nan
    found = llm_int8_outliers(layers)
    assert found.indices.tolist() == [1, 4]
    assert found.layer_share.tolist() == [0, 0.25, 0.25, 0.125, 1, 0, 1, 0]
    assert found.position_share.tolist() == [0, 0.25, 0.025, 0.125, 0.06, 0, 0.05, 0]
    assert llm_int8_outliers([torch.full((3, 2), 7.0), torch.full((9, 2), 7.0)]).indices.tolist() == [0, 1]
    with pytest.raises(ValueError, match="no layer"):
        llm_int8_outliers([])
    with pytest.raises(ValueError, match=r"one width; got \[2, 3\]"):
        llm_int8_outliers([torch.zeros(4, 3), torch.zeros(4, 2)])


def test_massive_activations_are_large_twice(monkeypatch):
    monkeypatch.setattr(blocks_module.blocks, "__defaults__", (9 * 2,))
    h = torch.full((5, 9), 0.5)
    h[0, 3] = 501.0
    h[1, 4] = 499.0  # below 1000 medians
    h[2] *= 0.01
    h[2, 5] = 99.0  # below 100
    h[4, 8] = -2e4
    h[4, 0] = math.nan
    found = massive_activations(h)
    assert found.vectors.tolist() == [0, 4]
    assert found.features.tolist() == [3, 8]
    assert found.values.tolist() == [501, -20000]
    assert all(not len(part) for part in massive_activations(torch.randn(0, 9)))
    assert len(massive_activations(h, magnitude=10).values) == 3


def test_registers_are_long_tokens():
    tokens = torch.zeros(2, 3, 4, dtype=torch.float16)
    tokens[0, 1] = 75.0
    tokens[1, 2] = 75.1
    tokens[1, 0] = math.nan
    assert registers(tokens).tolist() == [[False] * 3, [False, False, True]]
    assert registers(torch.full((1, 2), 1e30)).item()
    with pytest.raises(ValueError, match="expected tokens"):
        registers(torch.tensor(1.0))


def test_rms_kurtosis_is_its_formula():
    h = torch.randn(200, 30, dtype=torch.float64) * torch.linspace(0.1, 5, 30, dtype=torch.float64) + 1
    s = h.square().mean(0)
    expected = float(s.square().mean() / s.mean().square())
    for scale in (1e-200, 1.0, 1e200):
        assert rms_kurtosis(h * scale) == pytest.approx(expected, rel=1e-12)
    assert rms_kurtosis(torch.cat([h, h[:1] * math.nan])) == pytest.approx(expected, rel=1e-12)
    assert rms_kurtosis(torch.ones(3, 7)) == pytest.approx(1)
    assert rms_kurtosis(torch.eye(7)[:1]) == pytest.approx(7)
    for nothing in (torch.zeros(3, 4), torch.randn(0, 4), torch.full((2, 4), math.nan), torch.tensor([[1.0, math.nan]])):
        assert math.isnan(rms_kurtosis(nothing))


def norms(*layers):
    return nn.Sequential(*layers)


def spiked(features, gain=None, bias=None):
    layer = nn.LayerNorm(features)
    with torch.no_grad():
        layer.weight.copy_(1 + 0.1 * torch.randn(features))
        layer.bias.copy_(0.1 * torch.randn(features)).clamp_(-0.2, 0.2)
        layer.weight.clamp_(0.8, 1.2)
        if gain is not None:
            layer.weight[gain] = 5.0
        if bias is not None:
            layer.bias[bias] = -5.0
    return layer


def test_layer_norms_agree_on_a_feature():
    model = norms(spiked(64, gain=3), nn.Linear(64, 64), norms(spiked(64, gain=3, bias=9)), spiked(64, bias=9), spiked(64, gain=7, bias=1))
    found = layer_norm_outliers(model)
    assert found.indices.tolist() == [3, 9]
    assert found.gain_share[[3, 7]].tolist() == [0.5, 0.25]
    assert found.bias_share[[9, 1]].tolist() == [0.5, 0.25]
    assert found.names == ("0", "2.0", "3", "4")
    assert layer_norm_outliers(model, share=0.2).indices.tolist() == [1, 3, 7, 9]
    assert layer_norm_outliers(norms(nn.LayerNorm(8, bias=False))).bias_share.isnan().all()
    assert layer_norm_outliers(norms(nn.LayerNorm(8))).indices.tolist() == []


def test_layer_norms_of_several_widths_must_be_told_apart():
    model = norms(spiked(64, gain=3), spiked(32, gain=5), nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm((4, 4)))
    assert layer_norm_outliers(model, features=32).indices.tolist() == [5]
    with pytest.raises(ValueError, match="1 of width 32, 1 of width 64; features= must say which"):
        layer_norm_outliers(model)
    with pytest.raises(ValueError, match="none has width 16"):
        layer_norm_outliers(model, features=16)
    with pytest.raises(ValueError, match="in this model: none"):
        layer_norm_outliers(nn.Linear(3, 3))
