"""Concepts of a representation: other bases from the same pass, the nulls, the sweep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchprobe.analysis.concepts import (
    DIRECTIONS,
    ROTATION,
    SHUFFLED,
    UNITS,
    concept_names,
    concept_overlap,
    concept_sweep,
    concepts,
    in_basis,
)
from torchprobe.datasets import Broden, BrodenWriter
from torchprobe.dissection import Dissection, dissect
from torchprobe.studies.interpret.concepts import summarize_concepts

SHADES = ["dark", "dim", "bright", "white"]


def pixels(image: object) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(2, 0).float() / 255


class Colors(nn.Module):
    """The mean of each color, and a feature that says nothing."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([images.mean((2, 3)), images.new_zeros(len(images), 1)], 1)


class Silent(nn.Module):
    """Says nothing at all."""

    def forward(self, images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 4)


@pytest.fixture(scope="module")
def broden(tmp_path_factory: pytest.TempPathFactory) -> Broden:
    """96 pictures whose red says which shade they are, whose green is noise."""
    folder, random = tmp_path_factory.mktemp("concepts") / "broden", np.random.default_rng(0)
    with BrodenWriter(folder, {"scene": [*SHADES, "odd"]}, size=8, image_format="png") as writer:
        for i in range(96):
            picture = np.zeros((8, 8, 3), np.uint8)
            shade = i % 4
            picture[..., 0], picture[..., 1] = 60 * shade + random.integers(0, 20), random.integers(0, 256)
            names = [SHADES[shade], "odd"] if random.random() < 0.2 else [SHADES[shade]]
            writer.add(f"mine/{i:03}", picture, {"scene": names})
    return Broden(folder)


@pytest.fixture(scope="module")
def found(broden: Broden) -> dict[str, Dissection]:
    directions = torch.tensor([[1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]])
    return concepts(Colors(), broden, directions, preprocess=pixels, batch_size=32)


def test_red_ranks_the_extreme_shades(found: dict[str, Dissection]) -> None:
    assert set(found) == {UNITS, DIRECTIONS, ROTATION, SHUFFLED}
    assert concept_names(found[UNITS]) == sorted(concept_names(found[UNITS]), key=[x.name for x in found[UNITS].labels].index)
    assert set(concept_names(found[UNITS])) == {"dark", "white"}  # the lowest and the highest: a sign for each
    encoded = found[UNITS].encoded(0.9)
    assert encoded[0].sum() == 2 and not encoded[1:].any()


def test_the_sign_of_a_direction_means_nothing(found: dict[str, Dissection]) -> None:
    ap = found[DIRECTIONS].average_precision
    assert ap is not None
    torch.testing.assert_close(ap[0], ap[1], rtol=0, atol=0)
    torch.testing.assert_close(ap[0], found[UNITS].average_precision[0], rtol=0, atol=0)  # type: ignore[index]


def test_another_basis_is_what_dissect_makes_of_it(broden: Broden, found: dict[str, Dissection]) -> None:
    basis = torch.tensor([[0.6, 0.8, 0.0, 0.0], [-0.8, 0.6, 0.0, 0.1], [0.0, 0.0, 1.0, 1.0]])
    turned = in_basis(found[UNITS], basis)
    direct = dissect(Colors(), "", broden, score="ap", sign="both", basis=basis, preprocess=pixels, batch_size=32)[""]
    torch.testing.assert_close(turned.average_precision, direct.average_precision, rtol=1e-12, atol=0)
    assert turned.units == 3


def test_shuffled_labels_are_what_dissect_makes_of_them(broden: Broden, found: dict[str, Dissection]) -> None:
    direct = dissect(Colors(), "", broden, score="ap", sign="both", shuffle_labels=0, preprocess=pixels, batch_size=32)[""]
    torch.testing.assert_close(found[SHUFFLED].average_precision, direct.average_precision, rtol=1e-12, atol=0)
    assert concept_names(found[SHUFFLED]) == []


def test_sweep_counts_what_is_encoded(found: dict[str, Dissection]) -> None:
    rows = concept_sweep(found[UNITS], (0.3, 0.9, 1.0))
    assert [row["unique"] for row in rows][1:] == [2, 2]
    assert rows[0]["unique"] >= 2  # falls, or stays, as the threshold rises
    assert rows[1] == {
        "threshold": 0.9,
        "unique": 2,
        "encoding": 1,
        "polysemanticity": 0.5,
        "polysemanticity_encoding": 2.0,
        "distribution": [3, 0, 1],
    }
    nothing = concept_sweep(found[SHUFFLED], (0.9,))[0]
    assert nothing["unique"] == 0 and np.isnan(nothing["polysemanticity_encoding"]) and nothing["distribution"] == [4]
    assert concept_sweep(found[UNITS], (0.9,), minimum_positives=1000)[0]["unique"] == 0


def test_units_without_a_gain_for_any_concept_are_not_among_the_best(broden: Broden, found: dict[str, Dissection]) -> None:
    """One of four units is constant, so the 20 best are fewer. A rank without a label must not be looked up."""
    summary = summarize_concepts(found)
    assert {row.unit for row in summary.best[UNITS]} == {0, 1, 2} - {row.unit for row in found[UNITS].best("gain") if row.index < 0}
    assert all(row.label and row.encodes is bool(found[UNITS].encoded(0.9)[row.unit].any()) for row in summary.best[UNITS][:1])
    silent = concepts(Silent(), broden, preprocess=pixels, batch_size=32)
    assert summarize_concepts(silent).best == {UNITS: []}


def test_overlap_of_models() -> None:
    rows = concept_overlap({"a": ["x", "y"], "b": ["y", "z"], "c": []})
    assert [(r["a"], r["b"], r["shared"], r["only_a"], r["only_b"]) for r in rows] == [
        ("a", "b", 1, 1, 1),
        ("a", "c", 0, 2, 0),
        ("b", "c", 0, 2, 0),
    ]
    assert rows[0]["jaccard"] == pytest.approx(1 / 3)
    assert np.isnan(concept_overlap({"a": [], "b": []})[0]["jaccard"])


def test_refusals(broden: Broden, found: dict[str, Dissection]) -> None:
    with pytest.raises(ValueError, match="must be \\(directions, 4\\)"):
        concepts(Colors(), broden, torch.ones(2, 3), preprocess=pixels)
    bare = dissect(Colors(), "", broden, score="ap", preprocess=pixels)[""]
    with pytest.raises(ValueError, match="keep_scores=True"):
        in_basis(bare, torch.eye(4))
    with pytest.raises(ValueError, match="row 1 .* is zero"):
        in_basis(found[UNITS], torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]]))
