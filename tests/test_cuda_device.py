"""What the operator owes to a device, on one: the current stream, the right device, graphs, two launches and no waiting.

tests/test_ops.py holds its numbers against the oracle on the same device.
"""

from __future__ import annotations

import threading

import pytest
import torch
from oracle import assert_close
from torch import Tensor

from torchprobe import Moments
from torchprobe.ops import new_state, observe_

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def moments(state: Tensor) -> Moments:
    """The numbers of a state, on the CPU."""
    m = Moments((state.numel() - new_state(1).numel()) // (new_state(2).numel() - new_state(1).numel()) + 1)
    m.state.copy_(state)
    return m


def test_at_most_two_launches_and_nothing_else() -> None:
    from torch.profiler import ProfilerActivity, profile

    for x, dim in ((torch.randn(5000, 768), -1), (torch.randn(1, 768), -1), (torch.randn(300, 9000), -1), (torch.randn(4, 64, 28, 28), 1)):
        x, state = x.to(DEVICE), new_state(x.shape[dim], DEVICE)
        observe_(state, x, dim)  # loads the kernels
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as prof:  # without it torch 2.11 warns
            observe_(state, x, dim)
            torch.cuda.synchronize()
        work = [event.name for event in prof.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        assert 1 <= len(work) <= 2, work
        assert all("torchprobe" in name for name in work), work


def test_the_host_never_waits() -> None:
    x, state = torch.randn(5000, 96, device=DEVICE), new_state(96, DEVICE)
    mask = torch.rand(5000, device=DEVICE) < 0.5
    observe_(state, x, mask=mask)  # loads the kernels, which waits for the device
    state.zero_()
    torch.cuda._sleep(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1 << 30)  # about half a second
        start, end = torch.cuda.Event(), torch.cuda.Event()
        start.record()
        observe_(state, x, mask=mask)
        end.record()
        assert not start.query()  # the call came back while the device was still asleep
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert_close(moments(state), x.cpu(), -1, mask.cpu())


def test_work_is_in_the_order_of_the_current_stream() -> None:
    values = torch.randn(4000, 80, device=DEVICE)
    x, state = torch.full_like(values, float("nan")), new_state(80, DEVICE)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(1 << 27)
        x.copy_(values)
        observe_(state, x)
        x.fill_(float("nan"))
    side.synchronize()
    assert_close(moments(state), values.cpu())


def test_streams_do_not_share_a_workspace() -> None:
    x = torch.randn(8, 3000, 200, device=DEVICE)
    states, streams = [new_state(200, DEVICE) for _ in x], [torch.cuda.Stream() for _ in x]
    torch.cuda.synchronize()
    for _ in range(20):
        for part, state, stream in zip(x, states, streams, strict=True):
            with torch.cuda.stream(stream):
                observe_(state, part)
    torch.cuda.synchronize()
    for part, state in zip(x, states, strict=True):
        expected = new_state(200, DEVICE)
        for _ in range(20):
            observe_(expected, part)
        assert torch.equal(state, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensor_is_the_one_that_works() -> None:
    x = torch.randn(3000, 64, device="cuda:1")
    state = new_state(64, "cuda:1")
    with torch.cuda.device(0):
        observe_(state, x)
        assert torch.cuda.current_device() == 0
        assert torch.ones(2, device=DEVICE).device.index == 0
    assert_close(moments(state), x.cpu())


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize(("shape", "dim"), [((900, 136), -1), ((1, 136), -1), ((20, 9000), -1), ((3, 136, 14, 14), 1)])
def test_captured_and_replayed(shape: tuple[int, ...], dim: int, every: int) -> None:
    x, state = torch.zeros(shape, device=DEVICE), new_state(shape[dim], DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # the kernel of this shape may never have run before
        observe_(state, x, dim, every=every)
    assert not state.any()
    parts = torch.randn(4, *shape)
    for part in parts:
        x.copy_(part)
        graph.replay()
    torch.empty(1 << 26, device=DEVICE).fill_(float("nan"))  # the workspace is the graph's own
    graph.replay()
    seen = [*parts, parts[-1]][::every]
    m = moments(state)
    assert m.calls == 5
    whole = torch.cat(seen)
    assert_close(m, whole, dim)


def test_the_same_bits_every_time() -> None:
    for x, dim in ((torch.randn(9000, 768), -1), (torch.randn(50, 9000), -1), (torch.randn(16, 96, 28, 28), 1)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            y = (10 * x).to(DEVICE, dtype)
            states = [new_state(y.shape[dim], DEVICE) for _ in range(5)]
            for state in states:
                observe_(state, y, dim)
            assert all(torch.equal(states[0], state) for state in states[1:])


def test_four_threads_on_one_state_lose_nothing() -> None:
    state, x = new_state(48, DEVICE), torch.randn(400, 48, device=DEVICE).repeat(20, 1)

    def work() -> None:
        for _ in range(60):
            observe_(state, x, every=3)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    m = moments(state)
    assert (m.calls, m.vectors) == (240, 80 * 8000)


def test_memory_is_a_small_part_of_x() -> None:
    x, state = torch.randn(1, 1000, 256, device=DEVICE).expand(2000, -1, -1), new_state(256, DEVICE)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    observe_(state, x)  # 2 GB, if it were copied
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 64 << 20


def test_offsets_beyond_32_bits() -> None:
    far, values = (1 << 30) + 64, torch.randn(5, 48).bfloat16()
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of device memory")
    memory = torch.empty(5 * far, dtype=torch.bfloat16, device=DEVICE)
    for step in (1, 2):
        x = memory.as_strided((5, 48), (far, step))
        x.copy_(values)
        for dim in (-1, 0):
            state = new_state(x.shape[dim], DEVICE)
            observe_(state, x, dim)
            assert_close(moments(state), values, dim)
