"""ActivationBudgetCallback in SFTTrainer runs: the total is held, trackers get metrics, a resume repeats the run."""

import base64
import csv
import json
import math
import sys
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import At, adapted, csv_rows, losses, quantized, ranks, sft, texts, tiny_llama, trl_trainer
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import TrainerCallback

from peft_mora import FlyLoraConfig, MoraConfig, expert_usage, start_task
from peft_mora.routed import routed_layers
from trl_callbacks import ActivationBudgetCallback
from trl_callbacks.budget import annealed, divide, usage_metrics


MODULES = 14  # of the tiny Llama


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """Half a second each; one test looks at it."""
    if "heat_map" not in request.node.name:
        monkeypatch.setattr("trl_callbacks.budget.write_heat_map", lambda path, usage: [])


def config(kind: str = "task", **kwargs):
    if kind == "flylora":
        return FlyLoraConfig(**{"r": 6, "top_k": 6, "density": 0.3, "target_modules": "all-linear", **kwargs})
    return MoraConfig(**{"r": 6, "routing": kind, "temperature": 0.05, "target_modules": "all-linear", **kwargs})


def trainer(folder, output, callback, peft_config=None, **kwargs):
    torch.manual_seed(0)
    model = kwargs.pop("model", None) or quantized(folder)
    options = {"max_steps": 8, "save_steps": 100, "learning_rate": 1e-2, **kwargs}
    made = sft(model, folder, output, peft_config, **options)
    made.add_callback(callback)
    return made


class Watch(TrainerCallback):
    """K of every layer, before each step and at the end."""

    def __init__(self):
        self.seen = []

    def _look(self, model):
        self.seen.append([layer.top_k("default") for layer in routed_layers(model).values()])

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self._look(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._look(model)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_division_holds_the_total_and_the_bounds_and_repeats(data):
    limits = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=40))
    needs = data.draw(st.lists(st.floats(0.01, 50), min_size=len(limits), max_size=len(limits)))
    total = data.draw(st.integers(len(limits), sum(limits)))
    ks = divide(total, limits, needs)
    assert sum(ks) == total and all(1 <= k <= limit for k, limit in zip(ks, limits, strict=True))
    assert ks == divide(total, limits, needs)


def test_a_division_follows_the_needs_and_spreads_what_is_left():
    assert divide(10, [8] * 4, [1, 1, 2, 1]) == [2, 2, 4, 2]
    assert divide(12, [4, 8, 8], [9, 1, 1]) == [4, 4, 4]
    assert divide(3, [8, 8, 8], [5, 1, 1]) == [1, 1, 1]
    assert divide(14, [2, 4, 8], [2, 4, 8]) == [2, 4, 8]
    ks = divide(100 + 25, [8] * 100, [1.0] * 100)
    assert sorted(ks) == [1] * 75 + [2] * 25
    halves = [sum(ks[i : i + 20]) - 20 for i in range(0, 100, 20)]
    assert max(halves) - min(halves) <= 2  # not all in the first layers
    assert divide(0, [], []) == []
    for total in (2, 25):
        with pytest.raises(ValueError, match="Cannot divide"):
            divide(total, [8, 8, 8], [1, 1, 1])


def test_schedules_go_from_start_to_target_and_stay():
    for schedule in ("cosine", "linear"):
        path = [annealed(16, 4, step / 10, schedule) for step in range(13)]
        assert path[0] == 16 and path[10:] == [4, 4, 4] and path == sorted(path, reverse=True)
    assert annealed(16, 4, 0.5, "cosine") == pytest.approx(10) == annealed(16, 4, 0.5, "linear")
    assert annealed(16, 4, 0.25, "cosine") == pytest.approx(4 + 12 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert annealed(16, 4, 0, "constant") == 4
    assert annealed(2, 8, 0.5, "linear") == 5  # up as well


def test_metrics_are_what_their_names_say():
    shares = [torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.5, 0.5, 0.5, 0.5])]
    metrics = usage_metrics(shares, 0.01)
    assert metrics["active_experts"] == pytest.approx(2)
    assert metrics["usage_entropy"] == pytest.approx((math.log(2) / math.log(4) + 1) / 2)
    assert metrics["dead_experts"] == pytest.approx(2 / 8)


@pytest.mark.parametrize("kind", ["task", pytest.param("bank", marks=pytest.mark.slow), "flylora"])
@pytest.mark.parametrize("rebalance", [False, True])
def test_a_run_anneals_from_dense_to_a_fractional_target_with_the_total_held(kind, rebalance, llama_folder, tmp_path):
    watch = Watch()
    callback = ActivationBudgetCallback(2.5, interval=3, rebalance=rebalance, until=0.75)
    run = trainer(llama_folder, tmp_path / "run", callback, config(kind))
    run.add_callback(watch)
    run.train()
    totals = [sum(ks) for ks in watch.seen]
    want = [math.floor(annealed(6, 2.5, step / 6, "cosine") * MODULES + 0.5) for step in range(9)]
    assert totals == want and totals[0] == 6 * MODULES and totals[-1] == 35
    assert all(1 <= k <= 6 for ks in watch.seen for k in ks)
    ks, needs = watch.seen[-1], callback._needs
    assert (len(set(needs)) > 1) == rebalance
    assert all(ks[i] >= ks[j] for i in range(MODULES) for j in range(MODULES) if needs[i] > needs[j])
    # measured, in the logs: what the weights of the real tokens say
    logged = [entry["active_experts"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx([total / MODULES for total in totals[:-1]], abs=0.02)
    assert all(0 < e["usage_entropy"] <= 1 and 0 <= e["dead_experts"] <= 1 for e in run.state.log_history[:-1])
    # saved with the adapter
    run.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "adapter"))
    assert [layer.top_k("default") for layer in routed_layers(again).values()] == watch.seen[-1]
    x = torch.randint(4, 24, (2, 9))
    assert torch.equal(again.eval()(x).logits, run.model.eval()(x).logits)


@pytest.mark.parametrize(
    "kind, step, restore, place",
    [
        ("task", 2, False, "file"),
        ("flylora", 5, True, "file"),
        ("task", 5, False, "trainer_state.json"),
        pytest.param("task", 5, True, "file", marks=pytest.mark.slow),
        pytest.param("flylora", 2, False, "file", marks=pytest.mark.slow),
        pytest.param("flylora", 2, True, "trainer_state.json", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_repeats_the_unbroken_one(kind, step, restore, place, llama_folder, tmp_path):
    def run(output):
        callback = ActivationBudgetCallback(2.5, start=5, interval=3, rebalance=True, until=0.75)
        options = {"save_steps": step, "restore_callback_states_from_checkpoint": restore}
        return trainer(llama_folder, output, callback, config(kind), **options)

    whole = run(tmp_path / "whole")
    whole.train()
    resumed = run(tmp_path / "resumed")
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    if place != "file":
        put_into_trainer_state(checkpoint / "activation_budget-default.safetensors")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole)
    keys = ("active_experts", "usage_entropy", "dead_experts")
    pairs = zip(whole.state.log_history[:8], resumed.state.log_history[:8], strict=True)
    assert all(a[key] == b[key] for a, b in pairs for key in keys)
    assert resumed.model.peft_config["default"].top_k_pattern == whole.model.peft_config["default"].top_k_pattern
    want, got = expert_usage(whole.model), expert_usage(resumed.model)
    assert all(torch.equal(got[name], want[name]) for name in want)
    saved = json.loads((checkpoint / "adapter_config.json").read_text())["top_k_pattern"]
    assert set(saved.values()) <= set(range(1, 7)) and len(set(saved.values())) > 1


def put_into_trainer_state(sidecar: Path) -> None:
    """Make the checkpoint one of those that have the counts in trainer_state.json and no file for them."""

    def packed(tensor):
        return base64.b64encode(zlib.compress(tensor.contiguous().numpy().tobytes())).decode()

    kept = load_file(sidecar)
    sidecar.unlink()
    counts = {name.removeprefix("counts."): t for name, t in kept.items() if name.startswith("counts.")}
    place = sidecar.with_name("trainer_state.json")
    state = json.loads(place.read_text())
    state["stateful_callbacks"]["ActivationBudgetCallback"]["attributes"]["_saved"] = {
        "modules": {name: t.shape[1] - 1 for name, t in counts.items()},
        "begin_mean": kept["begin_mean"].item(),
        "needs": kept["needs"].tolist(),
        "counts": packed(torch.cat(list(counts.values()), dim=1)),
        "entropy": packed(kept["entropy"]),
    }
    place.write_text(json.dumps(state))


@pytest.mark.parametrize("case", ["start", "begin", "rebalance", "plain"])
def test_a_checkpoint_without_the_budget_s_file_resumes_where_k_is_known_without_it(case, llama_folder, tmp_path):
    """The disk was full when it was to be written, or the run had no budget; another run's is not taken."""

    def run(output, callback):
        return trainer(llama_folder, output, callback, config(), save_steps=2)

    budget = partial(ActivationBudgetCallback, 2, start=None if case == "begin" else 6, rebalance=case == "rebalance")
    run(tmp_path / "a", Watch() if case == "plain" else budget()).train()
    run(tmp_path / "b", ActivationBudgetCallback(2, start=3)).train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    (checkpoint / "activation_budget-default.safetensors").unlink(missing_ok=case == "plain")
    resumed, watch = run(tmp_path / "b", budget()), Watch()
    resumed.add_callback(watch)
    if case != "start":
        with pytest.raises(ValueError, match="has no activation_budget-default.safetensors.*from a checkpoint"):
            resumed.train(resume_from_checkpoint=str(checkpoint))
        return
    with pytest.warns(UserWarning, match="usage is counted from step 2 on"):
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert sum(watch.seen[0]) == math.floor(annealed(6, 2, 2 / 4, "cosine") * MODULES + 0.5)


def test_a_run_that_begins_anew_with_a_smaller_batch_anneals_from_the_beginning(llama_folder, tmp_path):
    watch, out = Watch(), At(3, "memory")
    callback = ActivationBudgetCallback(2, until=1.0)
    run = trainer(llama_folder, tmp_path, callback, config(), auto_find_batch_size=True)
    run.add_callback(watch)
    run.add_callback(out)
    run.train()
    want = [math.floor(annealed(6, 2, step / 8, "cosine") * MODULES + 0.5) for step in range(9)]
    assert out.done and [sum(ks) for ks in watch.seen][-9:] == want


def test_a_run_that_is_stopped_before_the_target_says_so(llama_folder, tmp_path):
    run = trainer(llama_folder, tmp_path, ActivationBudgetCallback(2, until=0.5), config())
    run.add_callback(At(3, "stop"))
    with pytest.raises(ValueError, match="stopped at step 3, before the budget reached its target at 4.*from 6 to 2"):
        run.train()
    assert not (tmp_path / "expert_usage.csv").exists()
    assert (tmp_path / "stopped-3" / "adapter_model.safetensors").is_file()  # nothing that was learnt is lost


@pytest.mark.parametrize("until, stop", [(1.0, None), (0.9, None), (0.5, 4)])
def test_a_target_that_is_reached_at_the_last_step_leaves_the_usage_of_the_whole_run(
    until, stop, llama_folder, tmp_path
):
    callback = ActivationBudgetCallback(1, until=until, prune_below=0.5)
    run = trainer(llama_folder, tmp_path, callback, config())
    if stop:
        run.add_callback(At(stop, "stop"))
    run.train()
    with open(tmp_path / "expert_usage.csv", newline="") as file:
        active = [sum(map(float, row[2:])) for row in list(csv.reader(file))[1:]]
    logged = [entry["active_experts"] for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == (stop or 8) and logged[0] > logged[-1]
    assert sum(active) / MODULES == pytest.approx(sum(logged) / len(logged), abs=0.02)
    assert sum(layer.expert_count("default") for layer in routed_layers(run.model).values()) < 6 * MODULES


class Reporter(TrainerCallback):
    """Stands where a tracker's callback stands: before every callback of the user."""

    def __init__(self):
        self.got = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.got.append(dict(logs))


def test_metrics_reach_the_trackers_and_only_the_training_logs(llama_folder, tmp_path):
    run = trainer(llama_folder, tmp_path, ActivationBudgetCallback(3), config(), eval_strategy="steps", eval_steps=4)
    reporter, order = Reporter(), run.callback_handler.callbacks
    order.insert(1, reporter)
    others = [callback for callback in order if not isinstance(callback, ActivationBudgetCallback)]
    run.train()
    assert [c for c in run.callback_handler.callbacks if not isinstance(c, ActivationBudgetCallback)] == others
    training = [logs for logs in reporter.got if "loss" in logs]
    assert len(training) == 8
    for logs, entry in zip(training, [e for e in run.state.log_history if "loss" in e], strict=True):
        for key in ("active_experts", "usage_entropy", "dead_experts"):
            assert logs[key] == entry[key]
    rest = [logs for logs in reporter.got if "loss" not in logs]
    assert rest and not any("active_experts" in logs for logs in rest)


def test_accumulation_checkpointing_and_evaluation_leave_the_counts_alone(llama_folder, tmp_path):
    # a learning rate of 0: the same weights, and so the same choices, in every variant
    plain = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "gradient_checkpointing": False}
    plain |= {"learning_rate": 0.0, "max_steps": 3}
    checkpointed = {**plain, "gradient_checkpointing": True}
    found = []
    for options in (
        plain,
        {**plain, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        checkpointed,
        {**checkpointed, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {**plain, "eval_strategy": "steps", "eval_steps": 1},
    ):
        callback = ActivationBudgetCallback(2, schedule="constant")
        run = trainer(llama_folder, tmp_path / str(len(found)), callback, config(), **options)
        run.train()
        found.append(expert_usage(run.model))
        assert next(iter(routed_layers(run.model).values())).usage["default"].meter.hits.max() == 3 * 4 * 9
    for other in found[1:]:
        for name, share in found[0].items():
            torch.testing.assert_close(other[name], share, rtol=0, atol=0.03)  # rows of other batch sizes round apart


def test_the_end_leaves_a_csv_a_heat_map_and_a_table(llama_folder, tmp_path, capsys, monkeypatch):
    run = trainer(llama_folder, tmp_path / "a", ActivationBudgetCallback(2), config())
    run.train()
    usage = expert_usage(run.model)
    with open(tmp_path / "a" / "expert_usage.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["module", "top_k", *map(str, range(6))]
    assert [row[0] for row in rows] == list(usage)
    for row in rows:
        assert [float(cell) for cell in row[2:]] == pytest.approx(usage[row[0]].tolist(), abs=1e-5)
    out = capsys.readouterr().out
    assert "q_proj" in out and "expert usage written to" in out and "most used" in out
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "matplotlib is not installed" in out
    else:
        assert (tmp_path / "a" / "expert_usage.png").read_bytes().startswith(b"\x89PNG")
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg", "rich", "rich.table"):
        monkeypatch.setitem(sys.modules, name, None)
    trainer(llama_folder, tmp_path / "b", ActivationBudgetCallback(2), config()).train()
    assert (tmp_path / "b" / "expert_usage.csv").exists() and not (tmp_path / "b" / "expert_usage.png").exists()
    out = capsys.readouterr().out
    assert "matplotlib is not installed" in out and "q_proj" in out


def test_prune_below_deletes_the_unused_at_the_end(llama_folder, tmp_path, capsys):
    callback = ActivationBudgetCallback(1, prune_below=0.2)
    run = trainer(llama_folder, tmp_path / "run", callback, config())
    run.train()
    out = capsys.readouterr().out
    assert "experts deleted" in out and "changed by" in out and "a sequence of the last batch" in out
    sizes = [layer.expert_count("default") for layer in routed_layers(run.model).values()]
    assert sum(sizes) < 6 * MODULES
    run.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "adapter"), is_trainable=True)
    assert [layer.expert_count("default") for layer in routed_layers(again).values()] == sizes
    x = torch.randint(4, 24, (2, 9))
    assert torch.equal(again.eval()(x).logits, run.model.eval()(x).logits)
    # and it trains on, under a budget, through a task more
    start_task(again, "b")
    second = trainer(llama_folder, tmp_path / "second", ActivationBudgetCallback(3), model=again.train())
    second.train()
    layers = routed_layers(again).values()
    assert sum(layer.fixed_experts("default") + layer.top_k("default") for layer in layers) == 3 * MODULES
    assert all(layer.mora_B["default"].weight.any() for layer in layers)  # the second task has moved all of them


def test_a_second_run_over_pruned_experts_is_refused(llama_folder, tmp_path):
    run = trainer(llama_folder, tmp_path, ActivationBudgetCallback(1, prune_below=0.2), config())
    run.train()
    with pytest.raises(ValueError, match="experts were deleted.*Make a new trainer"):
        run.train()


def test_a_run_that_resumes_past_its_target_counts_from_there(llama_folder, tmp_path):
    def run(output, steps):
        callback = ActivationBudgetCallback(1, start=4, until=0.5)
        return trainer(llama_folder, tmp_path / output, callback, config(), save_steps=6, max_steps=steps)

    run("long", 20).train()
    run("short", 10).train(resume_from_checkpoint=str(tmp_path / "long" / "checkpoint-6"))
    rows = csv_rows(tmp_path / "short" / "expert_usage.csv")
    assert [sum(float(row[str(i)]) for i in range(6)) for row in rows] == pytest.approx([1.0] * len(rows))


def test_frozen_tasks_keep_their_k_and_count_towards_the_budget(llama_folder, tmp_path):
    model = adapted(config, top_k=2, tasks=2)
    run = trainer(llama_folder, tmp_path, ActivationBudgetCallback(4.5, start=8, until=0.5), model=model)
    run.train()
    layers = routed_layers(run.model).values()
    assert all(layer.mora_frozen_top_k["default"] == [2] for layer in layers)
    assert sum(layer.top_k("default") for layer in layers) == 35  # 4.5 = 2 + 2.5
    assert run.state.log_history[-2]["active_experts"] == pytest.approx(4.5, abs=0.02)
    assert run.state.log_history[0]["active_experts"] == pytest.approx(8, abs=0.02)
    again = trainer(llama_folder, tmp_path, ActivationBudgetCallback(2), model=run.model)
    with pytest.raises(ValueError, match="`target` is 2 .* can have 3 to 8 .frozen blocks alone wake 2"):
        again.train()


def test_dpo_s_reference_keeps_its_own_k_and_stays_uncounted(llama_folder, tmp_path):
    prompts = texts()["text"]
    pairs = {"prompt": prompts, "chosen": [" yes"] * 24, "rejected": [" no big cat"] * 24}
    run = trl_trainer("DPO", None, llama_folder, tmp_path, pairs, get_peft_model(quantized(llama_folder), config()))
    run.add_callback(ActivationBudgetCallback(2))
    run.train()
    assert {layer.top_k("default") for layer in routed_layers(run.model).values()} == {2}
    assert {layer.top_k("ref") for layer in routed_layers(run.model, "ref").values()} == {6}
    assert run.model.peft_config["ref"].top_k_pattern == {}
    assert all(set(layer.usage) == {"default"} for layer in routed_layers(run.model).values())
    tokens = [entry["num_tokens"] for entry in run.state.log_history if "loss" in entry][-1]
    meter = next(iter(routed_layers(run.model).values())).usage["default"].meter
    assert {int(meter.hits[place.stop - 1]) for place in meter.places.values()} == {int(tokens)}


def run_beside_one(folder, tmp_path, rank: int, world: int) -> None:
    """One run of `world` processes over four rows a step; K, sizes and logs into WORLD-RANK.json."""
    callback = ActivationBudgetCallback(2, interval=2, rebalance=True, prune_below=0.05)
    run = trainer(
        folder, f"{tmp_path}/{world}-{rank}", callback, config(), model=tiny_llama(), max_steps=6,
        per_device_train_batch_size=4 // world, gradient_accumulation_steps=1,
        ddp_backend="gloo" if world > 1 else None,
    )  # fmt: skip
    run.train()
    layers = routed_layers(run.model).values()
    found = [[layer.top_k("default") for layer in layers], [layer.expert_count("default") for layer in layers]]
    keys = ("active_experts", "usage_entropy", "dead_experts")
    found.append([[entry[key] for key in keys] for entry in run.state.log_history if "loss" in entry])
    Path(tmp_path, f"{world}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_divide_prune_and_log_like_one_with_both_batches(llama_folder, tmp_path):
    body = f"""
        from test_budget import *
        run_beside_one({llama_folder!r}, "{tmp_path}", rank, 2)
        """
    ranks(body, tmp_path)
    run_beside_one(llama_folder, tmp_path, 0, 1)
    first, second, alone = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("2-0", "2-1", "1-0"))
    assert first[:2] == second[:2] == alone[:2] and len(set(first[1])) > 1
    for one, two in zip(first[2], alone[2], strict=True):
        assert one == pytest.approx(two, abs=0.02)


def test_a_layer_needs_as_many_experts_as_its_usage_s_entropy_says():
    callback = ActivationBudgetCallback(2.0, rebalance=True)
    callback._limits = {"a": 8, "b": 8}
    meter = SimpleNamespace(places=["b", "a"], entropy=torch.tensor([[3.0, 2.0], [0.0, 4.0]]))
    callback._measure_needs(meter)
    assert callback._needs == pytest.approx([1.0, math.exp(1.5)])  # of a and b
    assert not meter.entropy.any()
    with pytest.raises(ValueError, match="`adapter_name` must be"):
        ActivationBudgetCallback(2.0, adapter_name=None)
