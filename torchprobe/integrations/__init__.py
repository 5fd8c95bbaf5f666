"""Recording inside of training frameworks, and their trackers.

==============================================  ========================================================================
:class:`Monitor`                                a recorder for a training loop of your own: windows, writers, a file, resuming
:mod:`~torchprobe.integrations.lightning`       ``RecordActivations``, a callback
:mod:`~torchprobe.integrations.transformers`    ``RecordActivations``, a callback for the ``Trainer``
:mod:`~torchprobe.integrations.accelerate`      ``RecordActivations``, which logs to the trackers of an ``Accelerator``
:mod:`~torchprobe.integrations.wandb`           ``to_wandb``, a writer
:mod:`~torchprobe.integrations.mlflow`          ``to_mlflow``, a writer
:mod:`~torchprobe.integrations.tensorboard`     ``to_tensorboard``, a writer
==============================================  ========================================================================

Where what is:

================  ==============================================================================================
``monitor``       windows, numbers for writers, the history of all ranks, the file, resuming
``padding``       which tokens of a batch are padding: from its ``attention_mask``
``packages``      optional packages: how to install them
================  ==============================================================================================

No package is imported before its module is: ``import torchprobe.integrations`` needs only torch.
"""

from torchprobe.integrations.monitor import Monitor, Writer

__all__ = ["Monitor", "Writer"]
