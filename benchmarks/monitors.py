"""Contestants that watch the activations of a training step: torchprobe, plain PyTorch, and the monitors of other packages.

Each gets the blocks with their names, and places its hooks on them. Work that a package does outside its hooks, such as logging, is left
out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

import torchprobe
from benchmarks import formulas

Blocks = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Monitor:
    """``attach(model, blocks)`` is a context in which every forward pass is watched."""

    computes: str
    attach: Callable[[nn.Module, Blocks], AbstractContextManager[object]]
    module: str = ""  # must be importable
    maps_only: bool = False


@contextlib.contextmanager
def nothing(model: nn.Module, blocks: Blocks) -> Iterator[None]:
    yield


def recorded(model: nn.Module, blocks: Blocks, every: int) -> AbstractContextManager[object]:
    return torchprobe.record(model, list(blocks), every=every)


@contextlib.contextmanager
def hooked(hook_of: Callable[[str], Callable[..., object]], blocks: Blocks) -> Iterator[None]:
    """Calls ``hook_of(name)`` with every block's module, arguments and output."""
    handles = [block.register_forward_hook(_without_result(hook_of(name))) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _without_result(hook: Callable[..., object]) -> Callable[..., None]:
    """A forward hook that returns a value replaces the output, so this one returns None."""

    def call(module: nn.Module, args: object, output: object) -> None:
        hook(module, args, output)

    return call


def eager(model: nn.Module, blocks: Blocks) -> AbstractContextManager[object]:
    """The same formulas on the output as vectors. It does not merge the batches, which is in its favor."""
    last: dict[str, dict[str, Tensor]] = {}

    def hook_of(name: str) -> Callable[..., object]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            x = output.detach()
            x = x.movedim(1, -1) if x.dim() == 4 else x
            last[name] = formulas.eager(x.reshape(-1, x.shape[-1]))

        return hook

    return hooked(hook_of, blocks)


def timm(model: nn.Module, blocks: Blocks) -> AbstractContextManager[object]:
    """ActivationStatsHook. It cannot remove its hooks, so the model must not be used for anything else afterwards."""
    utils = importlib.import_module("timm.utils.model")
    utils.ActivationStatsHook(model, list(blocks) * 2, [utils.avg_sq_ch_mean] * len(blocks) + [utils.avg_ch_var] * len(blocks))
    return contextlib.nullcontext()


@contextlib.contextmanager
def fastai(model: nn.Module, blocks: Blocks) -> Iterator[None]:
    """ActivationStats with its histogram, registered as its own callback does it: a copy of each output goes to the CPU."""
    hook = importlib.import_module("fastai.callback.hook")
    stats = hook.ActivationStats(with_hist=True)
    with hook.Hooks(list(blocks.values()), stats.hook, stats.is_forward, stats.detach, stats.cpu):
        yield


def composer(model: nn.Module, blocks: Blocks) -> AbstractContextManager[object]:
    """ActivationMonitor: four statistics of every row of the batch, each read from the device."""
    monitor = importlib.import_module("composer.callbacks.activation_monitor").ActivationMonitor(only_log_wandb=False)
    monitor.module_names = {block: name for name, block in blocks.items()}

    class Logger:
        def log_metrics(self, metrics: object) -> None: ...

    return hooked(lambda name: functools.partial(monitor.forward_hook, Logger(), None), blocks)


def torch_ao(model: nn.Module, blocks: Blocks) -> AbstractContextManager[object]:
    """HistogramObserver, from quantization, one for each block."""
    observer = importlib.import_module("torch.ao.quantization").HistogramObserver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its successor
        device = next(model.parameters()).device
        observers: dict[str, Any] = {name: observer().to(device) for name in blocks}
    return hooked(lambda name: lambda module, args, output: observers[name](output), blocks)


MONITORS = {
    "plain": Monitor("", nothing),
    "torchprobe, every step": Monitor("moments, vector κ, outliers, …", functools.partial(recorded, every=1)),
    "torchprobe, every=10": Monitor("the same, of one step in ten", functools.partial(recorded, every=10)),
    "hooks in plain PyTorch": Monitor(formulas.ALL, eager),
    "timm ActivationStatsHook": Monitor("mean² and variance of channels", timm, "timm.utils.model", maps_only=True),
    "torch.ao HistogramObserver": Monitor("one histogram", torch_ao, "torch.ao.quantization"),
    "fastai ActivationStats": Monitor("mean, std, near zero, histogram", fastai, "fastai.callback.hook"),
    "composer ActivationMonitor": Monitor("norm, mean, max, κ of the last axis", composer, "composer.callbacks.activation_monitor"),
}


def available(maps: bool) -> tuple[dict[str, Monitor], dict[str, str]]:
    """The contestants that can take part, and why the others cannot. ``maps``: the outputs are (N, C, H, W)."""
    present, skipped = {}, {}
    for name, monitor in MONITORS.items():
        why = "takes maps (N, C, H, W) only" if monitor.maps_only and not maps else missing(monitor.module)
        if why:
            skipped[name] = why
        else:
            present[name] = monitor
    return present, skipped


def missing(module: str) -> str:
    """Imports a module. Returns why this failed, or ``""``."""
    if not module:
        return ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module)
    except Exception as error:  # a package that does not fit this PyTorch or Python may raise anything
        return f"{module} cannot be imported: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}"
    return ""
