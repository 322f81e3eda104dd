"""The report of score.py: errors of a change against a plain reference, the verdict in both directions, the page."""

import json
import math
import re
import statistics

import pytest
import torch
from helpers import LORA, adapted, jsonl, load_recipe, quantized
from shared import report, scores


def results(accuracies: dict[str, list[float]], perplexity: list[tuple[float, int]] | None = None) -> dict:
    """As simple_evaluate returns them with samples logged: of each task what each sample scored."""
    found: dict = {"results": {}, "higher_is_better": {}, "n-samples": {}, "samples": {}}
    for name, values in accuracies.items():
        found["results"][name] = {
            "alias": name,
            "sample_len": len(values),
            "acc,none": statistics.fmean(values),
            "acc_stderr,none": statistics.stdev(values) / math.sqrt(len(values)),
            "acc_norm,none": 0.5,
            "acc_norm_stderr,none": "N/A",
        }
        found["higher_is_better"][name] = {"acc": True, "acc_norm": True}
        found["n-samples"][name] = {"effective": len(values)}
        found["samples"][name] = [{"doc_id": i, "filter": "none", "acc": v} for i, v in enumerate(values)]
    if perplexity:
        value = math.exp(-sum(ll for ll, _ in perplexity) / sum(words for _, words in perplexity))
        found["results"]["ppl"] = {"word_perplexity,none": value, "word_perplexity_stderr,none": "N/A"}
        found["higher_is_better"]["ppl"] = {"word_perplexity": False}
        pairs = enumerate(perplexity)
        found["samples"]["ppl"] = [{"doc_id": i, "filter": "none", "word_perplexity": pair} for i, pair in pairs]
    return found


def passages(shift: float, n: int = 40) -> list[tuple[float, int]]:
    noise = torch.randn(n, generator=torch.Generator().manual_seed(0)).tolist()
    return [(-(40 + i % 7) * (4 + 0.1 * noise[i]) - shift * (40 + i % 7 + noise[i]), 40 + i % 7) for i in range(n)]


def half(wrong: int, n: int = 100) -> list[float]:
    """Half of n answers right, and so many of those wrong."""
    return [float(i % 2 and i // 2 >= wrong) for i in range(n)]


def judged(before: dict, after: dict, general=("kept", "ppl"), max_drift: float | None = 0.02) -> tuple[dict, dict]:
    found = report.rows(before, after, before["results"], general)
    return report.judge(found, max_drift), {row["task"]: row for row in found if row["judged"]}


def test_the_error_of_a_change_is_that_of_the_same_samples_asked_twice():
    old, new = passages(0.0), passages(0.05)
    _, found = judged(results({"kept": half(0)}, old), results({"kept": half(3)}, new))
    row = found["kept"]
    changes = [b - a for a, b in zip(half(0), half(3), strict=True)]
    assert row["change"] == pytest.approx(-0.03)
    assert row["change_error"] == pytest.approx(statistics.stdev(changes) / 10)
    assert row["change_error"] < 0.3 * math.hypot(row["before_error"], row["after_error"])  # answers go together

    def ratio(skip: int) -> float:
        kept = [i for i in range(len(old)) if i != skip]
        return math.exp(sum(old[i][0] - new[i][0] for i in kept) / sum(old[i][1] for i in kept))

    jackknife = [ratio(i) for i in range(len(old))]
    expected = math.sqrt((len(old) - 1) * statistics.pvariance(jackknife))
    assert found["ppl"]["change"] == pytest.approx(ratio(-1) - 1)
    assert found["ppl"]["change_error"] == pytest.approx(expected, rel=0.02)

    unlogged = results({"kept": half(0)}), results({"kept": half(3)})
    del unlogged[0]["samples"]
    _, found = judged(*unlogged)
    assert found["kept"]["change_error"] == pytest.approx(math.hypot(row["before_error"], row["after_error"]))


@pytest.mark.parametrize(
    ("wrong", "shift", "within", "said"),
    [
        (0, 0.019, True, "learnt task (acc 0.250 → 0.500); it kept general ability within the budget of 2 %: kept"),
        (0, 0.021, False, "it lost general ability beyond the budget of 2 %: ppl (word perplexity 5"),
        (3, 0.0, True, "kept general ability within"),  # .03 - an error of .017
        (5, 0.0, False, "beyond the budget of 2 %: kept (acc 0.500 → 0.450), and kept ppl within it"),  # .05 - .022
        (0, math.nan, False, "beyond the budget of 2 %: ppl (word perplexity"),
        (0, -0.5, True, "kept general ability within"),  # better than before is no loss
    ],
)
def test_the_budget_is_kept_or_not(wrong, shift, within, said):
    before = results({"task": half(25), "kept": half(0)}, passages(0.0))
    after = results({"task": half(0), "kept": half(wrong)}, passages(shift))
    found, _ = judged(before, after)
    assert found["within"] is within and said in found["verdict"]


def test_the_verdict_says_what_was_not_learnt_and_what_was_not_measured():
    before, after = (results({"a": half(0), "b": half(a), "c": half(b)}) for a, b in ((30, 0), (0, 30)))
    found, _ = judged(before, after, general=())
    assert found == {
        "verdict": "The adapter learnt b (acc 0.200 → 0.500), did not clearly change a (acc 0.500 → 0.500) and got "
        "worse at c (acc 0.500 → 0.200); what it does to general ability was not measured.",
        "within": None,
        "max_drift": 0.02,
    }
    assert "for which no budget was set: c (acc" in judged(before, after, general=("c",), max_drift=None)[0]["verdict"]


def test_a_group_without_a_score_of_its_own_is_its_members():
    before = results({"one": half(0), "two": half(0)})
    before["results"]["both"], before["group_subtasks"] = {"alias": "both"}, {"both": ["one", "two"]}
    found = report.rows(before, before, ["both"], ["both"])
    assert [(row["task"], row["general"]) for row in found if row["judged"]] == [("one", True), ("two", True)]


CONDITIONS = {"adapter": "a<b", "base": "base & more", "command": "python recipes/score.py --adapter 'a<b'"}


def test_the_page_needs_nothing_else_and_takes_no_markup_from_names():
    before = results({"<script>alert(1)</script>": half(25), "kept": half(0)}, passages(0.0))
    after = results({"<script>alert(1)</script>": half(0), "kept": half(0)}, passages(9.0))
    found = report.rows(before, after, before["results"], ["kept", "ppl"])
    text = report.page({**report.judge(found, 0.02), "rows": found, "drift": None, "conditions": CONDITIONS})
    assert "✗ Beyond the budget" in text and 'class="lost"' in text and "base &amp; more" in text
    assert "<script" not in text and not re.search(r"https?:|src=|href=|url\(|@import", text)


@pytest.mark.parametrize(("last", "status"), [(0, None), (20, 1)])
def test_score_exits_with_1_beyond_the_budget_when_all_is_written(
    last, status, run_recipe, llama_folder, tmp_path, monkeypatch
):
    adapted("mora-dense", quantized(llama_folder)).save_pretrained(tmp_path / "adapter")
    name = "peft_mora_mood"
    one, other = ({name: half(0), f"{name}_greedy": half(wrong)} for wrong in (0, last))
    given = iter([results(other), results(one)])  # the adapter is scored first
    monkeypatch.setattr(scores, "lm_eval", lambda *_, **__: next(given))
    arguments = ["--adapter", tmp_path / "adapter", "--general", "mood", "--max-drift", "0.02", "--device", "cpu"]
    if status:
        with pytest.raises(SystemExit, match=r"beyond the budget of 2 %: mood greedy \(acc 0.500 → 0.300\)"):
            run_recipe("score", *arguments, "--output", tmp_path)
    else:
        assert "kept general ability within the budget" in run_recipe("score", *arguments, "--output", tmp_path)
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["report"]["within"] is (status is None) and "samples" not in record["base"]
    assert f"<h1>{record['report']['verdict']}</h1>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "x", "--max-drift", "0.02"], "nothing here measures that: give --perplexity FILE"),
        (["--adapter", "x", "--max-drift", "nan", "--perplexity", "embedded"], "'nan' is not a finite number >= 0"),
        (["--report"], "a report is of an adapter and its base: give --adapter DIR"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(arguments, message, run_recipe, capsys):
    with pytest.raises(SystemExit) as end:
        run_recipe(load_recipe("score"), *arguments)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_passages_in_which_nothing_is_predicted_are_refused_before_anything_is_scored(
    run_recipe, llama_folder, tmp_path, monkeypatch
):
    adapted("mora-dense", quantized(llama_folder)).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(scores, "lm_eval", lambda *_, **__: pytest.fail("scored"))
    passages = jsonl(tmp_path / "short.jsonl", {"page": "the"}, {"page": "cat"})
    arguments = ["--adapter", tmp_path / "adapter", "--perplexity", passages, "--report", "--device", "cpu"]
    with pytest.raises(ValueError, match="no text of two tokens and more"):
        run_recipe("score", *arguments, "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ("embedded", "is of SEQ_CLS, and language models"),
        ("no.jsonl", "^--perplexity no.jsonl: no such file"),
    ],
)
def test_score_says_in_a_line_what_it_cannot_score(passages, message, run_recipe, tmp_path):
    LORA(task_type="SEQ_CLS", base_model_name_or_path="x").save_pretrained(tmp_path / "classifier")
    with pytest.raises(SystemExit, match=message):
        run_recipe(
            "score", "--adapter", tmp_path / "classifier", "--perplexity", passages, "--output", tmp_path / "out"
        )


def plain(score: float, error: float | None, metric: str = "acc", better: bool | None = True) -> dict:
    """One task's score with its error, without samples."""
    found = {"results": {"t": {f"{metric},none": score, f"{metric}_stderr,none": error}}, "higher_is_better": {}}
    if better is not None:
        found["higher_is_better"]["t"] = {metric: better}
    return found


@pytest.mark.parametrize(
    ("after", "said"),
    [(0.53, "did not clearly change"), (0.56, "learnt"), (0.47, "did not clearly change"), (0.44, "got worse at")],
)
def test_a_change_counts_from_two_of_its_errors_on(after, said):
    error = 0.02 / math.sqrt(2)  # of each: .02 of the change
    found, _ = judged(plain(0.5, error), plain(after, error), general=())
    assert f"The adapter {said} t (" in found["verdict"]


def test_a_score_that_is_no_accuracy_changes_by_a_share_of_what_it_was():
    _, found = judged(plain(10.0, 0.3, "f1"), plain(12.0, 0.4, "f1"), general=())
    assert found["t"]["change"] == pytest.approx(0.2) and found["t"]["change_error"] == pytest.approx(0.05)
    assert found["t"]["loss"] == pytest.approx(-0.2)
    _, found = judged(plain(10.0, 0.3, "f1", better=None), plain(12.0, 0.4, "f1", better=None), general=())
    assert found["t"]["loss"] == pytest.approx(-0.2)  # higher is better where it is not said
    assert not report.drifted({"metric": "f1", "loss": 0.05, "change_error": 0.04}, 0.02)
    assert report.drifted({"metric": "word_perplexity", "loss": 0.03, "change_error": 0.02}, 0.02)


def test_answers_to_other_samples_are_no_pairs():
    before, after = results({"kept": half(0)}), results({"kept": half(3)})
    for i, sample in enumerate(after["samples"]["kept"]):
        sample["doc_id"] = i + 50
    _, found = judged(before, after)
    row = found["kept"]
    assert row["change_error"] == pytest.approx(math.hypot(row["before_error"], row["after_error"]))
