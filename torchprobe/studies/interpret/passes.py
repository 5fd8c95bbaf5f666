"""The passes of one run through the encoder: representations, concepts, layers. Each is kept on disk for a resumed run.

The images for the layers pass twice, once for the representations and once for the layers. Joining the two passes would change numbers,
because a random sample of the images is recorded, in its own batches. It would also not work for a resumed run, which reads complete
representations from disk, and under ``torchrun``, where the ranks share the representations but the first rank records the layers.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torchprobe
from torchprobe.analysis.concepts import DIRECTIONS, ROTATION, SHUFFLED, UNITS, concepts
from torchprobe.analysis.directions import Directions
from torchprobe.analysis.embeddings import Embeddings, embed
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock, Progress, RunOptions
from torchprobe.common.storage import digest
from torchprobe.datasets import Broden, Images
from torchprobe.dissection import Dissection
from torchprobe.dissection.walk import clear_checkpoint
from torchprobe.recording import RecordingWarning
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.inputs import Subject, sample
from torchprobe.studies.interpret.representation import Layers
from torchprobe.studies.interpret.results import Stages
from torchprobe.studies.scan import scan
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

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The facts that every stage depends on."""
        head = self.subject.head
        identity = None if head is None else [digest(head.parameters()), head.normalize]
        return {"torchprobe": torchprobe.__version__, "seed": self.options.seed, "head": identity}

    def embed(self) -> dict[str, Embeddings]:
        """The representations of every set, by name."""
        (self.folder / "embeddings").mkdir(parents=True, exist_ok=True)
        names = file_names(self.subject.sets)
        files = {name: self.folder / "embeddings" / f"{file}.safetensors" for name, file in names.items()}
        return {name: self._embed(name, images, files[name]) for name, images in self.subject.sets.items()}

    def _embed(self, name: str, images: Images, path: Path) -> Embeddings:
        self.clock.start(f"images: {name}", 0, len(images))
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
        )
        if embeddings.partial:
            raise KeyboardInterrupt
        self.clock.finish()
        return embeddings

    def concepts(self, broden: Broden, found: Directions | None, images: Embeddings) -> tuple[dict[str, Dissection], dict[str, Any]]:
        """Every basis scored against the concepts, and the facts that this depends on. Unchanged results are read from disk."""
        folder = self.folder / "concepts"
        directions = None if found is None else found.directions[: found.rank]
        facts = {
            "torchprobe": torchprobe.__version__,
            "weights": images.provenance["weights"],
            "preprocessing": images.provenance["preprocessing"],
            **{key: images.provenance[key] for key in ("transform",) if key in images.provenance},  # older files do not have it
            "directions": None if directions is None else digest([directions]),
            "data": hashlib.sha256(
                (broden.root / broden.index).read_bytes() + repr((broden.split, broden.categories)).encode()
            ).hexdigest(),
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
        }

        def tell(progress: Progress) -> None:
            if progress.stage != self.clock.stage:
                self.clock.start(progress.stage, 0, progress.total)
            self.clock.tell(progress.done)

        def compute() -> None:
            if self.ranks.first:
                self.stages.forget("concepts-made")  # its files will be replaced
                if not self.options.resume and (folder / "checkpoint").is_dir():
                    clear_checkpoint(folder / "checkpoint")
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
                self.stages.run("concepts-made", facts, dict[str, Any], dict)
                clear_checkpoint(folder / "checkpoint")
            self.ranks.barrier()

        bases = (UNITS, *(() if directions is None else (DIRECTIONS,)), ROTATION, SHUFFLED)
        files = {basis: folder / f"{name}.safetensors" for basis, name in file_names(bases).items()}
        self.clock.start("concepts", 0, len(broden))
        complete = self.stages.known("concepts-made", facts, dict[str, Any]) is not None and all(file.is_file() for file in files.values())
        if not self.ranks.from_first(complete):
            compute()
        self.clock.finish()
        return {basis: Dissection.load(file) for basis, file in files.items()}, facts

    def layers(self, images: Embeddings) -> Layers:
        """Vector kurtosis over depth, as ``torchprobe scan`` computes it, on a sample of the images."""
        subject = self.subject
        chosen = sample(subject.images, subject.layer_images, self.options.seed)
        self.clock.start("layers", 0, len(chosen))

        def compute() -> Layers:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RecordingWarning)
                result = scan(
                    subject.encoder,
                    chosen,
                    subject.layers,
                    batch_size=self.options.batch_size,
                    device=self.options.device or "cpu",
                    workers=self.options.workers,
                    seed=self.options.seed,
                    progress=lambda done, total: self.clock.tell(done),
                    stop=self.options.stop,
                )
            if result.partial:
                raise KeyboardInterrupt
            result.recording.save(self.folder / "recording.safetensors")
            remarks = [str(one.message) for one in caught if issubclass(one.category, RecordingWarning)]
            return Layers(result.rows(), result.images, len(result.unreadable), remarks, hidden_sentence(result) or None)

        facts = self.facts | {"images": identity(images), "layers": subject.layers, "count": subject.layer_images}
        found = self.stages.run("layers", facts, Layers, compute)
        self.clock.finish()
        return found


def identity(embeddings: Embeddings) -> dict[str, Any]:
    """The facts that a stage depends on if it reads representations."""
    return {**embeddings.provenance, "images": len(embeddings), "classes": embeddings.classes, "groups": repr(embeddings.groups)}
