"""The name of the distribution, which differs from the name of the package.

On the public index, ``torchprobe`` is another project. Every hint to install something must use this name.
"""

DISTRIBUTION = "torchprobe-interp"
"""The name for ``pip install``. ``pyproject.toml`` has the same name; ``tests/test_packaging.py`` compares them."""


def install_hint(extra: str) -> str:
    """The command that installs an extra.

    >>> install_hint("report")
    "pip install 'torchprobe-interp[report]'"
    """
    return f"pip install '{DISTRIBUTION}[{extra}]'"
