"""recipes/gpu_report.py: the code that runs on a card, over a tiny shape on the CPU."""

from importlib.util import find_spec

import pytest
import torch
from helpers import load_recipe
from shared.training import BENCH


TRITON = find_spec("triton") is not None


def rows(section: str) -> dict[str, list[float]]:
    """First cell -> the numbers beside it."""
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return {name: [float(value.replace(",", "")) for value in values] for name, *values in lines[2:]}


def test_the_report_has_every_method_beside_lora_one_layer_and_the_gate(run_recipe, tmp_path):
    size = "--shapes tiny --device cpu --steps 1 --batch-size 2 --tokens 8".split()
    printed = run_recipe("gpu_report", *size, "--output", tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    title, steps, layer, *gates = written.split("\n## ")
    assert "CPU" in title and "1 layers, NF4 base" in steps and f"{tmp_path}/report.md written" in printed
    arms = rows(steps)
    assert [arm for arm in arms if arm != "mora, fused"] == [*BENCH, "lora, again"]
    assert ("mora, fused" in arms) == TRITON
    for step_ms, tokens_per_s, ratio, peak_mib, parameters in arms.values():
        assert tokens_per_s == pytest.approx(16e3 / step_ms, rel=0.01)
        assert ratio == pytest.approx(step_ms / arms["lora"][0], rel=0.02, abs=0.01)
        assert peak_mib > 0 and parameters > 0
    assert arms["lora"][4] == arms["lora, again"][4] == arms["mora"][4] == 2 * arms["lori"][4]
    one = rows(layer)
    assert {"base", "lora", "lora-bf16", "mora lean", "mora eager"} <= one.keys()
    assert one["base"][0] < one["lora-bf16"][0] < one["mora lean"][0]  # operations; the gate has the most
    all_experts, quarter = map(rows, gates[:2])
    assert "aten::topk" in quarter and "aten::topk" not in all_experts and "aten::_softmax" in all_experts
    assert len(gates) == 2 + TRITON
    if TRITON:  # on a CPU both are torch's operations, so neither wins
        assert gates[2].count("| torch |") == 12 and gates[2].count(" of 256 |") == 2


def test_without_a_card_one_sentence_says_so(run_recipe, monkeypatch):
    recipe = load_recipe("gpu_report")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device: gpu_report.py measures a card"):
        run_recipe(recipe)
