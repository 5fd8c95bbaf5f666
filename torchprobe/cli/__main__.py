"""``python -m torchprobe.cli``."""

from torchprobe.cli import main

main()
