"""The numbers of continual learning, by hand."""

import doctest

import pytest
import torch

from trl_callbacks import continual_metrics, metrics


def test_three_tasks_by_hand():
    scores = [[0.9, 0.3, 0.2], [0.95, 0.8, 0.25], [0.6, 0.7, 0.5]]
    found = continual_metrics(scores, zero_shot=[0.1, 0.2, 0.3])
    assert found == pytest.approx(
        {
            "AA": (0.6 + 0.7 + 0.5) / 3,
            "BWT": ((0.6 - 0.9) + (0.7 - 0.8)) / 2,
            "forgetting": ((0.95 - 0.6) + (0.8 - 0.7)) / 2,
            "FWT": ((0.3 - 0.2) + (0.25 - 0.3)) / 2,
        }
    )


def test_the_example_in_its_docstring():
    assert doctest.testmod(metrics) == (0, 1)  # failed, of


def test_one_task_has_an_average_alone_and_no_baseline_no_forward_transfer():
    assert continual_metrics([[0.5]], [0.1]) == {"AA": 0.5}
    assert set(continual_metrics([[0.5, 0], [0.5, 0.5]])) == {"AA", "BWT", "forgetting"}


@pytest.mark.parametrize("scores, zero_shot", [([], None), ([[1, 2]], None), ([[1.0]], [1.0, 2.0])])
def test_scores_that_are_no_square_are_refused(scores, zero_shot):
    with pytest.raises(ValueError, match="N rows of N numbers"):
        continual_metrics(scores, zero_shot)


def test_a_task_that_is_best_at_the_end_is_forgotten_less_than_nothing():
    assert continual_metrics([[0.5, 0.1], [0.7, 0.5]]) == pytest.approx({"AA": 0.6, "BWT": 0.2, "forgetting": -0.2})


def test_what_is_not_read_need_not_be_scored():
    nothing = float("nan")
    want = continual_metrics([[0.75, 0.25], [0.5, 1.0]])
    assert continual_metrics([[0.75, nothing], [0.5, 1.0]]) == want == continual_metrics([[0.75, None], [0.5, 1.0]])
    assert continual_metrics([[0.75, 0.25], [0.5, 1.0]], [None, 0.125])["FWT"] == 0.125
    with pytest.raises(ValueError, match="Scores are finite numbers"):
        continual_metrics([[0.75, nothing], [0.5, 1.0]], [0.0, 0.125])


@pytest.mark.parametrize("scores", [[[float("nan")]], [["0.5"]], [[None]], [[[1.0]]], [[10**400]]])
def test_scores_that_are_no_numbers_are_refused(scores):
    with pytest.raises(ValueError, match="Scores are finite numbers, got"):
        continual_metrics(scores)
    with pytest.raises(ValueError, match="N rows of N numbers"):
        continual_metrics(None)
    with pytest.raises(ValueError, match="N rows of N numbers"):
        continual_metrics([0.5])


def test_scores_may_be_arrays():
    assert continual_metrics(torch.tensor([[0.5, 0.25], [0.25, 0.75]])) == continual_metrics(
        [[0.5, 0.25], [0.25, 0.75]]
    )
