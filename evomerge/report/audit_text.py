"""The audit of a run as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping

from evomerge.measured import as_share, with_error
from evomerge.report.aligned import aligned
from evomerge.report.audit import Audit, Reached, Share, Texts

COLUMNS = {
    "truncated": "cut off",
    "empty": "empty",
    "no_answer": "no answer",
    "wrong_language": "other language",
    "no_mark": "no mark",
}


def audit_text(audit: Audit) -> str:
    """The audit."""
    blocks = []
    if audit.winner:
        lines = aligned([["the winner's fitness", "± s.e.", ""], *map(_reached, audit.winner)])
        if audit.luck is not None:
            lines.append(
                f"at least about {audit.luck:.4f} of it on the search documents is expected to be luck"
            )
        blocks.append(lines)
    rows = {**audit.models, "all candidates": audit.search}
    table = texts_table(rows)
    if table:
        blocks.append(table)
    blocks.append([*_sums(audit), *(f"warning: {text}" for text in audit.warnings)])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def texts_table(rows: Mapping[str, Texts]) -> list[str]:
    """What is wrong with texts, a line for each who wrote them; columns of which nothing is known are left out."""
    known = [key for key in COLUMNS if any(getattr(texts, key) is not None for texts in rows.values())]
    if not known:
        return []
    header = ["of the generated texts", *(COLUMNS[key] for key in known)]
    return aligned(
        [header, *([name, *(_cell(getattr(texts, key)) for key in known)] for name, texts in rows.items())]
    )


def _cell(share: Share | None) -> str:
    return "unknown" if share is None else f"{share.count} of {share.of}, {as_share(share.value):>7}"


def _reached(reached: Reached) -> list[str]:
    match reached.on:
        case "search":
            among = f", best of {reached.num_candidates}" if reached.num_candidates > 1 else ""
            name = f"on the search documents{among}: optimistic"
        case "confirm":
            name = "on them again, in other batches: still optimistic"
        case _:
            name = "on held-out documents, which the search never saw"
    value, _, error = with_error(reached.fitness.mean, reached.fitness.standard_error).partition(" ± ")
    return [name, value, error]


def _sums(audit: Audit) -> list[str]:
    counts = audit.candidates
    words = {"ok": "scored", "pruned": "stopped or left out early", "invalid": "invalid", "failed": "failed"}
    lines = [
        "candidates: " + ", ".join(f"{counts[key]} {word}" for key, word in words.items() if key in counts)
    ]
    if audit.noise_floor is not None:
        num = audit.num_scored_twice
        who = f"{num} candidates" if num > 1 else "a candidate"
        lines.append(
            f"noise floor: {audit.noise_floor:.4f}, the most by which the fitness of {who} differed when scored a "
            "second time, in other batches"
        )
    return lines
