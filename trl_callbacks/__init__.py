"""Callbacks for TRL's trainers that go with peft_mora's adapters."""

from .budget import ActivationBudgetCallback
from .calibration import LoriCalibrationCallback
from .drift import DriftCallback, drift
from .general_text import protect
from .growth import RankGrowthCallback
from .input_statistics import InputStatisticsCallback
from .metrics import continual_metrics
from .penalties import AdapterPenaltyCallback
from .projection import OrthogonalProjectionCallback
from .prompts import PromptProjectionCallback
from .surgery import GradientSurgeryCallback
from .task_column import TaskColumnCallback


__all__ = [
    "ActivationBudgetCallback",
    "AdapterPenaltyCallback",
    "DriftCallback",
    "GradientSurgeryCallback",
    "InputStatisticsCallback",
    "LoriCalibrationCallback",
    "OrthogonalProjectionCallback",
    "PromptProjectionCallback",
    "RankGrowthCallback",
    "TaskColumnCallback",
    "continual_metrics",
    "drift",
    "protect",
]
