"""What all callbacks share: a table of runs that they refuse, and their place before the trackers."""

from types import SimpleNamespace

import pytest

from trl_callbacks import (
    ActivationBudgetCallback,
    AdapterPenaltyCallback,
    LoriCalibrationCallback,
    OrthogonalProjectionCallback,
)
from trl_callbacks.host import KINDS


PLAIN = {"world_size": 1, "n_gpu": 1, "deepspeed": None, "fsdp": [], "load_best_model_at_end": False}
RUNS = {
    "deepspeed": {"deepspeed": "zero2.json"},
    "fsdp": {"fsdp": ["full_shard"]},
    "processes": {"world_size": 2},
    "data_parallel": {"n_gpu": 2},
    "best_model": {"load_best_model_at_end": True},
}
# callback, and what it says of each kind of run that it refuses
REFUSALS = {
    "projection": (OrthogonalProjectionCallback(), {"deepspeed": "steps inside backward", "fsdp": "in pieces"}),
    "budget": (ActivationBudgetCallback(2), {"data_parallel": "torchrun"}),
    "pruning": (
        ActivationBudgetCallback(2, prune_below=0.1),
        {"data_parallel": "torchrun", "deepspeed": "prune_experts", "fsdp": "prune_experts"},
    ),
    "penalty": (
        AdapterPenaltyCallback("lorasculpt"),
        {"deepspeed": "buffers of its own", "fsdp": "in pieces", "best_model": "before they were made sparse"},
    ),
    "dropping": (AdapterPenaltyCallback("coto"), {"deepspeed": "buffers of its own", "fsdp": "in pieces"}),
    "calibration": (
        LoriCalibrationCallback(),
        dict.fromkeys(("processes", "deepspeed", "fsdp"), "in a run of its own")
        | {"best_model": "could bring back the dense adapter"},
    ),
}


@pytest.mark.parametrize("row", REFUSALS)
def test_a_callback_refuses_the_runs_that_it_cannot_work_in_and_no_others(row):
    callback, refused = REFUSALS[row]
    assert RUNS.keys() == KINDS.keys()
    callback.refuse(SimpleNamespace(**PLAIN))
    for kind, difference in RUNS.items():
        run = SimpleNamespace(**{**PLAIN, **difference})
        if kind in refused:
            with pytest.raises(ValueError, match=refused[kind]):
                callback.refuse(run)
        else:
            callback.refuse(run)


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
@pytest.mark.parametrize(
    ("row", "begin"), [("projection", "on_init_end"), ("pruning", "on_train_begin"), ("calibration", "on_train_begin")]
)
def test_what_accelerate_launch_asks_for_is_seen_without_an_argument_as_the_run_begins(row, begin, kind, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{kind.upper()}", "true")
    callback, refused = REFUSALS[row]
    with pytest.raises(ValueError, match=refused[kind]):
        getattr(callback, begin)(SimpleNamespace(**PLAIN), None, None, model=None)
