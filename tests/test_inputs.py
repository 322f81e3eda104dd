"""What goes into modules: real tokens, shared inputs, and a model that is afterwards as it was."""

import pytest
import torch
from helpers import inputs_of, tiny_llama, tiny_t5
from peft import LoraConfig, get_peft_model
from shared.scores import answers
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

from peft_mora import MoraConfig
from peft_mora.export import fit_lora
from peft_mora.inputs import (
    LOUDEST,
    InputStatistics,
    input_statistics,
    layer_similarity,
    quietened,
    real_rows,
    shared_inputs,
    visit,
)
from peft_mora.linalg import leading_directions
from peft_mora.merging.distillation import lessons
from trl_callbacks.general_text import LENGTH, sample


def adapted(model, **kwargs):
    model = get_peft_model(model, MoraConfig(r=2, target_modules="all-linear", **kwargs))
    layers = {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "mora_A")}
    return model, layers


def padded_batch() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids}


def seen_inputs(model, layers, batches) -> dict[str, torch.Tensor]:
    """Every real token's input of every module, by the plainest of means."""
    with inputs_of(layers) as seen:
        for batch in batches:
            model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    masks = torch.cat([b["attention_mask"].reshape(-1) for b in batches]).bool()
    return {n: torch.cat([x.reshape(-1, x.shape[-1]) for x in xs]).double()[masks] for n, xs in seen.items()}


@pytest.mark.parametrize("budget_gib", [4.0, 1e-6], ids=["one pass", "a pass for each input"])
def test_statistics_are_of_real_tokens_and_shared_inputs_share_them(budget_gib):
    model, layers = adapted(tiny_llama())
    batches = [padded_batch(), padded_batch()]
    model.train()
    found = input_statistics(model, layers, batches, budget_gib)
    covariance = found.all()
    assert model.training
    expected = seen_inputs(model, layers, batches)
    for group, modules in found.groups.items():
        for name in modules:
            x = expected[name]
            torch.testing.assert_close(covariance[group].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    sharing = {tuple(name.rsplit(".", 1)[-1] for name in modules) for modules in found.groups.values()}
    assert sharing == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    assert len(found.groups) == 8


def test_a_layer_between_the_stack_and_the_logits_sees_all_tokens():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertLMHeadModel(BertConfig(**sizes, vocab_size=64, is_decoder=True))
    seen = {}
    layers = {
        name: model.get_submodule(name) for name in ("cls.predictions.transform.dense", "cls.predictions.decoder")
    }
    for some in ({n: layers[n]} for n in layers):
        visit(model, some, [padded_batch()], lambda name, x, y, mask: seen.update({name: x.shape}))
    assert {tuple(shape) for shape in seen.values()} == {(2, 5, 32)}


def test_sets_of_inputs_are_found_together_by_as_few_passes_as_the_budget_allows():
    sizes = {"q": 64, "o": 64, "gate": 64, "down": 128}
    passes = []

    def look(names):
        passes.append(names)
        return {name: torch.eye(sizes[name]) for name in names}

    room = 4 * 3 * 64**2 / 2**30
    found = InputStatistics({name: (name,) for name in sizes}, sizes, look, room)
    sets = [["q", "o"], ["o"], ["gate"], ["down", "q"]]
    assert [[len(C) for C in several] for several in found.each(sets)] == [[64, 64], [64], [64], [128, 64]]
    assert passes == [["q", "o"], ["gate"], ["down", "q"]]  # a set is whole, whatever it takes


def test_a_token_counts_as_so_many_typical_ones_at_most(monkeypatch):
    model, layers = adapted(tiny_llama())
    monkeypatch.setattr("peft_mora.inputs.LOUDEST", 0.9)  # the longer half is cut
    found = input_statistics(model, layers, [padded_batch(), padded_batch()]).all()
    for name, x in seen_inputs(model, layers, [padded_batch()]).items():
        if name in found:
            squares = x.square().sum(dim=1, keepdim=True)
            x = x * (0.9 * squares.median() / squares).sqrt().clamp_max(1)
            torch.testing.assert_close(found[name].double(), 2 * x.T @ x, rtol=1e-5, atol=1e-5)


def test_an_attention_sink_is_one_direction_of_many():
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    sink = torch.zeros(16).index_fill(0, torch.tensor([3]), 2000.0)
    rows[::32] = sink
    cut = quietened(rows)
    others = torch.arange(256) % 32 > 0
    assert torch.equal(cut[others], rows[others])
    length = LOUDEST**0.5 * rows[others].norm(dim=1).median()
    torch.testing.assert_close(cut[::32], (sink / 2000 * length).expand(8, -1), rtol=0.05, atol=0)
    held = {}
    for name, x in (("cut", cut), ("as they are", rows)):
        V = leading_directions(x.T @ x, 0.95)
        held[name] = (rows[others] @ V).square().sum() / rows[others].square().sum()
        torch.testing.assert_close((sink @ V).norm(), sink.norm(), rtol=1e-3, atol=0)  # the sink is held either way
    assert held["cut"] > 0.9 and held["as they are"] < 0.1
    assert torch.equal(quietened(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("given", ["labels", "labels and inputs", "inputs", "mask"])
def test_a_decoders_tokens_are_masked_by_its_own_mask_and_the_encoders_by_theirs(given):
    """Two sequences of one length: 4 + 6 real tokens go into the encoder and 2 + 3 into the decoder."""
    model = tiny_t5()
    labels = torch.tensor([[3, 4, -100, -100, -100, -100], [3, 4, 5, -100, -100, -100]])
    batch = {
        "input_ids": torch.arange(1, 13).view(2, 6),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6]),
        "labels": labels,
        "decoder_input_ids": labels.clamp_min(0).roll(1, 1),
        "decoder_attention_mask": (labels != -100).long(),
    }
    left_out = {
        "labels": {"decoder_input_ids", "decoder_attention_mask"},
        "labels and inputs": {"decoder_attention_mask"},
        "inputs": {"labels", "decoder_attention_mask"},
        "mask": {"labels"},
    }[given]
    decoder = 12 if given == "inputs" else 5  # nothing says which are padding: all are seen
    block, cross = model.decoder.block[0].layer[0], model.decoder.block[0].layer[1].EncDecAttention
    want = {
        "encoder": (model.encoder.block[0].layer[0].SelfAttention.q, 10),
        "self": (block.SelfAttention.v, decoder),
        "cross q": (cross.q, decoder),
        "cross k": (cross.k, 10),
        "cross v": (cross.v, 10),
        "head": (model.lm_head, decoder),
    }
    counted = {}
    visit(
        model,
        {name: module for name, (module, _) in want.items()},
        [{name: value for name, value in batch.items() if name not in left_out}],
        lambda name, x, y, mask: counted.update({name: len(real_rows(x, mask, name))}),
    )
    assert counted == {name: count for name, (_, count) in want.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_whose_squares_are_not_finite_are_an_error(value):
    model, layers = adapted(tiny_llama())
    model.get_input_embeddings().weight.data[4] = value
    layers = {"embedded": model.get_base_model().model.layers[0]}
    with pytest.raises(ValueError, match="'embedded' are not finite"):
        input_statistics(model, layers, [padded_batch()]).all()


def test_module_that_saw_no_input_is_an_error():
    model, layers = adapted(tiny_llama())
    with pytest.raises(ValueError, match="saw no input"):
        input_statistics(model, {**layers, "idle": torch.nn.Linear(2, 2)}, [padded_batch()])


@pytest.mark.parametrize("shape", [(7, 4), (5, 2, 4), (1, 10, 4)])
def test_tokens_that_do_not_fit_the_mask_are_an_error(shape):
    with pytest.raises(ValueError, match="padding in 'lone'.*target_modules"):
        real_rows(torch.zeros(shape), torch.ones(2, 5), "lone")


def test_real_rows_are_those_of_the_mask_in_either_shape():
    x, mask = torch.arange(24.0).view(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    want = torch.stack([x[0, 0], x[0, 1], x[1, 1], x[1, 2]])
    assert torch.equal(real_rows(x, mask, "lone"), want) and torch.equal(real_rows(x.view(6, 4), mask, "lone"), want)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, layers, batch: visit(model, layers, [batch], lambda *seen: None),
        lambda model, layers, batch: input_statistics(model, layers, [batch]),
        lambda model, layers, batch: shared_inputs(model, layers, batch),
        lambda model, layers, batch: layer_similarity(model, layers, [batch]),
        lambda model, layers, batch: fit_lora(model, [batch]),
    ],
    ids=["visit", "input_statistics", "shared_inputs", "layer_similarity", "fit_lora"],
)
def test_forward_that_fails_leaves_no_hook_and_the_modes_behind(call):
    model, layers = adapted(tiny_llama())
    model.train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    layers["model.layers.1.mlp.down_proj"].mora_A["default"].weight.data = torch.zeros(2, 3)  # of a wrong shape
    with pytest.raises(RuntimeError):
        call(model, layers, padded_batch())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("head", [False, True])
def test_logits_of_all_tokens_are_computed_only_where_the_head_is_asked_for(head):
    model = tiny_llama()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, args, y: shapes.append(tuple(y.shape[:2])))
    layers = {"q": model.model.layers[0].self_attn.q_proj, **({"lm_head": model.lm_head} if head else {})}
    tokens = []
    visit(model, layers, [padded_batch()], lambda name, x, y, mask: tokens.append(len(real_rows(x, mask, name))))
    assert shapes == [(2, 5 if head else 1)] and set(tokens) == {8}


def visited(model, tokenizer) -> None:
    layers = {"q": model.base_model.model.model.layers[0].self_attn.q_proj}
    visit(model, layers, [tokenizer(["the cat sat", "a dog ran"], return_tensors="pt")], lambda *seen: None)


WAYS = {
    "visit": visited,
    "scores": lambda model, tokenizer: answers(model, tokenizer, [{"prompt": "the cat", "answer": "sat"}] * 3, 3),
    "lessons": lambda model, tokenizer: lessons(model, [torch.tensor([4, 5, 6]), torch.tensor([7, 8])], tokenizer, 3),
    "sample": lambda model, tokenizer: sample(model, tokenizer, 4 * LENGTH),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_head_never_gets_a_slice_of_several_texts(way, llama_folder):
    """For which a CPU copies the head's weight once for each text."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.chat_template = "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} </s>{% endfor %}"
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules="all-linear")).eval()
    seen = []
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    WAYS[way](model, tokenizer)
    assert any(len(x) > 1 for x in seen) and all(x.is_contiguous() for x in seen)
    assert not model.get_base_model().lm_head._forward_pre_hooks
