"""Paths through the layers of two tiny models of different depth, and what a model makes of texts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from evomerge.checkpoints.decoder import find_branches, find_decoder
from evomerge.checkpoints.reader import Checkpoint
from evomerge.merge.export import export_model
from evomerge.recipe import Recipe
from tests.architectures import WORDS, tiny

DEPTHS = {"one": 3, "two": 4}
NORMS_FROM_ONE = ("Gemma2", "Gemma3Text")
"""Architectures whose norms multiply by (1 + w)."""


def make_pair(folder: Path, name: str, *, dtype: str = "float32", **config: Any) -> Path:
    """Write `one` and `two`, random models of one architecture, of 3 and 4 layers."""
    for seed, (child, depth) in enumerate(DEPTHS.items()):
        model = tiny(name, **{"n_layer" if name == "GPT2" else "num_hidden_layers": depth, **config})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        model.to(getattr(torch, dtype)).save_pretrained(folder / child)
    return folder


def open_pair(folder: Path) -> dict[str, Checkpoint]:
    return {child: Checkpoint.open(folder / child) for child in DEPTHS}


def random_hops(rng: random.Random, count: int) -> list[tuple[str, int]]:
    """Layers of both models, with repeats."""
    hops = [("one", 0), ("two", 3), ("one", 0)]
    hops += [(model, rng.randrange(DEPTHS[model])) for model in rng.choices(list(DEPTHS), k=count - 3)]
    rng.shuffle(hops)
    return hops


def path(hops: list[tuple[str, int]], **more: Any) -> Recipe:
    """A path without scales."""
    slices = [{"sources": [{"model": model, "layer_range": [layer, layer + 1]}]} for model, layer in hops]
    return Recipe.from_dict({"merge_method": "passthrough", "dtype": "float32", "slices": slices, **more})


def scaled_path(
    hops: list[tuple[str, int]], checkpoints: Mapping[str, Checkpoint], rng: random.Random, *, offset: float
) -> Recipe:
    """A path with factors of both signs on writers, norms, the embedding and the final norm.

    Args:
        hops: Model and layer of every hop.
        checkpoints: The models.
        rng: Draws the factors.
        offset: 1 where norms multiply by (1 + w), else 0.
    """

    def factor() -> float:
        return rng.uniform(0.5, 1.5) * rng.choice([1, -1])

    slices: list[dict[str, Any]] = []
    rescaled: list[dict[str, Any]] = []
    for place, (model, layer) in enumerate(hops):
        checkpoint = checkpoints[model]
        decoder = find_decoder(checkpoint.tensors, checkpoint.config)
        settings: list[dict[str, Any]] = []
        for branch in vars(find_branches(checkpoint.tensors)[layer]).values():
            written = factor()
            settings += [{"filter": name, "value": written} for name in branch.writers]
            for name in branch.input_norm + branch.post_norm:
                if not offset:
                    settings.append({"filter": name, "value": factor()})
                else:
                    there = name.replace(f".{layer}.", f".{place}.", 1)
                    rescaled.append({"tensor": there, "factor": factor(), "offset": offset})
        ends: tuple[str, ...] = decoder.token_embeddings + decoder.position_embeddings if place == 0 else ()
        if place == len(hops) - 1 and not offset:
            ends += decoder.final_norm
        settings += [{"filter": name, "value": factor()} for name in ends]
        source = {"model": model, "layer_range": [layer, layer + 1]}
        slices.append({"sources": [{**source, "parameters": {"scale": [*settings, {"value": 1.0}]}}]})
    return Recipe.from_dict(
        {
            "merge_method": "passthrough",
            "dtype": "float32",
            "slices": slices,
            "evomerge": {"scales": list({entry["tensor"]: entry for entry in rescaled}.values())},
        }
    )


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a model makes of a padded batch.

    Attributes:
        logits: Of all words that are not padding.
        log_likelihoods: Of the second half of every text.
        generated: Greedy continuations.
    """

    logits: Tensor
    log_likelihoods: Tensor
    generated: Tensor


def results(model: Any) -> Results:
    """Run a model on three texts of different lengths, longer than a sliding window, padded on the left."""
    words = torch.randint(3, WORDS, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(words)
    mask[1, :4] = mask[2, :9] = 0
    words[mask == 0] = 0
    with torch.no_grad():
        logits = model(words, attention_mask=mask).logits
        chances = logits.float().log_softmax(-1)[:, 8:-1].gather(-1, words[:, 9:, None])
        generated = model.generate(
            words, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None
        )
    assert logits.isfinite().all()
    return Results(logits=logits[mask.bool()], log_likelihoods=chances.sum((1, 2)), generated=generated)


def exported(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], folder: Path, dtype: str = "float32"
) -> Any:
    """The exported checkpoint of a recipe, loaded afresh."""
    export_model(recipe, checkpoints, folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def assert_same(found: Results, expected: Results) -> None:
    """To the last bit."""
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.log_likelihoods, expected.log_likelihoods)
    assert torch.equal(found.generated, expected.generated)


def assert_close(found: Results, expected: Results) -> None:
    """The same words, and numbers that differ by no more than float32 explains."""
    assert torch.equal(found.generated, expected.generated)
    for ours, theirs in (
        (found.logits, expected.logits),
        (found.log_likelihoods, expected.log_likelihoods),
    ):
        assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
