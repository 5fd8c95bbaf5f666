"""``torchprobe quantize-check`` as a page, and in the terminal."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

import torchprobe
from torchprobe.common.files import replacing, to_json
from torchprobe.common.messages import counted, listing
from torchprobe.rendering import page
from torchprobe.rendering.page import Fact, Page, Section, Table
from torchprobe.rendering.tables import Column, number, percent, plain_table, shown, text, write_csv
from torchprobe.studies.quantize_check import DEFINITIONS, KEEP_BELOW_DB, QuantizeCheck

LAYER_COLUMNS = (
    Column("rank", "rank", "1: the largest relative error of the output", "count"),
    Column("layer", "layer", "name within the model", "text"),
    Column("keep", "16 bits", "keep: its output, or its other features beside outliers, would be below the line", "text", optional=True),
    Column("output_db", "output dB", "forecast SQNR of the output"),
    Column("input_db", "input dB", "forecast SQNR of the input"),
    Column("weight_db", "weight dB", "measured SQNR of the weights"),
    Column("underflow", "to 0", "share of the nonzero values of the input that become 0", "share"),
    Column("overflow", "beyond", "share of the nonzero values of the input beyond the format", "share"),
    Column("outliers", "outlier features", "the features of the input that cause the error", "text", optional=True),
    Column("others_db", "others", "SQNR of the other features as it is", optional=True),
    Column("without_db", "without", "SQNR of the other features if the scale did not reach the outliers", optional=True),
    Column("clip", "clip at", "limit with the smallest forecast error for INT8 with one scale", optional=True),
    Column("features", "d", "features of the input", "count"),
    Column("module", "module", "class of the layer", "text"),
    Column("nonfinite", "nonfinite", "nan and inf of the input, which are left out", "count", optional=True),
    Column("unsure", "unsure", "why the forecast may be off by more than 1 dB", "text", optional=True),
)
FORMAT_COLUMNS = (
    Column("format", "format", "name of the format", "text"),
    Column("weakest_db", "weakest dB", "forecast SQNR of the output of the weakest layer"),
    Column("median_db", "median dB", "median over layers"),
    Column("keep", "keep", f"layers whose output, or other features, would have less than {KEEP_BELOW_DB:g} dB", "count"),
    Column("unsure", "unsure", "layers with an unsure forecast", "count"),
    Column("weakest", "weakest layer", "its name", "text"),
    Column("meaning", "what it is", "", "text"),
)
SHOWN_IN_TERMINAL = 10


def answer(check: QuantizeCheck) -> str:
    """The result in a few sentences: the network first, then its layers."""
    keep, layers = check.keep(), check.layers[check.format]
    unknown = [one for one in check.ranked() if math.isnan(one.output_db)]
    if len(unknown) == len(layers):
        return f"In {check.format}, no layer has a forecast."
    whole, by_layer = _whole(check, len(layers), len(keep)), _by_layer(check, keep)
    parts = [whole, by_layer] if whole else [f"In {check.format}, {by_layer[0].lower()}{by_layer[1:]}"]
    if unknown:
        have = "has" if len(unknown) == 1 else "have"
        parts.append(f"{counted(len(unknown), 'layer')}, such as {unknown[0].layer}, {have} no forecast.")
    if unsure := [one.layer for one in layers if one.input.unsure and not math.isnan(one.output_db)]:
        parts.append(f"The forecast of {counted(len(unsure), 'layer')} is unsure: {listing(unsure, 3)}.")
    positions = sum(kind.startswith("Conv") and kind != "Conv1D" for kind in check.modules.values())
    if check.format == "int8_token" and 2 * positions > len(layers):
        parts.append("Most layers are convolutions, and int8_token gives every position of a map its own scale: see --format int8_tensor.")
    return " ".join(part for part in parts if part)


def _whole(check: QuantizeCheck, layers: int, keep: int) -> str:
    """What the network does with all layers rounded, in words."""
    found = check.network
    if math.isnan(found.db):
        return f"In {check.format}, the output of the network was not measured: {found.why}." if found.why else ""
    share = 10 ** (-found.db / 20)
    told = (
        f"In {check.format}, all {layers} layers together leave {_decibels(found.db)} at the output of the network, an error of "
        f"{percent(share)} (measured, {counted(found.inputs, 'input')})."
    )
    if not math.isnan(found.kept_db):
        told += f" With the {counted(keep, 'layer')} named below in 16 bits: {_decibels(found.kept_db)}."
    return told


def _by_layer(check: QuantizeCheck, keep: list[str]) -> str:
    """How the layers do, one at a time."""
    layers, weakest = check.layers[check.format], check.ranked()[0]
    if not keep:
        found = f"No layer alone falls below {KEEP_BELOW_DB:g} dB"
    elif len(keep) == len(layers):
        found = f"Every layer falls below {KEEP_BELOW_DB:g} dB: this format does not suit the network"
    else:
        falls, them = ("falls", "it") if len(keep) == 1 else ("fall", "them")
        named = f"{counted(len(keep), 'layer')} of {len(layers)}"
        found = f"{named} {falls} below {KEEP_BELOW_DB:g} dB: keep {them} in 16 bits ({listing(keep, 3)})"
    told = f"{found}. The weakest is {weakest.layer}, with a forecast SQNR of its output of {_decibels(weakest.output_db)}."
    others = [one for one in layers if one.layer in keep and one.output_db >= KEEP_BELOW_DB]
    if others:
        worst = min(others, key=lambda one: one.input.others_db)
        left = _decibels(worst.input.others_db)
        told += f" In {worst.layer}, outlier features are a large part of the signal, and the other features keep only {left}."
    return told


def _decibels(value: float) -> str:
    return f"{number(value, 3)} dB"


def check_page(check: QuantizeCheck) -> Page:
    """The page of a check."""
    rows, formats = check.rows(), check.by_format()
    best = max(formats, key=lambda row: row["median_db"])
    sections = [
        Section(
            "The answer", [answer(check), "Forecasts are about layers, one at a time. What it does to accuracy is only known by trying."]
        ),
        Section("Formats", ["Every format, with the same layers."], tables=[Table(formats, FORMAT_COLUMNS)]),
        Section(
            "Layers: keep the first in 16 bits",
            [
                f"Ranked by the output in {check.format}. Scales of SmoothQuant (α = {check.settings['alpha']:g}) are in "
                "smoothing.safetensors.",
                f"No input reached {counted(len(check.unused), 'layer')}: {', '.join(check.unused[:6])}." if check.unused else "",
            ],
            tables=[Table(rows, LAYER_COLUMNS, "All layers; click on a column head to sort")],
        ),
        Section("How to read this", terms=list(DEFINITIONS.items())),
    ]
    settings = ", ".join(f"{key} {value}" for key, value in check.settings.items() if value is not None)
    return Page(
        kind="quantize-check",
        title=check.model,
        summary=f"What would break in eight bits? One pass over {number(check.seen)} inputs, and "
        f"{number(check.network.inputs)} of them again with all layers rounded.",
        notice=f"Partial: stopped after {check.seen} of {check.total} inputs. All results are about these." if check.partial else "",
        facts=[
            Fact("Format", check.format, f"{len(rows)} layers"),
            Fact("Whole network", _decibels(check.network.db), f"measured, {counted(check.network.inputs, 'input')}"),
            Fact("Weakest layer", f"{number(check.ranked()[0].output_db, 3)} dB", check.ranked()[0].layer),
            Fact("Keep in 16 bits", number(len(check.keep())), f"below {KEEP_BELOW_DB:g} dB"),
            Fact("Best format", best["format"], f"median {number(best['median_db'], 3)} dB"),
        ],
        sections=sections,
        footer=[
            f"torchprobe {torchprobe.__version__}, torch {torch.__version__}, Python {platform.python_version()}.",
            f"Settings: {settings}.",
        ],
    )


def print_check(check: QuantizeCheck, out: Console) -> None:
    """Prints the answer, the formats and the weakest layers."""
    out.print(text(f"{check.model}: {counted(check.seen, 'input')}", "bold"))
    out.print(text(answer(check)))
    out.print()
    rows = check.rows()
    _print(out, check.by_format(), FORMAT_COLUMNS)
    out.print()
    out.print(text(f"The weakest layers in {check.format}", "bold"))
    shown_rows = sorted(rows, key=lambda row: not row["keep"])[:SHOWN_IN_TERMINAL]
    columns = [
        c for c in LAYER_COLUMNS if not c.optional or any(row[c.key] not in ("", 0) and row[c.key] == row[c.key] for row in shown_rows)
    ]
    _print(out, shown_rows, columns)
    if len(rows) > SHOWN_IN_TERMINAL:
        out.print(text(f"… and {len(rows) - SHOWN_IN_TERMINAL} more; layers.csv lists all"))


def _print(out: Console, rows: list[dict[str, object]], columns: tuple[Column, ...] | list[Column]) -> None:
    table = plain_table(*(column.title for column in columns), right={column.title for column in columns if column.numeric})
    for row in rows:
        table.add_row(*(text(shown(row, column)) for column in columns))
    out.print(table)


def write_quantize_check(check: QuantizeCheck, folder: str | os.PathLike[str]) -> dict[str, Path]:
    """Writes the recording of exponents, the ranked layers as CSV, the summary as JSON, smoothing scales and limits, and the page.

    ``smoothing.safetensors`` holds one tensor for each layer, ``LAYER.scale`` (features,): divide the input by it, and multiply the columns
    of the weight.

    Returns:
        The paths of ``recording``, ``layers``, ``formats``, ``summary``, ``smoothing`` and ``page``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        "recording": folder / "exponents.safetensors",
        "summary": folder / "summary.json",
        "smoothing": folder / "smoothing.safetensors",
    }
    check.inputs.save(paths["recording"])
    with replacing(paths["summary"]) as temporary:
        temporary.write_text(to_json(check.summary()), encoding="utf-8")
    with replacing(paths["smoothing"]) as temporary:
        save_file(
            {f"{layer}.scale": scale.float().contiguous() for layer, scale in check.scales.items()},
            temporary,
            {"alpha": str(check.settings["alpha"])},
        )
    return {
        **paths,
        "layers": write_csv(check.rows(), folder / "layers.csv"),
        "formats": write_csv(check.by_format(), folder / "formats.csv"),
        "page": page.write(check_page(check), folder / "index.html"),
    }
