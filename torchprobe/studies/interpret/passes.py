"""The passes of one interpretation through the encoder: representations, concepts, layers. Each is on disk, and resumed."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import torchprobe
from torchprobe.analysis.concepts import DIRECTIONS, ROTATION, SHUFFLED, UNITS, concepts
from torchprobe.analysis.directions import Directions
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.common.digest import digest
from torchprobe.common.progress import Clock, Progress
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import Broden, Images, LabeledImages
from torchprobe.dissection import Dissection
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.encoders import Encoder, Head
from torchprobe.recording import RecordingWarning
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret import measures
from torchprobe.studies.interpret.stages import Plain, Stages
from torchprobe.studies.scan import scan


class Passes:
    """What takes a pass through the encoder, and what the stages of one run share."""

    def __init__(
        self,
        encoder: Encoder,
        head: Head | None,
        folder: Path,
        stages: Stages,
        clock: Clock,
        batch_size: int,
        device: torch.device | str | None,
        workers: int,
        seed: int,
        resume: bool,
        stop: Callable[[], bool] | None,
        ranks: Ranks,
    ) -> None:
        self.encoder, self.head, self.folder, self.stages, self.clock = encoder, head, folder, stages, clock
        self.batch_size, self.device, self.workers, self.seed = batch_size, device, workers, seed
        self.resume, self.stop, self.ranks = resume, stop, ranks
        self.facts: Plain = {"torchprobe": torchprobe.__version__, "seed": seed, "head": None if head is None else head_identity(head)}

    def embed(self, name: str, images: Images, path: Path) -> Embeddings:
        """The representations of one set, on disk."""
        self.clock.start(f"images: {name}", 0, len(images))
        embeddings = embed(
            self.encoder,
            images,
            batch_size=self.batch_size,
            device=self.device,
            workers=self.workers,
            path=path,
            resume=self.resume,
            progress=lambda done, total: self.clock.tell(done),
            stop=self.stop,
        )
        if embeddings.partial:
            raise KeyboardInterrupt
        self.clock.finish()
        return embeddings

    def concepts(self, broden: Broden, found: Directions | None, images: Embeddings) -> tuple[dict[str, Dissection], Plain]:
        """Every basis against the concepts, and what they were made from; on disk, and read from there when nothing has changed."""
        folder = self.folder / "concepts"
        directions = None if found is None else found.directions[: found.rank]
        made = {
            "torchprobe": torchprobe.__version__,
            "weights": images.made["weights"],
            "preprocessing": images.made["preprocessing"],
            "directions": None if directions is None else digest([directions]),
            "data": hashlib.sha256((broden.root / "index.csv").read_bytes() + repr((broden.split, broden.categories)).encode()).hexdigest(),
            "batch_size": self.batch_size,
            "seed": self.seed,
        }

        def tell(progress: Progress) -> None:
            if progress.stage != self.clock.stage:
                self.clock.start(progress.stage, 0, progress.total)
            self.clock.tell(progress.done)

        def compute() -> None:
            if self.ranks.first:
                self.stages.forget("concepts-made")  # the files that it speaks of are about to be replaced
                if not self.resume and (folder / "checkpoint").is_dir():
                    clear_checkpoint(folder / "checkpoint")
            self.ranks.barrier()
            result = concepts(
                self.encoder,
                broden,
                directions,
                seed=self.seed,
                batch_size=self.batch_size,
                device=self.device,
                workers=self.workers,
                checkpoint=folder / "checkpoint",
                resume=True,
                progress=tell,
            )
            if self.ranks.first:
                for basis, one in result.items():
                    one.save(files[basis])
                self.stages.run("concepts-made", made, dict)
                clear_checkpoint(folder / "checkpoint")
            self.ranks.barrier()

        bases = (UNITS, *(() if directions is None else (DIRECTIONS,)), ROTATION, SHUFFLED)
        files = {basis: folder / f"{name}.safetensors" for basis, name in file_names(bases).items()}
        self.clock.start("concepts", 0, len(broden))
        there = self.stages.known("concepts-made", made) is not None and all(file.is_file() for file in files.values())
        if not self.ranks.from_first(there):
            compute()
        self.clock.finish()
        return {basis: Dissection.load(file) for basis, file in files.items()}, made

    def add_layers(self, results: Plain, embedded: Embeddings, images: Images, layers: str | list[str] | None, count: int) -> None:
        """Vector kurtosis over depth, as ``torchprobe scan`` has it."""
        if not count:
            results["skipped"]["layers"] = "no images were asked for (layer_images = 0)"
            return
        chosen = sample(images, count, self.seed)
        self.clock.start("layers", 0, len(chosen))

        def compute() -> Plain:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RecordingWarning)
                result = scan(
                    self.encoder,
                    chosen,
                    layers,
                    batch_size=self.batch_size,
                    device=self.device or "cpu",
                    workers=self.workers,
                    seed=self.seed,
                    progress=lambda done, total: self.clock.tell(done),
                    stop=self.stop,
                )
            if result.partial:
                raise KeyboardInterrupt
            result.recording.save(self.folder / "recording.safetensors")
            remarks = [str(one.message) for one in caught if issubclass(one.category, RecordingWarning)]
            return {"rows": result.rows(), "images": result.images, "skipped": len(result.unreadable), "remarks": remarks}

        facts = self.facts | {"images": identity(embedded), "layers": layers, "count": count}
        results["layers"] = self.stages.run("layers", facts, compute)
        self.clock.finish()

    def add_concepts(self, results: Plain, dissections: dict[str, Dissection], made: Plain) -> None:
        """How many concepts each basis encodes."""
        if not dissections:
            results["skipped"]["concepts"] = "no concepts were given (--broden)"
            return
        results["concepts"] = self.stages.run("concepts", made, lambda: measures.concept_summary(dissections))


def sample(images: Images, count: int, seed: int) -> Images:
    """So many of the images, at random, in their order."""
    if count >= len(images):
        return images
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    paths = [images.paths[i] for i in chosen]
    if isinstance(images, LabeledImages):
        return replace(images, paths=paths, labels=[images.labels[i] for i in chosen])
    return replace(images, paths=paths)


def head_identity(head: Head) -> list[Any]:
    """What tells a head from others."""
    return [digest(head.parameters()), head.normalize]


def identity(embeddings: Embeddings) -> Plain:
    """What a stage that reads representations depends on."""
    return {**embeddings.made, "images": len(embeddings), "classes": embeddings.classes, "groups": repr(embeddings.groups)}
