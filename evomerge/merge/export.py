"""Recipe -> checkpoint on disk, one tensor at a time.

The folder is an ordinary Hugging Face checkpoint: weights, config, generation config, tokenizer, a model
card with the recipe, and the recipe itself as `mergekit_config.yml`. It appears under its name only when it
is complete; see `checkpoints/writer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

from evomerge.checkpoints.reader import DTYPES, Checkpoint, contained
from evomerge.checkpoints.tokenizer import difference, same_vocabulary, tokenizer_files
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, ConfigurationError, Fault
from evomerge.merge.card import model_card
from evomerge.merge.config import merged_config
from evomerge.merge.execute import is_finite, merge_tensor
from evomerge.merge.plan import MergePlan, TensorPlan, plan_merge, tied_heads
from evomerge.recipe import Recipe


def export_model(
    recipe: Recipe,
    checkpoints: Mapping[str, Checkpoint],
    out_dir: Path,
    *,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Merge a recipe into a checkpoint folder.

    Args:
        recipe: A recipe that `check_recipe` accepted.
        checkpoints: Model as the recipe names it -> its checkpoint.
        out_dir: Folder to create; refused when it exists and is not empty.
        shard_bytes: Largest size of one weight file.
        progress: Called with (tensors done, tensors in all).

    Raises:
        CheckpointError: The models do not fit together, or a merged tensor is not finite.
        RefusedError: `out_dir` is not empty.
        EvomergeError: The disk is too small.
    """
    plan = plan_merge(recipe, checkpoints)
    donor = checkpoints[_tokenizer_donor(recipe, checkpoints, plan)]
    config = merged_config(plan, checkpoints)
    for name, checkpoint in checkpoints.items():
        _check_tied_heads(name, checkpoint)
    expected = sum(_num_bytes(tensor, checkpoints) for tensor in plan.tensors)
    with CheckpointWriter(out_dir, shard_bytes=shard_bytes, expected_bytes=expected) as writer:
        for done, tensor_plan in enumerate(plan.tensors, start=1):
            merged = merge_tensor(tensor_plan, checkpoints)
            if not is_finite(merged):
                raise CheckpointError(
                    Fault(path=tensor_plan.name, reason="the merged tensor holds NaN or infinity")
                )
            writer.add(tensor_plan.name, merged)
            if progress is not None:
                progress(done, len(plan.tensors))
        writer.add_json("config.json", config)
        for file in tokenizer_files(donor.folder):
            if not (recipe.chat_template and file.name == "chat_template.jinja"):
                writer.copy(file)
        if recipe.chat_template:
            writer.add_text("chat_template.jinja", recipe.chat_template)
        folder = checkpoints[plan.donor].folder
        if (folder / "generation_config.json").exists():
            writer.copy(contained(folder, "generation_config.json"))
        writer.add_text("mergekit_config.yml", recipe.to_yaml())
        writer.add_text("README.md", model_card(recipe))
        writer.commit()


def _check_tied_heads(name: str, checkpoint: Checkpoint) -> None:
    for head, embedding in tied_heads(checkpoint).items():
        if not checkpoint.tensor(head).equal(checkpoint.tensor(embedding)):
            reason = (
                f"config.json ties {head} to {embedding}, but they differ; set tie_word_embeddings to what is "
                "meant"
            )
            raise CheckpointError(Fault(path=name, reason=reason))


def _num_bytes(plan: TensorPlan, checkpoints: Mapping[str, Checkpoint]) -> int:
    model, name = plan.inputs[0]
    stored = DTYPES[checkpoints[model].tensors[name].dtype]
    itemsize = {"float32": 4, "bfloat16": 2, "float16": 2}.get(plan.dtype or "", stored.itemsize)
    return math.prod(plan.shape) * itemsize


def _tokenizer_donor(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], plan: MergePlan) -> str:
    """The model whose tokenizer the merged model gets; vocabularies that differ are never mixed silently."""
    if recipe.tokenizer is not None:
        reason = "building a tokenizer is not supported yet; use tokenizer_source: base or a model's name"
        raise ConfigurationError(recipe.fault(("tokenizer",), reason))
    if recipe.chat_template is not None and "{" not in recipe.chat_template:
        reason = "only a template's own text is supported so far, not a template's name"
        raise ConfigurationError(recipe.fault(("chat_template",), reason))
    wanted = recipe.tokenizer_source
    chosen = plan.donor if wanted in (None, "base", "union") else str(wanted)
    if chosen not in checkpoints:
        reason = f"expected base, union or one of the recipe's models, got {wanted!r}"
        raise ConfigurationError(recipe.fault(("tokenizer_source",), reason))
    for name in recipe.model_names:
        if same_vocabulary(checkpoints[chosen].folder, checkpoints[name].folder) is False:
            found = difference(checkpoints[chosen].folder, checkpoints[name].folder)
            reason = (
                f"its vocabulary differs from that of {chosen}: {found}; sources must share one vocabulary"
            )
            raise CheckpointError(Fault(path=name, reason=reason))
    return chosen
