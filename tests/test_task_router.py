"""The router: its fit against a plain float64 reference, its features, and models that it drives row by row."""

import copy
import json

import pytest
import torch
from helpers import LORA, METHODS, adapted, load_recipe, randomize, tiny_gpt2, tiny_llama, tiny_t5
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
)

from peft_mora import TaskRouter, start_task
from peft_mora.task_features import HiddenStates, real_tokens
from peft_mora.task_router import check_routable
from peft_mora.task_scores import Scores


class Numbers:
    """A tokenizer of texts that are token ids."""

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [int(word) for word in text.split()]})


def tokens(low: int, high: int, rows: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high, (rows, 9), generator=torch.Generator().manual_seed(seed))


def texts(ids: torch.Tensor) -> list[str]:
    return [" ".join(map(str, row)) for row in ids.tolist()]


A, B, UNKNOWN = (4, 24), (24, 44), (44, 64)  # a task is where its tokens are from
TEST = torch.cat([tokens(*A, 3, 9), tokens(*B, 3, 9), tokens(*UNKNOWN, 2, 9)])
MASK = torch.ones_like(TEST)


def two_adapters(config=LORA, base: nn.Module | None = None, **fields) -> PeftModel:
    model = adapted(config, base, task_type="CAUSAL_LM", **fields)
    model.add_adapter("b", config(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}))
    model.set_adapter("b")
    randomize(model, seed=5)
    model.set_adapter("default")
    return model.eval()


def bank(routing: str = "task", base: nn.Module | None = None) -> PeftModel:
    return adapted(METHODS["mora"], base, tasks=2, task_type="CAUSAL_LM", routing=routing)


def fitted(model, first: str = "default", second: str = "b", **arguments) -> TaskRouter:
    router = TaskRouter(model, Numbers(), layers=1, **arguments)
    router.add_task(first, texts(tokens(*A)))
    router.add_task(second, texts(tokens(*B)))
    return router


# The fit


def features(n: int, dimensions: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(dimensions, generator=generator)
    return nn.functional.normalize(centre + 0.5 * torch.randn(n, dimensions, generator=generator), dim=-1)


@pytest.mark.parametrize("dimensions", [5, 60])  # fewer than there are rows, and more
def test_the_fit_is_ridge_regression_on_the_tasks_sums_and_leaves_rows_out_as_a_second_fit_would(dimensions):
    rows = {name: features(n, dimensions, n) for name, n in (("b", 7), ("a", 11), ("none", 9))}
    scores, ridge = Scores(rows, 0.05), 0.05
    assert scores.names == ["a", "b", "none"]
    X = {name: torch.cat([x.double(), torch.ones(len(x), 1)], 1) for name, x in rows.items()}

    def solve(parts, damping):
        S = sum((w[:, None] * x).T @ x for x, w, _ in parts)
        M = torch.stack([sum((w[:, None] * x).sum(0) * (c == k) for x, w, c in parts) for k in range(3)], 1)
        return torch.linalg.solve(S + damping * torch.eye(len(S), dtype=torch.float64), M)

    parts = [
        (X[n], torch.full((len(X[n]),), 1 / len(X[n]), dtype=torch.float64), c) for c, n in enumerate(scores.names)
    ]
    S = sum((w[:, None] * x).T @ x for x, w, _ in parts)
    damping = ridge * S.diagonal().mean()
    torch.testing.assert_close(scores.W, solve(parts, damping), rtol=1e-8, atol=1e-10)

    own = []  # of each row of a task: its score and residual, by a fit in which it has no weight
    for c in range(2):
        x, w, _ = parts[c]
        for i in range(len(x)):
            without = w.clone()
            without[i] = 0
            score = x[i] @ solve([*parts[:c], (x, without, c), *parts[c + 1 :]], damping)[:, c]
            others = torch.cat([x[:i], x[i + 1 :]])
            mu = ridge * x.square().sum(1).mean()
            inner = others @ others.T + mu * torch.eye(len(others), dtype=torch.float64)
            k = others @ x[i]
            own.append((score, (x[i] @ x[i] - k @ torch.linalg.solve(inner, k)).log(), c))
    z = []
    groups = [torch.tensor([[s, r] for s, r, c in own if c == k]) for k in range(2)]
    pooled = torch.cat([g - g.mean(0) for g in groups]).square().mean(0)
    for g in groups:
        sd = (((g - g.mean(0)).square().sum(0) + 8 * pooled) / (len(g) + 8)).sqrt()
        z.append((((g - g.mean(0)) / sd) * torch.tensor([1, -1])).sum(1))
    torch.testing.assert_close(scores.known, torch.cat(z).double().sort().values, rtol=1e-5, atol=1e-5)


def test_any_order_gives_the_same_router_and_a_removed_task_leaves_no_trace():
    rows = {name: features(6 + i, 30, i) for i, name in enumerate("cab")}
    one, other = TaskRouter(), TaskRouter()
    for name in "abc":
        one.add_task(name, rows[name])
    for name in ("c", "x", "b", "a"):
        other.add_task(name, rows.get(name, features(9, 30, 99)))
    held = other.rows["c"].clone()
    other.remove_task("x")
    assert torch.equal(one.scores.W, other.scores.W) and torch.equal(one.scores.known, other.scores.known)
    assert torch.equal(other.rows["c"], held)
    probe = torch.cat(list(rows.values()))
    other.remove_task("a")
    other.add_task("a", rows["a"])
    with torch.device("meta"):  # as under torch.set_default_device("cuda")
        routed = other.route(probe)
    assert torch.equal(one.route(probe).probabilities, routed.probabilities)


def test_probabilities_say_how_often_the_router_is_right():
    """Two tasks that overlap: of what is given 80 %, about 80 % are right."""
    generator = torch.Generator().manual_seed(0)

    def draw(shift, n):
        return torch.randn(n, 8, generator=generator) + shift * torch.eye(8)[0]

    router = TaskRouter(false_alarms=0)
    router.add_task("a", draw(-0.7, 500))
    router.add_task("b", draw(0.7, 500))
    names, p = router.route(torch.cat([draw(-0.7, 2000), draw(0.7, 2000)]))
    right = torch.tensor([name == ("a" if i < 2000 else "b") for i, name in enumerate(names)]).double()
    assert abs(float(p.max(dim=1).values.mean() - right.mean())) < 0.03 and right.mean() > 0.7


def test_unknown_prompts_are_none_and_known_ones_are_not_more_often_than_asked():
    router = TaskRouter(false_alarms=0.1)
    for i, name in enumerate("abc"):
        router.add_task(name, features(60, 40, i)[:40])
    known = [name for i in range(3) for name in router.route(features(60, 40, i)[40:]).names]
    assert 0 < known.count("none") / 60 < 0.2
    assert [name for name in known if name != "none"] == [
        n for n, k in zip(sorted("abc" * 20), known, strict=True) if k != "none"
    ]
    assert router.route(features(50, 40, 7)).names == ["none"] * 50
    few = TaskRouter()
    for i, name in enumerate("abc"):
        few.add_task(name, features(60, 40, i)[:3])
    assert few.route(features(50, 40, 7)).names.count("none") > 45
    usual = router.familiarity(torch.cat([router.rows["a"], features(50, 40, 7)]))
    assert usual[:40].min() > 1 / 121 > usual[40:].max() > 0 and usual.max() <= 1
    router.add_task("none", features(20, 40, 8))
    assert router.classes == ["a", "b", "c", "none"] and router.route(features(30, 40, 8)[20:]).names == ["none"] * 10


# Features


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2])
def test_features_are_the_means_of_the_frozen_base_and_the_rest_of_the_model_does_not_run(base):
    base = base()
    prompts = ["5 6 7 8 9 10", "11 12", "13 14 15 16"]
    want = []
    for prompt in prompts:
        ids = torch.tensor([Numbers()(prompt).input_ids])
        with torch.no_grad():
            states = base.eval()(ids, output_hidden_states=True).hidden_states[1:3]
        parts = [
            nn.functional.normalize(nn.functional.normalize(h[0].double(), dim=-1).mean(0), dim=-1) for h in states
        ]
        want.append(torch.cat(parts) / 2**0.5)
    model = adapted(LORA, base).train()
    ran = []
    model.get_base_model().get_output_embeddings().register_forward_hook(lambda *_: ran.append("head"))
    # The second state of transformers' list is behind the last norm: the module's own output is what is meant.
    first = TaskRouter(model, Numbers(), layers=1).features(prompts).double()
    torch.testing.assert_close(first, torch.stack(want)[:, : first.shape[1]] * 2**0.5, rtol=1e-5, atol=1e-6)
    both = TaskRouter(model, Numbers(), layers=[2, 1]).features(prompts)
    assert both.shape == (3, 2 * first.shape[1]) and not ran and model.training
    torch.testing.assert_close(both.norm(dim=1), torch.ones(3))


def test_without_a_mask_the_zeros_at_the_end_are_padding():
    ids = torch.tensor([[5, 0, 6, 0, 0], [0, 0, 0, 0, 0], [5, 6, 7, 8, 2]])
    assert real_tokens(ids, [2, None]).tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]


# Driving


def told(model, names: list[str]) -> torch.Tensor:
    return model(TEST, adapter_names=names).logits


CASES = {
    "lora": (two_adapters, ["default", "b"]),
    "mora task": (bank, ["default/initial", "default/task1"]),
    "mora bank": (lambda: bank("bank"), ["default/initial", "default/task1"]),
    "mora dense": (lambda: bank("dense"), ["default/initial", "default/task1"]),
    "mtllora": (lambda: adapted("mtllora", task_type="CAUSAL_LM"), ["default/a", "default/b"]),
    "gpt2": (lambda: two_adapters(base=tiny_gpt2()), ["default", "b"]),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_each_row_goes_through_its_tasks_adapter_in_forward_and_generate(case):
    make, adapters = CASES[case]
    model = make()
    router = fitted(model, *(name.rpartition("/")[2] for name in adapters))
    tasks = router.route(texts(TEST)).names
    assert tasks[:6] == [name.rpartition("/")[2] for name in adapters for _ in range(3)] and tasks[7] == "none"
    rows = ["__base__" if task == "none" else next(a for a in adapters if a.endswith(task)) for task in tasks]
    options = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = told(model, rows)
    answers = model.generate(TEST, adapter_names=rows, **options)
    by_beams = model.generate(TEST, adapter_names=rows, num_beams=2, **options)
    with model.disable_adapter():
        base = model(TEST).logits

    router.attach()
    assert torch.equal(model(TEST).logits, want) and router.last == tasks
    assert torch.equal(want[7:], base[7:]) and not torch.allclose(want[:6], base[:6], atol=1e-2)
    assert torch.equal(model.generate(TEST, **options), answers)
    assert torch.equal(model.generate(TEST, use_cache=False, **options), answers)
    assert torch.equal(model.generate(TEST, num_beams=2, **options), by_beams)
    filled, mask = nn.functional.pad(TEST, (9, 0), value=50), nn.functional.pad(MASK, (9, 0))
    padded = {**options, "attention_mask": mask}
    assert torch.equal(model.generate(filled, **padded)[:, 9:], answers)
    assert torch.equal(model.generate(filled, num_beams=2, **padded)[:, 9:], by_beams)
    assert torch.equal(copy.deepcopy(model).generate(TEST, **options), answers)
    asked = model(TEST, adapter_names=["__base__"] * 8).logits  # by hand: the router stands back
    assert torch.equal(asked, base)
    with model.disable_adapter():
        assert torch.equal(model(TEST).logits, base)
    router.detach()
    assert "generate" not in vars(model.get_base_model())
    assert torch.equal(told(model, rows), want)


@torch.no_grad()
def test_an_answer_stays_with_its_prompts_task_whatever_it_says():
    model = two_adapters()
    router = fitted(model)
    router.attach()
    cache = DynamicCache()
    model(TEST[:3], past_key_values=cache, use_cache=True)
    foreign = tokens(*B, 3)
    got = model(foreign, past_key_values=cache).logits
    router.detach()
    both = torch.cat([TEST[:3], foreign], 1)
    torch.testing.assert_close(got, model(both, adapter_names=["default"] * 3).logits[:, 9:])


@pytest.mark.parametrize("case", ["lora", "mora task", "mora bank", "mora dense"])
@torch.no_grad()
def test_old_prompts_answers_stay_bit_for_bit_when_a_task_is_added(case):
    make, adapters = CASES[case]
    model = make()
    router = fitted(model, *(name.rpartition("/")[2] for name in adapters))
    router.attach()
    before = model(TEST).logits
    with torch.enable_grad():
        if case == "lora":
            model.add_adapter("c", LORA(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"))
            model.set_adapter("c")
        else:
            start_task(model, "c")
        randomize(model, seed=11)
    router.add_task("c", texts(tokens(*UNKNOWN)))
    router.attach()
    model.eval()
    after = model(TEST).logits
    assert router.last == [name.rpartition("/")[2] for name in adapters for _ in range(3)] + ["c"] * 2
    assert torch.equal(after[:6], before[:6]) and not torch.equal(after[6:], before[6:])


@torch.no_grad()
def test_top2_weighs_the_two_likeliest_adapters_updates():
    model = two_adapters()
    router = fitted(model)
    router.attach(mode="top2", none=False)
    got = model(TEST).logits
    router.detach()
    weights = router.route(texts(TEST)).probabilities  # columns b, default
    for row in (0, 4):
        b, default = weights[row].tolist()
        model.add_weighted_adapter(["b", "default"], [b, default], f"mix{row}", combination_type="cat")
        want = model(TEST, adapter_names=[f"mix{row}"] * 8).logits[row]
        torch.testing.assert_close(got[row], want, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got[row], model(TEST, adapter_names=["default", "b"] * 4).logits[row], atol=1e-4)


@torch.no_grad()
def test_the_first_layers_run_once_where_they_have_no_adapter():
    for layers, runs in (([1], 1), ([0, 1], 2)):
        model = two_adapters(layers_to_transform=layers, target_modules=["q_proj", "v_proj"])
        router = fitted(model)
        want = told(model, ["default"] * 3 + ["b"] * 3 + ["__base__"] * 2)
        router.attach()
        counted = []
        handle = model.get_base_model().model.layers[0].register_forward_hook(lambda *_, c=counted: c.append(1))
        assert torch.equal(model(TEST).logits, want) and len(counted) == runs
        handle.remove()


# Files


@torch.no_grad()
def test_a_saved_router_routes_bit_for_bit_and_only_on_its_own_base(tmp_path):
    model = two_adapters()
    router = fitted(model)
    router.add_task("none", texts(tokens(*UNKNOWN)))
    router.save(tmp_path / "router")
    again = TaskRouter.load(tmp_path / "router", tiny_llama(), Numbers())
    assert torch.equal(again.route(texts(TEST)).probabilities, router.route(texts(TEST)).probabilities)
    cut = tiny_llama()
    cut.resize_token_embeddings(28)  # as lm-eval does where the tokenizer has fewer words
    TaskRouter.load(tmp_path / "router", cut)
    with pytest.raises(ValueError, match="of another base model .*weights_sha256"):
        TaskRouter.load(tmp_path / "router", tiny_llama(seed=1))
    (tmp_path / "router" / "router.json").write_text("{}")
    with pytest.raises(ValueError, match="does not hold a router"):
        TaskRouter.load(tmp_path / "router")
    with pytest.raises(FileNotFoundError, match="TaskRouter.save wrote"):
        TaskRouter.load(tmp_path)


def test_a_router_that_was_made_in_bfloat16_opens_in_every_dtype(tmp_path):
    def base(dtype):
        model = tiny_llama()
        model.get_input_embeddings().weight.data *= 1e-3  # float16 has not all bits of these
        return model.bfloat16().to(dtype)

    fitted(base(torch.bfloat16)).save(tmp_path / "router")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert TaskRouter.load(tmp_path / "router", base(dtype), Numbers()).route(texts(TEST[:6])).names


@pytest.mark.parametrize("what", ["save", "save_pretrained"])
def test_a_save_replaces_an_earlier_one_and_nothing_else(what, tmp_path, monkeypatch):
    model = two_adapters()
    router = fitted(model)
    router.attach()
    save = getattr(router, what)
    model.save_pretrained(tmp_path / "out")  # default's two files, README.md and b/, as PEFT does it
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "train.py").write_text("mine")
    monkeypatch.chdir(tmp_path / "project")
    before = sorted(tmp_path.rglob("*"))
    for folder, first in ((tmp_path / "out", "b" if what == "save_pretrained" else "README.md"), (".", "train.py")):
        with pytest.raises(FileExistsError, match=f"holds '{first}', which would be deleted.*give a folder of its"):
            save(folder)
    assert sorted(tmp_path.rglob("*")) == before
    for _ in range(2):
        save(tmp_path / "own")
    assert len(list((tmp_path / "own").iterdir())) == 2


def test_an_adapter_is_not_taken_for_an_earlier_save_and_a_card_is_kept(tmp_path):
    model = two_adapters()
    router = fitted(model)
    router.attach()
    model.save_pretrained(tmp_path, selected_adapters=["b"])  # the files that a routed folder has
    before = (tmp_path / "b" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds an adapter, which would be deleted"):
        router.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "adapter_model.safetensors").read_bytes() == before
    router.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "README.md").write_text("mine")
    router.save_pretrained(tmp_path / "own")
    assert (tmp_path / "own" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("case", ["lora", "lori", "lori-sparse", "flylora", "mora task"])
@torch.no_grad()
def test_a_folder_of_adapters_and_router_opens_as_an_adapter_does(case, llama_folder, tmp_path):
    def base():
        return AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)

    config = LORA if case == "lora" else METHODS[case.split()[0]]
    model = bank(base=base()) if case == "mora task" else two_adapters(config, base())
    if case == "mora task":
        start_task(model, "x/y")
        randomize(model.eval(), seed=3)
    router = fitted(model, *(("initial", "x/y") if case == "mora task" else ("default", "b")))
    router.attach()
    want, tasks = model(TEST).logits, router.last
    answers = model.generate(TEST, attention_mask=MASK, max_new_tokens=3, do_sample=False)
    router.save_pretrained(tmp_path / "routed")

    opened = {
        "peft": PeftModel.from_pretrained(base(), tmp_path / "routed").eval(),
        "empty": PeftModel.from_pretrained(base(), tmp_path / "routed", low_cpu_mem_usage=True).eval(),
    }
    if case != "lori-sparse":  # transformers' own loader knows no packed weights
        opened["transformers"] = AutoModelForCausalLM.from_pretrained(tmp_path / "routed", dtype=torch.float32)
    for name, other in opened.items():
        torch.testing.assert_close({name: other(TEST).logits}, {name: want}, rtol=1e-5, atol=1e-5)
        assert TaskRouter.of(other).last == tasks
        got = other.generate(input_ids=TEST, attention_mask=MASK, max_new_tokens=3, do_sample=False)
        assert torch.equal(got, answers)
    torch.save(opened["peft"], tmp_path / "whole.pt")
    with pytest.raises(ValueError, match="of another base model"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path / "routed")
    with pytest.raises(ValueError, match="is for inference"):
        PeftModel.from_pretrained(base(), tmp_path / "routed", is_trainable=True)
    with pytest.raises(ValueError, match="saved by its router"):
        opened["peft"].save_pretrained(tmp_path / "refused")
    with pytest.raises(ValueError, match="takes no second one"):
        opened["peft"].load_adapter(tmp_path / "routed", "second")
    if case in ("lora", "lori"):
        names = [name for name in opened["peft"].peft_config if name != "default"]
        ways = {"combination_type": "cat"} if case == "lora" else {}
        opened["peft"].base_model.add_weighted_adapter(names, [0.5, 0.5], "sum", **ways)
        opened["peft"].save_pretrained(tmp_path / "sums", selected_adapters=["sum"])
        assert load_file(tmp_path / "sums/sum/adapter_model.safetensors")
    with pytest.raises(ValueError, match="no tokens"):
        opened["peft"](TEST[:, :0])
    TaskRouter.of(opened["peft"]).save_pretrained(tmp_path / "again")
    assert torch.equal(
        PeftModel.from_pretrained(base(), tmp_path / "again").eval()(TEST).logits, opened["peft"](TEST).logits
    )
    file = tmp_path / "again" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "task_router" not in name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="no features of the router"):
        PeftModel.from_pretrained(base(), tmp_path / "again")
    kept = next(name for name in opened["peft"].peft_config if name != "default")
    opened["peft"].save_pretrained(tmp_path / "one", selected_adapters=[kept])
    TaskRouter.of(opened["peft"]).detach()
    want = opened["peft"](TEST, adapter_names=[kept] * 8).logits
    assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "one" / kept).eval()(TEST).logits, want)


@torch.no_grad()
def test_a_folder_opens_where_the_embeddings_are_narrower_than_the_states(tmp_path):
    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "vocab_size": 64}
        config = OPTConfig(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, **sizes)
        return AutoModelForCausalLM.from_config(config).eval()

    model = two_adapters(base=base(), target_modules=["q_proj", "v_proj"])
    router = fitted(model)
    router.attach()
    want = model(TEST).logits
    router.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(base(), tmp_path).eval()(TEST).logits, want)


def test_a_router_whose_tasks_have_changed_is_attached_again_before_it_is_saved(tmp_path):
    model = two_adapters()
    router = fitted(model)
    router.attach()
    model.add_adapter("c", LORA(target_modules="all-linear", task_type="CAUSAL_LM"))
    router.add_task("c", texts(tokens(*UNKNOWN)))
    refused = pytest.raises(ValueError, match=r"attached with \['b', 'default'\].*router.attach\(\) again")
    with refused:
        router.save_pretrained(tmp_path / "routed")
    router.remove_task("b")
    with refused:
        router.save_pretrained(tmp_path / "routed")
    assert not (tmp_path / "routed").exists()
    router.attach()
    router.save_pretrained(tmp_path / "routed")
    opened = PeftModel.from_pretrained(tiny_llama(), tmp_path / "routed").eval()
    assert TaskRouter.of(opened).tasks == router.tasks and opened(TEST).logits.isfinite().all()


def test_an_adapter_named_as_the_default_one_would_be_in_the_folder_stays_another(tmp_path):
    model = adapted(LORA, task_type="CAUSAL_LM")
    model.add_adapter("adapter", LORA(target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize(model.eval(), 1)
    router = fitted(model, "first", "second")
    router.attach(adapters={"first": "default", "second": "adapter"})
    router.save_pretrained(tmp_path)
    rows = json.loads((tmp_path / "adapter_config.json").read_text())["rows"]
    assert rows == {"first": "adapter2", "second": "adapter"}
    assert torch.equal(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()(TEST).logits, model(TEST).logits)


@pytest.mark.parametrize("opened", [True, False])
def test_a_base_whose_adapters_are_unloaded_or_merged_is_a_plain_one_again(opened, tmp_path):
    plain, model = tiny_llama().eval(), two_adapters()
    router = fitted(model)
    router.attach()
    if opened:
        router.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
        assert "task_router.features" in model.base_model.model.state_dict()
    base = model.unload() if opened else model.merge_and_unload().train()
    assert base.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(base(TEST).logits, plain(TEST).logits) is opened
    assert not base._forward_pre_hooks and "generate" not in vars(base) and not hasattr(base, "task_router")
    router.detach()  # of what has ended


def test_another_router_may_follow_on_a_base_whose_adapters_are_gone():
    model = two_adapters()
    first = fitted(model)
    first.attach()
    again = get_peft_model(model.unload(), LORA(target_modules="all-linear")).eval()
    fitted(again).attach(adapters={"default": "default", "b": "default"})
    assert again(TEST).logits.isfinite().all() and len(again.base_model.model._forward_pre_hooks) == 1


def test_a_model_of_images_and_text_is_read_in_its_text():
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    base = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_index=3)
    )
    router = fitted(adapted(LORA, base, target_modules=r".*language_model.*q_proj").eval(), "default", "default2")
    assert router.route(texts(tokens(*A))).names == ["default"] * 20


def test_a_folder_names_the_base_s_revision_and_is_of_an_adapter_at_least(tmp_path):
    model = two_adapters()
    for config in model.peft_config.values():
        config.revision = "v1"
    router = fitted(model)
    router.attach()
    router.save_pretrained(tmp_path / "routed")
    assert json.loads((tmp_path / "routed/adapter_config.json").read_text())["revision"] == "v1"
    router.attach(adapters=dict.fromkeys(router.tasks, "__base__"))
    with pytest.raises(ValueError, match="no adapter to save"):
        router.save_pretrained(tmp_path / "bare")
    assert not (tmp_path / "bare").exists()


def test_an_adapter_that_has_changed_the_base_for_the_others_is_refused(tmp_path):
    """PiSSA takes its own start out of the base's weights, over which the other one and "none" would answer."""
    model = adapted(LORA, task_type="CAUSAL_LM")
    model.add_adapter("b", LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match="Adapter 'b' was initialised by 'pissa', which changes the base.*weight_conve"
    ):
        fitted(model.eval()).attach()
    other = two_adapters()
    router = fitted(other)
    router.attach()
    router.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["adapters"]["b"]["init_lora_weights"] = "olora"  # as an older release would have written it
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Adapter 'b' was initialised by 'olora'"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path)


# The recipe


@torch.no_grad()
def test_the_recipe_decodes_greedily_whatever_the_checkpoint_asks_for(llama_folder, monkeypatch):
    recipe, tokenizer = load_recipe("route"), AutoTokenizer.from_pretrained(llama_folder)
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    model, written = adapted(LORA, base, task_type="CAUSAL_LM"), []
    asked = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 1, "num_beams": 3, "min_new_tokens": 6,
             "suppress_tokens": list(range(4, 30)), "do_sample": True}  # fmt: skip
    base.generation_config.update(**asked)
    own = model.generate

    def generate(**arguments):
        written.append(own(**arguments))
        return written[-1]

    monkeypatch.setattr(model, "generate", generate)
    records = [{"prompt": text, "answer": "yes no yes no", "task": "pets"} for text in ("a big dog", "the cat sat")]
    recipe.generate(model, tokenizer, records, 2)
    ids = tokenizer([record["prompt"] for record in records], return_tensors="pt").input_ids
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert 2 not in ids and torch.equal(written[0], ids)
    assert base.generation_config.repetition_penalty == 1.3


# Errors


def test_mistakes_are_refused_by_name():
    model = two_adapters()
    router, five = fitted(model), torch.zeros(3, 5)
    for wrong, match in (
        (lambda: router.add_task("b", ["5 6"]), "has a task 'b' already"),
        (lambda: router.add_task("c", []), "no prompts"),
        (lambda: router.add_task("c", ["5 6", " "]), "Prompt 1 is empty"),
        (lambda: router.add_task("c", five), "of task 'c' have 5 dimensions, those of the router's tasks 64"),
        (lambda: router.route(five), "of these prompts have 5 dimensions, those of the router's tasks 64"),
        (lambda: router.add_task("c", "5 6"), "a list of prompts"),
        (lambda: router.add_task("__metadata__", ["5 6"]), "a non-empty string, and not '__metadata__'"),
        (lambda: router.add_task("c", torch.full((3, 64), float("nan"))), "finite features"),
        (lambda: router.remove_task("c"), "no task 'c'"),
        (lambda: router.attach(adapters={"c": "b"}), "does not have: ['c']"),
        (lambda: router.attach(adapters={"b": "B"}), "no adapter 'B' on this model"),
        (lambda: router.attach(mode="top3"), "'top1' or 'top2'"),
        (lambda: router.attach(tiny_llama(seed=1)), "of another base model"),
        (lambda: router.save_pretrained("nowhere"), "router.attach(model) first"),
        (lambda: TaskRouter().route(torch.zeros(1, 4)), "no task yet"),
        (lambda: TaskRouter().route(["5"]), "no model to read prompts with"),
        (lambda: TaskRouter(layers=[]), "`layers`"),
        (lambda: TaskRouter(tiny_llama(), layers=3), "layers from 1 to 2"),
        (lambda: TaskRouter(ridge=0), "`ridge`"),
        (lambda: TaskRouter(false_alarms=1), "`false_alarms`"),
    ):
        with pytest.raises(ValueError) as error:
            wrong()
        assert match in str(error.value)
    assert router.tasks == ["b", "default"] and "generate" not in vars(model.get_base_model())
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        HiddenStates(tiny_t5(), [1])
    ia3 = get_peft_model(tiny_llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match="take no adapter for each row"):
        fitted(ia3, "a", "b").attach(adapters={"a": "default", "b": "default"})
    assert "generate" not in vars(ia3.get_base_model())
    saved = adapted(METHODS["mora"], tasks=2, modules_to_save=["lm_head"], target_modules=["q_proj"])
    with pytest.raises(ValueError, match="Rows cannot be named 'default/initial', 'default/task1' on a model"):
        fitted(saved, "initial", "task1").attach()
    with pytest.raises(ValueError, match="Rows cannot be named 'default/task1'"):
        saved(TEST, adapter_names=["default/task1"] * 8)


@pytest.mark.parametrize("config", [LORA, METHODS["lori"]], ids=["lora", "lori"])
def test_names_that_are_given_by_hand_win_over_an_attached_router_s_two(config):
    model = two_adapters(config)
    router, names = fitted(model), ["b"] * len(TEST)
    want = model(TEST, adapter_names=names).logits
    router.attach(mode="top2")
    routed = model(TEST).logits
    torch.testing.assert_close(model(TEST, adapter_names=names).logits, want)
    assert torch.equal(model(TEST).logits, routed) and not torch.allclose(routed, want)


def test_an_attachment_that_is_refused_leaves_the_one_before_it():
    model = two_adapters()
    router = fitted(model)
    router.attach()
    want = model(TEST).logits
    with pytest.raises(ValueError, match="has no adapter 'nope'"):
        router.attach(mode="top2", adapters={"b": "nope"})
    assert torch.equal(model(TEST).logits, want)
    router.detach()
    assert "generate" not in vars(model.get_base_model()) and not torch.allclose(model(TEST).logits, want)


def test_a_prompt_with_more_tokens_than_the_model_has_positions_is_refused():
    with pytest.raises(ValueError, match="A prompt has .* tokens, and the model has 64 positions"):
        TaskRouter(tiny_gpt2(), Numbers()).add_task("a", [*texts(tokens(*A)), " ".join(["5"] * 80)])


def test_what_changes_under_an_attached_router_is_refused_where_it_shows():
    model = two_adapters()
    router = fitted(model)
    router.attach()
    with pytest.raises(ValueError, match=r"Another router drives this model.*its detach\(\) first"):
        fitted(model).attach()
    assert "generate" in vars(model.get_base_model())
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(TEST)
    model.eval()
    cache = DynamicCache()
    router.detach()
    model(TEST, past_key_values=cache)
    router.attach()
    with pytest.raises(ValueError, match="no router has seen"):
        model(TEST[:, :1], past_key_values=cache)
    model.delete_adapter("b")
    with pytest.raises(ValueError, match="Tasks \\['b'\\] of the router have no adapter"):
        model(TEST)
    router.remove_task("b")
    assert model(TEST[:3]).logits.isfinite().all()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base"):
        model(TEST)


@pytest.mark.parametrize(
    ("fields", "match", "attached"),
    [
        ({"bias": "lora_only"}, "has trained the base's own biases", False),
        ({"use_dora": True}, "has use_dora=True, for which PEFT computes no batch of rows", False),
        ({"alora_invocation_tokens": [5]}, "has alora_invocation_tokens=.*does not hold", True),
    ],
)
def test_adapters_whose_rows_would_be_others_are_refused(fields, match, attached, tmp_path):
    model = two_adapters()
    model.add_adapter("c", LORA(**{"target_modules": ["q_proj"], **fields}))
    router = fitted(model, "default", "c")
    if attached:
        router.attach()
    with pytest.raises(ValueError, match=f"Adapter 'c' {match}"):
        router.save_pretrained(tmp_path / "routed") if attached else router.attach()
    assert not (tmp_path / "routed").exists() and ("generate" in vars(model.get_base_model())) is attached
    with pytest.raises(ValueError, match="Adapter 'x' has target_parameters="):  # as a folder's config says it
        check_routable({"x": {"target_parameters": ["experts.down_proj"]}})


def test_an_adapter_that_no_task_has_may_be_of_a_kind_that_takes_no_rows():
    model = two_adapters()
    model.add_adapter("idle", LORA(target_modules=["q_proj"], use_dora=True))
    router = fitted(model)
    router.attach()
    assert model(TEST).logits.isfinite().all() and {"default", "b"} <= set(router.last)


def test_general_text_is_none_though_nothing_else_is():
    router = TaskRouter(false_alarms=0)
    for name, seed in (("a", 1), ("b", 2), ("none", 3)):
        router.add_task(name, features(20, 40, seed))
    general, strange = features(30, 40, 3)[20:], features(10, 40, 9)
    assert set(router.route(general).names) == {"none"} and not router.familiarity(general).any()
    assert "none" not in router.route(router.rows["a"]).names
    router.remove_task("none")
    assert "none" not in router.route(torch.cat([general, strange, -40 * strange])).names


def test_a_removed_task_is_gone_from_the_fit_that_was_there():
    router, fresh = TaskRouter(), TaskRouter()
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        router.add_task(name, features(20, 40, seed))
        if name != "c":
            fresh.add_task(name, features(20, 40, seed))
    asked = features(9, 40, 3)
    assert "c" in router.route(asked).names
    router.remove_task("c")
    names, probabilities = router.route(asked)
    assert names == fresh.route(asked).names and torch.equal(probabilities, fresh.route(asked).probabilities)


@pytest.mark.parametrize("mode", ["top1", "top2"])
def test_beside_general_text_rows_go_to_tasks_alone(mode):
    model = two_adapters()
    router = fitted(model)
    router.add_task("none", texts(tokens(*UNKNOWN)))
    router.attach(mode=mode)
    names = router.route(texts(TEST)).names
    assert names[6:] == ["none", "none"] and set(names[:6]) == {"default", "b"}
    with model.disable_adapter():
        base = model(TEST).logits
    routed = model(TEST).logits
    torch.testing.assert_close(routed[6:], base[6:])
    assert not torch.allclose(routed[:6], base[:6])
    router.attach(mode=mode, none=False)  # to the likeliest task, which "none" is not
    model(TEST)
    assert set(router.last) <= {"default", "b"}
    assert not torch.allclose(model(TEST).logits[6:], base[6:])


def test_two_adapters_of_one_task_are_one_where_there_is_no_other():
    model = two_adapters()
    router = TaskRouter(model, Numbers(), layers=1)
    router.add_task("b", texts(tokens(*A)))
    router.attach(mode="top2", none=False)
    torch.testing.assert_close(model(TEST).logits, model(TEST, adapter_names=["b"] * len(TEST)).logits)


def test_a_base_that_gives_no_numbers_and_text_with_stand_ins_are_refused():
    base = tiny_llama()
    router = TaskRouter(base, Numbers(), layers=1)
    base.model.layers[0].mlp.down_proj.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="of these prompts is not finite"):
        router.add_task("a", ["5 6"])
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                              image_size=4, patch_size=2)  # fmt: skip
    llava = LlavaConfig(vision_config=vision, text_config=tiny_llama().config, image_token_index=3)
    with pytest.raises(ValueError, match="tokens that stand for images, .*give prompts without images"):
        TaskRouter(LlavaForConditionalGeneration(llava), Numbers(), layers=1).add_task("a", ["3 3 5 6"])


@pytest.mark.parametrize(
    ("text", "rows", "match"),
    [
        ('{"version": 1, "tasks": []}', None, "does not hold a router"),
        (b"\xff\xfe{", None, "does not hold a router"),
        ("[" * 100_000, None, "does not hold a router"),
        (None, {"a": torch.ones(4)}, "finite features"),
        (None, {"a": torch.full((2, 3), float("nan"))}, "finite features"),
        (None, {"a": torch.zeros(0, 3)}, "task 'a' has no rows"),
        (None, {"a": torch.ones(2, 3), "b": torch.ones(2, 4)}, "of task 'b' have 4 dimensions"),
        ('"version": 2', None, "has version 2, this release reads 1"),
        ('"a": 3', None, "are not of the same save"),
    ],
)
def test_a_damaged_router_is_refused(text, rows, match, tmp_path):
    router = TaskRouter()
    router.add_task("a", features(2, 3, 0))
    router.save(tmp_path)
    path = tmp_path / "router.json"
    if rows is not None:
        save_file(rows, tmp_path / "router.safetensors")
        told = json.loads(path.read_text())
        path.write_text(json.dumps(told | {"tasks": {name: len(x) for name, x in rows.items()}}))
    elif isinstance(text, bytes):
        path.write_bytes(text)
    elif text.startswith('"'):
        name = text.partition(":")[0]
        end = "" if name == '"a"' else ","
        lines = [f"{text}{end}" if name in line else line for line in path.read_text().splitlines()]
        path.write_text("\n".join(lines))
    else:
        path.write_text(text)
    with pytest.raises(ValueError, match=match):
        TaskRouter.load(tmp_path)


def test_weights_without_a_config_are_not_taken_for_an_earlier_save(tmp_path):
    model = two_adapters()
    router = fitted(model)
    router.attach()
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(FileExistsError, match="holds an adapter, which would be deleted"):
        router.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {"x"}


def test_a_folder_with_an_adapter_of_the_name_that_it_gets_says_so(tmp_path):
    model = two_adapters()
    router = fitted(model)
    router.attach()
    router.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has an adapter named 'b': open it under another name"):
        PeftModel.from_pretrained(tiny_llama(), tmp_path, adapter_name="b")
