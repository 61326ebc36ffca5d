"""Evaluations that each genome and searcher needs to find the planted path, over several seeds.

    python experiments/planted_path/compare.py [--seeds N] [--evaluations N]

A candidate counts as the solution when it gets every letter of the search documents right, as the original does.
Every search goes through the space and the searcher that a run uses; candidates are scored here without lm-eval, by
running the layers of a path one after the other, which gives the same share of right letters.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from make import PATH, WORD_LENGTH, encipher, make_rotors, make_words
from transformers import LlamaForCausalLM
from transformers.utils import logging

from evomerge.checkpoints.reader import Checkpoint
from evomerge.prepare import source_models
from evomerge.search import SEARCHERS, build_searcher
from evomerge.spaces import build_space
from evomerge.spaces.path import Hop
from evomerge.yaml_file import Document

MODELS = Path(__file__).parent / "models"
NAMES = tuple(str(MODELS / name) for name in ("front", "back"))
GENOMES: tuple[dict[str, Any], ...] = (
    {"type": "blocks", "count": 4},
    {"type": "indicator", "repeats": 2},
    {"type": "path", "window": 2},
)
SEARCHES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cma-es", {}),
    ("catcma", {"population": 20}),
    ("random", {}),
)


def main() -> None:
    """Search with every genome and searcher, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--evaluations", type=int, default=1000)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    share = scorer()
    planted = share([Hop(model=str(MODELS / model), layer=layer) for model, layer in PATH])
    print(f"planted path {planted:.3f}, front alone {share(whole(NAMES[0])):.3f}\n")
    print("| genome | searcher | solved | evaluations (median) | best of each seed |\n|---|---|---|---|---|")
    for genome in GENOMES:
        for name, settings in SEARCHES:
            found = [
                search(share, genome, name, settings, seed, options.evaluations)
                for seed in range(options.seeds)
            ]
            needed = [count for count, _ in found if count is not None]
            cells = [
                str(genome["type"]),
                name,
                f"{len(needed)} of {len(found)}",
                f"{statistics.median(needed):.0f}" if needed else "-",
                ", ".join(f"{best:.2f}" for _, best in found),
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def whole(model: str) -> list[Hop]:
    """A model's own layers."""
    return [Hop(model=model, layer=layer) for layer in range(12)]


def search(
    share: Callable[[Sequence[Hop]], float],
    genome: dict[str, Any],
    searcher: str,
    settings: dict[str, Any],
    seed: int,
    evaluations: int,
) -> tuple[int | None, float]:
    """Search once; return how many evaluations the solution took, or None, and the best share of right letters."""
    checkpoints = {name: Checkpoint.open(Path(name)) for name in NAMES}
    sources = source_models(checkpoints, NAMES, None, anatomies=True)
    space = build_space(Document(data={"type": "data_flow", "genome": genome}), sources)
    options = SEARCHERS[searcher].options(**settings)
    strategy = build_searcher(searcher, space.dimensions, seed, options)
    count, best = 0, 0.0
    while count < evaluations:
        told = []
        for each in strategy.ask():
            count += 1
            told.append(share(space.hops(each)))  # type: ignore[attr-defined]  # a space of paths
            best = max(best, told[-1])
            if best == 1.0:
                return count, best
        strategy.tell(told)
    return None, best


def scorer() -> Callable[[Sequence[Hop]], float]:
    """What gives the share of right letters of the model that a path makes."""
    models = {name: LlamaForCausalLM.from_pretrained(name, dtype=torch.float32).eval() for name in NAMES}
    body, head = models[NAMES[0]].model, models[NAMES[0]].lm_head
    rotors, words = make_rotors(), make_words()
    ids, left = encipher(words["search"], rotors)
    ids, right = ids[:, :-1], left[-1, :, :-1]
    known: dict[tuple[tuple[str, int], ...], float] = {}

    def share(hops: Sequence[Hop]) -> float:
        path = tuple((hop.model, hop.layer) for hop in hops)
        if path not in known:
            hidden = body.embed_tokens(ids)
            positions = torch.arange(ids.shape[1])[None]
            rotary = body.rotary_emb(hidden, positions)
            for model, layer in path:
                hidden = models[model].model.layers[layer](
                    hidden, position_embeddings=rotary, attention_mask=None
                )
            guess = head(body.norm(hidden))[:, WORD_LENGTH:].argmax(-1)
            known[path] = float((guess == right).float().mean())
        return known[path]

    return share


if __name__ == "__main__":
    main()
