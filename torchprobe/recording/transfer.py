"""Copies summaries from the device to the host without waiting.

The summaries of windows are gathered on the device in blocks. A full block starts a copy to pinned memory. A later window collects the copy
once it has arrived. Nothing waits, and the device never holds more than one block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from torchprobe.recording.windows import without_grad

BLOCK = 64
"""Windows in a block, if it then takes at most :data:`BYTES`. We chose both numbers."""

BYTES = 1 << 22

Array = npt.NDArray[np.float64]
Part = tuple[list[str], Tensor]  # layers, and their numbers on one device: (layers, numbers)
Rows = tuple[list[str], Array]  # layers, and their numbers on the host: (windows, layers, numbers)


class Transfer:
    """Takes windows as parts on their devices, and returns them as rows on the host, in the same order."""

    def __init__(self) -> None:
        self._block: _Block | None = None
        self._copies: deque[_Copy] = deque()

    def put(self, parts: Sequence[Part]) -> None:
        """Adds one window."""
        groups = [(names, numbers.device) for names, numbers in parts]
        if self._block is not None and self._block.groups != groups:  # a layer fired for the first time
            self._send()
        if self._block is None:
            self._block = _Block(groups, [numbers for _, numbers in parts])
        self._block.add([numbers for _, numbers in parts])
        if self._block.filled == self._block.size:
            self._send()

    def arrived(self) -> Iterator[Rows]:
        """The windows that have reached the host."""
        while self._copies and self._copies[0].arrived():
            yield self._copies.popleft().rows()

    def everything(self) -> Iterator[Rows]:
        """All windows that were added; waits for them."""
        self._send()
        while self._copies:
            yield self._copies.popleft().rows()

    def _send(self) -> None:
        if self._block is not None:
            self._copies.append(_Copy(self._block))
            self._block = None


class _Block:
    """Some windows of the same layers, in one tensor (windows, layers, numbers) for each device."""

    def __init__(self, groups: list[tuple[list[str], torch.device]], parts: list[Tensor]) -> None:
        self.groups = groups
        self.filled = 0
        self.size = min(BLOCK, max(1, BYTES // max(1, sum(numbers.nbytes for numbers in parts))))
        self.devices: dict[torch.device, list[int]] = {}  # the indices of the parts on each device
        for index, (_, device) in enumerate(groups):
            self.devices.setdefault(device, []).append(index)
        self.order = [name for chosen in self.devices.values() for index in chosen for name in groups[index][0]]
        self.memory = [_memory(self.size, [parts[index] for index in chosen]) for chosen in self.devices.values()]

    def add(self, parts: list[Tensor]) -> None:
        for memory, chosen in zip(self.memory, self.devices.values(), strict=True):
            _write(memory[self.filled], [parts[index] for index in chosen])
        self.filled += 1


@without_grad
def _memory(windows: int, parts: list[Tensor]) -> Tensor:
    return parts[0].new_empty(windows, sum(part.shape[0] for part in parts), parts[0].shape[1])


@without_grad
def _write(row: Tensor, parts: list[Tensor]) -> None:
    torch.cat(parts, out=row)


class _Copy:
    """A block on its way to the host."""

    def __init__(self, block: _Block) -> None:
        self.order, self.windows = block.order, block.filled
        self.parts = [_start_copy(memory[: block.filled]) for memory in block.memory]

    def arrived(self) -> bool:
        return all(event is None or event.query() for _, event in self.parts)

    def rows(self) -> Rows:
        """The rows; waits for them if necessary."""
        for _, event in self.parts:
            if event is not None:
                event.synchronize()
        if not self.parts:
            return self.order, np.empty((self.windows, 0, 0))
        numbers = [host.to(torch.float64).numpy() for host, _ in self.parts]
        return self.order, np.concatenate(numbers, axis=1)  # a copy, which frees the pinned memory


@without_grad
def _start_copy(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Starts the copy of one tensor; the event says when it is done. On other devices than CUDA the copy waits."""
    if numbers.device.type != "cuda":
        return numbers.to("cpu"), None
    host = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
    host.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(numbers.device))
    return host, event


class Copy:
    """A tensor on its way to the host; the tensor must not change meanwhile."""

    def __init__(self, numbers: Tensor) -> None:
        self._host, self._event = _start_copy(numbers)

    def arrived(self) -> bool:
        return self._event is None or self._event.query()

    def numbers(self) -> Array:
        """What arrived, float64; waits for it if necessary."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.to(torch.float64).numpy()


def to_host(tensors: Sequence[Tensor]) -> list[Array]:
    """The tensors as float64 arrays, with one copy for each device."""
    out: dict[int, Array] = {}
    for device in {tensor.device for tensor in tensors}:
        chosen = [i for i, tensor in enumerate(tensors) if tensor.device == device]
        flat = torch.cat([tensors[i].reshape(-1) for i in chosen]).to("cpu", torch.float64).numpy()
        for i, part in zip(chosen, np.split(flat, np.cumsum([tensors[i].numel() for i in chosen])[:-1]), strict=True):
            out[i] = part.reshape(tuple(tensors[i].shape))
    return [out[i] for i in range(len(tensors))]
