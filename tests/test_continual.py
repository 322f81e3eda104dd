"""recipes/continual.py and forgetting.py as a person runs them: given again, they go on and end with the same."""

import csv
import json
import sys
from pathlib import Path

import pytest
import trl
from conftest import WORDS, load_recipe

from trl_callbacks.subspace import Subspace


@pytest.fixture
def continual():
    return load_recipe("continual")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Two tasks of the tiny model's words, with other labels."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, labels in (("colours", ("red", "blue")), ("winds", ("north", "south"))):
        (folder / name).mkdir()
        for split, n in (("train", 12), ("test", 6)):
            rows = [{"prompt": f"the {WORDS[i]} is", "answer": labels[i % 2]} for i in range(n)]
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pages.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    return folder


@pytest.fixture
def run(continual, llama_folder, tasks, monkeypatch, capsys):
    def run(output, *arguments) -> str:
        common = ["--data", tasks, "--tasks", "colours,winds", "--model", llama_folder, "--device", "cpu", "--r", 4]
        common += ["--steps", 4, "--save-steps", 2, "--lr", 0.03, "--metric", "label", "--output", output]
        monkeypatch.setattr(sys, "argv", ["continual.py", *map(str, (*common, *arguments))])
        continual.main()
        return capsys.readouterr().out

    return run


def matrix(folder: Path) -> list[list[str]]:
    with open(folder / "matrix.csv", newline="") as file:
        return list(csv.reader(file))


def test_killed_twice_and_given_again_it_ends_with_the_same_matrix(
    run, continual, tasks, llama_folder, tmp_path, monkeypatch
):
    arguments = ("--perplexity", tasks / "pages.jsonl")
    text = run(tmp_path / "whole", *arguments)
    assert "AA" in text and "forgetting" in text
    whole = matrix(tmp_path / "whole")
    assert [row[0] for row in whole] == ["", "zero-shot", "after colours", "after winds"]
    assert len(whole[0]) == 4  # two tasks and the perplexity
    assert (tmp_path / "whole" / "matrix.png").stat().st_size > 1000

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
    assert (tmp_path / "killed" / "2-winds" / "checkpoint-2" / "complete").exists()
    # a checkpoint that was cut off while it was written does not count
    (tmp_path / "killed" / "2-winds" / "checkpoint-3").mkdir()

    # and in the middle of the last scores
    write, written = continual.data.write_json, []

    def killed_in_scoring(path, value):
        write(path, value)
        if path.name == "scores.json" and "2-winds" in str(path):
            written.append(path)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(continual.data, "write_json", killed_in_scoring)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "killed", *arguments)
    assert len(json.loads(written[0].read_text())) == 1

    with monkeypatch.context() as patch:  # nothing is trained again
        patch.setattr(trl.SFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
        run(tmp_path / "killed", *arguments)
    assert matrix(tmp_path / "killed") == whole
    memory = Subspace.load(tmp_path / "killed" / "2-winds" / "subspace")
    assert [task["name"] for task in memory.tasks] == ["colours", "winds"]


@pytest.mark.parametrize("method", ["growing", "sequential", "separate"])
def test_baselines_run(method, run, tmp_path):
    text = run(tmp_path / method, "--method", method)
    assert "AA" in text
    assert len(matrix(tmp_path / method)) == 4


def test_other_arguments_in_the_same_folder_are_refused(run, tmp_path):
    run(tmp_path, "--method", "growing")
    with pytest.raises(SystemExit, match=r"'steps': \(4, 5\)"):
        run(tmp_path, "--method", "growing", "--steps", 5)


def test_the_table_of_ways_has_a_row_each_and_nothing_runs_twice(tasks, llama_folder, tmp_path, monkeypatch, capsys):
    recipe = load_recipe("forgetting")
    arguments = [
        "--data",
        tasks,
        "--tasks",
        "colours",
        "winds",
        "--model",
        llama_folder,
        "--device",
        "cpu",
        "--steps",
        3,
    ]
    arguments += ["--methods", "separate", "sequential", "task+projection", "--r", 4, "--output", tmp_path]
    arguments += ["--callback", '{"energy": 0.9}']
    monkeypatch.setattr(sys, "argv", ["forgetting.py", *map(str, arguments)])
    recipe.main()
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [line.split()[1][:4] for line in table] == ["sepa", "sequ", "task"]
    scores = json.loads((tmp_path / "task+projection-0" / "1-winds" / "scores.json").read_text())
    assert set(scores) == {"colours", "winds"} and all(0 <= s["greedy"] <= s["label"] <= 1 for s in scores.values())
    assert Subspace.load(tmp_path / "task+projection-0" / "1-winds" / "subspace").tasks[1]["energy"] == 0.9
    monkeypatch.setattr(trl.SFTTrainer, "train", lambda *a, **k: pytest.fail("trained again"))
    recipe.main()
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")] == table
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--adapter", '{"alpha": 8}'])
    with pytest.raises(SystemExit, match=r"'adapter': \(\{\}, \{'alpha': 8\}\)"):
        recipe.main()
