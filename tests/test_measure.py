"""The programs of recipes/measure: what they count, and that they end."""

import csv
import threading

import pytest
from helpers import load_recipe


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
