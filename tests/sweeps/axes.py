"""The feature dimension that rows state, held against the truth: right, unsure, wrong.

    python -m tests.sweeps.axes --library timm --out axes.json

The table counts layers by family. *published* are widths that the library states; *others* are layers of torch.nn and layers for which two
geometries leave one possibility. *silent* layers have no row, because they were left out with a warning.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import torchprobe

from .case import ADVERSARIAL, BATCH, Built, CannotBuild, Case, brief, forget, limit, quiet, seed_everything
from .check import one_thread
from .models import LIBRARIES, cases, missing
from .published import published_of
from .truth import Layer, Truth, truths_of, watch

VERDICTS = ("right", "unsure", "wrong", "silent")


@dataclass
class Family:
    """What came of one model."""

    name: str
    counts: dict[str, collections.Counter[str]] = field(default_factory=lambda: collections.defaultdict(collections.Counter))
    wrong: list[str] = field(default_factory=list)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    reason: str = ""  # why nothing was tried
    seconds: float = 0.0


def rows_of(built: Built, batch: int, layers: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one recorded forward, and the layers that had to be left out because they raise."""
    dropped: list[str] = []
    while True:
        chosen: Any = layers
        if dropped:
            names = set(dropped)
            default = None if layers is not None else {layer.name for layer in torchprobe.recording.select_layers(built.model)}
            chosen = lambda name, module: name not in names and (default is None or name in default)  # noqa: B023, E731
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with torchprobe.record(built.model, chosen) as recorder, torch.no_grad():
                    seed_everything(1)
                    args, kwargs = built.inputs(batch)
                    built.model(*args, **kwargs)
                return recorder.rows(), dropped
            except Exception as error:
                found = re.match(r"layer '(.*?)':", str(error))
                if found is None or found[1] in dropped:
                    raise
                dropped.append(found[1])


def verdict(layer: Layer, rows: Sequence[Mapping[str, Any]]) -> str:
    """How the rows of a layer compare with the truth about it."""
    if not rows:
        return "silent"
    said = []
    for row in rows:
        fits = [truth for truth in layer.truths if _agrees(row, truth)]
        said.append("unsure" if row.get("feature_dim_by") == "unsure" else "right" if fits else "wrong")
    return "wrong" if "wrong" in said else "unsure" if "unsure" in said else "right"


def _agrees(row: Mapping[str, Any], truth: Truth) -> bool:
    dim = row["feature_dim"]
    return row["features"] == truth.size and dim is not None and dim % truth.dims == truth.dim


def judge(family: Family, layers: Iterable[Layer], rows: Sequence[Mapping[str, Any]], selection: str, only: set[str] | None = None) -> None:
    """Adds the verdicts of one recording. ``only`` are the names of its layers; None: all."""
    by_layer: dict[str, list[Mapping[str, Any]]] = collections.defaultdict(list)
    for row in rows:
        by_layer[row["layer"]].append(row)
        base = re.sub(r":\d+$", "", row["layer"])
        if base != row["layer"]:
            by_layer[base].append(row)
    for layer in layers:
        if only is not None and layer.name not in only:
            continue
        if layer.left_out or not layer.truths:
            family.left_out[layer.left_out] += 1
            continue
        found = verdict(layer, by_layer.get(layer.name, []))
        witness = "published" if layer.truths[0].witness == "published" else "others"
        family.counts[f"{witness}, {selection}"][found] += 1
        if found == "wrong":
            said = [(row["features"], row["feature_dim"], row.get("feature_dim_by")) for row in by_layer[layer.name]]
            true = [(truth.size, truth.dim, truth.witness) for truth in layer.truths]
            family.wrong.append(f"{selection}: {layer.name!r} ({layer.module}): says {said}, true {true}")


def try_case(case: Case, seconds: float = 240.0) -> Family:
    """All layers, the default selection, and the adversarial geometry of one model."""
    family, start = Family(case.name), time.perf_counter()
    with one_thread(), quiet():
        try:
            with limit(seconds):
                built, layers = truths_of(case.build, published_of(case.library))
                rows, _ = rows_of(built, BATCH[0], "**")
                judge(family, layers, rows, "all")
                rows, _ = rows_of(built, BATCH[0], None)
                judge(family, layers, rows, "default", {layer.name for layer in torchprobe.recording.select_layers(built.model)})
                _adversarial(case, family, layers)
        except CannotBuild as reason:
            family.reason = str(reason)
        except Exception as error:
            family.reason = brief(error)
    family.seconds = round(time.perf_counter() - start, 1)
    return family


def _adversarial(case: Case, family: Family, layers: Sequence[Layer]) -> None:
    """Sizes coincide, the truth stays: the same dimension, the same width."""
    try:
        built = case.build(ADVERSARIAL)
        now = watch(built, BATCH[ADVERSARIAL])
    except TimeoutError:
        raise
    except Exception:  # the model has no such geometry
        return
    kept = [layer for layer in layers if layer.truths and not layer.left_out and _same_width(layer, now.get(layer.name))]
    rows, _ = rows_of(built, BATCH[ADVERSARIAL], "**")
    judge(family, kept, rows, "adversarial")


def _same_width(layer: Layer, calls: Any) -> bool:
    """Whether the layer has the same features in this geometry too."""
    if not calls:
        return False
    for call in calls:
        if len(call) != len(layer.truths) or any(len(s) != t.dims or s[t.dim] != t.size for s, t in zip(call, layer.truths, strict=True)):
            return False
    return True


# -- tables ----------------------------------------------------------------------------------------------------------------


def totals(families: Iterable[Family]) -> dict[str, dict[str, int]]:
    total: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for family in families:
        for key, counter in family.counts.items():
            total[key].update(counter)
    return {key: {verdict: counter[verdict] for verdict in VERDICTS} for key, counter in sorted(total.items())}


def table(families: Sequence[Family]) -> str:
    """Right/unsure/wrong/silent for every family."""
    columns = sorted({key for family in families for key in family.counts})
    head = f"{'right/unsure/wrong/silent':40}" + "".join(f"{column:>24}" for column in columns)
    lines = [head]
    for family in families:
        if family.reason:
            lines.append(f"{family.name:40}  not tried: {family.reason[:90]}")
            continue
        cells = ["/".join(str(family.counts[c][v]) for v in VERDICTS) if c in family.counts else "–" for c in columns]
        lines.append(f"{family.name:40}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--only", default="*", help="shell patterns for names, separated by commas")
    parser.add_argument("--seconds", type=float, default=240.0, help="limit for one model")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file, written after every model")
    parser.add_argument("--wrong", type=int, default=6, help="how many wrong layers of a model to print")
    options = parser.parse_args(arguments)
    if package := missing(options.library):
        parser.error(f"{package} is not installed")
    families: list[Family] = []
    for case in cases(options.library, options.only):
        families.append(try_case(case, options.seconds))
        print(
            table(families[-1:]).splitlines()[-1],
            f"{families[-1].seconds} s",
            *families[-1].wrong[: options.wrong],
            sep="\n    ",
            flush=True,
        )
        forget()
        if options.out is not None:
            models = {f.name: {**vars(f), "counts": dict(f.counts)} for f in families}
            options.out.write_text(json.dumps({"totals": totals(families), "models": models}, indent=1))
    print(table(families))
    print(json.dumps(totals(families), indent=1))
    return 1 if any(family.wrong for family in families) else 0


if __name__ == "__main__":
    raise SystemExit(main())
