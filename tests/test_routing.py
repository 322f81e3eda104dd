"""The gate against a slow reference that follows the paper token by token, in float64, forward and gradient."""

import math

import pytest
import torch

from peft_mora.routing import softmax_gate


def reference_gate(h: torch.Tensor, top_k: int, temperature: float, threshold: float) -> torch.Tensor:
    """(T, R) -> (T, R), one token and one expert at a time."""
    rows = []
    for token in h:
        norm = torch.sqrt(sum(value**2 for value in token)).clamp_min(1e-12)
        scores = [value / norm for value in token]
        kept = sorted(range(len(scores)), key=lambda i: -scores[i].item())[:top_k]
        total = sum(torch.exp(scores[i] / temperature) for i in kept)
        weights = [
            torch.exp(scores[i] / temperature) / total
            if i in kept and not (threshold > 0 and scores[i] < threshold)
            else scores[i] * 0
            for i in range(len(scores))
        ]
        rows.append(torch.stack(weights))
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("temperature", [0.03, 1.0])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_gate_equals_the_papers_rule_in_values_and_gradients(top_k, temperature, threshold):
    h = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast, slow = h.clone().requires_grad_(), h.clone().requires_grad_()
    upstream = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = softmax_gate(fast, top_k, temperature, threshold), reference_gate(slow, top_k, temperature, threshold)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    ((got * fast) * upstream).sum().backward()
    ((want * slow) * upstream).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-9, atol=1e-12)


def test_weights_sum_to_one_and_at_most_k_are_not_zero():
    weights = softmax_gate(torch.randn(4, 3, 9), top_k=4, temperature=0.1)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 3))
    assert ((weights != 0).sum(-1) <= 4).all()


def test_threshold_only_removes_weight():
    h = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    without, with_threshold = softmax_gate(h, 8, 0.3), softmax_gate(h, 8, 0.3, threshold=0.25)
    kept = with_threshold != 0
    assert torch.equal(with_threshold[kept], without[kept])  # not renormalised
    assert (with_threshold.sum(-1) <= 1 + 1e-6).all()
    assert not kept.all()


def test_scores_are_computed_in_float32_for_bfloat16_input():
    h = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = softmax_gate(h, 8, temperature=0.01)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), softmax_gate(h.double(), 8, temperature=0.01), rtol=1e-4, atol=1e-5)


def test_all_experts_at_infinite_temperature_weigh_the_same():
    weights = softmax_gate(torch.randn(10, 6), top_k=6, temperature=1e8)
    torch.testing.assert_close(weights, torch.full((10, 6), 1 / 6))


def test_permuting_experts_permutes_the_weights():
    h, order = torch.randn(20, 8), torch.randperm(8)
    torch.testing.assert_close(softmax_gate(h, 3, 0.1)[:, order], softmax_gate(h[:, order], 3, 0.1))


def test_a_token_that_wakes_nobody_has_finite_weights_and_gradients():
    h = torch.zeros(2, 5, requires_grad=True)
    weights = softmax_gate(h, 2, 0.03)
    (weights * h).sum().backward()
    assert torch.isfinite(weights).all() and torch.isfinite(h.grad).all()
    assert math.isclose(weights[0].sum().item(), 1, rel_tol=1e-6)
