"""`report_to` gets our callbacks' numbers: what a tracker has stored is what the trainer's history says."""

from pathlib import Path

import pytest
from helpers import METHODS, quantized, sft
from shared_fixtures import TRACKIO

from trl_callbacks import ActivationBudgetCallback, LoriCalibrationCallback, OrthogonalProjectionCallback


# method, the callback, and what it must bring into the trackers; a callback that logs is a row here.
CALLBACKS = {
    "budget": ("mora", lambda: ActivationBudgetCallback(2), ("active_experts", "usage_entropy", "dead_experts")),
    "budget-flylora": (
        "flylora",
        lambda: ActivationBudgetCallback(1.5, rebalance=True, interval=1),
        ("active_experts", "usage_entropy", "dead_experts"),
    ),
    "projection": (
        "mora",
        lambda: OrthogonalProjectionCallback(source="base_weights", max_rank=8),
        ("protected_rank_mean", "protected_rank_max", "leakage"),
    ),
    "calibration": ("lori", lambda: LoriCalibrationCallback(0.5, calibration_steps=2), ("loss", "grad_norm")),
}


def read_tensorboard(folder) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stored: dict[str, dict[int, float]] = {}
    for file in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            stored.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return stored


def read_trackio(project: str) -> dict[str, dict[int, float]]:
    from trackio.sqlite_storage import SQLiteStorage

    assert SQLiteStorage.get_project_db_path(project).parent == Path(TRACKIO.name)
    (run,) = SQLiteStorage.get_runs(project)
    stored: dict[str, dict[int, float]] = {}
    for entry in SQLiteStorage.get_logs(project, run):
        for tag, value in entry.items():
            if isinstance(value, (int, float)):
                stored.setdefault(tag, {})[entry["train/global_step"]] = value
    return stored


@pytest.mark.parametrize("row", CALLBACKS)
def test_trackers_have_the_numbers_of_the_trainer_s_history(row, llama_folder, tmp_path):
    method, make_callback, metrics = CALLBACKS[row]
    trainer = sft(
        quantized(llama_folder),
        llama_folder,
        tmp_path,
        METHODS[method](target_modules="all-linear"),
        callbacks=[make_callback()],
        report_to=["tensorboard", "trackio"],
        project=row,  # trackio's; local, since no trackio_space_id is given
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 6
    for stored in (read_tensorboard(tmp_path), read_trackio(row)):
        for metric in metrics:
            logged = {entry["step"]: entry[metric] for entry in history}
            assert stored[f"train/{metric}"] == pytest.approx(logged, rel=1e-6), metric
