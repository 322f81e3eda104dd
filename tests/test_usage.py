"""Counting which experts act, K by module, and deleting experts that never do."""

import copy
import gc
import json

import helpers
import pytest
import torch
from helpers import gradients, inputs_of, padded, randomize, reopened, tiny_bert, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import BertForSequenceClassification, BertModel

from peft_mora import (
    FlyLoraConfig,
    LoriConfig,
    MoraConfig,
    SMoraConfig,
    expert_usage,
    prune_experts,
    record_usage,
    start_task,
)
from peft_mora.pruning import _outputs
from peft_mora.routed import RoutedLinear, routed_layers, set_top_k
from peft_mora.routing import expert_scores, select_by_magnitude, softmax_gate
from peft_mora.usage import UsageMeter


ROUTED = {
    "mora": lambda **kw: MoraConfig(r=4, top_k=2, temperature=0.2, **kw),
    "mora-bank": lambda **kw: MoraConfig(r=4, top_k=2, temperature=0.2, routing="bank", **kw),
    "flylora": lambda **kw: FlyLoraConfig(r=4, top_k=2, alpha=32, balance_rate=0.0, **kw),
    "smora": lambda **kw: SMoraConfig(r=4, top_k=2, balance_rate=0.0, **kw),
}


def adapted(kind: str = "mora", tasks: int = 1, base=None, **kwargs) -> PeftModel:
    return helpers.adapted(ROUTED[kind], base, tasks=tasks, **kwargs).train()


def count(model: PeftModel, *args, **kwargs) -> dict[str, torch.Tensor]:
    """Of one forward."""
    with record_usage(model):
        model(*args, **kwargs)
    return counts(model)


def tokens(model: PeftModel) -> set[int]:
    """That were counted, over modules."""
    return {int(part[-1]) for part in counts(model).values()}


def counts(model) -> dict[str, torch.Tensor]:
    layers = routed_layers(model)
    meter = next(iter(layers.values())).usage["default"].meter
    return {name: (meter.hits + meter.pending)[place].clone() for name, place in meter.places.items()}


def chosen_by_hand(layer: RoutedLinear, x: torch.Tensor) -> torch.Tensor:
    """(T, R) bool, by the rules of the module docstrings."""
    if hasattr(layer, "flylora_offset"):
        h = x @ layer.matrix_A("default", x.dtype).T
        index = select_by_magnitude(h, layer.flylora_offset["default"], layer.top_k("default"))
        return torch.zeros_like(h, dtype=torch.bool).scatter_(-1, index, True)
    if hasattr(layer, "smora_W"):
        q = torch.sigmoid(x @ layer.smora_W["default"].weight.T) + layer.smora_offset["default"]
        index = q.topk(layer.top_k("default")).indices
        return torch.zeros_like(q, dtype=torch.bool).scatter_(-1, index, True)
    hs = [x @ A.T for A, _ in layer.blocks("default")]
    hs = hs if layer.mora_rule["default"].routing == "task" else [torch.cat(hs, -1)]
    picked = [torch.zeros_like(h, dtype=torch.bool) for h in hs]
    for h, mask in zip(hs, picked, strict=True):
        mask.scatter_(-1, expert_scores(h).topk(layer.top_k("default")).indices, True)
    return torch.cat(picked, -1)


@pytest.mark.parametrize(("kind", "tasks"), [("mora", 1), ("mora", 3), ("mora-bank", 3), ("flylora", 1), ("smora", 1)])
@pytest.mark.parametrize("training", [True, False])
def test_usage_is_the_share_of_real_tokens_that_wake_an_expert(kind, tasks, training):
    model = adapted(kind, tasks).train(training)
    batch, layers = padded(), routed_layers(model)
    with record_usage(model), inputs_of(layers) as inputs:
        model(**batch)
    usage = expert_usage(model)
    assert set(usage) == set(layers) and len(usage) == 14
    real = batch["attention_mask"].bool()
    for name, layer in layers.items():
        want = chosen_by_hand(layer, inputs[name][0][real]).float().mean(0)
        assert usage[name].shape == (4 * tasks,) and usage[name].dtype == torch.float32
        torch.testing.assert_close(usage[name], want, rtol=0, atol=1e-6)


def test_padding_on_either_side_counts_as_nothing_and_generation_with_a_cache_counts_each_token_once():
    model, batch = adapted().eval(), padded()
    with record_usage(model) as meter:
        model(**batch)
    assert tokens(model) == {11 + 7 + 4}
    assert meter.hits.sum() == 0 and meter.pending.dtype == torch.int64
    count(model, batch["input_ids"], batch["attention_mask"])  # by position
    assert tokens(model) == {22}
    count(model, batch["input_ids"])
    assert tokens(model) == {33}
    with record_usage(model):
        model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens(model) == {22 + 3 * 2}  # the prompt, then every new token but the last, which is not fed back


@pytest.mark.parametrize("kind", ROUTED)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recompute_of_gradient_checkpointing_does_not_count_twice(kind, use_reentrant):
    def run(checkpointing: bool):
        model = adapted(kind)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        meter = UsageMeter(model, training_only=True, need=True)
        calls = []
        layer = next(iter(meter.layers.values()))
        layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
        for _ in range(2):
            model(**padded(), labels=padded()["input_ids"]).loss.backward()
        meter.close()
        return counts(model), meter.pending_entropy.clone(), len(calls)

    (plain, entropy, calls), (recomputed, again, more_calls) = run(False), run(True)
    assert (calls, more_calls) == (2, 4)  # it was recomputed
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)
    assert torch.equal(entropy, again)
    assert {int(part[-1]) for part in plain.values()} == {44}


def test_training_only_leaves_evaluation_and_sampling_out():
    model = adapted()
    meter = UsageMeter(model, training_only=True)
    model.eval()(**padded())
    with torch.no_grad():
        model.train()(**padded())
    with model.disable_adapter():
        model(**padded())
    assert meter.pending.sum() == 0
    model(**padded())
    assert meter.pending.sum() > 0
    meter.close()
    before = meter.pending.clone()
    model(**padded())
    assert torch.equal(meter.pending, before)


@pytest.mark.parametrize("kind", ROUTED)
def test_counting_changes_no_output_no_gradient_and_no_file(kind):
    model, batch = adapted(kind), padded()
    want, grads = model(**batch).logits, gradients(model, batch["input_ids"])
    keys = list(get_peft_model_state_dict(model)), list(model.state_dict())
    with record_usage(model):
        assert torch.equal(model(**batch).logits, want)
        counted = gradients(model, batch["input_ids"])
    assert all(torch.equal(counted[name], grads[name]) for name in grads)
    assert (list(get_peft_model_state_dict(model)), list(model.state_dict())) == keys
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, want)


def test_need_is_the_entropy_of_the_weights_before_the_choice():
    model, batch = adapted(tasks=2), padded()
    meter = UsageMeter(model, need=True)
    name, layer = next(iter(meter.layers.items()))
    seen = []
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    model(**batch)
    _, (A, _) = layer.blocks("default")  # of the task in training
    w = softmax_gate(seen[0][batch["attention_mask"].bool()] @ A.detach().T, 4, 0.2)
    assert meter.pending_entropy[0].tolist() == pytest.approx([-(w * w.log()).sum().item(), 22], rel=1e-5)
    meter.close()
    model = adapted()
    set_top_k(model, dict.fromkeys(routed_layers(model), 1))
    less = UsageMeter(model, need=True)
    first = next(iter(less.layers))
    model(**batch)
    other = adapted()
    more = UsageMeter(other, need=True)
    other(**batch)
    assert first == name and torch.equal(less.pending_entropy[0], more.pending_entropy[0])  # K does not enter


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (LoraConfig(target_modules="all-linear"), "LORA"),
        (LoriConfig(r=4, target_modules="all-linear"), "LORI"),
        (MoraConfig(r=4, routing="dense", target_modules="all-linear"), "MORA with routing='dense'"),
    ],
)
def test_an_adapter_without_routing_is_refused_with_the_configs_that_have_it(config, match):
    model = get_peft_model(tiny_llama(), config)
    for call in (expert_usage, prune_experts, UsageMeter, lambda m: record_usage(m).__enter__()):
        with pytest.raises(ValueError, match=rf"\({match}\) has no routing.*MoraConfig\(routing='task'\)") as error:
            call(model)
        assert "FlyLoraConfig" in str(error.value)
    with pytest.raises(ValueError, match="no adapter named 'x'; it has \\['default'\\]"):
        expert_usage(model, "x")


def test_usage_without_a_count_and_layers_whose_padding_is_unknown_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="No token was counted.*record_usage"):
        expert_usage(model)
    with record_usage(model):
        with pytest.raises(ValueError, match="shape \\(batch, tokens\\)"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4))
        with pytest.raises(ValueError, match="got a dict. With a static cache .* without cache_implementation"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask={"full_attention": None})
        with pytest.raises(ValueError, match="With a static cache .* without cache_implementation"):
            model.generate(**padded(), max_new_tokens=2, cache_implementation="static", disable_compile=True)
        model(**padded())  # goes on
    meter = UsageMeter(model)
    meter.mask = torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="Cannot tell which tokens are padding.*target_modules"):
        meter.real_tokens(torch.Size([7]), torch.device("cpu"))


@pytest.mark.parametrize("kind", ROUTED)
def test_top_k_by_module_is_honoured_saved_and_loaded(kind, tmp_path, inputs):
    pattern = {"q_proj": 1, r"layers\.1\..*": 4, "model.layers.1.mlp.up_proj": 3}
    model = adapted(kind, top_k_pattern=pattern).eval()
    ks = {name.removeprefix("base_model.model."): m.top_k("default") for name, m in routed_layers(model).items()}
    assert ks["model.layers.0.self_attn.q_proj"] == 1 and ks["model.layers.0.self_attn.k_proj"] == 2
    assert ks["model.layers.1.self_attn.k_proj"] == 4 and ks["model.layers.1.mlp.up_proj"] == 3
    count(model, inputs)
    for name, share in expert_usage(model).items():
        assert share.sum().item() == pytest.approx(ks[name.removeprefix("base_model.model.")], abs=1e-5)
    again = reopened(model, tmp_path)
    assert again.peft_config["default"].top_k_pattern == pattern
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert not torch.equal(adapted(kind).eval()(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("kind", ROUTED)
def test_setting_top_k_writes_the_config_and_leaves_a_shared_one_alone(kind, tmp_path, inputs):
    model = adapted(kind).eval()
    shared = model.peft_config["default"]
    model.add_adapter("ref", shared)
    names = list(routed_layers(model))
    before = model(inputs).logits
    set_top_k(model, {names[0]: 1, names[3]: 4})
    assert model.peft_config["ref"] is shared and shared.top_k_pattern == {}
    assert routed_layers(model, "ref")[names[0]].top_k("ref") == 2
    after = model(inputs).logits
    assert not torch.equal(after, before)
    assert torch.equal(reopened(model, tmp_path)(inputs).logits, after)
    set_top_k(model, dict.fromkeys(names, 2))
    assert model.peft_config["default"].top_k_pattern == {}
    assert torch.equal(model(inputs).logits, before)
    for wrong in ({names[0]: 5}, {names[0]: 0}, {"nowhere": 1}):
        with pytest.raises(ValueError, match="top_k|no routed adapter"):
            set_top_k(model, {names[1]: 1, **wrong})
    assert torch.equal(model(inputs).logits, before)


def test_frozen_tasks_keep_the_k_that_they_were_trained_with(tmp_path, inputs):
    model = adapted(tasks=1).eval()  # K = 2
    names = list(routed_layers(model))
    start_task(model, "b")
    with_b_at_zero = model(inputs).logits
    set_top_k(model, dict.fromkeys(names, 4))  # for task b alone
    assert torch.equal(model(inputs).logits, with_b_at_zero)
    config = model.peft_config["default"]
    assert set(config.frozen_top_k) == {name.removeprefix("base_model.model.") for name in names}
    assert all(value == [2] for value in config.frozen_top_k.values())
    randomize(model, seed=5)
    count(model, inputs)
    for share in expert_usage(model).values():
        assert share[:4].sum().item() == pytest.approx(2, abs=1e-5)
        assert share[4:].sum().item() == pytest.approx(4, abs=1e-5)
    start_task(model, "c")
    assert all(value == [2, 4] for value in model.peft_config["default"].frozen_top_k.values())
    assert torch.equal(reopened(model, tmp_path)(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rank_pattern": {"k_proj": 2}, "top_k_pattern": {"k_proj": 3}},
            r"`top_k_pattern\['k_proj'\]` must be <= r of module.*which is 2",
        ),
        ({"rank_pattern": {"k_proj": 2}, "top_k": 4}, "`top_k` must be <= r .here 2"),
        ({"block_sizes": {"model.layers.0.self_attn.k_proj": [9]}}, "`block_sizes.*at most r, here 8"),
    ],
)
def test_more_than_the_rank_of_its_own_module_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(tiny_llama(), MoraConfig(r=8, target_modules=["k_proj"], **fields))


def skewed(kind: str = "mora", tasks: int = 2) -> PeftModel:
    """An adapter some of whose experts hardly act: their keys are a tenth of another's, or point against it."""
    model = adapted(kind, tasks)
    for layer in routed_layers(model).values():
        for A, _ in layer.blocks("default"):
            A.data[1] = A.data[0] * 0.1
        if kind == "mora":
            layer.mora_A["default"].weight.data[3] = -layer.mora_A["default"].weight.data[0]
    return model


@pytest.mark.parametrize("kind", ["mora", "mora-bank"])
@pytest.mark.parametrize("low_memory", [True, False])
def test_a_pruned_adapter_is_smaller_reloads_bit_for_bit_and_trains_on(kind, low_memory, tmp_path, inputs):
    model = skewed(kind).eval()
    model.save_pretrained(tmp_path / "before")
    count(model, inputs)
    usage = expert_usage(model)
    want = {name: int((share < 0.2).sum()) for name, share in usage.items()}
    summary = prune_experts(model, 0.2)
    assert dict(summary) == want and sum(want.values()) > 14 and summary.experts == 14 * 8
    assert f"{sum(want.values())} of 112 experts deleted" in str(summary)
    pruned = model(inputs).logits
    model.save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / f / "adapter_model.safetensors").stat().st_size for f in ("before", "after")]
    assert sizes[1] < sizes[0] * (1 - 0.8 * sum(want.values()) / 112)
    config = json.loads((tmp_path / "after" / "adapter_config.json").read_text())
    whole = 14 - len(config["block_sizes"])  # modules that have lost none are not listed
    assert sum(map(sum, config["block_sizes"].values())) + 8 * whole == 112 - sum(want.values())
    again = PeftModel.from_pretrained(
        tiny_llama(), tmp_path / "after", low_cpu_mem_usage=low_memory, is_trainable=True
    )
    state, reloaded = get_peft_model_state_dict(model), get_peft_model_state_dict(again)
    assert state.keys() == reloaded.keys() and all(torch.equal(state[key], reloaded[key]) for key in state)
    # A tensor mapped from the file may start anywhere, and CPU kernels round by how it is aligned.
    torch.testing.assert_close(again.eval()(inputs).logits, pruned, rtol=0, atol=1e-6 if low_memory else 0)
    assert set(gradients(again.train(), inputs)) == {n for n, p in again.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=0.05)
    optimizer.step()
    trained = again.eval()(inputs).logits
    assert not torch.equal(trained, pruned)
    start_task(again, "next")
    if kind == "mora":
        assert torch.equal(again(inputs).logits, trained)
    assert all(layer.mora_sizes["default"][-1] == 4 for layer in routed_layers(again).values())
    randomize(again, seed=9)
    assert torch.equal(reopened(again, tmp_path / "grown")(inputs).logits, again(inputs).logits)


def test_pruning_experts_that_never_act_is_reported_as_no_change(inputs):
    """With keys v and -v about, an expert whose key is 0 never has the largest score and adds nothing to the norm."""
    model = adapted(top_k_pattern={".*": 1}).eval()
    for layer in routed_layers(model).values():
        A = layer.mora_A["default"].weight.data
        A[1], A[3] = 0, -A[0]
    count(model, inputs)
    assert all(share[1] == 0 for share in expert_usage(model).values())
    summary = prune_experts(model, 1e-6, inputs={"input_ids": inputs})
    assert all(n >= 1 for n in summary.values())
    assert summary.change < 0.01 and "changed by" in str(summary)
    assert not model.training
    with pytest.raises(ValueError, match="No token was counted"):  # other experts now
        prune_experts(model)


def test_the_reported_change_is_that_of_the_real_tokens():
    model, batch = skewed(), padded()
    count(model, **batch)
    other = {key: value[:2] for key, value in batch.items()}
    before = [model.eval()(**b).logits[b["attention_mask"].bool()] for b in (batch, other)]
    summary = prune_experts(model.train(), 0.6, inputs=[batch, other])
    assert model.training
    after = [model.eval()(**b).logits[b["attention_mask"].bool()] for b in (batch, other)]
    want = (torch.cat(after) - torch.cat(before)).norm() / torch.cat(before).norm()
    assert summary.change == pytest.approx(want.item(), rel=1e-4) and summary.change > 0.01


def test_the_change_is_measured_batch_by_batch(inputs):
    model, wide, seen = skewed(), [], []
    count(model, inputs)

    def look(*_):
        kept = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.shape == (3, 11, 64)]
        wide.append(sum(t.dtype == torch.float64 for t in kept))
        seen.append(len(kept))

    model.register_forward_pre_hook(look)
    prune_experts(model, 0.6, inputs=[{"input_ids": inputs}] * 5)
    assert len(wide) == 10 and max(wide) == 0
    assert seen[-1] - seen[5] <= 1  # the logits of the batch before, and no more with each


def test_a_pruned_file_into_an_adapter_that_is_not_says_so(tmp_path, inputs):
    model = skewed()
    count(model, inputs)
    prune_experts(model, 0.6)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="or was pruned.*open the pruned one with PeftModel.from_pretrained"):
        skewed().load_adapter(str(tmp_path), "default", is_trainable=True)
    to_train = reopened(model, tmp_path, is_trainable=True)
    to_train.load_adapter(str(tmp_path), "default", is_trainable=True)  # as a trainer that resumes
    assert torch.equal(to_train.eval()(inputs).logits, model.eval()(inputs).logits)


def test_a_block_may_lose_all_of_its_experts(tmp_path, inputs):
    model = adapted(tasks=2).eval()
    names = list(routed_layers(model))
    count(model, inputs)
    model.save_pretrained(tmp_path / "full")
    meter = routed_layers(model)[names[0]].usage["default"].meter
    for name in names[:3]:  # as if no token had woken any expert of these
        meter.pending[meter.places[name].start : meter.places[name].stop - 1] = 0
    meter.pending[meter.places[names[3]]][4:8] = 0  # the block in training
    with torch.no_grad():
        summary = prune_experts(model, 1e-9)
    assert [summary[name] for name in names[:3]] == [8, 8, 8] and summary[names[3]] >= 4
    again = reopened(model, tmp_path / "pruned", is_trainable=True)
    assert torch.equal(again(inputs).logits, model(inputs).logits)
    assert routed_layers(again)[names[0]].choices("default") == 0
    layer = again.get_submodule(names[0])
    x = torch.randn(2, 64)
    assert torch.equal(layer(x), layer.base_layer(x))
    again.train()(input_ids=inputs, labels=inputs).loss.backward()
    start_task(again, "next")
    assert routed_layers(again)[names[0]].choices("default") == 4


def test_pruning_is_refused_where_it_is_wrong_and_then_changes_nothing(inputs):
    model = adapted("flylora")
    count(model, inputs)
    with pytest.raises(ValueError, match="frozen projection of FLYLORA.*top_k"):
        prune_experts(model)
    model = adapted()
    model.add_adapter("flat", MoraConfig(r=4, routing="dense", target_modules=["q_proj"]))
    count(model, inputs)
    for below in (0, 1.5, "x"):
        with pytest.raises(ValueError, match="`below` must be"):
            prune_experts(model, below)
    before = copy.deepcopy(model.peft_config["default"]), {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match="input_ids|argument"):
        prune_experts(model, 0.9, inputs={"no_such_argument": inputs})
    for layer in model.modules():
        if isinstance(layer, RoutedLinear) and "flat" in layer.r:
            layer.merge(adapter_names=["flat"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        prune_experts(model, 0.9)
    model.unmerge_adapter()
    assert model.peft_config["default"] == before[0]
    assert all(torch.equal(value, before[1][key]) for key, value in model.state_dict().items())


def test_the_summary_of_a_plain_module_and_growing_forget_old_counts():
    net = nn.Sequential(nn.Linear(13, 9))
    model = get_peft_model(net, MoraConfig(r=4, top_k=1, target_modules=["0"]))
    count(model, torch.randn(5, 13))
    (share,) = expert_usage(model).values()
    assert share.sum().item() == pytest.approx(1)
    start_task(model, "b")
    with pytest.raises(ValueError, match="No token was counted"):
        expert_usage(model)


def test_the_change_is_measured_for_a_classifier_and_for_a_model_without_a_head():
    for head in (BertForSequenceClassification, BertModel):
        model = adapted("mora", base=tiny_bert(head), target_modules=["query", "key", "value"])
        batch = {
            "input_ids": torch.arange(3, 13).view(2, 5),
            "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]),
        }
        count(model, **batch)
        assert prune_experts(model, 0.9, inputs=batch).change > 0
    model = adapted("mora", base=tiny_bert(BertForSequenceClassification), target_modules=["query", "key", "value"])
    batch = {name: tokens[:, :3] for name, tokens in batch.items()}  # as many as there are labels
    count(model, **batch)
    assert [x.shape for x in _outputs(model, [batch], {}, "default")] == [(2, 3)]


def test_inputs_without_a_token_that_is_none_of_padding_are_refused_before_anything_is_deleted(inputs):
    model = adapted()
    count(model, inputs)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="`inputs` must be batches with tokens"):
        prune_experts(model, 0.9, inputs={"input_ids": inputs, "attention_mask": torch.zeros_like(inputs)})
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_a_forward_that_breaks_off_counts_for_nothing():
    model = adapted().eval()
    last = list(routed_layers(model).values())[-1]
    with record_usage(model):
        handle = last.register_forward_pre_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**padded())
        handle.remove()
        model(**padded())
    assert tokens(model) == {22}


def test_a_second_count_ends_the_first_and_a_close_within_a_forward_holds():
    model = adapted()
    first = UsageMeter(model)
    second = UsageMeter(model)
    assert not first._handles and second._handles
    model.register_forward_hook(lambda *args: second.close())
    model(**padded())
    assert not second.is_open and not second._handles
