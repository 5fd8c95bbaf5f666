"""Whole states on CUDA, on the host: what the operators of csrc/cuda/states.cpp do, and that they wait for the launches of others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import cuda_shim
import pytest
import torch
from torch import Tensor

from torchprobe.common.threads import lock
from torchprobe.ops import layout, new_state, observe_, states

pytestmark = pytest.mark.skipif(cuda_shim.compiler() is None, reason="no C++ compiler")


def seen(vectors: int, width: int = 5, seed: int = 0) -> Tensor:
    state = new_state(width)
    observe_(state, torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed)))
    return state


@pytest.fixture(scope="module")
def ops() -> Any:
    return cuda_shim.states()


def test_they_do_what_those_of_the_cpu_do(ops: Any) -> None:
    some = [seen(6, seed=1), seen(9, seed=2)]
    assert torch.equal(ops.observe_read(some), states.read(some))
    for calls in (False, True):
        mine, theirs = ([state.clone() for state in some] for _ in range(2))
        out, expected = (torch.full((2, some[0].numel()), 7.0, dtype=torch.float64) for _ in range(2))
        ops.observe_take_(mine, out, calls)
        states.take(theirs, expected, calls)
        assert torch.equal(out, expected) and all(map(torch.equal, mine, theirs))
        assert mine[0][layout.CALLS] == (not calls) and not mine[0][layout.CALLS + 1 :].any()
    one, other = some[0].clone(), some[0].clone()
    ops.observe_merge_(one, some[1])
    states.merge(other, some[1])
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    ops.observe_write_(one, some[1])
    assert torch.equal(one, some[1])


def test_rows_are_merged_as_states_are(ops: Any) -> None:
    several, others = (torch.stack([seen(n, seed=n) for n in sizes]) for sizes in ((4, 7, 1), (3, 1, 9)))
    expected = several.clone()
    for state, other in zip(expected.unbind(0), others.unbind(0), strict=True):
        states.merge(state, other)
    native = several.clone()
    states.merge(native, others)
    assert torch.equal(native, expected)
    ops.observe_merge_(several, others)
    torch.testing.assert_close(several, expected, rtol=1e-12, atol=1e-12)
    for wrong in (others[:2], others[0], others[None], others.T):
        with pytest.raises(RuntimeError):
            ops.observe_merge_(several, wrong)
        with pytest.raises(ValueError, match="state"):
            states.merge(several, wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, s: o.observe_read([]), "states is empty"),
        (lambda o, s: o.observe_read([s, seen(2, width=3)]), "another size"),
        (lambda o, s: o.observe_read([s[:-1]]), "not a state"),
        (lambda o, s: o.observe_take_([s], s.new_zeros(1, 3)), "a row for each"),
        (lambda o, s: o.observe_take_([s], s[None]), "memory"),
        (lambda o, s: o.observe_merge_(s, s), "memory"),
        (lambda o, s: o.observe_merge_(s, seen(2, width=3)), "another size"),
        (lambda o, s: o.observe_write_(s, s.float()), "not a state"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(ops: Any, call: Callable[[Any, Tensor], object], message: str) -> None:
    state = seen(4)
    before = state.clone()
    with pytest.raises(RuntimeError, match=message):
        call(ops, state)
    assert torch.equal(state, before)


@pytest.mark.parametrize("name", ["read", "take", "merge", "write"])
def test_each_waits_for_the_launches_of_a_call(ops: Any, name: str) -> None:
    """While somebody has the turn, nothing ends. Whoever waits does not keep others from Python, or from its lock."""
    state, ended = seen(4), torch.zeros(1, dtype=torch.int64)
    run: dict[str, Callable[[], object]] = {
        "read": lambda: ops.observe_read([state]),
        "take": lambda: ops.observe_take_([state], state.new_zeros(1, state.numel())),
        "merge": lambda: ops.observe_merge_(state, seen(3)),
        "write": lambda: ops.observe_write_(state, seen(3)),
    }

    def work() -> None:
        with lock:
            run[name](), ops.note()

    holder = threading.Thread(target=ops.hold, args=(400, ended), daemon=True)
    holder.start()
    while int(ended) != -1:
        time.sleep(1e-3)
    other = threading.Thread(target=work, daemon=True)
    other.start()
    for thread in (holder, other):
        thread.join(60)
        assert not thread.is_alive(), "threads wait for each other"
    assert int(ended) == 0, "it did not wait"


def test_merges_of_many_threads_end_and_lose_nothing(ops: Any) -> None:
    total, part = new_state(5), seen(10)
    begin = threading.Barrier(4)

    def merge(ordered: bool) -> None:
        begin.wait(60)
        for _ in range(50):
            if ordered:
                with lock:  # as a method of a statistic
                    ops.observe_merge_(total, part)
            else:
                ops.observe_merge_(total, part)

    threads = [threading.Thread(target=merge, args=(i % 2 == 0,), daemon=True) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "threads wait for each other"
    assert total[layout.VECTORS] == 4 * 50 * 10
