"""Results of interpretations: what a comparison reads, the stages of a resumed run, and provenance."""

from __future__ import annotations

import json
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

from fuzz.target import Target, resealed
from torchprobe.analysis.provenance.results import ChangeRow, ParameterRow, PartRow, Provenance, StemRow
from torchprobe.common.checked import write_checked
from torchprobe.common.facts import file_digests
from torchprobe.common.records import decode, encode
from torchprobe.studies.compare import compare, load_results
from torchprobe.studies.interpret.accuracy import Robustness
from torchprobe.studies.interpret.concepts import Concepts
from torchprobe.studies.interpret.directions import HeadDirections, Pruning
from torchprobe.studies.interpret.representation import Ablation, Kurtosis, Layers, Outliers
from torchprobe.studies.interpret.results import READ_BACK, TABLE_DIGESTS, Stages

_ARCHIVE = Path(__file__).parents[2] / "tests" / "data" / "interpretation.zip"
_FACTS = {"images": "abc", "seed": 0}
_KINDS: dict[str, Any] = {
    "kurtosis": Kurtosis,
    "outliers": Outliers,
    "layers": Layers,
    "directions": HeadDirections,
    "ablation": Ablation,
    "pruning": Pruning,
    "concepts": Concepts,
    "robustness": Robustness,
    "accuracy": dict[str, Any],
}
"""Stage → what it holds."""


def _make(folder: Path) -> None:
    """As an earlier version wrote it, without checksums."""
    with zipfile.ZipFile(_ARCHIVE) as archive:
        for name in archive.namelist():
            part = Path(name).parts
            if len(part) == 2 and part[0] in ("first", "second") and part[1] in ("results.json", "kurtosis.csv"):
                (folder / part[0]).mkdir(exist_ok=True)
                (folder / name).write_bytes(archive.read(name))
    (folder / "first" / "correct.csv").write_text("images,image,right\nimagenet_v2,a.png,True\nimagenet_v2,b.png,False\n")


def _read(folder: Path) -> Any:
    found = load_results(folder / "first")
    return encode(found.results), found.kurtosis, found.correct, found.correct_under_shift, found.summary()


def _compare(folder: Path) -> Any:
    return compare([folder / "first", folder / "second"]).summary()


def _make_sealed(folder: Path) -> None:
    """With checksums, also of the tables."""
    _make(folder)
    for name in ("first", "second"):
        tables = [path for table in READ_BACK if (path := folder / name / f"{table}.csv").is_file()]
        digests = dict(zip([path.name for path in tables], file_digests(tables), strict=True))
        path = folder / name / "results.json"
        write_checked(path, {**json.loads(path.read_bytes()), TABLE_DIGESTS: digests})


def _found() -> dict[str, Any]:
    """The results of the stages, plain."""
    with zipfile.ZipFile(_ARCHIVE) as archive:
        return {name: json.loads(archive.read(f"first/stages/{name}.json"))["found"] for name in _KINDS}


_PLAIN = _found()


def _stages(folder: Path) -> Any:
    """A damaged stage is computed again."""
    stages = Stages(folder, resume=True)
    return {
        name: encode(stages.run(name, _FACTS, kind, lambda name=name: decode(_KINDS[name], _PLAIN[name]))) for name, kind in _KINDS.items()
    }


def _make_stages(folder: Path) -> None:
    _stages(folder)


def _make_provenance(folder: Path) -> None:
    def rows(kind: type[Any]) -> list[Any]:
        values = {"int": 3, "float": 0.5, "str": "median"}
        return [kind(**{field.name: values[str(field.type)] for field in fields(kind)}) for _ in range(2)]

    tables = {"parts": rows(PartRow), "parameters": rows(ParameterRow), "stem": rows(StemRow), "changes": rows(ChangeRow)}
    found = Provenance(format=1, name="tiny", features=[3], images=5, sizes=[2.0], error=0.0, remarks=["none"], **tables)
    found.save(folder / "provenance.json")


def _provenance(folder: Path) -> Any:
    found = Provenance.load(folder / "provenance.json")
    return encode(found), found.summary(), found.rows()


_FILES = {"first/results.json": "json", "first/kurtosis.csv": "csv", "first/correct.csv": "csv"}

_STAGES = {f"stages/{name}.json": "json" for name in _KINDS}

RESULTS = Target("results", _FILES, _make_sealed, _read, (ValueError, FileNotFoundError), guarded=tuple(_FILES))
STAGES = Target("stages", _STAGES, _make_stages, _stages, (), guarded=tuple(_STAGES), restore=True, weight=0.3)

PROVENANCE = Target(
    "provenance",
    {"provenance.json": "json"},
    _make_provenance,
    _provenance,
    (ValueError,),
    guarded=("provenance.json",),
)

TARGETS = [
    RESULTS,
    resealed(RESULTS),
    Target("results-earlier", _FILES, _make, _read, (ValueError, FileNotFoundError)),
    Target("comparisons", _FILES, _make, _compare, (ValueError, FileNotFoundError), weight=0.1),
    STAGES,
    resealed(STAGES),
    PROVENANCE,
    resealed(PROVENANCE),
]
