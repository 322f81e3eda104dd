"""A merged adapter that learns from each adapter's own answers: the loss, the answers, and what comes of it."""

import json
import math
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from helpers import WORDS, quantized, randomize
from peft import LoraConfig, get_peft_model
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_mora.inputs import left_padded
from peft_mora.lora_file import read_lora
from peft_mora.merging import distillation, merge_adapters
from peft_mora.merging.distillation import Lesson, blocks_of, distance, divergence, in_turn, lessons, mean_moved
from peft_mora.merging.inputs import adapted


TEXTS = {name: [" ".join(WORDS[i : i + 2 + i % 3]) for i in range(start, start + 6)] for name, start in
         (("task1", 0), ("task2", 8))}  # fmt: skip


@pytest.fixture
def trained(llama_folder, tmp_path) -> tuple[torch.nn.Module, list, dict]:
    """A base model, two adapters that change what it says, and prompts of each."""
    for i, name in enumerate(TEXTS):
        base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"]))
        randomize(model, seed=i)
        model.save_pretrained(tmp_path / name)
    folders = [tmp_path / name for name in TEXTS]
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    return base, folders, dict(zip(folders, TEXTS.values(), strict=True))


def ids_of(texts, tokenizer) -> list[torch.Tensor]:
    return [torch.tensor(tokenizer(text).input_ids) for text in texts]


def far(model, folders, prompts, tokenizer, report) -> float:
    """Mean KL in nats of what the merged adapter says from what each says, by full forwards of a text each."""
    found = []
    for folder in folders:
        with adapted(model, folder) as own:
            texts = [x.ids for x in lessons(own, ids_of(prompts[folder], tokenizer), tokenizer, 4)]
            with torch.no_grad():
                teacher = [own(ids[None]).logits[0].log_softmax(-1) for ids in texts]
        with adapted(model, report) as merged, torch.no_grad():
            for text, ids, want in zip(prompts[folder], texts, teacher, strict=True):
                start = len(tokenizer(text).input_ids) - 1
                got = merged(ids[None]).logits[0].log_softmax(-1)
                found.append(kl_div(got[start:-1], want[start:-1], log_target=True, reduction="batchmean").item())
    return sum(found) / len(found)


@pytest.mark.parametrize("kept", [3, 9])
def test_the_loss_is_the_divergence_between_the_kept_tokens_and_all_others_together(kept):
    generator = torch.Generator().manual_seed(0)
    teacher, pupil = (torch.randn(2, 10, dtype=torch.float64, generator=generator) for _ in "tp")
    top = teacher.topk(kept).indices

    def coarse(logits):
        each = logits.softmax(-1)
        chosen = each.gather(-1, top)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1)

    mine, theirs = pupil.clone().requires_grad_(True), pupil.clone().requires_grad_(True)
    got = divergence(mine, Lesson(torch.zeros(4), top, coarse(teacher)))
    want = (coarse(teacher) * (coarse(teacher) / coarse(theirs)).log()).sum(-1).mean()
    torch.testing.assert_close(got, want)
    for x in (got, want):
        x.backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    if kept == 9:  # the others are one token: nothing is coarse
        whole = kl_div(pupil.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="batchmean")
        torch.testing.assert_close(got.detach(), whole)


def test_what_blocks_put_out_counts_by_what_the_adapter_changes_of_it():
    generator = torch.Generator().manual_seed(0)
    own, mine, moved = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 2, 5),) * 2 + (3,)
    )
    moved = moved.square()
    moved[1] = 0.0  # the adapter is above this block
    states = mine.clone().requires_grad_(True)
    got = distance(states, Lesson(torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 2), own), moved)
    far = [sum(float((x - y) @ (x - y)) for x, y in zip(mine[block], own[block], strict=True)) / 2 for block in (0, 2)]
    assert got.item() == pytest.approx((far[0] / moved[0].item() + far[1] / moved[2].item()) / 2)
    got.backward()
    for block in (0, 2):
        torch.testing.assert_close(states.grad[block], (mine - own)[block] / moved[block] / 2, rtol=1e-5, atol=1e-6)
    assert not states.grad[1].any()
    assert distance(states, Lesson(torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 2)), moved) == 0
    nothing = Lesson(torch.zeros(4), torch.zeros(2, 1), torch.zeros(2, 2))
    courses = [[nothing._replace(moved=torch.tensor([x, y])) for x, y in pairs] for pairs in
               (((1.0, 0.0), (3.0, 0.0)), ((6.0, 0.0),))]  # fmt: skip
    assert mean_moved(courses, [1, 2]).tolist() == [4, 0]
    assert mean_moved(courses, [1, 0]).tolist() == [2, 0]


def test_what_is_kept_of_blocks_is_of_each_answer_on_its_own(trained, llama_folder):
    base, folders, prompts = trained
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    blocks = blocks_of(
        ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.1.q", "lm_head"]
    )
    assert blocks == ["model.layers.0", "model.layers.1"] == blocks_of(f"{name}.mlp.experts.7.up" for name in blocks)
    asked = ids_of(prompts[folders[0]], tokenizer)

    def outputs(ids) -> torch.Tensor:
        with torch.no_grad():
            first, second = (base.get_submodule(block) for block in blocks)
            seen = []
            for block in (first, second):
                handle = block.register_forward_hook(
                    lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out)
                )
                base(ids[None])
                handle.remove()
            return torch.stack([x[0] for x in seen])

    with adapted(base, folders[0]) as model:
        kept = lessons(model, asked, tokenizer, 3, 4, blocks)
        with_it = [outputs(x.ids) for x in kept]
    for lesson, own in zip(kept, with_it, strict=True):
        n = len(lesson.top)
        torch.testing.assert_close(lesson.states, own[:, -n - 1 : -1], rtol=1e-4, atol=1e-5)
        changed = (own - outputs(lesson.ids))[:, -n - 1 : -1].square().sum(-1).mean(-1)
        torch.testing.assert_close(lesson.moved, changed, rtol=1e-3, atol=1e-5)
    assert len({len(x.top) for x in kept} | {len(x) for x in asked}) > 1


def test_answers_are_greedy_whatever_the_base_generates_by(trained, llama_folder):
    base, folders, prompts = trained
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    asked = ids_of(prompts[folders[0]], tokenizer)
    own = base.generation_config
    with adapted(base, folders[0]) as model:
        plain = lessons(model, asked, tokenizer, 6)
        own.repetition_penalty, own.no_repeat_ngram_size, own.num_beams = 3.0, 1, 2
        assert all(torch.equal(x.ids, y.ids) for x, y in zip(lessons(model, asked, tokenizer, 6), plain, strict=True))
        free = model.generate(input_ids=asked[0][None], max_new_tokens=6)[0]
        assert not torch.equal(free, plain[0].ids)  # the base's own settings would give another answer
    assert base.generation_config is own and own.num_beams == 2


def test_answers_are_those_of_each_prompt_on_its_own_up_to_their_end(trained, llama_folder):
    base, folders, prompts = trained
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    asked = ids_of(prompts[folders[0]], tokenizer)
    with adapted(base, folders[0]) as model, torch.no_grad():
        free = lessons(model, asked, SimpleNamespace(eos_token_id=None, pad_token_id=0), 5)
        end = free[0].ids[len(asked[0]) + 1].item()  # what the first one says second
        model.generation_config.eos_token_id = [end]
        ended = lessons(model, asked, tokenizer, 5)
        for ids, got, cut in zip(asked, free, ended, strict=True):
            text = ids
            for i in range(5):
                logits = model(text[None]).logits[0, -1]
                torch.testing.assert_close(got.mass[i, :-1], logits.softmax(-1)[got.top[i]], rtol=1e-4, atol=1e-6)
                text = torch.cat([text, logits.argmax()[None]])
            assert torch.equal(got.ids, text)
            ends = {end, tokenizer.eos_token_id}
            said = text[len(ids) :].tolist()
            n = next((i + 1 for i, token in enumerate(said) if token in ends), 5)
            assert cut.ids.tolist() == text[: len(ids) + n].tolist() and len(cut.top) == n
    assert len(ended[0].top) <= 2


def test_padding_is_on_the_left_and_moves_no_position():
    batch = left_padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_adapters_take_turns_and_show_all_their_prompts_before_one_again():
    turns = list(islice(in_turn([["a", "b", "c"], ["x"]], seed=0), 12))
    assert [t for t, _ in turns] == [0, 1] * 6
    assert Counter(x for t, x in turns[:6] if t == 0) == Counter("abc") == Counter(x for t, x in turns[6:] if t == 0)


def test_of_several_strengths_that_stays_whose_merge_answers_most_as_the_adapters_do(trained, llama_folder, tmp_path):
    base, folders, prompts = trained
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    given = {"rank": 2, "model": base, "prompts": prompts, "answer_tokens": 4}
    each = {x: merge_adapters(folders, strength=x, output=tmp_path / f"{x}", **given) for x in (0.0, 0.5, 1.0)}
    distances = {x: far(base, folders, prompts, tokenizer, tmp_path / f"{x}") for x in each}
    best = min(distances, key=lambda x: distances[x])
    assert distances[best] < 0.99 * sorted(distances.values())[1]
    for strengths in ((0.0, 0.5, 1.0), (1.0, 0.5, 0.0, 0.5)):
        chosen = merge_adapters(folders, strength=strengths, **given)
        assert chosen.options == {**each[best].options, "answer_tokens": 4} and chosen.options["strength"] == best
        assert list(chosen.tried) == list(dict.fromkeys(strengths)) and each[best].tried == {}
        for strength, found in chosen.tried.items():
            assert sum(found) / 2 == pytest.approx(distances[strength], rel=1e-3)
        for name, (A, B) in each[best].loras.items():
            torch.testing.assert_close(chosen.loras[name].B @ chosen.loras[name].A, B @ A)
        for one, other in zip(chosen.adapters, each[best].adapters, strict=True):
            assert one.output_error == pytest.approx(other.output_error)
    assert f"strength {best:g}: KL from their answers" in str(chosen) and str(chosen).count("stays") == 1


@pytest.mark.parametrize(
    ("weights", "distances", "chosen"),
    [
        ([1, 1], ([0.1, 0.9], [0.3, 0.2]), 0.5),
        ([9, 1], ([0.1, 0.9], [0.3, 0.2]), 1.0),
        ([1, 0], ([0.1, math.nan], [0.3, 0.2]), 1.0),
        ([1, 1], ([0.1, math.nan], [0.3, 0.2]), 0.5),
    ],
)
def test_weights_count_where_strengths_are_compared(weights, distances, chosen, trained, tmp_path, monkeypatch):
    base, folders, prompts = trained
    told = iter(distances)
    monkeypatch.setattr(distillation, "divergences", lambda *_: next(told))
    given = {"model": base, "prompts": prompts, "passes": 1, "answer_tokens": 1, "output": tmp_path / "out"}
    report = merge_adapters(folders, weights=weights, strength=(1.0, 0.5), **given)
    assert report.options["strength"] == chosen and list(report.tried.values()) == list(distances)
    text = (tmp_path / "out" / "merge_report.json").read_text(encoding="utf-8")
    written = json.loads(text, parse_constant=pytest.fail)["tried"]
    finite = [[None if math.isnan(x) else x for x in far] for far in distances]
    assert written == dict(zip(("1.0", "0.5"), finite, strict=True))


def test_strengths_are_compared_by_answers_where_a_model_writes_some(trained, llama_folder, tmp_path):
    base, folders, prompts = trained
    classifier = AutoModelForSequenceClassification.from_pretrained(llama_folder)
    report = merge_adapters(folders, model=classifier, prompts=prompts, strength=(1.0, 0.5))
    assert (report.options["strength"], report.tried) == (1.0, {}) and "answer_tokens" not in report.options
    base.lm_head.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="answer is not finite"):
        merge_adapters(folders, model=base, prompts=prompts, output=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not any("lora" in name for name, _ in base.named_modules())
    assert merge_adapters(folders, model=base, prompts=prompts, strength=0.5).tried == {}


@pytest.mark.parametrize("empty", ["", "  "])
def test_a_prompt_without_tokens_is_none(empty, trained):
    base, folders, prompts = trained
    given = {"rank": 2, "model": base, "answer_tokens": 2}
    more = {path: (text for text in [empty, *texts, empty]) for path, texts in prompts.items()}
    with_empty = merge_adapters(folders, prompts=more, **given)
    without = merge_adapters(folders, prompts=prompts, **given)
    assert with_empty.tried == without.tried
    assert all(torch.equal(with_empty.loras[name].B, B) for name, (_, B) in without.loras.items())


@pytest.mark.parametrize("rule", ["inputs", "mean"])
def test_the_merged_adapter_comes_nearer_to_what_each_says(rule, trained, llama_folder, tmp_path):
    base, folders, prompts = trained
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    base.lm_head.weight.requires_grad_(False)
    learns = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    given = {"rule": rule, "rank": 2, "model": base, "prompts": prompts, "learning_rate": 1e-2, "answer_tokens": 4}
    given |= {"strength": 1.0} if rule == "inputs" else {}  # farther from what each says
    state = torch.random.get_rng_state()
    taught = merge_adapters(folders, distill=30, output=tmp_path / "taught", **given)
    assert torch.equal(torch.random.get_rng_state(), state)
    again = merge_adapters(folders, distill=30, **given)
    for name, (A, B) in taught.loras.items():
        torch.testing.assert_close(again.loras[name].B @ again.loras[name].A, B @ A, rtol=1e-4, atol=1e-5)
    given = given if rule == "inputs" else {"rule": rule, "rank": 2}
    merge_adapters(folders, output=tmp_path / "merged", **given)
    assert {"distill": 30, "learning_rate": 1e-2, "answer_tokens": 4}.items() <= taught.options.items()
    assert learns == {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    distances = [far(base, folders, prompts, tokenizer, tmp_path / name) for name in ("merged", "taught")]
    assert 0 < distances[1] < 0.5 * distances[0], distances


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_blocks_put_out_is_taught_too(dtype, trained, llama_folder, monkeypatch):
    _, folders, prompts = trained
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=dtype)
    far, found = [], distillation.distance

    def seen(*arguments) -> torch.Tensor:
        far.append(found(*arguments))
        return far[-1]

    monkeypatch.setattr(distillation, "distance", seen)
    given = {"rank": 2, "model": base, "prompts": prompts, "learning_rate": 1e-2, "answer_tokens": 4, "strength": 1.0}
    both = merge_adapters(folders, distill=30, **given)
    assert len(far) == 240 and all(x.isfinite() and x > 0 for x in far)
    assert sum(far[-40:]) < 0.7 * sum(far[:40])
    monkeypatch.setattr(distillation, "distance", lambda *arguments: torch.zeros(()))
    alone = merge_adapters(folders, distill=30, **given)
    for name, (A, B) in both.loras.items():
        assert not torch.allclose(alone.loras[name].B @ alone.loras[name].A, B @ A)


def test_an_adapter_of_weight_0_teaches_nothing(trained, llama_folder):
    base, folders, prompts = trained
    tokenizer, courses = AutoTokenizer.from_pretrained(llama_folder), []
    for folder in folders:
        with adapted(base, folder) as own:
            courses.append(lessons(own, ids_of(prompts[folder], tokenizer), tokenizer, 4))
    others = [x._replace(ids=x.ids.flip(0), mass=x.mass.roll(1, 1)) for x in courses[1]]
    names = list(read_lora(folders[0]).loras)

    def taught(second, weight) -> dict:
        with adapted(base, folders[0], trainable=True) as model:
            given = {"steps": 3, "learning_rate": 1e-2}
            return distillation.distill(model, names, [courses[0], second], [2.0, weight], **given)

    one, other = taught(courses[1], 0.0), taught(others, 0.0)
    assert all(torch.equal(one[name].B, other[name].B) and torch.equal(one[name].A, other[name].A) for name in names)
    one, other = taught(courses[1], 2.0), taught(others, 2.0)
    assert not any(torch.equal(one[name].B, other[name].B) for name in names)


def test_weights_count_lessons_where_they_count_errors(trained, monkeypatch):
    base, folders, prompts = trained
    found = []

    def taught(model, names, courses, weights, **options):
        found.append(weights)
        raise KeyError

    monkeypatch.setattr(distillation, "distill", taught)
    for rule, weights in (("inputs", [2, 1]), ("mean", [2, 1])):
        with pytest.raises(KeyError):
            merge_adapters(folders, rule, 2, weights, model=base, prompts=prompts, distill=1)
    assert found == [[2.0, 1.0], [1.0, 1.0]]


def test_steps_are_clipped_and_their_rate_rises_and_falls(trained, monkeypatch):
    base, folders, prompts = trained
    rates, norms, step = [], [], torch.optim.AdamW.step

    def seen(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        norms.append(float(torch.stack([x.grad.norm() for x in self.param_groups[0]["params"]]).norm()))
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    monkeypatch.setattr(distillation, "distance", lambda states, lesson, moved: 1e3 * states.square().sum())
    merge_adapters(folders, "mean", 2, model=base, prompts=prompts, distill=10, learning_rate=1e-3)
    assert rates == pytest.approx([1e-3 * min(1, (s + 1) / 5) * (1 - s / 10) for s in range(10)])
    assert norms == pytest.approx([1.0] * 10, rel=1e-3)


def test_a_caller_without_gradients_changes_nothing(trained):
    base, folders, prompts = trained
    given = {"rule": "mean", "rank": 2, "model": base, "prompts": prompts, "distill": 2}
    want = merge_adapters(folders, **given).loras
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            got = merge_adapters(folders, **given).loras
        assert all(torch.equal(got[name].B @ got[name].A, B @ A) for name, (A, B) in want.items())


def test_how_many_prompts_are_in_memory_at_a_time_changes_nothing(trained):
    base, folders, prompts = trained
    given = {"rank": 2, "model": base, "prompts": prompts, "learning_rate": 1e-3, "answer_tokens": 4, "distill": 5}
    one, two = (merge_adapters(folders, batch_size=n, **given).loras for n in (3, 16))
    for name, (A, B) in one.items():
        torch.testing.assert_close(two[name].B @ two[name].A, B @ A, rtol=1e-3, atol=1e-4)


def test_over_a_base_in_half_precision_small_gradients_are_no_zeros(trained, llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "blocks_of", lambda names: [])  # whose outputs' gradients are not small
    _, folders, prompts = trained
    base = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float16)
    base.lm_head.weight.data *= 1e-2  # gradients that float16 rounds to 0
    given = {"rank": 2, "model": base, "prompts": prompts, "learning_rate": 1e-2, "answer_tokens": 4, "strength": 1.0}
    for name, steps in (("merged", 0), ("taught", 30)):
        merge_adapters(folders, output=tmp_path / name, distill=steps, **given)
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    merged, taught = (far(base.float(), folders, prompts, tokenizer, tmp_path / name) for name in ("merged", "taught"))
    assert taught < 0.5 * merged, (merged, taught)


def test_over_a_4_bit_base(trained, llama_folder):
    _, folders, prompts = trained
    base = quantized(llama_folder)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    report = merge_adapters(folders, rank=2, model=base, prompts=prompts, distill=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert report.rank == 2 and all(B.isfinite().all() for _, B in report.loras.values())


def test_what_cannot_be_taught_is_refused(trained, llama_folder, tmp_path):
    base, folders, prompts = trained
    for arguments, message in (
        ({"distill": 2, "rule": "mean"}, "learns from prompts: give `model` and `prompts`"),
        ({"distill": -1}, "`distill` must be"),
        ({"distill": 2, "learning_rate": 0}, "`learning_rate` must be"),
        ({"distill": 2, "answer_tokens": 0}, "`answer_tokens` must be"),
        ({"distill": 2, "batch_size": 0}, "`batch_size` must be"),
        ({"distill": 9, "learning_rate": 1e30, "model": base, "prompts": prompts}, "diverged at step .* lower"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters(folders, output=tmp_path / "out", **arguments)
    classifier = AutoModelForSequenceClassification.from_pretrained(llama_folder)
    with pytest.raises(ValueError, match="for causal language models.*LlamaForSequenceClassification is none"):
        merge_adapters(folders, model=classifier, prompts=prompts, distill=2)
    assert not (tmp_path / "out").exists() and math.isfinite(sum(p.sum().item() for p in base.parameters()))
    assert not any("lora" in name for name, _ in base.named_modules()) and base.lm_head.weight.requires_grad
