"""Models with different vocabularies, brought to one before they are merged.

    recipe ─┬─► chat template ─────────────────────────┐
            └─► output vocabulary ─┬───────────────────┴─► tokenizer files
                                   ├─► rows of embedding and head ─► AlignedCheckpoint per model
                                   └─► token ids and vocabulary size in the configs

Without `tokenizer_source` or `tokenizer` in the recipe, models whose vocabularies differ are refused: merging
row by row would mix the embeddings of different tokens. Which tokens there are is found in
`vocabulary_plan.py`; the rules by which models fill the rows they lack are there too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evomerge.checkpoints.chat_template import TEMPLATES, chat_template, template_fault
from evomerge.checkpoints.reader import Checkpoint, read_json
from evomerge.checkpoints.tokenizer import difference, in_words, same_vocabulary, vocabulary
from evomerge.checkpoints.tokenizer_build import OutputTokenizer
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, ConfigurationError, Fault, nearest
from evomerge.merge.output_modules import ModelModules
from evomerge.merge.token_ids import IdChanges
from evomerge.merge.vocabulary_plan import VocabularyPlanner
from evomerge.merge.vocabulary_rows import vocabulary_of
from evomerge.recipe import OutputSlice, Recipe, TokenizerSettings

_CONTROL_TOKEN = re.compile(r"<\|[^|<>\s]+\|>")


@dataclass(frozen=True, kw_only=True)
class AlignedModels:
    """The models of a recipe with one vocabulary.

    Attributes:
        checkpoints: Model as the recipe names it -> the model, or a view of it where its rows change.
        tokenizer: The merged model's tokenizer.
        ids: What changes in configs, or None if nothing does.
        warnings: What was done to tokens, in words.
    """

    checkpoints: Mapping[str, Checkpoint]
    tokenizer: OutputTokenizer
    ids: IdChanges | None
    warnings: tuple[Fault, ...]

    def config_changes(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The config, or the generation config, with the vocabulary size and token ids of the result."""
        return dict(config) if self.ids is None else self.ids.apply(config)[0]

    def write_tokenizer(self, writer: CheckpointWriter) -> None:
        """Write the tokenizer's files; see `OutputTokenizer.write`."""
        self.tokenizer.write(writer)


def align_vocabularies(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> AlignedModels:
    """Bring the models of a recipe to one vocabulary; only tokenizers, configs and headers are read.

    Args:
        recipe: A recipe that `check_recipe` accepted.
        checkpoints: Model as the recipe names it -> its checkpoint.

    Raises:
        CheckpointError: Vocabularies differ and the recipe does not say what to do, or a tokenizer cannot be used.
        ConfigurationError: The recipe asks for a model, token or chat template that does not exist.
    """
    modules = ModelModules(recipe, checkpoints)
    donor, pieces = modules.donor, modules.language_model()
    names = tuple(dict.fromkeys((donor, *recipe.model_names)))
    template = _chat_template(recipe, [checkpoints[name] for name in names])
    settings = recipe.tokenizer
    if recipe.tokenizer_source is not None:
        settings = TokenizerSettings(source=recipe.tokenizer_source)
    if settings is None:
        _check_alike(recipe, checkpoints, donor, pieces)
        tokenizer = OutputTokenizer(
            folder=checkpoints[donor].folder, content=None, ids={}, chat_template=template
        )
        known = vocabulary(tokenizer.folder) if template else None
        warnings = _template_warnings(recipe, template, known)
        return AlignedModels(checkpoints=checkpoints, tokenizer=tokenizer, ids=None, warnings=warnings)
    planner = VocabularyPlanner(recipe, settings, {name: checkpoints[name] for name in names}, donor, pieces)
    tokenizer = planner.tokenizer(template)
    aligned = {**checkpoints, **planner.aligned(tokenizer.ids)}
    ids = planner.id_changes(tokenizer.ids)
    lost = ids.apply(checkpoints[donor].config)[1]
    folder = checkpoints[donor].folder
    if (folder / "generation_config.json").exists():
        lost += ids.apply(read_json(folder, "generation_config.json"))[1]
    warnings = (
        *planner.warnings(tokenizer.ids),
        *(recipe.fault(planner.place, f"config of {donor}: {line}") for line in dict.fromkeys(lost)),
        *_template_warnings(recipe, template, tokenizer.ids),
    )
    return AlignedModels(checkpoints=aligned, tokenizer=tokenizer, ids=ids, warnings=warnings)


def _check_alike(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], donor: str, pieces: Sequence[OutputSlice]
) -> None:
    """Refuse models whose rows of the same number belong to different tokens, or that differ in rows."""
    folder = checkpoints[donor].folder
    for name in recipe.model_names:
        if same_vocabulary(folder, checkpoints[name].folder) is False:
            found = difference(folder, checkpoints[name].folder)
            reason = (
                f"its vocabulary differs from that of {donor}: {found}; sources must share one vocabulary, "
                "unless the recipe says tokenizer_source: union (or base, or one of the models)"
            )
            raise CheckpointError(Fault(path=name, reason=reason))
    shapes: dict[str, str] = {}
    sizes: set[int] = set()
    for name in dict.fromkeys(
        source.model for piece in (*pieces[:1], *pieces[-1:]) for source in piece.sources
    ):
        try:
            found_rows = vocabulary_of(name, checkpoints[name])
        except CheckpointError:
            # No decoder, or a config at odds with its tensors: planning tells.
            return
        embedding = found_rows.names[next(iter(found_rows.embeddings))]
        shapes[name] = f"{name} {list(checkpoints[name].tensors[embedding].shape)}"
        sizes.add(found_rows.num_rows)
    if len(sizes) > 1:
        reason = (
            f"the models differ in its number of rows: {', '.join(shapes.values())}; write tokenizer_source: "
            "union (or base, or one of the models) to merge them token by token"
        )
        raise CheckpointError(Fault(path=embedding, reason=reason))


def _chat_template(recipe: Recipe, models: Sequence[Checkpoint]) -> str | None:
    """The template the recipe asks for; None leaves that of the model that gives the tokenizer.

    Args:
        recipe: The recipe.
        models: Its models; among equally common templates the first one's counts.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        found = [text.strip() for model in models if (text := chat_template(model.folder))]
        return Counter(found).most_common(1)[0][0] if found else None
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted:
        known = ("auto", *TEMPLATES)
        reason = f"expected a Jinja template, or one of {', '.join(known)}; got {wanted!r}"
        raise ConfigurationError(recipe.fault(("chat_template",), reason + nearest(wanted, known)))
    fault = template_fault(wanted)
    if fault is not None:
        raise ConfigurationError(recipe.fault(("chat_template",), f"no Jinja template: {fault}"))
    return wanted


def _template_warnings(
    recipe: Recipe, template: str | None, known: Mapping[str, int] | None
) -> tuple[Fault, ...]:
    place = ("chat_template",)
    if template is None and recipe.chat_template is not None:
        return (recipe.fault(place, "no model has a chat template, so the merged one gets none"),)
    if template is None or known is None:
        return ()
    missing = [token for token in dict.fromkeys(_CONTROL_TOKEN.findall(template)) if token not in known]
    if not missing:
        return ()
    reason = (
        f"the template uses {in_words(missing)} that the vocabulary lacks; add them under tokenizer.tokens"
    )
    return (recipe.fault(place, reason),)
