"""What only MTLLORA does: rows of several tasks in one batch, from a data set's column to the layers."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from helpers import METHODS, WORDS, adapted, lora_config, losses, quantized, sft, tiny_llama, tiny_t5
from peft import PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from test_mora import net
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from peft_mora import MtlLoraConfig, set_task
from peft_mora.base import AdapterLinear
from peft_mora.export import exact_lora
from peft_mora.lora_file import read_lora
from peft_mora.row_tasks import Rows
from trl_callbacks import TaskColumnCallback


config = partial(MtlLoraConfig, r=4, alpha=6, tasks=["a", "b", "c"])
TASKS = ["b", "a", "b", "c"]


def llama(base=None, **fields) -> PeftModel:
    return adapted(partial(config, **fields), base)


@pytest.fixture
def rows() -> torch.Tensor:
    """(4, 7) token ids."""
    return torch.randint(4, 24, (4, 7), generator=torch.Generator().manual_seed(5))


def reference(layer, x, tasks):
    """The rule of the module docstring, row by row; the weights as float64 leaves."""
    A, B, turn, w = (getattr(layer, f"mtllora_{name}")["default"].weight for name in ("A", "B", "turn", "w"))
    rows = []
    for row, task in zip(x, tasks, strict=True):
        t = ["a", "b", "c"].index(task) if isinstance(task, str) else task
        p = torch.softmax(w[t] / 0.3, 0)
        turned = torch.eye(4, dtype=x.dtype) + turn[4 * t : 4 * t + 4]
        up = sum(p[i] * B[:, 4 * i : 4 * i + 4] for i in range(2))
        rows.append(layer.base_layer(row) + 6 / 4 * row @ (up @ turned @ A).T)
    return torch.stack(rows)


@pytest.mark.parametrize("lean", [True, False])
@pytest.mark.parametrize("tasks", [TASKS, torch.tensor([1, 0, 1, 2]), np.array([1, 0, 1, 2]), "c"], ids=str)
def test_a_mixed_batch_equals_the_reference_in_values_and_every_gradient(tasks, lean, monkeypatch):
    monkeypatch.setattr(AdapterLinear, "lean", lean)
    model = adapted(partial(config, ups=2, temperature=0.3), net(), target_modules=["lin"])
    layer = model.base_model.model.lin
    x = torch.randn(4, 5, 13, dtype=torch.float64, requires_grad=True)
    got, want = model(x, task=tasks), reference(layer, x, ["c"] * 4 if isinstance(tasks, str) else tasks)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    upstream = torch.randn_like(got)
    assert len(wanted) == 5
    for a, b in zip(*(torch.autograd.grad(y, wanted, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_each_row_is_computed_as_if_alone_in_forward_and_generate_by_task_and_by_adapter_name(rows):
    model = llama()
    want = torch.cat([model(rows[i : i + 1], task=[task]).logits for i, task in enumerate(TASKS)])
    assert not torch.allclose(want, model(rows, task="a").logits, atol=1e-3)
    names = [f"default/{task}" for task in TASKS]
    for found in (model(rows, task=TASKS), model(rows, adapter_names=names), model.base_model.model(rows, task=TASKS)):
        torch.testing.assert_close(found.logits, want, rtol=1e-4, atol=1e-5)
    answer = partial(model.generate, max_new_tokens=4, do_sample=False, num_beams=2, num_return_sequences=2)
    alone = [answer(rows[i : i + 1], task=[task]) for i, task in enumerate(TASKS)]
    for found in (answer(rows, task=TASKS), answer(rows, adapter_names=names)[::1]):
        for i, one in enumerate(alone):
            size = one.shape[1]  # those that end early are filled up
            assert torch.equal(found[2 * i : 2 * i + 2, :size], one)
    assert "generate" not in vars(model.get_base_model())


def test_an_encoder_decoder_answers_and_learns_by_task(rows):
    model = llama(tiny_t5(), task_type="SEQ_2_SEQ_LM")
    alone = [model.generate(input_ids=rows[i : i + 1], task=[t], max_new_tokens=3) for i, t in enumerate(TASKS)]
    together = model.generate(input_ids=rows, task=TASKS, max_new_tokens=3)
    assert all(torch.equal(together[i, : one.shape[1]], one[0]) for i, one in enumerate(alone))
    model(input_ids=rows, labels=rows[:, :3].contiguous(), task=TASKS).loss.backward()


def test_a_batch_is_refused_that_does_not_say_its_tasks_or_says_them_wrongly(rows):
    model = llama()
    with pytest.raises(ValueError, match=r"serves 'a', 'b' and 'c'.*Pass task=.*TaskColumnCallback.*set_task"):
        model(rows)
    with pytest.raises(ValueError, match="Pass task="):
        model.generate(rows, max_new_tokens=2)
    for wrong in ("d", 3, -1, True):
        with pytest.raises(ValueError, match=f"Task {wrong!r} is none of this adapter's: 'a', 'b' and 'c'"):
            model(rows, task=["a", wrong, "a", "b"])
    for few in (["a", "a"], TASKS[:3]):
        with pytest.raises(ValueError, match=f"tasks of {len(few)} rows.*the batch is of shape.*one task for each"):
            model(rows, task=few)
        with pytest.raises(ValueError, match=f"tasks of {len(few)} rows.*the prompts' batch is of shape .4, 7"):
            model.generate(input_ids=rows, task=few, max_new_tokens=2)
    with pytest.raises(ValueError, match="'adapter/task'"):
        model(rows, task=TASKS, adapter_names=["default"] * 4)
    flat = adapted(config, net(), target_modules=["lin"]).base_model
    x = torch.randn(12, 13, dtype=torch.float64)
    with pytest.raises(ValueError, match="experts of a mixture"):
        flat(x, task=["a", "b"])
    set_task(model, "b")
    want = model(rows, task="b").logits
    assert torch.equal(model(rows).logits, want) and not torch.equal(model(rows, task=TASKS).logits, want)
    set_task(model, None)
    with pytest.raises(ValueError, match="Pass task="):
        model(rows)
    with pytest.raises(ValueError, match="no MTLLORA adapter named 'other'"):
        set_task(model, "a", "other")


@pytest.mark.parametrize("part", ["loss", "hidden states", "stack"])
@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_checkpointing_computes_each_of_two_forwards_again_by_its_own_tasks(rows, use_reentrant, part):
    """Whatever of the output the loss is made of, and where the stack alone is called."""

    def loss(model, task):
        if part == "stack":
            return model.base_model.model.model(input_ids=rows, task=task).last_hidden_state.square().sum()
        output = model(input_ids=rows, labels=rows, task=task, output_hidden_states=True)
        return output.loss if part == "loss" else output.hidden_states[-1].square().sum()

    model = llama().train()
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    first, second = loss(model, TASKS), loss(model, "c")
    first.backward()
    second.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    plain = llama().train()
    for task in (TASKS, "c"):
        loss(plain, task).backward()
    want = [p.grad for p in plain.parameters() if p.grad is not None]
    assert len(want) == 56
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_compiled_model_is_computed_again_by_the_tasks_of_each_forward(rows, use_reentrant):
    def grads(compiled: bool) -> list[torch.Tensor]:
        model = llama(target_modules=["q_proj", "down_proj"], default_task="a").train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        run = torch.compile(model, backend="aot_eager") if compiled else model
        first, second = (run(input_ids=rows, labels=rows, task=task).loss for task in (TASKS, "c"))
        first.backward()
        second.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.compiler.reset()
    torch.testing.assert_close(grads(True), grads(False), rtol=1e-5, atol=1e-6)


def test_a_compiled_model_without_checkpointing_is_one_graph(rows):
    torch.compiler.reset()
    model = llama(target_modules=["q_proj"]).train()
    torch.compile(model, backend="eager", fullgraph=True)(input_ids=rows, labels=rows, task="c").loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_bare_stack_does_not_go_on_with_the_tasks_of_the_forward_before(rows):
    model = llama().train()
    stack = model.base_model.model.model
    model(input_ids=rows, labels=rows, task=TASKS).loss.backward()
    for _ in range(2):
        with pytest.raises(ValueError, match="Pass task="):
            stack(rows)
        stack(rows, task=TASKS)
    model.eval()
    want = model(input_ids=rows, task=TASKS, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(stack(rows, task=TASKS).last_hidden_state, want)


def test_a_stack_that_is_checkpointed_as_a_whole_is_computed_again_by_its_own_tasks(rows):
    class Checkpointed(nn.Module):
        def __init__(self, stack):
            super().__init__()
            self.stack = stack

        def forward(self, *args, **kwargs):
            return checkpoint(self.stack, *args, use_reentrant=False, **kwargs)

    def grads(checkpointed):
        model = llama().train()
        if checkpointed:
            model.base_model.model.model = Checkpointed(model.base_model.model.model)
        model(input_ids=rows, labels=rows, task=TASKS).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    assert all(map(torch.equal, grads(True), grads(False)))


def test_the_head_is_of_the_rows_of_the_bare_stack_before_it(rows):
    model = llama(target_modules=["q_proj", "lm_head"]).base_model.model
    assert torch.equal(model.lm_head(model.model(rows, task=TASKS)[0]), model(rows, task=TASKS).logits)


@pytest.mark.parametrize("whole", ["model", "stack"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_are_checkpointed_inside_of_what_is_checkpointed_as_a_whole(rows, use_reentrant, whole):
    def grads(checkpointed: bool):
        model = llama().train()
        part = model.base_model.model if whole == "model" else model.base_model.model.model
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        call = partial(checkpoint, part, use_reentrant=False) if checkpointed else part
        call(rows, task=TASKS)[0].square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    torch.testing.assert_close(grads(True), grads(False), rtol=1e-5, atol=1e-6)


def test_a_task_that_no_row_is_of_gets_no_gradient(rows):
    model = llama().train()
    model(input_ids=rows, labels=rows, task=["a", "b", "a", "b"]).loss.backward()
    for name, parameter in model.named_parameters():
        if "turn" in name or "_w." in name:
            by_task = parameter.grad.reshape(3, -1).abs().sum(1) > 0
            assert by_task.tolist() == [True, True, False]


def test_it_merges_converts_and_exports_for_one_task_alone(rows, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "none")
    for refused in (model.merge_adapter, model.merge_and_unload, partial(convert_to_lora, model, rank=4)):
        with pytest.raises((ValueError, TypeError), match=r"Choose one first.*set_task|do not support LoRA"):
            refused()
    for refused in (partial(exact_lora, model), partial(read_lora, tmp_path / "none")):
        with pytest.raises(ValueError, match=r"No LoRA equals an MTLLORA adapter without a task.*set_task"):
            refused()
    set_task(model, "b")
    want = model(rows).logits
    model.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    assert torch.equal(again(rows).logits, want) and again.peft_config["default"].default_task == "b"
    lora, state = convert_to_lora(model, rank=4)
    plain = get_peft_model(tiny_llama(), lora).eval()
    set_peft_model_state_dict(plain, state)
    torch.testing.assert_close(plain(rows).logits, want, rtol=1e-3, atol=1e-4)
    for name, (A, B) in read_lora(tmp_path / "b").loras.items():
        module = model.base_model.model.get_submodule(name)
        torch.testing.assert_close(B @ A, module.get_delta_weight("default"))
        torch.testing.assert_close(B @ A, exact_lora(model)[name].B @ exact_lora(model)[name].A)
    model.merge_adapter()
    for same in ({}, {"task": "b"}, {"task": ["b"] * 4}):
        torch.testing.assert_close(model(rows, **same).logits, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="merged for task 'b'.*unmerge_adapter"):
        model(rows, task=TASKS)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        set_task(model, "a")
    base = model.merge_and_unload()
    with pytest.raises(TypeError, match="task"):
        torch.nn.Linear.forward(base.lm_head, rows, task="b")
    assert not base._forward_pre_hooks and not base._forward_hooks


@pytest.mark.parametrize(
    "change",
    [
        {"r": 6},
        {"alpha": 9},
        {"ups": 2},
        {"temperature": 0.2},
        {"default_task": "a"},
        {"tasks": ["b", "a"]},
        {"rank_pattern": {"lin": 2}},
        {"alpha_pattern": {"lin": 3}},
    ],
    ids=str,
)
def test_every_field_of_the_rule_has_an_effect(change):
    def output(**fields):
        model = adapted(partial(config, **{"default_task": "b", **fields}), net(), target_modules=["lin"])
        return model(torch.linspace(-1, 1, 26, dtype=torch.float64).reshape(2, 13))

    assert not torch.allclose(output(), output(**change))


def mixed(n: int = 24, tasks=("a", "b")):
    """A data set of sentences, each of one of the tasks."""
    from datasets import Dataset

    picks = torch.randint(0, len(WORDS), (n, 8), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [" ".join(WORDS[i] for i in row) for row in picks]
    return Dataset.from_dict({"text": texts, "task": [tasks[i % len(tasks)] for i in range(n)]})


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_over_nf4_learns_tasks_that_are_mixed_in_each_batch(llama_folder, tmp_path, checkpointing):
    fields = {"gradient_checkpointing": checkpointing, "max_steps": 3, "weight_decay": 0.0, "save_strategy": "no"}
    trainer = sft(
        quantized(llama_folder), llama_folder, tmp_path, config(target_modules="all-linear"), [TaskColumnCallback()],
        train_dataset=mixed(), eval_dataset=mixed(4), **fields,
    )  # fmt: skip
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.evaluate()
    trainer.train()
    assert len(losses(trainer)) == 3 and losses(trainer)[-1] < losses(trainer)[0]
    for name, tensor in trainer.model.state_dict().items():
        if "_turn" in name or "_w." in name:  # of the third task there were no rows
            moved = (tensor != before[name]).reshape(3, -1).any(1)
            assert moved.tolist()[2] is False and ("_w." in name or moved.tolist()[:2] == [True, True]), name


def preferences(name, folder, output, callback=None, model=None, **arguments):
    """TRL's `name`Trainer on two tasks, with the callback, or another."""
    import trl
    from datasets import Dataset

    data = {"prompt": ["the cat"] * 4, "task": ["a", "b"] * 2}
    data |= {"DPO": {"chosen": [" sat"] * 4, "rejected": [" ran"] * 4},
             "KTO": {"completion": [" sat on"] * 4, "label": [True, False] * 2}}.get(name, {})  # fmt: skip
    arguments |= {"num_generations": 2} if name == "GRPO" else {}
    return getattr(trl, f"{name}Trainer")(
        model=model or tiny_llama(),
        args=getattr(trl, f"{name}Config")(
            str(output), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, bf16=False,
            save_strategy="no", **arguments,
        ),
        train_dataset=Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=None if model else config(target_modules=["q_proj"]),
        callbacks=[callback or TaskColumnCallback()],
        **{"reward_funcs": lambda completions, **_: [0.0 for _ in completions]} if name == "GRPO" else {},
    )  # fmt: skip


def test_kto_learns_tasks_that_are_mixed_in_each_batch(llama_folder, tmp_path):
    trainer, seen = preferences("KTO", llama_folder, tmp_path), []
    layer = next(module for module in trainer.model.modules() if isinstance(module, AdapterLinear))
    layer.register_forward_hook(lambda layer, *_: seen.append(layer.row_tasks.rows.names))
    trainer.train()
    assert seen and all(sorted(names) == ["a", "a", "b", "b"] for names in seen)


def test_kto_s_reference_is_not_asked_for_the_default_task_s_answers(llama_folder, tmp_path):
    learnt = adapted(config, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="precompute_ref_log_probs asks the reference adapter without the column"):
        preferences("KTO", llama_folder, tmp_path, model=learnt, precompute_ref_log_probs=True)


def test_a_callback_that_comes_after_the_trainer_is_refused_as_training_begins(llama_folder, tmp_path):
    adapter = config(target_modules=["q_proj"], default_task="b")
    trainer = sft(tiny_llama(), llama_folder, tmp_path, adapter, train_dataset=mixed())
    trainer.add_callback(TaskColumnCallback())
    with pytest.raises(ValueError, match="TaskColumnCallback has to be given to the trainer's constructor"):
        trainer.train()


@pytest.mark.parametrize("name", ["DPO", "GRPO"])
def test_trainers_whose_batches_have_other_rows_than_the_records_are_refused(name, llama_folder, tmp_path):
    match = f"one row for each record, as SFTTrainer and KTOTrainer.*{name}Trainer makes others.*default_task"
    with pytest.raises(ValueError, match=match):
        preferences(name, llama_folder, tmp_path)


def test_the_column_is_refused_where_it_cannot_reach_the_layers(llama_folder, tmp_path):
    def trainer(adapter=None, **arguments):
        adapter = adapter or config(target_modules=["q_proj"])
        arguments = {"train_dataset": mixed(), **arguments}
        return sft(tiny_llama(), llama_folder, tmp_path, adapter, [TaskColumnCallback()], **arguments)

    with pytest.raises(ValueError, match=r"use peft_config=MtlLoraConfig"):
        trainer(lora_config(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no column 'task'; it has text"):
        trainer(train_dataset=mixed().remove_columns("task"))
    with pytest.raises(ValueError, match=r"'task' has \['a', None\].*the name of its task"):
        trainer().data_collator([{"input_ids": [4, 5], "task": task} for task in ("a", None)])
    with pytest.raises(ValueError, match="Task 'z' is none of this adapter's"):
        trainer(train_dataset=mixed(tasks=("a", "z")))
    beside = get_peft_model(quantized(llama_folder), config(target_modules=["q_proj"]))
    beside.add_adapter("other", config(tasks=["x", "y"], target_modules=["q_proj"]))
    sft(beside, llama_folder, tmp_path, None, [TaskColumnCallback()], train_dataset=mixed())  # "other" does not act
    for packed in (
        {"packing": True, "packing_strategy": "wrapped", "max_length": 8},
        {"padding_free": True, "max_length": None},
    ):
        with pytest.raises(ValueError, match="packing=False and padding_free=False"):
            trainer(**packed)
    with pytest.raises(ValueError, match="eval_packing=False, or leave the evaluation out"):
        trainer(eval_packing=True, eval_dataset=mixed(4))
    without = sft(tiny_llama(), llama_folder, tmp_path, config(target_modules=["q_proj"]), train_dataset=mixed())
    with pytest.raises(ValueError, match="TaskColumnCallback"):
        without.train()
    assert METHODS["mtllora"]().default_task == "b"


def test_a_merged_task_answers_for_no_other():
    model = adapted("mtllora")
    tasks = model.peft_config["default"].tasks
    ids = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    own = model.peft_config["default"].default_task
    model.merge_adapter()
    with torch.no_grad(), pytest.raises(ValueError, match="merged"):
        model(input_ids=ids, task=next(task for task in tasks if task != own))


def test_a_task_s_number_may_be_numpy_s():
    model = adapted("mtllora")
    ids = torch.randint(4, 60, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids, task=[1, 0]).logits
        assert torch.equal(model(input_ids=ids, task=[np.int64(1), np.int64(0)]).logits, want)


@pytest.mark.parametrize("one", [np.int64(1), torch.tensor(1), np.array(1)])
def test_one_task_for_all_rows_may_be_numpy_s_or_torch_s(one):
    model = adapted("mtllora")
    ids = torch.randint(4, 60, (3, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(input_ids=ids, task=1).logits
        assert not torch.equal(model(input_ids=ids, task=0).logits, want)
        assert torch.equal(model(input_ids=ids, task=one).logits, want)
    assert Rows([]).places(["a", "b"], torch.device("cpu")).tolist() == []  # of a batch without rows
