"""What runs here: versions, kernels, and each of them checked against the reference."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

PACKAGES = ["torch", "numpy", "einops", "safetensors", "rich", "torchvision", "timm", "open_clip_torch", "captum", "matplotlib", "jinja2"]


def examine() -> dict[str, Any]:
    """``versions`` (None: not installed), ``machine``, ``kernels`` (device → "loaded: …" or why not), ``checks`` and ``passed``.

    The checks are those of :func:`torchprobe.ops.selfcheck.run`, on the CPU and on every CUDA device; each has ``name``, ``passed``,
    ``error``, ``tolerance`` and ``detail``. Where a device cannot run the CUDA kernels, ``kernels`` says so, and what is checked there is
    the PyTorch reference.

    >>> examine()["passed"]
    True
    """
    import torchprobe
    from torchprobe.ops import kernels, selfcheck

    cuda = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    checks = [{**asdict(check), "name": f"{device}: {check.name}"} for device in ["cpu", *cuda] for check in selfcheck.run(device)]
    return {
        "versions": {
            "torchprobe": torchprobe.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        "machine": {
            "platform": platform.platform(),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "threads": str(torch.get_num_threads()),
            "CUDA of torch": torch.version.cuda or "none",
            "CUDA devices": ", ".join(cuda.values()) or "none",
        },
        "kernels": kernels(),
        "checks": checks,
        "passed": all(check["passed"] for check in checks),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
