"""What an adapter that has learnt whole texts writes itself, in the place of prompts."""

from unittest.mock import Mock

import pytest
import torch
from helpers import WORDS, randomize, tiny_gpt2, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from peft_mora.inputs import batches_of, seeded
from peft_mora.merging import collect_inputs, merge_adapters
from peft_mora.merging.inputs import Statistics, adapted, input_spreads
from peft_mora.merging.written import learnt as learnt_of
from peft_mora.merging.written import own_texts, surprises, written
from peft_mora.sampling import continued


def begins_texts(tokenizer):
    """The tokenizer, which then begins a text with a token of its own."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def decided(folder) -> torch.nn.Module:
    """A base model that is surer than one without training."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.lm_head.weight.data *= 20
    return base


def learn(base, ids: torch.Tensor, folder, seed: int = 0, labels=None) -> None:
    """An adapter that has learnt the texts (B, S), from their start to their end, or what labels say."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "up_proj", "down_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(80):
        model(input_ids=ids, labels=ids if labels is None else labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture
def writers(llama_folder, tmp_path) -> tuple[torch.nn.Module, list, dict]:
    """A base model, two adapters that have learnt whole texts, and these; their tokenizer begins a text by a token."""
    tokenizer = begins_texts(AutoTokenizer.from_pretrained(llama_folder))
    texts = {tmp_path / name: [" ".join(words[i : i + 8]) for i in (0, 8)] for name, words in
             (("a", WORDS), ("b", WORDS[::-1]))}  # fmt: skip
    for i, folder in enumerate(texts):
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts[folder]])
        learn(decided(llama_folder), ids, folder, i)
        tokenizer.save_pretrained(folder)
    return decided(llama_folder), [*texts], texts


def test_an_adapter_that_has_learnt_whole_texts_writes_such(writers):
    base, folders, texts = writers
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    learnt = [[*tokenizer(text).input_ids, end] for text in texts[folders[0]]]
    state = torch.random.get_rng_state()
    with adapted(base, folders[0]) as model:
        found, again, other = (written(model, tokenizer, 70, 19, seed) for seed in (0, 0, 1))
        cut = written(model, tokenizer, 8, 3)
        base.generation_config.eos_token_id = [end, learnt[0][2]]  # which ends a text by itself
        several = written(model, tokenizer, 70, 19)
        base.generation_config.eos_token_id = None
        tokenizer.eos_token = None
        endless = written(model, tokenizer, 8, 6)
    assert torch.equal(torch.random.get_rng_state(), state) and len(found) > 60
    assert sum(row.tolist() in learnt for row in found) > 0.8 * len(found)
    assert {tuple(row.tolist()) for row in found} >= set(map(tuple, learnt))
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))
    assert [x.tolist() for x in found] != [x.tolist() for x in other]
    assert learnt[0][0] == start and {tuple(row.tolist()) for row in cut} == {tuple(x[:3]) for x in learnt}
    assert [*learnt[0][:3]] in (ended := [row.tolist() for row in several]) and learnt[1] in ended
    assert all(end not in row for row in ended if learnt[0][2] in row)
    assert len(endless) == 8 and all(len(row) == 6 for row in endless)


def test_what_an_adapter_has_not_learnt_of_a_text_its_base_writes(llama_folder, tmp_path):
    """The first token, where the tokenizer begins a text with none of its own."""
    tokenizer, base = AutoTokenizer.from_pretrained(llama_folder), decided(llama_folder)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.no_grad():
        sure = base(torch.tensor([[start]])).logits[0, -1]
    sure[end] = -torch.inf
    firsts = sure.topk(2).indices.tolist()
    rest = [[*tokenizer(" ".join(WORDS[i : i + 3])).input_ids, end] for i in (0, 8)]
    texts = [[first, *ids] for first, ids in zip(firsts, rest, strict=True)]
    learn(decided(llama_folder), torch.tensor(texts), tmp_path / "a")
    with adapted(base, tmp_path / "a") as model:
        rows = [row.tolist() for row in written(model, tokenizer, 200, 9)]
    assert len(rows) == 200 and start not in [row[0] for row in rows]
    for text in texts:
        begun = [row for row in rows if row[0] == text[0]]
        share = float(sure.softmax(0)[text[0]])
        assert abs(len(begun) / 200 - share) < 4 * (share * (1 - share) / 200) ** 0.5
        assert sum(row == text for row in begun) > 0.8 * len(begun) > 0


@pytest.mark.parametrize(
    ("own", "base", "length"),
    [
        ([1, 1, 1], [3, 3, 3], 4), ([1, 1, 2.5], [3, 3, 3], 3), ([1, 2.5, 1], [3, 3, 3], 4), ([3, 1, 3], [3, 3, 3], 0),
        ([3, 1, 1.5, 3], [3, 4.5, 3, 3], 4), ([2.1], [3], 0), ([1.9], [3], 2),
    ],
)  # fmt: skip
def test_a_start_is_learnt_as_far_as_the_adapter_is_ahead_by_a_third(own, base, length):
    assert learnt_of(torch.tensor(own), torch.tensor(base)) == length


def test_texts_begin_as_the_tokenizer_begins_them_and_fit_the_model_s_positions(llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    model = get_peft_model(tiny_gpt2(), LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    rows = written(model, tokenizer, 20, 100)
    assert max(map(len, rows)) == 64 and any(row[0] != tokenizer.bos_token_id for row in rows)
    begins_texts(tokenizer)
    rows = written(model, tokenizer, 20, 100)
    assert max(map(len, rows)) == 64 and all(row[0] == tokenizer.bos_token_id for row in rows)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the tokenizer has no token that begins or ends one"):
        written(model, tokenizer, 20, 100)


def test_what_a_text_surprises_adapter_and_base_is_that_of_a_forward_of_its_own(writers):
    base, folders, _ = writers
    rows = [torch.tensor([4, 5, 6, 2]), torch.tensor([7, 9]), torch.tensor([4, 5, 6, 7, 8, 2])]

    def likelihoods() -> list[float]:
        with torch.no_grad():
            return [-base(ids[None], labels=ids[None]).loss.item() for ids in rows]

    with adapted(base, folders[0]) as model:
        found, own = surprises(model, rows, 2), likelihoods()
    for (mine, without), x, y in zip(found, own, likelihoods(), strict=True):
        assert (-mine.mean().item(), -without.mean().item()) == pytest.approx((x, y), abs=1e-4)
    assert [len(mine) for mine, _ in found] == [3, 1, 5]


def test_texts_that_begin_as_the_base_would_are_left_out_and_most_that_do_not_end(writers, monkeypatch):
    base, folders, texts = writers
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    one, other = ([*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts[folders[0]])
    foreign = [*tokenizer(texts[folders[1]][0]).input_ids, tokenizer.eos_token_id]
    endless, few = other[:-1] * 2, [*one[:5], tokenizer.eos_token_id]
    found = {}
    with adapted(base, folders[0]) as model:
        for most, rows in (("end", (one, endless, other, foreign)), ("do not", (one, endless, endless, endless, few))):
            rows = [torch.tensor(row) for row in rows]
            monkeypatch.setattr("peft_mora.merging.written.TEXTS", len(rows))
            monkeypatch.setattr("peft_mora.merging.written.written", lambda *_, rows=rows: rows)
            found[most] = [row.tolist() for row in own_texts(model, tokenizer, folders[0], 3)]
    assert found == {"end": [one, other], "do not": [one, endless, endless, endless]}


@pytest.mark.parametrize("kind", ["little", "answers"])
def test_what_has_learnt_little_or_answers_alone_is_refused(kind, writers, llama_folder, tmp_path):
    base, folders, texts = writers
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    if kind == "little":
        weak = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
        randomize(weak)
        weak.save_pretrained(tmp_path / "weak")
        base = weak.unload()
    else:
        answer = [*tokenizer(WORDS[9]).input_ids[1:], tokenizer.eos_token_id]
        ids = torch.tensor([[*tokenizer(text).input_ids[:7], *answer] for text in texts[folders[0]]])
        learn(decided(llama_folder), ids, tmp_path / "weak", labels=ids.masked_fill(torch.arange(9) < 7, -100))
        tokenizer.save_pretrained(tmp_path / "weak")
    for call in (
        lambda: merge_adapters([folders[0], tmp_path / "weak"], model=base, prompts="self", output=tmp_path / "out"),
        lambda: collect_inputs(base, "self", tmp_path / "weak"),
    ):
        with pytest.raises(
            ValueError, match=r"What .*weak writes itself is no prompt of its own: of \d+ of 128 texts"
        ):
            call()
    assert not (tmp_path / "out").exists() and Statistics.load(tmp_path / "weak") is None


def test_a_user_s_own_model_stays_as_it_is_where_its_adapter_writes(writers):
    base, (folder, _), _ = writers
    model = PeftModel.from_pretrained(base, folder)
    collect_inputs(model, "self", folder)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" in name)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged into the base's weights"):
        collect_inputs(model, "self", folder, strengths=1.0)
    assert all(layer.merged for layer in model.modules() if isinstance(layer, BaseTunerLayer))


def test_what_adapters_write_themselves_stands_for_prompts(writers, tmp_path):
    base, folders, texts = writers
    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    def loss(adapter, texts) -> float:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in texts])
        with adapted(base, adapter) as model, torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    given = {"rank": 4, "model": base, "prompts": "self"}
    report = merge_adapters(folders, output=tmp_path / "seen", **given)
    taught = merge_adapters(folders, output=tmp_path / "taught", distill=40, learning_rate=3e-3, **given)
    merge_adapters(folders, "mean", 4, output=tmp_path / "mean")
    own = sum(loss(folder, texts[folder]) for folder in folders)
    found = {
        name: sum(loss(tmp_path / name, texts[folder]) for folder in folders) for name in ("mean", "seen", "taught")
    }
    assert found["taught"] < found["seen"] < found["mean"], (own, found)
    assert found["taught"] - own < 0.2 * (found["mean"] - own)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
    assert {"prompts": "self", "last": 0.0}.items() <= report.options.items() and len(report.tried) == 2
    assert "answer_tokens" not in taught.options and taught.options["distill"] == 40
    again = merge_adapters(folders, seed=1, strength=report.options["strength"], **given)
    same = merge_adapters(folders, strength=report.options["strength"], **given)
    for name, (A, B) in report.loras.items():
        torch.testing.assert_close(same.loras[name].B @ same.loras[name].A, B @ A)
    assert any(
        not torch.allclose(again.loras[name].B @ again.loras[name].A, B @ A) for name, (A, B) in report.loras.items()
    )


def test_statistics_of_what_an_adapter_writes_are_those_of_such_texts(writers):
    base, (folder, _), _ = writers
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collect_inputs(base, "self", folder)
    found = Statistics.load(folder)
    with adapted(base, folder) as model:
        rows = own_texts(model, tokenizer, folder)
        want = input_spreads(model, list(found.groups), batches_of(rows, 8), last=0.0, strengths=(0.0, 0.5, 1.0))
    assert found.tokens == sum(map(len, rows)) and found.groups == want.groups
    for group, spread in found.spreads.items():
        assert spread.trace() == pytest.approx(want.spreads[group].trace(), rel=1e-3)


def test_where_nothing_can_be_written_prompts_are_asked_for(writers, llama_folder, tmp_path):
    base, folders, _ = writers
    classifier = AutoModelForSequenceClassification.from_pretrained(llama_folder)
    for arguments, message in (
        ({"prompts": "them"}, "`prompts` must be a mapping of each folder to its texts, or 'self'"),
        ({"model": classifier}, "LlamaForSequenceClassification writes none. Give texts"),
        (
            {"last": 0.0},
            "last would change nothing: what reads it is rule='inputs' with `model` and `prompts` of yours",
        ),
        ({"answer_tokens": 4}, "answer_tokens would change nothing: what reads it is `model` and `prompts` of yours"),
        ({"rule": "mean"}, "go together, and with rule='inputs' or `distill`"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_adapters(folders, output=tmp_path / "out", **{"model": base, "prompts": "self", **arguments})
    for arguments in ({"last": 0.0}, {"max_length": 9}):
        with pytest.raises(ValueError, match="`last` and `max_length` are of texts that are given"):
            collect_inputs(base, "self", folders[0], **arguments)
    with pytest.raises(ValueError, match="writes none"):
        collect_inputs(classifier, "self", folders[0])
    assert not (tmp_path / "out").exists() and Statistics.load(folders[0]) is None


def test_a_tokenizer_without_an_end_cuts_no_text_at_its_first_token():
    model = tiny_llama()
    model.lm_head.weight.data.zero_()  # any token, as often
    model.generation_config.eos_token_id = None
    tokenizer = Mock(eos_token_id=None)
    with seeded(0):
        rows = continued(model, tokenizer, [[5]] * 40, 20, stop=True)
    assert {len(row) for row in rows} == {20} and any((row == 0).any() for row in rows)
    model.generation_config.eos_token_id = 7  # the model's own stays, and nothing behind it
    with seeded(0):
        rows = continued(model, tokenizer, [[5]] * 40, 20, stop=True)
    ends = [row.tolist().index(7) for row in rows if 7 in row]
    assert ends and all(len(row) == row.tolist().index(7) + 1 for row in rows if 7 in row)
