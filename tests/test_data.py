"""The reader of the recipes: every form and place of data, what it says, and what it refuses with which words."""

import gzip
import json
import sys
from importlib.machinery import PathFinder

import datasets
import pytest
from datasets import Dataset, DatasetDict
from helpers import RECIPES, jsonl, quantized
from PIL import Image
from shared.data import read_dataset
from shared.embedded_tasks import make_task
from shared.lm_eval_tasks import write_lm_eval_perplexity
from shared.tasks import read_task
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from peft_mora import MoraConfig


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


@pytest.fixture(params=FORMS)
def form(request):
    return FORMS[request.param]


def test_a_jsonl_file_and_a_folder_with_one_give_what_the_trainer_takes(form, tmp_path):
    record, expected = form
    file = jsonl(tmp_path / "train.jsonl", record, {**record, "id": 7})
    for source in (file, str(file), tmp_path):
        dataset = read_dataset(source)
        assert list(dataset) == [expected] * 2


def test_a_folder_of_datasets_gives_what_the_trainer_takes(form, tmp_path):
    record, expected = form
    whole = DatasetDict(train=Dataset.from_list([record] * 3), test=Dataset.from_list([record]))
    whole.save_to_disk(tmp_path / "dict")
    whole["train"].save_to_disk(tmp_path / "single")
    assert list(read_dataset(tmp_path / "dict")) == [expected] * 3
    assert list(read_dataset(tmp_path / "dict", "test")) == [expected]
    assert list(read_dataset(tmp_path / "single")) == [expected] * 3
    with pytest.raises(ValueError, match="no split 'dev', but train, test"):
        read_dataset(tmp_path / "dict", "dev")


def test_a_name_goes_to_the_hub_with_its_split_and_configuration(form, monkeypatch):
    record, expected = form
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list([record])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_dataset("someone/set", "validation", "en")) == [expected]
    assert asked == [("someone/set", "en", "validation")]


def test_a_folder_of_csv_files_is_left_to_datasets(tmp_path):
    (tmp_path / "train.csv").write_text("text\nthe cat sat\n")
    assert list(read_dataset(tmp_path)) == [{"text": "the cat sat"}]


def test_an_embedded_task_is_read_by_its_name():
    dataset = read_dataset("helpdesk", "test")
    first = make_task("helpdesk")["test"][0]
    assert len(dataset) == 100
    assert dataset[0] == {"prompt": first["prompt"], "completion": " " + first["answer"]}


def test_it_says_count_columns_and_one_sample(tmp_path, capsys):
    read_dataset(jsonl(tmp_path / "train.jsonl", {"id": 3, "text": "the cat " * 100}, {"text": "a dog"}))
    first, dropped, second = capsys.readouterr().out.splitlines()
    assert dropped == "  not used: id"
    assert first == f"{tmp_path / 'train.jsonl'}: 2 records, columns id, text"
    assert second.startswith('  the first: {"text": "the cat the cat') and len(second) < 330


GOOD = {"prompt": "p", "answer": "a"}
BAD = {
    "half a line": (GOOD, '{"prompt": "p", "ans', "no JSON"),
    "a list": (GOOD, '["p", "a"]', "is no object"),
    "no label": (GOOD, {"prompt": "p"}, "'answer' is missing or empty"),
    "an empty label": (GOOD, {"prompt": "p", "answer": " "}, "'answer' is missing or empty"),
    "a null label": (GOOD, {"prompt": "p", "answer": None}, "'answer' is missing or empty"),
    "a label that is a number": (GOOD, {"prompt": "p", "answer": 3}, "write a non-empty string, as \"3\""),
    "a label that is true": (GOOD, {"prompt": "p", "answer": True}, "'answer' is true; write a non-empty string, as"),
    "a label that is a list": (GOOD, {"prompt": "p", "answer": ["a"]}, "'answer' is [\"a\"]; write a non-empty"),
    "half a character": (GOOD, '{"prompt": "p", "answer": "\\ud83d"}', "\\ud83d is half a character"),
    "messages, then text": (
        {"prompt": "p", "completion": "c"},
        {"prompt": CHAT[:1], "completion": "c"},
        "one of prompt and completion is text, the other messages",
    ),
    "text, then messages": (
        {"prompt": "p", "completion": "c"},
        {"prompt": "p", "completion": CHAT[1:]},
        "one of prompt and completion is text, the other messages",
    ),
    "tools that are no JSON": ({"messages": CHAT}, {"messages": CHAT, "tools": "[{"}, "'tools' is a string that is"),
    "tools that are no list": ({"messages": CHAT}, {"messages": CHAT, "tools": {}}, "'tools' is {}; write a list"),
    "kwargs that are no object": (
        {"messages": CHAT},
        {"messages": CHAT, "chat_template_kwargs": "thinking"},
        "'chat_template_kwargs' is \"thinking\"; write an object",
    ),
    "an answer of empty parts": (
        {"messages": CHAT},
        {"messages": [CHAT[0], {"role": "assistant", "content": [{"type": "text", "text": " "}]}]},
        "no assistant message in 'messages'",
    ),
    "an empty prompt": (GOOD, {"prompt": "", "answer": "a"}, "'prompt' is missing or empty"),
    "an empty text": ({"text": "t"}, {"text": "\n"}, "'text' is missing or empty"),
    "no messages": ({"messages": CHAT}, {"messages": []}, "must be messages with role and content"),
    "messages as text": ({"messages": CHAT}, {"messages": "hi"}, "'messages' is \"hi\"; write a list of messages"),
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
        read_dataset(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("data", "line", "kind"),
    [
        ('{"text": "the cat"}\n{"text": "a dog"}\n'.encode("utf-16"), 1, "UTF-16"),
        ('{"text": "the cat"}\n{"text": "é"}\n'.encode("latin-1"), 2, r"not UTF-8 \(byte 0xe9\)"),
    ],
    ids=["utf-16", "latin-1"],
)
def test_text_in_another_encoding_is_refused_with_file_and_line(data, line, kind, tmp_path):
    (tmp_path / "train.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=f"train.jsonl:{line}: the text is {kind}"):
        read_dataset(tmp_path)


def test_empty_lines_windows_line_ends_and_a_byte_order_mark_are_no_part_of_a_record(tmp_path):
    good = json.dumps(GOOD)
    (tmp_path / "train.jsonl").write_bytes(f"{good}\r\n\r\n{good}\r\n\n".encode("utf-8-sig"))
    assert len(read_dataset(tmp_path)) == 2
    (tmp_path / "train.jsonl").write_text(f"{good}\n\n[3]\n")
    with pytest.raises(ValueError, match=r"train.jsonl:3: '\[3\]' is no object"):
        read_dataset(tmp_path)


def test_a_single_file_may_be_gzipped_or_parquet(tmp_path):
    record = {"prompt": "the cat", "completion": " sat"}
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(record).encode()))
    Dataset.from_list([record]).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl.gz", "a.parquet"):
        assert list(read_dataset(tmp_path / name)) == [record]
    (tmp_path / "b.jsonl.gz").write_bytes((tmp_path / "a.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match="b.jsonl.gz is gzip, and broken"):
        read_dataset(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.parquet").write_text("the cat")
    with pytest.raises(ValueError, match="c.parquet cannot be read as parquet"):
        read_dataset(tmp_path / "c.parquet")
    Dataset.from_list([record, {**record, "completion": ""}]).to_parquet(tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet, row 1: 'completion' is missing or empty"):
        read_dataset(tmp_path / "b.parquet")


def test_a_bad_row_of_a_data_set_is_refused_with_its_number(tmp_path):
    Dataset.from_list([GOOD, {**GOOD, "answer": ""}]).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set\[train\], row 1: 'answer' is missing or empty"):
        read_dataset(tmp_path / "set")


def calls(**arguments) -> dict:
    """A record of one tool call, with the tool that it calls."""
    function = {"name": "look", "arguments": arguments}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    tool = {"name": "look", "parameters": {name: {"type": "string"} for name in arguments}}
    return {"messages": [CHAT[0], turn], "tools": [{"type": "function", "function": tool}]}


TOOLS = [calls(where="mat"), calls(n=3), calls(where=None, content=["x"]), calls(where=4), {"messages": CHAT}]


def test_a_tool_call_and_a_tool_keep_their_own_keys_and_types(tmp_path):
    """One type for all rows would give every call every argument of the others, as null, and refuse 4 beside "mat"."""
    found = list(read_dataset(jsonl(tmp_path / "train.jsonl", *TOOLS)))
    assert found == [{"tools": None, **record} for record in TOOLS]
    assert list(read_dataset(jsonl(tmp_path / "train.jsonl", *TOOLS[::-1])))[::-1] == found  # columns of any row


def test_a_data_set_s_nulls_for_other_calls_arguments_are_left_out(tmp_path):
    """An Arrow struct has all keys: a null in it is an argument of another row's call."""
    records = [calls(where="mat"), calls(n=3), calls(content="x")]
    dataset = Dataset.from_list(records)
    arguments = dataset[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert arguments == {"where": None, "n": 3, "content": None}
    for path, write in ((tmp_path / "set", dataset.save_to_disk), (tmp_path / "set.parquet", dataset.to_parquet)):
        write(path)
        assert list(read_dataset(path)) == records
    empty = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"n": 1}]}]
    Dataset.from_list([{"messages": empty}, {"messages": CHAT}]).save_to_disk(tmp_path / "content")
    assert [row["messages"] for row in read_dataset(tmp_path / "content")] == [empty, CHAT]


def trainer_of(dataset, tokenizer, folder, output, max_length: int) -> SFTTrainer:
    args = SFTConfig(output_dir=str(output), max_length=max_length, report_to="none", use_cpu=True, bf16=False)
    adapter = MoraConfig(target_modules="all-linear")
    return SFTTrainer(quantized(folder), args, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter)


def test_the_trainer_sees_no_argument_of_another_call(tmp_path, llama_folder, tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{% for k, v in c.function.arguments.items() %}"
        "{{ 'mat ' if k == 'where' else 'log ' }}{{ 'red ' if v is none else 'blue ' }}{% endfor %}{% endfor %}"
        "{% endfor %}{% for t in tools or [] %}{{ 'dog ' * t.function.parameters | length }}{% endfor %}"
        "{{ 'big' if thinking else 'small' }}"
    )
    records = [calls(where="mat"), {**calls(n=3), "chat_template_kwargs": {"thinking": True}}, {"messages": CHAT}]
    dataset = read_dataset(jsonl(tmp_path / "train.jsonl", *records), tokenizer=tokenizer, max_length=32)
    trainer = trainer_of(dataset, tokenizer, llama_folder, tmp_path, max_length=32)
    seen = [tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset]
    assert seen == ["mat blue dog small", "log blue dog big", "small"]


def test_what_the_trainer_reads_is_kept_and_what_is_dropped_is_said(tmp_path, capsys):
    kwargs = {"chat_template_kwargs": {"enable_thinking": False}}
    file = jsonl(tmp_path / "train.jsonl", {"messages": CHAT, **kwargs, "id": 1}, {"messages": CHAT, "topic": "dogs"})
    found = list(read_dataset(file))
    assert found == [{"messages": CHAT, **kwargs}, {"messages": CHAT, "chat_template_kwargs": {}}]
    assert "  not used: id, topic" in capsys.readouterr().out.splitlines()


def test_images_are_kept_with_the_parts_that_stand_for_them(tmp_path):
    image = Image.new("RGB", (2, 2), "red")
    turn = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "what is it"}]}
    dataset = Dataset.from_list([{"messages": [turn, {**CHAT[1], "content": turn["content"][1:]}], "images": [image]}])
    dataset.save_to_disk(tmp_path / "set")
    (row,) = read_dataset(tmp_path / "set")
    assert row["messages"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "what is it"}]
    assert [found.getpixel((0, 0)) for found in row["images"]] == [(255, 0, 0)]


def test_tools_as_json_and_content_as_parts_of_text_become_what_they_stand_for(tmp_path):
    record = calls(where="mat")
    parts = [{"type": "text", "text": "is the "}, {"type": "text", "text": "dog red"}]
    messages = [{**CHAT[0], "content": parts}, record["messages"][1]]
    written = {"messages": messages, "tools": json.dumps(record["tools"])}
    (found,) = read_dataset(jsonl(tmp_path / "train.jsonl", written))
    assert found == record


def test_a_record_that_the_chat_template_does_not_take_is_refused_with_its_line(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('only one turn') if messages | length > 2 else 'the cat' }}"
    file = jsonl(tmp_path / "train.jsonl", {"messages": CHAT}, {"messages": [*CHAT, *CHAT]})
    with pytest.raises(ValueError, match="train.jsonl:2: the tokenizer's chat template does not take .*only one turn"):
        read_dataset(file, tokenizer=tokenizer, max_length=64)


def test_datasets_without_types_by_record_are_refused(tmp_path, monkeypatch):
    from_list = Dataset.from_list
    monkeypatch.setattr(Dataset, "from_list", classmethod(lambda cls, mapping, features=None: from_list(mapping)))
    with pytest.raises(ImportError, match="all others' arguments, as nulls: pip install 'datasets>=5'"):
        read_dataset(jsonl(tmp_path / "train.jsonl", GOOD))


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("questions.jsonl", "train", "questions.jsonl:1: the columns are question, label; write prompt and answer"),
        ("good.jsonl", "test", "is one file, without a 'test' part: give a folder with train.jsonl and test.jsonl"),
        ("empty", "train", "has no records"),
        ("empty.jsonl", "train", "empty.jsonl has no records"),
        ("folder", "test", "'folder' gives no 'test' records (Unknown split"),
        ("no/such-set", "train", "'no/such-set' is not a file or a folder here, and `datasets` could not get it"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_with_what_to_give(source, split, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "questions.jsonl", {"question": "q", "label": 1})
    jsonl(tmp_path / "good.jsonl", GOOD)
    jsonl(tmp_path / "folder" / "train.jsonl", GOOD)
    jsonl(tmp_path / "empty.jsonl")
    Dataset.from_dict({"text": []}).save_to_disk("empty")
    with pytest.raises(ValueError) as caught:
        read_dataset(source, split)
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
    assert len(read_dataset(file, tokenizer=tokenizer, max_length=7)) == 1
    with pytest.raises(
        ValueError, match="train.jsonl:1: the prompt alone has 6 tokens: truncation to 6 leaves nothing"
    ):
        read_dataset(file, tokenizer=tokenizer, max_length=6)


def test_the_limit_of_the_length_check_is_the_trainer_s(tmp_path, llama_folder, tokenizer):
    """One token less and the trainer would have no label in the record at all."""
    file = jsonl(tmp_path / "train.jsonl", {"prompt": "the cat sat on the mat", "answer": "yes"})
    labels = []
    for max_length in (7, 6):
        trainer = trainer_of(read_dataset(file), tokenizer, llama_folder, tmp_path, max_length)
        batch = next(iter(trainer.get_train_dataloader())) if len(trainer.train_dataset) else {"labels": []}
        labels.append(sum(int((row != -100).sum()) for row in batch["labels"]))
    assert labels == [1, 0]


def test_messages_without_a_chat_template_are_refused(tmp_path, llama_folder):
    file = jsonl(tmp_path / "train.jsonl", {"messages": CHAT})
    with pytest.raises(ValueError, match="train.jsonl:1: messages, but the tokenizer has no chat template"):
        read_dataset(file, tokenizer=AutoTokenizer.from_pretrained(llama_folder), max_length=64)


def test_a_task_with_a_bad_record_is_refused_with_file_and_line(tmp_path):
    jsonl(tmp_path / "colours" / "train.jsonl", GOOD)
    jsonl(tmp_path / "colours" / "test.jsonl", GOOD, {"prompt": "p"})
    with pytest.raises(ValueError, match="test.jsonl:2: 'answer' is missing or empty"):
        read_task(tmp_path, "colours")
    jsonl(tmp_path / "colours" / "test.jsonl")
    with pytest.raises(ValueError, match="test.jsonl has no records"):
        read_task(tmp_path, "colours")
    (tmp_path / "colours" / "labels.json").write_text("[0, 1]")
    with pytest.raises(ValueError, match=r"labels.json is \[0, 1\]; write a list of the answers, as strings"):
        read_task(tmp_path, "colours")
    (tmp_path / "colours" / "labels.json").write_text("[")
    with pytest.raises(ValueError, match="labels.json is no JSON in UTF-8"):
        read_task(tmp_path, "colours")


def test_passages_become_a_task_and_an_empty_one_is_refused(tmp_path):
    file = jsonl(tmp_path / "short.jsonl", {"page": "[the cat sat]"}, {"text": "a {{dog}} ran"})
    name = write_lm_eval_perplexity(file, tmp_path / "tasks")
    assert name.startswith("peft_mora_perplexity_") and name.endswith("short")
    written = Dataset.from_parquet(str(tmp_path / "tasks" / f"{name}.parquet"))
    assert written["text"] == ["[the cat sat]", "a {{dog}} ran"]
    with pytest.raises(ValueError, match="empty.jsonl has no passages"):
        write_lm_eval_perplexity(jsonl(tmp_path / "empty.jsonl"), tmp_path / "tasks")
    with pytest.raises(ValueError, match="short.jsonl:2: no passage"):
        write_lm_eval_perplexity(jsonl(file, {"page": "the cat"}, {"page": " "}), tmp_path / "tasks")


def test_the_recipes_folder_does_not_hide_the_package_evaluate():
    """Which is first on the path of a program; lm-eval's tasks import `evaluate`."""
    found = PathFinder.find_spec("evaluate", [str(RECIPES), *sys.path])
    assert found.origin.endswith("evaluate/__init__.py") and not found.origin.startswith(str(RECIPES))
