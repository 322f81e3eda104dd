"""The reader of the recipes: every form and place of data, what it says, and what it refuses with which words."""

import json
import subprocess
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict
from helpers import RECIPES
from shared import data
from shared.embedded_tasks import make_task
from shared.lm_eval_tasks import write_lm_eval_perplexity
from transformers import AutoTokenizer


CHAT = [{"role": "user", "content": "is the dog red"}, {"role": "assistant", "content": "no"}]
FORMS = {
    "prompt-answer": (
        {"prompt": "is the cat big", "answer": "yes "},
        {"prompt": "is the cat big", "completion": " yes"},
    ),
    "prompt-completion": ({"prompt": "the cat", "completion": " sat"}, {"prompt": "the cat", "completion": " sat"}),
    "chat-completion": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"prompt": CHAT[:1], "completion": CHAT[1:]}),
    "messages": ({"messages": CHAT}, {"messages": CHAT}),
    "messages-and-prompt": ({"prompt": "is the dog red", "messages": CHAT}, {"messages": CHAT}),
    "text": ({"text": "the cat sat on the mat"}, {"text": "the cat sat on the mat"}),
}


def jsonl(path, *records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_a_jsonl_file_and_a_folder_with_one_give_what_the_trainer_takes(form, tmp_path):
    record, expected = form
    file = jsonl(tmp_path / "train.jsonl", record, {**record, "id": 7})
    for source in (file, str(file), tmp_path):
        dataset = data.read_dataset(source)
        assert list(dataset) == [expected] * 2


def test_a_folder_of_datasets_gives_what_the_trainer_takes(form, tmp_path):
    record, expected = form
    whole = DatasetDict(train=Dataset.from_list([record] * 3), test=Dataset.from_list([record]))
    whole.save_to_disk(tmp_path / "dict")
    whole["train"].save_to_disk(tmp_path / "single")
    assert list(data.read_dataset(tmp_path / "dict")) == [expected] * 3
    assert list(data.read_dataset(tmp_path / "dict", "test")) == [expected]
    assert list(data.read_dataset(tmp_path / "single")) == [expected] * 3
    with pytest.raises(ValueError, match="no split 'dev', but train, test"):
        data.read_dataset(tmp_path / "dict", "dev")


def test_a_name_goes_to_the_hub_with_its_split_and_configuration(form, monkeypatch):
    record, expected = form
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list([record])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(data.read_dataset("someone/set", "validation", "en")) == [expected]
    assert asked == [("someone/set", "en", "validation")]


def test_a_folder_of_csv_files_is_left_to_datasets(tmp_path):
    (tmp_path / "train.csv").write_text("text\nthe cat sat\n")
    assert list(data.read_dataset(tmp_path)) == [{"text": "the cat sat"}]


def test_an_embedded_task_is_read_by_its_name():
    dataset = data.read_dataset("helpdesk", "test")
    first = make_task("helpdesk")["test"][0]
    assert len(dataset) == 100
    assert dataset[0] == {"prompt": first["prompt"], "completion": " " + first["answer"]}


def test_it_says_count_columns_and_one_sample(tmp_path, capsys):
    data.read_dataset(jsonl(tmp_path / "train.jsonl", {"id": 3, "text": "the cat " * 100}, {"text": "a dog"}))
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'train.jsonl'}: 2 records, columns id, text"
    assert second.startswith('  the first: {"text": "the cat the cat') and len(second) < 330


GOOD = {"prompt": "p", "answer": "a"}
BAD = {
    "an empty line": (GOOD, "", "empty record; delete the line"),
    "half a line": (GOOD, '{"prompt": "p", "ans', "not JSON"),
    "a list": (GOOD, '["p", "a"]', "is no object"),
    "no label": (GOOD, {"prompt": "p"}, "'answer' is missing or empty"),
    "an empty label": (GOOD, {"prompt": "p", "answer": " "}, "'answer' is missing or empty"),
    "a null label": (GOOD, {"prompt": "p", "answer": None}, "'answer' is missing or empty"),
    "a label that is a number": (GOOD, {"prompt": "p", "answer": 3}, "write a non-empty string"),
    "an empty prompt": (GOOD, {"prompt": "", "answer": "a"}, "'prompt' is missing or empty"),
    "an empty text": ({"text": "t"}, {"text": "\n"}, "'text' is missing or empty"),
    "no messages": ({"messages": CHAT}, {"messages": []}, "must be messages with role and content"),
    "messages as text": ({"messages": CHAT}, {"messages": "hi"}, "'messages' is missing or empty; write a list"),
    "messages without roles": ({"messages": CHAT}, {"messages": [{"content": "hi"}]}, "must be messages with role"),
    "messages without an answer": ({"messages": CHAT}, {"messages": CHAT[:1]}, "no assistant message in 'messages'"),
    "messages with an empty answer": (
        {"messages": CHAT},
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
        "no assistant message in 'messages'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_record_is_refused_with_file_and_line(what, tmp_path):
    good, bad, message = BAD[what]
    file = jsonl(tmp_path / "train.jsonl", good, good, bad, good)
    with pytest.raises(ValueError, match="train.jsonl:3: ") as caught:
        data.read_dataset(file)
    assert message in str(caught.value)


def test_a_bad_row_of_a_data_set_is_refused_with_its_number(tmp_path):
    Dataset.from_list([GOOD, {**GOOD, "answer": ""}]).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set\[train\], row 1: 'answer' is missing or empty"):
        data.read_dataset(tmp_path / "set")


def test_an_answer_that_is_only_a_tool_call_is_an_answer(tmp_path):
    call = {"type": "function", "function": {"name": "look", "arguments": {"where": "mat"}}}
    record = {"messages": [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    assert len(data.read_dataset(jsonl(tmp_path / "train.jsonl", record))) == 1


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("questions.jsonl", "train", "questions.jsonl:1: the columns are question, label; write prompt and answer"),
        ("good.jsonl", "test", "is one file, without a 'test' part: give a folder with train.jsonl and test.jsonl"),
        ("empty", "train", "has no records"),
        ("no/such-set", "train", "'no/such-set' is not a file or a folder here, and `datasets` could not get it"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_with_what_to_give(source, split, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "questions.jsonl", {"question": "q", "label": 1})
    jsonl(tmp_path / "good.jsonl", GOOD)
    Dataset.from_dict({"text": []}).save_to_disk("empty")
    with pytest.raises(ValueError) as caught:
        data.read_dataset(source, split)
    assert message in str(caught.value)


@pytest.fixture
def tokenizer(llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "the cat sat on the mat", "answer": "yes"},
        {"prompt": [{"role": "user", "content": "the cat sat on the mat"}], "completion": CHAT[1:]},
        {"messages": [{"role": "user", "content": "the cat sat on the mat"}, *CHAT[1:], *CHAT]},
    ],
    ids=["text", "chat", "messages"],
)
def test_a_record_of_which_truncation_leaves_no_answer_is_refused(record, tmp_path, tokenizer):
    file = jsonl(tmp_path / "train.jsonl", record)
    assert len(data.read_dataset(file, tokenizer=tokenizer, max_length=7)) == 1
    with pytest.raises(
        ValueError, match="train.jsonl:1: the prompt alone has 6 tokens: truncation to 6 leaves nothing"
    ):
        data.read_dataset(file, tokenizer=tokenizer, max_length=6)


def test_the_limit_of_the_length_check_is_the_trainer_s(tmp_path, llama_folder, tokenizer):
    """One token less and the trainer would have no label in the record at all."""
    from helpers import quantized
    from test_trl import METHODS
    from trl import SFTConfig, SFTTrainer

    file = jsonl(tmp_path / "train.jsonl", {"prompt": "the cat sat on the mat", "answer": "yes"})
    labels = []
    for max_length in (7, 6):
        args = SFTConfig(output_dir=str(tmp_path), max_length=max_length, report_to="none", use_cpu=True, bf16=False)
        trainer = SFTTrainer(
            quantized(llama_folder), args=args, train_dataset=data.read_dataset(file), processing_class=tokenizer,
            peft_config=METHODS["lori"](target_modules="all-linear"),
        )  # fmt: skip
        batch = next(iter(trainer.get_train_dataloader())) if len(trainer.train_dataset) else {"labels": []}
        labels.append(sum(int((row != -100).sum()) for row in batch["labels"]))
    assert labels == [1, 0]


def test_messages_without_a_chat_template_are_refused(tmp_path, llama_folder):
    file = jsonl(tmp_path / "train.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match="train.jsonl:1: messages, but the tokenizer has no chat template"):
        data.read_dataset(file, tokenizer=AutoTokenizer.from_pretrained(llama_folder), max_length=64)


def test_a_task_with_a_bad_record_is_refused_with_file_and_line(tmp_path):
    (tmp_path / "colours").mkdir()
    jsonl(tmp_path / "colours" / "train.jsonl", GOOD)
    jsonl(tmp_path / "colours" / "test.jsonl", GOOD, {"prompt": "p"})
    with pytest.raises(ValueError, match="test.jsonl:2: 'answer' is missing or empty"):
        data.read_task(tmp_path, "colours")


def test_passages_become_a_task_and_an_empty_one_is_refused(tmp_path):
    file = jsonl(tmp_path / "short.jsonl", {"page": "[the cat sat]"}, {"text": "a {{dog}} ran"})
    name = write_lm_eval_perplexity(file, tmp_path / "tasks")
    assert name.startswith("peft_mora_perplexity_") and name.endswith("short")
    written = (tmp_path / "tasks" / f"{name}.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in written] == ["[the cat sat]", "a {{dog}} ran"]
    with pytest.raises(ValueError, match="short.jsonl:2: no passage"):
        write_lm_eval_perplexity(jsonl(file, {"page": "the cat"}, {"page": " "}), tmp_path / "tasks")


def test_the_recipes_folder_does_not_hide_the_package_evaluate():
    """As in a program that has started: its folder is first on the path, and lm-eval's tasks import `evaluate`."""
    program = f"import sys; sys.path.insert(0, {str(RECIPES)!r}); import shared.data, evaluate; print(evaluate.load)"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.startswith("<function load"), run.stderr[-500:]
