"""The device that is measured, and its properties."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import torch

import torchprobe
from benchmarks import report
from torchprobe.ops import kernels, new_state, observe_


class CannotMeasure(click.ClickException):
    """There is no device to measure: one line, exit code 2."""

    exit_code = 2


@dataclass(frozen=True)
class Device:
    """Memory and cache in bytes."""

    torch_device: torch.device
    name: str
    capability: str = ""
    multiprocessors: int = 0
    memory: int = 0
    l2: int = 0
    driver: str | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "unknown"

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "torch_device"}


def find(name: str) -> Device:
    """The device called ``name``, made the current one.

    Raises:
        CannotMeasure: there is none, or the CUDA kernels do not run on it.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise CannotMeasure(f"{name!r} is not a device: {str(error).partition(chr(10))[0]}") from error
    if device.type == "cpu":
        return Device(device, report.machine()["processor"])
    if device.type != "cuda" or not torch.cuda.is_available():
        raise CannotMeasure(f"no CUDA device {name!r}: torch {torch.__version__} sees none")
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise CannotMeasure(f"no {device}: there are {torch.cuda.device_count()} CUDA devices")
    torch.cuda.set_device(device)
    try:
        observe_(new_state(64, device), torch.randn(2, 64, device=device))  # a kernel that cannot run fails at its first call
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        raise CannotMeasure(f"nothing runs on {device}: {str(error).partition(chr(10))[0]}") from error
    status = kernels()["cuda"]
    if not status.startswith("loaded") or f"{device}: " in status.partition("not used on")[2]:
        raise CannotMeasure(f"the CUDA kernels do not run here, and measuring the reference would be misleading: {status}")
    about = torch.cuda.get_device_properties(device)
    capability, driver = f"{about.major}.{about.minor}", ask(device, "driver_version")
    return Device(device, about.name, capability, about.multi_processor_count, about.total_memory, about.L2_cache_size, driver)


def ask(device: torch.device, field: str) -> str | None:
    """What nvidia-smi reports for ``device``; None if unknown."""
    try:
        done = subprocess.run(_question(device, field), capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def clock_under(work: Callable[[], object], device: torch.device) -> float | None:
    """The clock of the multiprocessors in Hz while ``work`` is repeated; None if nvidia-smi does not report it."""
    try:
        asking = subprocess.Popen(_question(device, "clocks.sm"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    while asking.poll() is None:
        work()
        torch.cuda.synchronize(device)
    try:
        return 1e6 * float(asking.communicate()[0])
    except ValueError:  # "[N/A]"
        return None


def versions() -> dict[str, str | None]:
    """The versions of everything that the figures depend on; the kernels without their path."""
    status = re.split(r", (?=/)", kernels()["cuda"])[0]
    return {"torchprobe": torchprobe.__version__, "torch": torch.__version__, "cuda": torch.version.cuda, "kernels": status}


def _question(device: torch.device, field: str) -> list[str]:
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # the device numbers of nvidia-smi ignore CUDA_VISIBLE_DEVICES
    return ["nvidia-smi", f"--id=GPU-{uuid.removeprefix('GPU-')}", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
