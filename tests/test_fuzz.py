"""A short run of every fuzz target, and the runner itself over readers with planted faults."""

from __future__ import annotations

import ctypes
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchprobe.common.reading import parse_json

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fuzz import run as runner  # noqa: E402
from fuzz.mutation import MUTATORS, mutate  # noqa: E402
from fuzz.run import Job, run  # noqa: E402
from fuzz.target import Target, targets  # noqa: E402

NAMES = sorted(targets())
CASES = 40


@pytest.fixture(scope="module")
def short() -> dict[str, runner.Tally]:
    """All targets in one process, with the cases that a release began with."""
    return run([Job(name, 0, 0, max(5, round(CASES * target.weight))) for name, target in targets().items()])


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_withstands_changed_files(short: dict[str, runner.Tally], name: str) -> None:
    tally = short[name]
    assert tally.cases >= 5 and tally.refused + tally.equal + tally.different > 0
    assert not tally.faults, "\n".join(f"python -m fuzz {name} --case {fault.case}\n{fault.kind} {fault.what}" for fault in tally.faults)


# -- the runner finds what is planted ----------------------------------------------------------------------------------------


def _make(folder: Path) -> None:
    (folder / "a.json").write_text('{"a": 1, "b": [1, 2, 3]}')


def _read(folder: Path) -> Any:
    value = parse_json((folder / "a.json").read_bytes())
    if not isinstance(value, dict) or not isinstance(value.get("a"), int):
        raise ValueError("no a")
    return value["a"]


def _careless(folder: Path) -> Any:
    return json.loads((folder / "a.json").read_bytes())["a"]  # KeyError, TypeError, RecursionError


def _slow(folder: Path) -> Any:
    if (folder / "a.json").read_bytes() != b'{"a": 1, "b": [1, 2, 3]}':
        time.sleep(100)


def _greedy(folder: Path) -> Any:
    if (folder / "a.json").read_bytes() != b'{"a": 1, "b": [1, 2, 3]}':
        len(b"x" * (3 << 29))


def _crashing(folder: Path) -> Any:
    if (folder / "a.json").read_bytes() != b'{"a": 1, "b": [1, 2, 3]}':
        ctypes.string_at(0)


def _hidden(folder: Path) -> Any:
    try:
        return bytearray(1 << 45)
    except MemoryError as error:
        if (folder / "a.json").read_bytes() == b'{"a": 1, "b": [1, 2, 3]}':
            return None
        raise ValueError("too large") from error


SOUND = Target("sound", {"a.json": "json"}, _make, _read, (ValueError,))
PLANTED = {
    "careless": replace(SOUND, name="careless", read=_careless),
    "believed": replace(SOUND, name="believed", guarded=("a.json",)),
    "slow": replace(SOUND, name="slow", read=_slow),
    "greedy": replace(SOUND, name="greedy", read=_greedy),
    "crashing": replace(SOUND, name="crashing", read=_crashing),
    "hidden": replace(SOUND, name="hidden", read=_hidden),
    "sound": SOUND,
}


COUNTS = {"careless": 300, "believed": 300, "hidden": 3, "greedy": 1, "crashing": 2, "sound": 300}
KINDS = {"careless": "exception", "believed": "believed", "hidden": "memory", "greedy": "memory", "crashing": "crash"}


def main(*names: str) -> None:
    """In a process of its own: the processes of the runner cannot import a module of pytest."""
    runner.SLOWEST = 1.0 if "slow" in names else runner.SLOWEST
    tallies = run([Job(name, 1, 0, COUNTS.get(name, 1)) for name in names], PLANTED)
    found = {name: [tally.cases, [[fault.kind, fault.where] for fault in tally.faults]] for name, tally in tallies.items()}
    print(json.dumps(found))


def planted(*names: str) -> dict[str, Any]:
    program = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]; import test_fuzz; test_fuzz.main(*{names})"
    program = f"if __name__ == '__main__':\n    {program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return planted(*COUNTS)


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_planted_faults_are_found(found: dict[str, Any], name: str, kind: str) -> None:
    cases, faults = found[name]
    assert {one for one, _ in faults} == {kind}
    assert cases == (0 if kind == "crash" else COUNTS[name])
    if name == "careless":
        assert {where.partition(" ")[0] for _, where in faults} >= {"KeyError", "RecursionError"}


def test_a_sound_reader_has_no_fault(found: dict[str, Any]) -> None:
    assert found["sound"] == [300, []]


@pytest.mark.slow("waits until the runner gives up")
def test_a_planted_hang_is_found() -> None:
    assert planted("slow") == {"slow": [0, [["hang", "the process"]]]}


# -- mutation ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", MUTATORS)
def test_changes_are_repeatable_and_differ(structure: str, tmp_path: Path) -> None:
    target, name = next((target, name) for target in targets().values() for name in target.files if target.files[name] == structure)
    target.make(tmp_path)
    data = (tmp_path / name).read_bytes()
    changed = [mutate(data, structure, random.Random(i)) for i in range(60)]
    assert changed == [mutate(data, structure, random.Random(i)) for i in range(60)]
    assert len(set(changed)) > 40


def test_an_unknown_target_is_named() -> None:
    done = subprocess.run([sys.executable, "-m", "fuzz", "nothing"], capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 2 and "no target 'nothing'; there are" in done.stderr and "checkpoints" in done.stderr
