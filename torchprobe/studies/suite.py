"""Many encoders, one after the other, and their comparison: the study of the paper."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchprobe.common.options import RunOptions
from torchprobe.common.progress import ProgressCallback
from torchprobe.common.ranks import Ranks
from torchprobe.datasets import DatasetError
from torchprobe.datasets.labeled import class_folders
from torchprobe.encoders import EncoderError
from torchprobe.encoders.suite import SuiteRow
from torchprobe.studies.compare import Comparison, compare
from torchprobe.studies.compare.comparison import PairMeasures, Skipped
from torchprobe.studies.compare.pairs import pair_name, pairs_within
from torchprobe.studies.compare.saved import load_results
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.inputs import Inputs, Subject, kept_head, load_images
from torchprobe.studies.interpret.run import interpret_subject
from torchprobe.studies.suite_pairs import run_pair

__all__ = ["Inputs", "run_suite"]


def run_suite(
    rows: Sequence[SuiteRow],
    inputs: Inputs,
    out: str | os.PathLike[str],
    *,
    pairs: bool = True,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 2,
    seed: int = 0,
    resume: bool = False,
    progress: ProgressCallback | None = None,
    say: Callable[[str], object] = lambda message: None,
) -> Comparison:
    """Interprets every encoder of a suite and compares them.

    The results of each encoder are written into its own folder in ``out``. The comparison is returned, and not written
    (:func:`torchprobe.studies.compare.write` writes it). An unavailable encoder, for example one whose checkpoint is to be filled in, is
    skipped, and the comparison says why.

    Args:
        rows: from :func:`torchprobe.encoders.suite.load_suite`.
        inputs: what every encoder is measured on.
        out: a folder.
        pairs: load the encoders of one backbone again, in pairs, for CKA of their layers and for weight interpolation; see
            :func:`torchprobe.studies.suite_pairs.run_pair`. Under ``torchrun`` this is left out.
        batch_size, device, workers, seed: of every run, see :func:`torchprobe.studies.interpret.interpret`.
        resume: encoders that are complete are not run again, and interrupted ones are continued.
        progress: see :func:`torchprobe.studies.interpret.interpret`.
        say: called with the name of the next encoder, and with the reason if one is skipped.

    Raises:
        EncoderError: fewer than two encoders are available; with the number of skipped ones.
        DatasetError: the images cannot be used.
    """
    options = RunOptions(batch_size, device, workers, seed, resume, progress)
    folder = Path(out)
    load_images(inputs.images)  # before any encoder is fetched
    for shift in inputs.shifts.values():
        class_folders(shift)
    folder.mkdir(parents=True, exist_ok=True)
    names = file_names([row.name for row in rows])
    folders = {row.name: folder / names[row.name] for row in rows}
    done: list[SuiteRow] = []
    skipped: list[Skipped] = []
    with Ranks() as ranks, _offline_after_failure() as note:
        for row in rows:
            why = row.missing()
            if why is None:
                say(row.name)
                why, subject = _load(row, inputs, options, folders[row.name], ranks, note)
                if subject is not None:
                    interpret_subject(subject, folders[row.name], options)
                    done.append(row)
                    del subject  # before the memory of the next encoder is needed
                    continue
            skipped.append(Skipped(row.name, why or ""))
            say(f"{row.name} is skipped: {why}")
        if len(done) < 2:
            first = f"; the first that was skipped, {skipped[0].model}: {skipped[0].why}" if skipped else ""
            raise EncoderError(f"{len(done)} of {len(rows)} encoders of the suite are available, but a comparison needs two{first}")

        def comparison() -> Comparison:
            finished = {row.name: folders[row.name] for row in done}
            extras = _extras(done, finished, inputs, options, folder / "pairs", ranks, say) if pairs else {}
            return compare(list(finished.values()), extras=extras, skipped=skipped, seed=seed)

        return ranks.on_first(comparison)


def _load(
    row: SuiteRow, inputs: Inputs, options: RunOptions, out: Path, ranks: Ranks, note: Callable[[BaseException], None]
) -> tuple[str | None, Subject | None]:
    """The encoder with everything that it is measured on; or the reason why it is unavailable on one of the ranks."""
    why, subject = None, None
    try:
        subject = inputs.load(row, options, kept_head(out, options.resume))
    except (EncoderError, DatasetError) as error:
        note(error)
        why = str(error)
    reasons = [why, *ranks.to_first(why)]
    why = ranks.from_first(next((reason for reason in reasons if reason is not None), None))
    return why, subject if why is None else None


@contextlib.contextmanager
def _offline_after_failure() -> Iterator[Callable[[BaseException], None]]:
    """Puts the Hugging Face hub into offline mode after an error from a host that did not answer, because each attempt takes a minute.
    Files in the cache still load."""
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


def _extras(
    rows: Sequence[SuiteRow],
    folders: dict[str, Path],
    inputs: Inputs,
    options: RunOptions,
    out: Path,
    ranks: Ranks,
    say: Callable[[str], object],
) -> dict[str, PairMeasures]:
    """Pair → the measures that need two networks at the same time."""
    by_name = {row.name: row for row in rows}
    found: dict[str, PairMeasures] = {}
    for a, b in pairs_within([load_results(folder) for folder in folders.values()]):
        say(f"{a.name} and {b.name}")
        if ranks.size > 1:
            why = "one process computes it: run the same command again without torchrun, with --resume"
            found[pair_name(a, b)] = PairMeasures({"CKA and interpolation": why})
        else:
            pair_options = replace(options, progress=None)
            found[pair_name(a, b)] = run_pair((by_name[a.name], a), (by_name[b.name], b), inputs, out, pair_options)
    return found
