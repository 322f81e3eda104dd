"""sft.py and score.py as a person runs them, on a tiny model: flags, refusals, the numbers and the kernels."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from helpers import (
    LORA,
    METHODS,
    RECIPES,
    adapted,
    csv_rows,
    jsonl,
    load_recipe,
    quantized,
    randomize,
    tiny_llama,
    write_task,
)
from peft import LoraConfig, PeftConfig
from shared import base_model, scores
from shared.embedded_tasks import make_task
from shared.lm_eval_tasks import write_lm_eval_tasks
from shared.scores import load
from shared.tasks import cut_passage, find_task, is_task, read_task
from shared.training import equal_rank, trainable
from transformers import AutoTokenizer

import peft_mora
from peft_mora import TaskRouter


@pytest.fixture(scope="module")
def sft():
    return load_recipe("sft")


@pytest.fixture(scope="module")
def score():
    return load_recipe("score")


@pytest.fixture(scope="session")
def task(tmp_path_factory) -> Path:
    """DIR of a task `colours`: prompts of the tiny model's words, a label each."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "colours", ("red", "blue"))
    return folder


def flags(llama_folder, source, output) -> list:
    """What any user of TRL would write, for a 4-bit run on a CPU."""
    names = ["--model_name_or_path", llama_folder, "--dataset_name", source, "--output_dir", output]
    names += ["--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "bfloat16", "--use_cpu", "--bf16", "false"]
    names += "--lora_target_modules all-linear --learning_rate 1e-2 --max_steps 2 --report_to none".split()
    return [*names, *"--per_device_train_batch_size 2 --logging_steps 1 --disable_tqdm true".split()]


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (
            ["--peft_method", "lora"],
            {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "revision": None},
        ),
        (
            ["--peft_method", "lora", "--lora_r", "4", "--use_dora", "--model_revision", "v1"],
            {"peft_type": "LORA", "r": 4, "use_dora": True, "revision": "v1"},
        ),
        ([], {"peft_type": "MORA", "r": 8, "alpha": 16, "dropout": 0.0, "routing": "task"}),
        (
            ["--lora_r", "4", "--lora_alpha", "32", "--lora_dropout", "0.1", "--top_k", "2", "--routing", "bank"],
            {"peft_type": "MORA", "r": 4, "alpha": 32, "dropout": 0.1, "top_k": 2, "routing": "bank"},
        ),
        (
            ["--peft_method", "lori", "--sparsity", "0.5", "--save_projection", "false", "--seed", "5"],
            {"peft_type": "LORI", "r": 32, "alpha": 64, "sparsity": 0.5, "save_projection": False, "seed": 5},
        ),
        (
            ["--peft_method", "lori", "--lora_r", "8", "--sparsity", "0.75", "--calibration_steps", "1"],
            {"peft_type": "LORI", "r": 8, "sparsity": 0.75},
        ),
        (
            ["--peft_method", "flylora", "--lora_r", "8", "--top_k", "4", "--density", "0.5", "--selection", "signed"],
            {"peft_type": "FLYLORA", "r": 8, "top_k": 4, "density": 0.5, "selection": "signed"},
        ),
        (
            ["--lora_r", "4", "--active_experts", "2", "--model_revision", "v1"],
            {"peft_type": "MORA", "r": 4, "top_k_pattern": 14 * [2], "revision": "v1"},
        ),
    ],
    ids=["lora", "lora-dora", "mora", "mora-fields", "lori", "lori-calibrated", "flylora", "budget"],
)
def test_sft_trains_and_saves_the_adapter_that_its_flags_describe(
    extra, expected, sft, run_recipe, llama_folder, task, tmp_path
):
    told = run_recipe(sft, *flags(llama_folder, task / "colours", tmp_path / "out"), *extra)
    assert "train.jsonl: 12 records, columns prompt, answer" in told
    config = PeftConfig.from_pretrained(tmp_path / "out").to_dict()
    config["top_k_pattern"] = list((config.get("top_k_pattern") or {}).values())
    assert {name: config[name] for name in expected} == expected
    assert (config["base_model_name_or_path"], len(config["target_modules"])) == (llama_folder, 14)


def test_sft_learns_several_tasks_that_the_records_name(sft, run_recipe, llama_folder, tmp_path, capsys):
    records = [{"prompt": "the cat", "answer": word, "task": task} for task, word in [("a", "red"), ("b", "big")] * 4]
    source = jsonl(tmp_path / "train.jsonl", *records)
    method = ("--peft_method", "mtllora", "--tasks", "a", "b", "--ups", "2")
    run_recipe(sft, *flags(llama_folder, source, tmp_path / "out"), *method)
    config = PeftConfig.from_pretrained(tmp_path / "out")
    assert (config.tasks, config.default_task, config.ups) == (["a", "b"], None, 2)
    with pytest.raises(SystemExit):
        run_recipe(sft, *flags(llama_folder, source, tmp_path / "one"), "--peft_method", "mtllora")
    assert "name their task: give the tasks' names, --tasks A B" in capsys.readouterr().err


def test_sft_reads_a_datasets_folder_and_evaluates_on_its_test_split(sft, run_recipe, llama_folder, tmp_path, task):
    parts = {split: str(task / "colours" / f"{split}.jsonl") for split in ("train", "test")}
    Dataset.from_json(parts).save_to_disk(tmp_path / "set")
    arguments = flags(llama_folder, tmp_path / "set", tmp_path / "out")
    told = run_recipe(sft, *arguments, *"--eval_strategy steps --eval_steps 1 --peft_method lora".split())
    assert "set[train]: 12 records" in told and "set[test]: 6 records" in told and "eval_loss" in told


@pytest.mark.parametrize(("method", "r", "alpha"), [("lora", 8, 16), ("mora", 8, 128), ("lori", 32, 256)])
def test_sft_without_a_model_runs_on_the_embedded_one(
    method, r, alpha, sft, run_recipe, llama_folder, tmp_path, monkeypatch
):
    nf4 = base_model.find_base(llama_folder)
    monkeypatch.setattr(sft, "find_base", lambda **options: nf4)
    told = run_recipe(sft, "--peft_method", method, "--max_steps", "1", "--output_dir", tmp_path / "out", "--use_cpu")
    assert "helpdesk[train]: 400 records" in told and "'train_loss'" in told
    config = PeftConfig.from_pretrained(tmp_path / "out").to_dict()
    saved = config["r"], config.get("alpha", config.get("lora_alpha")), config["base_model_name_or_path"]
    assert saved == (r, alpha, nf4)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--peft_method", "lori", "--routing", "dense"], "--routing is no field of lori"),
        (["--peft_method", "lora", "--sparsity", "0.5"], "--sparsity is no field of lora"),
        (["--peft_method", "mora", "--use_dora"], "--use_dora is LoRA's own"),
        (["--peft_method", "mole"], "invalid choice: 'mole'"),
        (["--use_peft", "false"], "this trains an adapter, and --use_peft is false"),
    ],
)
def test_sft_refuses_a_flag_that_would_have_no_effect(
    extra, message, sft, run_recipe, llama_folder, task, tmp_path, capsys
):
    with pytest.raises(SystemExit):
        run_recipe(sft, *flags(llama_folder, task / "colours", tmp_path / "out"), *extra)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("base", "how"),
    [
        (["--load_in_4bit", "--use_bnb_nested_quant"], " --task ...\n"),
        (["--load_in_4bit"], " --task ...\n  over a base in NF4 with nested quantisation, which this run's was not"),
        ([], " --bits 16 --task ...\n"),
    ],
)
def test_sft_s_last_line_scores_over_the_base_of_the_run(
    base, how, sft, run_recipe, llama_folder, task, tmp_path, monkeypatch
):
    """A flag's beginning is the flag, to argparse."""
    seen = []
    monkeypatch.setattr(sft.sft, "main", lambda *arguments: seen.append(arguments))
    arguments = flags(llama_folder, task / "colours", tmp_path / "out")
    rest = [a for a in arguments[2:] if a not in ("--load_in_4bit", "--use_bnb_nested_quant")]
    told = run_recipe(sft, "--model_name", llama_folder, *rest, *base)
    assert f"score.py --adapter {tmp_path / 'out'}{how}" in told
    ((_, _, model_args, _),) = seen
    assert (model_args.model_name_or_path, model_args.lora_alpha) == (llama_folder, None)  # not the small run's


def test_sft_refuses_records_whose_answer_truncation_would_cut_off(sft, run_recipe, llama_folder, task, tmp_path):
    with pytest.raises(ValueError, match="train.jsonl:1: the prompt alone has 3 tokens: truncation to 3"):
        run_recipe(sft, *flags(llama_folder, task / "colours", tmp_path / "out"), "--max_length", "3")


def test_sft_gives_plain_lora_exact_kernels_too(sft, llama_folder):
    model = quantized(llama_folder)
    sft.ExactKernels().on_train_begin(None, None, None, model=model)
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_help_names_every_method(sft, score, run_recipe, capsys):
    for recipe in (sft, score):
        with pytest.raises(SystemExit) as end:
            run_recipe(recipe, "--help")
        assert end.value.code == 0
        text = capsys.readouterr().out.lower()
        assert all(method in text for method in ("lora", "mora", "lori", "flylora"))


def test_score_runs_by_the_name_that_it_had(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 3)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--model", "x"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(RECIPES / "evaluate.py"), run_name="__main__")
    assert end.value.code == 3 and calls == [[sys.executable, RECIPES / "score.py", "--model", "x"]]
    assert "recipes/evaluate.py is recipes/score.py now" in capsys.readouterr().err


def test_a_new_row_of_the_table_is_a_choice_of_every_program(monkeypatch):
    monkeypatch.setitem(peft_mora.METHODS, "dummy", peft_mora.METHODS["lori"])
    monkeypatch.delitem(sys.modules, "shared.training", raising=False)
    demo, merge, sft = map(load_recipe, ("demo", "merge", "sft"))
    monkeypatch.setattr(sys, "argv", ["program"])
    assert merge.parse().methods == ("lora", *peft_mora.METHODS)
    monkeypatch.setattr(sys, "argv", ["program", "--method", "dummy"])
    assert demo.parse().method == ["dummy"]
    (choices,) = (f.metadata for f in fields(sft.MethodArguments) if f.name == "peft_method")
    assert "dummy" in choices["choices"]
    (text,) = (f.metadata["help"] for f in fields(sft.MethodArguments) if f.name == "sparsity")
    assert "[lori, None]" in text and "[dummy, None]" in text
    config = demo.adapter_config("dummy", seed=3, **demo.comparable("dummy", 4))
    assert (config.r, config.alpha, config.seed) == (4, 8, 3)


@pytest.fixture(scope="session", params=["mora", "lora"])
def adapter(request, llama_folder, tmp_path_factory) -> Path:
    """A saved adapter with an effect."""
    folder = tmp_path_factory.mktemp("adapter") / request.param
    adapted({"lora": LORA, **METHODS}[request.param], quantized(llama_folder)).save_pretrained(folder)
    return folder


def test_score_scores_tasks_and_perplexity_through_lm_eval(score, run_recipe, adapter, task, tmp_path):
    pages = ["the cat sat on the red mat", "a dog ran under the log"]
    passages = jsonl(tmp_path / "short.jsonl", *({"page": page} for page in pages))
    own = tmp_path / "own"
    write_lm_eval_tasks([{**read_task(task, "colours"), "name": "mine"}], own)
    arguments = ["--adapter", adapter, "--data", task, "--include_path", own]
    arguments += ["--task", "colours", "peft_mora_mine", "peft_mora_min?"]
    told = run_recipe(score, *arguments, "--perplexity", passages, "--report", "--device", "cpu", "--output", tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())
    ours, base = record["adapter"]["results"], record["base"]["results"]
    (ppl,) = (name for name in ours if "perplexity" in name)
    assert ours["peft_mora_colours"]["acc,none"] == ours["peft_mora_mine"]["acc,none"]  # the same task twice
    assert {*ours} == {"peft_mora_colours", "peft_mora_colours_greedy", "peft_mora_mine", ppl} == {*base}
    assert ours[ppl]["word_perplexity,none"] != base[ppl]["word_perplexity,none"]
    assert "word_perplexity" in told and "peft_mora_colours" in told
    assert f"lm_eval --model hf --model_args pretrained={base_model.CACHE}" in told

    # the same passages by hand, through the layers as they are in training: what lm-eval calls rolling log-likelihood
    model, tokenizer = load(record["model"], adapter, "cpu")
    total = words = 0.0
    for text in pages:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
        with torch.no_grad():
            scores = model.train()(ids).logits[0, :-1].float().log_softmax(-1)
        total += scores.gather(1, ids[0, 1:, None]).sum().item()
        words += len(text.split())
    by_hand = torch.tensor(-total / words).exp().item()
    assert ours[ppl]["word_perplexity,none"] == pytest.approx(by_hand, rel=1e-4)

    # the page has the numbers of results.json, and those are lm-eval's and a float64 reference's
    report, page = record["report"], (tmp_path / "report.html").read_text()
    shown = [float(value) for value in re.findall(r'<data value="([^"]+)">', page)]
    assert shown[: 3 * len(report["rows"])] == [
        value for row in report["rows"] for value in (row["before"], row["after"], row["relative"] + row["change"])
    ]
    for row in report["rows"]:
        (name,) = {row["task"], f"peft_mora_{row['task']}"} & {*ours}
        (key,) = (key for key in ours[name] if key.startswith(f"{row['metric']},"))
        assert (row["before"], row["after"]) == (base[name][key], ours[name][key])
        assert row["general"] is (name == ppl)
    found = report["drift"]
    assert shown[3 * len(report["rows"]) :] == [
        *(found["base_perplexity"], found["perplexity"], found["perplexity"] / found["base_perplexity"], found["kl"])
    ]
    kl = tokens = 0.0
    for text in pages:
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            new = model(ids).logits[0, :-1].double().log_softmax(-1)
            with model.disable_adapter():
                old = model(ids).logits[0, :-1].double().log_softmax(-1)
        kl, tokens = kl + (old.exp() * (old - new)).sum().item(), tokens + len(new)
    assert found["kl"] == pytest.approx(kl / tokens, rel=1e-3)
    assert (found["tokens"], found["passages"]) == (tokens, 2)


def test_score_asks_with_the_chat_template_of_the_adapter(
    score, run_recipe, llama_folder, task, tmp_path, monkeypatch
):
    adapter = tmp_path / "adapter"
    adapted(LORA, quantized(llama_folder)).save_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = "{% for m in messages %}big {{ m['content'] }} small {% endfor %}"
    tokenizer.save_pretrained(adapter)
    asked, lm_eval = [], scores.lm_eval

    def spy(model, tokenizer, *rest, **options):
        asked.append(tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False))
        return lm_eval(model, tokenizer, *rest, **options)

    monkeypatch.setattr(scores, "lm_eval", spy)
    arguments = ["--adapter", adapter, "--task", "colours", "--data", task, "--output", tmp_path, "--limit", 1]
    told = run_recipe(score, *arguments, "--apply_chat_template", "--device", "cpu")
    assert asked == ["big the cat small "]
    assert f"peft={adapter},tokenizer={adapter},dtype=bfloat16" in told and "--apply_chat_template" in told


def test_score_takes_tasks_with_commas_as_lm_eval_does(score, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["score.py", "--tasks", "helpdesk, mood", "--tasks", "a, b,c"])
    assert score.parse().task == ["a", "b", "c"]
    monkeypatch.setattr(sys, "argv", ["merge.py", "--tasks", "helpdesk, mood"])
    assert load_recipe("merge").parse().tasks == ["helpdesk", "mood"]
    monkeypatch.setattr(sys, "argv", ["continual.py", "--tasks", "mood, helpdesk,mood"])
    with pytest.raises(SystemExit):
        load_recipe("continual").parse()


def test_a_list_of_tasks_may_mix_folders_and_embedded_ones(task):
    found = [find_task(name, task, seed=1) for name in ("colours", "museum")]
    assert [len(one["train"]) for one in found] == [12, 400] and found[1] == make_task("museum", seed=1)
    with pytest.raises(ValueError, match="colors is no folder, and no embedded task has that name: write .*museum"):
        find_task("colors", task)


def test_a_question_behind_a_long_passage_is_asked_unless_passages_are_to_be_cut(score, tmp_path, monkeypatch):
    """Also of the records that an embedded task of another seed has: its test prompts are learnt there."""
    long = {"prompt": "the cat sat. " * 40 + "Is that good? Answer:", "answer": "yes"}
    for split in ("train", "test"):
        jsonl(tmp_path / "data/long" / f"{split}.jsonl", long)
    arguments = ["score.py", "--data", str(tmp_path / "data"), "--task", "long", "museum"]
    for more, prompt, seed in ([[], long["prompt"], 0], [["--passage_words", "4", "--seed", "3"], None, 3]):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        score.write_tasks(score.parse(), tmp_path / f"tasks-{seed}")
        asked, known = (
            Dataset.from_parquet(str(tmp_path / f"tasks-{seed}/peft_mora_{name}_test.parquet"))["prompt"]
            for name in ("long", "museum")
        )
        assert asked[0] == (prompt or "the cat sat. the Answer:")
        assert list(known) == [record["prompt"] for record in make_task("museum", seed=seed)["test"]]
    assert find_task("long", tmp_path / "data", 0)["test"][0]["prompt"] == long["prompt"]


def test_a_task_is_cut_into_parts_by_its_labels():
    whole, parts = find_task("museum"), [find_task(f"museum-{k}of3") for k in (1, 2, 3)]
    assert [part["labels"] for part in parts] == [["Gold", "Bronze"], ["Silver"], ["Iron"]]
    for split in ("train", "test"):
        assert [record for part in parts for record in part[split]] == sorted(
            whole[split], key=lambda r: next(i for i, part in enumerate(parts) if r["answer"] in part["labels"])
        )
    for wrong in ("museum-0of2", "museum-3of2", "museum-1of5"):
        with pytest.raises(ValueError, match=r"museum has 4 labels; write museum-KofN with 1 <= K <= N <= 4"):
            find_task(wrong)
    assert is_task("museum-9of9") and not is_task("muse-1of2") and not is_task("museum-of2")


def test_a_part_of_which_a_split_has_no_record_is_refused(tmp_path):
    records = [{"prompt": f"{label}? Answer:", "answer": label} for label in ("a", "b")]
    jsonl(tmp_path / "sides/train.jsonl", *records)
    jsonl(tmp_path / "sides/test.jsonl", records[0])
    (tmp_path / "sides/labels.json").write_text('["a", "b"]')
    assert find_task("sides-1of2", tmp_path)["test"] == records[:1] and is_task("sides-2of2", tmp_path)
    with pytest.raises(ValueError, match="sides-2of2 has no test records: none is labelled b"):
        find_task("sides-2of2", tmp_path)


@pytest.mark.parametrize(
    ("prompt", "cut"),
    [
        ("Q?\nw w w Answer: ", "Q?\nw w w Answer:"),  # no space behind it, cut or not
        ("Q?\n" + "w " * 9 + "Answer:\n", "Q?\nw w w w w\nAnswer:"),
        ("Q?\n" + " " * 50 + "Answer:", "Q?\nAnswer:"),
        ("Q?\n" + "w" * 1000 + "\nAnswer:", "Q?\n" + "w" * 40 + "\nAnswer:"),
        ("Q?\nw w w w w\nAnswer:", "Q?\nw w w w w\nAnswer:"),
        ("no such end ", "no such end "),
    ],
)
def test_a_passage_is_cut_and_its_question_stays(prompt, cut):
    assert cut_passage(prompt, 5) == cut


def test_demo_protects_general_text_where_the_method_allows_it_and_says_what_was_kept(
    run_recipe, llama_folder, task, tmp_path
):
    few = ["--model", llama_folder, "--data", task, "--task", "colours", "--steps", "2", "--r", "2", "--limit", "4"]
    told = run_recipe("demo", *few, "--method", "mora", "lori", "--device", "cpu", "--output", tmp_path)
    assert re.search(r"^mora, general text protected: .* perplexity embedded \(word perplexity", told, re.MULTILINE)
    assert re.search(r"^lori, nothing protected: .* perplexity embedded \(word perplexity", told, re.MULTILINE)
    memory = json.loads((tmp_path / "mora-colours" / "subspace" / "subspace.json").read_text())
    assert [known["name"] for known in memory["tasks"]] == ["general text", "initial"]
    assert not (tmp_path / "lori-colours" / "subspace").exists()
    with pytest.raises(FileNotFoundError):
        run_recipe("demo", *few, "--protect", tmp_path / "no.jsonl", "--device", "cpu", "--output", tmp_path)
    assert (tmp_path / "mora-colours" / "subspace").exists()
    run_recipe("demo", *few, "--protect", "none", "--device", "cpu", "--output", tmp_path)
    assert not [path for name in ("subspace", "protected") if (path := tmp_path / "mora-colours" / name).exists()]


def test_merge_takes_no_adapter_of_another_base(run_recipe, llama_folder, task, tmp_path):
    """A folder's name says method and task, and not which base it was trained on."""
    model = adapted(LORA, quantized(llama_folder))
    model.peft_config["default"].base_model_name_or_path = "another/base"
    model.save_pretrained(tmp_path / "seed-0" / "lora-colours")
    arguments = ["--model", llama_folder, "--data", task, "--tasks", "colours", "--methods", "lora"]
    with pytest.raises(SystemExit, match="lora-colours was trained on another/base, not on .*: give another --output"):
        run_recipe("merge", *arguments, "--output", tmp_path, "--reuse")


def test_merged_inputs_are_an_adapter_s_own_at_the_strength_at_which_it_is_merged(
    run_recipe, llama_folder, task, tmp_path
):
    model = adapted(LORA, quantized(llama_folder))
    for name, alpha in (("lora-colours", 8), ("merged", 2)):  # a quarter of it
        model.peft_config["default"].lora_alpha = alpha
        model.save_pretrained(tmp_path / name)
    told = run_recipe(
        "measure/merged_inputs", "--model", llama_folder, "--device", "cpu", "--data", task, "--tasks", "colours",
        "--adapters", tmp_path, "--merged", tmp_path / "merged", "--prompts", 2, "--strengths", 0.25, 1,
    )  # fmt: skip
    rows = [line for line in told.splitlines() if "colours" in line]
    assert rows[0].count("0.000") >= 2 and "0.000" not in rows[1]


def test_methods_are_compared_at_equal_parameters_and_a_stopped_run_goes_on(run_recipe, llama_folder, task, tmp_path):
    data = shutil.copytree(task, tmp_path / "data")
    common = ["--model", llama_folder, "--device", "cpu", "--data", data, "--tasks", "colours", "--steps", 2]
    common += ["--output", tmp_path, "--limit", 6, "--batch-size", 2]
    told = run_recipe("measure/methods", *common, "--methods", "lora", "--rates", 1e-3)
    assert "lora: {'r': 8, 'alpha': 16}" in told and told.count("->") == 1
    told = run_recipe("measure/methods", *common, "--methods", "lora", "smora", "--rates", 1e-3, 1e-2)
    assert told.count("->") == 3  # what was there is not trained again
    rows = {(row["method"], row["rate"]): row for row in csv_rows(tmp_path / "methods.csv")}
    assert len(rows) == 4
    shapes = Counter({(64, 64): 4, (64, 32): 4, (64, 128): 4, (128, 64): 2})  # of the tiny Llama
    for method in ("lora", "smora", "mora", "mtllora"):
        r, parameters = equal_rank(method, 8, shapes)
        if row := rows.get((method, "0.01")):
            assert (int(row["r"]), int(row["parameters"])) == (r, parameters)
        assert abs(parameters / trainable("lora", 8, shapes) - 1) < 0.15
    table = (tmp_path / "methods.md").read_text().splitlines()
    assert table[0].endswith("| greedy, label at 0.001 | greedy, label at 0.01 |") and len(table) == 4
    best = max(("0.001", "0.01"), key=lambda rate: float(rows["lora", rate]["greedy"]))
    assert f"{float(rows['lora', best]['greedy']):.2f}" in table[2] and table[2].startswith("| colours | lora | 8 |")
    write_task(data / "sizes", ("big", "small"))
    told = run_recipe("measure/methods", *common, "--tasks", "sizes", "--methods", "lora", "--rates", 1e-3)
    assert told.count("->") == 1  # a task joins
    write_task(data / "colours", ("blue", "red"))
    with pytest.raises(SystemExit, match=r"\(there, here\): \{'records of colours': "):
        run_recipe("measure/methods", *common)


def test_route_compares_ways_to_use_adapters_trained_apart(run_recipe, llama_folder, tmp_path):
    """Two tasks that a model of 24 words tells apart, random adapters: routed prompts are answered as told ones."""
    for seed, (name, words) in enumerate({"pets": ("cat", "dog"), "walks": ("north", "south")}.items()):
        records = [{"prompt": f"{words[i % 2]} {'the ' * (1 + i % 5)} Answer:", "answer": "yes"} for i in range(10)]
        for split in ("train", "test"):
            jsonl(tmp_path / "data" / name / f"{split}.jsonl", *records)
        model = adapted(LORA, quantized(llama_folder), task_type="CAUSAL_LM")
        randomize(model, seed=seed)
        model.save_pretrained(tmp_path / "adapters" / f"lora-{name}")
    pages = jsonl(tmp_path / "pages.jsonl", {"page": "a big red log sat under the small blue mat"})
    common = ["--model", llama_folder, "--device", "cpu", "--data", tmp_path / "data", "--tasks", "pets,walks"]
    common += ["--output", tmp_path, "--perplexity", pages, "--prompts", 8, "--layers", 1]
    common += ["--adapters", tmp_path / "adapters"]
    shown = run_recipe("route", *common, "--limit", 4)
    rows = {row["way"]: row for row in csv_rows(tmp_path / "route.csv")}
    run_recipe("route", *common, "--limit", 4, "--ways", "told")  # the others' rows stay
    assert {row["way"]: row for row in csv_rows(tmp_path / "route.csv")} == rows
    with pytest.raises(SystemExit, match=r"other arguments \(there, here\): \{'limit': \(4, 2\)\}"):
        run_recipe("route", *common, "--limit", 2, "--ways", "told")
    assert list(rows) == ["base", "told", "router", "top2", "always", "similar", "arrow", "merged"]
    assert float(rows["always"]["routed"]) == 1 and rows["always"]["mean"] == rows["told"]["mean"]
    assert rows["router"]["unseen"] == "1.0" and not rows["told"]["unseen"]
    assert rows["router"]["perplexity"] and not rows["told"]["perplexity"] and "route.csv" in shown
    assert TaskRouter.load(tmp_path / "router").tasks == ["pets", "walks"]
    bare = ["--bare", "--ways", "told", "router", "--limit", 2, "--output", tmp_path / "bare"]
    run_recipe("route", *common, *bare)
    told, router = csv_rows(tmp_path / "bare" / "route.csv")
    assert told["mean"] == router["mean"] and float(router["routed"]) == 1
    others = ["--ways", "--others", f"pets={tmp_path / 'adapters' / 'lora-pets'}", "--limit", 2]
    run_recipe("route", *common[:-2], *others, "--output", tmp_path / "others")  # no adapter a task is needed
    assert [row["way"] for row in csv_rows(tmp_path / "others" / "route.csv")] == ["pets"]
    with pytest.raises(SystemExit):
        run_recipe("route", *common, "--ways")
    assert "of it)" in run_recipe("route", *common, "--look", "--seeds", 0, "--layers", 2, 1)
    row, second = csv_rows(tmp_path / "look.csv")
    assert (row["layer"], second["layer"]) == ("1", "2")
    assert float(row["right"]) == 1 and float(row["false alarms"]) < 1


def test_a_picture_of_other_runs_leaves_the_one_in_the_docs(run_recipe, tmp_path):
    forgetting = load_recipe("measure/forgetting")
    docs = forgetting.DOCS / "images" / "forgetting.svg"
    before = docs.stat()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "matrix.csv").write_text(",a greedy\nzero-shot,0\nafter a,1\n")
    told = run_recipe(forgetting, tmp_path / "one" / "matrix.csv", tmp_path / "two" / "matrix.csv")
    assert told.strip() == str(tmp_path / "one" / "forgetting.svg") and Path(told.strip()).exists()
    assert forgetting.parse().titles == ["one", "two"]
    assert docs.stat() == before


def test_route_reuses_adapters_that_were_trained_as_asked_alone(run_recipe, llama_folder, task, tmp_path, monkeypatch):
    recipe = load_recipe("route")
    common = ["--device", "cpu", "--data", task, "--tasks", "colours", "--steps", 1, "--r", 2]
    common += ["--output", tmp_path / "out", "--ways", "told", "--limit", 1]
    run_recipe(recipe, *common, "--model", llama_folder)
    trained = tmp_path / "out" / "adapters" / "colours"
    other = shutil.copytree(llama_folder, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_scaling": None, "initializer_range": 0.5}))
    monkeypatch.setattr(recipe, "train", None)  # what is there is not trained again
    run_recipe(recipe, *common, "--model", llama_folder, "--ways", "base")
    for wrong, said in (
        (["--r", 4, "--steps", 3], r"'r': \(2, 4\), 'steps': \(1, 3\)"),
        (["--bare"], r"'bare': \(False, True\), 'records': "),
        (["--model", other], r"'base': "),
    ):
        with pytest.raises(SystemExit, match=rf"{trained} is a run with other arguments \(there, here\): \{{{said}"):
            run_recipe(recipe, *common, "--model", llama_folder, *wrong)
    run_recipe(recipe, *common, "--model", llama_folder)  # what was refused has changed nothing
    (trained / "run.json").unlink()
    with pytest.raises(SystemExit, match="colours does not say how it was trained: give .* as --adapters"):
        run_recipe(recipe, *common, "--model", llama_folder)


def test_route_refuses_at_once_what_would_fail_after_minutes(run_recipe, llama_folder, task, tmp_path, capsys):
    common = ["--model", llama_folder, "--device", "cpu", "--data", task, "--tasks", "colours"]
    common += ["--output", tmp_path / "out"]
    with pytest.raises(SystemExit):
        run_recipe("route", *common, "--others", "foo")
    assert "argument --others: 'foo' is no NAME=DIR" in capsys.readouterr().err
    no = tmp_path / "no"
    for more in (["--others", f"foo={no}"], ["--bank", no], ["--adapters", no]):
        with pytest.raises((ValueError, OSError, SystemExit), match="no"):
            run_recipe("route", *common, *more)
    with pytest.raises(SystemExit, match="--look --prompts 12 leaves none of colours's 12 to look at: give fewer"):
        run_recipe("route", *common, "--look", "--prompts", 4, 12)
    for folder in "ab":
        (tmp_path / folder / "x").mkdir(parents=True)
        (tmp_path / folder / "x/pages.jsonl").write_text('{"text": "a b"}\n')
    pages = [tmp_path / folder / "x/pages.jsonl" for folder in "ab"]
    (tmp_path / "number.jsonl").write_text('{"text": "a"}\n{"text": 5}\n')
    for more, said in (
        (["--unknown", tmp_path / "number.jsonl"], "number.jsonl:2: no text; write a non-empty string"),
        (["--unknown", *pages], "x/pages would be the name of two"),
        (["--perplexity", no], "No such file.*no'"),
        (["--general", no], "No such file.*no'"),
        (["--layers", 1, 99], "--layers 99: the base has 2"),
    ):
        with pytest.raises((OSError, SystemExit), match=said):
            run_recipe("route", *common, *more)
    assert not list((tmp_path / "out").glob("*"))


def test_a_file_that_cannot_be_read_begins_no_run(run_recipe, llama_folder, task, tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "lm_eval", None)  # the first thing that takes time
    common = ["--model", llama_folder, "--device", "cpu", "--data", task, "--output", tmp_path / "out"]
    for arguments in (
        ["continual", "--perplexity"],
        ["continual", "--protect"],
        ["demo", "--task", "colours", "--protect"],
    ):
        tasks = ["--tasks", "colours"] if arguments[0] == "continual" else []
        with pytest.raises(OSError, match="nowhere.jsonl"):
            run_recipe(arguments[0], *common, *tasks, *arguments[1:], tmp_path / "nowhere.jsonl")
        assert not (tmp_path / "out/run.json").exists()
    (tmp_path / "colours").mkdir()
    for name in ("train", "test"):
        (tmp_path / f"colours/{name}.jsonl").write_text(
            '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d\\ne"}\n'
        )
    with pytest.raises(ValueError, match="labels are one line each"):
        run_recipe("continual", *common, "--data", tmp_path, "--tasks", "colours")
    assert not (tmp_path / "out/run.json").exists()


ONE, NONE = "not an integer >= 1", "not an integer >= 0"
WRONG = {  # a program: arguments, and what is said of them
    "merge": {
        "--limit -5": ONE, "--tasks ,": "names nothing", "--merged-ranks a": "'a' is not sum, an integer",
        **dict.fromkeys(("--lr nan", "--lr -1"), "is not a finite number > 0"), "--weights nan": "not a finite number",
        "--ways cats": "invalid choice: 'cats'", "--device foo": "argument --device: foo: torch cannot use it here",
        '--settings {"ridge":-1}': "`ridge` must be", '--rules ties --settings {"density":2}': "`density` must be",
    },
    "score": {"--limit 0": ONE, "--batch_size 0": ONE, "--task a a": "--task, --general: 'a' is there twice"},
    "route": {
        "--prompts 0": ONE, "--others told=x": "told would be two rows of one name",
        "--false-alarms nan": "'nan' is not a number in [0, 1)", "--prompts 8 16": "with --look only",
        "--prompts 1": "similar holds each prompt of a task against its others",
        "--tasks none,museum": "a task named none would be what a router calls rows of no task",
    },
    "continual": {
        **dict.fromkeys(("--steps 0", "--batch-size 0", "--r x"), ONE), "--seeds -1": NONE,
        **dict.fromkeys(("--adapter [1]", "--callback {"), "not a JSON object"),
        '--adapter {"rank":8}': "unexpected keyword argument 'rank'", '--callback {"energy":7}': "`energy` must be",
        '--callback {"source":"gradients"}': "`protect` must be None", '--callback {"memory":"x"}': "multiple values",
    },
    "demo": {f"--output {__file__}": "is a file, and results go into a folder"},
    "measure/methods": {"--steps 0": ONE, "--rates 0": "'0' is not a finite number > 0"},
    "measure/callbacks": {
        "--scenes mixed --ways prompt": "--scenes mixed has none of --ways",
        "--steps 1": "--steps 1: lorasculpt takes half of it", "--r 1": "--r 1: growth takes half of it",
    },
    "gpu_report": {
        f"--output {__file__}": "is a file", "--steps 0": ONE, "--r 6": "6 has no quarter",
        "--device nonsense": "'nonsense' is no device of torch", "--methods mora lori mora": "mora is there twice",
    },
    "measure/bench_layers": {"--repeats 1": "not an integer >= 2", "--r 2": "2 has no quarter"},
    "measure/bench_merge": {
        "--rank 1.5": "'1.5' is not sum, an integer >= 1", "--layers 0": ONE,
        f"--output {Path(__file__).parent}": "is a folder: name the CSV file",
    },
    "measure/bench_training": {
        "--methods lora lora": "each once", "--steps 1": "at least 2, for the spread", "--r 6": "6 has no quarter",
    },
    "measure/projection_cost": {"--pairs 1": "not an integer >= 2", "--rank 0": ONE},
    "measure/protected_energy": {
        "--look self --energy 1.5": "'1.5' is not a share in (0, 1]",
        "--look self self": "--look: self would be the name of two",
        "--look room.jsonl": "--look: room would be two columns of one name",
    },
    "measure/adapter_size": {
        "--sparsity 1.5": "'1.5' is not a number in [0, 1)", "--device cpu": "unrecognized arguments: --device",
    },
    "measure/budget": {"--steps 1": "at least 2", "--r 4 --budgets 4 9": "--budgets 9: from 1 to --r, 4 experts"},
}  # fmt: skip
REFUSED = [(recipe, *wrong) for recipe, every in WRONG.items() for wrong in every.items()]


@pytest.mark.parametrize(("recipe", "arguments", "said"), REFUSED)
def test_arguments_that_give_no_run_are_refused_as_they_are_read(recipe, arguments, said, run_recipe, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_recipe(recipe, *arguments.split())
    assert said in capsys.readouterr().err


@pytest.fixture
def no_base(monkeypatch):
    """A program that opens a base has gone too far."""

    def opened(*_, **__):
        raise AssertionError("a base was looked for")

    monkeypatch.setattr(base_model, "_once", opened)
    monkeypatch.setattr(base_model, "load_base", opened)


def test_score_looks_at_the_adapter_before_the_base(run_recipe, llama_folder, task, tmp_path, no_base):
    common = ["--device", "cpu", "--data", task, "--task", "colours", "--output", tmp_path / "out"]
    common += ["--model", llama_folder, "--adapter"]
    with pytest.raises(SystemExit, match="^--adapter .*: Can't find 'adapter_config.json' at '.*nowhere'"):
        run_recipe("score", *common, tmp_path / "nowhere")
    LoraConfig(init_lora_weights="pissa").save_pretrained(tmp_path / "pissa")
    with pytest.raises(ValueError, match="pissa' was initialised by 'pissa', which changes the base model's weights"):
        run_recipe("score", *common, tmp_path / "pissa", "--baseline")


def test_protected_energy_looks_for_its_files_before_the_base(run_recipe, no_base, tmp_path):
    with pytest.raises(SystemExit, match="none.jsonl is no file"):
        run_recipe("measure/protected_energy", "--look", "none.jsonl", "--output", tmp_path / "out")


def test_route_knows_a_prompt_without_its_instruction():
    passage = load_recipe("route").without_instruction
    assert passage("What topic?\nOption: A, B \nTitle: t\nText: x\nAnswer:") == "Title: t\nText: x"
    assert passage("What topic?\nText: x\nAnswer:") == "Text: x"
    assert passage("Ticket for a cat. Floor? Answer:") == "Ticket for a cat."


def test_export_says_that_a_plain_lora_is_one_already(run_recipe, llama_folder, tmp_path):
    adapted(LORA, quantized(llama_folder)).save_pretrained(tmp_path / "lora")
    with pytest.raises(SystemExit, match="lora is LORA, a plain LoRA already: serve it as it is"):
        run_recipe("export", tmp_path / "lora", "--output", tmp_path / "out")


def test_score_refuses_an_adapter_that_names_no_base(score, run_recipe, task, tmp_path):
    METHODS["lori"](target_modules="all-linear").save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit, match="adapter does not say which base it is for: give it as --model"):
        run_recipe(score, "--adapter", tmp_path / "adapter", "--task", "colours", "--data", task, "--output", tmp_path)


@pytest.mark.parametrize("recipe", ["score", "export"])
def test_an_adapter_is_put_onto_the_revision_of_its_base(recipe, run_recipe, tmp_path):
    model = adapted("lori", tiny_llama())
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = "me/tiny", "v1"
    model.save_pretrained(tmp_path / "adapter")
    command = ("export", tmp_path / "adapter") if recipe == "export" else ("score", "--adapter", tmp_path / "adapter")
    with pytest.raises((ValueError, SystemExit), match="'me/tiny' at revision 'v1' is no folder"):
        run_recipe(*command, "--output", tmp_path / "out")


def test_score_scores_through_the_kernels_of_training(adapter, llama_folder, inputs):
    model, _ = load(base_model.find_base(llama_folder), adapter, "cpu")
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs).logits, model.train()(inputs).logits)


def test_score_refuses_a_task_that_nobody_knows(score, run_recipe, llama_folder, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    def without_defaults(**options):  # reading lm-eval's own takes ten times as long as the rest
        return TaskManager(**{**options, "include_defaults": False})

    monkeypatch.setattr("lm_eval.tasks.TaskManager", without_defaults)
    with pytest.raises(SystemExit, match="lm-eval knows no task colors_of_the_wind. Give one of its own"):
        run_recipe(score, "--model", llama_folder, "--task", "colors_of_the_wind", "--output", tmp_path)


def test_the_flags_on_the_page_give_the_base_that_score_scores_on():
    page = (RECIPES.parent / "docs" / "sft.md").read_text(encoding="utf-8")
    flags = "--load_in_4bit --use_bnb_nested_quant --dtype bfloat16"
    assert flags in page
    (model_args,) = trl.TrlParser([trl.ModelConfig]).parse_args_and_config(flags.split())
    assert trl.get_quantization_config(model_args).to_dict() == base_model.nf4_config().to_dict()


def test_lm_eval_s_own_way_to_4_bits_is_broken_as_the_page_says(llama_folder):
    from lm_eval.models.huggingface import HFLM

    page = (RECIPES.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    with pytest.raises(TypeError) as caught:
        HFLM(pretrained=llama_folder, load_in_4bit=True, device="cpu")
    assert str(caught.value).replace("LlamaForCausalLM", "…ForCausalLM") in page


def test_plain_lm_eval_over_a_4_bit_folder_scores_as_we_do(adapter, llama_folder, tmp_path):
    if "lora" in adapter.name:
        pytest.skip("plain lm_eval scores LoRA with bitsandbytes' own kernels")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = str(tmp_path / "nf4")
    base, tokenizer = base_model.load_base(llama_folder, quantization_config=base_model.nf4_config())
    base.resize_token_embeddings(len(tokenizer))  # with peft=, plain lm_eval does this to a model with spare rows
    for part in (base, tokenizer):
        part.save_pretrained(folder)
    model, _ = load(folder, adapter, "cpu")
    ours = HFLM(pretrained=model, tokenizer=tokenizer, softmax_dtype="float32")
    plain = HFLM(pretrained=folder, peft=str(adapter), dtype="bfloat16", softmax_dtype="float32", device="cpu")
    requests = [Instance("loglikelihood", {}, ("the cat", f" {word}"), 0) for word in ("sat", "ran", "red")]
    assert ours.loglikelihood(requests) == plain.loglikelihood(requests)


def test_callbacks_are_compared_with_the_same_training_without_them(run_recipe, llama_folder, tmp_path, monkeypatch):
    recipe = load_recipe("measure/callbacks")
    monkeypatch.setattr(recipe, "HELD_OUT", recipe.HELD_OUT[:1])
    monkeypatch.setattr(recipe, "MERGED", ("growth",))
    for name, labels in (("colours", ("red", "blue")), ("sizes", ("big", "small"))):
        write_task(tmp_path / name, labels)
    common = ["--model", llama_folder, "--device", "cpu", "--data", tmp_path, "--tasks", "colours,sizes", "--steps", 2]
    common += ["--prompt-steps", 1, "--r", 2, "--output", tmp_path / "out", "--rates", 1e-2, "--prompt-rates", 0.1]
    told = run_recipe(recipe, *common, "--scenes", "apart", "--ways", "growth")
    assert told.count("->") == 6
    told = run_recipe(recipe, *common, "--ways", "growth", "mtllora", "projected")
    assert told.count("->") == 2 + 3  # what was there is not trained again
    rows = {(row["way"], row["scored"]): row for row in csv_rows(tmp_path / "out" / "callbacks.csv")}
    assert len(rows) == 11
    shapes = Counter({(64, 64): 4, (64, 32): 4, (64, 128): 4, (128, 64): 2})  # of the tiny Llama
    assert int(rows["growth", "sizes"]["parameters"]) == trainable("lora", 2, shapes)
    assert float(rows["growth", "sizes, sum"]["perplexity ratio"]) != 1
    memory = json.loads((tmp_path / "out" / "prompt-projected" / "subspace" / "subspace.json").read_text())
    assert len(memory["tasks"]) == 2
    tables = (tmp_path / "out" / "callbacks.md").read_text().split("\n\n")
    assert tables[::2] == ["apart", "mixed", "prompts"]
    assert "| colours | sizes | colours, sum | sizes, sum | colours, mean | sizes, mean |" in tables[1]
    for make in recipe.APART.values():
        make(60, 8, [tmp_path])  # with arguments that the callback takes
    write_task(tmp_path / "sizes", ("small", "big"))
    with pytest.raises(SystemExit, match=r"\(there, here\): \{'records': "):
        run_recipe(recipe, *common)
