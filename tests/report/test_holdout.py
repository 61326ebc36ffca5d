"""The holdout table says plainly whether the winner's lead is more than chance."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from evomerge.cli.display import table_text
from evomerge.fitness.constraints import Constraint
from evomerge.fitness.objectives import Objective, estimate, paired_test
from evomerge.records import Final, SampleScores, Status
from evomerge.report.holdout import HoldoutTable, holdout_table
from evomerge.run_dir import RunDir
from evomerge.stages import WINNER

OBJECTIVES = (
    Objective(task="t", metric="acc", filter="none", weight=1, maximize=True),
    Objective(task="u", metric="loss", filter="strict", weight=1, maximize=False),
)


def samples(mean: float, seed: int) -> dict[str, SampleScores]:
    rng = np.random.default_rng(seed)
    ids = tuple(range(3, 43))
    return {
        "t": SampleScores(
            doc_ids=ids, values={"acc,none": tuple(map(float, mean + 0.1 * rng.standard_normal(40)))}
        ),
        "u": SampleScores(doc_ids=(0, 1), values={"loss,strict": (0.25, 0.75)}),
    }


def final(run_dir: RunDir, name: str, mean: float, *, seed: int = 0, stage: str = "holdout") -> Final:
    scores = samples(mean, seed)
    metrics = {
        task: {key: float(np.mean(column)) for key, column in entry.values.items()}
        for task, entry in scores.items()
    }
    return Final(
        name=name,
        stage=stage,  # type: ignore[arg-type]
        candidate="",
        recipe=None,
        status=Status.OK,
        metrics=metrics,
        scores=run_dir.write_scores(f"{name}-{stage}", scores),
        counts={"truncated": len(name)},
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    found = RunDir(tmp_path)
    found.create()
    return found


def table(run_dir: RunDir, *finals: Final) -> HoldoutTable:
    found = holdout_table(run_dir, finals, OBJECTIVES)
    assert found is not None
    return found


def test_the_winner_comes_first_then_the_best_whatever_the_order_of_arrival(run_dir: RunDir) -> None:
    finals = [
        final(run_dir, WINNER, 0.5, seed=1),
        final(run_dir, "low", 0.2, seed=2),
        final(run_dir, "high", 0.9, seed=3),
        final(run_dir, "tie", 0.2, seed=2),
        final(run_dir, WINNER, 0.0, stage="search"),
        Final(
            name="gone",
            stage="holdout",
            candidate="",
            recipe=None,
            status=Status.FAILED,
            reason="out of memory",
        ),
    ]
    found = table(run_dir, *finals)
    assert [row.name for row in found.rows] == [WINNER, "high", "low", "tie"]
    assert found.rival == "high"
    assert found.failed == {"gone": "out of memory"}
    random.Random(0).shuffle(finals)
    assert table(run_dir, *finals) == found


def test_rows_hold_estimates_metrics_and_counts(run_dir: RunDir) -> None:
    found = table(run_dir, final(run_dir, WINNER, 0.5), final(run_dir, "rival", 0.4, seed=1))
    row = found.rows[1]
    assert row.fitness == estimate(samples(0.4, 1), OBJECTIVES)
    assert list(row.metrics) == ["t acc", "u loss,strict"]
    assert row.metrics["u loss,strict"] == 0.5
    assert (row.num_documents, row.truncated) == (42, 5)
    assert found.test == paired_test(samples(0.5, 0), samples(0.4, 1), OBJECTIVES) == found.tests["rival"]


@pytest.mark.parametrize(
    ("winner", "rival", "verdict"),
    [
        (0.9, 0.5, "the winner beats the best of the others, rival "),
        (0.5, 0.49, "the winner's lead over rival is NOT significant "),
        (0.5, 0.9, "the winner does NOT beat rival "),
        (0.5, 0.5, "the winner does NOT beat rival "),
    ],
)
def test_the_verdict_is_plain(run_dir: RunDir, winner: float, rival: float, verdict: str) -> None:
    seed = 0 if winner == rival else 1
    found = table(run_dir, final(run_dir, WINNER, winner), final(run_dir, "rival", rival, seed=seed))
    assert found.verdict.startswith(verdict)
    assert "95 % interval" in found.verdict
    assert found.to_dict()["verdict"] == found.verdict


def test_there_is_no_table_before_the_winner_has_a_rival(run_dir: RunDir) -> None:
    winner, rival = final(run_dir, WINNER, 0.5), final(run_dir, "rival", 0.5)
    for finals in ([], [winner], [rival], [rival, final(run_dir, WINNER, 0.5, stage="search")]):
        assert holdout_table(run_dir, finals, OBJECTIVES) is None


def test_scores_come_back_as_they_were_written(run_dir: RunDir) -> None:
    for seed in range(3):
        scores = samples(0.5, seed)
        assert run_dir.read_scores(run_dir.write_scores(f"{seed}-search", scores)) == scores


def test_the_winner_is_held_to_its_constraints_on_the_holdout(run_dir: RunDir) -> None:
    """The retained share is of what the sources reach there, whom their search scores make known."""
    finals = [
        final(run_dir, "one", 5.0, stage="search"),
        final(run_dir, WINNER, 0.5, seed=1),
        final(run_dir, "one", 0.9, seed=2),
    ]
    bounds = [
        Constraint(task="t", metric="acc", filter="none", maximize=True, kind="retention", limit=0.9),
        Constraint(task="u", metric="loss", filter="strict", maximize=False, kind="max", limit=0.6),
        Constraint(task="gone", metric="acc", filter="none", maximize=True, kind="min", limit=0.6),
    ]
    found = holdout_table(run_dir, finals, OBJECTIVES, bounds)
    assert found is not None
    winner, one = (item.metrics["t"]["acc,none"] for item in finals[1:])
    assert found.rows[0].violations == {
        "t acc retains 0.9 of the best source": pytest.approx(1 - winner / (0.9 * one))
    }
    assert found.rows[1].violations == {}
    assert "winner violates t acc retains 0.9 of the best source" in table_text(found)


def test_the_winner_must_beat_the_rival_that_it_is_least_sure_to_beat(run_dir: RunDir) -> None:
    """A model that hardly differs from the winner is beaten for sure; one that differs much, by luck."""
    rng = np.random.default_rng(4)
    winner = rng.integers(0, 2, 200).astype(float)
    close, far = winner.copy(), rng.permutation(winner)
    close[np.flatnonzero(winner)[:8]] = 0.0
    far[np.flatnonzero(far)[:12]] = 0.0
    finals = []
    for name, column in ((WINNER, winner), ("close", close), ("far", far)):
        scores = {"t": SampleScores(doc_ids=tuple(range(200)), values={"acc,none": tuple(column.tolist())})}
        path = run_dir.write_scores(name, scores)
        finals.append(
            Final(
                name=name,
                stage="holdout",
                candidate="",
                recipe=None,
                status=Status.OK,
                metrics={"t": {"acc,none": float(column.mean())}},
                scores=path,
            )
        )
    found = holdout_table(run_dir, finals, OBJECTIVES[:1])
    assert found is not None
    assert [row.name for row in found.rows] == [WINNER, "close", "far"]
    assert found.tests["close"].significant
    assert not found.tests["far"].significant
    assert found.verdict.startswith("the winner's lead over far is NOT significant ")
