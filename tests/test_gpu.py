"""On a CUDA device: the numbers of the host, no waiting for the card in a layer, and whole runs. `pytest -m gpu`."""

import copy
import math

import pytest
import torch
from helpers import LORA, METHODS, adapted, gradients, losses, quantized, randomize, sft, tiny_llama
from peft import PeftModel, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoTokenizer

from peft_mora import FlyLoraConfig, MoraConfig, TaskRouter, expert_usage, record_usage, start_task
from peft_mora.base import AdapterLinear
from peft_mora.merging import collect_inputs, merge_adapters
from peft_mora.merging.inputs import spread
from peft_mora.merging.rules import dare
from peft_mora.mora import MoraLinear
from trl_callbacks import ActivationBudgetCallback, DriftCallback, OrthogonalProjectionCallback
from trl_callbacks.factors import trainable_factors
from trl_callbacks.subspace import Subspace


CARD = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ON_CARD = {"use_cpu": False, "bf16": True, "save_strategy": "no"}
TEXT = ["the cat sat on the mat", "a dog ran under the log", "north south east west yes no"]


def plain(model: nn.Module) -> nn.Module:
    """The same model on the plain path."""
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.lean = False
    return model


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_values_and_gradients_are_those_of_the_host(make_config, dropout, inputs):
    """In float64, but for the base's norms and rotations, which a Llama computes in float32. The card draws dropout
    masks of its own: they are compared with those of a recomputation."""
    host = adapted(make_config, dropout=dropout).double().train()
    card = copy.deepcopy(host).to(CARD)
    torch.manual_seed(1)
    want = gradients(host, inputs)
    torch.manual_seed(1)
    got = gradients(card, inputs.to(CARD))
    if dropout:
        card.enable_input_require_grads()
        card.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(1)
        want = gradients(card, inputs.to(CARD))
    assert want.keys() == got.keys() != set()
    for name, grad in got.items():
        assert (grad.cpu() - want[name].cpu()).norm() <= 1e-4 * want[name].norm(), name
    with torch.no_grad():
        logits = card.eval()(inputs.to(CARD)).logits.cpu()
        torch.testing.assert_close(logits, host.eval()(inputs).logits, rtol=1e-5, atol=1e-6)


def test_the_fast_path_over_a_4_bit_base_is_the_plain_one(make_config, llama_folder, inputs):
    model = adapted(make_config, quantized(llama_folder, device=CARD, dtype=torch.float32)).to(CARD).train()
    got = gradients(model, inputs.to(CARD))
    want = gradients(plain(model), inputs.to(CARD))
    assert got.keys() == want.keys() != set()
    for name, grad in got.items():
        assert (grad - want[name]).norm() <= 1e-3 * want[name].norm() + 1e-6, name


@pytest.mark.parametrize("fused", [False, True])
def test_a_layer_never_waits_for_the_card(make_config, fused, monkeypatch):
    """A layer that asks the card for a number makes it idle, 210 times a step of a small model."""
    monkeypatch.setattr(MoraLinear, "fused_gate", fused)
    base = nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16()
    model = get_peft_model(base, make_config(target_modules=["0"])).to(CARD).train()
    x = torch.randn(8, 64, device=CARD, dtype=torch.bfloat16, requires_grad=True)
    model(x).sum().backward()  # what is made once is made here
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            model(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def peak(config, folder: str) -> int:
    """Most bytes that tensors took on top of the model in one step of 8 x 96 tokens."""
    model = adapted(config, quantized(folder, device=CARD), r=16).to(CARD).train()
    ids = torch.randint(4, 24, (8, 96), generator=torch.Generator().manual_seed(0)).to(CARD)
    for _ in range(2):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(input_ids=ids, labels=ids).loss.backward()
        most = torch.cuda.max_memory_allocated() - before
    return most


def test_a_step_takes_no_more_memory_than_lora_s(make_config, llama_folder):
    assert peak(make_config, llama_folder) <= 1.01 * peak(LORA, llama_folder)


@pytest.mark.parametrize("form", ["mora", "lori", "flylora"])
def test_compiled_layers_give_the_same(form, inputs, monkeypatch):
    """With the fused gate in eager mode; compiled layers do not take it."""
    monkeypatch.setattr(MoraLinear, "fused_gate", True)
    torch.compiler.reset()
    model = adapted(METHODS[form]).to(CARD)
    want = gradients(model, inputs.to(CARD))
    compiled = torch.compile(model)
    compiled.zero_grad()
    compiled(input_ids=inputs.to(CARD), labels=inputs.to(CARD)).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, want[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("form", ["mora", "lori", "flylora"])
def test_a_static_cache_which_runs_in_cuda_graphs_gives_the_same(form, inputs):
    torch.compiler.reset()
    model = adapted(METHODS[form], tiny_llama().to(CARD)).to(CARD)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    static, plain = (model.generate(inputs.to(CARD), cache_implementation=c, **options) for c in ("static", None))
    assert torch.equal(static, plain)


def test_generating_with_a_cache_is_generating_without(make_config, llama_folder, inputs):
    model = adapted(make_config, tiny_llama().to(CARD)).to(CARD)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with_cache, without = (model.generate(inputs.to(CARD), use_cache=cache, **options) for cache in (True, False))
    assert with_cache.shape == (3, 19) and torch.equal(with_cache, without)


@pytest.mark.parametrize("half", ["fp16", "bf16"])
def test_half_precisions_train_with_checkpointing(make_config, half, llama_folder, tmp_path):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    base, config = quantized(llama_folder, device=CARD, dtype=dtype), make_config(target_modules="all-linear")
    options = {**ON_CARD, "fp16": False, "bf16": False, half: True, "gradient_checkpointing": True}
    trainer = sft(base, llama_folder, tmp_path, config, **options)
    weights = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "_B." in name}
    before = {name: p.detach().clone() for name, p in weights.items()}
    trainer.train()
    assert all(math.isfinite(loss) for loss in losses(trainer)) and len(losses(trainer)) == 6 and weights
    assert all(p.isfinite().all() and not torch.equal(p, before[name]) for name, p in weights.items())


def test_ddp_on_one_card_has_the_gradients_without(make_config, inputs):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = adapted(make_config).to(CARD).train()
        want = gradients(model, inputs.to(CARD))
        model.zero_grad()
        DistributedDataParallel(model, device_ids=[0])(inputs.to(CARD), labels=inputs.to(CARD)).loss.backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert got.keys() == want.keys() != set()
        for name, grad in got.items():
            torch.testing.assert_close(grad, want[name])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("optim", ["adamw_torch", "paged_adamw_8bit"])
@pytest.mark.parametrize("routing", ["task", "bank", "dense"])
def test_a_second_task_stays_out_of_what_the_first_and_general_text_need(routing, optim, llama_folder, tmp_path):
    """Protected text, first task, saved, opened again, second task: as a user's two runs."""
    config = MoraConfig(r=4, routing=routing, target_modules="all-linear")
    callback = OrthogonalProjectionCallback(protect=TEXT, energy=0.8)
    torch.manual_seed(0)
    options = {**ON_CARD, "optim": optim}
    first = sft(quantized(llama_folder, device=CARD), llama_folder, tmp_path / "one", config, [callback], **options)
    first.train()
    first.save_model()
    model = PeftModel.from_pretrained(quantized(llama_folder, device=CARD), tmp_path / "one", is_trainable=True)
    start_task(model, "two")
    memory = tmp_path / "one" / "subspace"
    callbacks = [OrthogonalProjectionCallback(memory), DriftCallback(TEXT, interval=3, tokens=64)]
    second = sft(model, llama_folder, tmp_path / "two", None, callbacks, **options)
    second.train()
    subspace = Subspace.load(memory)
    for name, pair in trainable_factors(model, None)[1].items():
        A, B = pair.A.detach().double().cpu(), pair.B.detach().double().cpu()
        V = subspace.right[subspace.group_of(name)].double()
        assert B.norm() > 0 and (B @ A @ V).norm() <= 1e-5 * (B @ A).norm(), name
    logged = [entry["drift_kl"] for entry in second.state.log_history if "drift_kl" in entry]
    assert len(logged) == 2 and all(math.isfinite(kl) for kl in logged)


def test_a_resumed_run_ends_where_the_unbroken_one_does(make_config, llama_folder, tmp_path):
    def run(resume=None):
        torch.manual_seed(0)
        options = {**ON_CARD, "save_strategy": "steps", "save_steps": 3}
        base, config = quantized(llama_folder, device=CARD), make_config(target_modules="all-linear")
        trainer = sft(base, llama_folder, tmp_path, config, **options)
        trainer.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}

    want = run()
    got = run(str(tmp_path / "checkpoint-3"))
    for name, weight in got.items():  # atomics in the card's kernels are not in the same order every time
        assert (weight - want[name]).norm() <= 0.05 * want[name].norm() + 1e-6, name


@pytest.mark.parametrize("config", [MoraConfig, FlyLoraConfig])
def test_a_budget_is_annealed_and_what_acts_is_counted(config, llama_folder, tmp_path, inputs):
    base, config = quantized(llama_folder, device=CARD), config(r=6, top_k=6, target_modules="all-linear")
    trainer = sft(base, llama_folder, tmp_path, config, [ActivationBudgetCallback(target=2)], **ON_CARD)
    trainer.train()
    with record_usage(trainer.model):
        trainer.model(inputs.to(CARD))
    usage = expert_usage(trainer.model)
    shares = torch.stack([torch.as_tensor(share).float().cpu() for share in usage.values()])
    assert float(shares.sum(-1).mean()) == pytest.approx(2, abs=1e-4)


def test_adapters_are_merged_by_what_they_saw_on_the_card(llama_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    folders = []
    for name in "ab":
        model = adapted(LORA, quantized(llama_folder, device=CARD))
        folders.append(tmp_path / name)
        model.save_pretrained(folders[-1])
        collect_inputs(model, TEXT, folders[-1], tokenizer=tokenizer)
    prompts = dict.fromkeys(folders, TEXT)
    merged = tmp_path / "merged"
    base = quantized(llama_folder, device=CARD)
    merge_adapters(folders, "inputs", 4, output=merged, model=base, tokenizer=tokenizer, prompts=prompts)
    ids = tokenizer(TEXT[0], return_tensors="pt").input_ids.to(CARD)
    with torch.no_grad():  # two copies of one adapter are that adapter
        want = PeftModel.from_pretrained(quantized(llama_folder, device=CARD), folders[0])(ids).logits
        got = PeftModel.from_pretrained(quantized(llama_folder, device=CARD), merged)(ids).logits
    assert (got - want).norm() <= 0.05 * want.norm()


def test_what_draws_by_a_seed_leaves_the_cards_own_draws_alone():
    torch.cuda.manual_seed(3)
    torch.rand(5, device=CARD)
    before = torch.cuda.get_rng_state()
    one, other = (spread(torch.eye(2052, device=CARD), 8) for _ in range(2))
    dare([torch.ones(9, 9)], [1.0], [7])
    assert torch.equal(one.Q, other.Q) and torch.equal(torch.cuda.get_rng_state(), before)


@torch.no_grad()
def test_a_router_sends_rows_on_the_card_where_names_by_hand_do(llama_folder, tmp_path):
    """Routed by features of the card, top1 and top2, and again from the folder that holds all of it."""
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    model = adapted(LORA, quantized(llama_folder, device=CARD), task_type="CAUSAL_LM").to(CARD)
    model.add_adapter("b", LORA(task_type="CAUSAL_LM"))
    model.set_adapter("b")
    randomize(model.to(CARD).eval(), seed=5)
    router = TaskRouter(model, tokenizer)
    for name, prompt in (("default", TEXT[0]), ("b", TEXT[2])):
        router.add_task(name, [prompt, prompt.rpartition(" ")[0]])
    batch = tokenizer([*TEXT[::2], TEXT[2][:11]], return_tensors="pt", padding=True, padding_side="left").to(CARD)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    names = ["default", "b", "b"]
    want, answers = model(**batch, adapter_names=names).logits, model.generate(**batch, adapter_names=names, **options)
    router.attach(none=False)
    assert torch.equal(model(**batch).logits, want) and router.last == names
    assert torch.equal(model.generate(**batch, **options), answers)
    router.save_pretrained(tmp_path)
    router.attach(mode="top2", none=False)
    assert model(**batch).logits.isfinite().all() and router.last == names
    opened = PeftModel.from_pretrained(quantized(llama_folder, device=CARD), tmp_path).eval()
    assert torch.equal(opened.generate(**batch, **options), answers) and TaskRouter.of(opened).last == names
