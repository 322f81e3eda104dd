"""The gate against a slow reference that follows the paper token by token, in float64, forward and gradient."""

import math

import pytest
import torch

from peft_mora.routing import selection_loss, selection_loss_backward, sigmoid_gate, softmax_gate


def reference_gate(h: torch.Tensor, top_k: int, temperature: float, threshold: float) -> torch.Tensor:
    """(*, R) -> (*, R), one token and one expert at a time. Weights sum to one before the threshold and are not
    renormalised after it; nothing depends on an expert's place."""
    rows = []
    for token in h.flatten(0, -2):
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
    return torch.stack(rows).view_as(h)


@pytest.mark.parametrize("top_k", [1, 3, 7])
@pytest.mark.parametrize("temperature", [0.03, 1.0, 1e8])  # at 1e8 those that are kept weigh the same
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_gate_equals_the_papers_rule_in_values_and_gradients(top_k, temperature, threshold):
    h = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fast, slow = h.clone().requires_grad_(), h.clone().requires_grad_()
    upstream = torch.randn(2, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got, want = softmax_gate(fast, top_k, temperature, threshold), reference_gate(slow, top_k, temperature, threshold)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    ((got * fast) * upstream).sum().backward()
    ((want * slow) * upstream).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-9, atol=1e-12)


def test_scores_are_computed_in_float32_for_bfloat16_input():
    h = torch.randn(32, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = softmax_gate(h, 8, temperature=0.01)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), softmax_gate(h.double(), 8, temperature=0.01), rtol=1e-4, atol=1e-5)


def test_a_token_that_wakes_nobody_has_finite_weights_and_gradients():
    h = torch.zeros(2, 5, requires_grad=True)
    weights = softmax_gate(h, 2, 0.03)
    (weights * h).sum().backward()
    assert torch.isfinite(weights).all() and torch.isfinite(h.grad).all()
    assert math.isclose(weights[0].sum().item(), 1, rel_tol=1e-6)


def test_a_batch_of_padding_alone_costs_nothing_and_has_finite_gradients():
    h = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    G = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1).requires_grad_()
    none = torch.zeros(4, 1, dtype=torch.bool)
    loss = selection_loss(h, G, 2, 0.5, 0.5, none)
    loss.backward()
    assert loss == 0 and not h.grad.any() and not G.grad.any()
    assert all(not grad.any() for grad in selection_loss_backward(h.detach(), G.detach(), 2, 0.5, 0.5, none))


def test_scores_far_below_zero_still_choose_and_never_give_nan():
    scores = torch.full((2, 4), -200.0, requires_grad=True)
    weights, index = sigmoid_gate(scores, torch.zeros(4), 2)
    assert weights.isfinite().all() and index.shape == (2, 2)
    weights.sum().backward()
    assert scores.grad.isfinite().all()
