"""What is installed here: versions and kernels. Each kernel is checked against the reference."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from typing import Any

import torch

import torchprobe
from torchprobe.ops import kernels, selfcheck

PACKAGES = [
    "torch", "numpy", "einops", "safetensors", "rich", "torchvision", "timm", "open_clip_torch", "transformers", "captum", "matplotlib",
    "jinja2",
]  # fmt: skip


@dataclass(frozen=True)
class Examination:
    """What ``torchprobe doctor`` reports.

    Attributes:
        versions: package → version; None if it is not installed.
        machine: platform, instruction set, threads, CUDA devices.
        kernels: device → "loaded: …", or the reason why its kernel is not loaded.
        checks: those of :func:`torchprobe.ops.selfcheck.run`, on the CPU and on every CUDA device, whose name is part of the name. If a
            device cannot run the CUDA kernels, ``kernels`` says so, and the checks there run the PyTorch reference.
    """

    versions: dict[str, str | None]
    machine: dict[str, str]
    kernels: dict[str, str]
    checks: tuple[selfcheck.Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def summary(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return asdict(self) | {"passed": self.passed}


def examine() -> Examination:
    """Collects the versions and runs the checks.

    >>> examine().passed
    True
    """
    cuda = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return Examination(
        versions={
            "torchprobe": torchprobe.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
        },
        machine={
            "platform": platform.platform(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
            "CUDA of torch": torch.version.cuda or "none",
            "CUDA devices": ", ".join(cuda.values()) or "none",
        },
        kernels=kernels(),
        checks=tuple(replace(check, name=f"{device}: {check.name}") for device in ["cpu", *cuda] for check in selfcheck.run(device)),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
