"""A memory of general text: which texts it takes, what it holds, and that training leaves the model alone there."""

import gzip
import shutil

import pytest
import torch
from datasets import Dataset
from helpers import jsonl, losses, quantized, sft, tiny_gpt2, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig

from peft_mora import MoraConfig, start_task
from trl_callbacks import OrthogonalProjectionCallback, protect
from trl_callbacks.general_text import read, sample
from trl_callbacks.subspace import Subspace


CHAT = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} </s>{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)
TEXT = ["the cat sat on the mat", "a dog ran", "yes no yes"]
LENGTH = 32  # tokens of a sample
TURN = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr("trl_callbacks.general_text.LENGTH", LENGTH)
    monkeypatch.setattr("trl_callbacks.projection.TOKENS", 4 * LENGTH)


@pytest.fixture
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


@pytest.mark.parametrize("form", ["list", "dataset", "file", "page", "prompts", "answers"])
def test_text_comes_as_strings_records_data_set_or_file(form, tokenizer, tmp_path):
    source = {
        "list": TEXT,
        "dataset": Dataset.from_list([{"text": text} for text in TEXT]),
        "file": str(jsonl(tmp_path / "t.jsonl", *({"text": text} for text in TEXT))),
        "page": [{"page": text} for text in TEXT],
        "prompts": [{"prompt": text[:5], "completion": text[5:]} for text in TEXT],
        "answers": [{"prompt": text.partition(" ")[0], "answer": text.partition(" ")[2]} for text in TEXT],
    }[form]
    found = [batch["input_ids"][0].tolist() for batch in read(source, tokenizer, 1000)]
    assert found == [tokenizer(text).input_ids for text in TEXT]


def test_text_is_no_longer_than_the_model_has_positions(monkeypatch, tokenizer, tmp_path):
    monkeypatch.setattr("trl_callbacks.general_text.LENGTH", 100)
    tokenizer.chat_template = CHAT
    model = tiny_gpt2()  # 64 positions
    written = sample(model, tokenizer, 256)
    assert [tuple(batch["input_ids"].shape) for batch in written] == [(2, 64), (2, 64)]
    tokenizer.chat_template = CHAT.replace("<s> {{", "<s> " + 40 * "the " + "{{")
    assert [tuple(batch["input_ids"].shape) for batch in sample(model, tokenizer, 128)] == [(2, 64)]
    assert [batch["input_ids"].shape[1] for batch in read(["the cat " * 60], tokenizer, 1000, model)] == [64]
    protect(model, ["the cat " * 60], tmp_path / "long", tokenizer=tokenizer)


def test_messages_go_through_the_chat_template(tokenizer):
    with pytest.raises(ValueError, match="no chat template"):
        read([TURN], tokenizer, 100)
    tokenizer.chat_template = CHAT
    expected = tokenizer("<s> user red </s><s> assistant blue </s>", add_special_tokens=False).input_ids
    split = [{"prompt": TURN[:1], name: TURN[1:]} for name in ("completion", "answer")]
    for source in ([TURN], [{"messages": TURN}], split[:1], split[1:]):
        assert read(source, tokenizer, 100)[0]["input_ids"].tolist() == [expected]


def test_no_more_tokens_are_read_than_asked_for(tokenizer):
    sizes = [batch["input_ids"].shape[1] for batch in read(["the " * 300, "a " * 300], tokenizer, LENGTH + 20)]
    assert sizes == [LENGTH, 20]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no text of two tokens and more"),
        ([{"label": 1}], r"Record 0 of the general text \(fields \['label'\]\) is no text"),
        ([TEXT[0], 7], r"Record 1 of the general text \(type int\)"),
        (3, "General text is texts, a data set, a file, or 'self', got 3"),
    ],
)
def test_what_is_no_text_is_refused(source, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        read(source, tokenizer, 100)


def test_a_file_that_is_not_there_and_a_line_that_is_no_json_are_named(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl.*no such file"):
        read("missing.jsonl", tokenizer, 100)
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: no JSON"):
        read(jsonl(tmp_path / "bad.jsonl", {"text": "the"}, "{oops"), tokenizer, 100)


def test_a_file_to_protect_may_have_a_byte_order_mark_or_be_gzipped_and_half_characters_are_named(tokenizer, tmp_path):
    text = '{"text": "the cat sat"}\n\n"a dog ran"\n'
    (tmp_path / "marked.jsonl").write_text(text, encoding="utf-8-sig")
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    wanted = read(["the cat sat", "a dog ran"], tokenizer, 100)
    for name in ("marked.jsonl", "packed.jsonl.gz"):
        found = read(tmp_path / name, tokenizer, 100)
        assert [batch["input_ids"].tolist() for batch in found] == [batch["input_ids"].tolist() for batch in wanted]
    (tmp_path / "wide.jsonl").write_text(text, encoding="utf-16")
    (tmp_path / "half.jsonl").write_text(text + '{"text": "\\ud83d"}\n')
    for name, message in (("wide.jsonl", "1: the text is UTF-16"), ("half.jsonl", r"4: \\ud83d is half a character")):
        with pytest.raises(ValueError, match=rf"{name}:{message}"):
            read(tmp_path / name, tokenizer, 100)


def test_the_model_samples_the_same_text_each_time_and_nothing_else_changes(tokenizer):
    model = tiny_llama().train()
    state = torch.random.get_rng_state()
    (one,), (two,) = (sample(model, tokenizer, 16 * LENGTH) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert torch.equal(one["input_ids"], two["input_ids"]) and one["input_ids"].shape == (16, LENGTH)
    assert one["input_ids"].unique().numel() > 40  # of 64 words: text, not one token again and again
    assert set(one["input_ids"][:, 0].tolist()) == {tokenizer.bos_token_id} and bool(one["attention_mask"].all())
    assert not torch.equal(sample(model, tokenizer, 16 * LENGTH, seed=1)[0]["input_ids"], one["input_ids"])


def test_what_is_sampled_is_the_models_own_text_whatever_it_generates_by(tokenizer):
    model = tiny_llama()
    plain = sample(model, tokenizer, 2 * LENGTH)
    own = model.generation_config
    own.repetition_penalty, own.num_beams, own.no_repeat_ngram_size = 5.0, 2, 1
    for one, other in zip(sample(model, tokenizer, 2 * LENGTH), plain, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert model.generation_config is own
    given = mora(model)
    given.generation_config = GenerationConfig(do_sample=False, max_new_tokens=3)
    for one, other in zip(sample(given, tokenizer, 2 * LENGTH), plain, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
    assert given.generation_config.max_new_tokens == 3


def test_a_folder_with_other_files_is_refused_before_a_step(llama_folder, tmp_path):
    """Where the run's memory goes in the end."""
    notes = tmp_path / "one" / "subspace" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    trainer = trainer_of(llama_folder, tmp_path / "one", OrthogonalProjectionCallback())
    with pytest.raises(FileExistsError, match="holds 'notes.txt', which would be deleted"):
        trainer.train()
    assert trainer.state.global_step == 0 and notes.read_text() == "mine"


def test_half_of_what_a_chat_model_samples_is_conversations(tokenizer):
    tokenizer.chat_template = CHAT
    text, conversations = sample(tiny_llama(), tokenizer, 32 * LENGTH)
    assert text["input_ids"].shape == conversations["input_ids"].shape == (16, LENGTH)
    before = tokenizer("<s> user", add_special_tokens=False).input_ids
    between = tokenizer("</s><s> assistant", add_special_tokens=False).input_ids
    places = set()
    for ids in conversations["input_ids"].tolist():
        found = [i for i in range(LENGTH) if ids[i : i + len(between)] == between]
        assert ids[: len(before)] == before and found
        places.add(found[0])
    assert len(places) > 1 and bool(conversations["attention_mask"].all())  # turns of several lengths, no padding


@pytest.mark.parametrize("adapted", [False, True])
def test_a_memory_holds_the_inputs_of_every_linear_layer_but_the_head(adapted, llama_folder, tokenizer, tmp_path):
    model = quantized(llama_folder)
    names = {name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    memory = protect(model, TEXT, tmp_path / "general", energy=0.9)
    assert {name for group in memory.groups.values() for name in group} == names and len(names) == 14
    assert memory.tasks[0]["tokens"] == sum(len(tokenizer(text).input_ids) for text in TEXT)
    again = Subspace.load(tmp_path / "general")
    assert again.tasks == memory.tasks and all(torch.equal(again.right[g], V) for g, V in memory.right.items())
    if adapted:
        only = protect(model, TEXT, tmp_path / "q", tokenizer=tokenizer, adapter_name="default", whole=True)
        assert {F.shape for F in only.seen.values()} == {(64, 64)}
        assert set(only.groups) == {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}
        with pytest.raises(ValueError, match=r"adapter_name.*\['default'\]"):
            protect(model, TEXT, tmp_path / "q", tokenizer=tokenizer, adapter_name="other")


def test_joined_memories_hold_what_each_of_them_does(llama_folder, tmp_path):
    model = quantized(llama_folder)
    one, two = (protect(model, [text], tmp_path / text[:1], energy=0.8) for text in TEXT[:2])
    both = Subspace.join([one, two])
    assert [task["text"] for task in both.tasks] == [one.tasks[0]["text"], two.tasks[0]["text"]]
    for group, V in both.right.items():
        torch.testing.assert_close(V.T @ V, torch.eye(V.shape[1]), atol=1e-5, rtol=0)
        for single in (one, two):
            assert (single.right[group] - V @ (V.T @ single.right[group])).norm() < 1e-3
            seen = single.old_covariance(group)
            assert (V.T @ seen @ V).trace() > 0.79 * seen.trace()
        assert 1 < both.weights[group] < 2
        assert float(both.old_covariance(group).trace()) == pytest.approx(both.weights[group], rel=1e-4)
    small = protect(
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])), TEXT, tmp_path / "q", adapter_name="default"
    )
    with pytest.raises(ValueError, match="group the modules that share an input differently"):
        Subspace.join([one, small])
    other = Subspace("gradients", one.model)
    with pytest.raises(ValueError, match="'inputs' and 'gradients' cannot be joined"):
        Subspace.join([one, other])


def mora(base):
    torch.manual_seed(0)
    return get_peft_model(base, MoraConfig(r=4, routing="dense", target_modules="all-linear"))


def trainer_of(llama_folder, output, callback, model=None, **arguments):
    """Six large steps, of a MORA over NF4 if nothing else is given."""
    model = mora(quantized(llama_folder)) if model is None else model
    return sft(model, llama_folder, output, callbacks=[callback], **{"save_strategy": "no", **arguments})


@pytest.mark.parametrize("how", ["memory", "callback"])
def test_the_first_task_leaves_protected_text_as_it_was(how, llama_folder, tokenizer, tmp_path):
    ids = tokenizer(TEXT[0], return_tensors="pt").input_ids
    other = torch.randint(4, 24, (1, 40), generator=torch.Generator().manual_seed(1))
    base = tiny_llama()
    with torch.no_grad():
        before, before_other = base(ids).logits, base(other).logits
    if how == "memory":
        protect(base, TEXT, tmp_path / "general", tokenizer=tokenizer, energy=1.0)
        callback = OrthogonalProjectionCallback(tmp_path / "general", energy=1.0)
    else:
        callback = OrthogonalProjectionCallback(protect=TEXT, energy=1.0)
    trainer = trainer_of(llama_folder, tmp_path / "one", callback, mora(base))
    trainer.train()
    with torch.no_grad():
        after, after_other = trainer.model.eval()(ids).logits, trainer.model(other).logits
    assert (after_other - before_other).norm() > 0.05 * before_other.norm()
    assert (after - before).norm() < 1e-4 * before.norm()
    tasks = Subspace.load(tmp_path / "one" / "subspace").tasks
    assert [task["name"] for task in tasks] == ["general text", "initial"]


def test_max_rank_counts_the_text_and_a_memory_that_is_full_is_said(llama_folder, tmp_path):
    callback = OrthogonalProjectionCallback(protect=TEXT, energy=None, max_rank=4)
    with pytest.warns(UserWarning, match="max_rank=4 is reached .* 8 of 8 module inputs.*not be protected"):
        trainer_of(llama_folder, tmp_path / "one", callback).train()
    for folder in ("protected", "subspace"):
        assert {V.shape[1] for V in Subspace.load(tmp_path / "one" / folder).right.values()} == {4}
    with pytest.raises(ValueError, match="max_rank"):
        OrthogonalProjectionCallback(source="past_adapters", max_rank=4)


def test_a_text_that_the_memory_holds_is_not_added_again_and_another_is(llama_folder, tmp_path):
    trainer = trainer_of(llama_folder, tmp_path / "one", OrthogonalProjectionCallback(protect="self", energy=0.5))
    trainer.train()
    for name, text in (("two", "self"), ("three", TEXT)):
        start_task(trainer.model, name)
        callback = OrthogonalProjectionCallback(tmp_path / "one" / "subspace", protect=text, energy=0.5)
        trainer_of(llama_folder, tmp_path / name, callback, trainer.model).train()
        texts = [task.get("text") for task in Subspace.load(tmp_path / name / "protected").tasks]
        assert texts[:2] == ["self", None] and len(texts) == (2 if text == "self" else 3)


def test_resumed_run_is_the_unbroken_one_though_the_text_is_not_seen_again(llama_folder, tmp_path):
    def trainer(output=tmp_path):
        callback = OrthogonalProjectionCallback(protect=TEXT, energy=0.8)
        return trainer_of(llama_folder, output, callback, save_strategy="steps")

    whole, again, elsewhere, late = trainer(), trainer(), trainer(tmp_path / "elsewhere"), trainer()
    whole.train()
    for resumed in (again, elsewhere):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert losses(resumed)[-3:] == losses(whole)[-3:]
        for (name, one), two in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(one, two), name
    shutil.rmtree(tmp_path / "protected")
    with pytest.raises(
        FileNotFoundError, match="`protect` is neither in .* nor in .*: its folder 'protected' is missing"
    ):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
