"""The name of the distribution, which is not the name of the package.

``torchprobe`` on the public index belongs to somebody else, so every hint to install something must use this name.
"""

DISTRIBUTION = "torchprobe-interp"
"""What ``pip install`` takes. ``pyproject.toml`` says the same; ``tests/test_packaging.py`` checks it."""


def install_hint(extra: str) -> str:
    """The command that installs an extra.

    >>> install_hint("report")
    "pip install 'torchprobe-interp[report]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"
