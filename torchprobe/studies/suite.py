"""Many encoders, one after the other, and their comparison: the study of the paper."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprobe.analysis.baseline import IMAGENET
from torchprobe.analysis.embeddings import embed
from torchprobe.analysis.evaluation import evaluate
from torchprobe.analysis.interpolation import interpolate
from torchprobe.analysis.kurtosis import vector_kurtosis
from torchprobe.analysis.similarity import MIN_BATCH, similarity
from torchprobe.common.folders import output_folder
from torchprobe.common.ranks import Ranks
from torchprobe.common.runs import Clock, ProgressCallback, RunOptions
from torchprobe.datasets import DatasetError
from torchprobe.datasets.labeled import class_folders
from torchprobe.datasets.readers import is_elsewhere
from torchprobe.datasets.sampling import sample
from torchprobe.encoders import Encoder, EncoderError, Head
from torchprobe.encoders.suite import SuiteRow
from torchprobe.studies.compare import Comparison, compare
from torchprobe.studies.compare.comparison import Interpolation, LayerSimilarity, PairMeasures, Skipped
from torchprobe.studies.compare.pairs import pair_name, pairs_within
from torchprobe.studies.compare.report import SUITE
from torchprobe.studies.compare.saved import Saved, load_results
from torchprobe.studies.dissect import file_names
from torchprobe.studies.interpret.image_sets import load_images
from torchprobe.studies.interpret.inputs import Inputs, Subject, kept_head
from torchprobe.studies.interpret.results import Stages, output_of
from torchprobe.studies.interpret.run import interpret_subject
from torchprobe.studies.shared_start import no_start_by_facts, no_start_by_weights

__all__ = ["ALPHAS", "Inputs", "run_pair", "run_suite"]


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
    overwrite: bool = False,
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
            :func:`run_pair`. Under ``torchrun`` this is left out.
        batch_size, device, workers, seed: of every run, see :func:`torchprobe.studies.interpret.interpret`.
        resume: encoders that are complete are not run again, and interrupted ones are continued.
        overwrite: replace the results of another run in ``out``; its files are removed, and no others.
        progress: see :func:`torchprobe.studies.interpret.interpret`.
        say: called with the name of the next encoder, and with the reason if one is skipped.

    Raises:
        EncoderError: fewer than two encoders are available; with the number of skipped ones.
        DatasetError: the images cannot be used.
    """
    options = RunOptions(batch_size, device, workers, seed, resume, progress, overwrite=overwrite)
    folder = Path(out)
    load_images(inputs.images)  # before any encoder is fetched
    for shift in inputs.shifts.values():
        if not is_elsewhere(shift):
            class_folders(Path(shift))
    names = file_names([row.name for row in rows])
    folders = {row.name: folder / names[row.name] for row in rows}
    done: list[SuiteRow] = []
    skipped: list[Skipped] = []
    with (
        Ranks() as ranks,
        output_folder(folder, SUITE, of=folder.name, resume=resume, overwrite=overwrite, ranks=ranks),
        _offline_after_failure() as note,
    ):
        for row in rows:
            why = row.missing()
            if why is None:
                say(row.name)
                with output_of(folders[row.name], row.name, options, ranks):
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
            found[pair_name(a, b)] = run_pair((by_name[a.name], a), (by_name[b.name], b), inputs, out, options)
    return found


# -- pairs ---------------------------------------------------------------------------------------------------------------


ALPHAS = tuple(step / 10 for step in range(11))
"""Steps of the interpolation, as in WiSE-FT."""

PAIR_IMAGES = 512
"""Images on which layers are compared and batch norms recalibrated (we chose the number)."""


def run_pair(
    one: tuple[SuiteRow, Saved], other: tuple[SuiteRow, Saved], inputs: Inputs, out: str | os.PathLike[str], options: RunOptions
) -> PairMeasures:
    """CKA of all layers of two networks, and measures along the interpolation of their weights.

    Each encoder comes with its saved interpretation, which holds the facts that the measures depend on. Measures of the same facts are not
    computed again, and the networks are loaded only if a measure is missing. ``skipped`` has the reason if a measure is impossible: for
    example, weights of different shapes have no interpolation, nor have networks that did not start from the same weights, see
    :mod:`torchprobe.studies.shared_start`.
    """
    name = file_names([f"{one[0].name}--{other[0].name}"]).popitem()[1]
    stages = Stages(Path(out), options.resume)
    facts = {
        "a": one[1].provenance(),
        "b": other[1].provenance(),
        "layers": inputs.layers,
        "batch_size": options.batch_size,
        "seed": options.seed,
    }

    @functools.cache
    def subjects() -> tuple[Subject, Subject]:
        """Both encoders, loaded when they are first needed; their heads are kept from their interpretations."""
        first, second = (inputs.load(row, options, kept_head(saved.folder, True)) for row, saved in (one, other))
        return first, second

    skipped: dict[str, str] = {}
    cka = interpolation = None
    # A ValueError or RuntimeError says what the two do not have in common, or why an encoder is unavailable.
    try:
        cka = stages.run(
            f"{name}-cka", facts, LayerSimilarity, lambda: layer_similarity(*subjects(), options, (one[0].name, other[0].name))
        )
    except (ValueError, RuntimeError) as error:
        skipped["cka"] = str(error)
    try:
        if why := no_start_by_facts(*({key: saved.about(key) for key in ("role", "pretraining")} for _, saved in (one, other))):
            raise ValueError(why)  # before a network is loaded
        interpolation = stages.run(
            f"{name}-interpolation", facts, Interpolation, lambda: along_interpolation(*subjects(), options, stages, f"{name}-along", facts)
        )
    except (ValueError, RuntimeError) as error:
        skipped["interpolation"] = str(error)
    return PairMeasures(skipped, cka, interpolation)


def layer_similarity(one: Subject, other: Subject, options: RunOptions, names: tuple[str, str]) -> LayerSimilarity:
    """CKA of all pairs of layers, in one pass over a sample of the images."""
    size = min(options.batch_size, 64)
    place = options.device or "cpu"
    sources = [
        sample(subject.images, PAIR_IMAGES, options.seed).batches(subject.encoder.preprocess, size, options.workers)
        for subject in (one, other)
    ]

    clock, done = Clock(options.progress, stages=1), 0
    clock.start("CKA of the layers", 0, min(PAIR_IMAGES, len(one.images)))

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal done
        for mine, theirs in zip(*sources, strict=True):
            done += mine.files
            clock.tell(done)
            if mine.names != theirs.names:
                raise ValueError(f"the two could not read the same images of one batch: {sorted(set(mine.names) ^ set(theirs.names))[:3]}")
            if len(mine.names) >= MIN_BATCH:
                yield mine.pixels.to(place), theirs.pixels.to(place)

    layers = one.layers if one.layers is None or isinstance(one.layers, str) else list(one.layers)
    found = similarity(one.encoder, other.encoder, batches(), layers, layers)
    return LayerSimilarity(found.values.tolist(), found.layers_a, found.layers_b, *names, found.images, size)


def along_interpolation(
    one: Subject, other: Subject, options: RunOptions, stages: Stages, name: str, facts: dict[str, Any]
) -> Interpolation:
    """Accuracy on every set and vector kurtosis, from the first network to the second. Each step is kept on disk."""
    if one.head is None or other.head is None:
        raise ValueError("one of the two has no head")
    if one.head.normalize != other.head.normalize:
        raise ValueError("one head sees vectors of length 1, the other does not")
    if why := no_start_by_weights(one.encoder.network, other.encoder.network):
        raise ValueError(why)
    first = _with_head(one.encoder, _scaled(one.head))
    second = _with_head(other.encoder, _scaled(_in_order(other.head, one.head)))
    place = options.device or "cpu"
    few = sample(one.images, PAIR_IMAGES, options.seed).batches(one.encoder.preprocess, options.batch_size, options.workers)
    calibration = [batch.pixels.to(place) for batch in few if batch.names]

    clock, done = Clock(options.progress, stages=1), 0
    clock.start("interpolation", 0, len(ALPHAS) * sum(map(len, one.sets.values())))

    def tell(images: int) -> None:
        clock.tell(done + images)

    def measure(mixed: Encoder) -> dict[str, Any]:
        nonlocal done
        assert mixed.head is not None
        accuracy, kurtosis = {}, math.nan
        for which, images in one.sets.items():
            embeddings = embed(
                mixed,
                images,
                batch_size=options.batch_size,
                device=options.device,
                workers=options.workers,
                progress=lambda images, _: tell(images),
            )
            done += len(images)
            accuracy[which] = evaluate(mixed.head, embeddings).accuracy
            if which == IMAGENET:
                kurtosis = float(vector_kurtosis(embeddings.h).nanmean())
        return {"accuracy": accuracy, "kurtosis": kurtosis}

    steps = [
        stages.run(f"{name}-{alpha:g}", facts | {"alpha": alpha}, dict[str, Any], functools.partial(measure, mixed))
        for alpha, mixed in interpolate(first, second, ALPHAS, recalibrate=calibration)
    ]
    accuracy = {which: [step["accuracy"][which] for step in steps] for which in one.sets}
    return Interpolation(list(ALPHAS), accuracy, [step["kurtosis"] for step in steps])


def _with_head(encoder: Encoder, head: Head) -> Encoder:
    return Encoder(
        encoder.network,
        features=encoder.features,
        preprocess=encoder.preprocess,
        name=encoder.name,
        head=head,
        representation=encoder.representation,
        special_tokens=encoder.special_tokens,
    )


def _in_order(head: Head, other: Head) -> Head:
    """The head with its rows in the order of the other head if both name the same classes; otherwise unchanged."""
    if head.names is None or other.names is None or head.names == other.names or sorted(head.names) != sorted(other.names):
        return head
    rows = [head.names.index(name) for name in other.names]
    bias = None if head.bias is None else head.bias.detach()[rows]
    return Head(head.weight.detach()[rows], bias, normalize=head.normalize, names=other.names)


def _scaled(head: Head) -> Head:
    """The head with a bias, and scaled to a weight of length 1 in all. No decision changes.

    We chose this scale. A zero-shot head has rows of length 1 and a trained head rows of any length, and large logits must not outweigh
    small ones.
    """
    size = torch.linalg.matrix_norm(head.weight.detach())
    bias = torch.zeros_like(head.weight[:, 0]) if head.bias is None else head.bias
    return Head(head.weight.detach() / size, bias.detach() / size, normalize=head.normalize, names=head.names)
