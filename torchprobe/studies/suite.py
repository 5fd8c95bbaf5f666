"""Many encoders, one after the other, and the comparison of them: the study of the paper."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchprobe.analysis.baseline import Baseline, X
from torchprobe.analysis.embedding_run import by_first
from torchprobe.common.progress import ProgressCallback
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import Broden, DatasetError, Images
from torchprobe.datasets.labeled import class_folders
from torchprobe.encoders import Encoder, EncoderError, Head
from torchprobe.encoders.encoder import Template
from torchprobe.encoders.suite import Row
from torchprobe.studies.compare import Comparison, compare
from torchprobe.studies.compare.pairs import pair_name, pairs_within
from torchprobe.studies.compare.saved import load_results
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret import interpret
from torchprobe.studies.interpret.inputs import Keep, gather, kept_head, load_images
from torchprobe.studies.suite_pairs import run_pair


@dataclass
class Inputs:
    """What every encoder of a suite is shown.

    Args:
        images: the folder of the unshifted images, see :func:`torchprobe.studies.interpret.inputs.load_images`.
        shifts: name → folder.
        broden: concepts, or None.
        baseline, x: of effective robustness.
        templates: of zero-shot heads; None: those of ImageNet.
        limit: take so many images of each set, chosen at random.
        layers: to record and to compare; None: the blocks.
        layer_images: see :func:`torchprobe.studies.interpret.interpret`.
        batch_size, device, workers, seed: of every run.
    """

    images: Path
    shifts: Mapping[str, Path] = field(default_factory=dict)
    broden: Broden | None = None
    baseline: Baseline | None = None
    x: X = "full"
    templates: Sequence[Template] | None = None
    limit: int | None = None
    layers: Sequence[str] | None = None
    layer_images: int = 1024
    batch_size: int = 64
    device: torch.device | str | None = None
    workers: int = 2
    seed: int = 0

    def about(self) -> dict[str, Any]:
        """The folders, to keep with the results."""
        folders = {"images": str(self.images), **{f"shift {name}": str(folder) for name, folder in self.shifts.items()}}
        return folders | {"broden": None if self.broden is None else str(self.broden.root), "limit": self.limit}

    def load(self, row: Row, keep: Keep | None = None) -> tuple[Encoder, Images, dict[str, Images], Head | None]:
        """An encoder of the suite, on the device, with what goes with it; ``keep`` as for
        :func:`torchprobe.studies.interpret.inputs.gather`."""
        encoder = row.load()
        encoder = encoder if self.device is None else encoder.to(self.device)
        images, shifts, made = gather(encoder, self.images, self.shifts, row.head, self.templates, self.limit, self.seed, keep)
        if made is not None and row.normalize is not None and row.normalize != made.normalize:
            made = Head(made.weight.detach(), None if made.bias is None else made.bias.detach(), normalize=row.normalize, names=made.names)
        return encoder, images, shifts, made


def run_suite(
    rows: Sequence[Row],
    inputs: Inputs,
    out: str | os.PathLike[str],
    *,
    pairs: bool = True,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> Comparison:
    """Interprets every encoder of a suite and compares them.

    Each goes into a folder of its own beneath ``out``; the comparison is returned
    (:func:`torchprobe.studies.compare.write` puts it beside them). An encoder that cannot be had – no weights,
    its checkpoint is to be filled in – is skipped, and the comparison says why.

    Args:
        rows: from :func:`torchprobe.encoders.suite.load_suite`.
        inputs: what all are shown.
        out: a folder.
        pairs: load the encoders of one backbone in pairs again, for CKA of their layers and for weight interpolation; see
            :func:`torchprobe.studies.suite_pairs.run_pair`.
            Under ``torchrun`` that is left out.
        resume: encoders that are finished are not run again, and unfinished ones go on.
        progress: see :func:`torchprobe.studies.interpret.interpret`.
        say: is told which encoder is next, and which are skipped.

    Raises:
        EncoderError: fewer than two encoders could be had; with the number that was skipped.
        DatasetError: the images cannot be used.
    """
    folder = Path(out)
    load_images(inputs.images)  # before any encoder is fetched
    for shift in inputs.shifts.values():
        class_folders(shift)
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([row.name for row in rows])
    done: list[Row] = []
    skipped: list[dict[str, str]] = []
    with Ranks() as ranks, _asking_once() as note:
        for row in rows:
            if (why := row.missing()) is None:
                say(row.name)
                why, loaded = _loaded(row, inputs, folder / names[row.name], resume, ranks, note)
                if loaded is not None:
                    _interpret(row, *loaded, inputs, folder / names[row.name], resume, progress)
                    done.append(row)
                    del loaded  # before the next one takes its place in memory
                    continue
            skipped.append({"model": row.name, "why": why or ""})
            say(f"{row.name} is skipped: {why}")
        if len(done) < 2:
            why = f"; the first that was skipped, {skipped[0]['model']}: {skipped[0]['why']}" if skipped else ""
            raise EncoderError(f"{len(done)} of {len(rows)} encoders of the suite could be run, and a comparison takes two{why}")
        found: Comparison = by_first(ranks, lambda: _compared(done, names, inputs, folder, pairs, resume, ranks, skipped, say))
    return found


def _loaded(
    row: Row, inputs: Inputs, out: Path, resume: bool, ranks: Ranks, note: Callable[[BaseException], None]
) -> tuple[str | None, tuple[Encoder, Images, dict[str, Images], Head | None] | None]:
    """Why an encoder cannot be had, by any of the ranks; or the encoder with what goes with it."""
    why, loaded = None, None
    try:
        loaded = inputs.load(row, kept_head(out, resume))
    except (EncoderError, DatasetError) as error:
        note(error)
        why = str(error)
    reasons = [why, *ranks.to_first(why)]
    why = ranks.from_first(next((reason for reason in reasons if reason is not None), None))
    return why, loaded if why is None else None


@contextlib.contextmanager
def _asking_once() -> Iterator[Callable[[BaseException], None]]:
    """Told an error that comes from a host that did not answer, the Hugging Face hub is not asked again: it tries for a minute each time.
    What is in the cache still loads."""
    try:
        hub: Any = importlib.import_module("huggingface_hub.constants")
    except ModuleNotFoundError:
        hub = None
    before = getattr(hub, "HF_HUB_OFFLINE", False)

    def note(error: BaseException | None) -> None:
        while error is not None:
            if hub is not None and isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
                hub.HF_HUB_OFFLINE = True
            error = error.__cause__ or error.__context__

    try:
        yield note
    finally:
        if hub is not None:
            hub.HF_HUB_OFFLINE = before


def _compared(
    rows: Sequence[Row],
    names: Mapping[str, str],
    inputs: Inputs,
    out: Path,
    pairs: bool,
    resume: bool,
    ranks: Ranks,
    skipped: Sequence[Mapping[str, str]],
    say: Callable[[str], object],
) -> Comparison:
    by_name = {row.name: row for row in rows}
    folders = {row.name: out / names[row.name] for row in rows}
    extras: dict[str, dict[str, Any]] = {}
    for a, b in pairs_within([load_results(folder) for folder in folders.values()]) if pairs else []:
        say(f"{a.name} and {b.name}")
        if ranks.size > 1:
            why = "one process computes it: run the same command once more without torchrun, with --resume"
            extras[pair_name(a, b)] = {"skipped": {"CKA and interpolation": why}}
        else:
            extras[pair_name(a, b)] = run_pair((by_name[a.name], a), (by_name[b.name], b), inputs, out / "pairs", resume)
    return compare(list(folders.values()), extras=extras, skipped=skipped, seed=inputs.seed)


def _interpret(
    row: Row,
    encoder: Encoder,
    images: Images,
    shifts: dict[str, Images],
    head: Head | None,
    inputs: Inputs,
    out: Path,
    resume: bool,
    progress: ProgressCallback | None,
) -> None:
    keys = ("name", "role", "backbone", "pretraining", "source", "checkpoint")
    about = {key: getattr(row, key) for key in keys} | inputs.about()
    interpret(
        encoder,
        images,
        out,
        head=head,
        shifts=shifts,
        broden=inputs.broden,
        baseline=inputs.baseline,
        x=inputs.x,
        layers=inputs.layers,
        layer_images=inputs.layer_images,
        about=about,
        published=row.accuracy,
        batch_size=inputs.batch_size,
        device=inputs.device,
        workers=inputs.workers,
        seed=inputs.seed,
        resume=resume,
        progress=progress,
    )
