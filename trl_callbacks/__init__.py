"""Callbacks for TRL's trainers that go with peft_mora's adapters."""

from .calibration import LoriCalibrationCallback


__all__ = ["LoriCalibrationCallback"]
