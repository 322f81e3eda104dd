"""The programs of recipes/measure: what they count, and that they end."""

import csv
import subprocess
import sys
import threading

import pytest
import torch
from helpers import RECIPES, load_recipe
from shared import runs
from torch.utils.flop_counter import FlopCounterMode


def test_bench_layers_counts_what_is_kept_and_what_acts(run_recipe, tmp_path):
    size = "--models smollm2 --tokens 8 --repeats 2 --r 8".split()
    assert "bench_layers.csv written" in run_recipe("measure/bench_layers", *size, "--output", tmp_path)
    with open(tmp_path / "bench_layers.csv", newline="") as file:
        rows = {(int(row["O"]), row["arm"]): row for row in csv.DictReader(file)}
    kept, mflop = ({key: float(row[name]) for key, row in rows.items()} for name in ("kept", "mflop"))
    x = 8 * 576 * 2  # bytes
    for outputs in (576, 1536):
        assert kept[outputs, "base"] == 0 and kept[outputs, "mora lean"] == pytest.approx(1 + 8 * 8 * 2 / x)
        assert kept[outputs, "lori lean"] == pytest.approx(8 * 8 * 2 / x)
        # x and h, and the matrix B̃ in float32 with the Gram matrices of three experts: nothing of its own backward.
        furina = 1 + (8 * 8 * 2 + outputs * 8 * 4 + 3 * 2 * 2 * 4) / x
        assert kept[outputs, "furina lean"] == pytest.approx(furina)
        whole = 2e-6 * 8 * (576 + outputs)
        assert mflop[outputs, "lora"] == pytest.approx(whole) == 4 * mflop[outputs, "flylora lean"]


def test_a_trainer_that_fails_ends_bench_training(run_recipe, monkeypatch, tmp_path, llama_folder):
    recipe = load_recipe("measure/bench_training")
    make = recipe.make_trainer

    def broken(method, *args):
        trainer = make(method, *args)
        if method == "mora":
            trainer.compute_loss = lambda *_, **__: (_ for _ in ()).throw(ArithmeticError("no loss"))
        return trainer

    monkeypatch.setattr(recipe, "make_trainer", broken)
    size = "--methods lora mora --steps 2 --batch-size 1 --tokens 8 --r 4 --device cpu".split()
    ended = []

    def run():
        with pytest.raises(ArithmeticError, match="no loss"):
            run_recipe(recipe, *size, "--model", llama_folder, "--output", tmp_path)
        ended.append(True)

    thread = threading.Thread(target=run, daemon=True)  # it would wait for ever, as it did
    thread.start()
    thread.join(60)
    assert ended


@pytest.mark.parametrize("arm", ["base", "lora", "mora", "mtllora"])
def test_the_products_that_bench_layers_states_are_those_that_are_made(arm):
    recipe = load_recipe("measure/bench_layers")
    base = torch.nn.Linear(48, 80, bias=False, dtype=torch.bfloat16)
    layers = recipe.arms(base, 8, False)
    layer = layers[arm if arm in layers else f"{arm} eager"]
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(x)
    own = counter.get_total_flops() - (0 if arm == "base" else 2 * 5 * 48 * 80)
    assert own / 5e6 == pytest.approx(recipe.megaflops(arm, 48, 80, 8), rel=0.02)


def test_the_memory_of_a_child_is_not_its_parents():
    big = torch.ones(2**27)  # half a GiB
    program = f"import sys; sys.path.insert(0, {str(RECIPES)!r}); from shared import runs; print(runs.resident_mib())"
    child = float(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)
    assert child < runs.resident_mib() - 256 and big[0] == 1


@pytest.mark.parametrize("text", ["greedy", ""])
def test_a_matrix_that_is_none_is_refused_with_its_name(text, run_recipe, tmp_path):
    path = tmp_path / "matrix.csv"
    with pytest.raises(SystemExit, match="is no file"):
        run_recipe("measure/forgetting", path)
    path.write_text(f"after,a greedy,perplexity\nbase,0,5\na,{text},6\n")
    with pytest.raises(SystemExit, match="matrix.csv has what is no score"):
        run_recipe("measure/forgetting", path)
