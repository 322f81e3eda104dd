"""The command `peft-mora`: each verb does what the library's call does, and says in one line what it does not."""

import json
import re
import shlex
import shutil
from unittest.mock import Mock

import pytest
import torch
import transformers
from helpers import LORA, METHODS, STATIC, adapted, jsonl, randomize, tiny_llama, tiny_t5
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.pipelines import SUPPORTED_TASKS

from peft_mora import SMoraConfig, TaskRouter, prune_experts, record_usage
from peft_mora.export import Effect, exact_lora, save_lora
from peft_mora.info import adapter_info, vllm_options
from peft_mora.merging import merge_adapters
from peft_mora.opening import revision_of, with_adapter
from peft_mora.routed import routed_layers
from peft_mora_command import RUN, USAGE, VERBS, main, parse, read_texts
from trl_callbacks import protect
from trl_callbacks.subspace import Subspace


PETS = ["the cat sat on the mat", "the dog ran on the log", "a big cat sat", "a small dog ran"]
WALKS = ["north south east", "south west no", "east east north west", "west west north"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in: texts of two tasks, as JSON lines and as lines."""
    monkeypatch.chdir(tmp_path)
    records = [{"prompt": text, "answer": "yes"} for text in PETS]
    (tmp_path / "pets.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (tmp_path / "walks.txt").write_text("\n\n".join(WALKS))
    return tmp_path


@pytest.fixture
def command(capsys):
    """Run `peft-mora ...`; gives what it printed, or, where it stopped, what it said then."""

    def run(*arguments):
        capsys.readouterr()
        try:
            main(list(map(str, arguments)))
        except SystemExit as stop:
            return str(stop.code)
        return capsys.readouterr().out

    return run


def trained(method, llama_folder, folder, tasks=1, **fields):
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model = adapted(LORA if method == "lora" else method, base, tasks=tasks, task_type="CAUSAL_LM", **fields)
    model.save_pretrained(folder)
    return model


def same_tensors(one, other):
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("method", [*METHODS, "lora"])
def test_info_says_what_an_adapter_is_and_loads_no_model(method, llama_folder, here, command, monkeypatch):
    tasks = 3 if method.startswith("mora") else 1
    model = trained(method, llama_folder, here / "one", tasks, rank_pattern={"layers.1.mlp.up_proj": 6})
    monkeypatch.setattr(transformers.PreTrainedModel, "__init__", None)
    monkeypatch.setattr(torch, "load", None)
    found = adapter_info(here / "one")
    assert found.merges == (method in (*STATIC, "lora")) and found.routed != found.merges
    names = [n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "base_layer")]
    config = model.peft_config["default"]
    blocks = 1 + getattr(config, "experts", tasks - 1)  # of r each
    assert found.ranks == {name: (6 if name.endswith("1.mlp.up_proj") else config.r) * blocks for name in names}
    assert found.parameters == sum(t.numel() for t in load_file(here / "one/adapter_model.safetensors").values())
    assert found.base == llama_folder and found.tasks == getattr(model.peft_config["default"], "tasks", [])
    shown = command("info", here / "one")
    assert method.split("-")[0].upper() in shown and all(task in shown for task in found.tasks)
    assert {"lora": "vllm serve"}.get(method, "pipeline" if found.routed else "peft-mora export") in found.serve[0]
    assert json.loads(command("info", here / "one", "--json"))["serve"] == found.serve


def test_info_counts_experts_and_asks_for_the_task_that_an_adapter_needs(llama_folder, here):
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    config = SMoraConfig(r=8, top_k=1, rank_partition=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.save_pretrained("smora")
    assert set(adapter_info("smora").ranks.values()) == {2}
    model = adapted("mora", model.unload(), task_type="CAUSAL_LM")
    with torch.no_grad(), record_usage(model):
        model(torch.arange(4, 24).view(4, 5))
    prune_experts(model, 1.0)  # few always act
    model.save_pretrained("mora")
    left = {name.removeprefix("base_model.model."): len(layer.mora_A["default"].weight)
            for name, layer in routed_layers(model).items()}  # fmt: skip
    assert adapter_info("mora").ranks == left and 0 in left.values()
    model = adapted("mtllora", model.unload(), default_task=None, task_type="CAUSAL_LM")
    model.save_pretrained("mtllora")
    (serve,) = adapter_info("mtllora").serve
    program = shlex.split(serve)[2].replace('"...")', '"the cat", max_new_tokens=2)')
    exec(program, {})  # pipeline, set_task, a prompt
    assert 'set_task(pipe.model, "a")' in program


@pytest.mark.parametrize(
    ("kind", "fields", "opens"),
    [
        (AutoModelForSequenceClassification, {"task_type": "SEQ_CLS"}, "text-classification"),
        (AutoModelForSequenceClassification, {"modules_to_save": ["score"]}, "text-classification"),
        (AutoModelForTokenClassification, {"task_type": "TOKEN_CLS"}, "token-classification"),
        (AutoModel, {"task_type": "FEATURE_EXTRACTION"}, "feature-extraction"),
        (AutoModel, {}, "AutoPeftModel"),
        (AutoModelForSeq2SeqLM, {"task_type": "SEQ_2_SEQ_LM"}, "AutoPeftModelForSeq2SeqLM"),
        (AutoModelForSeq2SeqLM, {}, "AutoPeftModel"),
        (AutoModelForCausalLM, {}, "vllm"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "mora-dense"])
def test_info_names_what_opens_the_model_that_was_trained(method, kind, fields, opens, llama_folder, here):
    """A pipeline that writes text would open a classifier, with a head of noise."""
    folder = llama_folder
    if kind is AutoModelForSeq2SeqLM:
        tiny_t5().save_pretrained(folder := str(here / "t5"))
    labels = {"num_labels": 3} if "Classification" in kind.__name__ else {}
    base = kind.from_pretrained(folder, dtype=torch.float32, **labels)
    targets = ["q", "v"] if "t5" in folder else ["q_proj", "v_proj"]
    model = adapted(LORA if method == "lora" else method, base, target_modules=targets, **fields)
    model.save_pretrained(here / "one")
    serve = adapter_info("one").serve
    assert opens in serve[0] or (opens in serve[-1] and serve[0].startswith("peft-mora export"))
    assert opens == "vllm" or len(serve) == 1
    assert opens == "vllm" or opens.startswith("Auto") or opens in SUPPORTED_TASKS
    if opens != "vllm":
        exec(shlex.split(serve[0])[2].replace('"...")', '"the cat sat")'), names := {})
        found = names.get("model") or names["pipe"].model
        found = found.get_base_model() if isinstance(found, PeftModel) else found
        assert type(found) is type(model.get_base_model())
        given = {"input_ids": torch.arange(4, 12)[None]}
        given |= {"decoder_input_ids": torch.arange(4, 8)[None]} if "t5" in folder else {}
        torch.testing.assert_close(found.float().eval()(**given)[0], model(**given)[0], rtol=0.02, atol=0.02)


def test_info_sends_no_tied_head_to_the_export_that_refuses_it(llama_folder, here, command):
    for tied in (False, True):
        tiny_llama(tied=tied).save_pretrained(here / "base")
        for method in ("lora", "lori"):
            trained(method, here / "base", here / method, target_modules=["q_proj", "lm_head"])
            found = adapter_info(method)
            assert (found.lora == "no") == tied == ("whose weight is the embeddings' too" in str(found))
            assert ("pipeline" in found.serve[0]) == tied
    assert "whose weight is the embeddings' too" in command("export", "lora", "--output", "x")


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), 4),
        (LoHaConfig(r=4, target_modules=["q_proj"]), 2),
        (VeraConfig(r=4, target_modules=["q_proj"]), 2),
        (RandLoraConfig(r=4, target_modules=["q_proj"]), 2),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), 0),
    ],
)
def test_info_counts_the_modules_of_other_methods_and_gives_no_rank_to_what_has_none(config, modules, here):
    get_peft_model(tiny_llama(), config).save_pretrained(here / "one")
    found = adapter_info("one")
    assert len(found.ranks) == modules and " rank " not in str(found) and ("modules" in str(found)) == bool(modules)


@pytest.mark.parametrize("method", STATIC)
def test_export_writes_what_the_library_writes_and_reads_no_weight_of_the_base(
    method, llama_folder, here, command, monkeypatch
):
    model = trained(method, llama_folder, here / "one", 2 if method == "mora-dense" else 1)
    save_lora(model, exact_lora(model), here / "wanted")
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", None)
    said = command("export", "one", "--output", "lora")
    assert re.search(r"^exact; LoRA of rank \d+ in lora; vLLM: --enable-lora --max-lora-rank (8|16|32)\n$", said)
    same_tensors(here / "wanted", here / "lora")
    assert adapter_info("lora").lora == "is"
    assert "plain LoRA already" in command("export", "lora", "--output", "again")


@pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", None])
@pytest.mark.parametrize("base_to", [False, True])
def test_export_opens_the_base_as_the_adapter_was_trained_over_it(base_to, task_type, llama_folder, here, command):
    """A causal language model has other names for its modules, so that nothing of the file would be loaded."""
    base = AutoModel.from_pretrained(llama_folder, dtype=torch.float32)
    model = adapted("lori", base, task_type=task_type)
    model.save_pretrained(here / "one")
    how = ("--base-to", "base16", "--load-in-4bit", "--device", "cpu") if base_to else ()
    said = command("export", "one", "--output", "lora", *how)
    assert said.startswith("exact; ") and "vLLM" not in said
    save_lora(model, exact_lora(model), here / "wanted")
    same_tensors(here / "wanted", here / "lora")
    mora = adapted("mora", AutoModel.from_pretrained(llama_folder, dtype=torch.float32), task_type=task_type)
    mora.save_pretrained(here / "mora")
    said = command("export", "mora", "--output", "no", "--texts", "pets.jsonl", "--device", "cpu")
    assert "measured by next tokens, and mora is over a LlamaModel" in said and not (here / "no").exists()


@pytest.mark.parametrize("method", STATIC)
def test_export_of_an_adapted_head_reads_its_file_as_peft_saves_it(method, llama_folder, here, command):
    """With a copy of the base's own weight; where that is the embeddings' too, there is no such LoRA."""
    model = trained(method, llama_folder, here / "one", target_modules=["q_proj", "lm_head"])
    assert command("export", "one", "--output", "lora").startswith("exact; ")
    save_lora(model, exact_lora(model), here / "wanted")
    same_tensors(here / "wanted", here / "lora")
    tiny_llama(tied=True).save_pretrained(here / "tied")
    trained(method, here / "tied", here / "two", target_modules=["q_proj", "lm_head"])
    assert "whose weight is the embeddings' too" in command("export", "two", "--output", "no")


def test_a_base_is_opened_at_the_revision_that_its_adapter_names(llama_folder, here, monkeypatch):
    trained("lori", llama_folder, here / "one", revision="v1")
    assert revision_of("one", llama_folder) == {"revision": "v1"} and revision_of("one", "other") == {}
    asked = []

    def config(name, **options):
        asked.append((name, options))
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", config)
    with pytest.raises(SystemExit, match="enough"):
        main(["export", "one", "--output", "lora"])
    assert asked == [(llama_folder, {"revision": "v1"})]


def test_export_writes_the_base_in_4_bits_as_a_server_is_to_load_it(llama_folder, here, command, monkeypatch):
    trained("lori", llama_folder, here / "one")
    how = ("export", "one", "--output", "lora", "--device", "cpu", "--base-to", "base16")
    assert "is not quantised: a server loads it as it is" in command(*how) and not (here / "lora").exists()
    assert "its base in 16 bits in base16" in command(*how, "--load-in-4bit")
    assert adapter_info("lora").base == str(here / "base16")
    assert "quantization_config" not in json.loads((here / "base16/config.json").read_text())
    assert "base16 exists" in command("export", "one", "--output", "other", "--base-to", "base16")
    how = ("export", "one", "--output", "other", "--load-in-4bit", "--device", "cpu", "--base-to")
    assert "give a folder for each" in command(*how, "other/../other")
    inside = ("export", "one", "--output", "whole/lora", "--load-in-4bit", "--device", "cpu", "--base-to", "whole")
    assert "give a folder for each" in command(*inside) and not (here / "whole").exists()
    monkeypatch.setattr("peft_mora.export.save_plain", Mock(side_effect=OSError("the disk is full")))
    assert "the disk is full" in command(*how, "base") and not (here / "other").exists()


@pytest.mark.parametrize("idle", [("--rank", 2), ("--texts", "pets.jsonl"), ("--test-texts", "walks.txt")])
def test_an_exact_export_refuses_what_is_of_a_fitted_one(idle, llama_folder, here, command):
    trained("lori", llama_folder, here / "one")
    assert f"{idle[0]} would change nothing" in command("export", "one", "--output", "lora", *idle)
    assert not (here / "lora").exists()


def test_export_of_a_routed_adapter_is_fitted_measured_and_refused_where_it_is_far(llama_folder, here, command):
    trained("mora", llama_folder, here / "one")
    assert "give --texts FILE" in command("export", "one", "--output", "lora")
    arguments = ("export", "one", "--output", "lora", "--texts", "pets.jsonl", "--test-texts", "walks.txt")
    assert "Nothing written: fitted on 4 texts" in command(*arguments) and not (here / "lora").exists()
    both = ("export", "one", "--output", "lora", "--texts", "twice.jsonl", "--device", "cpu", "--max-error")
    jsonl(
        here / "twice.jsonl", *[{"text": text} for text in ("a cat", "a dog", "the log", "my mat") for _ in range(4)]
    )
    assert "fitted on 3 texts; error of the effect on logits, 1 others" in command(*both, 0)
    fitted = command(*both, 9, "--test-texts", "twice.jsonl")
    assert "All of twice.jsonl is in twice.jsonl too" in fitted and not (here / "lora").exists()
    said = command(*arguments, "--max-error", 9, "--device", "cpu")
    assert "LoRA of rank 4 in lora; vLLM: --enable-lora --max-lora-rank 8\n" in said
    assert adapter_info("lora").lora == "is"


def test_a_bound_of_the_error_is_a_number_and_nothing_is_written_where_there_is_no_error(
    llama_folder, here, command, monkeypatch
):
    trained("mora", llama_folder, here / "one")
    how = ("export", "one", "--output", "lora", "--texts", "pets.jsonl", "--device", "cpu", "--max-error")
    assert [command(*how, bound) for bound in ("nan", "inf", "-1")] == ["2"] * 3
    monkeypatch.setattr("peft_mora.export.effect_error", lambda *_: Effect(float("nan"), 0.0, 0.0))
    assert "Nothing written" in command(*how, 9) and not (here / "lora").exists()
    weights = load_file(here / "one/adapter_model.safetensors")
    next(tensor for key, tensor in weights.items() if "mora_B" in key)[0, 0] = float("nan")
    save_file(weights, here / "one/adapter_model.safetensors")
    assert re.search("^peft-mora export: Adapter 'default' has values that are not finite", command(*how, 9))


@pytest.mark.parametrize(("exact", "what_to_do"), [(True, "merge it into its base"), (False, "at a lower --rank")])
def test_the_ranks_that_vllm_takes_are_named(exact, what_to_do):
    assert [vllm_options(rank, exact).split()[-1] for rank in (1, 9, 512)] == ["1", "16", "512"]
    assert re.search(f"^no: it takes ranks up to 512, .*{what_to_do}", vllm_options(513, exact))


def test_merge_writes_what_the_library_writes(llama_folder, here, command, capsys, monkeypatch):
    for seed, method in enumerate(("lora", "mora-dense")):
        trained(method, llama_folder, here / f"a{seed}", seed + 1)
    merge_adapters(["a0", "a1"], "ties", 6, [1.0, 0.5], after=["match"], density=0.3, output="wanted")
    how = ("--rule", "ties", "--rank", 6, "--weights", 1, 0.5, "--after", "match", "--options", '{"density": 0.3}')
    assert "ties → match, rank 6" in command("merge", "a0", "a1", "--output", "merged", *how)
    assert command("merge", "a0", "a1", "--output", "both", "--rank", "half") == "2"
    assert "'half' is not sum, an integer >= 1, or a share of the energy" in capsys.readouterr().err
    same_tensors(here / "wanted", here / "merged")
    looked = command("merge", "a0", "a1", "--output", "both", "--model", llama_folder, "--prompts", "pets.jsonl",
                     "--prompts", "walks.txt", "--options", '{"passes": 1}', "--distill", 1)  # fmt: skip
    assert looked.startswith("inputs → distill, rank 8") and set(adapter_info("both").ranks.values()) == {8}
    told = json.loads((here / "both/merge_report.json").read_text())["options"]
    assert (told["passes"], told["distill"]) == (1, 1)
    own = ("--model", llama_folder, "--prompts", "self", "--rank", 2)
    assert re.search(
        "^peft-mora merge: What a0 writes itself is no prompt",
        command("merge", "a0", "a1", "--output", "own", *own),
    )
    monkeypatch.setattr("peft_mora.merging.written.LIKELIER", -9.0)
    assert command("merge", "a0", "a1", "--output", "own", *own, "--options", '{"passes": 1}').startswith(
        "inputs, rank 2"
    )
    assert json.loads((here / "own/merge_report.json").read_text())["options"]["prompts"] == "self"


def test_merge_opens_the_base_as_the_first_adapter_was_trained_over_it(llama_folder, here, command):
    for seed, name in enumerate(("a", "b")):
        model = adapted(LORA, AutoModel.from_pretrained(llama_folder, dtype=torch.float32), target_modules=["q_proj"],
                        task_type="FEATURE_EXTRACTION")  # fmt: skip
        randomize(model, seed)
        model.save_pretrained(here / name)
    how = ("--model", llama_folder, "--device", "cpu", "--prompts", "pets.jsonl", "walks.txt")
    assert command("merge", "a", "b", "--output", "both", *how).startswith("inputs, rank 8")
    assert adapter_info("both").opens == "feature-extraction"
    assert "nowhere/adapter_config.json is missing" in command("merge", "a", "nowhere", "--output", "x", *how)


def test_export_opens_a_model_of_images_and_text_by_the_class_that_it_names(here, command):
    """Trained as "CAUSAL_LM", of which transformers' auto class has no such model."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16, projection_dim=32),
        text_config=LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64),
        image_token_index=60,
    )
    LlavaForConditionalGeneration(config).save_pretrained(here / "base")
    base = LlavaForConditionalGeneration.from_pretrained(here / "base")
    model = adapted("lori", base, target_modules=r".*language_model.*q_proj", task_type="CAUSAL_LM")
    model.save_pretrained(here / "one")
    assert command("export", "one", "--output", "lora").startswith("exact; ")
    save_lora(model, exact_lora(model), here / "wanted")
    same_tensors(here / "wanted", here / "lora")


@pytest.mark.parametrize("method", ["lori", "mora"])
def test_export_of_what_trains_more_is_refused_by_its_config_before_a_base_is_opened(
    method, llama_folder, here, command, monkeypatch
):
    """A classifier of three labels would be said to be of another base."""
    base = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=3)
    adapted(method, base, task_type="SEQ_CLS").save_pretrained(here / "one")
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    said = command("export", "one", "--output", "lora", "--texts", "pets.jsonl")
    assert re.search(r"^peft-mora export: one has modules_to_save=\['classifier', 'score'\], .*Train without it", said)


def test_a_damaged_base_and_a_folder_in_a_file_are_one_line_before_the_work(llama_folder, here, command):
    for name in ("a", "b"):
        trained("lora", llama_folder, here / name)
    trained("mora", llama_folder, here / "mora")
    shutil.copytree(llama_folder, here / "base")
    weights = here / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    how = ("--model", "base", "--device", "cpu")
    prompts = ("--prompts", "pets.jsonl", "walks.txt")
    for arguments in (
        ("merge", "a", "b", "--output", "x", *how, *prompts),
        ("export", "mora", "--output", "x", *how, "--texts", "pets.jsonl"),
        ("route", "router", *how, "--add", "pets=pets.jsonl"),
        ("protect", "base", "--output", "x", "--device", "cpu"),
    ):
        line = command(*arguments)
        assert re.search(f"^peft-mora {arguments[0]}: The weights of base are damaged .*save them again.$", line), line
    for arguments in (
        ("merge", "a", "b", "--output", "pets.jsonl/x", "--model", "nowhere", *prompts),
        ("export", "mora", "--output", "pets.jsonl/x", "--model", "nowhere"),
        ("export", "mora", "--output", "x", "--base-to", "pets.jsonl/x", "--model", "nowhere"),
        ("protect", "nowhere", "--output", "pets.jsonl/x"),
    ):
        line = command(*arguments)
        assert re.search(f"^peft-mora {arguments[0]}: .*pets.jsonl is a file, so that no folder can be", line), line
    assert "`rounds` must be an integer" in command(
        "merge", "a", "b", "--output", "x", "--rule", "lore", "--options", '{"rounds": 2.5}'
    )
    wrong = ("--rule", "iso-c", "--distill", 1, "--options", '{"factor": "two"}')
    said = command("merge", "a", "b", "--output", "x", "--model", "nowhere", *prompts, *wrong)
    assert "`factor` must be a number" in said


def test_route_makes_extends_asks_and_ships_a_router(llama_folder, here, command):
    model = ("--model", llama_folder, "--device", "cpu")
    assert "router knows pets" in command("route", "router", *model, "--add", "pets=pets.jsonl", "--false-alarms", 0)
    assert "router knows pets, walks" in command("route", "router", *model, "--add", "walks=walks.txt")
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    router = TaskRouter.load("router", base, AutoTokenizer.from_pretrained(llama_folder))
    asked = ["the cat sat on the mat", "west north\neast"]
    names, probabilities = router.route(asked)
    rows = [line.split("\t") for line in command("route", "router", *model, *asked).splitlines()]
    assert [row[0] for row in rows] == names == ["pets", "walks"] and rows[1][2] == "west north east"
    assert [float(row[1]) for row in rows] == pytest.approx(probabilities.amax(1).tolist(), abs=1e-3)
    for name in ("pets", "walks"):
        trained("lora", llama_folder, here / name)
    adapters = ("--adapters", "pets=pets", "walks=walks", "--output", "routed")
    assert "2 adapters and the router" in command("route", "router", *model, *adapters)
    opened = PeftModel.from_pretrained(base, "routed")
    assert TaskRouter.of(opened).tasks == ["pets", "walks"]
    found = adapter_info("routed")
    assert found.tasks == ["pets", "walks"] and found.adapters == {"pets": "LORA", "walks": "LORA"}
    assert "pipeline" in found.serve[0] and "router" in command("info", "routed")
    assert set(found.ranks.values()) == set(adapter_info("pets").ranks.values())  # a row goes through one of them
    assert command("route", "router") == "router knows pets, walks\n"
    adapters = ("--adapters", "pets=pets", "walks=walks", "dogs=pets", "--output", "more")
    assert "no task 'dogs', but pets, walks: --add TASK=FILE" in command("route", "router", *model, *adapters)
    assert command("route", "router", "--remove", "walks") == "router knows pets\n"


def test_a_task_may_be_named_as_no_module_may(llama_folder, here, command):
    model = ("--model", llama_folder, "--device", "cpu")
    command("route", "router", *model, "--add", "training=pets.jsonl", "v1.5=walks.txt", "v1_5=walks.txt")
    for name in ("pets", "walks"):
        trained("lora", llama_folder, here / name)
    adapters = ["--adapters", "training=pets", "v1.5=walks", "--output", "routed"]
    assert "Task 'v1_5' has no adapter 'v1_5'" in command("route", "router", *model, *adapters)
    adapters.insert(1, "v1_5=pets")
    assert "3 adapters and the router" in command("route", "router", *model, *adapters)
    opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama_folder), "routed").eval()
    assert TaskRouter.of(opened).tasks == adapter_info("routed").tasks == ["training", "v1.5", "v1_5"]
    rows = json.loads((here / "routed/adapter_config.json").read_text())["rows"]
    assert rows == {"training": "training_", "v1.5": "v1_5_", "v1_5": "v1_5"}
    assert opened(torch.tensor([[4, 5, 6]])).logits.isfinite().all()


def test_a_folder_with_something_else_is_refused_before_the_model_is_loaded(llama_folder, here, command):
    for name in ("pets", "walks"):
        trained("lora", llama_folder, here / "out" / name)
    model = trained("lori", llama_folder, here / "lori")
    save_lora(model, exact_lora(model), here / "lora")  # two files, of the names of a routed folder's
    how = ("--model", llama_folder, "--device", "cpu")
    command("route", "out/router", *how, "--add", "pets=pets.jsonl", "--add", "walks=walks.txt")
    before = sorted(here.rglob("*"))
    adapters = ("--model", "nowhere", "--adapters", "pets=out/pets", "walks=out/walks", "--output")
    for arguments, said in (
        (("route", "out/router", *adapters, "out"), "out holds 'pets', which would be deleted.*a folder of its own"),
        (("route", "out/router", *adapters, "lora"), "lora holds an adapter, which would be deleted"),
        (("route", "out/router", *adapters, "out/router"), "out/router holds 'router.json', which"),
        (("route", ".", "--model", "nowhere", "--add", "pets=pets.jsonl"), "holds 'lora', which would be deleted"),
        (("route", "out", "--remove", "pets"), "out holds 'pets', which would be deleted"),
        (("protect", "nowhere", "--output", "out"), "out holds 'pets', which would be deleted"),
    ):
        line = command(*arguments)
        assert re.search(f"^peft-mora {arguments[0]}: .*{said}", line), line
    assert sorted(here.rglob("*")) == before


def test_protect_writes_the_memory_that_the_library_writes(llama_folder, here, command):
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    wanted = protect(base, "pets.jsonl", "wanted", tokenizer=AutoTokenizer.from_pretrained(llama_folder), energy=0.9)
    said = command("protect", llama_folder, "--output", "memory", "--source", "pets.jsonl", "--energy", 0.9,
                   "--device", "cpu")  # fmt: skip
    found = Subspace.load("memory")
    assert found.tasks == wanted.tasks and f"memory: {wanted.tasks[0]['tokens']} tokens, 8 inputs" in said
    assert all(torch.equal(basis, wanted.right[name]) for name, basis in found.right.items())


def test_what_is_refused_is_one_line_that_says_what_to_do(llama_folder, here, command):
    trained("flylora", llama_folder, here / "fly")
    trained("lora", llama_folder, here / "lora")
    (here / "bad").mkdir()
    (here / "bad/adapter_config.json").write_text('{"peft_type": "LORA"')
    (here / "bad/adapter_model.safetensors").write_text("no weights")
    (here / "bad.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}\n')
    (here / "chat.jsonl").write_text(
        '{"prompt": "a", "answer": 1}\n{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n'
    )
    (here / "half.jsonl").write_text('{"text": "a"}\n{"text": "b \\ud800"}\n')
    (here / "utf16.txt").write_text("a\nb", encoding="utf-16")
    (here / "mark.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert read_texts("mark.jsonl") == ["a"]
    routed = ("route", "router", "--model", llama_folder)
    # What is wrong is said before a model is opened.
    missing = ("--model", "nowhere", "--device", "cpu")
    looked = ("merge", "lora", "--output", "both", *missing, "--prompts", "pets.jsonl")
    for arguments, said in (
        ((*looked, "--rule", "foo"), "`rule` must be 'inputs'"),
        ((*looked, "--options", '{"density": 0.1}'), "takes ridge and floor, got density=0.1"),
        ((*looked, "--weights", "1", "2"), "--weights has 2 numbers for 1 folders"),
        ((*looked[:-1], "half.jsonl"), r"half.jsonl:2: \\ud800 is half a character"),
        ((*looked[:-1], "utf16.txt"), "utf16.txt:1: the text is UTF-16: save the file as UTF-8"),
        (("route", "no", *missing, "--add", "pets=nothere.txt"), "No such file or directory: 'nothere.txt'"),
        (("route", "no", *missing, "a prompt"), "no/router.safetensors is missing"),
        (("protect", "nowhere", "--output", "m", "--source", "nothere.jsonl"), "--source nothere.jsonl: no such file"),
        (("info", "nowhere"), "nowhere/adapter_config.json is missing: give the folder"),
        (("info", "bad"), "bad is damaged .*: save the adapter again"),
        (("merge", "lora", "fly", "--output", "both"), "FLYLORA adapter .*peft-mora export fly --texts FILE"),
        (("merge", "lora", "--output", "lora"), "lora exists: delete it"),
        (("merge", "lora", "--output", "both", "--rule", "avg"), "`rule` must be 'inputs'"),
        (("merge", "lora", "--output", "both", "--prompts", "pets.jsonl"), "--model and --prompts go together"),
        (("export", "lora", "--output", "x"), "a plain LoRA already"),
        (("protect", "lora", "--output", "m"), "lora is an adapter: give its base model"),
        (("route", "new", "--model", "fly", "--add", "pets=pets.jsonl"), "fly is an adapter: give its base model"),
        ((*routed, "--device", "cuda:99", "--add", "a=pets.jsonl"), "--device cuda:99: torch cannot use it here"),
        (("protect", llama_folder, "--output", "m", "--device", "meta"), "--device meta: torch cannot use it here"),
        (("export", "fly", "--output", "x", "--texts", "pets.jsonl", "--model", here / "no"), "no is no folder here"),
        (("protect", here / "no", "--output", "m"), f"{here}/no is no folder here, and no name on the Hub"),
        (("merge", "lora", "--output", "x", "--model", here / "no", "--prompts", "pets.jsonl"), "no is no folder h"),
        (("export", "fly", "--output", "lora"), "lora exists: delete it or choose"),
        (("export", "fly", "--output", "x", "--texts", "chat.jsonl"), "chat.jsonl:2 has a list as 'completion'"),
        (("route", "nowhere", "a prompt"), "with the base model: give it as --model"),
        ((*routed, "a prompt"), "router/router.safetensors is missing"),
        ((*routed, "--add", "pets"), "--add pets: write TASK=PATH"),
        ((*routed, "--add", "pets=pets.jsonl", "pets=walks.txt"), "--add has pets twice, of which one would be left"),
        ((*routed, "--false-alarms", 0.5, "a prompt"), "--false-alarms is of a new router"),
        ((*routed, "--add", "pets=bad.jsonl"), "bad.jsonl:2 has no text: write"),
    ):
        line = command(*arguments)
        assert "\n" not in line and re.search(f"^peft-mora {arguments[0]}: .*{said}", line), line
    assert command("merge", "lora") == "2"  # argparse has said why
    for flag in ("--distill -1", "--weights nan", "--rank 0"):
        assert command("merge", "lora", "--output", "x", *flag.split()) == "2"
    assert command("export", "fly", "--output", "x", "--rank", "0") == "2"
    for flag in ("--tokens 0", "--energy 2", "--energy nan"):
        assert command("protect", llama_folder, "--output", "m", *flag.split()) == "2"
    assert command("route", "new", "--add", "pets=pets.jsonl", "--false-alarms", "nan") == "2"
    for options in ("[1]", "xx", '{"seed": 3}', "{", '{"output": "x"}', '{"tokenizer": "x"}'):
        assert command("merge", "lora", "fly", "--output", "both", "--options", options) == "2"
    taught = command("merge", "lora", "--output", "both", "--options", '{"distill": 4}')
    assert "`distill` learns from prompts: give `model` and `prompts`" in taught


def test_an_adapter_of_another_base_is_refused_in_one_line_that_names_it(llama_folder, here, command):
    config = LlamaConfig(hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=64)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(here / "other")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(here / "other")
    for method in ("lora", *METHODS):
        trained(method, llama_folder, here / method)
        with pytest.raises(ValueError):
            with_adapter(AutoModelForCausalLM.from_pretrained("other"), method)
    how = ("--model", "other", "--device", "cpu")
    assert "router knows" in command("route", "router", *how, "--add", "pets=pets.jsonl", "walks=walks.txt")
    files = ("--adapters", "pets=lora", "walks=lora", "--output", "out")
    for arguments, folder in (
        (("export", "mora", "--output", "out", "--texts", "pets.jsonl"), "mora"),
        (("export", "lori", "--output", "out"), "lori"),
        (("route", "router", *files), "lora"),
    ):
        line = command(*arguments, *how)
        wanted = rf"adapter in {folder} is of another base than other \(size mismatch .*: give the one .* as --model"
        assert "\n" not in line and re.search(f"^peft-mora {arguments[0]}: The {wanted}", line), line
    weights = here / "lora/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:99])
    assert "lora is damaged" in command("route", "router", *files, *how) and not (here / "out").exists()


@pytest.mark.parametrize("method", ["lora", *METHODS])
def test_an_adapter_that_the_base_has_no_place_for_is_refused_first_or_second(method, llama_folder, tmp_path):
    """Of another class of the same model; of one with more layers; of one with fewer."""

    def base(kind=AutoModelForCausalLM, layers=2):
        return kind.from_pretrained(llama_folder, num_hidden_layers=layers, dtype=torch.float32)

    config = LORA if method == "lora" else method
    for name, model in (("kind", base(AutoModel)), ("more", base(layers=3)), ("fewer", base(layers=1))):
        adapted(config, model, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} is of another base .*as LlamaForCausalLM it has no"):
            with_adapter(base(), tmp_path / name)
    adapted(config, base(), task_type="CAUSAL_LM").save_pretrained(tmp_path / "right")
    model = with_adapter(with_adapter(base(), tmp_path / "right", "a"), tmp_path / "right", "b")
    with pytest.raises(ValueError, match="kind is of another base .*as LlamaForCausalLM it has no"):
        with_adapter(model, tmp_path / "kind", "c")


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1, 2]),
    ],
)
def test_adapters_of_peft_s_own_kinds_open(config, llama_folder, tmp_path):
    """Some keep weights under other names in their files, or share one among modules."""
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    get_peft_model(base, config).save_pretrained(tmp_path)
    assert with_adapter(AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path).peft_config.keys() == {"default"}


def test_export_says_of_other_methods_what_they_are(llama_folder, here, command):
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    get_peft_model(base, LoHaConfig(r=4, target_modules=["q_proj"])).save_pretrained(here / "loha")
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], use_dora=True)).save_pretrained(here / "dora")
    assert "loha is of PEFT's LOHA, and this exports adapters of this package" in command(
        "export", "loha", "--output", "x"
    )
    assert "use_dora" in command("export", "dora", "--output", "x")


def test_every_example_in_the_help_is_a_command_that_is_taken(command, capsys):
    texts = [USAGE, RUN]
    for verb in VERBS:
        with pytest.raises(SystemExit):
            parse(verb, ["--help"])
        texts.append(capsys.readouterr().out)
        assert texts[-1].count(f"  peft-mora {verb} ") >= 2
    examples = [line.split()[1:] for text in texts for line in text.splitlines() if line.startswith("  peft-mora ")]
    for verb, *arguments in examples:
        if verb in VERBS:
            parse(verb, [word.strip('"') for word in arguments])
    assert len(examples) > 10 and main(["--version"]) is None


@pytest.mark.parametrize("name", ["lr=1e-3", "a,b", "plain"])
def test_the_line_for_vllm_is_one_that_it_reads(name, llama_folder, here):
    trained("lori", llama_folder, name)
    export, serve = adapter_info(name).serve
    item = shlex.split(serve)[-1]
    found = json.loads(item) if item.startswith("{") else dict(zip(("name", "path"), item.split("="), strict=True))
    assert found == {"name": name, "path": f"{name}-lora"} and shlex.split(export)[-1] == f"{name}-lora"


def test_a_folder_s_own_name_is_found_from_within(llama_folder, here, monkeypatch):
    trained("lori", llama_folder, "pets")
    monkeypatch.chdir("pets")
    export, _ = adapter_info(".").serve
    assert shlex.split(export)[-1] == f"{here}/pets-lora"


def test_info_allocates_nothing_of_the_size_that_a_file_says(llama_folder, here):
    trained("lori", llama_folder, "pets")
    path = here / "pets/adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"r": 2**16}))
    assert adapter_info("pets").merges
    path.write_text(json.dumps(config | {"r": 10**9}))
    with pytest.raises(ValueError, match="`r` must be a rank up to 65,536"):
        adapter_info("pets")


def test_an_adapter_that_does_not_open_leaves_the_model_as_it_was(tmp_path):
    adapted("lori", base=tiny_llama(), alpha=64).save_pretrained(tmp_path / "right")
    found = load_file(tmp_path / "right/adapter_model.safetensors")
    shutil.copytree(tmp_path / "right", tmp_path / "less")
    found.pop(next(key for key in found if "lori_B" in key))
    save_file(found, tmp_path / "less/adapter_model.safetensors")
    model = adapted("lori", alpha=8)
    ids = torch.arange(4, 24).view(4, 5)
    before = model(ids).logits
    with pytest.raises(ValueError, match="has an adapter 'default' already, whose config would stay"):
        with_adapter(model, tmp_path / "right")
    with pytest.raises(ValueError, match="has nothing in the file for"):
        with_adapter(model, tmp_path / "less", "other")
    assert list(model.peft_config) == ["default"] and torch.equal(model(ids).logits, before)
    bare = tiny_llama()
    modules = dict(bare.named_modules())
    with pytest.raises(ValueError, match="has nothing in the file for"):
        with_adapter(bare, tmp_path / "less")
    assert dict(bare.named_modules()) == modules and not hasattr(bare, "peft_config")
    assert all(parameter.requires_grad for parameter in bare.parameters())
    config = LlamaConfig(**{**tiny_llama().config.to_dict(), "hidden_size": 32})
    narrow = AutoModelForCausalLM.from_config(config)
    modules = dict(narrow.named_modules())
    with pytest.raises(ValueError, match="is of another base"):
        with_adapter(narrow, tmp_path / "right")
    assert dict(narrow.named_modules()) == modules
    opened, beside = with_adapter(bare, tmp_path / "right"), with_adapter(model, tmp_path / "right", "new")
    beside.set_adapter("new")
    assert torch.equal(opened.eval()(ids).logits, beside(ids).logits)
