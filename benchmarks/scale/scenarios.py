"""Three large runs, computed from the constants and from what is assumed about a GPU, a network and the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.scale.constants import WIDTH
from benchmarks.synthetic_broden import IMAGES, LABELS

HOUR, YEAR = 3600.0, 365 * 86_400.0
GB, TB = 1e9, 1e12


@dataclass(frozen=True)
class Assumption:
    """A number that is not measured here. ``source``: where it comes from."""

    value: float
    unit: str
    what: str
    source: str


ASSUMED: Mapping[str, Assumption] = {
    "flops": Assumption(989e12, "operations a second", "a GPU in bfloat16, dense", "data sheet of the H100 SXM"),
    "bandwidth": Assumption(3.35e12, "bytes a second", "memory of that GPU", "the same"),
    "use": Assumption(0.4, "", "share of both that is reached", "usual for training; chosen"),
    "network": Assumption(3.125e9, "bytes a second", "network of a machine: 25 Gbit/s", "chosen"),
    "gpus": Assumption(8, "", "GPUs of a machine", "chosen"),
    "cores": Assumption(96, "", "processor cores of a machine", "chosen"),
    "parameters": Assumption(70e9, "", "parameters of the language model", "Llama 2 70B"),
    "layers": Assumption(80, "", "its layers, of width 8192", "Llama 2 70B"),
    "tokens": Assumption(2e12, "tokens", "its training", "Llama 2 70B"),
    "batch": Assumption(4e6, "tokens", "one step", "Llama 2 70B"),
    "training_gpus": Assumption(1024, "", "GPUs of its training, data parallel", "chosen"),
    "window": Assumption(100, "steps", "a window of its history", "chosen"),
    "images": Assumption(2.32e9, "", "pairs in LAION-2B-en", "Schuhmann et al. 2022"),
    "sample": Assumption(43e3, "bytes", "one pair in its shards, at 384 pixels", "240 TB for 5.85 billion, as for LAION-5B by img2dataset"),
    "vit": Assumption(162e9, "operations", "one image through ViT-L/14 at 224 pixels", "2 × 81 G multiply-adds"),
    "blocks": Assumption(24, "", "its layers, of 1,024 features", "Dosovitskiy et al. 2021"),
}
"""By name."""


@dataclass(frozen=True)
class Line:
    """One line of a table: what, how much, and the formula in words."""

    what: str
    amount: str
    formula: str


def _a(name: str) -> float:
    return ASSUMED[name].value


def recorded(c: Mapping[str, float]) -> list[Line]:
    """The training of a model of 70B parameters, with the output of every layer recorded in every step."""
    per_gpu = _a("batch") / _a("training_gpus")
    step = 6 * _a("parameters") * per_gpu / (_a("flops") * _a("use"))
    read = _a("layers") * per_gpu * WIDTH * 2
    added = read / (_a("bandwidth") * _a("use")) + _a("layers") * c["hook"]
    steps = _a("tokens") / _a("batch")
    state = c["state"] * WIDTH * _a("layers")
    windows = steps / _a("window")
    cpu = _a("layers") * per_gpu * WIDTH / c["observe"]
    return [
        Line("a step", seconds(step), "6 × parameters × tokens of a GPU ÷ its speed"),
        Line("read by the recorder, each step and GPU", size(read), "layers × tokens × width × 2 bytes, each once"),
        Line("added to a step", f"{seconds(added)}, {added / step:.2%}", "that ÷ memory speed, and one hook for each layer"),
        Line("the same on one processor core instead", seconds(cpu), "layers × tokens × width ÷ observe"),
        Line("memory of the recorder, each GPU", size(state), "state × width × layers"),
        Line("sent by each GPU for a window", size(2 * state), f"all_reduce sends the state about twice; every {_a('window'):.0f} steps"),
        Line("time of that on the network", seconds(2 * state / (_a("network") / _a("gpus"))), "that ÷ the share of a GPU of the network"),
        Line("windows of the whole run", f"{windows:,.0f}", "tokens ÷ step ÷ window"),
        Line("the history on disk", size(windows * _a("layers") * c["window"]), "windows × layers × window"),
    ]


def embedded(c: Mapping[str, float]) -> list[Line]:
    """LAION-2B through the image tower of CLIP ViT-L/14."""
    n = _a("images")
    forward = n * _a("vit") / (_a("flops") * _a("use"))
    decode, index = n * c["decode"], n * c["index"]
    data, out = n * _a("sample"), n * c["row"]
    write = n * c["write"]
    memory = n * c["index_memory"]
    per_job = 64e9 / (c["index_memory"] * (_a("gpus") + 1))
    jobs = -(-n // per_job)
    machine = max(forward / _a("gpus"), decode / _a("cores"), 2 * data / _a("network"), write)
    slowest = {
        "the GPUs": forward / _a("gpus"), "decoding": decode / _a("cores"), "the network": 2 * data / _a("network"),
        "the process that writes the file": write,
    }  # fmt: skip
    return [
        Line("the network (forward)", f"{hours(forward)} of a GPU", "images × vit ÷ its speed"),
        Line("decoding", f"{hours(decode)} of a core", "images × decode"),
        Line("the index", f"{hours(index)} of a core", "images × index"),
        Line("its digest", f"{hours(data / c['digest'])} of a core", "images × sample ÷ digest"),
        Line("the index in memory, each process", size(memory), "images × index_memory"),
        Line("images of a job whose indexes take 64 GB of a machine", f"{per_job / 1e6:,.0f} million", "64 GB ÷ index_memory ÷ (GPUs + 1)"),
        Line("jobs", f"{jobs:,.0f}", "images ÷ that"),
        Line("read over the network", size(2 * data), "images × sample, twice: for the index with its digest, and for the pictures"),
        Line("the same where the shards are on local disks", size(data), "images × sample, once: the index only reads headers"),
        Line("representations on disk", size(out), "images × row"),
        Line("the process that writes them", hours(write), "images × write; one for each job, so jobs run side by side"),
        Line("one machine, everything side by side", days(machine), f"the slowest of them: {max(slowest, key=lambda one: slowest[one])}"),
        *(Line(f"{count} machines, one job each at a time", days(machine / count), "÷ machines") for count in (8, 32)),
    ]


def dissected(c: Mapping[str, float]) -> list[Line]:
    """All 24 layers of ViT-L/14 against Broden."""
    units = _a("blocks") * 1024
    forward = 2 * IMAGES * _a("vit") / (_a("flops") * _a("use"))
    work = units * IMAGES * c["dissect"]
    return [
        Line("units", f"{units:,.0f}", "24 layers × 1,024 features, on maps of 16 × 16"),
        Line("the network (forward)", f"{seconds(forward)} of a GPU", "2 passes × 63,305 images × vit ÷ its speed"),
        Line("thresholds and overlap", f"{hours(work)} of a core", "units × images × dissect"),
        Line("the same on one machine", hours(work / _a("cores")), "÷ cores; a rank for each core, with torchrun"),
        Line("counts in memory, each rank", size(units * LABELS * 8), "units × 1,197 concepts × 8 bytes, all layers in one pass"),
        Line(
            "counts of all ranks of a machine", size(units * LABELS * 8 * _a("cores")), "× cores; fewer ranks with more threads need less"
        ),
        Line("results on disk", size(units * LABELS * c["dissect_file"]), "units × concepts × dissect_file"),
    ]


SCENARIOS = {
    "A language model of 70B parameters, recorded": recorded,
    "LAION-2B, embedded": embedded,
    "Every layer of ViT-L/14, dissected": dissected,
}
"""Title → lines, from constants."""


# -- numbers in words --------------------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.0f}"


def size(count: float) -> str:
    """Bytes, to two digits.

    >>> size(5.2e9), size(120e12)
    ('5.2 GB', '120 TB')
    """
    for unit, name in ((TB, "TB"), (GB, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{_digits(count / unit)} {name}"
    return f"{_digits(count / 1e3)} kB"


def seconds(value: float) -> str:
    """A duration below hours."""
    if value >= 120:
        return hours(value)
    return f"{_digits(value)} s" if value >= 1 else f"{_digits(value * 1e3)} ms"


def hours(value: float) -> str:
    """A duration in minutes, hours, or years.

    >>> hours(300), hours(7200), hours(2 * YEAR)
    ('5 min', '2 h', '2 years')
    """
    if value < HOUR:
        return f"{_digits(value / 60)} min"
    return f"{_digits(value / YEAR)} years" if value > YEAR else f"{_digits(value / HOUR)} h"


def days(value: float) -> str:
    """A duration in days."""
    return f"{_digits(value / 86_400)} days" if value > 2 * 86_400 else hours(value)
