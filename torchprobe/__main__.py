"""``python -m torchprobe`` is the command ``torchprobe``."""

from torchprobe.cli import main

main()
