"""The passes of one run through the encoder: representations, concepts, layers. Each is kept on disk for a resumed run.

One pass over the unshifted images gives the representations, the moments of the layers and the outlier features of the hidden states. The
layers are recorded on a random sample, whose images come first. So a run that was interrupted while it recorded them, and the first of
several ranks under ``torchrun``, repeat the batches of the sample alone, and find the same.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.baseline import IMAGENET
from torchprobe.analysis.concepts import DIRECTIONS, ROTATION, SHUFFLED, UNITS, concepts
from torchprobe.analysis.directions import Directions
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.analysis.vectors import evaluating, part_of
from torchprobe.common.facts import file_digests
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock, Progress, RunOptions
from torchprobe.common.storage import digest
from torchprobe.common.version import VERSION
from torchprobe.datasets import Broden, ImageSet
from torchprobe.datasets.broden import broden_digest
from torchprobe.datasets.images import Batch
from torchprobe.datasets.sampling import shuffled, taken
from torchprobe.dissection import Dissection
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.recording import RecordingWarning
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.inputs import Subject
from torchprobe.studies.interpret.provenance import Origin, measure_origin
from torchprobe.studies.interpret.representation import Layers
from torchprobe.studies.interpret.results import Stages
from torchprobe.studies.layer_pass import LayerPass, layer_rows
from torchprobe.studies.scan_report import hidden_sentence


@dataclass
class Passes:
    """The passes of one run.

    Args:
        subject: the encoder and what it is measured on.
        folder: of the run.
        options: of the run.
        stages: what the run keeps on disk.
        clock: reports the progress.
        ranks: the processes that share the passes.
    """

    subject: Subject
    folder: Path
    options: RunOptions
    stages: Stages
    clock: Clock
    ranks: Ranks
    recorded: Layers | None = field(init=False, default=None)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts that every stage depends on."""
        head = self.subject.head
        identity = None if head is None else [digest(head.parameters()), head.normalize]
        return {"torchprobe": VERSION, "seed": self.options.seed, "head": identity}

    def embed(self) -> dict[str, Embeddings]:
        """The representations of every set, by name."""
        (self.folder / "embeddings").mkdir(parents=True, exist_ok=True)
        names = file_names(self.subject.sets)
        files = {name: self.folder / "embeddings" / f"{file}.safetensors" for name, file in names.items()}
        joined = self.subject.layer_images > 0 and self.ranks.size == 1
        found = {}
        for name, images in {**self.subject.sets, IMAGENET: self._images}.items():
            layers = self._layer_pass() if name == IMAGENET and joined else None
            with contextlib.nullcontext() if layers is None else layers:
                found[name] = self._embed(name, images, files[name], layers)
            if layers is not None and layers.moments.files == self._first_images:
                self.recorded = self._saved(layers)
                self.layers(found[name])  # kept at once
        return found

    def _embed(self, name: str, images: ImageSet, path: Path, layers: _Layers | None) -> Embeddings:
        self.clock.start(f"{self._inputs}: {name}", 0, len(images), self._inputs)
        embeddings = embed(
            self.subject.encoder,
            images,
            batch_size=self.options.batch_size,
            device=self.options.device,
            workers=self.options.workers,
            path=path,
            resume=self.options.resume,
            progress=lambda done, total: self.clock.tell(done),
            stop=self.options.stop,
            around=None if layers is None else layers.around,
        )
        if embeddings.partial:
            raise KeyboardInterrupt
        self.clock.finish()
        return embeddings

    def concepts(self, broden: Broden, found: Directions | None, images: Embeddings) -> tuple[dict[str, Dissection], dict[str, Any]]:
        """Every basis scored against the concepts, and the facts that this depends on. Unchanged results are read from disk."""
        folder = self.folder / "concepts"
        directions = None if found is None else found.directions[: found.rank]
        facts: dict[str, Any] = {
            "torchprobe": VERSION,
            "weights": images.provenance["weights"],
            "preprocessing": images.provenance["preprocessing"],
            **{key: images.provenance[key] for key in ("modules", "transform") if key in images.provenance},  # older files do not have it
            "directions": None if directions is None else digest([directions]),
            "dataset": self.ranks.on_first(lambda: broden_digest(broden)),
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
        }

        def tell(progress: Progress) -> None:
            if progress.stage != self.clock.stage:
                self.clock.start(progress.stage, 0, progress.total)
            self.clock.tell(progress.done)

        def clear() -> None:
            if (folder / "checkpoint").is_dir():
                clear_checkpoint(folder / "checkpoint")

        def compute() -> None:
            if self.ranks.first:
                self.stages.forget("concepts-made")  # its files will be replaced
                if not self.options.resume:
                    clear()
            self.ranks.barrier()
            result = concepts(
                self.subject.encoder,
                broden,
                directions,
                seed=self.options.seed,
                batch_size=self.options.batch_size,
                device=self.options.device,
                workers=self.options.workers,
                checkpoint=folder / "checkpoint",
                resume=True,
                progress=tell,
            )
            if self.ranks.first:
                for basis, one in result.items():
                    one.save(files[basis])
                self.stages.run("concepts-made", facts, dict[str, Any], written)
            self.ranks.barrier()

        def written() -> dict[str, Any]:
            return dict(zip(files, file_digests([*files.values()]), strict=True))

        bases = (UNITS, *(() if directions is None else (DIRECTIONS,)), ROTATION, SHUFFLED)
        files = {basis: folder / f"{name}.safetensors" for basis, name in file_names(bases).items()}
        self.clock.start("concepts", 0, len(broden))
        complete = self.ranks.on_first(lambda: self.stages.known("concepts-made", facts, dict[str, Any]) == written())
        if not complete:
            compute()
        if self.ranks.first:
            clear()  # also what a run left that was killed while it did so
        self.ranks.barrier()
        self.clock.finish()
        return {basis: Dissection.load(file) for basis, file in files.items()}, facts

    def layers(self, images: Embeddings) -> Layers:
        """The layers over a sample of the images, as ``torchprobe scan`` computes them: from the pass for the representations, or kept on
        disk, or from a pass over the sample alone."""
        return self.stages.run("layers", self._layer_facts(images), Layers, lambda: self.recorded or self._repeated())

    def _repeated(self) -> Layers:
        """The layers from a pass over the sample alone, in the same batches."""
        subject, options = self.subject, self.options
        first = taken(self._images, range(self._first_images))
        self.clock.start("layers", 0, len(first), self._inputs)
        layers, done = self._layer_pass(), 0
        encoder = subject.encoder if options.device is None else subject.encoder.to(options.device)
        place = next((tensor.device for tensor in [*encoder.parameters(), *encoder.buffers()]), torch.device("cpu"))
        with layers, torch.inference_mode(), evaluating(encoder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="PIL")
            for batch in first.batches(encoder.preprocess, options.batch_size, options.workers):
                if options.stop is not None and options.stop():
                    raise KeyboardInterrupt
                part_of(encoder, place, (batch, [0] * len(batch.names)), layers.around)
                done += batch.files
                self.clock.tell(done)
        self.clock.finish()
        return self._saved(layers)

    def origin(self, features: Sequence[int], facts: Mapping[str, Any]) -> Origin:
        """Where features come from, on a random sample of the images. One process finds it out."""
        subject, count = self.subject, min(self.subject.provenance_images, len(self.subject.images))
        facts = {**facts, "features": list(features), "count": count}

        def compute() -> Origin:
            self.clock.start("provenance", 0, 0, self._inputs)
            images = taken(self._images, range(count))
            return measure_origin(subject.encoder, images, features, subject.head, self.options, self.clock.count)

        found = self.stages.run("provenance", facts, Origin, compute)
        if found.failed:
            self.stages.forget("provenance")  # a resumed run tries again
        return found

    def order(self, ids: Sequence[str]) -> list[int]:
        """The numbers of rows of images, so that they come in the order in which the images were given."""
        images = self.subject.images
        place = {images.name(path): i for i, path in enumerate(images.paths)}
        return sorted(range(len(ids)), key=lambda i: place[ids[i]])

    @property
    def _inputs(self) -> str:
        return f"{self.subject.encoder.inputs}s"

    @cached_property
    def _images(self) -> ImageSet:
        """The unshifted images, a random sample first."""
        return shuffled(self.subject.images)

    @property
    def _first_images(self) -> int:
        """The number of images in the batches that hold the sample for the layers."""
        size, images = self.options.batch_size, len(self.subject.images)
        return min(images, -(-min(self.subject.layer_images, images) // size) * size)

    def _layer_pass(self) -> _Layers:
        subject = self.subject
        return _Layers(LayerPass(subject.encoder, subject.layers, subject.feature_dim, self._first_images))

    def _layer_facts(self, images: Embeddings) -> dict[str, Any]:
        subject = self.subject
        return self.facts | {
            "images": identity(images),
            "layers": subject.layers,
            "count": subject.layer_images,
            "feature_dim": subject.feature_dim,
        }

    def _saved(self, layers: _Layers) -> Layers:
        """What a pass recorded; the recording goes to its file."""
        found = layers.moments
        found.recording.save(self.folder / "recording.safetensors")
        rows = layer_rows(found.recording, found.hidden, found.images)
        return Layers(rows, found.images, found.unreadable, layers.remarks, hidden_sentence(found.hidden) or None)


class _Layers:
    """A :class:`~torchprobe.studies.layer_pass.LayerPass` whose warnings become remarks of the page."""

    def __init__(self, moments: LayerPass) -> None:
        self.moments, self.remarks = moments, list[str]()

    def __enter__(self) -> None:
        with self._noted():
            self.moments.__enter__()

    def __exit__(self, *error: object) -> None:
        with self._noted():
            self.moments.__exit__(*error)

    @contextlib.contextmanager
    def around(self, batch: Batch, inputs: Tensor) -> Iterator[None]:
        with self._noted(), self.moments.around(batch, inputs):
            yield

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RecordingWarning)
            yield
        for one in caught:
            if issubclass(one.category, RecordingWarning):
                self.remarks.append(str(one.message))
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def identity(embeddings: Embeddings) -> dict[str, Any]:
    """The facts that a stage depends on if it reads representations."""
    return {**embeddings.provenance, "images": len(embeddings), "classes": embeddings.classes, "groups": repr(embeddings.groups)}
