"""Vocabularies are brought together as mergekit does it, token by token, and nothing is lost silently."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.tokenizer_build import PLAIN, extend, read_tokenizer
from evomerge.checkpoints.writer import CheckpointWriter
from evomerge.errors import CheckpointError, ConfigurationError
from evomerge.merge.check import check_recipe
from evomerge.merge.config import merged_config
from evomerge.merge.execute import merge_tensor
from evomerge.merge.export import export_model
from evomerge.merge.plan import plan_merge
from evomerge.merge.vocabulary import AlignedModels, align_vocabularies
from evomerge.recipe import Recipe
from tests.merge.models import variant
from tests.merge.zoo import by_mergekit, recipe, ulps
from tests.merge.zoo import models as opened
from tests.tiny import make_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

TOKENS = {
    "base": (["<pad>", "<eos>", "a", "b", "c", "d", "ab"], {"<x>": True}),
    "one": (["<pad>", "<eos>", "d", "c", "e", "f", "b", "de"], {"<im_start>": True, "<y>": False}),
    "two": (["<eos>", "<pad>", "e", "g", "a", "d"], {"<im_start>": False}),
}
"""Model -> ordinary tokens, and added ones with whether they are special; no two models number them alike."""

UNION = {token for ordinary, added in TOKENS.values() for token in (*ordinary, *added)}

LINEAR = """\
models:
  - {model: $base, parameters: {weight: 0.5}}
  - {model: $one, parameters: {weight: 0.3}}
  - {model: $two, parameters: {weight: 0.2}}
merge_method: linear
dtype: float32
"""
TASK = """\
models:
  - {model: $one, parameters: {weight: 0.6}}
  - {model: $two, parameters: {weight: 0.7}}
merge_method: task_arithmetic
base_model: $base
dtype: float32
"""
SLICES = """\
slices:
  - sources:
      - {model: $base, layer_range: [0, 2]}
      - {model: $one, layer_range: [0, 2]}
  - sources:
      - {model: $one, layer_range: [2, 4]}
      - {model: $two, layer_range: [2, 4]}
merge_method: linear
parameters: {weight: 0.5}
dtype: float32
"""


def tokenizer(ordinary: Iterable[str], added: Mapping[str, bool], *, kind: str = "BPE") -> Any:
    ids = {token: number for number, token in enumerate(ordinary)}
    merges = [(token[0], token[1]) for token in ids if len(token) == 2]
    made = Tokenizer(models.BPE(ids, merges) if kind == "BPE" else models.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s"), "removed")
    made.decoder = decoders.Fuse()
    for token, special in added.items():
        made.add_tokens([AddedToken(token, special=special, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model(
    folder: Path,
    *,
    seed: int,
    ordinary: Iterable[str],
    added: Mapping[str, bool],
    spare: int = 0,
    kind: str = "BPE",
    **config: Any,
) -> Path:
    """A tiny model with a tokenizer of its own and `spare` rows without a token."""
    made = tokenizer(ordinary, added, kind=kind)
    ids = made.get_vocab()
    settings = {"vocab_size": len(ids) + spare, "pad_token_id": ids["<pad>"], "eos_token_id": ids["<eos>"]}
    make_model(folder, seed=seed, **{"dtype": "float32", **settings, **config})
    made.save_pretrained(folder)
    return folder


def make_zoo(folder: Path, **options: Any) -> Path:
    for seed, (name, (ordinary, added)) in enumerate(TOKENS.items()):
        model(folder / name, seed=seed, ordinary=ordinary, added=added, **options)
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_zoo(tmp_path_factory.mktemp("vocabularies"))


def aligned(wanted: Recipe) -> AlignedModels:
    check_recipe(wanted)
    return align_vocabularies(wanted, opened(wanted))


def merge(wanted: Recipe, out: Path) -> dict[str, Tensor]:
    """Write the merged model to a folder."""
    found = aligned(wanted)
    plan = plan_merge(wanted, found.checkpoints)
    tensors = {tensor.name: merge_tensor(tensor, found.checkpoints) for tensor in plan.tensors}
    with CheckpointWriter(out) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.add_json("config.json", found.config_changes(merged_config(plan, found.checkpoints)))
        found.write_tokenizer(writer)
        writer.commit()
    return tensors


def warnings(wanted: Recipe) -> str:
    return "\n".join(str(fault) for fault in aligned(wanted).warnings)


def vocabulary(folder: Path) -> dict[str, int]:
    ids: dict[str, int] = AutoTokenizer.from_pretrained(folder).get_vocab()
    return ids


def close(mine: Tensor, other: Tensor) -> bool:
    near = (mine.double() - other.double()).abs() <= 4e-7
    return mine.dtype == other.dtype and bool((near | (ulps(mine, other) <= 1)).all())


def assert_as_mergekit(wanted: Recipe, folder: Path) -> dict[str, Tensor]:
    """Same tokens, the same rows for each of them, the same rows behind them, and the same other tensors."""
    ours, theirs = merge(wanted, folder / "ours"), by_mergekit(wanted, folder / "theirs")
    ids, their_ids = vocabulary(folder / "ours"), vocabulary(folder / "theirs")
    assert ids.keys() == their_ids.keys()
    assert ours.keys() == theirs.keys()
    for name, mine in ours.items():
        other = theirs[name]
        assert mine.shape == other.shape, name
        if name not in (EMBEDDING, HEAD):
            assert close(mine, other), name
            continue
        for token, number in ids.items():
            assert close(mine[number], other[their_ids[token]]), (name, token)
        assert close(mine[len(ids) :], other[len(ids) :]), name
    config, their_config = (
        json.loads((folder / of / "config.json").read_text()) for of in ("ours", "theirs")
    )
    assert config["vocab_size"] == their_config["vocab_size"] == ours[EMBEDDING].shape[0]
    return ours


# The same as mergekit.


# Without base_model, mergekit's base is any of the models.
@pytest.mark.parametrize(
    ("form", "source"),
    [
        *((form, source) for form in (LINEAR, TASK, SLICES) for source in ("union", "$one", "$two")),
        (TASK, "base"),
    ],
)
def test_rows_follow_the_chosen_vocabulary_as_in_mergekit(
    zoo: Path, tmp_path: Path, form: str, source: str
) -> None:
    wanted = recipe(f"{form}tokenizer_source: {source}\n", zoo)
    assert_as_mergekit(wanted, tmp_path)
    expected = UNION if source == "union" else {*TOKENS[source.strip("$")][0], *TOKENS[source.strip("$")][1]}
    assert vocabulary(tmp_path / "ours").keys() == expected


@pytest.mark.parametrize("kind", ["BPE", "WordLevel"])
@pytest.mark.parametrize("tied", [True, False])
def test_types_padding_and_tied_heads_are_as_in_mergekit(tmp_path: Path, tied: bool, kind: str) -> None:
    zoo = make_zoo(tmp_path / "zoo", kind=kind, tie_word_embeddings=tied, dtype="bfloat16")
    text = TASK + "out_dtype: bfloat16\ntokenizer: {source: union, pad_to_multiple_of: 16}\n"
    tensors = assert_as_mergekit(recipe(text, zoo), tmp_path)
    assert (HEAD in tensors) == (not tied)
    assert tensors[EMBEDDING].shape[0] == 16
    assert len(UNION) == 14


TOKEN_SETTINGS = {
    "of another model": "e: {source: $two}",
    "of another model, forced": "d: {source: $one, force: true}",
    "zero": "e: {source: {kind: zero}}",
    "zero, forced": "a: {source: {kind: zero}, force: true}",
    "another token": "f: {source: {kind: model_token, model: $base, token: b}}",
    "another token, forced": "c: {source: {kind: model_token, model: $two, token: g}, force: true}",
    "a number": "g: {source: {kind: model_token, model: $one, token_id: 3}}",
    "a number, forced": "b: {source: {kind: model_token, model: $one, token_id: 3}, force: true}",
    "a new token": "<new>: {source: {kind: model_token, model: $base, token: <x>}}",
    "a new zero": "<new>: {source: {kind: zero}}",
}


@pytest.mark.parametrize("line", TOKEN_SETTINGS.values(), ids=TOKEN_SETTINGS)
def test_settings_of_tokens_are_as_in_mergekit(zoo: Path, tmp_path: Path, line: str) -> None:
    assert_as_mergekit(recipe(f"{TASK}tokenizer:\n  source: union\n  tokens:\n    {line}\n", zoo), tmp_path)


def test_a_token_can_be_added_to_the_vocabulary_of_a_model(zoo: Path, tmp_path: Path) -> None:
    text = TASK + "tokenizer:\n  source: SOURCE\n  tokens:\n    <x>: {source: $base}\n    f: {source: $one}\n"
    assert_as_mergekit(recipe(text.replace("SOURCE", "$two"), zoo), tmp_path)
    assert vocabulary(tmp_path / "ours")["<x>"] == 7
    # As in the model that has it; mergekit adds an ordinary token.
    added = AutoTokenizer.from_pretrained(tmp_path / "ours").added_tokens_decoder
    assert added[7].special
    assert not added[8].special
    # mergekit fails at this: its output vocabulary is the base's own one.
    tensors = merge(recipe(text.replace("SOURCE", "base"), zoo), tmp_path / "base")
    assert tensors[EMBEDDING].shape[0] == 9
    assert vocabulary(tmp_path / "base")["f"] == 8


def test_tokens_without_a_row_are_left_out_as_in_mergekit(zoo: Path, tmp_path: Path) -> None:
    base = model(tmp_path / "base", seed=0, ordinary=TOKENS["base"][0], added={"<x>": True}, spare=-1)
    for name in ("one", "two"):
        shutil.copytree(zoo / name, tmp_path / name)
    wanted = recipe(TASK + "tokenizer_source: union\n", tmp_path)
    assert_as_mergekit(wanted, tmp_path)
    assert "<x>" not in vocabulary(tmp_path / "ours")
    assert f"1 token ('<x>') of {base} left out: behind its 7 embedding rows" in warnings(wanted)


def test_models_that_differ_only_in_spare_rows_are_merged(tmp_path: Path) -> None:
    ordinary, added = TOKENS["base"]
    for seed, name in enumerate(TOKENS):
        model(tmp_path / name, seed=seed, ordinary=ordinary, added=added, spare=4 * seed)
    with pytest.raises(CheckpointError) as caught:
        aligned(recipe(TASK, tmp_path))
    for expected in (EMBEDDING, "[8, 32]", "[12, 32]", "[16, 32]", "tokenizer_source"):
        assert expected in str(caught.value)
    tensors = assert_as_mergekit(recipe(TASK + "tokenizer_source: base\n", tmp_path), tmp_path)
    assert tensors[EMBEDDING].shape[0] == 8


# Beyond mergekit.


def test_the_union_is_numbered_by_the_base_then_in_the_recipes_order(zoo: Path, tmp_path: Path) -> None:
    swapped = LINEAR.replace("$base", "$other").replace("$two", "$base").replace("$other", "$two")
    merge(recipe(swapped + "tokenizer_source: union", zoo), tmp_path / "out")
    ids = vocabulary(tmp_path / "out")
    ordered = ["<eos>", "<pad>", "e", "g", "a", "d", "<im_start>"]
    ordered += ["c", "f", "b", "de", "ab", "<y>", "<x>"]
    assert sorted(ids, key=lambda token: ids[token]) == ordered


def test_token_ids_in_configs_follow_their_tokens(zoo: Path, tmp_path: Path) -> None:
    changed = aligned(recipe(TASK + "tokenizer_source: $two\n", zoo))
    config = {"vocab_size": 8, "pad_token_id": 0, "eos_token_id": [1, 7], "bos_token_id": None}
    assert changed.config_changes(config) == {
        "vocab_size": 7,
        "pad_token_id": 1,
        "eos_token_id": [0],
        "bos_token_id": None,
    }
    assert changed.config_changes({"text_config": config, "decoder_start_token_id": -1, "n": 3}) == {
        "text_config": changed.config_changes(config),
        "decoder_start_token_id": -1,
        "n": 3,
    }
    # What the base's eos, <x>, is unknown to the vocabulary, that of the model that gives it counts.
    other = {"eos_token_id": 7, "mask_token_id": 7}
    assert changed.config_changes(other) == {"eos_token_id": 0, "mask_token_id": None}


def test_ids_of_spare_rows_stay_while_the_rows_are_there_and_free(zoo: Path, tmp_path: Path) -> None:
    ordinary, added = TOKENS["base"]
    model(tmp_path / "base", seed=0, ordinary=ordinary, added=added, spare=16)
    for name in ("one", "two"):
        shutil.copytree(zoo / name, tmp_path / name)
    changed = aligned(recipe(TASK + "tokenizer: {source: union, pad_to_multiple_of: 16}", tmp_path))
    assert len(changed.tokenizer.ids) == 14
    config = {"pad_token_id": 15, "mask_token_id": 8, "sep_token_id": 20}
    assert changed.config_changes(config) == {"pad_token_id": 15, "mask_token_id": None, "sep_token_id": None}


def test_lost_token_ids_are_told(zoo: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(zoo / name, tmp_path / name)
    variant(zoo / "base", tmp_path / "base", eos_token_id=7)
    found = warnings(recipe(TASK + "tokenizer_source: $two\n", tmp_path))
    assert (
        f"config of {tmp_path}/base: eos_token_id: the merged vocabulary lacks token 7; it is now 0" in found
    )


def test_nothing_happens_to_models_that_agree(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        shutil.copytree(zoo / "base", tmp_path / name)
    (tmp_path / "base" / "merges.txt").write_text("kept")
    wanted = recipe(TASK + "tokenizer_source: union\n", tmp_path)
    sources = opened(wanted)
    found = align_vocabularies(wanted, sources)
    assert all(found.checkpoints[name] is sources[name] for name in sources)
    assert found.warnings == ()
    merge(wanted, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "merges.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()


def test_the_same_tokens_in_another_order_are_put_in_order(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "base", tmp_path / "base")
    ordinary, added = TOKENS["base"]
    for name in ("one", "two"):
        model(tmp_path / name, seed=1, ordinary=[*ordinary[:2], *reversed(ordinary[2:])], added=added)
    found = aligned(recipe(TASK + "tokenizer_source: union\n", tmp_path))
    ours = found.checkpoints[f"{tmp_path}/one"].tensor(EMBEDDING)
    stored = Checkpoint.open(tmp_path / "one").tensor(EMBEDDING)
    assert torch.equal(ours, stored[[0, 1, 6, 5, 4, 3, 2, 7]])


def test_what_was_done_to_tokens_is_told(zoo: Path) -> None:
    found = warnings(recipe(TASK + "tokenizer_source: union\n", zoo))
    assert "5 tokens ('e', 'f', 'de', ...)" in found
    assert "1 token ('<im_start>'): models match" not in found
    assert "models match 1 token ('<im_start>') differently in texts" in found
    assert "2 tokens ('e', '<im_start>'): models without them get the mean" in found
    dropped = warnings(recipe(TASK + "tokenizer_source: base\n", zoo))
    assert f"5 tokens ('e', 'f', 'de', ...) of {zoo}/one dropped" in dropped
    assert f"3 tokens ('e', 'g', '<im_start>') of {zoo}/two dropped" in dropped
    stacked = warnings(recipe(SLICES + "tokenizer_source: union\n", zoo))
    assert f"1 token ('g'): no model that gives {EMBEDDING} has them, so their rows there are zero" in stacked
    assert f"3 tokens ('a', 'ab', '<x>'): no model that gives {HEAD}" not in stacked
    assert f"2 tokens ('ab', '<x>'): no model that gives {HEAD}" in stacked


def test_differing_vocabularies_are_refused_without_a_source(zoo: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer_source: union") as caught:
        aligned(recipe(TASK, zoo))
    assert f"{zoo}/one: its vocabulary differs from that of {zoo}/base" in str(caught.value)


def test_a_view_has_the_interface_of_the_model(zoo: Path) -> None:
    wanted = recipe(TASK + "tokenizer_source: union\n", zoo)
    sources = opened(wanted)
    found = align_vocabularies(wanted, sources)
    name = f"{zoo}/one"
    view, inner = found.checkpoints[name], sources[name]
    assert view is not inner
    assert isinstance(view, Checkpoint)
    assert view.tensors[EMBEDDING].shape == (14, 32)
    assert view.tensor(EMBEDDING).shape == (14, 32)
    assert view.tensor(EMBEDDING) is view.tensor(EMBEDDING)
    assert view.content_hash() != inner.content_hash()
    assert view.content_hash() == align_vocabularies(wanted, sources).checkpoints[name].content_hash()
    hashes = {view.content_hash(), inner.content_hash()}
    for token, source in (("a", "$two"), ("a", "$base"), ("c", "$base")):
        row = f"{{kind: model_token, model: {source}, token_id: 2}}"
        text = TASK + f"tokenizer:\n  tokens:\n    {token}: {{source: {row}}}\n"
        hashes.add(align_vocabularies(recipe(text, zoo), sources).checkpoints[name].content_hash())
    # The base's row 2 is that of a already, and `one` has c: the last two change nothing.
    assert len(hashes) == 3
    view.prefetch(EMBEDDING)
    view.prefetch("model.norm.weight")
    view.release(EMBEDDING)
    assert torch.equal(view.tensor("model.norm.weight"), inner.tensor("model.norm.weight"))
    assert view.nbytes - inner.nbytes == 2 * (14 - 10) * 32 * 4


def test_a_stored_copy_of_the_embedding_stays_a_copy(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        make = {"change": lambda state: state.update({HEAD: state[EMBEDDING].clone()})}
        variant(zoo / name, tmp_path / name, tie_word_embeddings=True, **make)
    found = aligned(recipe(TASK + "tokenizer_source: union\n", tmp_path))
    for checkpoint in found.checkpoints.values():
        assert torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING))
    plan = plan_merge(recipe(TASK, tmp_path), found.checkpoints)
    assert HEAD not in {tensor.name for tensor in plan.tensors}


@pytest.mark.parametrize("rest", ["", "dtype: float32\nout_dtype: bfloat16\n"])
def test_means_are_computed_in_float32(tmp_path: Path, rest: str) -> None:
    zoo = make_zoo(tmp_path / "zoo", dtype="bfloat16")
    wanted = recipe(TASK.replace("dtype: float32\n", rest) + "tokenizer_source: union\n", zoo)
    found = aligned(wanted)
    base = found.checkpoints[f"{zoo}/base"]
    one, two = (Checkpoint.open(zoo / name).tensor(EMBEDDING) for name in ("one", "two"))
    mean = (one[4].float() + two[2].float()) / 2
    expected = mean if rest else mean.bfloat16()
    row = base.tensor(EMBEDDING)[found.tokenizer.ids["e"]]
    assert row.dtype == expected.dtype
    assert base.tensors[EMBEDDING].dtype == ("F32" if rest else "BF16")
    assert torch.equal(row, expected)


def test_models_of_different_types_keep_their_rows(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "one", tmp_path / "one")
    shutil.copytree(zoo / "two", tmp_path / "two")
    ordinary, added = TOKENS["base"]
    model(tmp_path / "base", seed=0, ordinary=ordinary, added=added, dtype="bfloat16")
    found = aligned(recipe(TASK.replace("dtype: float32\n", "") + "tokenizer_source: union\n", tmp_path))
    row = found.checkpoints[f"{tmp_path}/base"].tensor(EMBEDDING)[found.tokenizer.ids["f"]]
    assert torch.equal(row, Checkpoint.open(zoo / "one").tensor(EMBEDDING)[5])


# The tokenizer that is written.


def test_the_merged_model_reads_and_writes_all_tokens(zoo: Path, tmp_path: Path) -> None:
    wanted = recipe(TASK + "tokenizer: {source: union, pad_to_multiple_of: 8}\n", zoo)
    merge(wanted, tmp_path / "out")
    made = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "ab<im_start>g<x>de"
    assert made.convert_ids_to_tokens(made(text).input_ids) == ["ab", "<im_start>", "g", "<x>", "de"]
    assert made.decode(made(text).input_ids, skip_special_tokens=True) == "abgde"
    assert (made.pad_token, made.eos_token) == ("<pad>", "<eos>")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.config.vocab_size == 16
    assert merged.config.eos_token_id == made.eos_token_id
    output = merged.generate(**made("ab", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert output.shape[1] > 1
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_files_that_state_the_old_vocabulary_are_not_written(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        shutil.copytree(zoo / name, tmp_path / name)
    base = tmp_path / "base"
    for name in ("merges.txt", "added_tokens.json"):
        (base / name).write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    special = {"eos_token": "<eos>", "additional_special_tokens": ["<x>", "<gone>"], "cls_token": "<gone>"}
    (base / "special_tokens_map.json").write_text(json.dumps(special))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    decoder = {"7": {"content": "<x>", "special": True, "normalized": False}}
    settings |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    merge(recipe(TASK + "tokenizer_source: union\n", tmp_path), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"merges.txt", "added_tokens.json"}
    assert names >= {"chat_template.jinja", "special_tokens_map.json"}
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "Qwen2Tokenizer"
    decoder = AutoTokenizer.from_pretrained(zoo / "base").added_tokens_decoder
    assert [*decoder] == [0, 1, 7]
    listed = {number: entry["content"] for number, entry in written["added_tokens_decoder"].items()}
    assert listed.keys() == {"0", "1", *map(str, range(7, 14))}
    assert (listed["7"], listed["8"]) == ("<x>", "e")
    kept = json.loads((tmp_path / "out" / "special_tokens_map.json").read_text())
    assert kept == {"eos_token": "<eos>", "additional_special_tokens": ["<x>"]}


def test_special_tokens_without_a_row_do_not_come_back_on_loading(zoo: Path, tmp_path: Path) -> None:
    """Published models often have a padding token that their embedding has no row for."""
    ordinary, added = TOKENS["base"]
    base = model(tmp_path / "base", seed=0, ordinary=ordinary, added=added)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "[PAD]", "extra_special_tokens": ["<x>", "[MORE]"]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    assert vocabulary(base)["[PAD]"] == 8
    for name in ("one", "two"):
        shutil.copytree(zoo / name, tmp_path / name)
    wanted = recipe(TASK + "tokenizer_source: union\n", tmp_path)
    tensors = merge(wanted, tmp_path / "out")
    assert vocabulary(tmp_path / "out").keys() == UNION
    assert tensors[EMBEDDING].shape[0] == len(UNION)
    assert "2 tokens ('[PAD]', '[MORE]') of" in warnings(wanted)


def sentencepiece_like(kind: str, vocabulary: list[str]) -> Tokenizer:
    if kind == "Unigram":
        return Tokenizer(models.Unigram([(token, -1.0) for token in vocabulary], unk_id=0))
    ids = {token: number for number, token in enumerate(vocabulary)}
    if kind == "WordPiece":
        return Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    merges = [("a", "b"), ("ab", "c"), ("c", "d")]
    return Tokenizer(models.BPE(ids, merges) if kind == "BPE" else models.WordLevel(ids, unk_token="<unk>"))


@pytest.mark.parametrize("kind", ["BPE", "WordLevel", "WordPiece", "Unigram"])
def test_every_kind_of_tokenizer_can_lose_tokens_without_a_row(tmp_path: Path, kind: str) -> None:
    words = ["<unk>", "a", "b", "c", "d", "ab", "abc", "cd"]
    PreTrainedTokenizerFast(tokenizer_object=sentencepiece_like(kind, words)).save_pretrained(tmp_path)
    found = read_tokenizer(tmp_path, 6)
    assert found is not None
    assert found.beyond == ("abc", "cd")
    made = extend(found, {"<n>": PLAIN}, chat_template=None)
    assert made.ids == {**{token: number for number, token in enumerate(words[:6])}, "<n>": 6}


def test_ids_with_gaps_are_refused_rather_than_mixed_up(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_like("WordLevel", ["<unk>", "a", "b"])
    ).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["b"] = 7
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = read_tokenizer(tmp_path, 8)
    assert found is not None
    with pytest.raises(CheckpointError, match=r"ids are not 0, 1, 2, .* '<n>' would become 3, not 8"):
        extend(found, {"<n>": PLAIN}, chat_template=None)


def test_a_tokenizer_without_tokenizer_json_is_converted(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        shutil.copytree(zoo / name, tmp_path / name)
    base = tmp_path / "base"
    content = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "vocab.json").write_text(json.dumps({**content["vocab"], "<|endoftext|>": 7}))
    (base / "merges.txt").write_text("#version: 0.2\na b\n")
    (base / "tokenizer.json").unlink()
    (base / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    merge(recipe(TASK + "tokenizer_source: union\n", tmp_path), tmp_path / "out")
    ids = vocabulary(tmp_path / "out")
    assert (ids["ab"], ids["<|endoftext|>"]) == (6, 7)
    assert ids.keys() == {*UNION - {"<x>"}, "<|endoftext|>"}
    assert not (tmp_path / "out" / "merges.txt").exists()


# Bad input.


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (
            "tokenizer_source: nowhere",
            r":7: tokenizer_source: expected base, union or one of the recipe's mod",
        ),
        ("tokenizer: {source: nowhere}", r":7: tokenizer\.source: expected base, union or one of the recipe"),
        (
            "tokenizer:\n  tokens:\n    e: {source: nowhere}",
            r":9: tokenizer\.tokens\.e\.source: expected one of",
        ),
        (
            "tokenizer:\n  tokens:\n    e: {source: {kind: model_token, model: m, token: a}}",
            r":9: tokenizer\.tokens\.e\.source: expected one of the recipe's models \(.*\), got 'm'",
        ),
        (
            "tokenizer:\n  tokens:\n    e: {source: {kind: model_token, model: $one, token: z}}",
            r"tokenizer\.tokens\.e\.source: .*/one has no token 'z'",
        ),
        (
            "tokenizer:\n  tokens:\n    e: {source: {kind: model_token, model: $one, token_id: 10}}",
            r"tokenizer\.tokens\.e\.source: token_id 10 is out of range: .*/one has 10 rows",
        ),
        (
            "tokenizer:\n  tokens:\n    e: {source: $base}",
            r"tokenizer\.tokens\.e\.source: .*/base has no token 'e'",
        ),
    ],
)
def test_models_and_tokens_that_do_not_exist_are_named_with_their_line(
    zoo: Path, text: str, fault: str
) -> None:
    wanted = Recipe.from_yaml((TASK + text).replace("$", f"{zoo}/"), file="r.yml")
    with pytest.raises(ConfigurationError, match=fault):
        aligned(wanted)


def test_a_model_without_tokenizer_counts_as_the_base(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        shutil.copytree(zoo / "base", tmp_path / name)
    (tmp_path / "one" / "tokenizer.json").unlink()
    (tmp_path / "one" / "tokenizer_config.json").unlink()
    wanted = recipe(TASK + "tokenizer_source: union\n", tmp_path)
    assert (
        f"{tmp_path}/one has no tokenizer; its tokens are taken to be those of {tmp_path}/base"
        in warnings(wanted)
    )
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="base: has no tokenizer, but the recipe asks for one"):
        aligned(wanted)


def test_a_config_at_odds_with_the_embedding_is_refused(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        variant(zoo / name, tmp_path / name, vocab_size=5)
    with pytest.raises(
        CheckpointError, match=r"vocab_size to be the number of rows .* got 5; found .*embed_tokens"
    ):
        aligned(recipe(TASK + "tokenizer_source: union\n", tmp_path))


def test_a_second_table_of_tokens_is_refused(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        variant(zoo / name, tmp_path / name, vocab_size_per_layer_input=8)
    with pytest.raises(CheckpointError, match="vocab_size_per_layer_input tells of another table"):
        aligned(recipe(TASK + "tokenizer_source: union\n", tmp_path))


def test_an_export_has_the_vocabulary_everywhere(zoo: Path, tmp_path: Path) -> None:
    for name in TOKENS:
        shutil.copytree(zoo / name, tmp_path / name)
    generation = {"eos_token_id": [1, 7], "pad_token_id": 0, "temperature": 0.5}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    wanted = recipe(TASK + "tokenizer_source: $two\n", tmp_path)
    export_model(wanted, opened(wanted), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": [0], "pad_token_id": 1, "temperature": 0.5}
    exported = Checkpoint.open(tmp_path / "out")
    assert {name: exported.config[name] for name in ("vocab_size", "eos_token_id", "pad_token_id")} == {
        "vocab_size": 7,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    expected = merge(wanted, tmp_path / "expected")
    for name in (EMBEDDING, HEAD):
        assert close(exported.tensor(name), expected[name])
    assert vocabulary(tmp_path / "out") == vocabulary(tmp_path / "two")
