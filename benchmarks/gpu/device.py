"""The device that is measured, and its properties."""

from __future__ import annotations

import platform
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
    """``clock`` is the highest clock of the multiprocessors, in Hz. It and ``driver`` are None if unknown."""

    torch_device: torch.device
    name: str
    capability: str = ""
    multiprocessors: int = 0
    memory: int = 0
    l2: int = 0
    clock: float | None = None
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
    if device.type != "cuda":
        raise CannotMeasure(f"these benchmarks are for CUDA devices, not for {name!r}; python -m benchmarks measures others")
    if not torch.cuda.is_available():
        why = "it was built without CUDA" if not torch.backends.cuda.is_built() else "see nvidia-smi for the driver"
        raise CannotMeasure(f"no CUDA device: torch {torch.__version__} sees none ({why})")
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
    reported = ask(device, "driver_version", "clocks.max.sm")
    return Device(
        device,
        about.name,
        f"{about.major}.{about.minor}",
        about.multi_processor_count,
        about.total_memory,
        about.L2_cache_size,
        number(reported["clocks.max.sm"], 1e6) or 1e3 * getattr(about, "clock_rate", 0) or None,
        reported["driver_version"],
    )


def ask(device: torch.device, *fields: str) -> dict[str, str | None]:
    """What nvidia-smi reports for ``device``: field → value, None if unknown."""
    try:
        done = subprocess.run(_question(device, fields), capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    return _answer(done.stdout, fields)


def clock_under(work: Callable[[], object], device: torch.device) -> float | None:
    """The clock in Hz while ``work`` is repeated; None if nvidia-smi does not report it."""
    fields = ("clocks.sm",)
    try:
        asking = subprocess.Popen(_question(device, fields), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None
    while asking.poll() is None:
        work()
        torch.cuda.synchronize(device)
    output, _ = asking.communicate()
    return number(_answer(output, fields)["clocks.sm"], 1e6)


def versions() -> dict[str, str | None]:
    """The versions of everything that the figures depend on."""
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "torchprobe": torchprobe.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": getattr(triton, "__version__", None),
        "python": platform.python_version(),
        "kernels": re.split(r", (?=/)", kernels()["cuda"])[0],  # without their path
    }


def number(text: str | None, scale: float = 1.0) -> float | None:
    """A number that nvidia-smi printed; None for ``[N/A]``."""
    try:
        return None if text is None else float(text) * scale
    except ValueError:
        return None


def _question(device: torch.device, fields: tuple[str, ...]) -> list[str]:
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # the device numbers of nvidia-smi ignore CUDA_VISIBLE_DEVICES
    return ["nvidia-smi", f"--id=GPU-{uuid.removeprefix('GPU-')}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]


def _answer(output: str, fields: tuple[str, ...]) -> dict[str, str | None]:
    values = [value.strip() for value in output.partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) and values[0] else dict.fromkeys(fields)
