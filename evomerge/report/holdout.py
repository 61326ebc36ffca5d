"""The holdout table of a run, made from its journal and score files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from evomerge.fitness.constraints import Constraint, on_holdout, violations
from evomerge.fitness.objectives import Estimate, Objective, PairedTest, column_error, estimate, paired_test
from evomerge.records import Final, SampleScores, Status
from evomerge.run_dir import RunDir
from evomerge.stages import WINNER


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of the table.

    Attributes:
        name: What it is.
        fitness: Its fitness on the holdout with its standard error.
        metrics: Objective's label -> value.
        errors: Objective's label -> standard error of that value, if it can be known.
        num_documents: Documents it was scored on.
        truncated: Generations that ran into the token limit.
        violations: Label of every constraint it violates -> by how much, relative to the bound.
    """

    name: str
    fitness: Estimate
    metrics: Mapping[str, float]
    errors: Mapping[str, float | None]
    num_documents: int
    truncated: int
    violations: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class HoldoutTable:
    """The honest comparison.

    Attributes:
        rows: The winner first, then the others from best to worst.
        rival: Name of the model that the verdict is about: the best of the others, unless the winner's lead over
            another one is less certain.
        test: The winner against the rival, paired over documents.
        tests: Every other model's name -> the winner against it.
        failed: Models that could not be scored -> why.
    """

    rows: tuple[Row, ...]
    rival: str
    test: PairedTest
    tests: Mapping[str, PairedTest]
    failed: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """One sentence about whether the winner's lead is more than chance."""
        test = self.test
        known = test.low is not None and test.high is not None
        interval = f"{test.low:+.4f} to {test.high:+.4f}" if known else "unknown"
        numbers = f"{test.difference:+.4f}, 95 % interval {interval}, p = {test.p_value:.2g}"
        if test.difference > 0 and test.significant:
            best = (
                "the best of the others, "
                if self.rival == self.rows[1].name
                else "all others, the closest is "
            )
            return f"the winner beats {best}{self.rival} ({numbers})"
        if test.difference > 0:
            return f"the winner's lead over {self.rival} is NOT significant ({numbers})"
        return f"the winner does NOT beat {self.rival} ({numbers})"

    def to_dict(self) -> dict[str, Any]:
        """The table as plain values."""
        return {**asdict(self), "verdict": self.verdict}


def holdout_table(
    run_dir: RunDir,
    finals: Sequence[Final],
    objectives: Sequence[Objective],
    constraints: Sequence[Constraint] = (),
) -> HoldoutTable | None:
    """Build the table; None while the holdout is not complete enough to compare anything."""
    held_out_constraints = on_holdout(constraints, finals)
    held_out = [final for final in finals if final.stage == "holdout"]
    samples: dict[str, Mapping[str, SampleScores]] = {
        final.name: run_dir.read_scores(final.scores) for final in held_out if final.status is Status.OK
    }
    if WINNER not in samples or len(samples) < 2:
        return None
    rows = [
        Row(
            name=final.name,
            fitness=estimate(samples[final.name], objectives),
            metrics={item.label: final.metrics[item.task][item.key] for item in objectives},
            errors={
                item.label: column_error(samples[final.name][item.task].values[item.key])
                for item in objectives
            },
            num_documents=sum(len(scores.doc_ids) for scores in samples[final.name].values()),
            truncated=final.counts.get("truncated", 0),
            violations=violations(final.metrics, held_out_constraints),
        )
        for final in held_out
        if final.name in samples
    ]
    rows.sort(key=lambda row: (row.name != WINNER, -row.fitness.mean, row.name))
    tests = {row.name: paired_test(samples[WINNER], samples[row.name], objectives) for row in rows[1:]}
    rival = _rival(tests)
    return HoldoutTable(
        rows=tuple(rows),
        rival=rival,
        test=tests[rival],
        tests=tests,
        failed={final.name: final.reason for final in held_out if final.status is not Status.OK},
    )


def _rival(tests: Mapping[str, PairedTest]) -> str:
    """Whom the winner must beat to be announced.

    It beats all others only if it beats each of them at the 5 % level, which holds for all together then
    (Berger, "Multiparameter Hypothesis Testing and Acceptance Sampling", 1982). The best of the others on the
    holdout alone will not do: it may be the best by luck, and the winner's lead over another one less certain.

    Args:
        tests: The winner against every other model, the best of them first.
    """
    best = next(iter(tests))
    return max(tests, key=lambda name: tests[name].p_value) if tests[best].difference > 0 else best
