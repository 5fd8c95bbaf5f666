"""Runs of every resumable command, killed and hindered at random moments; and checkpoints with changed bytes.

    python -m tests.torture --kills 100
    python -m tests.torture --kills 20 --command dissect --command words --trial kills
    python -m tests.torture --mutations 2000

A run must give, bit for bit, the results of a run that nobody disturbed, or end with an error that a user can read; then a resume must give
them. Prints a table; the exit code is 1 if there was a fault. Folders with a fault are kept, with the log of the run.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])  # of the fork server


def main() -> int:
    from processes import FORKS

    from .checkpoints import mutate
    from .commands import COMMANDS
    from .trials import TRIALS, Subject, attempt

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__, formatter_class=raw)
    parser.add_argument("--kills", type=int, default=0, help="kills of each command; of every other trial a fifth as many")
    parser.add_argument("--mutations", type=int, default=0, help="changed checkpoints of dissections")
    parser.add_argument("--command", action="append", choices=COMMANDS, help="only this command; may be repeated")
    parser.add_argument("--trial", action="append", choices=TRIALS, help="only this trial; may be repeated")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for each command; what took place by then is told")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; default: a new one")
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    options = parser.parse_args()
    if FORKS.get_start_method() == "forkserver":  # so that a run begins at once
        FORKS.set_forkserver_preload(["torch", "tests.torture.processes", "torchprobe.cli", "matplotlib.pyplot", "timm"])
    seed = random.SystemRandom().randrange(1 << 30) if options.seed is None else options.seed
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture-"))
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    warnings.simplefilter("ignore")
    print(f"seed {seed}, in {folder}", flush=True)
    every = list[str]()
    for name in (options.command or COMMANDS) if options.kills else ():
        begun, subject = time.monotonic(), Subject(name, folder / name, random.Random(f"{seed} {name}"))
        for trial in options.trial or TRIALS:
            wanted = options.kills if trial == "kills" else -(-options.kills // 5)
            count, faults = attempt(subject, trial, wanted, begun + 60 * options.minutes)
            if count or faults:
                print(f"{name:24} {trial:14} {count:5} {len(faults):3} faults {time.monotonic() - begun:7.0f} s", flush=True)
            for fault in faults:
                print(f"    {fault}", flush=True)
            every += faults
    if options.mutations:
        told, faults = mutate(folder / "mutations", options.mutations, seed)
        every += faults
        print(f"{'checkpoints':24} {'mutations':14} {options.mutations:5} {len(faults):3} faults   {dict(told)}", flush=True)
        print(*(f"    {fault}" for fault in faults), sep="\n", flush=True)
    if not every and options.folder is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if every else 0


if __name__ == "__main__":
    raise SystemExit(main())
