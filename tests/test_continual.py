"""recipes/continual.py as a person runs them: given again, they go on and end with the same."""

import csv
import json
import shutil
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import trl
from helpers import jsonl, load_recipe, write_task

from trl_callbacks.subspace import Subspace


@pytest.fixture
def continual():
    return load_recipe("continual")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks of the tiny model's words, with other labels."""
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder / "colours", ("red", "blue"))
    write_task(folder / "winds", ("north", "south"))
    jsonl(folder / "pages.jsonl", {"text": "the cat sat on the mat"})
    return folder


@pytest.fixture
def run(continual, run_recipe, llama_folder, tasks):
    def run(output, *arguments) -> str:
        common = ["--data", tasks, "--model", llama_folder, "--protect", tasks / "pages.jsonl", "--output", output]
        common += "--tasks colours,winds --device cpu --r 4 --steps 4 --save-steps 2 --lr 0.03 --metrics label".split()
        return run_recipe(continual, *common, *arguments)

    return run


def test_arguments_of_the_callback_are_looked_at_as_each_way_makes_it(continual, monkeypatch):
    told = ["continual.py", "--callback", '{"start": "osrm"}', "--ways", "dense+protection", "sequential"]
    monkeypatch.setattr(sys, "argv", told)
    assert continual.parse().callback == {"start": "osrm"}  # with a memory or a text alone
    monkeypatch.setattr(sys, "argv", [*told, "dense+projection"])
    with pytest.raises(SystemExit):
        continual.parse()


def matrix(folder: Path) -> list[list[str]]:
    with open(folder / "matrix.csv", newline="") as file:
        return list(csv.reader(file))


def test_killed_twice_and_given_again_it_ends_with_the_same_matrix(
    run, continual, tasks, llama_folder, tmp_path, monkeypatch
):
    arguments = ("--perplexity", tasks / "pages.jsonl")
    text = run(tmp_path / "whole", *arguments)
    assert "AA" in text and "forgetting" in text
    way = "dense+protection-0"
    whole = matrix(tmp_path / "whole" / way)
    assert [row[0] for row in whole] == ["", "zero-shot", "after colours", "after winds"]
    assert whole[0][4:] == ["directions", "room left"]  # behind two tasks and the perplexity
    memory = Subspace.load(tmp_path / "whole" / way / "2-winds" / "subspace")
    ranks = [memory.right[group].shape[1] for group, modules in memory.groups.items() for _ in modules]
    assert float(whole[3][4]) == pytest.approx(sum(ranks) / len(ranks)) and 0 < float(whole[3][5]) < float(whole[2][5])
    assert (tmp_path / "whole" / way / "matrix.png").stat().st_size > 1000

    # in the middle of the second task's training, after its first checkpoint
    step, calls = trl.SFTTrainer.training_step, []

    def killed_in_training(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4 + 3 + 1:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trl.SFTTrainer, "training_step", killed_in_training)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", *arguments)
    assert (tmp_path / "killed" / way / "2-winds" / "checkpoint-2" / "complete").exists()
    # a checkpoint that was cut off while it was written does not count
    (tmp_path / "killed" / way / "2-winds" / "checkpoint-3").mkdir()

    # and in the middle of the last scores
    write, written = continual.runs.write_json, []

    def killed_in_scoring(path, value):
        write(path, value)
        if path.name == "scores.json" and "2-winds" in str(path):
            written.append(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(continual.runs, "write_json", killed_in_scoring)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", *arguments)
    assert len(json.loads(written[0].read_text())) == 1

    with monkeypatch.context() as patch:  # nothing is trained again
        patch.setattr(trl.SFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
        run(tmp_path / "killed", *arguments)
    assert matrix(tmp_path / "killed" / way) == whole
    memory = Subspace.load(tmp_path / "killed" / way / "2-winds" / "subspace")
    assert [task["name"] for task in memory.tasks] == ["general text", "colours", "winds"]


def test_other_arguments_and_other_records_in_the_same_folder_are_refused(run, tasks, tmp_path):
    data, tmp_path = shutil.copytree(tasks, tmp_path / "data"), tmp_path / "run"
    arguments = ("--ways", "growing", "--scorer", "answers", "--data", data)
    run(tmp_path, *arguments)
    file = data / "winds" / "test.jsonl"
    with file.open("a") as more:
        more.write(file.read_text().splitlines()[0] + "\n")
    with pytest.raises(SystemExit, match=r"\(there, here\): \{'records'"):
        run(tmp_path, *arguments)
    shutil.copyfile(tasks / "winds" / "test.jsonl", file)
    with pytest.raises(SystemExit, match=r"'steps': \(4, 5\)"):
        run(tmp_path, *arguments, "--steps", 5)
    with pytest.raises(SystemExit, match=r"'adapter': \(\{\}, \{'alpha': 8\}\)"):
        run(tmp_path, *arguments, "--adapter", '{"alpha": 8}')


def test_files_that_say_something_else_now_are_refused(run, tasks, tmp_path):
    pages = jsonl(tmp_path / "pages.jsonl", {"text": "the cat sat on the mat"})
    arguments = ("--ways", "sequential", "--scorer", "answers", "--protect", pages, "--perplexity", pages)
    run(tmp_path / "run", *arguments, "--tasks", "colours", "--words", 0)
    jsonl(pages, {"text": "a dog ran under the log"})
    with pytest.raises(SystemExit, match=r"\(there, here\): \{'perplexity content': .* 'protect content': "):
        run(tmp_path / "run", *arguments, "--tasks", "colours", "--words", 0)


def test_general_takes_tags_groups_and_patterns_as_lm_eval_does(run, continual, tasks, tmp_path, monkeypatch):
    """A tag and a group of two tasks, one of them scored by another metric than acc; and what has no score."""
    found = [{**continual.find_task(name, tasks), "name": f"known-{name}"} for name in ("colours", "winds")]
    names = [f"{name}_greedy" for name in continual.write_lm_eval_tasks(found, tmp_path / "known")]
    for name, more in (
        (names[0], {}),
        (names[1], {}),
        ("peft_mora_known_winds", {"metric_list": [{"metric": "mcc"}]}),
    ):
        file = tmp_path / "known" / f"{name}.yaml"
        file.write_text(json.dumps({**json.loads(file.read_text()), "tag": "both", **more}))
    mean = {"aggregate_metric_list": [{"metric": "exact_match", "filter_list": "label"}]}
    for name, more in (("together", mean), ("apart", {})):
        (tmp_path / "known" / f"{name}.yaml").write_text(json.dumps({"group": name, "task": names, **more}))
    manager = lm_eval.tasks.TaskManager

    def known(include_path=tmp_path / "known", include_defaults=False):  # not thousands of files
        return manager(include_path=str(include_path), include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", known)
    arguments = ("--tasks", "colours", "--ways", "sequential", "--scorer", "answers", "--general")
    run(tmp_path / "run", *arguments, f"both,peft_mora_known_*s_greedy,together,{names[0]}")
    whole = matrix(tmp_path / "run" / "sequential-0")
    assert whole[0] == ["", "colours label", names[0], "peft_mora_known_winds", names[1], "together"]
    colours, mcc, winds, together = map(float, whole[-1][2:])
    assert together == pytest.approx((colours + winds) / 2) and -1 <= mcc <= 1  # and no number of samples
    of_pattern = continual.names_in_lm_eval("*", known())
    assert {"together", "apart", "peft_mora_known_winds"} <= {*of_pattern} and not {*names} & {*of_pattern}
    for wrong, said in (("tagether", "knows no task tagether"), ("apart", "apart is a group with no score")):
        with pytest.raises(SystemExit, match=said):
            run(tmp_path / "other", *arguments, wrong)
        assert not (tmp_path / "other").exists()


def test_every_way_has_a_row_in_the_table_and_nothing_runs_twice(run, tmp_path, monkeypatch):
    arguments = ["--ways", "separate", "sequential", "growing", "task+projection", "--scorer", "answers"]
    arguments += ["--metrics", "greedy", "label", "--callback", '{"energy": 0.9}']

    def table(text: str) -> list[str]:
        return [line for line in text.split("after the last task")[1].splitlines() if line.startswith("│")]

    rows = table(run(tmp_path, *arguments))
    assert [line.split()[1][:4] for line in rows] == ["sepa", "sequ", "grow", "task"]
    folder = tmp_path / "task+projection-0" / "2-winds"
    found = json.loads((folder / "scores.json").read_text())
    assert set(found) == {f"peft_mora_{name}{kind}" for name in ("colours", "winds") for kind in ("", "_greedy")}
    assert all(0 <= found[f"{name}_greedy"] <= found[name] <= 1 for name in ("peft_mora_colours", "peft_mora_winds"))
    assert matrix(folder.parent)[0][:5] == ["", "colours greedy", "winds greedy", "colours label", "winds label"]
    assert Subspace.load(folder / "subspace").tasks[1]["energy"] == 0.9
    monkeypatch.setattr(trl.SFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    assert table(run(tmp_path, *arguments)) == rows
