"""LoriCalibrationCallback inside one SFTTrainer run over NF4."""

import gc
from weakref import ref

import pytest
import torch
from helpers import At, losses, quantized, randomize, sft, tiny_llama
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_mora import LoriConfig
from trl_callbacks import LoriCalibrationCallback


def trainer(folder, output):
    torch.manual_seed(0)
    config, callback = LoriConfig(r=4, target_modules="all-linear"), LoriCalibrationCallback(0.75, calibration_steps=3)
    return sft(quantized(folder), folder, output, config, [callback], save_steps=2)


def test_dense_then_sparse_in_one_run(llama_folder, tmp_path, inputs):
    run = trainer(llama_folder, tmp_path / "run")
    dense = run.model.get_nb_trainable_parameters()[0]
    run.train()
    config = run.model.peft_config["default"]
    kept = run.model.get_nb_trainable_parameters()[0]
    assert config.sparsity == 0.75 and kept == round(0.25 * dense) == sum(config.kept_entries.values())
    trained = {id(p) for p in run.model.parameters() if p.requires_grad}
    assert {id(p) for group in run.optimizer.param_groups for p in group["params"]} == trained
    state = run.optimizer.state
    assert {id(p) for p in state} == trained  # nothing of the dense run is left
    assert all(s["exp_avg"].numel() == p.numel() for p, s in state.items())
    assert {int(s["step"]) for s in state.values()} == {3}  # three of the six steps
    assert any(p.abs().sum() > 0 for p in run.model.parameters() if p.requires_grad)
    run.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(quantized(llama_folder), str(tmp_path / "adapter")).eval()
    assert torch.equal(again(inputs).logits, run.model.eval()(inputs).logits)


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_on_either_side_of_the_switch_repeats_the_run(llama_folder, tmp_path, step):
    whole = trainer(llama_folder, tmp_path / "whole")
    whole.train()
    resumed = trainer(llama_folder, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert losses(resumed)[-(6 - step) :] == losses(whole)[-(6 - step) :]
    want = whole.model.state_dict()
    got = resumed.model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[key], want[key]) for key in want if "lori_" in key)


def plain(folder, output, *others, **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), LoriConfig(r=4, target_modules="all-linear"))
    callbacks = [LoriCalibrationCallback(0.75, calibration_steps=3), *others]
    return sft(model, folder, output, callbacks=callbacks, **{"save_strategy": "no", **kwargs})


def test_it_keeps_no_weights_of_a_model_that_is_gone(llama_folder, tmp_path):
    run = plain(llama_folder, tmp_path)
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, LoriCalibrationCallback))
    run.train()
    held = ref(next(p for n, p in run.model.named_parameters() if "lori_B" in n))
    del run
    gc.collect()
    assert callback._weights and held() is None


def test_a_trained_adapter_is_refused_for_it_would_start_from_nothing(llama_folder, tmp_path, inputs):
    run = plain(llama_folder, tmp_path)
    randomize(run.model)
    before = run.model(inputs).logits
    with pytest.raises(ValueError, match="trained already.*sparsify.*without this callback"):
        run.train()
    assert torch.equal(run.model(inputs).logits, before)


def test_a_run_that_is_stopped_before_the_switch_says_that_the_adapter_is_dense(llama_folder, tmp_path):
    run = plain(llama_folder, tmp_path, At(2, "stop"))
    with pytest.raises(ValueError, match="stopped at step 2, before the switch at 3: the adapter is dense"):
        run.train()
    kept = load_file(tmp_path / "stopped-2" / "adapter_model.safetensors")  # nothing that was learnt is lost
    assert any(tensor.any() for name, tensor in kept.items() if "lori_B" in name)


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_that_begins_anew_with_a_smaller_batch_switches_once(step, llama_folder, tmp_path, capsys):
    out = At(step, "memory")
    run = plain(llama_folder, tmp_path, out, auto_find_batch_size=True)
    run.train()
    assert out.done and run.state.global_step == 6
    assert run.model.peft_config["default"].sparsity == 0.75
    assert capsys.readouterr().out.count("step 3: ") == 1
    with pytest.raises(ValueError, match="in an earlier train.*remove_callback"):
        run.train()


def test_a_trainer_that_would_step_the_weights_of_its_last_run_is_refused(llama_folder, tmp_path):
    run = plain(llama_folder, tmp_path, At(3, "interrupt"), save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    with pytest.raises(ValueError, match="optimizer is of an earlier train.*Make a new trainer, and resume with it"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_calibration_that_saw_nan_or_no_data_says_so_and_leaves_the_adapter_dense(llama_folder, tmp_path):
    diverged, empty = (trainer(llama_folder, tmp_path / name) for name in ("diverged", "empty"))
    diverged.model.get_input_embeddings().weight.data[5] = float("nan")
    empty.train_dataset = empty.train_dataset.select([])
    for run, message in ((diverged, "not finite: the calibration run has diverged"), (empty, "num_samples=0")):
        with pytest.raises(ValueError, match=message):
            run.train()
        assert run.model.peft_config["default"].sparsity is None


def test_resuming_a_dense_run_past_the_switch_is_refused(llama_folder, tmp_path):
    dense = trainer(llama_folder, tmp_path / "dense")
    dense.remove_callback(LoriCalibrationCallback)
    dense.train()
    with pytest.raises(ValueError, match="resumes at step 4, after the switch at 3"):
        trainer(llama_folder, tmp_path / "x").train(resume_from_checkpoint=str(tmp_path / "dense" / "checkpoint-4"))


def test_what_it_is_to_start_from_is_looked_for_before_the_first_step(llama_folder, tmp_path):
    config = LoriConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(tiny_llama(), config)
    model.add_adapter("other", LoriConfig(r=4, seed=7, target_modules=["q_proj"]))
    model.set_adapter("default")
    for onto, message in (
        ("nope", r"`onto` is 'nope', and the model has no such LORI adapter beside 'default' \(it has 'other'\)"),
        ("default", "no such LORI adapter beside 'default'"),
        ("other", "another projection A"),
    ):
        run = sft(model, llama_folder, tmp_path, callbacks=[LoriCalibrationCallback(0.5, 3, onto=onto)])
        with pytest.raises(ValueError, match=message):
            run.train()
        assert run.state.global_step == 0
    with pytest.raises(ValueError, match="`onto` must be"):
        LoriCalibrationCallback(onto=3)
    with pytest.raises(ValueError, match="`adapter_name` must be"):
        LoriCalibrationCallback(adapter_name=None)


def test_a_run_as_long_as_the_calibration_is_refused_before_its_first_step(llama_folder, tmp_path):
    run = sft(quantized(llama_folder), llama_folder, tmp_path, LoriConfig(r=4, target_modules="all-linear"),
              [LoriCalibrationCallback(0.75, calibration_steps=3)], max_steps=3)  # fmt: skip
    with pytest.raises(ValueError, match="calibration_steps"):
        run.train()
    assert run.state.global_step == 0
