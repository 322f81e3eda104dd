"""The two scorers of the recipes, held against each other."""

import pytest
import torch
from helpers import WORDS, tiny_llama
from shared.lm_eval_tasks import write_lm_eval_task
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
    task = {"name": "words", "train": records[:1], "test": records, "labels": labels}
    name = write_lm_eval_task(task, tmp_path)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    shown = lm_eval(model, tokenizer, [name, f"{name}_greedy"], manager, 3, bootstrap_iters=0)["results"]
    assert shown[name]["acc,none"] == pytest.approx(found["label"])
    assert shown[f"{name}_greedy"]["exact_match,label"] == pytest.approx(found["greedy"])
    assert 0.1 < found["greedy"] < found["label"] <= 1


def test_two_labels_that_begin_with_one_token_are_refused_where_labels_are_ranked(tokenizer):
    record = {"prompt": "the cat is", "answer": "red mat"}
    with pytest.raises(ValueError, match="two labels begin with the same token"):
        answers(tiny_llama(), tokenizer, [record], 1, ["red mat", "red log"])
    assert answers(tiny_llama(), tokenizer, [record], 1) == {"greedy": 0}
