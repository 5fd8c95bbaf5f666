"""Which layer of one model is which layer of another: by name."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torchprobe.recording.layers import canonical


@dataclass(frozen=True)
class Matched:
    """Pairs of names, in the order of the first model; the names without a partner; and what had to be assumed, in words."""

    pairs: list[tuple[str, str]]
    only_first: list[str]
    only_second: list[str]
    remarks: list[str] = field(default_factory=list)


def match_layers(first: Sequence[str], second: Sequence[str], rename: Mapping[str, str] | None = None) -> Matched:
    """Matches the names of two models: as ``rename`` says, else equal names, else equal without the components that wrappers add
    (``module``, ``_orig_mod`` …), else equal without one prefix that all remaining names of one side have.

    Args:
        first, second: names of layers.
        rename: name or glob of the first → name in the second. Each ``*`` and ``**`` of the glob fills the next one of the name.

    Raises:
        ValueError: an entry of ``rename`` matches no layer of the first, or leads to no layer of the second; or two lead to the same.

    >>> match_layers(["net.blocks.0", "net.blocks.1"], ["blocks.0", "blocks.1"]).remarks
    ["names of the first are matched without their prefix 'net.'"]
    >>> match_layers(["blocks.0", "head"], ["layers.0", "fc"], {"blocks.*": "layers.*", "head": "fc"}).pairs
    [('blocks.0', 'layers.0'), ('head', 'fc')]
    """
    partner: dict[str, str] = _renamed(first, second, rename or {})
    remarks = list[str]()
    for simple in (str, _plain):
        taken = set(partner.values())
        here = _unique([name for name in first if name not in partner], simple)
        there = _unique([name for name in second if name not in taken], simple)
        partner.update({here[key]: there[key] for key in here if key in there})
    taken = set(partner.values())
    left, right = [name for name in first if name not in partner], [name for name in second if name not in taken]
    for which, longer, shorter in (("first", left, right), ("second", right, left)):
        if prefix := _prefix(longer, shorter):
            pairs = {name: name.removeprefix(prefix).removeprefix(".") for name in longer if _under(prefix, name)}
            found = {name: short for name, short in pairs.items() if short in shorter}
            partner.update(found if which == "first" else {short: name for name, short in found.items()})
            remarks.append(f"names of the {which} are matched without their prefix {prefix + '.'!r}")
            break
    taken = set(partner.values())
    return Matched(
        [(name, partner[name]) for name in first if name in partner],
        [name for name in first if name not in partner],
        [name for name in second if name not in taken],
        remarks,
    )


def _plain(name: str) -> str:
    return canonical(name)


def _unique(names: Sequence[str], key: type[str] | object) -> dict[str, str]:
    """What the key makes of each name → the name, where only one name gives it."""
    assert callable(key)
    keys = {name: key(name) for name in names}
    counts = Counter(keys.values())
    return {short: name for name, short in keys.items() if counts[short] == 1}


def _under(prefix: str, name: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _prefix(longer: Sequence[str], shorter: Sequence[str]) -> str:
    """The prefix without which most names of the one are names of the other; "" unless that holds for half of them, and for two."""
    ends = set(shorter)
    counts: Counter[str] = Counter()
    for name in longer:
        parts = name.split(".")
        counts.update(".".join(parts[:cut]) for cut in range(1, len(parts)) if ".".join(parts[cut:]) in ends)
    if not counts:
        return ""
    prefix, count = counts.most_common(1)[0]
    return prefix if count >= max(2, min(len(longer), len(shorter)) / 2) else ""


def _renamed(first: Sequence[str], second: Sequence[str], rename: Mapping[str, str]) -> dict[str, str]:
    known, partner = set(second), dict[str, str]()
    for pattern, target in rename.items():
        expression = re.compile("".join(_EXPRESSIONS.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", pattern)))
        matches = {name: match for name in first if (match := expression.fullmatch(name)) is not None}
        if not matches:
            raise ValueError(f"rename: {pattern!r} matches no layer of the first{_hint(pattern, pattern, first)}")
        if target.count("*") - target.count("**") != pattern.count("*") - pattern.count("**"):
            raise ValueError(f"rename: {pattern!r} and {target!r} do not have the same number of stars")
        for name, match in matches.items():
            parts = iter(match.groups())
            new = re.sub(r"\*\*|\*", lambda _, parts=parts: next(parts), target)  # type: ignore[misc]
            if new not in known:
                raise ValueError(f"rename: {name!r} becomes {new!r}, which the second does not have{_hint(target, new, second)}")
            if new in partner.values() and partner.get(name) != new:
                raise ValueError(f"rename: two layers of the first become {new!r}")
            partner[name] = new
    return partner


def _hint(pattern: str, name: str, names: Sequence[str]) -> str:
    """What was probably meant: a pattern of the same shape that names have, else a name."""
    parts, shaped = pattern.split("."), list[str]()
    if "*" in pattern:
        pieces = [name.split(".") for name in names]
        shaped = [
            ".".join(part if "*" in part else piece for part, piece in zip(parts, those, strict=False))
            for those in pieces
            if len(those) == len(parts) or (len(those) > len(parts) and "**" in parts[-1])
        ]
    near = difflib.get_close_matches(pattern, [*dict.fromkeys(shaped)], 1) or difflib.get_close_matches(name, names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


_EXPRESSIONS = {"*": r"([^.]*)", "**": r"(.*)"}
