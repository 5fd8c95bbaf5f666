"""Inputs of transformers models, by the names of their arguments.

Several candidates are tried, the richest first: text with an image, text alone; maps, videos. The first with which the model runs is taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .case import BATCH, CannotBuild, Inputs, brief, limit, randint, randn

LENGTH = (12, 20, 64)  # tokens in the three geometries
TARGET = (7, 9, 64)  # tokens for a decoder
SAMPLES = (3200, 4800, 6400)  # of a waveform
FRAMES = (96, 128, 64)  # of a spectrogram
GRID = (4, 6, 8)  # patches a side
WORDS = (10, 90)  # ordinary tokens

Make = Callable[[int], dict[str, Any]]


def inputs_of(
    model: nn.Module, config: Any, geometry: int, extra: Callable[[Any, int, int], dict[str, Any]] | None
) -> tuple[Callable[[int], Inputs], str]:
    """Inputs with which the model runs, as a function of the batch size, and what they are."""
    tried: list[str] = []
    with torch.no_grad():
        for name, make in candidates(model, config, geometry, extra):
            try:
                with limit(30):
                    model(**make(BATCH[geometry]))
            except Exception as error:
                tried.append(f"{name}: {brief(error)[:160]}")
                continue
            return (lambda batch, make=make: ((), make(batch))), name  # type: ignore[misc]
    raise CannotBuild("no inputs fit; " + (" | ".join(tried[:4]) or "no candidate"))


def candidates(model: nn.Module, config: Any, geometry: int, extra: Any) -> Iterator[tuple[str, Make]]:
    parameters = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    main = main[0] if isinstance(main, (list, tuple)) else main
    if extra is not None:
        yield "by hand", lambda batch: extra(config, batch, geometry)
    rest = _others(parameters, config, geometry)
    if "grid_thw" in parameters:
        yield "patches of images", lambda batch: {k: v for k, v in rest(batch).items() if k in parameters}
    if (tokens := _image_tokens(model, config, geometry)) is not None:
        yield "text with image tokens", tokens
    groups = {
        "text": _text(config, geometry, parameters),
        "image": _images(config, geometry),
        "audio": _audio(config, geometry),
    }
    if main == "input_ids":
        order = [("text", "image"), ("text",), ("text", "audio")] if "pixel_values" in parameters else [("text",), ("text", "audio")]
    elif main in ("pixel_values", "pixel_values_videos"):
        order = [("image", "text"), ("image",)] if "input_ids" in parameters else [("image",)]
    else:
        order = [("audio", "text"), ("audio",), ("text",)] if "input_ids" in parameters else [("audio",)]
    for names in order:
        for label, makes in _products([groups[name] for name in names]):

            def make(batch: int, makes: list[Make] = makes) -> dict[str, Any]:
                found: dict[str, Any] = {}
                for part in (rest, *makes):
                    found.update(part(batch))
                return {key: value for key, value in found.items() if key in parameters}

            given = make(BATCH[geometry])
            if not required_of(parameters) - given.keys() and given:
                yield label, make
    given = {k: v for k, v in rest(BATCH[geometry]).items() if k in parameters}
    if given and not required_of(parameters) - given.keys():
        yield ", ".join(given), lambda batch: {k: v for k, v in rest(batch).items() if k in parameters}


def _image_tokens(model: nn.Module, config: Any, geometry: int) -> Make | None:
    """Text in which an image takes the place of some tokens."""
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None or not hasattr(model, "get_image_features"):
        return None
    side = GRID[geometry]
    merge = _value(config, "spatial_merge_size", default=1)
    flat = "image_grid_thw" in inspect.signature(model.forward).parameters

    def images(batch: int) -> dict[str, Any]:
        if flat:
            patch, temporal = _value(config, "patch_size", default=16), _value(config, "temporal_patch_size", default=1)
            channels = _channels(config)
            grid = torch.tensor([[1, side, side]] * batch)
            return {"pixel_values": randn(batch * side * side, channels * temporal * patch * patch), "image_grid_thw": grid}
        return _images(config, geometry)[0][1](batch)

    try:
        found = model.get_image_features(**{k: v for k, v in images(1).items() if k != "pixel_values_videos"})  # type: ignore[operator]
        found = getattr(found, "pooler_output", found)
        while isinstance(found, (list, tuple)):
            found = found[0]
        count = found.shape[:-1].numel()
    except Exception:
        if not flat:
            return None
        count = (side // merge) ** 2

    def make(batch: int) -> dict[str, Any]:
        ids = randint(*WORDS, (batch, count + LENGTH[geometry]))
        ids[:, 2 : 2 + count] = token
        found = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images(batch)}
        types = torch.zeros_like(ids)
        types[:, 2 : 2 + count] = 1
        found["mm_token_type_ids"] = found["token_type_ids"] = types
        parameters = inspect.signature(model.forward).parameters
        return {k: v for k, v in found.items() if k in parameters}

    return make


def required_of(parameters: Any) -> set[str]:
    return {k for k, p in parameters.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}


def _products(groups: list[list[tuple[str, Make]]]) -> Iterator[tuple[str, list[Make]]]:
    if not groups:
        yield "", []
        return
    for label, make in groups[0]:
        for others, makes in _products(groups[1:]):
            yield " and ".join(filter(None, (label, others))), [make, *makes]


def _value(config: Any, *names: str, default: Any = None) -> Any:
    """A value of a configuration, or of the configurations inside it."""
    for name in names:
        for inner in (
            config,
            *[getattr(config, k, None) for k in ("vision_config", "audio_config", "text_config", "encoder_config", "backbone_config")],
        ):
            value = inner.get(name) if isinstance(inner, dict) else getattr(inner, name, None)
            if value is not None and not (isinstance(value, (list, tuple)) and "channels" in name):
                return value
    return default


def _channels(config: Any) -> int:
    found = _value(config, "num_channels", "in_channels", "in_chans", default=3)
    return found if isinstance(found, int) else 3


def _text(config: Any, geometry: int, parameters: Any) -> list[tuple[str, Make]]:
    decoder = "decoder_input_ids" in parameters

    def make(batch: int) -> dict[str, Any]:
        found = {"input_ids": randint(*WORDS, (batch, LENGTH[geometry]))}
        if decoder:
            found["decoder_input_ids"] = randint(*WORDS, (batch, TARGET[geometry]), seed=1)
        return found

    def masked(batch: int) -> dict[str, Any]:
        found = make(batch)
        return {**found, "attention_mask": torch.ones_like(found["input_ids"])}

    return [("text", make), ("text with a mask", masked)] if "attention_mask" in parameters else [("text", make)]


def _images(config: Any, geometry: int) -> list[tuple[str, Make]]:
    channels = _channels(config)
    size = _value(config, "image_size", "img_size", default=(96, 128, 64)[geometry])
    height, width = (size, size) if isinstance(size, int) else (tuple(size) * 2)[:2]
    if not isinstance(height, int) or not isinstance(width, int) or height > 512:
        height = width = 64
    frames = _value(config, "num_frames", "frames_per_clip", default=2)
    makes: list[tuple[str, Make]] = []
    for h, w in dict.fromkeys([(height, width), ((96, 96), (128, 128), (64, 64))[geometry], (224, 224)]):
        makes.append((f"images of {h} × {w}", lambda batch, h=h, w=w: {"pixel_values": randn(batch, channels, h, w)}))
    makes.append(("videos", lambda batch: _both(randn(batch, frames, channels, height, width))))
    makes.append(("image tiles", lambda batch: {"pixel_values": randn(batch, 1, channels, height, width)}))
    return makes


def _both(x: Tensor) -> dict[str, Any]:
    return {"pixel_values": x, "pixel_values_videos": x}


def _audio(config: Any, geometry: int) -> list[tuple[str, Make]]:
    mel = _value(config, "num_mel_bins", "n_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim", default=80)
    positions = _value(config, "max_source_positions", default=None)
    frames = FRAMES[geometry]
    length = SAMPLES[geometry]

    def named(x: Callable[[int], Tensor]) -> Make:
        def make(batch: int) -> dict[str, Any]:
            value = x(batch)
            return {"input_features": value, "input_values": value, "audio": value}

        return make

    makes = [
        ("a waveform", named(lambda batch: randn(batch, length))),
        ("a waveform of one channel", named(lambda batch: randn(batch, 1, length))),
        ("frames × bands", named(lambda batch: randn(batch, frames, mel))),
        ("bands × frames", named(lambda batch: randn(batch, mel, frames))),
    ]
    if positions is not None:
        makes.append(("bands × all frames", named(lambda batch: randn(batch, mel, 2 * positions))))
        makes.append(("bands × all positions", named(lambda batch: randn(batch, mel, positions))))
    longest = _value(config, "max_length")
    if longest is not None:
        makes.append(("all frames × bands", named(lambda batch: randn(batch, longest, mel))))
    return makes


def _others(parameters: Any, config: Any, geometry: int) -> Make:
    """What other arguments may need."""
    length, target = LENGTH[geometry], TARGET[geometry]
    width = _value(config, "hidden_size", "d_model", default=64)

    def make(batch: int) -> dict[str, Any]:
        grid = torch.tensor([[1, GRID[geometry], GRID[geometry]]] * batch)
        patches = batch * GRID[geometry] ** 2
        patch = _value(config, "patch_size", default=16)
        patch = patch if isinstance(patch, int) else 16
        temporal, channels = (
            _value(config, "temporal_patch_size", default=1),
            _value(config, "in_channels", "in_chans", "num_channels", default=3),
        )
        flat = randn(patches, channels * temporal * patch * patch)
        if "grid_thw" in parameters or "image_grid_thw" in required_of(parameters):
            key = "hidden_states" if "hidden_states" in parameters else "pixel_values"
            return {"grid_thw": grid, "image_grid_thw": grid, key: flat}
        found: dict[str, Any] = {
            "input": randn(batch, 3, 64, 64),
            "image": randn(batch, 3, 64, 64),
            "inputs_embeds": randn(batch, length, width),
            "query_embeds": randn(batch, length, width),
            "input_features_mask": torch.ones(batch, FRAMES[geometry], dtype=torch.long),
            "qformer_input_ids": randint(*WORDS, (batch, length), seed=3),
            "task_inputs": randint(*WORDS, (batch, length), seed=3),
            "pixel_position_ids": None,
            "bbox": randint(0, 9, (batch, length, 1)).expand(-1, -1, 4).cumsum(-1),
            "hidden_states": randn(batch, length, width),
            "inputs_embeds_only": None,
            "decoder_input_ids": randint(*WORDS, (batch, target), seed=1),
            "spectrogram": randn(batch, FRAMES[geometry], _value(config, "model_in_dim", "num_mel_bins", default=80)),
            "inputs": randn(batch, length, width),
            "noise_embeds": randn(batch, length, width),
            "context": randn(batch, length, width),
        }
        needed = required_of(parameters)
        return {k: v for k, v in found.items() if k in needed or (k == "decoder_input_ids" and "decoder_input_ids" in parameters)}

    return make
