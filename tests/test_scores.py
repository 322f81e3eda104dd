"""The two scorers of the recipes, held against each other."""

import math

import pytest
import torch
from helpers import WORDS, tiny_llama
from lm_eval.api.model import LM
from shared.lm_eval_tasks import write_lm_eval_perplexity, write_lm_eval_tasks
from shared.scores import answers, lm_eval
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def tokenizer(llama_folder):
    return AutoTokenizer.from_pretrained(llama_folder)


def written(model, tokenizer, prompt: str) -> str:
    """The one word that greedy decoding writes."""
    with torch.no_grad():
        return tokenizer.decode(model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].argmax())


def test_both_scorers_give_the_same_on_labels_of_one_token(tokenizer, tmp_path):
    from lm_eval.tasks import TaskManager

    model = tiny_llama().eval()
    prompts = [" ".join(WORDS[i : i + 2 + i % 4]) for i in range(len(WORDS) - 2)]
    best = {prompt: written(model, tokenizer, prompt) for prompt in prompts}
    labels = [word for word in WORDS if word in best.values()][:3]
    prompts = [prompt for prompt in prompts if best[prompt] in WORDS]
    records = [{"prompt": p, "answer": best[p] if best[p] in labels else labels[0]} for p in prompts]
    found = answers(model, tokenizer, records, 3, labels)
    padded = answers(model, tokenizer, records, len(records))  # prompts of two to five words in one batch
    assert padded == {"greedy": pytest.approx(found["greedy"])}
    task = {"name": "words", "train": records[:1], "test": records, "labels": labels}
    (name,) = write_lm_eval_tasks([task], tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    shown = lm_eval(model, tokenizer, [name, f"{name}_greedy"], manager, 3, bootstrap_iters=0)["results"]
    assert shown[name]["acc,none"] == pytest.approx(found["label"])
    assert shown[f"{name}_greedy"]["exact_match,label"] == pytest.approx(found["greedy"])
    assert 0.1 < found["greedy"] < found["label"] <= 1


def test_labels_that_begin_with_one_token_are_ranked_whole(tokenizer):
    model, labels = tiny_llama().eval(), ["red mat", "red log", "blue"]
    records = [{"prompt": " ".join(WORDS[i : i + 3]), "answer": labels[i % 3]} for i in range(12)]
    right = 0
    for record in records:  # each label's log-likelihood on its own, by the word
        n = len(tokenizer(record["prompt"]).input_ids)
        sums = []
        for label in labels:
            ids = torch.tensor([tokenizer(f"{record['prompt']} {label}").input_ids])
            with torch.no_grad():
                found = model(ids).logits[0, n - 1 : -1].log_softmax(-1)
            sums.append(float(found.gather(1, ids[0, n:, None]).sum()))
        right += sums.index(max(sums)) == labels.index(record["answer"])
    found = answers(model, tokenizer, records, 5, labels)
    assert found["label"] == pytest.approx(right / 12) and 0 < right < 12
    firsts = []
    for record in records:
        ids = tokenizer(record["prompt"], return_tensors="pt").input_ids
        first = tokenizer(f" {record['answer']}", add_special_tokens=False).input_ids[0]
        with torch.no_grad():
            firsts.append(-float(model(ids).logits[0, -1].log_softmax(-1)[first]))
    assert found["loss"] == pytest.approx(sum(firsts) / 12, rel=1e-4)


class Oracle(LM):
    """Answers right, or `instead`, in tokens of one byte each: the most that any tokenizer can need."""

    def __init__(self, records: list[dict[str, str]], instead: str | None = None):
        super().__init__()
        self.answers = {record["prompt"]: instead or record["answer"] for record in records}

    def loglikelihood(self, requests):
        asked = [request.args for request in requests]
        return [(0.0 if text == f" {self.answers[prompt]}" else -1.0, False) for prompt, text in asked]

    def generate_until(self, requests):
        written = []
        for prompt, options in (request.args for request in requests):
            text = f" {self.answers[prompt]}\nand more".encode()[: options["max_gen_toks"]].decode(errors="ignore")
            written.append(min((text.split(end)[0] for end in options["until"]), key=len))
        return written

    def loglikelihood_rolling(self, requests):
        return [-float(len(text)) for (text,) in (request.args for request in requests)]


def by_lm_eval(lm, tasks: list[dict], folder) -> dict[str, tuple[float, float]]:
    """{task: (acc, exact_match)}"""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    names = write_lm_eval_tasks(tasks, folder)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    all_names = [name + kind for name in names for kind in ("", "_greedy")]
    found = simple_evaluate(lm, tasks=all_names, task_manager=manager, bootstrap_iters=0)["results"]
    return {
        task["name"]: (found[name]["acc,none"], found[f"{name}_greedy"]["exact_match,label"])
        for task, name in zip(tasks, names, strict=True)
    }


LABELS = {
    "words": ["yes", "no", "yes indeed"],
    "signs at the end": ["50%", "5%", "positive.", "positive", "Toxic (severe)", "Toxic"],
    "languages": ["C++", "C", "C#", ".NET"],
    "emoji": ["👍", "👎🏽", "👨‍👩‍👧", "❤️"],
    "other scripts": ["да", "нет", "是", "いいえ", "naïve", "na\u0301"],
    "long": ["Mean of Transportation (land, water or air), without animals", "Educational Institution"],
    "dates": ["2024-01-01", "2024-12-31"],
    "times": ["2024-01-01T00:00:00Z", "2024-01-02 10:00:00"],
    "numbers": ["0", "1", "10", "1e3", "-1", "3.5", "07"],
    "lists": ["[1, 2]", "[1]", "['a', 'b']", "{'a': 1}", "None", "True"],
    "templates": ["{{answer}}", "{% if %}", "{# x #}", "{{prompt}}"],
    "YAML": ["no", "~", "!function x.y", "- a", "a: b", "'", '"', "\\", "\\n", "#", "&a", "*a", "null"],
    "regex": ["a|b", "(a", "a)", "[b", ".*", "^", "$", "a?", "a+"],
    "the fallback": ["[none]", "[invalid]"],
    "inner space": ["a\tb", "a  b", "a\u00a0b", "a"],
    "field names": ["prompt", "label", "labels", "answer"],
}
PROMPTS = {
    "words": "is it {}? Answer:",
    "digits": "{}",
    "dates": "2024-01-{:02d}",
    "lists": "[{}]",
    "templates": "{{{{prompt}}}} {{{{ {} / 0 }}}} {{% x %}}",
    "lines": "a\n\nb {}\n",
    "space": "  a {}  ",
    "field": "prompt{}",
}


def make_task(name: str, labels: list[str], prompt: str) -> dict:
    records = [{"prompt": prompt.format(i + 1, name=name), "answer": label} for i, label in enumerate(labels)]
    return {"name": name, "train": records, "test": records, "labels": labels}


SWEEP = [make_task(f"labels {name}", labels, "{name} {}: what is it?") for name, labels in LABELS.items()]
SWEEP += [make_task(f"prompts {name}", LABELS["numbers"], prompt) for name, prompt in PROMPTS.items()]


def test_a_model_that_always_answers_right_scores_1_in_both_metrics(tmp_path):
    lm = Oracle([record for task in SWEEP for record in task["test"]])
    found = by_lm_eval(lm, SWEEP, tmp_path)
    assert found == {task["name"]: (1, 1) for task in SWEEP}


def test_a_model_that_writes_no_label_scores_0(tmp_path):
    tasks = [make_task("x", LABELS["the fallback"], "is it {}?"), make_task("y", LABELS["numbers"], "{}")]
    found = by_lm_eval(Oracle([record for task in tasks for record in task["test"]], instead="zzz"), tasks, tmp_path)
    assert [greedy for _, greedy in found.values()] == [0, 0]
    cut = [make_task("z", ["yes", "no"], "{}")]
    found = by_lm_eval(Oracle(cut[0]["test"], instead="yesterday"), cut, tmp_path)
    assert found["z"][1] == 0  # a word ends at its end


@pytest.mark.parametrize("label", ["two\nlines", "two\u2028lines", " yes", "yes\r", "", "no"])
def test_a_label_that_cannot_be_scored_is_refused(label, tmp_path):
    records = [{"prompt": "p", "answer": "no"}]
    task = {"name": "x", "train": records, "test": records, "labels": ["no", label]}
    with pytest.raises(ValueError, match="task 'x': the label .* cannot be scored; labels are one line each"):
        write_lm_eval_tasks([task], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("one", "other", "both"), [("SST-2", "SST_2", "sst_2"), ("a", "A", "a"), ("b", "b greedy", "b_greedy")]
)
def test_tasks_that_would_be_one_task_are_refused(one, other, both, tmp_path):
    records = [{"prompt": "p", "answer": "no"}]
    tasks = [{"name": name, "train": records, "test": records, "labels": ["no"]} for name in (one, other)]
    with pytest.raises(ValueError, match=f"the tasks '{one}' and '{other}' would both be peft_mora_{both} in lm-eval"):
        write_lm_eval_tasks(tasks, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_passage_that_looks_like_a_date_is_text(tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (tmp_path / "p.jsonl").write_text('{"text": "2024-01-01"}\n')
    name = write_lm_eval_perplexity(tmp_path / "p.jsonl", tmp_path / "tasks")
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(Oracle([]), tasks=[name], task_manager=manager, bootstrap_iters=0)["results"][name]
    assert found["byte_perplexity,none"] == pytest.approx(math.e)  # the oracle's nats are the text's bytes
