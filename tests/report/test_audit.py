"""The audit says what a run's numbers are worth, from its journal and score files alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.fitness.objectives import Objective, estimate
from evomerge.fitness.optimism import optimism
from evomerge.journal import Journal
from evomerge.records import Final, Header, SampleScores, Status, Trial
from evomerge.report.audit import Audit, Share, audit_run, texts_of
from evomerge.report.audit_text import audit_text
from evomerge.report.holdout import holdout_table
from evomerge.run_dir import RunDir
from evomerge.stages import WINNER

OBJECTIVES = (Objective(task="t", metric="acc", filter="none", weight=1, maximize=True),)
NUM = 200
HEADER = Header(experiment="e", settings={}, inputs={}, versions={}, seed=0)


def samples(mean: float, ids: Sequence[int] = tuple(range(NUM))) -> dict[str, SampleScores]:
    """Documents of which the first `mean` are right."""
    column = tuple(float(place < round(mean * len(ids))) for place in range(len(ids)))
    return {"t": SampleScores(doc_ids=tuple(ids), values={"acc,none": column})}


class Writer:
    """Writes a run."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = RunDir(folder)
        self.run_dir.create()
        self.records: list[Trial | Final] = []

    def trial(self, number: int, fitness: float | None, **more: Any) -> None:
        values = {
            "candidate": f"c{number}",
            "status": Status.INVALID if fitness is None else Status.OK,
            "metrics": {} if fitness is None else {"t": {"acc,none": fitness}},
            "standard_error": None if fitness is None else 0.03,
            **more,
        }
        if values["status"] is Status.OK and fitness is not None and "scores" not in more:
            values["scores"] = self.run_dir.write_scores(f"{number}-search", samples(fitness))
        self.records.append(Trial(number=number, genome=(), asked_after=0, fitness=fitness, **values))

    def final(
        self, name: str, stage: str, scores: Mapping[str, SampleScores], candidate: str = "", **counts: int
    ) -> None:
        column = scores["t"].values["acc,none"]
        self.records.append(
            Final(
                name=name,
                stage=stage,  # type: ignore[arg-type]
                candidate=candidate,
                recipe=None,
                status=Status.OK,
                metrics={"t": {"acc,none": float(np.mean(column))}},
                scores=self.run_dir.write_scores(f"{name}-{stage}", scores),
                counts=counts,
            )
        )

    def holdout(self, winner: Mapping[str, int], rival: Mapping[str, int], lead: float = 0.1) -> None:
        generated = {"generations": NUM}
        self.final(WINNER, "holdout", samples(0.5 + lead), **{**generated, **winner})
        self.final("one", "holdout", samples(0.5), **{**generated, **rival})

    def audit(self) -> Audit:
        with Journal.create(self.run_dir.journal, HEADER) as journal:
            for record in self.records:
                journal.append(record)
            table = holdout_table(self.run_dir, journal.finals, OBJECTIVES)
            found = audit_run(self.run_dir, journal, OBJECTIVES, table)
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))
        return found


@pytest.fixture
def run(tmp_path: Path) -> Writer:
    return Writer(tmp_path)


def test_what_cannot_be_known_is_not_zero() -> None:
    texts = texts_of({"generations": 8, "truncated": 2, "empty": 0, "no_answer": 3, "answers_judged": 4})
    assert texts.truncated == Share(count=2, of=8)
    assert texts.empty == Share(count=0, of=8)
    assert texts.no_answer == Share(count=3, of=4)
    assert texts.wrong_language is None
    assert texts.no_mark is None
    assert texts_of({"generations": 8, "judged": 8, "unreadable": 1}).no_mark == Share(count=1, of=8)
    choices = texts_of({"generations": 0, "truncated": 0, "output_tokens": 0})
    assert {choices.truncated, choices.empty, choices.no_answer, choices.wrong_language} == {None}


def test_every_candidate_counts_once_and_those_without_scores_are_told(run: Writer) -> None:
    run.trial(0, 0.5, counts={"generations": 10, "truncated": 1, "empty": 0})
    run.trial(1, 0.5, candidate="c0", attempts=0, counts={"generations": 10, "truncated": 1, "empty": 0})
    run.trial(2, 0.4, status=Status.PRUNED, counts={"generations": 4, "truncated": 2, "empty": 1})
    run.trial(3, None)
    run.trial(4, None, status=Status.FAILED)
    found = run.audit()
    assert found.search.truncated == Share(count=3, of=14)
    assert found.search.empty == Share(count=1, of=14)
    assert found.candidates == {"ok": 2, "invalid": 1, "failed": 1, "pruned": 1}
    assert found.models == {}
    assert found.noise_floor is None
    assert "candidates: 2 scored, 1 stopped or left out early, 1 invalid, 1 failed" in audit_text(found)


def test_the_noise_floor_is_the_largest_difference_between_two_scores_of_a_candidate(run: Writer) -> None:
    for number, fitness in enumerate((0.5, 0.75, 0.5)):
        run.trial(number, fitness, status=Status.PRUNED if number == 2 else Status.OK)
    even, odd = range(0, NUM, 2), range(1, NUM, 2)
    for number, second in enumerate((0.51, 0.72, 0.9)):
        for part, ids in enumerate((even, odd)):
            run.final(f"trial {number}, part {part}", "confirm", samples(second, ids), candidate=f"c{number}")
    run.final(WINNER, "confirm", samples(0.72), candidate="c1")
    found = run.audit()
    assert found.noise_floor == pytest.approx(0.03)
    assert found.num_scored_twice == 2, "the first score of a candidate that raced was on fewer documents"
    assert "noise floor: 0.0300, the most by which the fitness of 2 candidates differed" in audit_text(found)


def test_the_winner_is_shown_by_what_chose_it_and_by_what_the_search_never_saw(run: Writer) -> None:
    for number, fitness in enumerate((0.5, 0.9, 0.6)):
        run.trial(number, fitness)
    run.trial(3, 0.9, candidate="c1", attempts=0)
    run.final("trial 1, part 0", "confirm", samples(0.85), candidate="c1")
    run.final("trial 2, part 0", "confirm", samples(0.6), candidate="c2")
    run.final(WINNER, "confirm", samples(0.85), candidate="c1")
    run.holdout({}, {})
    found = run.audit()
    assert [each.on for each in found.winner] == ["search", "confirm", "holdout"]
    assert [each.fitness.mean for each in found.winner] == pytest.approx([0.9, 0.85, 0.6])
    assert [each.num_candidates for each in found.winner] == [3, 2, 1]
    assert found.winner[0].fitness.standard_error == 0.03
    assert found.winner[2].fitness == estimate(samples(0.6), OBJECTIVES)
    text = audit_text(found)
    assert "on the search documents, best of 3: optimistic     0.9000  0.0300" in text
    assert "on held-out documents, which the search never saw  0.6000" in text


def test_the_luck_in_the_choice_is_that_of_the_candidates_once_the_search_is_over(run: Writer) -> None:
    drawn = np.random.default_rng(0).random((20, NUM)) < 0.5
    ids = tuple(range(NUM))
    scored = [
        {"t": SampleScores(doc_ids=ids, values={"acc,none": tuple(row.astype(float).tolist())})}
        for row in drawn
    ]
    for number, each in enumerate(scored):
        file = run.run_dir.write_scores(f"{number}-search", each)
        run.trial(number, float(drawn[number].mean()), scores=file)
    run.trial(20, 0.9, status=Status.PRUNED)
    assert run.audit().luck is None
    run.run_dir.journal.unlink()
    run.holdout({}, {})
    found = run.audit()
    assert found.luck == optimism(scored, OBJECTIVES, seed=0) > 0
    assert (
        f"at least about {found.luck:.4f} of it on the search documents is expected to be luck"
        in audit_text(found)
    )


def test_candidates_that_cannot_win_have_no_part_in_the_luck(run: Writer) -> None:
    drawn = np.random.default_rng(1).random((20, NUM)) < 0.5
    ids = tuple(range(NUM))
    for number, row in enumerate([*drawn, np.ones(NUM)]):
        scores = {"t": SampleScores(doc_ids=ids, values={"acc,none": tuple(row.astype(float).tolist())})}
        violations = {"too long": 0.1} if number == 20 else {}
        file = run.run_dir.write_scores(f"{number}-search", scores)
        run.trial(number, float(row.mean()), scores=file, violations=violations)
    run.holdout({}, {})
    assert (run.audit().luck or 0) > 0.01


def test_half_a_second_scoring_says_nothing(run: Writer) -> None:
    whole = samples(0.5)
    run.trial(0, 0.5, scores=run.run_dir.write_scores("0-search", whole))
    run.final("trial 0, part 0", "confirm", samples(1.0, range(0, NUM, 2)), candidate="c0")
    found = run.audit()
    assert found.noise_floor is None
    assert [each.on for each in found.winner] == ["search"]
    run.run_dir.journal.unlink()
    run.final("trial 0, part 1", "confirm", samples(0.2, range(1, NUM, 2)), candidate="c0")
    assert run.audit().noise_floor == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("winner", "rival", "lead", "said"),
    [
        (
            2,
            40,
            0.1,
            "1.0 % of the winner's texts are cut off at the token limit, and 20.0 % of one's: part of the",
        ),
        (
            40,
            2,
            -0.1,
            "20.0 % of the winner's texts are cut off at the token limit, and 1.0 % of one's: part of wh",
        ),
        (40, 2, 0.1, "the two are not compared under the same conditions"),
        (2, 8, 0.1, None),
        (0, 0, 0.1, None),
    ],
    ids=["a win of form", "a loss of form", "a win in spite of it", "a small difference", "none"],
)
def test_a_difference_in_form_between_winner_and_rival_is_named(
    run: Writer, winner: int, rival: int, lead: float, said: str | None
) -> None:
    run.holdout({"truncated": winner}, {"truncated": rival}, lead)
    found = [text for text in run.audit().warnings if "many texts" not in text]
    assert len(found) == (said is not None)
    if said is not None:
        assert said in found[0]


def test_a_difference_that_may_be_chance_is_not_named(run: Writer) -> None:
    few = {"answers_judged": 10}
    run.holdout({"no_answer": 1, **few}, {"no_answer": 2, **few})
    assert [text for text in run.audit().warnings if "winner's texts" in text] == []


def test_large_shares_are_warned_of_with_who_has_them(run: Writer) -> None:
    run.trial(0, 0.5, counts={"generations": 100, "truncated": 5, "answers_judged": 100, "no_answer": 6})
    judged = {"answers_judged": NUM, "languages_judged": NUM}
    run.holdout({"wrong_language": 12, **judged}, {"no_answer": 30, "wrong_language": 10, **judged})
    warnings = [text for text in run.audit().warnings if "many texts" in text]
    assert len(warnings) == 2
    assert "without an answer that can be read: one 15.0 %, all candidates 6.0 %; " in warnings[0]
    assert "in another language than asked for: winner 6.0 %; " in warnings[1]


def test_only_what_is_known_has_a_column_and_the_unknown_is_called_so(run: Writer) -> None:
    run.trial(0, 0.5, counts={"generations": 100, "truncated": 5})
    run.holdout({"truncated": 1, "no_answer": 3, "answers_judged": NUM}, {"truncated": 0})
    lines = audit_text(run.audit()).splitlines()
    header = next(line for line in lines if line.startswith("of the generated texts"))
    assert "empty" not in header
    assert "other language" not in header
    row = next(line for line in lines if line.startswith("one "))
    assert "unknown" in row
    assert "0 of 200" in row


def test_a_run_of_choices_alone_has_no_texts(run: Writer) -> None:
    run.trial(0, 0.5, counts={"generations": 0, "truncated": 0, "output_tokens": 0})
    found = run.audit()
    assert found.warnings == ()
    assert "texts" not in audit_text(found)
