"""Tables of pandas, and Parquet files: one row for each layer, or for each step and layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchprobe.common.files import replacing
from torchprobe.common.messages import install_hint

if TYPE_CHECKING:
    import pandas

WHOLE = ("features", "feature_dim")
"""Columns of whole numbers; None where nothing decides."""


class Tabular:
    """What a recording and its history have in common: columns of equal length."""

    def columns(self) -> dict[str, Any]:
        """The columns by their names: lists and arrays of equal length.

        >>> import torch, torchprobe
        >>> model = torch.nn.Linear(4, 3)
        >>> with torchprobe.record(model) as rec:
        ...     for step in (10, 20):
        ...         _ = model(torch.randn(8, 4))
        ...         rec.snapshot(step)
        >>> found = rec.history.columns()
        >>> found["step"].tolist(), found["layer"], found["vectors"].tolist()
        ([10, 20], ['', ''], [8.0, 8.0])
        """
        raise NotImplementedError

    def to_pandas(self) -> pandas.DataFrame:
        """A tidy table: a row for each layer of a recording (its running window; ``total.to_pandas()`` has all windows), or for each step
        and layer of a history. The columns are those of ``rows()``.

        Raises:
            ModuleNotFoundError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"to_pandas() needs pandas: {install_hint('pandas')}", name="pandas") from error
        found = {name: pandas.array(values, dtype="Int64") if name in WHOLE else values for name, values in self.columns().items()}
        return pandas.DataFrame(found)

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Writes the same table as a Parquet file, which pandas, polars, DuckDB and others read. An existing file is replaced as a whole.

        Raises:
            ModuleNotFoundError: pyarrow is not installed.
            OSError: the file cannot be written.
        """
        try:
            import pyarrow
            from pyarrow import parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"to_parquet() needs pyarrow: {install_hint('parquet')}", name="pyarrow") from error
        types = {name: pyarrow.int64() for name in WHOLE}
        arrays = {name: pyarrow.array(values, types.get(name), from_pandas=False) for name, values in self.columns().items()}
        with replacing(path) as temporary:
            parquet.write_table(pyarrow.table(arrays), os.fspath(temporary))
        return Path(path)


def columns_of(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The columns of rows that all have these names.

    >>> columns_of([{"layer": "fc", "std": 1.0}], ["layer", "std"])
    {'layer': ['fc'], 'std': [1.0]}
    """
    return {name: [row[name] for row in rows] for name in names}
