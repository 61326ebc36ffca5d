"""Fitness, its error and the paired test against closed forms and scipy."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from evomerge.fitness.objectives import Objective, column_error, estimate, fitness, paired_test
from evomerge.records import SampleScores


def objective(task: str = "t", metric: str = "acc", weight: float = 1.0, maximize: bool = True) -> Objective:
    return Objective(task=task, metric=metric, filter="none", weight=weight, maximize=maximize)


def samples(**columns: np.ndarray) -> dict[str, SampleScores]:
    """`task_metric=scores` -> per-document scores."""
    found: dict[str, dict[str, tuple[float, ...]]] = {}
    for name, values in columns.items():
        task, metric = name.split("_")
        found.setdefault(task, {})[f"{metric},none"] = tuple(float(value) for value in values)
    return {
        task: SampleScores(doc_ids=tuple(range(len(next(iter(values.values()))))), values=values)
        for task, values in found.items()
    }


def test_fitness_is_the_weighted_mean_with_signs() -> None:
    metrics = {"a": {"acc,none": 0.5}, "b": {"loss,none": 2.0}}
    wanted = [objective("a", weight=3), objective("b", "loss", weight=1, maximize=False)]
    assert fitness(metrics, wanted) == (3 * 0.5 - 2.0) / 4
    assert fitness(metrics, wanted[:1]) == 0.5


def test_a_single_document_has_no_standard_error() -> None:
    one, many = np.array([1.0]), np.array([1.0, 0.0, 0.0, 0.0])
    assert column_error((1.0,)) is None
    assert column_error(tuple(many)) == 0.25
    wanted = [objective("a"), objective("b")]
    assert estimate(samples(a_acc=many, b_acc=one), wanted).standard_error is None
    assert estimate(samples(a_acc=many, b_acc=many), wanted).standard_error == pytest.approx(0.125 * 2**0.5)


def test_an_estimate_is_the_fitness_with_the_error_of_independent_tasks() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(50)
    wanted = [objective("a", weight=1), objective("b", weight=3, maximize=False)]
    found = estimate(samples(a_acc=a, b_acc=b), wanted)
    assert found.mean == pytest.approx((a.mean() - 3 * b.mean()) / 4)
    assert found.standard_error == pytest.approx(np.hypot(stats.sem(a), 3 * stats.sem(b)) / 4)
    assert found.mean == pytest.approx(
        fitness({"a": {"acc,none": a.mean()}, "b": {"acc,none": b.mean()}}, wanted)
    )


def test_metrics_of_one_task_are_not_independent() -> None:
    a = np.random.default_rng(0).random(40)
    pair = [objective("a"), objective("a", "norm")]
    same = estimate(samples(a_acc=a, a_norm=a), pair)
    assert same.standard_error == pytest.approx(stats.sem(a))
    opposite = estimate(samples(a_acc=a, a_norm=1 - a), pair)
    assert opposite.standard_error == pytest.approx(0)


def test_p_is_that_of_the_exact_permutation_test() -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        a, b = rng.random(11), rng.random(11)
        found = paired_test(samples(t_acc=a), samples(t_acc=b), [objective()])
        exact = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples")
        assert found.p_value == pytest.approx(exact.pvalue, abs=0.012)
        assert found.difference == pytest.approx((a - b).mean())


def test_p_of_right_and_wrong_answers_is_that_of_the_sign_test() -> None:
    """With scores of 0 and 1 only the documents count on which the models differ; ties are exact."""
    a = np.array([1] * 12 + [0] * 4 + [1] * 30)
    b = np.array([0] * 12 + [1] * 4 + [1] * 30)
    found = paired_test(samples(t_acc=a), samples(t_acc=b), [objective()])
    assert found.p_value == pytest.approx(stats.binomtest(12, 16).pvalue, abs=0.01)


def test_error_and_p_agree_with_the_t_test_on_many_documents() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(0.05, 1, 400)
    b = rng.normal(0, 1, 400)
    found = paired_test(samples(t_acc=a), samples(t_acc=b), [objective()])
    expected = stats.ttest_rel(a, b)
    assert found.standard_error == pytest.approx(stats.sem(a - b))
    assert found.p_value == pytest.approx(expected.pvalue, abs=0.02)
    assert (found.low + found.high) / 2 == pytest.approx(found.difference)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error)


def test_documents_of_several_metrics_are_flipped_as_one() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(10), rng.random(10)
    twice = [objective(), objective(metric="norm", weight=2)]
    found = paired_test(samples(t_acc=a, t_norm=a), samples(t_acc=b, t_norm=b), twice)
    once = paired_test(samples(t_acc=a), samples(t_acc=b), [objective()])
    assert found.p_value == once.p_value
    assert found.difference == pytest.approx(once.difference)


def test_p_is_uniform_when_the_models_are_equal() -> None:
    rng = np.random.default_rng(7)
    found = [
        paired_test(
            samples(t_acc=rng.random(20), u_acc=rng.random(30)),
            samples(t_acc=rng.random(20), u_acc=rng.random(30)),
            [objective("t", weight=1), objective("u", weight=2)],
            seed=seed,
        ).p_value
        for seed in range(200)
    ]
    assert stats.kstest(found, "uniform").pvalue > 0.01


def test_equal_scores_are_no_difference() -> None:
    a = np.random.default_rng(0).random(10)
    found = paired_test(samples(t_acc=a), samples(t_acc=a), [objective()])
    assert (found.difference, found.p_value, found.significant) == (0, 1, False)


def test_ties_are_recognised_at_any_scale() -> None:
    for scale in (1e-9, 1.0, 1e9):
        a = np.array([0.1, 0.2, 0.3, 0.4, 0.7]) * scale
        found = paired_test(samples(t_acc=a), samples(t_acc=a * 0), [objective()])
        assert found.p_value == pytest.approx(2 / 2**5, abs=0.006)


def test_models_scored_on_different_documents_are_refused() -> None:
    first = {"t": SampleScores(doc_ids=(0, 1), values={"acc,none": (0.0, 1.0)})}
    second = {"t": SampleScores(doc_ids=(0, 2), values={"acc,none": (0.0, 1.0)})}
    with pytest.raises(ValueError, match="t: scored on different documents"):
        paired_test(first, second, [objective()])


def test_labels_name_the_filter_only_where_there_is_one() -> None:
    assert objective().label == "t acc"
    filtered = Objective(task="t", metric="acc", filter="strict", weight=1, maximize=True)
    assert (filtered.label, filtered.key) == ("t acc,strict", "acc,strict")
    assert len({item.label for item in itertools.chain([objective()], [filtered])}) == 2


def test_a_share_of_the_best_source_enters_the_statistics_document_by_document() -> None:
    """With a reference r the share is 1 + (score - r) / |r|, so differences are those of score / |r|."""
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(30)
    wanted = [replace(objective(), normalize=True, reference=0.25)]
    found = estimate(samples(t_acc=a), wanted)
    assert found.mean == pytest.approx(a.mean() / 0.25)
    assert found.mean == pytest.approx(fitness({"t": {"acc,none": float(a.mean())}}, wanted))
    assert found.standard_error == pytest.approx(stats.sem(a) / 0.25)
    test = paired_test(samples(t_acc=a), samples(t_acc=b), wanted)
    assert test.difference == pytest.approx((a - b).mean() / 0.25)
    assert test.p_value == paired_test(samples(t_acc=a), samples(t_acc=b), [objective()]).p_value
