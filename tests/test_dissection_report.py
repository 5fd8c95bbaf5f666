"""The page of a dissection: outlines, what it says and shows, untrusted names, and the page at work in a browser."""

import dataclasses
import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchprobe.datasets import Broden
from torchprobe.dissection import dissect, random_rotation
from torchprobe.dissection.report import Report, write_report
from torchprobe.ops.overlap import upsample
from torchprobe.rendering.dissection_page import (
    CategoryBar,
    ConceptRow,
    DissectionPage,
    Shown,
    UnitRow,
    outline,
    reduced,
    render_dissection,
    thumbnail,
    write_dissection,
)
from torchprobe.rendering.tables import Column

Image = pytest.importorskip("PIL.Image", reason="pillow is not installed")
for package in ("matplotlib", "jinja2"):
    pytest.importorskip(package, reason=f"{package} is not installed")

HOSTILE = "<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# -- outlines ------------------------------------------------------------------------------------------------------------


def winding(path: str, h: int, w: int) -> np.ndarray:
    """How often the borders of a path go around each pixel, by adding up the vertical edges to its left."""
    found = np.zeros((h, w), int)
    for border in path.split("M")[1:]:
        assert border.endswith("z")
        start, *steps = re.findall(r"^\d+ \d+|[hv]-?\d+", border)
        corners = [tuple(map(int, start.split()))]
        for step in steps:
            x, y = corners[-1]
            corners.append((x + int(step[1:]), y) if step[0] == "h" else (x, y + int(step[1:])))
        for (x, y), (to_x, to_y) in itertools.pairwise([*corners, corners[0]]):  # z goes back
            assert x == to_x or y == to_y
            if y != to_y:
                found[min(y, to_y) : max(y, to_y), x:] += 1 if to_y < y else -1
    return found


def rings(rng, h, w):
    yy, xx = np.mgrid[:h, :w]
    return (np.hypot(yy - h / 2, xx - w / 2).astype(int) % 3 == 0) ^ (rng.random((h, w)) < 0.02)


def test_an_outline_encloses_exactly_the_region():
    rng = np.random.default_rng(0)
    masks = [rng.random(rng.integers(1, 9, 2)) < rng.random() for _ in range(500)]
    masks += [np.ones((3, 5), bool), np.zeros((2, 2), bool), np.eye(6, dtype=bool), rings(rng, 40, 56), np.ones((1, 1), bool)]
    for mask in masks:
        np.testing.assert_array_equal(winding(outline(mask), *mask.shape), mask.astype(int))


def test_an_outline_is_numbers_and_commands_only():
    assert re.fullmatch(r"[Mhvz \d-]*", outline(np.random.default_rng(1).random((30, 30)) < 0.5))


def test_reduced_takes_the_centers():
    mask = np.arange(112 * 64).reshape(112, 64)
    np.testing.assert_array_equal(reduced(mask, 56), mask[1::2, 1::2])
    assert reduced(mask, 200) is not mask
    np.testing.assert_array_equal(reduced(mask, 200), mask)
    assert reduced(np.zeros((113, 7), bool), 56).shape == (56, 3)
    assert reduced(np.zeros((1000, 1), bool), 10).shape == (10, 1)


# -- the page of plain values ----------------------------------------------------------------------------------------------

COLUMNS = [
    Column("unit", "unit", "index", "index"),
    Column("label", "concept", "best", "text"),
    Column("category", "category", "its category", "text"),
    Column("iou", "IoU", "overlap"),
]

CONCEPT_COLUMNS = [COLUMNS[1], COLUMNS[2], Column("positives", "positives", "images that show it", "count")]


def plain_page(units=12, name=HOSTILE):
    rng = np.random.default_rng(0)
    pictures = [thumbnail(Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)), f"{i} {name}", (56, 56)) for i in range(3)]
    region, concept = (outline(rings(rng, 56, 56)) for _ in range(2))
    shown = [Shown(0, 1.0, region, concept), Shown(1, math.nan, None, ""), Shown(2, 0.5, "", None), Shown(0, 1.0, region, "", whole=True)]
    labels = [name, "sky", "sea"]
    rows = [
        UnitRow(
            {"unit": i, "label": labels[i % 3], "category": "scene" if i % 3 == 1 else "object", "iou": i / 100, "detector": i >= 4},
            shown,
            f"other{i}",
        )
        for i in range(units)
    ]
    return DissectionPage(
        kind="dissection",
        title=name,
        summary=name,
        bars=[CategoryBar("object", [(name, 3), ("sea", 2)]), CategoryBar("scene", [("sky", 3)])],
        bars_note=name,
        concepts=[
            ConceptRow({"label": name, "category": "object", "positives": 7}, encoded_by=tuple(range(30)), detected_by=(3, 1)),
            ConceptRow({"label": "sea", "category": "object", "positives": 2}),
        ],
        concepts_note=name,
        concept_columns=CONCEPT_COLUMNS,
        units=rows,
        units_note=name,
        columns=COLUMNS,
        thumbnails=pictures,
    )


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize(
    "name", [HOSTILE, "</script><script>alert(1)</script>", "<!--", '" onclick="alert(1)', "\u202e\x1b[2J", "\udcff", "{{ 1 }}"]
)
def test_labels_and_file_names_stay_text(name):
    harmless, hostile = (Tags(render_dissection(plain_page(name=text))) for text in ("a name", name))
    assert hostile.tags == harmless.tags
    assert "img" not in hostile.tags
    assert [a[:2] for a in hostile.attributes] == [a[:2] for a in harmless.attributes]
    assert not [a for a in hostile.attributes if a[1].startswith("on")]


def test_a_concept_links_to_its_units():
    text = render_dissection(plain_page())
    links = re.findall(r'<a href="#unit-(\d+)">(\d+)</a>', text)
    assert links == [(str(i), str(i)) for i in [*range(12), 3, 1]] and "… and 18 more" in text
    assert text.index("1 concept without a unit") < text.rindex(">sea<")
    nothing = dataclasses.replace(plain_page(), concepts=plain_page().concepts[1:])
    assert "No unit encodes or detects a concept." in render_dissection(nothing)


def test_the_data_are_read_back():
    page = plain_page()
    text = render_dissection(page)
    found = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])
    assert found == json.loads(json.dumps(page.data()))
    assert found["thumbnails"][0][0] == f"0 {HOSTILE}"
    assert found["units"][0][1][1] is None  # nan


def test_the_page_is_self_contained_and_may_load_nothing():
    text = render_dissection(plain_page())
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    policy = next(value for _, name, value in Tags(text).attributes if name == "content" and "default-src" in value)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    ids = [value for _, name, value in Tags(text).attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_a_page_without_units_renders():
    assert "<table" not in render_dissection(DissectionPage("dissection", "title", "summary"))


def test_a_thumbnail_is_small_and_has_no_metadata():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8))
    image.info["comment"] = b"secret"
    made = thumbnail(image, "x", (28, 56))
    assert (made.width, made.height) == (112, 56)
    assert len(made.jpeg) < 8000
    assert b"secret" not in made.jpeg
    assert thumbnail(Image.new("L", (5, 1)), "x", (1, 1)).width == 5


def test_2048_units_stay_small(tmp_path):
    page = plain_page(units=2048)
    assert write_dissection(page, tmp_path / "a.html").stat().st_size < 40e6


# -- the page of a dissection ------------------------------------------------------------------------------------------------


def to_tensor(image):
    return torch.from_numpy(np.asarray(image.convert("RGB").resize((32, 32)), dtype=np.float32) / 255).permute(2, 0, 1)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 12, 5, stride=4, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 6))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    from broden_sets import write_trap_set

    folder = tmp_path_factory.mktemp("set") / "broden"
    write_trap_set(folder, images=32)
    broden = Broden(folder, transform=to_tensor)
    net = network()
    return broden, net, dissect(net, ["1"], broden, batch_size=5)["1"]


def shown_units(path):
    text = Path(path).read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    order = [int(value.removeprefix("unit-")) for tag, name, value in Tags(text).attributes if tag == "tbody" and name == "id"]
    return text, data, order


def test_regions_and_concepts_are_those_that_were_counted(made, tmp_path):
    broden, net, d = made
    _, data, order = shown_units(write_report(d, tmp_path / "a.html", broden, net, top_images=4))
    best = {row.unit: row for row in d.best()}
    for unit, pictures in zip(order, data["units"], strict=True):
        ids = [row for row in d.top[0][unit, :4].tolist() if row >= 0]
        assert len(pictures) == len(ids)
        for row, (at, score, region, concept, whole, _) in zip(ids, pictures, strict=True):
            name, *_, rows, columns = data["thumbnails"][at]
            described = broden.rows[row]
            assert name == described.image
            with torch.no_grad():
                maps = net[:2](to_tensor(broden.image(row))[None])[0]
            assert score == pytest.approx(float(maps[unit].max()), rel=1e-5)
            active = upsample(maps[unit], described.label_height, described.label_width) > d.thresholds[unit]
            small = reduced(active.numpy(), 56)
            # The batch may change the last bit of a map.
            assert (winding(region, rows, columns) != small).mean() < 0.01
            label = best[unit].number
            labels = broden.image_labels(row)
            planes = [planes for _, planes in labels if planes.dim() == 3]
            mask = torch.cat(planes).eq(label).any(0).numpy() if planes else np.zeros(small.shape, bool)
            if whole:
                assert any(label in numbers.tolist() for _, numbers in labels if numbers.dim() == 1)
            elif concept is not None:
                np.testing.assert_array_equal(winding(concept, rows, columns), reduced(mask, 56))
            else:
                assert not mask.any()


def test_the_bars_count_units_as_the_original_report(made):
    d = made[2]
    for threshold in (0.01, 0.04, 0.1):
        bars = Report(d, threshold=threshold).bars()
        expected = d.unique_detectors("report", threshold)
        assert sum(bar.units for bar in bars) == expected.detectors
        assert sum(len(bar.concepts) for bar in bars) == expected.unique
        assert [bar.name for bar in bars] == [name for name in d.categories if expected.by_category[name][1]]


def test_the_page_names_concepts_and_the_rule(made):
    d = made[2]
    report = Report(d, ap_threshold=0.6, alpha=1.0, gain_threshold=0.1)
    pairs = d.encoded(0.6, 1.0, gain_threshold=0.1)
    assert 0 < int(pairs.sum()) < int(d.encoded(0.6, 1.0, gain_threshold=-math.inf).sum())
    title, seen = report.titles(), {}
    for row, concept in zip(report.concept_rows(), report.concepts, strict=True):
        i = concept.index
        seen[i] = row
        assert set(row.encoded_by) == set(pairs[:, i].nonzero().flatten().tolist())
        gains = [float(d.gain[unit, i]) for unit in row.encoded_by]
        assert gains == sorted(gains, reverse=True)
        assert (row.values["positives"], row.values["images"]) == (int(d.support.positives[i]), int(d.support.images[i]))
        assert row.values["pixels"] == int(d.counts.truth[i]) and row.values["label"] == title[i]
        assert all(best.index == i and best.score >= 0.04 for best in d.best() if best.unit in row.detected_by)
    assert {i for i, row in seen.items() if row.encoded_by} == set(pairs.any(0).nonzero().flatten().tolist())
    assert sum(len(row.detected_by) for row in seen.values()) == d.unique_detectors("report").detectors
    named = {row.values["unit"]: row.values["encodes"] for row in report.units()}
    unit = int(pairs.sum(1).argmax())
    assert all(title[i] in named[unit] for i in pairs[unit].nonzero().flatten().tolist()[:4])
    page = report.page()
    assert "gain ≥ 0.1" in page.concepts_note and "AP ≥ 0.6" in page.concepts_note
    assert [row["label"] for row in d.summary()["encoded"]] == [row.label for row in d.concepts() if row.encoded_by]


def without_maps(dissection):
    """As after merging, or for a layer whose maps are too large."""
    return replace(dissection, top_maps=None)


def test_the_page_states_its_choices(made, tmp_path):
    broden, _, d = made
    text = Tags(write_report(without_maps(d), tmp_path / "a.html", broden).read_text(encoding="utf-8")).text
    for phrase in (
        "0.005",
        "mode default",
        "0.04",
        "AP ≥ 0.9, gain ≥ 0.8",
        "Holm",
        "No null was computed",
        "without the network",
        "primary category",
    ):
        assert phrase in text, phrase
    shuffled = dissect(made[1], ["1"], broden, batch_size=5, shuffle_labels=0)["1"]
    text = Tags(write_report(d, tmp_path / "a.html", broden, nulls={"shuffled <b>": shuffled}).read_text(encoding="utf-8")).text
    assert "No null was computed" not in text
    assert "shuffled <b>" in text
    assert "A null" in write_report(shuffled, tmp_path / "a.html").read_text(encoding="utf-8")


def test_the_wording_is_correlational(made, tmp_path):
    text = Tags(write_report(made[2], tmp_path / "a.html", made[0], made[1]).read_text(encoding="utf-8")).text.lower()
    assert "coincide with" in text
    for claim in ("signature of", "because of", "responsible for", "proves", "understands"):
        assert claim not in text


def test_average_precision_alone_on_a_pooled_vector(made, tmp_path):
    broden, net, _ = made
    d = dissect(net, ["3"], broden, score="ap", batch_size=5)["3"]
    text, data, order = shown_units(write_report(d, tmp_path / "a.html", broden, net, top_images=2))
    assert sorted(order) == list(range(6))
    assert all(region is None for unit in data["units"] for _, _, region, *_ in unit)
    assert "chance" in Tags(text).text
    assert Report(d).score == "gain"


def test_directions_need_their_basis_for_regions(made, tmp_path):
    broden, net, _ = made
    kept = dissect(net, ["1"], broden, basis="rotation", seed=3, batch_size=5)["1"]
    d = without_maps(kept)
    text, data, _ = shown_units(write_report(d, tmp_path / "a.html", broden, net))
    assert "Directions" in Tags(text).text
    assert all(region is None for unit in data["units"] for _, _, region, *_ in unit)
    _, data, _ = shown_units(write_report(d, tmp_path / "a.html", broden, net, basis=random_rotation(12, 3)))
    assert any(region for unit in data["units"] for _, _, region, *_ in unit)
    assert data == shown_units(write_report(kept, tmp_path / "a.html", broden))[1]  # the same from the maps that were kept


def test_another_preprocessing_is_refused(made, tmp_path):
    broden, net, d = made
    with pytest.raises(ValueError, match="made with another preprocessing"):
        write_report(without_maps(d), tmp_path / "a.html", broden, net, preprocess=lambda image: broden.transform(image) * 2)


def test_another_data_set_is_refused(made, tmp_path):
    broden, _, d = made
    for other, message in (
        (Broden(broden.root, categories=broden.categories[:1]), "made with categories"),
        (Broden(broden.root, split="train"), "made with split None, the data set given has 'train'"),
    ):
        with pytest.raises(ValueError, match=message):
            write_report(d, tmp_path / "a.html", other)
    with pytest.raises(ValueError, match=f"has row {len(broden)}, the data set given only {len(broden)} rows"):
        write_report(replace(d, images=d.images + 1), tmp_path / "a.html", broden)


def test_another_network_is_refused(made, tmp_path):
    broden, _, d = made
    with pytest.raises(ValueError, match="another network"):
        write_report(without_maps(d), tmp_path / "a.html", broden, nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()))
    assert not (tmp_path / "a.html").exists()


def others():
    """Networks that give other maps of as many units: by their weights, a padding, a nonlinearity."""
    weights, padding, nonlinear = network(), network(), network()
    with torch.no_grad():
        weights[0].weight.neg_()
    padding[0].padding_mode = "reflect"
    nonlinear[1] = nn.GELU()
    return {"the weights differ": weights, "the weights are the same, and its modules": padding, "or their settings differ": nonlinear}


def relabeled(broden, folder):
    """The data set with its rows in another order."""
    shutil.copytree(broden.root, folder)
    head, *rows = (folder / broden.index).read_text().splitlines()
    (folder / broden.index).write_text("\n".join([head, *reversed(rows)]) + "\n")
    return Broden(folder, transform=broden.transform)


def test_another_network_with_as_many_units_is_refused(made, tmp_path):
    broden, _, d = made
    for message, other in others().items():
        with pytest.raises(ValueError, match=message):
            write_report(without_maps(d), tmp_path / "a.html", broden, other)


def test_another_basis_is_refused(made, tmp_path):
    broden, net, _ = made
    d = without_maps(dissect(net, ["1"], broden, basis="rotation", seed=3, batch_size=5)["1"])
    with pytest.raises(ValueError, match="another basis was given"):
        write_report(d, tmp_path / "a.html", broden, net, basis=random_rotation(12, 4))


def test_another_order_of_rows_is_refused(made, tmp_path):
    broden, _, d = made
    other = relabeled(broden, tmp_path / "other")
    with pytest.raises(ValueError, match=r"another data set than that of the dissection, which is broden: index.csv of .* lists other"):
        write_report(d, tmp_path / "a.html", other)
    parts, levels = (range(14, 28), range(14)), {"1": d.thresholds}
    first, second = (dissect(made[1], ["1"], broden, rows=rows, score="iou", thresholds=levels)["1"] for rows in parts)
    first.merge(second)
    write_report(first, tmp_path / "a.html", broden)
    with pytest.raises(ValueError, match="another data set"):
        write_report(first, tmp_path / "b.html", other)


def test_without_pictures(made, tmp_path):
    text = write_report(made[2], tmp_path / "a.html").read_text(encoding="utf-8")
    assert "without pictures" in text
    assert HOSTILE not in text


def test_the_old_name_of_the_number_of_images_warns(made, tmp_path):
    broden, net, d = made
    with pytest.warns(DeprecationWarning, match="write_report: the argument 'images' is deprecated, use 'top_images'"):
        old = d.report(tmp_path / "a.html", broden, net, images=2)
    _, data, _ = shown_units(old)
    assert {len(pictures) for pictures in data["units"]} == {2}


def test_each_image_is_decoded_once(made, tmp_path, monkeypatch):
    pytest.importorskip("captum", reason="captum is not installed")
    broden, net, d = made
    decoded = []
    image = Broden.image
    monkeypatch.setattr(Broden, "image", lambda self, row: decoded.append(row) or image(self, row))
    write_report(d, tmp_path / "a.html", broden, net, top_images=3, evidence=2)
    assert sorted(decoded) == sorted({row for row in d.top[0][:, :3].flatten().tolist() if row >= 0})


# -- evidence ----------------------------------------------------------------------------------------------------------------


def test_evidence_adds_up_to_the_score(made):
    pytest.importorskip("captum", reason="captum is not installed")
    from torchprobe.dissection.evidence import attribute, evidence

    broden, net, d = made
    net.train()
    found = evidence(d, 3, broden, net, top_images=4, n_steps=200)
    assert net.training
    assert found.attribution.shape == found.pixels.shape == (4, 3, 32, 32)
    assert found.heat.shape == (4, 32, 32)
    assert found.ids.tolist() == d.top[0][3, :4].tolist()
    with pytest.warns(DeprecationWarning, match="evidence: the argument 'images' is deprecated, use 'top_images'"):
        assert len(evidence(d, 3, broden, net, images=1, n_steps=2).ids) == 1
    with torch.no_grad():
        baseline = net[:2](torch.zeros(1, 3, 32, 32))[0, 3].amax()
    # The integral of a gradient along a path is the difference at its ends.
    torch.testing.assert_close(found.attribution.sum((1, 2, 3)), found.scores - baseline, rtol=0.05, atol=0.02)

    direction = torch.zeros(1, 12)
    direction[0, 3] = 1
    along = attribute(net, "1", 0, found.pixels, basis=direction, n_steps=200)
    torch.testing.assert_close(along, found.attribution, rtol=1e-4, atol=1e-5)


def test_evidence_by_another_method_and_for_a_vector(made):
    pytest.importorskip("captum", reason="captum is not installed")
    from torchprobe.dissection.evidence import attribute

    net, images = made[1], torch.rand(2, 3, 32, 32)
    found = attribute(net, "3", 1, images, method="NeuronGradient")
    wanted = torch.autograd.functional.jacobian(lambda x: net.eval()(x)[:, 1].sum(), images)
    torch.testing.assert_close(found, wanted)


def test_evidence_refuses_what_is_not_there(made):
    pytest.importorskip("captum", reason="captum is not installed")
    from torchprobe.dissection.evidence import attribute, evidence

    broden, net, d = made
    with pytest.raises(ValueError, match="units 0 to 11"):
        evidence(d, 12, broden, net)
    with pytest.raises(ValueError, match="not a neuron attribution"):
        attribute(net, "1", 0, torch.rand(1, 3, 32, 32), method="Saliency")
    with pytest.raises(ValueError, match="layer"):
        attribute(net, "nonsense", 0, torch.rand(1, 3, 32, 32))


def test_evidence_is_of_the_network_the_data_and_the_basis_of_the_dissection(made, tmp_path):
    pytest.importorskip("captum", reason="captum is not installed")
    from torchprobe.dissection.evidence import attribute, evidence

    broden, net, d = made
    for message, other in others().items():
        with pytest.raises(ValueError, match=message):
            evidence(d, 3, broden, other)
    with pytest.raises(ValueError, match="another data set"):
        evidence(d, 3, relabeled(broden, tmp_path / "other"), net)
    with pytest.raises(ValueError, match="was dissected in its units: no basis belongs to it"):
        evidence(d, 3, broden, net, basis=random_rotation(12, 3))
    rotated = dissect(net, ["1"], broden, basis="rotation", seed=3, batch_size=5)["1"]
    found = evidence(rotated, 3, broden, net, 2, n_steps=2)
    assert torch.equal(found.attribution, attribute(net, "1", 3, found.pixels, basis=random_rotation(12, 3), n_steps=2))
    named = dissect(net, ["1"], broden, basis=torch.eye(12)[:5], batch_size=5)["1"]
    with pytest.raises(ValueError, match="give the same basis="):
        write_report(named, tmp_path / "a.html", broden, net, evidence=1)


def test_a_picture_that_was_replaced_is_noticed(made, tmp_path):
    """By its score, where it passes the network again: for evidence, and for regions whose maps were not kept."""
    pytest.importorskip("captum", reason="captum is not installed")
    from PIL import Image

    from torchprobe.dissection.evidence import evidence

    broden, net, d = made
    shutil.copytree(broden.root, tmp_path / "set")
    changed = Broden(tmp_path / "set", transform=broden.transform)
    place = tmp_path / "set" / "images" / broden.rows[int(d.top[0][3, 1])].image
    for size, fits in ((0, True), (1, False)):
        with Image.open(place) as picture:
            kept = picture.copy()
        (Image.new(kept.mode, kept.size) if size else kept).save(place)
        for make in (
            lambda: evidence(d, 3, changed, net, 2, n_steps=2),
            lambda: write_report(without_maps(d), tmp_path / "a.html", changed, net, top_images=2),
            lambda: write_report(d, tmp_path / "b.html", changed, net, top_images=2, evidence=d.units),
        ):
            if fits:
                make()
            else:
                with pytest.raises(
                    ValueError, match=r"is not the picture that it was: unit \d+ of '1' has the score .* changed: dissect again"
                ):
                    make()


def test_a_dissection_that_does_not_say_of_what_it_is_gets_a_remark(made):
    pytest.importorskip("captum", reason="captum is not installed")
    from torchprobe.dissection.evidence import evidence

    broden, net, d = made
    older = replace(d, metadata={"preprocessing": d.metadata["preprocessing"]})
    with pytest.warns(UserWarning, match="does not say of which network"), pytest.warns(UserWarning, match="of which data set"):
        found = evidence(older, 3, broden, net, 2, n_steps=2)
    assert torch.equal(found.attribution, evidence(d, 3, broden, net, 2, n_steps=2).attribution)


def test_the_page_shows_evidence(made, tmp_path):
    pytest.importorskip("captum", reason="captum is not installed")
    broden, net, d = made
    told = []
    path = write_report(d, tmp_path / "a.html", broden, net, top_images=2, evidence=1, progress=lambda *steps: told.append(steps))
    assert told == [(1, 2), (2, 2)]
    text, data, _ = shown_units(path)
    assert [picture[5] is not None for picture in data["units"][0]] == [True, True]
    assert all(picture[5] is None for unit in data["units"][1:] for picture in unit)
    assert "integrated gradients" in text


# -- in a browser ------------------------------------------------------------------------------------------------------------

# Runs at the end of the page: searches, filters and sorts as a visitor would, and writes down what is seen.
VISITOR = """
const seen = {};
const wait = () => new Promise((resolve) => setTimeout(resolve, 150));
const visible = () => [...document.querySelectorAll("#table tbody")].filter((body) => !body.hidden).map((body) => body.id.slice(5));
const type = (text) => { const box = document.getElementById("search"); box.value = text; box.dispatchEvent(new Event("input")); };
(async () => {
  for (let i = 0; i < 20 && !document.querySelector("#unit-0 figcaption"); i++) await wait();  // drawn when the browser likes to
  seen.drawn = document.querySelectorAll(".strip svg").length;
  seen.outlines = document.querySelectorAll(".strip path.region").length;
  seen.images = document.querySelectorAll("img").length;
  seen.alerted = window.alerted === true;
  seen.label = document.querySelector("#unit-0 td.label").textContent;
  seen.caption = document.querySelector("#unit-0 figcaption")?.textContent;
  type("SEA"); seen.sea = visible();
  type("sea other5"); seen.words = visible();
  type("7"); seen.seven = visible();
  type("onerror"); seen.hostile = visible();
  type("nothing like it"); seen.nothing = visible(); seen.none = !document.getElementById("none").hidden;
  type("");
  const category = document.getElementById("category");
  category.value = "scene"; category.dispatchEvent(new Event("change")); seen.scene = visible();
  category.value = ""; category.dispatchEvent(new Event("change"));
  document.querySelector(".bar").click(); seen.bar = visible(); seen.found = document.getElementById("found").value;
  category.value = ""; document.getElementById("detectors").checked = false; type("");
  type("sea"); document.querySelector(".concepts a").click(); seen.linked = visible();
  const head = document.querySelector("#table th.iou button");
  head.click(); seen.down = visible();
  head.click(); seen.up = visible();
  document.querySelector("#table th.label button").click(); seen.byName = visible();
  const pictures = document.getElementById("pictures");
  pictures.checked = false; pictures.dispatchEvent(new Event("change"));
  await wait();
  seen.hidden = document.querySelector("tr.pictures").getClientRects().length === 0;
  const out = document.createElement("pre"); out.id = "seen"; out.textContent = JSON.stringify(seen); document.body.append(out);
})();
"""


LATE = """
window.IntersectionObserver = class extends IntersectionObserver {
  constructor(told, options) { super((entries) => setTimeout(() => told(entries), %d), options); }
};
"""


def browse(page: Path, profile: Path, *arguments: str, drawn: str = "<figure>") -> tuple[str, str]:
    """The page after its scripts ran, and what the browser said. On a busy machine it may write the page down before it has drawn anything,
    and an observer of what is in view is not called then: it is asked again, until the page matches ``drawn``."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    command = [CHROMIUM, *options.split(), "--disable-component-update", f"--user-data-dir={profile}", "--enable-logging=stderr", "--v=0"]
    for _ in range(5):
        done = subprocess.run(
            [*command, *arguments, "--dump-dom", f"file://{page}"], capture_output=True, text=True, timeout=120, check=False
        )
        if re.search(drawn, done.stdout):
            break
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("script", ["throw Error('x')", "console.error('x')", "fetch('https://localhost/x')"])
def test_what_goes_wrong_in_a_browser_is_noticed(tmp_path, script):
    page = write_dissection(plain_page(), tmp_path / "page.html")
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    assert browse(page, tmp_path / "profile", "--virtual-time-budget=500", drawn="")[1] != ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("late", [0, 400])
def test_in_a_browser_search_and_sort_work_and_names_stay_text(tmp_path, late):
    """Also if the browser tells milliseconds later what is in view, as on a busy machine."""
    page = write_dissection(plain_page(), tmp_path / "page.html")
    text = page.read_text(encoding="utf-8")
    if late:
        text = text.replace("</head>", f"<script>{LATE % late}</script></head>")
    script = f"<script>window.alert = () => {{ window.alerted = true; }};{VISITOR}</script>"
    page.write_text(text.replace("</body>", f"{script}</body>"), encoding="utf-8")
    found, said = browse(page, tmp_path / "profile", "--virtual-time-budget=5000", "--window-size=1200,1500", drawn='"drawn":[1-9]')
    assert said == ""
    seen = json.loads(re.search(r'<pre id="seen">(.*?)</pre>', found, re.DOTALL)[1].replace("&lt;", "<").replace("&gt;", ">"))
    every = [str(i) for i in range(12)]
    assert seen["drawn"] > 0 and seen["outlines"] > 0
    assert seen["images"] == 0 and not seen["alerted"]
    assert seen["label"] == HOSTILE
    assert seen["caption"].endswith(HOSTILE)
    assert seen["sea"] == ["2", "5", "8", "11"]
    assert seen["words"] == ["5"]
    assert seen["seven"] == ["7"]
    assert seen["hostile"] == ["0", "3", "6", "9"]
    assert seen["nothing"] == [] and seen["none"]
    assert seen["scene"] == ["1", "4", "7", "10"]
    assert seen["bar"] == ["6", "9"] and seen["found"] == "2 of 12 units"
    assert seen["linked"] == every
    assert seen["down"] == every[::-1]
    assert seen["up"] == every
    assert seen["byName"][4:] == ["2", "5", "8", "11", "1", "4", "7", "10"]
    assert seen["hidden"]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_only_what_is_near_the_window_is_drawn(tmp_path):
    page = write_dissection(plain_page(units=2048), tmp_path / "page.html")
    found, said = browse(page, tmp_path / "profile", "--virtual-time-budget=5000", "--window-size=1200,900")
    assert said == ""
    assert found.count('<tbody id="unit-') == 2048
    assert 0 < found.count("<figure>") < 200


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_in_a_browser_a_dissection_gives_no_error(made, tmp_path):
    broden, net, d = made
    found, said = browse(
        write_report(d, tmp_path / "a.html", broden, net),
        tmp_path / "profile",
        "--virtual-time-budget=5000",
        "--window-size=1200,5000",
    )
    assert said == ""
    assert "<figure>" in found
    assert "<img" not in found
