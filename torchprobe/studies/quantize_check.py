"""Can I serve this network in eight bits? One pass over inputs: what every layer would lose in every format."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from torchprobe.analysis.quantization import FORMATS, clipping, smoothing_scales
from torchprobe.analysis.quantization.layers import LayerForecast, column_largest, layer_forecast, weighted_layers
from torchprobe.analysis.quantization.network import FEWEST, network_db
from torchprobe.common.runs import Clock, CountCallback, RunOptions, counting
from torchprobe.datasets import DatasetError, ImageSet
from torchprobe.encoders import Encoder
from torchprobe.recording import Recording, record
from torchprobe.statistics import Exponents, Moments

KEEP_BELOW_DB = 20.0
"""Layers whose output would have less than this are named as those to keep in 16 bits: an error of a tenth of the output. So are layers
whose input has outlier features, if the other features would have less. We chose the value; what a network bears, only trying can tell."""

MEASURED_INPUTS = 32
"""So many of the first inputs pass the network again, with its layers rounded. We chose the number."""

DEFINITIONS = {
    "SQNR": "10 log10(Σ x² / Σ error²), in decibels. 20 dB is an error of 10 %, 40 dB of 1 %; one bit is worth 6 dB.",
    "input": "SQNR of the input of the layer, forecast from its exponents: no activation was rounded.",
    "weight": "SQNR of the weights, measured by rounding them; INT8 has a scale for each output.",
    "output": "SQNR of the output without the bias: the errors of the input and of the weights, passed through the weights as if the "
    "errors of different values were independent. Layers are ranked by it.",
    "underflow": "share of the nonzero values that become 0.",
    "overflow": "share of the nonzero values beyond the largest number of the format.",
    "outliers": "the features that cause the error: the fewest (at most 1 %) without which the other features would gain 6 dB or more.",
    "others": "SQNR of the other features as it is, while the scale reaches the outliers.",
    "without": "SQNR of the other features if the scale did not reach the outliers.",
    "unsure": "the forecast may be off by more than 1 dB, and why. Measure such a layer.",
    "keep": "layers to keep in 16 bits: those whose output, or whose other features beside outliers, would have less than "
    f"{KEEP_BELOW_DB:g} dB (we chose the value).",
    "network": "SQNR of the output of the network with all layers rounded at once, measured. The signal is what differs between inputs: "
    "10 log10(Σ (y − mean)² / Σ error²). The scales come from the same inputs.",
}
"""The terms, for the terminal, the page and the JSON file."""


@dataclass(frozen=True)
class Network:
    """What rounding does to the output of the network, measured.

    Attributes:
        inputs: that passed it again; 0: none.
        db: the SQNR of the output with all layers rounded; nan if it is not known.
        kept_db: the same with the layers to keep as they are; nan without such layers.
        why: why there is no number; empty if there is one.
    """

    inputs: int = 0
    db: float = math.nan
    kept_db: float = math.nan
    why: str = ""


@dataclass
class QuantizeCheck:
    """The result of one pass over inputs.

    Attributes:
        model: the name of the encoder.
        format: the format that ranks the layers.
        layers: format → one :class:`LayerForecast` for each layer, in the order of execution.
        network: what rounding all layers does to the output of the network, in :attr:`format`.
        inputs: the exponents of the input of each layer.
        scales: the smoothing scales of each layer.
        modules: the class of each layer.
        seen, total: inputs that were seen, and files.
        unreadable: the files that could not be read, each with the reason.
        unused: layers that no input reached.
        partial: whether the run was stopped before the end.
        settings: of the run.
    """

    model: str
    format: str
    layers: dict[str, list[LayerForecast]]
    inputs: Recording
    scales: dict[str, torch.Tensor]
    modules: dict[str, str]
    seen: int
    total: int
    network: Network = field(default_factory=Network)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    partial: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def ranked(self, format: str | None = None) -> list[LayerForecast]:
        """The layers, the one with the largest relative error of its output first; layers without a number last."""
        return sorted(self.layers[format or self.format], key=lambda one: (math.isnan(one.output_db), one.output_db))

    def keep(self, format: str | None = None) -> list[str]:
        """The layers to keep in 16 bits; see :data:`KEEP_BELOW_DB`."""
        return [one.layer for one in self.ranked(format) if one.output_db < KEEP_BELOW_DB or one.input.others_db < KEEP_BELOW_DB]

    def rows(self, format: str | None = None) -> list[dict[str, Any]]:
        """One row for each layer, ranked."""
        rows, keep = [], set(self.keep(format))
        for place, one in enumerate(self.ranked(format), 1):
            exponents, limit = self.inputs[one.layer], clipping(self.inputs[one.layer])
            rows.append(
                {
                    "rank": place,
                    "layer": one.layer,
                    "keep": "yes" if one.layer in keep else "",
                    "module": self.modules[one.layer],
                    "features": exponents.features,
                    "output_db": one.output_db,
                    "input_db": one.input.sqnr_db,
                    "weight_db": one.weight_db,
                    "underflow": one.input.underflow,
                    "overflow": one.input.overflow,
                    "outliers": ", ".join(map(str, one.input.outliers)),
                    "others_db": one.input.others_db,
                    "without_db": one.input.without_db,
                    "abs_max": exponents.abs_max,
                    "clip": limit.limit if limit.gain_db > 0 else math.nan,
                    "clip_gain_db": limit.gain_db,
                    "nonfinite": exponents.nonfinite,
                    "unsure": one.input.unsure,
                }
            )
        return rows

    def by_format(self) -> list[dict[str, Any]]:
        """One row for each format: the weakest layer, the median, and how many layers to keep in 16 bits."""
        rows = []
        for name, kind in FORMATS.items():
            ranked = [one for one in self.ranked(name) if not math.isnan(one.output_db)]
            values = torch.tensor([one.output_db for one in ranked] or [math.nan], dtype=torch.float64, device="cpu")
            rows.append(
                {
                    "format": name,
                    "weakest": ranked[0].layer if ranked else "",
                    "weakest_db": float(values.min()),
                    "median_db": float(values.median()),
                    "keep": len(self.keep(name)),
                    "layers": len(self.layers[name]),
                    "unsure": sum(bool(one.input.unsure) for one in self.layers[name]),
                    "meaning": kind.meaning,
                }
            )
        return rows

    def summary(self) -> dict[str, Any]:
        """All printed numbers as plain values: the content of ``summary.json`` and of ``--json``."""
        return {
            "model": self.model,
            "partial": self.partial,
            "inputs": {"seen": self.seen, "found": self.total, "unreadable": [{"file": f, "reason": r} for f, r in self.unreadable]},
            "format": self.format,
            "keep_16_bit": self.keep(),
            "network": asdict(self.network),
            "layers": self.rows(),
            "formats": self.by_format(),
            "forecasts": {name: [asdict(one) for one in found] for name, found in self.layers.items()},
            "unused_layers": self.unused,
            "definitions": DEFINITIONS,
            "settings": self.settings,
        }


def quantize_check(
    encoder: Encoder,
    images: ImageSet,
    format: str = "int8_token",
    *,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    workers: int = 2,
    alpha: float = 0.5,
    progress: CountCallback | None = None,
    stop: Callable[[], bool] | None = None,
) -> QuantizeCheck:
    """Runs ``images`` through ``encoder`` once, and forecasts what its linear layers and convolutions lose in every format. What they
    do together to the output is measured in one format, with the first :data:`MEASURED_INPUTS` inputs.

    Args:
        encoder: from :func:`torchprobe.encoders.load_encoder`; moved to ``device`` and put in eval mode.
        images: from :func:`torchprobe.datasets.image_folder`, or :func:`torchprobe.datasets.text_file` for an encoder of texts: then
            padding is masked.
        format: a name of :data:`torchprobe.analysis.quantization.FORMATS`, by which layers are ranked.
        batch_size: files in a batch.
        device: where the encoder runs.
        workers: threads that decode images.
        alpha: of the smoothing scales.
        progress: called with (files done, files in all) after every batch.
        stop: called before every batch. If it returns True, the result is about the inputs seen so far, and marked as partial.

    Raises:
        DatasetError: no file could be read, or there is none.
        ValueError: no such format, or the encoder has no layer with weights.

    >>> import tempfile, pathlib, PIL.Image
    >>> from torch import nn
    >>> from torchvision.transforms.functional import to_tensor
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> PIL.Image.linear_gradient("L").resize((4, 4)).save(folder / "a.png")
    >>> encoder = Encoder(nn.Sequential(nn.Flatten(), nn.Linear(48, 8)), features=8, preprocess=to_tensor)
    >>> from torchprobe.datasets import Images
    >>> [row["layer"] for row in quantize_check(encoder, Images([folder / "a.png"])).rows()]
    ['visual.1']
    """
    if format not in FORMATS:
        raise ValueError(f"format is one of {', '.join(FORMATS)}; got {format!r}")
    if not len(images):
        raise DatasetError("the data set is empty")
    options = RunOptions(batch_size, device, workers, 0, progress=counting(progress), stop=stop)
    encoder = encoder.to(device).eval()
    dims = weighted_layers(encoder)
    if not dims:
        raise ValueError(f"{encoder.name} has no linear layer and no convolution, so there is nothing to quantize")
    names, modules = list(dims), dict(encoder.named_modules())
    before = record(encoder, names, of="input", statistic=Exponents, feature_dim=dims)
    after = record(encoder, names, of="output", statistic=Moments, feature_dim=dims)
    seen, unreadable, partial, done = 0, list[tuple[str, str]](), False, 0
    again, plain = list[torch.Tensor](), list[torch.Tensor]()
    clock = Clock(options.progress, stages=1)
    clock.start("quantize-check", done, len(images), f"{encoder.inputs}s")
    with before, after, torch.inference_mode():
        try:
            for batch in images.batches(encoder.preprocess, options.batch_size, options.workers):
                if options.stop is not None and options.stop():
                    partial = True
                    break
                unreadable += batch.unreadable
                if batch.names:
                    inputs = batch.pixels.to(options.device)
                    mask = encoder.mask(inputs)
                    with before.mask(mask), after.mask(mask):
                        outputs = encoder(inputs)
                    if seen < MEASURED_INPUTS:
                        again.append(inputs[: MEASURED_INPUTS - seen])
                        plain.append(outputs[: MEASURED_INPUTS - seen])
                    seen += len(batch.names)
                done += batch.files
                clock.tell(done)
        except KeyboardInterrupt:
            partial = True
    if not seen:
        if partial:
            raise KeyboardInterrupt
        file, reason = unreadable[0]
        raise DatasetError(f"none of the {len(unreadable)} files could be read; the first, {file}: {reason}")
    recording, moments = before.total, after.total
    used = [name for name in names if name in recording and name in moments and float(recording[name].vectors) > 0]
    found = {name: [layer_forecast(layer, modules[layer], recording[layer], moments[layer], name) for layer in used] for name in FORMATS}
    check = QuantizeCheck(
        model=encoder.name,
        format=format,
        layers=found,
        inputs=recording,
        scales={layer: smoothing_scales(recording[layer].largest, column_largest(modules[layer]), alpha) for layer in used},
        modules={layer: type(modules[layer]).__name__ for layer in used},
        seen=seen,
        total=len(images),
        unreadable=unreadable,
        unused=[name for name in names if name not in used],
        partial=partial,
        settings={"batch_size": batch_size, "device": str(device), "format": format, "alpha": alpha},
    )
    check.network = _measure(check, encoder, again, plain)
    return check


def _measure(check: QuantizeCheck, encoder: Encoder, inputs: list[torch.Tensor], plain: list[torch.Tensor]) -> Network:
    """What rounding does to the output of the network, for some inputs whose outputs are known."""
    count, used, keep = sum(map(len, inputs)), list(check.modules), check.keep()
    if check.partial or count < FEWEST:
        return Network(why="the run was stopped" if check.partial else f"it takes {FEWEST} inputs, and there was {count}")
    exponents = {layer: check.inputs[layer] for layer in used}

    def db(layers: list[str]) -> float:
        with torch.inference_mode():
            return network_db(encoder, encoder, inputs, plain, layers, check.format, exponents)

    try:
        whole = db(used)
        kept = db([layer for layer in used if layer not in keep]) if 0 < len(keep) < len(used) else math.nan
    except Exception as error:  # such as weights that are computed in every call; the forecasts stay
        return Network(why=str(error).partition("\n")[0])
    return Network(count, whole, kept, "" if not math.isnan(whole) else "its outputs are all the same, or not finite")
