"""Recipe -> checkpoint on disk, streamed from the sources' files.

    models ─► one vocabulary ─► plan ─┬─► weight files      streaming.py
                                      ├─► config            config.py
                                      ├─► tokenizer         vocabulary.py, the donor's processor files
                                      └─► recipe, card      card.py

The folder is an ordinary Hugging Face checkpoint: weights, config, generation config, tokenizer, a model
card with the recipe, and the recipe itself as `mergekit_config.yml`. It appears under its name only when it
is complete; see `checkpoints/writer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from evomerge.checkpoints.reader import Checkpoint, read_json
from evomerge.checkpoints.tokenizer import processor_files
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, ConfigurationError, Fault
from evomerge.merge.card import model_card, recipes_text
from evomerge.merge.config import merged_config
from evomerge.merge.layout import tied_heads
from evomerge.merge.memory import Memory
from evomerge.merge.plan import plan_merge
from evomerge.merge.streaming import Progress, check_memory, write_tensors
from evomerge.merge.vocabulary import align_vocabularies
from evomerge.recipe import Recipe

GENERATION_CONFIG = "generation_config.json"
RECIPE = "mergekit_config.yml"

_TIE_CHUNK = 1 << 22


def export_model(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out_dir: Path,
    *,
    shard_bytes: int = 5 * 10**9,
    memory_budget: int | None = None,
    device: str = "cpu",
    merges: Sequence[Recipe] = (),
    warn: Callable[[Fault], None] = lambda _: None,
    progress: Progress | None = None,
) -> None:
    """Merge a recipe into a checkpoint folder.

    Args:
        recipe: A recipe that `check_recipe` accepted.
        checkpoints: Model as the recipe names it -> its checkpoint.
        out_dir: Folder to create; refused when it exists and is not empty.
        shard_bytes: Largest size of one weight file.
        memory_budget: Bytes of weights in memory at once, sources included, or None for no limit.
        device: Where the merge is computed, as torch names it.
        merges: Recipes of the merges that this one names as its models; they go along with it.
        warn: Called with what is unusual about tokenizers and modules.
        progress: Called with (bytes merged, bytes in all).

    Raises:
        CheckpointError: The models do not fit together, or a merged tensor is not finite.
        ConfigurationError: A tensor needs more memory than the budget, or there is no such device.
        RefusedError: `out_dir` is not empty.
        EvomergeError: The disk is too small.
    """
    _check_device(device)
    aligned = align_vocabularies(recipe, checkpoints)
    sources = aligned.checkpoints
    plan = plan_merge(recipe, sources)
    for warning in (*aligned.warnings, *plan.warnings):
        warn(warning)
    for name, checkpoint in checkpoints.items():
        _check_tied_heads(name, checkpoint)
    config = aligned.config_changes(merged_config(plan, sources))
    donor = checkpoints[plan.donor].folder
    memory = Memory.plan(plan.tensors, sources, memory_budget)
    with CheckpointWriter(out_dir, shard_bytes=shard_bytes) as writer:
        check_memory(plan.tensors, sources, memory, device=device)
        write_tensors(plan.tensors, sources, writer, memory=memory, device=device, progress=progress)
        writer.add_json("config.json", config)
        if (donor / GENERATION_CONFIG).exists():
            writer.add_json(GENERATION_CONFIG, aligned.config_changes(read_json(donor, GENERATION_CONFIG)))
        aligned.write_tokenizer(writer)
        for file in processor_files(donor):
            writer.copy(file)
        writer.add_text(RECIPE, recipes_text(recipe, merges))
        writer.add_text("README.md", model_card(recipe, checkpoints, merges=merges))
        writer.commit()


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    def wrong(reason: str) -> ConfigurationError:
        return ConfigurationError(f"--device: {reason}, got {device!r}")

    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise wrong("expected cpu or cuda") from None
    if wanted.type not in ("cpu", "cuda"):
        raise wrong("expected cpu or cuda")
    found = torch.cuda.device_count() if wanted.type == "cuda" else 1
    if (wanted.index or 0) >= found:
        raise wrong(f"this machine has {found} such device{'' if found == 1 else 's'}")


def _check_tied_heads(name: str, checkpoint: Checkpoint) -> None:
    for head, embedding in tied_heads(checkpoint).items():
        ours, theirs = checkpoint.tensor(head).view(-1), checkpoint.tensor(embedding).view(-1)
        for first in range(0, ours.numel(), _TIE_CHUNK):
            same = ours[first : first + _TIE_CHUNK].equal(theirs[first : first + _TIE_CHUNK])
            for tensor in (head, embedding):
                checkpoint.release(tensor, first, _TIE_CHUNK)
            if not same:
                reason = (
                    f"config.json ties {head} to {embedding}, but they differ; set tie_word_embeddings to what "
                    "is meant"
                )
                raise CheckpointError(Fault(path=name, reason=reason))
