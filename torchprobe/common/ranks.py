"""The processes that share a run: all of ``torch.distributed``, or this one alone."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch

from torchprobe.common.messages import reason

T = TypeVar("T")

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """During the block this process works alone: :class:`Ranks` that begin in it are one, whatever ``torch.distributed`` says.

    >>> with alone(), Ranks() as ranks:
    ...     ranks.size
    1
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


class RankLostError(RuntimeError):
    """Another process of the run has ended, so this one cannot go on."""


class Ranks:
    """``rank``, the number ``size`` of ranks, and values that they send each other over the host.

    All ranks must call the same methods in the same order. Each method raises :class:`RankLostError` if another rank has ended.

    >>> with Ranks() as ranks:
    ...     (ranks.rank, ranks.size, ranks.from_first("a"), list(ranks.to_first("b")))
    (0, 1, 'a', [])
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._group: Any = None

    def __enter__(self) -> Ranks:
        dist = torch.distributed
        if not _ALONE.get() and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # shares may take hours
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._group is not None and kind is None:
            torch.distributed.destroy_process_group(self._group)
        self._group = None

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Says what the errors of the backend mean."""
        try:
            yield
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self.rank} of {self.size} lost the others: a rank has ended, and its own message says why. What was saved is kept: "
                f"run the same command again, with --resume where there is one ({reason(error)})"
            ) from error

    @property
    def first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self._group is not None:
            with self._together():
                torch.distributed.barrier(self._group)

    def from_first(self, value: Any) -> Any:
        """The value of the first rank, on every rank."""
        if self._group is None:
            return value
        box = [value]
        with self._together():
            torch.distributed.broadcast_object_list(box, 0, group=self._group)
        return box[0]

    def on_first(self, action: Callable[[], T]) -> T:
        """Calls ``action`` on the first rank only. All ranks return its result, or raise its error."""
        outcome: Any = None
        if self.first:
            try:
                outcome = action()
            except (OSError, RuntimeError, ValueError, KeyboardInterrupt) as error:
                outcome = error
        failed = self.first and isinstance(outcome, BaseException)
        sent = self.from_first(_sendable(outcome) if failed and self.size > 1 else outcome)
        outcome = outcome if failed else sent
        if isinstance(outcome, BaseException):
            raise outcome
        result: T = outcome
        return result

    def to_first(self, value: Any) -> Iterator[Any]:
        """On the first rank, the values of the other ranks, one at a time to save memory; on the other ranks, nothing."""
        if self._group is None:
            return
        for sender in range(1, self.size):
            if self.rank == sender:
                with self._together():
                    torch.distributed.send_object_list([value], 0, group=self._group)
            elif self.rank == 0:
                box: list[Any] = [None]
                with self._together():
                    torch.distributed.recv_object_list(box, sender, group=self._group)
                yield box[0]


def joined() -> bool:
    """False in a process of ``torchrun`` that has not joined the others, so that each would do all of the work.

    >>> joined()
    True
    """
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return not several or distributed.is_initialized()


def _sendable(error: BaseException) -> BaseException:
    """The error, or one with its message if another process could not read it, as some of other libraries."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(reason(error))
    return error


@contextlib.contextmanager
def torchrun() -> Iterator[tuple[int, int | None]]:
    """Joins the processes of ``torchrun`` during the block: (rank, rank on this machine), or (0, None) without ``torchrun``.

    >>> with torchrun() as (rank, local):
    ...     rank
    0
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or torch.distributed.is_initialized():
        yield 0, None
        return
    torch.distributed.init_process_group("gloo")
    try:
        yield torch.distributed.get_rank(), int(os.environ.get("LOCAL_RANK", "0"))
    finally:
        torch.distributed.destroy_process_group()
