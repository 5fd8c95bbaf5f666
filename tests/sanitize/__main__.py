"""``make sanitize``: the kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer, over the corpus."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from sanitize import build, corpus
from torchprobe.ops import kernels

QUIET = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=0:allocator_may_return_null=1:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
FIBRES = ("ASan is ignoring requested __asan_handle_no_return", "False positive error reports may follow", "google/sanitizers/issues/189")
"""What AddressSanitizer says of the threads of CUDA on the host, which are fibres; their stacks are not instrumented."""
SETS = ("avx512", "avx2", "baseline")
"""Of instructions; a processor without one uses the next smaller one."""


def run(driver: Path, made: Sequence[corpus.Call], instructions: str = "", threads: int = 3, timeout: float = 3600) -> list[corpus.Left]:
    """What the calls leave.

    Raises:
        RuntimeError: a sanitizer reported something, or a result depended on the number of threads; with the report.
    """
    with tempfile.TemporaryDirectory() as folder:
        calls, results = Path(folder) / "calls", Path(folder) / "results"
        calls.write_bytes(corpus.written(made))
        environment = {**os.environ, **QUIET}
        if instructions:
            environment["TORCHPROBE_ISA"] = instructions
        command = [str(driver), str(calls), str(results), str(threads)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
        said = [line for line in done.stderr.splitlines() if line.strip() and not any(notice in line for notice in FIBRES)]
        if done.returncode or said:
            raise RuntimeError(f"exit code {done.returncode}\n{done.stderr[:6000]}")
        return list(corpus.read(results.read_bytes(), made))


def compare(made: Sequence[corpus.Call], left: Sequence[corpus.Left]) -> int:
    """Holds the results against those of the installed kernels; the number of calls that both refused.

    Raises:
        RuntimeError: a result differs, or only one refused; with the number of the call.
    """
    refused = 0
    for number, (call, mine) in enumerate(zip(made, left, strict=True)):
        theirs = corpus.by_the_library(call)
        if bool(mine.refused) != bool(theirs.refused):
            raise RuntimeError(f"call {number}, {call}: refused by one of the two only: {mine.refused!r} and {theirs.refused!r}")
        if not mine.refused and mine != theirs:
            raise RuntimeError(f"call {number}, {call}: the installed kernels leave other bytes")
        refused += bool(mine.refused)
    return refused


PLANTED = {
    "address": {"beyond": (torch.zeros(3),), "overflow": (2**62 + 2**61,)},
    "thread": {"race": (torch.zeros(1, dtype=torch.float64),)},
}
REPORTS = {"beyond": "heap-buffer-overflow", "overflow": "signed integer overflow", "race": "data race"}


def check_alert(driver: Path, kind: str) -> None:
    """Holds that the sanitizers report the faults that the driver has on purpose.

    Raises:
        RuntimeError: one was not reported.
    """
    for name, arguments in PLANTED[kind].items():
        try:
            run(driver, [corpus.Call(f"planted::{name}", arguments)])
        except RuntimeError as report:
            if REPORTS[name] in str(report):
                continue
            raise
        raise RuntimeError(f"the sanitizers of {kind} did not report what was planted: {REPORTS[name]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make sanitize", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="calls of each operator, and as many with damaged arguments (%(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=build.SANITIZERS, default=list(build.SANITIZERS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS), help="of instructions")
    options = parser.parse_args()
    if build.compiler() is None:
        sys.exit("make sanitize needs a C++ compiler with the sanitizers of GCC or Clang")
    if not (status := kernels()["cpu"]).startswith("loaded"):
        sys.exit(f"make sanitize compares with the installed kernels: {status}")
    made = corpus.calls(options.cases)
    print(f"{len(made)} calls; installed kernels {status.partition(',')[0]}", flush=True)
    for kind in options.kinds:
        begin = time.perf_counter()
        driver = build.build(kind)
        check_alert(driver, kind)
        print(f"{kind}: built in {time.perf_counter() - begin:.0f} s", flush=True)
        for instructions in options.sets:
            begin = time.perf_counter()
            left = run(driver, made, instructions)
            same = f": {instructions}," in status.lower().replace("-", "")  # other sets add in another order
            refused = compare(made, left) if same else sum(bool(one.refused) for one in left)
            print(
                f"  {instructions}: quiet, {refused} refused{', results as installed' * same}, {time.perf_counter() - begin:.0f} s",
                flush=True,
            )
        if kind == "address":
            begin, host = time.perf_counter(), corpus.on_cuda(made)
            run(driver, host)
            print(f"  CUDA on the host: quiet, {len(host)} calls, {time.perf_counter() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
