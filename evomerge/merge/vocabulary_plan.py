"""Which tokens a merged model has, and what their rows in embedding and head are made of.

A token keeps its own row in every model that has it. In a model that lacks it, it gets the row that the
recipe names for it; else the base model's; else the mean over the models that have it; else zero. The models
that count are those of the slice that gives the tensor: the first for the embedding, the last for the head.
These are mergekit's rules. The order of added tokens, which mergekit leaves to chance, is here the
recipe's, the donor of the config first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from evomerge.checkpoints.decoder import text_config
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.tokenizer import in_words
from evomerge.checkpoints.tokenizer_build import (
    PLAIN,
    ModelTokenizer,
    OutputTokenizer,
    extend,
    read_tokenizer,
)
from evomerge.errors import CheckpointError, ConfigurationError, Fault
from evomerge.merge.token_ids import IdChanges
from evomerge.merge.vocabulary_rows import (
    VOCABULARY_SIZE,
    AlignedCheckpoint,
    AlignedTensor,
    RowId,
    RowPlan,
    vocabulary_of,
)
from evomerge.recipe import OutputSlice, Recipe, TokenizerSettings, TokenRow, ZeroRow
from evomerge.yaml_file import FieldPath


class VocabularyPlanner:
    """Plans the vocabulary of a recipe that says where its tokenizer comes from.

    Args:
        recipe: The recipe.
        settings: Its `tokenizer`, or what its `tokenizer_source` stands for.
        checkpoints: Its models, in the order in which their tokens are added.
        donor: The model that gives the config.
        pieces: The slices of the merged language model.

    Attributes:
        place: Where the recipe says it.

    Raises:
        CheckpointError: A model's vocabulary cannot be found, or its tokenizer not be used.
        ConfigurationError: The recipe names a model or token that does not exist.
    """

    def __init__(
        self,
        recipe: Recipe,
        settings: TokenizerSettings,
        checkpoints: Mapping[str, Checkpoint],
        donor: str,
        pieces: Sequence[OutputSlice],
    ) -> None:
        self.recipe = recipe
        self.settings = settings
        self.tokens = settings.tokens or {}
        self.checkpoints = checkpoints
        self.donor = donor
        self.pieces = pieces
        self.place: FieldPath = ("tokenizer_source",) if recipe.tokenizer is None else ("tokenizer", "source")
        self.start = donor if settings.source in ("union", "base") else settings.source
        if self.start not in checkpoints:
            reason = f"expected base, union or one of the recipe's models, got {settings.source!r}"
            raise ConfigurationError(recipe.fault(self.place, reason))
        self.vocabularies = {name: vocabulary_of(name, model) for name, model in checkpoints.items()}
        self._notes: dict[str, None] = {}
        self.tokenizers = {name: self._read(name) for name in checkpoints}
        if faults := list(self._token_faults()):
            raise ConfigurationError(faults)

    def _read(self, name: str) -> ModelTokenizer:
        num_rows = self.vocabularies[name].num_rows
        tokenizer = read_tokenizer(self.checkpoints[name].folder, num_rows)
        if tokenizer is None and name != self.donor:
            self._note(f"{name} has no tokenizer; its tokens are taken to be those of {self.donor}")
            tokenizer = read_tokenizer(self.checkpoints[self.donor].folder, num_rows)
        if tokenizer is None:
            reason = "has no tokenizer, but the recipe asks for one to be made of it"
            raise CheckpointError(Fault(path=self.donor, reason=reason))
        return tokenizer

    def _token_faults(self) -> Iterator[Fault]:
        for token, setting in self.tokens.items():
            source = setting.source
            if source is None or isinstance(source, ZeroRow):
                continue
            place: FieldPath = ("tokenizer", "tokens", token, "source")
            model = source.model if isinstance(source, TokenRow) else source
            if model not in self.checkpoints:
                known = ", ".join(self.checkpoints)
                reason = f"expected one of the recipe's models ({known}), got {model!r}"
                yield self.recipe.fault(place, reason)
            elif isinstance(source, TokenRow) and source.token_id is not None:
                rows = self.vocabularies[model].num_rows
                if source.token_id >= rows:
                    reason = f"token_id {source.token_id} is out of range: {model} has {rows} rows"
                    yield self.recipe.fault(place, reason)
            else:
                wanted = source.token if isinstance(source, TokenRow) else token
                if wanted not in self.tokenizers[model].ids:
                    yield self.recipe.fault(place, f"{model} has no token {wanted!r}")

    def tokenizer(self, chat_template: str | None) -> OutputTokenizer:
        """The merged model's tokenizer.

        Raises:
            CheckpointError: It cannot be built.
        """
        start = self.tokenizers[self.start]
        additions = self._union(start) if self.settings.source == "union" else {}
        for token, setting in self.tokens.items():
            if token in start.ids or token in additions:
                continue
            source = [setting.source] if isinstance(setting.source, str) else []
            added = (self.tokenizers[name].added.get(token) for name in (*source, *self.tokenizers))
            additions[token] = next((matched for matched in added if matched is not None), PLAIN)
        return extend(start, additions, chat_template=chat_template)

    def _union(self, start: ModelTokenizer) -> dict[str, Mapping[str, bool]]:
        """The tokens of all models that the first one lacks: ordinary ones first, then added ones."""
        added: dict[str, Mapping[str, bool]] = {}
        unlike: dict[str, None] = {}
        for tokenizer in self.tokenizers.values():
            for token, matched in tokenizer.added.items():
                if added.setdefault(token, matched) != matched:
                    unlike[token] = None
        if unlike:
            first = "models match {} differently in texts; the first one's way is kept"
            self._note(first.format(in_words(unlike)))
        additions: dict[str, Mapping[str, bool]] = {}
        for name, tokenizer in self.tokenizers.items():
            new = [token for token in tokenizer.ids if token not in start.ids and token not in additions]
            ordinary = [token for token in new if token not in added]
            additions |= dict.fromkeys(ordinary, PLAIN)
            if new:
                note = f"{in_words(new)} of {name} added to the vocabulary of {self.start}"
                if ordinary:
                    note += (
                        f"; {in_words(ordinary)} of them, not special there, match before any other in texts"
                    )
                self._note(note)
        return additions | {token: how for token, how in added.items() if token not in start.added}

    def num_rows(self, ids: Mapping[str, int]) -> int:
        """Rows of the merged model's embedding."""
        multiple = self.settings.pad_to_multiple_of or 1
        return -(-(max(ids.values(), default=-1) + 1) // multiple) * multiple

    def aligned(self, ids: Mapping[str, int]) -> dict[str, Checkpoint]:
        """Views of the models whose rows are not yet those of the vocabulary.

        Raises:
            CheckpointError: A model has another table with rows for tokens, which cannot follow.
        """
        made: dict[str, dict[str, AlignedTensor]] = {name: {} for name in self.checkpoints}
        embeddings = {key for found in self.vocabularies.values() for key in found.embeddings}
        heads = {key for found in self.vocabularies.values() for key in found.heads}
        for keys, piece in ((embeddings, self.pieces[0]), (heads - embeddings, self.pieces[-1])):
            for key in sorted(keys):
                for model, tensor in self._align(key, piece, ids):
                    made[model][tensor.name] = tensor
        for model, found in self.vocabularies.items():
            for head, embedding in found.copies.items():
                made[model].pop(head, None)
                if embedding in made[model]:
                    made[model][head] = made[model][embedding]
        exact = self.recipe.dtype is not None or self.recipe.out_dtype is not None
        changed = {model: tensors for model, tensors in made.items() if tensors}
        for model in changed:
            self._check_config(model)
        return {
            model: AlignedCheckpoint(self.checkpoints[model], tensors, self.checkpoints, exact=exact)
            for model, tensors in changed.items()
        }

    def _align(
        self, key: str, piece: OutputSlice, ids: Mapping[str, int]
    ) -> Iterator[tuple[str, AlignedTensor]]:
        """One tensor in every model that stores it, where its rows change."""
        givers = {
            model: (found.names[key], found.axes[key])
            for model, found in self.vocabularies.items()
            if key in found.axes
        }
        members = [model for model in dict.fromkeys(s.model for s in piece.sources) if model in givers]
        own: dict[str, dict[int, int]] = {model: {} for model in givers}
        given: dict[str, dict[int, tuple[RowId, ...]]] = {model: {} for model in givers}
        zero, mean = [], []
        for token, number in ids.items():
            setting = self.tokens.get(token)
            holders = {m: row for m in givers if (row := self.tokenizers[m].ids.get(token)) is not None}
            keepers = {} if setting is not None and setting.force else holders
            if len(keepers) == len(givers):
                for model, row in keepers.items():
                    own[model][number] = row
                continue
            parts = self._parts(token, [(m, holders[m]) for m in members if m in holders], piece.base_model)
            for model in givers:
                if model in keepers:
                    own[model][number] = keepers[model]
                else:
                    given[model][number] = parts
            if any(model not in keepers for model in members):
                if not parts and not (setting is not None and isinstance(setting.source, ZeroRow)):
                    zero.append(token)
                elif len(parts) > 1:
                    mean.append(token)
        if zero:
            self._note(f"{in_words(zero)}: no model that gives {key} has them, so their rows there are zero")
        if mean:
            self._note(f"{in_words(mean)}: models without them get the mean of the others' rows of {key}")
        num_rows = self.num_rows(ids)
        for model, (name, axis) in givers.items():
            plan = RowPlan(num_rows=num_rows, own=own[model], given=given[model])
            if not plan.keeps(self.vocabularies[model].num_rows):
                yield model, AlignedTensor(name=name, axis=axis, rows=plan, others=givers)

    def _parts(self, token: str, holders: Sequence[RowId], base: str | None) -> tuple[RowId, ...]:
        """The rows whose mean a model gets that lacks the token."""
        setting = self.tokens.get(token)
        source = setting.source if setting is not None else None
        if isinstance(source, ZeroRow):
            return ()
        if isinstance(source, str):
            return ((source, self.tokenizers[source].ids[token]),)
        if isinstance(source, TokenRow):
            number = source.token_id
            if number is None:
                number = self.tokenizers[source.model].ids[str(source.token)]
            return ((source.model, number),)
        of_base = tuple(holder for holder in holders if holder[0] == base)
        return of_base or tuple(holders)

    def _check_config(self, model: str) -> None:
        config = text_config(self.checkpoints[model].config)
        others = [key for key in config if key.startswith(f"{VOCABULARY_SIZE}_")]
        if others:
            reason = f"{others[0]} tells of another table with a row per token, which cannot be changed yet"
            raise CheckpointError(Fault(path=f"{model}: config.json", reason=reason))

    def id_changes(self, ids: Mapping[str, int]) -> IdChanges:
        """What becomes of token ids in configs."""
        num_rows = self.num_rows(ids)
        fallback = None
        if self.start != self.donor:
            fallback = (self.checkpoints[self.start].config, self._moved(self.start, ids))
        return IdChanges(num_rows=num_rows, moved=self._moved(self.donor, ids), fallback=fallback)

    def _moved(self, model: str, ids: Mapping[str, int]) -> dict[int, int]:
        old = self.tokenizers[model].ids
        moved = {number: ids[token] for token, number in old.items() if token in ids}
        if model == self.start:
            # Rows without a token stay where they are, as long as they exist and no token takes their place.
            taken = {*old.values(), *ids.values()}
            moved |= {row: row for row in range(self.num_rows(ids)) if row not in taken}
        return moved

    def warnings(self, ids: Mapping[str, int]) -> tuple[Fault, ...]:
        """What was done to tokens, in words."""
        for name, tokenizer in self.tokenizers.items():
            if tokenizer.beyond:
                rows = self.vocabularies[name].num_rows
                self._note(
                    f"{in_words(tokenizer.beyond)} of {name} left out: behind its {rows} embedding rows"
                )
            dropped = [token for token in tokenizer.ids if token not in ids]
            if dropped:
                self._note(f"{in_words(dropped)} of {name} dropped, as the vocabulary asked for lacks them")
        return tuple(self.recipe.fault(self.place, note) for note in self._notes)

    def _note(self, text: str) -> None:
        self._notes[text] = None
