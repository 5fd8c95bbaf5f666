"""``python -m fuzz NAME|all [--cases N] [--seed S] [--minutes M]`` · ``python -m fuzz NAME --seed S --case I`` repeats one case."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from fuzz.run import Case, Fault, Job, Tally, run
from fuzz.target import targets

FAULTS = Path("fuzz/faults")


def main() -> int:
    known = targets()
    parser = argparse.ArgumentParser("python -m fuzz", description="Changed files for every reader. Faults are kept in fuzz/faults/.")
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, or some of: {', '.join(known)}")
    parser.add_argument("--cases", type=int, default=1000, help="cases for each target (1000); slow readers get fewer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="at most so many minutes for each target")
    parser.add_argument("--case", type=int, help="repeat this one case in this process, with its traceback")
    arguments = parser.parse_args()
    names = list(known) if arguments.names == ["all"] else arguments.names
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no target {unknown[0]!r}; there are {', '.join(known)}")
    if arguments.case is not None:
        return _repeat(names[0], arguments.seed, arguments.case)
    total, began = Tally(), time.monotonic()
    print(f"{'target':<22}{'cases':>9}{'refused':>9}{'equal':>9}{'changed':>9}{'faults':>8}{'kinds':>7}{'ms/case':>9}", flush=True)
    for name in names:
        cases = max(1, round(arguments.cases * known[name].weight))
        tally = run([Job(name, arguments.seed, 0, cases, arguments.minutes)])[name]
        for fault in tally.faults:
            _keep(fault)
        total.cases += tally.cases
        total.counts += tally.counts
        each = 1000 * tally.seconds / max(1, tally.cases)
        numbers = (tally.cases, tally.refused, tally.equal, tally.different, sum(tally.counts.values()))
        print(f"{name:<22}" + "".join(f"{n:>9,}" for n in numbers[:4]) + f"{numbers[4]:>8,}{len(tally.counts):>7}{each:>9.2f}", flush=True)
        for place, count in tally.counts.most_common():
            print(f"    {count:,} × {place}", flush=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{total.cases:,} cases, {sum(total.counts.values()):,} faults of {len(total.counts)} kinds, in {minutes:.1f} minutes")
    return 1 if total.counts else 0


def _repeat(name: str, seed: int, number: int) -> int:
    with tempfile.TemporaryDirectory(prefix="torchprobe-fuzz-") as folder:
        case, tally = Case(targets()[name], Path(folder, "case")), Tally()
        file, content = case.change(seed, number)
        print(f"{file}: {len(content):,} bytes: {content[:300]!r}")
        case.run(seed, number, tally)
        for fault in tally.faults:
            print(fault.kind, fault.where, fault.what, sep="\n")
        print(f"refused {tally.refused}, equal {tally.equal}, changed {tally.different}, faults {len(tally.faults)}")
    return 1 if tally.faults else 0


def _keep(fault: Fault) -> None:
    FAULTS.mkdir(parents=True, exist_ok=True)
    text = f"python -m fuzz {fault.target} --seed {fault.seed} --case {fault.case}\n{fault.kind}: {fault.where}\n\n{fault.what}\n"
    (FAULTS / f"{fault.target}-{fault.seed}-{fault.case}-{fault.kind}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
