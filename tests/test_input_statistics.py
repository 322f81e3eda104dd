"""A run that writes what its adapter saw: the same as looking afterwards, whole, resumed, and refused in advance."""

import warnings
from pathlib import Path

import pytest
import torch
from helpers import METHODS, WORDS, At, lora_config, quantized, ranks, sft, tiny_llama
from shared.training import make_trainer
from test_projection import ScheduleFree
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from peft_mora.merging import collect_inputs, merge_adapters
from peft_mora.merging.inputs import FILE, Statistics
from trl_callbacks import DriftCallback, InputStatisticsCallback
from trl_callbacks.input_statistics import prompts_of


RECORDS = [
    {"prompt": " ".join(WORDS[i : i + 2 + i % 3]), "answer": ("red mat", "blue")[i % 2]} for i in range(len(WORDS) - 4)
]
MERGEABLE = {"lora": lora_config, "mora-dense": METHODS["mora-dense"], "lori": METHODS["lori"]}


def run(folder, output, config, *callbacks, resume=None, **arguments):
    """Two steps on records of prompt and answer, over NF4, and saved."""
    trainer = make_trainer(
        quantized(folder), AutoTokenizer.from_pretrained(folder), RECORDS, output, 2, 4, 1e-2,
        peft_config=config(target_modules=["q_proj", "up_proj", "down_proj"], r=4, task_type="CAUSAL_LM"),
        callbacks=callbacks or [InputStatisticsCallback(8)], **arguments,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    return trainer


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_run_writes_what_looking_at_its_adapter_afterwards_finds(name, llama_folder, tmp_path):
    output, eye = tmp_path / name, {size: torch.eye(size, dtype=torch.float64) for size in (64, 128)}
    run(llama_folder, output, MERGEABLE[name])
    written = Statistics.load(output)
    assert written.prompts == len(RECORDS)
    seen = collect_inputs(
        quantized(llama_folder), [r["prompt"] for r in RECORDS], output, AutoTokenizer.from_pretrained(llama_folder),
        directions=8,
    )  # fmt: skip
    assert (written.groups, written.tokens) == (seen.groups, seen.tokens)
    for group, found in written.spreads.items():
        want = seen.spreads[group].times(eye[len(found.Q)])
        assert (found.times(eye[len(found.Q)]) - want).norm() < 1e-2 * want.norm(), group


def test_folders_of_such_runs_merge_in_one_pass_without_a_model(llama_folder, tmp_path):
    for name in ("lora", "lori"):
        run(llama_folder, tmp_path / name, MERGEABLE[name], save_strategy="steps", save_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = merge_adapters([tmp_path / "lora", tmp_path / "lori"], rank=4, output=tmp_path / "merged")
    assert report.rule == "inputs" and all(a.output_error is not None for a in report.adapters)
    assert (tmp_path / "lora" / FILE).stat().st_size < 4 * (2 * 9 * 64 + 2 * 9 * 128) + 8192  # 16 bits a number; names
    before = Statistics.load(tmp_path / "lora")
    (tmp_path / "lora" / FILE).unlink()
    run(llama_folder, tmp_path / "lora", lora_config, resume=str(tmp_path / "lora/checkpoint-1"))
    again = Statistics.load(tmp_path / "lora")
    assert (again.prompts, again.tokens, again.groups) == (before.prompts, before.tokens, before.groups)
    for group, found in before.spreads.items():
        torch.testing.assert_close(found.values, again.spreads[group].values, rtol=1e-3, atol=1e-4)


def test_prompts_end_where_something_is_learnt_and_records_of_one_row_are_told_apart():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 0], [9, 4, 5, 6, 7]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]),
        "labels": torch.tensor([[-100, -100, 7, 8, -100], [9, 4, 5, 6, 7]]),
    }
    assert [prompt.tolist() for prompt in prompts_of(batch)] == [[5, 6], [9, 4, 5, 6, 7]]
    flat = {
        "input_ids": torch.tensor([[5, 6, 7, 9, 4]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1]]),
        "labels": torch.tensor([[-100, -100, 7, -100, 4]]),
    }
    assert [prompt.tolist() for prompt in prompts_of(flat)] == [[5, 6], [9]]


def test_labels_of_rows_say_nothing_of_tokens():
    batch = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 7], [9, 4, 0]]), "labels": torch.tensor([0, 1, 1])}
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    assert [prompt.tolist() for prompt in prompts_of(batch)] == [[5, 6, 7], [5, 6, 7], [9, 4]]


@pytest.mark.parametrize("evaluated", [False, True])
def test_the_file_is_of_the_weights_that_a_schedule_free_optimizer_s_run_saves(evaluated, llama_folder, tmp_path):
    """Whether or not it is evaluated in between, which puts the weights that were stepped aside."""
    for name in ("one", "two"):
        callback, output = InputStatisticsCallback(4, prompts=4), tmp_path / name
        lora = lora_config(target_modules=["q_proj"], r=2, task_type="CAUSAL_LM")
        trainer = sft(tiny_llama(), llama_folder, output, lora, [callback], max_steps=2, save_strategy="no")
        trainer.optimizer = ScheduleFree(trainer.model, "z")
        trainer.train()
        if evaluated:
            trainer.evaluate()
        trainer.save_model()
    assert merge_adapters([tmp_path / "one", tmp_path / "two"], rank=2).rule == "inputs"


class Merge(TrainerCallback):
    """What a user may do at a run's end."""

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self.found = [path.name for path in Path(args.output_dir).glob("*.safetensors")]
        model.merge_adapter()
        model.unmerge_adapter()


def test_the_file_is_of_the_weights_that_a_callback_behind_it_has_brought_back(llama_folder, tmp_path):
    text = ["the cat sat on the mat", "a dog ran under the log"]
    drift, merging = DriftCallback(text, interval=50, tokens=32, max_kl=1e-6), Merge()
    run(llama_folder, tmp_path, lora_config, InputStatisticsCallback(4, prompts=4), At(1, "stop"), drift, merging)
    assert drift._found["kept"] < 1 and merging.found == [FILE]  # which the user has put behind both
    assert Statistics.load(tmp_path).prompts == 4


def test_an_adapter_that_transformers_has_put_inside_is_refused_before_the_first_step(llama_folder, tmp_path):
    model = tiny_llama()
    model.add_adapter(lora_config(target_modules=["q_proj"], r=2))
    rows = [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}] * 4
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[InputStatisticsCallback()])
    with pytest.raises(ValueError, match="PEFT model, and this one has its adapter inside.*collect_inputs"):
        trainer.train()
    assert trainer.state.global_step == 0


class Break(InputStatisticsCallback):
    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).fill_(torch.nan)
        super().on_train_end(args, state, control, model=model, **kwargs)


@pytest.mark.slow
def test_two_processes_end_alike_where_one_has_found_the_adapter_to_have_diverged(llama_folder, tmp_path):
    body = f"""
        from test_input_statistics import *
        with pytest.raises(ValueError, match="not finite.*The adapter is in .*stopped-2"):
            run({llama_folder!r}, "{tmp_path}/out", lora_config, Break(), ddp_backend="gloo")
        """
    ranks(body, tmp_path)
    assert (tmp_path / "out/stopped-2/adapter_model.safetensors").exists()


def test_an_adapter_that_diverged_is_kept_and_no_statistics_are_written(llama_folder, tmp_path):
    with pytest.raises(ValueError, match=r"not finite.*The adapter is in .*stopped-2"):
        run(llama_folder, tmp_path / "out", lora_config, Break())
    assert (tmp_path / "out/stopped-2/adapter_model.safetensors").exists() and not (tmp_path / "out" / FILE).exists()


def test_an_adapter_is_kept_where_its_statistics_cannot_be_written(llama_folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Statistics, "save", full)
    with pytest.raises(ValueError, match=r"OSError: No space left on device\. The adapter is in .*stopped-2"):
        run(llama_folder, tmp_path / "out", lora_config)
    assert (tmp_path / "out/stopped-2/adapter_model.safetensors").exists()
