"""Files of arrays: .npy, .npz, .safetensors and .parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fuzz.target import Target
from torchprobe.common.arrays import open_arrays

_RNG = np.random.default_rng(0)
_H, _Y, _IDS = _RNG.normal(size=(6, 3)).astype(np.float32), np.arange(6) % 2, np.array([f"{i}.png" for i in range(6)])


def _read(folder: Path) -> Any:
    found = {}
    for path in sorted(folder.iterdir()):
        for name, one in open_arrays(path).items():
            if one.kind == "text" and len(one.shape) == 1:
                found[path.name, name] = one.texts()
            elif one.kind in ("float", "whole"):
                found[path.name, name] = one.tensor().clone()
    return [list(pair) for pair in found.items()]


def _npy(folder: Path) -> None:
    np.save(folder / "a.npy", _H)
    np.save(folder / "text.npy", _IDS)


def _npz(folder: Path) -> None:
    np.savez(folder / "a.npz", h=_H, y=_Y, ids=_IDS)
    np.savez_compressed(folder / "b.npz", h=_H.astype(np.float16), y=_Y.astype(">u2"))


def _safetensors(folder: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"h": _H, "y": _Y}, folder / "a.safetensors", {"kind": "x"})


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"h": _H.tolist(), "y": _Y, "ids": _IDS.tolist()})
    parquet.write_table(table, folder / "a.parquet")
    parquet.write_table(table, folder / "b.parquet", compression="none", use_dictionary=False)


TARGETS = [
    Target("npy", {"a.npy": "npy", "text.npy": "npy"}, _npy, _read, (ValueError,)),
    Target("npz", {"a.npz": "zip", "b.npz": "zip"}, _npz, _read, (ValueError,)),
    Target("safetensors", {"a.safetensors": "safetensors"}, _safetensors, _read, (ValueError,)),
    Target("parquet", {"a.parquet": "raw", "b.parquet": "raw"}, _parquet, _read, (ValueError,), weight=0.5),
]
