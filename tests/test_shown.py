"""The labels that images show, collected in any order, in parts, and from saved states."""

from __future__ import annotations

import pytest
import torch

from torchprobe.dissection.shown import ShownLabels

NOTHING = torch.zeros(0, 2, dtype=torch.int64)


def areas_of(places, generator):
    """For each image some labels, ascending, and their areas; some images show none."""
    found = []
    for _ in places:
        number = (torch.rand(50, generator=generator) < 0.1 * torch.rand(1, generator=generator)).nonzero().flatten().int() + 1
        found.append((number, torch.rand(len(number), generator=generator)))
    return found


def test_images_come_in_any_order_and_in_parts():
    generator = torch.Generator().manual_seed(0)
    want, parts = {}, [ShownLabels(100, 51), ShownLabels(100, 51)]
    order = torch.randperm(100, generator=generator).tolist()[:90]  # ten are never seen
    for start in range(0, 90, 7):
        places = order[start : start + 7]
        areas = areas_of(places, generator)
        want |= dict(zip(places, areas, strict=True))
        parts[start % 2].update(places, areas, torch.tensor([[start % 51, 2]]))
    outside = parts[0].outside + parts[1].outside
    shown = ShownLabels(100, 51)
    shown.load_state_dict(parts[0].merge(parts[1]).state_dict())
    for found in (parts[0], shown):
        presence = found.presence()
        assert len(presence) == 100 and torch.equal(found.outside, outside)
        for place in range(100):
            entries = slice(*presence.crow[place : place + 2].tolist())
            number, area = want.get(place, (torch.empty(0), torch.empty(0)))
            assert presence.number[entries].tolist() == number.tolist() and torch.equal(presence.area[entries], area)
    state = shown.state_dict()
    assert state["places"].tolist() == sorted(order) and state["numbers"].dtype == torch.int32
    assert all(torch.equal(part, again) for part, again in zip(state.values(), parts[0].state_dict().values(), strict=True))
    shown.update(order[:2], [want[order[1]], want[order[0]]], NOTHING)  # seen again: the last counts
    first = shown.presence().take(order[:2])
    assert first.number.tolist() == [*want[order[1]][0].tolist(), *want[order[0]][0].tolist()]


def test_an_empty_collection_and_bad_states():
    shown = ShownLabels(3, 4)
    assert shown.presence().crow.tolist() == [0, 0, 0, 0]
    again = ShownLabels(3, 4)
    again.load_state_dict(shown.state_dict())
    shown.update([], [], NOTHING)
    assert len(again.presence().number) == 0 == len(shown.presence().number)
    shown.update([1], [(torch.tensor([3], dtype=torch.int32), torch.tensor([0.5]))], torch.tensor([[2, 10]]))
    state = shown.state_dict()
    for change in (
        {"places": torch.tensor([3])}, {"places": torch.tensor([-1])}, {"places": torch.tensor([0, 1])}, {"lengths": torch.tensor([2])},
        {"places": torch.tensor([0, 0]), "lengths": torch.tensor([0, 1])},
        {"places": torch.tensor([0, 1]), "lengths": torch.tensor([-1, 2])},
        {"outside": torch.zeros(5, dtype=torch.int64)}, {"areas": torch.zeros(2)},
        *({"numbers": torch.tensor([number], dtype=torch.int32)} for number in (0, -1, 4, 2139095040)),
        *({"areas": torch.tensor([area])} for area in (-0.5, 1.5, torch.nan)), {"outside": torch.tensor([0, -1, 0, 0])},
        {"lengths": torch.tensor([2]), "numbers": torch.tensor([3, 3], dtype=torch.int32), "areas": torch.ones(2)},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="the saved labels"):
            again.load_state_dict({**state, **change})
        assert len(again.presence().number) == 0  # nothing was changed
