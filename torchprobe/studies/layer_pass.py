"""The layers of an encoder over a set of inputs: their moments, and the outlier features of their hidden states, from one pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from torchprobe.analysis.hidden_states import HiddenOutliers, HiddenStates, LayerOutliers
from torchprobe.analysis.positions import FeatureDim, LayerEncoder, recorded_dims
from torchprobe.datasets.images import Batch
from torchprobe.encoders import Encoder
from torchprobe.recording import Recording, record, select_layers
from torchprobe.rendering.tables import LAYER_COLUMNS, cell

NAMED = 6
"""Outlier features that a row of the layer table names."""

HIDDEN_IMAGES = 32
"""The inputs on which the outlier features of the layers are told apart by position. More would cost time (we chose the number)."""

MAP_POSITIONS = 64
"""Random positions of a map to which the robust rule is applied, in each of these inputs. A map of 56 × 56 would cost as much as all
layers of a transformer, and neighbors say nearly the same (we chose the number)."""


class LayerPass:
    """Reads the layers of an encoder while somebody else runs it, so that the layers cost no pass of their own.

    Args:
        encoder: of images or texts.
        layers: names or globs as for :func:`torchprobe.record`; None: its default. The representation is always recorded.
        feature_dim: as for :func:`torchprobe.record`; not of the representation.
        most: the batches that begin before this number of inputs are recorded; None: all.

    Attributes:
        images, unreadable: number of inputs that were recorded, and of those in the same batches that could not be read.
        files: both together.

    Raises:
        ValueError: a layer that the encoder does not have.

    >>> import torch
    >>> from torch import nn
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8))
    >>> encoder = Encoder(network, features=8, preprocess=lambda image: image)
    >>> images = torch.randn(5, 3, 2, 2)
    >>> with LayerPass(encoder, "visual.*") as layers, layers.around(Batch(5, images, list("abcde"), list(range(5))), images):
    ...     h = encoder(images)
    >>> layers.recording["visual.1"].vectors, layers.images
    (5, 5)
    """

    def __init__(
        self, encoder: Encoder, layers: str | Iterable[str] | None = None, feature_dim: FeatureDim = None, most: int | None = None
    ) -> None:
        self.selected = None if layers is None else ["", *([layers] if isinstance(layers, str) else layers)]
        dims = recorded_dims(encoder, self.selected, feature_dim)
        self.encoder, self.most = encoder, most
        self.images = self.unreadable = self.files = 0
        self._recorder = record(encoder, self.selected, feature_dim=dims)
        source = encoder.source if isinstance(encoder, LayerEncoder) else encoder  # its layers are the same modules
        hidden = [layer for layer in select_layers(encoder, self.selected, dims) if layer.name]
        self._states = HiddenStates(source, hidden, MAP_POSITIONS) if hidden else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> LayerPass:
        self._stack.enter_context(self._recorder)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def close(self) -> None:
        """Removes all hooks."""
        self._stack.close()

    @contextlib.contextmanager
    def around(self, batch: Batch, inputs: Tensor) -> Iterator[None]:
        """The encoder must run over ``inputs``, which are those of ``batch``, once in the block."""
        if self.most is not None and batch.indices[0] >= self.most:
            self.close()
            yield
            return
        with contextlib.ExitStack() as stack:
            if self._states is not None and (room := HIDDEN_IMAGES - self._states.inputs) > 0:
                with self._recorder.paused():  # a few inputs run before the others
                    stack.enter_context(self._states)
                    stack.enter_context(self._states.following(inputs, room))
            stack.enter_context(self._recorder.mask(self.encoder.mask(inputs)))
            yield
        self.images += len(batch.names)
        self.unreadable += len(batch.unreadable)
        self.files += batch.files

    @property
    def recording(self) -> Recording:
        """The moments of every layer; ``""`` is the representation."""
        return self._recorder.total

    @property
    def hidden(self) -> HiddenOutliers | str:
        """The outlier features of the layers on the first inputs, or why there are none."""
        if self._states is None:
            return "no layer was recorded"
        try:
            return self._states.result()
        except ValueError as error:
            return str(error)


def layer_rows(recording: Recording, hidden: HiddenOutliers | str | None, images: int) -> list[dict[str, Any]]:
    """One row per layer: the rows of the recording, with ``vectors_per_image`` and the outlier features in words."""
    counts = [column for column in LAYER_COLUMNS if column.kind == "count" and column.key != "feature_dim"]
    found = {one.layer: one for one in hidden.layers} if isinstance(hidden, HiddenOutliers) else {}
    rows = []
    for row in recording.rows():
        whole = {column.key: cell(row, column) for column in counts}
        per_image = (whole["vectors"] + whole["constant_vectors"] + whole["invalid_vectors"]) / images
        per_image = int(per_image) if per_image.is_integer() else per_image
        rows.append({**row, **whole, "vectors_per_image": per_image, **_named(found.get(row["layer"]))})
    return rows


def _named(found: LayerOutliers | None) -> dict[str, str]:
    """The outlier features of a layer in words: which, where they live, and the massive activations."""
    if found is None:
        return {"outlier_indices": "", "massive": "", "long_tokens": ""}
    kinds: dict[str, list[str]] = {}  # kinds of positions with the same features share an entry
    for kind, indices in found.where.items():
        if indices:
            kinds.setdefault(_some(sorted(indices) if len(indices) <= NAMED else indices), []).append(kind)
    where = [f"{indices} ({', '.join(names)})" for indices, names in kinds.items()]
    massive = f"{_some(list(found.massive))} ({', '.join(found.massive_where)})" if found.massive else ""
    return {"outlier_indices": "; ".join(where), "massive": massive, "long_tokens": found.long_in_words}


def _some(indices: list[int]) -> str:
    return ", ".join(map(str, indices[:NAMED])) + (f" and {len(indices) - NAMED} more" if len(indices) > NAMED else "")
