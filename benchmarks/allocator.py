"""A malloc that keeps its memory, so that eager PyTorch is not charged for page faults.

By default glibc maps every large tensor anew and unmaps it when it is freed; touching the new pages then costs several times the
arithmetic. Who cares about speed tunes that, or uses an allocator that caches, and it is this PyTorch that ``observe_`` is held against.
"""

from __future__ import annotations

import os
import platform
import sys

TUNED = {
    "MALLOC_MMAP_MAX_": "0",  # no tensor gets a mapping of its own
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),  # nothing goes back to the system
    "MALLOC_TOP_PAD_": str(1 << 28),  # the heap grows in large steps
}


def is_tuned() -> bool:
    return all(os.environ.get(name) == value for name, value in TUNED.items())


def restart_tuned() -> None:
    """Starts this process again with the tuned allocator, which reads its settings at the start only; nothing to do without glibc."""
    if platform.libc_ver()[0] == "glibc" and not is_tuned():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **TUNED})
