"""Which nonfinite gradients are no alarm: the normal overflows under a ``GradScaler``."""

from __future__ import annotations

from typing import Literal

from torchprobe.recording.guard_options import Scaler

Judgment = Literal["alarm", "overflow", "wait"]


class ScalerRule:
    """Nonfinite gradients are an overflow if the scaler lowers its scale for them, which also skips the step of the optimizer.

    At a scale of 1 or less it is not the scaling that overflows, so that is an alarm. Nonfinite activations are one always.

    Args:
        scaler: of the training; None, or one that is disabled: everything is an alarm.

    Attributes:
        overflows: steps that were no alarm.
    """

    def __init__(self, scaler: Scaler | None) -> None:
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.overflows = 0
        self._scale = self.scaler.get_scale() if self.scaler is not None else 1.0
        self._waiting = False

    def judge(self, gradients: bool, ended: bool, scale: float | None) -> Judgment:
        """What a step has come to.

        Args:
            gradients: it has nonfinite gradients, and no nonfinite activations.
            ended: it has ended.
            scale: at its end; None: the present one.

        Returns:
            "wait" if the next step decides: the scale has not changed yet, so ``scaler.update()`` may still come.
        """
        if self.scaler is None:
            return "alarm"
        if not ended:
            return "wait" if gradients else "alarm"
        before, self._scale = self._scale, self.scaler.get_scale() if scale is None else scale
        waited, self._waiting = self._waiting, False
        if not gradients or before <= 1:
            return "alarm"
        if self._scale < before:
            self.overflows += 1
            return "overflow"
        self._waiting = not waited
        return "alarm" if waited else "wait"
