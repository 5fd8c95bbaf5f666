"""The calls that the driver runs, and what the library itself makes of them."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from properties.activations import activations
from properties.arguments import CATEGORIES, arguments_of, overlaps, rankings
from torch import Tensor

from torchprobe.ops import new_state
from torchprobe.ops.exponents import shapes
from torchprobe.ops.quantile import BLOCK, new_buffers

TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
"""In the order of ``ScalarType`` in the stand-in."""
ALL = list(HealthCheck)
WRONG = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 7, 2**20 + 1, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1)


@dataclass(frozen=True, repr=False)
class Call:
    """One call of an operator, with its arguments as they are before it."""

    name: str
    arguments: tuple[Any, ...]

    def __repr__(self) -> str:
        said = (f"{str(a.dtype)[6:]} {tuple(a.shape)}" if isinstance(a, Tensor) else repr(a) for a in self.arguments)
        return f"{self.name}({', '.join(said)})"


@dataclass(frozen=True)
class Left:
    """What a call leaves: whether it was refused, the bytes of every storage, and those of the tensor that it returned."""

    refused: str
    storages: tuple[bytes, ...]
    returned: bytes | None


def drawn(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """``count`` examples, always the same ones."""
    found: list[Any] = []

    @settings(max_examples=count, database=None, derandomize=True, deadline=None, phases=[Phase.generate], suppress_health_check=ALL)
    @given(strategy)
    def collect(example: Any) -> None:
        found.append(example)

    collect()
    return found


def calls(count: int) -> list[Call]:
    """``count`` calls of every operator, and as many with damaged arguments."""
    made: list[Call] = []
    for number, a in enumerate(drawn(activations(), count)):
        rng = random.Random(number)
        state, every = new_state(a.features), rng.choice((1, 1, 2))
        made.append(Call("observe_", (state, a.x, a.feature_dim, rng.choice((6.0, 1.0)), every, a.mask)))
        capacity = rng.choice((1, 5, 16, 40))
        buffers = new_buffers(a.features, capacity + BLOCK + rng.choice((0, 3)))
        made.append(Call("keep_largest_", (*buffers, a.x, a.feature_dim, capacity)))
        state = tuple(torch.zeros(size, dtype=torch.float64) for size in shapes(a.features).values())
        made.append(Call("exponents_", (*state, a.x, a.feature_dim, a.mask)))
    for a in drawn(overlaps(), count):
        units, labels = a["maps"].shape[1], len(a["category"])
        counts = [torch.zeros(shape, dtype=torch.int64) for shape in ((units, labels), (units, CATEGORIES + 1), (labels,))]
        made.append(Call("overlap_tally_", (*counts, *arguments_of(a))))
    for r in drawn(rankings(), count):
        scores = r.scores.float() if r.scores.dtype in (torch.float16, torch.bfloat16) else r.scores
        made.append(Call("average_precision", (scores, r.crow, r.col, r.shows.shape[1], r.eligible, r.group, r.both)))
    return made + [damaged(call, random.Random(number)) for number, call in enumerate(made)]


def on_cuda(made: Sequence[Call]) -> list[Call]:
    """The calls of ``observe_`` for the CUDA kernels on the host: some multiprocessors, some shared memory, some order of threads."""
    found = [call for call in made if call.name == "observe_" and call.arguments[1].numel() <= 20_000]
    sizes = ((3, 227 << 10), (1, 60 << 10), (7, 99 << 10))
    return [Call("shim::observe_", (*call.arguments, *sizes[number % 3], number % 4)) for number, call in enumerate(found)]


def damaged(call: Call, rng: random.Random) -> Call:
    """The same call with one argument that may not fit: a number out of range, another shape or type, elements that lie, a short storage,
    the memory of another argument."""
    arguments = list(copies(call.arguments))
    where = rng.randrange(len(arguments))
    old = arguments[where]
    tensors = [i for i, argument in enumerate(arguments) if isinstance(argument, Tensor)]
    if isinstance(old, bool) or old is None or isinstance(old, str):
        where = rng.choice(tensors)
        old = arguments[where]
    if isinstance(old, int):
        arguments[where] = rng.choice(WRONG)
    elif isinstance(old, float):
        arguments[where] = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e-300))
    else:
        arguments[where] = _damaged(old, [arguments[i] for i in tensors], rng)
    return Call(call.name, tuple(arguments))


def _damaged(tensor: Tensor, others: Sequence[Tensor], rng: random.Random) -> Tensor:
    ways: list[Callable[[], Tensor]] = [
        lambda: tensor[..., :-1] if tensor.dim() else tensor,
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.new_empty(0),
        lambda: tensor.to(rng.choice(TYPES)),
        lambda: tensor.t() if tensor.dim() == 2 else tensor.flip(0) if tensor.dim() else tensor,
        lambda: _short(tensor),
        lambda: _within(tensor, rng.choice(others)),
    ]
    if tensor.numel() and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        ways += [lambda: _lying(tensor, rng)] * 6
    return rng.choice(ways)()


def _lying(tensor: Tensor, rng: random.Random) -> Tensor:
    limits = torch.iinfo(tensor.dtype)
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    for _ in range(rng.choice((1, 1, 3))):
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([value for value in WRONG if limits.min <= value <= limits.max])
    return tensor


def _short(tensor: Tensor) -> Tensor:
    """Its storage was shortened, as ``resize_`` of a storage does."""
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() // 2)
    return tensor


def _within(tensor: Tensor, other: Tensor) -> Tensor:
    """In the memory of another argument, if there is room."""
    storage = other.untyped_storage()
    if storage.nbytes() // tensor.element_size() < tensor.numel() or storage.data_ptr() % tensor.element_size():
        return tensor
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape)


def copies(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments in memory of their own; those that share memory share it again."""
    old = _storages(arguments)
    new = {key: storage.clone() for key, storage in old.items()}

    def copy(argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        storage = new[argument.untyped_storage()._cdata]
        return torch.empty(0, dtype=argument.dtype).set_(storage, argument.storage_offset(), argument.shape, argument.stride())

    result = tuple(map(copy, arguments))
    for key, storage in new.items():
        storage.resize_(old[key].nbytes())  # set_ has made room for tensors that are larger than their storage
    return result


def written(made: Sequence[Call]) -> bytes:
    """The calls as the driver reads them."""
    return struct.pack("<I", len(made)) + b"".join(map(_call, made))


def _call(call: Call) -> bytes:
    name = call.name if "::" in call.name else f"torchprobe::{call.name}"
    storages, parts = _storages(call.arguments), list[bytes]()
    for argument in call.arguments:
        if argument is None:
            parts.append(b"n")
        elif isinstance(argument, bool):
            parts.append(b"b" + struct.pack("<q", argument))
        elif isinstance(argument, int):
            parts.append(b"i" + struct.pack("<q", argument))
        elif isinstance(argument, float):
            parts.append(b"d" + struct.pack("<d", argument))
        elif isinstance(argument, str):
            parts.append(b"s" + _text(argument.encode()))
        else:
            view = struct.pack("<B", TYPES.index(argument.dtype)) + _numbers(argument.shape) + _numbers(argument.stride())
            place = list(storages).index(argument.untyped_storage()._cdata)
            parts.append(b"t" + view + struct.pack("<qI", argument.storage_offset(), place))
    memory = [_text(_bytes(storage)) for storage in storages.values()]
    return _text(name.encode()) + _list(memory) + _list(parts)


def _storages(arguments: Sequence[Any]) -> dict[int, torch.UntypedStorage]:
    found = [argument.untyped_storage() for argument in arguments if isinstance(argument, Tensor)]
    return {storage._cdata: storage for storage in found}


def _bytes(storage: torch.UntypedStorage) -> bytes:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()


def _text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def _list(parts: Sequence[bytes]) -> bytes:
    return struct.pack("<I", len(parts)) + b"".join(parts)


def _numbers(values: Sequence[int]) -> bytes:
    return struct.pack(f"<I{len(values)}q", len(values), *values)


def read(data: bytes, made: Sequence[Call]) -> Iterator[Left]:
    """What the driver wrote, call by call."""
    at = 0

    def take() -> bytes:
        nonlocal at
        (size,) = struct.unpack_from("<I", data, at)
        at += 4 + size
        return data[at - size : at]

    for call in made:
        refused = take().decode()
        storages = tuple(take() for _ in _storages(call.arguments))
        returned = take() if call.name == "average_precision" and not refused else None
        yield Left(refused, storages, returned)
    assert at == len(data), "the driver wrote more than it should"


def by_the_library(call: Call) -> Left:
    """What the installed kernels leave."""
    arguments = copies(call.arguments)
    returned, refused = None, ""
    try:
        returned = getattr(torch.ops.torchprobe, call.name)(*arguments)
    except (RuntimeError, ValueError) as error:
        refused = str(error).partition("\n")[0] or "refused"
    storages = tuple(map(_bytes, _storages(arguments).values()))
    return Left(refused, storages, None if returned is None else _bytes(returned.untyped_storage()))
