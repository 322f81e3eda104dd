"""Models beside those of text: pictures and text, a class for a sequence or for each token."""

import json
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers import METHODS, WORDS, adapted, inputs_of, randomize, reopened, sft, tiny_bert
from peft import LoraConfig, get_peft_model
from PIL import Image
from test_autoload import answers
from torch import nn
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Trainer,
    TrainingArguments,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from peft_mora import LoriConfig, MoraConfig, MtlLoraConfig, expert_usage, record_usage, set_task, start_task
from peft_mora.inputs import input_statistics, quietened
from peft_mora.merging import merge_adapters
from peft_mora.merging.distillation import lessons
from peft_mora.merging.inputs import Statistics, input_spreads
from peft_mora.merging.inputs import adapted as peft_model_of
from trl_callbacks import (
    ActivationBudgetCallback,
    AdapterPenaltyCallback,
    DriftCallback,
    GradientSurgeryCallback,
    InputStatisticsCallback,
    LoriCalibrationCallback,
    OrthogonalProjectionCallback,
    protect,
)
from trl_callbacks.general_text import read, sample
from trl_callbacks.prompts import embedding_covariance


IMAGE = len(WORDS) + 4  # the token behind those of the fixture's tokenizer
LANGUAGE = {"target_modules": "all-linear", "exclude_modules": r"(?!.*language_model).*"}  # as docs/models.md has it
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ '<image>' if p.type == 'image' else p.text }} {% endfor %}{% endif %} </s> {% endfor %}"
)


def llava() -> nn.Module:
    """A tower of one layer with a class token, whose patches go through two linear layers into the text."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=IMAGE, vision_feature_layer=-1
    )
    return LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> nn.Module:
    """A tower that reads the patches of all pictures as one sequence, and makes one token of four."""
    torch.manual_seed(0)
    vision = {"depth": 1, "embed_dim": 24, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    ).eval()


BASES = {"llava": llava, "qwen2_vl": qwen2_vl}
BOTH = pytest.mark.parametrize("kind", BASES)


def pictures(kind: str) -> dict[str, torch.Tensor]:
    """Two rows of a picture and text, the second padded, with as many patches as tokens: what goes into the tower has
    the shape of the attention mask."""
    torch.manual_seed(1)
    if kind == "llava":
        ids = torch.tensor([[IMAGE] * 4 + [5], [IMAGE] * 4 + [0]])
        batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        ids = torch.tensor([[IMAGE, 5, 6, 7], [IMAGE, 5, 0, 0]])
        batch = {"pixel_values": torch.randn(8, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 2, 2]] * 2)}
        batch["mm_token_type_ids"] = (ids == IMAGE).int()
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **batch}


def adapter_layers(model: nn.Module) -> dict[str, nn.Module]:
    named = ((name.removeprefix("base_model.model."), m) for name, m in model.named_modules())
    return {name: module for name, module in named if hasattr(module, "base_layer")}


def is_text(name: str) -> bool:
    return "language_model" in name


@BOTH
def test_one_line_adapts_the_language_models_linear_layers_and_no_others(kind):
    linear = {name for name, module in BASES[kind]().named_modules() if isinstance(module, nn.Linear)}
    language = {name for name in linear if is_text(name)}
    assert set(get_peft_model(BASES[kind](), MoraConfig(**LANGUAGE)).targeted_module_names) == language
    every = get_peft_model(BASES[kind](), MoraConfig(target_modules="all-linear")).targeted_module_names
    assert set(every) == linear - {"lm_head"} and len(language) == 7 and len(every) > 10


@pytest.mark.parametrize(("kind", "method"), [*((kind, name) for kind in BASES for name in ("mora", "lori"))])
def test_an_adapter_of_pictures_and_text_trains_answers_and_opens_again(kind, method, tmp_path):
    base, batch = BASES[kind], pictures(kind)
    model = adapted(method, base())
    assert not torch.allclose(model(**batch).logits, base()(**batch).logits)
    model.train()(**batch, labels=batch["input_ids"]).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    again = reopened(model.eval(), tmp_path, base())
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    rows = {"pixel_values": 4} if kind == "qwen2_vl" else {}
    first = {name: value[: rows.get(name, 1)] for name, value in batch.items()}
    if kind == "llava":  # as many pictures as rows, whose they are nobody knows
        with pytest.raises(ValueError, match="`adapter_names` is for rows of the batch"):
            model(**batch, adapter_names=["default", "__base__"])
        language = adapted(method, base(), **LANGUAGE)
        mixed = language(**batch, adapter_names=["default", "__base__"]).logits
        torch.testing.assert_close(mixed[0], language(**batch).logits[0])
        torch.testing.assert_close(mixed[1], base()(**batch).logits[1])
    want = model.generate(**first, max_new_tokens=3, do_sample=False)
    assert torch.equal(again.generate(**first, max_new_tokens=3, do_sample=False), want)


@BOTH
def test_image_tokens_count_as_inputs_and_patches_do_whatever_the_texts_mask_says(kind):
    model, batch = adapted("mora", BASES[kind]()), pictures(kind)
    layers, real = adapter_layers(model), batch["attention_mask"].flatten().bool()
    found = input_statistics(model, layers, [batch])
    with inputs_of(layers) as seen, record_usage(model):
        model(**batch)
    meter = next(iter(layers.values())).usage["default"].meter
    counted = {name: int(meter.pending[place.stop - 1]) for name, place in meter.places.items()}
    covariance = found.all()
    for group, modules in found.groups.items():
        for name in modules:
            x = seen[name][0].flatten(0, -2).double()
            x = quietened(x[real] if is_text(name) else x)
            assert counted["base_model.model." + name] == len(x)
            torch.testing.assert_close(covariance[group].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    assert sum(not is_text(name) for name in layers) > 4 and meter.last_inputs is None
    with pytest.raises(ValueError, match="`pixel_attention_mask` has zeros.*exclude_modules"), record_usage(model):
        model(**batch, pixel_attention_mask=torch.zeros(2, 8, 8))


@BOTH
def test_a_towers_balance_is_that_of_all_patches(kind):
    batch = pictures(kind)
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    offsets = []
    for given in (batch, whole):
        model = adapted("flylora", BASES[kind](), r=8).train()
        model(**given, labels=given["input_ids"]).loss.backward()
        offsets.append({n: m.offset["default"].clone() for n, m in adapter_layers(model).items() if not is_text(n)})
    assert all(torch.equal(value, offsets[1][name]) and value.any() for name, value in offsets[0].items())


def processor(folder: str, kind: str = "llava") -> Any:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    if kind == "qwen2_vl":
        pytest.importorskip("torchvision", reason="of videos, which no Qwen2VLProcessor is without")
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        tokenizer.image_token, tokenizer.image_token_id = "<image>", IMAGE
        options = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 1024}}
        images, videos = Qwen2VLImageProcessorPil(**options), Qwen2VLVideoProcessor(**options)
        return Qwen2VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
    images = LlavaImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "target"),
    [  # of tower, projector and language model
        ("llava", {"target_modules": ["q_proj", "fc1", "linear_1"]}),
        ("qwen2_vl", LANGUAGE),
    ],
)
def test_trl_trains_on_pictures_and_a_second_task_leaves_the_first_alone(kind, target, llama_folder, tmp_path):
    """The second with text to measure its drift on."""
    colours, words = ["red", "blue", "green", "black"], ["red", "blue", "yes", "no"]
    data = Dataset.from_dict(
        {
            "messages": [
                [
                    {"role": "user", "content": "the cat sat"[: 3 + 4 * (i % 3)]},
                    {"role": "assistant", "content": words[i % 4]},
                ]
                for i in range(8)
            ],
            "images": [[Image.new("RGB", (8, 8), colours[i % 4])] for i in range(8)],
        }
    )
    reader = processor(llama_folder, kind)

    def train(model, name, *callbacks, **kwargs):
        trainer = sft(
            model, llama_folder, tmp_path / name, callbacks=list(callbacks), train_dataset=data, max_steps=2,
            eval_dataset=None, processing_class=reader, save_strategy="no", **kwargs,
        )  # fmt: skip
        trainer.train()
        return trainer

    text = ["the cat sat on the mat", "a dog ran"]
    model = train(
        BASES[kind](), "one", OrthogonalProjectionCallback(), ActivationBudgetCallback(2, schedule="constant"),
        peft_config=MoraConfig(r=4, **target),
    ).model  # fmt: skip
    assert all(share.sum() == pytest.approx(2, abs=1e-4) for share in expert_usage(model).values())
    start_task(model, "two")
    second = train(model, "two", OrthogonalProjectionCallback(tmp_path / "one" / "subspace"), DriftCallback(text))
    logs = second.state.log_history
    leakage = [entry["leakage"] for entry in logs if "leakage" in entry]
    assert len(leakage) == 2 and 0 < max(leakage) <= 1e-5
    assert [entry for entry in logs if "drift_kl" in entry]


def test_text_is_protected_on_a_model_of_pictures_and_pictures_are_no_text(llama_folder, tmp_path):
    model, reader = llava(), processor(llama_folder)
    model.lm_head.weight.data[IMAGE] = 0.0
    tokenizer = reader.tokenizer
    memory = protect(model, ["the cat sat on the mat"], tmp_path / "memory", tokenizer=reader)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_text(name)}
    assert {name for group in memory.groups.values() for name in group} == linear
    assert not any((batch["input_ids"] == IMAGE).any() for batch in sample(model, reader, 2048))
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "the cat"}]}]
    for source in ([talk], [{"messages": talk, "images": [1]}], ["the <image> cat"]):
        with pytest.raises(
            ValueError, match="General text is without images, which are not shown to the model here, and .* images"
        ):
            read(source, reader, 100, model)
    (batch,) = read([[{"role": "user", "content": "the cat"}]], reader, 100, model)
    assert batch["input_ids"].tolist() == [tokenizer("the cat  </s>").input_ids]
    with pytest.raises(ValueError, match="have images or sounds \\(`pixel_values`\\).*OrthogonalProjectionCallback"):
        embedding_covariance(model.get_input_embeddings(), [pictures("llava")])
    towers = get_peft_model(model, MoraConfig(r=2, target_modules=["fc1", "q_proj"]))
    with pytest.raises(ValueError, match="tokens that stand for images.*merge by a rule that needs no inputs"):
        input_spreads(towers, [], [pictures("llava")])
    with pytest.raises(ValueError, match="saw no input.*a vision tower never sees text"):
        protect(towers, ["the cat"], tmp_path / "towers", tokenizer=reader, adapter_name="default")
    callback = ActivationBudgetCallback(2, schedule="constant")
    with pytest.raises(ValueError, match="No token came through .*vision_tower.*kept as it is in .*stopped-1"):
        sft(towers, llama_folder, tmp_path / "run", callbacks=[callback], max_steps=1, save_strategy="no").train()
    assert (tmp_path / "run" / "stopped-1" / "adapter_model.safetensors").is_file()


def test_adapters_of_a_model_of_pictures_learn_answers_to_text_alone(llama_folder, tmp_path):
    folders, reader = [tmp_path / "a", tmp_path / "b"], processor(llama_folder)
    for seed, folder in enumerate(folders):
        model = get_peft_model(llava(), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
        randomize(model, seed)
        model.save_pretrained(folder)
    shown = llava()
    shown.lm_head.weight.data[IMAGE] *= 100  # one of both signs is what it would say next
    shown.lm_head.weight.data[IMAGE - 1] = -shown.lm_head.weight.data[IMAGE]
    with peft_model_of(shown, folders[0]) as model:
        ids = [torch.tensor(reader.tokenizer(text).input_ids) for text in ("the cat", "a dog ran", "no", "big log")]
        assert not any((lesson.ids == IMAGE).any() for lesson in lessons(model, ids, reader.tokenizer, 4))
    given = {"model": llava(), "rule": "mean", "tokenizer": reader, "distill": 1, "answer_tokens": 2}
    report = merge_adapters(folders, prompts={folder: ["the cat", "a dog ran"] for folder in folders}, **given)
    assert all(B.isfinite().all() for _, B in report.loras.values())
    with pytest.raises(ValueError, match="tokens that stand for images.*leave `distill` out"):
        merge_adapters(folders, prompts={folder: ["the <image> cat"] for folder in folders}, **given)


@BOTH
def test_rows_with_pictures_are_not_taken_apart_by_task(kind):
    """Qwen2-VL's pictures are patches of all rows. LLaVA's may be two of one row and none of another."""
    batch = {"task": ["a", "b"], **pictures(kind)}
    with pytest.raises(ValueError, match="whose they are nobody knows here. This batch has them in 'pixel_values'"):
        GradientSurgeryCallback()._step_by_task(BASES[kind](), batch, 8)
    del batch["pixel_values"], batch["task"]
    bare = {"input_ids": batch["input_ids"], "task": ["a", "b"]}
    with pytest.raises(ValueError, match="This batch has them in 'input_ids'"):
        GradientSurgeryCallback()._step_by_task(BASES[kind](), bare, 8)


def test_gradient_surgery_trains_a_model_of_pictures_on_text_and_refuses_data_with_pictures(llama_folder, tmp_path):
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    records = {"messages": [turns] * 4, "task": ["a", "b"] * 2}
    arguments = {"max_steps": 1, "eval_dataset": None, "processing_class": processor(llama_folder)}

    def trainer(records):
        data = Dataset.from_dict(records)
        lora = LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
        surgery = [GradientSurgeryCallback()]
        return sft(llava(), llama_folder, tmp_path, lora, surgery, train_dataset=data, save_strategy="no", **arguments)

    text = trainer(records)
    text.train()
    assert text.state.log_history[0]["gradient_conflicts"] == 0
    with pytest.raises(ValueError, match=r"The data has 'images'.*dataset\.remove_columns"):
        trainer({**records, "images": [[Image.new("RGB", (8, 8))]] * 4})


def classified(tokens: bool) -> list[dict]:
    """Eight rows of six words, of which some are padding, with a label for each row or for each word."""
    ids = torch.randint(4, 24, (8, 6), generator=torch.Generator().manual_seed(0))
    lengths = [6 - i % 3 for i in range(8)]
    rows = []
    for row, length in zip(ids, lengths, strict=True):
        real = torch.arange(6) < length
        labels = (row % 3).where(real, -100) if tokens else row[0] % 3
        rows.append({"input_ids": row * real, "attention_mask": real.long(), "labels": labels})
    return rows


HEADS = {"SEQ_CLS": BertForSequenceClassification, "TOKEN_CLS": BertForTokenClassification}


def classify(model: nn.Module, task_type: str, output, callback=None) -> Trainer:
    arguments = {"max_steps": 3, "report_to": "none", "use_cpu": True, "save_strategy": "no", "learning_rate": 1e-2}
    trainer = Trainer(
        model,
        TrainingArguments(str(output), logging_steps=1, **arguments),
        train_dataset=classified(task_type == "TOKEN_CLS"),
        callbacks=[callback] if callback else None,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("task_type", HEADS)
@pytest.mark.parametrize("method", ["mora", "lori", "lori-sparse"])
def test_a_classifier_is_trained_with_its_head_and_opens_again_with_it(method, task_type, tmp_path):
    base = partial(tiny_bert, HEADS[task_type])
    config = METHODS[method](target_modules="all-linear", exclude_modules=["classifier"], task_type=task_type)
    model = get_peft_model(base(), config)
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    classify(model, task_type, tmp_path / "run")
    assert any("classifier" in name for name in before)
    assert all("classifier" in name or METHODS[method].prefix in name for name in before)
    assert not [name for name, p in model.named_parameters() if name in before and torch.equal(p, before[name])]
    batch = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    again = reopened(model.eval(), tmp_path / "adapter", base())
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_what_a_classifier_s_adapter_saw_are_its_rows(tmp_path):
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    model = get_peft_model(tiny_bert(HEADS["SEQ_CLS"]), config)
    classify(model, "SEQ_CLS", tmp_path, InputStatisticsCallback(4)).save_model()
    found = Statistics.load(tmp_path)
    assert (found.prompts, found.tokens) == (8, sum(6 - i % 3 for i in range(8)))


@pytest.mark.parametrize(
    ("callback", "match"),
    [
        (AdapterPenaltyCallback("alignguard"), "next tokens of a causal language model, and LlamaForSequenceClass"),
        (AdapterPenaltyCallback("alignguard", source=["the cat"]), "causal language model.*gives none"),
        (OrthogonalProjectionCallback(protect="self"), "'self' is text.*LlamaForSequenceClassification writes none"),
    ],
)
def test_a_classifier_has_no_text_of_its_own(callback, match, tmp_path):
    model = LlamaForSequenceClassification(LlamaConfig(**TEXT, num_labels=3))
    with pytest.raises(ValueError, match=match):
        classify(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])), "SEQ_CLS", tmp_path, callback)


@pytest.mark.parametrize("task_type", HEADS)
def test_a_second_task_of_a_classifier_needs_its_head_left_alone(task_type, tmp_path):
    config = MoraConfig(r=4, target_modules=["query", "value", "pooler.dense"], task_type=task_type)
    model = get_peft_model(tiny_bert(HEADS[task_type]), config)
    classify(model, task_type, tmp_path / "one", OrthogonalProjectionCallback())
    start_task(model, "two")
    memory = tmp_path / "one" / "subspace"
    with pytest.raises(ValueError, match="more parameters are trainable, e.g. .*classifier.*") as refused:
        classify(model, task_type, tmp_path / "refused", OrthogonalProjectionCallback(memory))
    exec(str(refused.value).rpartition(" by ")[2].rstrip("."), {"model": model})
    assert not any(p.requires_grad for p in model.base_model.model.classifier.parameters())
    trainer = classify(model, task_type, tmp_path / "two", OrthogonalProjectionCallback(memory))
    leakage = [entry["leakage"] for entry in trainer.state.log_history if "leakage" in entry]
    assert len(leakage) == 3 and 0 < max(leakage) <= 1e-5


SENTENCES = ["the cat sat on the mat", "dog"]
ENCODE = """
import json, sys
from sentence_transformers import SentenceTransformer
sentences, *folders = sys.argv[1:]
print(json.dumps([SentenceTransformer(f, device="cpu").encode(json.loads(sentences)).tolist() for f in folders]))
"""


@pytest.fixture
def embedder(llama_folder, tmp_path):
    """Makes a SentenceTransformer of a tiny BERT, and its trainer, not yet run."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    tiny_bert(BertForSequenceClassification).bert.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "base")
    pairs = {
        "anchor": ["the cat", "a big dog ran", "red log"] * 2,
        "positive": ["cat sat", "dog", "blue log on mat"] * 2,
    }

    def make(config, callback=None):
        model = library.SentenceTransformer(str(tmp_path / "base"), device="cpu")
        model.add_adapter(config)
        args = library.SentenceTransformerTrainingArguments(
            str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, report_to="none",
            use_cpu=True, save_strategy="no",
        )  # fmt: skip
        return library.SentenceTransformerTrainer(
            model, args=args, train_dataset=Dataset.from_dict(pairs), loss=MultipleNegativesRankingLoss(model),
            callbacks=[callback] if callback else None,
        )  # fmt: skip

    return make


@pytest.mark.slow
def test_embedding_models_train_are_saved_and_open_in_a_process_that_names_only_them(embedder, tmp_path):
    folders, wanted = [], []
    for method in ("mora", "lori-sparse", "flylora"):
        trainer = embedder(METHODS[method](target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"))
        model = trainer.model
        before = {name: p.clone() for name, p in model.named_parameters()}
        trainer.train()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
        folders.append(str(tmp_path / method))
        model.save_pretrained(folders[-1])
        wanted.append(model.encode(SENTENCES).tolist())
        assert not (tmp_path / method / "model.safetensors").exists()
    assert answers("-c", ENCODE, json.dumps(SENTENCES), *folders) == wanted


def test_embedding_models_count_no_padding_and_have_budgets_and_tasks(embedder):
    config = MoraConfig(r=4, target_modules=["query", "pooler.dense"])
    trainer = embedder(config)
    with record_usage(trainer.model):
        trainer.model.encode(SENTENCES)
    layers = {name: layer for name, layer in trainer.model.named_modules() if hasattr(layer, "mora_A")}
    meter = next(iter(layers.values())).usage["default"].meter
    counted = {name: int(meter.pending[place.stop - 1]) for name, place in meter.places.items()}
    assert {name.rsplit(".", 1)[-1]: n for name, n in counted.items()} == {"query": 7, "dense": 2}
    start_task(trainer.model, "two")
    budgeted = embedder(config, ActivationBudgetCallback(2, schedule="constant"))
    budgeted.train()
    assert set(budgeted.model[0].model.peft_config["default"].top_k_pattern.values()) == {2}
    with pytest.raises(ValueError, match="inside of this SentenceTransformer"):
        embedder(config, OrthogonalProjectionCallback())
    with pytest.raises(ValueError, match="none, or inside of it"):
        embedder(config, DriftCallback(SENTENCES)).train()


def test_embedding_models_are_calibrated_and_take_a_default_task(embedder, tmp_path):
    trainer = embedder(
        LoriConfig(r=4, target_modules=["query", "value"], task_type="FEATURE_EXTRACTION"),
        LoriCalibrationCallback(sparsity=0.5, calibration_steps=1),
    )
    trainer.train()
    model = trainer.model
    assert model[0].model.peft_config["default"].sparsity == 0.5
    model.save_pretrained(str(tmp_path / "sparse"))
    again = type(model)(str(tmp_path / "sparse"), device="cpu")
    assert (again.encode(SENTENCES) == model.encode(SENTENCES)).all()
    model = embedder(MtlLoraConfig(tasks=["a", "b"], r=4, target_modules=["query"])).model
    set_task(model, "b")
    assert model[0].model.peft_config["default"].default_task == "b" and model.encode(SENTENCES).shape == (2, 32)
