"""Numbers of windows in MLflow (``pip install mlflow``, or ``mlflow-skinny``)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice

from torchprobe.integrations.monitor import Writer
from torchprobe.integrations.packages import require

_AT_ONCE = 1000  # the REST interface takes no more metrics in one request
_REFUSED = re.compile(r"[^A-Za-z0-9_\-. /]")


def to_mlflow(run_id: str | None = None) -> Writer:
    """A writer for a run of MLflow: ``Monitor(model, to=to_mlflow())``.

    MLflow takes letters, digits and ``_-. /`` in names; other characters, such as the ``@`` of "fc@gradient", become ``-``.

    Args:
        run_id: of the run. Default: the active run when a window closes; MLflow starts one if there is none.

    Raises:
        ModuleNotFoundError: mlflow is not installed.
    """
    mlflow = require("mlflow", "to_mlflow()")

    def write_to_mlflow(numbers: Mapping[str, float], step: int) -> None:
        named = iter({metric_name(name): value for name, value in numbers.items()}.items())
        while some := dict(islice(named, _AT_ONCE)):
            mlflow.log_metrics(some, step=step, run_id=run_id)

    return write_to_mlflow


def metric_name(key: str) -> str:
    """A name that MLflow takes.

    >>> metric_name("act/fc@gradient/std"), metric_name("act/block:0/std")
    ('act/fc-gradient/std', 'act/block-0/std')
    """
    return _REFUSED.sub("-", key)
