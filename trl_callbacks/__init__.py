"""Callbacks for TRL's trainers that go with peft_mora's adapters."""

from .budget import ActivationBudgetCallback
from .calibration import LoriCalibrationCallback
from .general_text import protect
from .metrics import continual_metrics
from .projection import OrthogonalProjectionCallback


__all__ = [
    "ActivationBudgetCallback",
    "LoriCalibrationCallback",
    "OrthogonalProjectionCallback",
    "continual_metrics",
    "protect",
]
