"""The version of this library. ``pyproject.toml`` and ``CHANGELOG.md`` have the same; a test compares them."""

VERSION = "0.1.0"
