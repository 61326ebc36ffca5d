"""An exported recipe is an ordinary checkpoint, complete or absent."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from evomerge.checkpoints.manifest import verify_manifest
from evomerge.errors import CheckpointError, ConfigurationError, RefusedError
from evomerge.merge.config import merged_config
from evomerge.merge.export import export_model
from evomerge.merge.plan import plan_merge
from evomerge.recipe import Recipe

from .models import variant
from .test_plan import copy_embedding, two, untie
from .zoo import assert_same, merged, models, recipe, tensors

AVERAGE = "models: [{model: $one}, {model: $two}]\nmerge_method: linear\nparameters: {weight: 1}\n"
NEARSWAP = (
    "models: [{model: $one}, {model: $base}]\nbase_model: $base\nmerge_method: nearswap\nparameters: {t: 1}\n"
)
STACK = """
slices:
- sources: [{model: $one, layer_range: [0, 3]}]
- sources: [{model: $two, layer_range: [1, 4]}]
merge_method: passthrough
"""


def export(text: str, zoo: Path, out: Path, **options: int) -> Recipe:
    wanted = recipe(text, zoo)
    export_model(wanted, models(wanted), out, **options)
    return wanted


def config(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("text", [AVERAGE, STACK], ids=["average", "stack"])
def test_transformers_loads_what_the_plan_says(text: str, tiny_zoo: Path, tmp_path: Path) -> None:
    wanted = export(text, tiny_zoo, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(dict(model.state_dict()), merged(wanted), exact=True)
    assert model.dtype == torch.bfloat16
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert model(**tokenizer("abc", return_tensors="pt")).logits.isfinite().all()
    verify_manifest(tmp_path / "out")


def test_another_number_of_layers_is_written_to_the_config(tiny_zoo: Path, tmp_path: Path) -> None:
    export(STACK, tiny_zoo, tmp_path / "out")
    assert config(tmp_path / "out")["num_hidden_layers"] == 6
    assert config(tiny_zoo / "one")["num_hidden_layers"] == 4


def test_settings_per_layer_follow_the_layers(tiny_zoo: Path, tmp_path: Path) -> None:
    kinds = {"one": ["a0", "a1", "a2", "a3"], "two": ["b0", "b1", "b2", "b3"]}
    for name, values in kinds.items():
        variant(tiny_zoo / name, tmp_path / name, layer_types=values)
    wanted = recipe(STACK, tmp_path)
    sources = models(wanted)
    assert merged_config(plan_merge(wanted, sources), sources)["layer_types"] == [
        "a0",
        "a1",
        "a2",
        "b1",
        "b2",
        "b3",
    ]
    variant(tiny_zoo / "two", tmp_path / "bare")
    wanted = recipe(STACK.replace("$two", "$bare"), tmp_path)
    sources = models(wanted)
    with pytest.raises(CheckpointError, match=r"bare: config\.json: expected layer_types to be a list"):
        merged_config(plan_merge(wanted, sources), sources)


def test_a_config_that_does_not_say_its_layers_keeps_their_number(tiny_zoo: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        variant(tiny_zoo / name, tmp_path / name, num_hidden_layers=None)
    wanted = recipe(STACK, tmp_path)
    sources = models(wanted)
    with pytest.raises(CheckpointError, match="so it cannot change"):
        merged_config(plan_merge(wanted, sources), sources)
    wanted = recipe(AVERAGE, tmp_path)
    sources = models(wanted)
    assert "num_hidden_layers" not in merged_config(plan_merge(wanted, sources), sources)


@pytest.mark.parametrize(
    ("types", "expected"), [("", "bfloat16"), ("dtype: float32\nout_dtype: float16\n", "float16")]
)
def test_the_config_names_the_type_of_the_weights(
    tiny_zoo: Path, tmp_path: Path, types: str, expected: str
) -> None:
    export(AVERAGE + types, tiny_zoo, tmp_path / "out")
    assert {str(tensor.dtype) for tensor in tensors(tmp_path / "out").values()} == {f"torch.{expected}"}
    assert config(tmp_path / "out")["dtype"] == expected


def test_the_recipe_goes_along_and_makes_the_same_model_again(tiny_zoo: Path, tmp_path: Path) -> None:
    wanted = export(AVERAGE + "evomerge: {seed: 5}\n", tiny_zoo, tmp_path / "out")
    again = Recipe.read(tmp_path / "out" / "mergekit_config.yml")
    assert again == wanted
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"- `{tiny_zoo}/one`; states no licence\n- `{tiny_zoo}/two`; states no licence\n" in card
    front, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert wanted.to_yaml() in body


def test_large_models_are_sharded_with_an_index(tiny_zoo: Path, tmp_path: Path) -> None:
    wanted = export(AVERAGE, tiny_zoo, tmp_path / "out", shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    assert_same(tensors(tmp_path / "out"), merged(wanted), exact=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(dict(model.state_dict()), merged(wanted), exact=True)


@pytest.mark.parametrize("text", [AVERAGE, NEARSWAP], ids=["native", "by torch"])
def test_progress_counts_bytes(
    text: str, tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evomerge.merge.memory.BUFFER_BYTES", 8192)
    wanted, seen = recipe(text, tiny_zoo), []
    export_model(
        wanted, models(wanted), tmp_path / "out", progress=lambda done, total: seen.append((done, total))
    )
    total = sum(tensor.nbytes for tensor in tensors(tmp_path / "out").values())
    assert {of for _, of in seen} == {total}
    steps = [done - before for (before, _), (done, _) in itertools.pairwise([(0, total), *seen])]
    assert len(steps) > 5
    assert all(0 < step <= 8192 for step in steps)
    assert seen[-1] == (total, total)


def test_models_without_generation_config_or_tokenizer_are_exported(tiny_zoo: Path, tmp_path: Path) -> None:
    bare = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
    for name in ("one", "two"):
        variant(tiny_zoo / name, tmp_path / name, remove=bare)
    export(AVERAGE, tmp_path, tmp_path / "out")
    assert not any((tmp_path / "out" / name).exists() for name in bare)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_tied_models_export_one_matrix_and_load_tied(tiny_zoo: Path, tmp_path: Path) -> None:
    one = variant(tiny_zoo / "one", tmp_path / "one", change=untie, tie_word_embeddings=True)
    copied = variant(tiny_zoo / "two", tmp_path / "two", change=copy_embedding, tie_word_embeddings=True)
    wanted = export(two(one, copied), tiny_zoo, tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, merged(wanted)["model.embed_tokens.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(
    tiny_zoo: Path, tmp_path: Path
) -> None:
    odd = variant(tiny_zoo / "one", tmp_path / "odd", tie_word_embeddings=True)
    with pytest.raises(
        CheckpointError, match=rf"{odd}: config\.json ties lm_head\.weight to .*, but they differ"
    ):
        export(f"models: [{{model: {odd}}}]\nmerge_method: passthrough\n", tiny_zoo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Refusals leave nothing behind.


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_source_that_is_not_finite_is_named_and_nothing_is_written(
    tiny_zoo: Path, tmp_path: Path, bad: float
) -> None:
    def spoil(state: dict[str, Tensor]) -> None:
        state["model.norm.weight"][0] = bad

    spoilt = variant(tiny_zoo / "one", tmp_path / "spoilt", change=spoil)
    (tmp_path / "results").mkdir()
    with pytest.raises(
        CheckpointError,
        match=rf"model\.norm\.weight: the merged tensor holds NaN or infinity, as {spoilt} does: element 0 of "
        rf"model\.norm\.weight in {spoilt}/model\.safetensors is {bad}",
    ):
        export(two(spoilt, tiny_zoo / "two"), tiny_zoo, tmp_path / "results" / "out")
    assert list((tmp_path / "results").iterdir()) == []


def test_overflow_in_the_output_type_is_refused(tiny_zoo: Path, tmp_path: Path) -> None:
    text = "models: [{model: $one, parameters: {scale: 1e6}}]\nmerge_method: passthrough\n"
    export(text, tiny_zoo, tmp_path / "fits")
    with pytest.raises(CheckpointError, match="though the sources do not: the merge overflowed float16"):
        export(text + "out_dtype: float16\n", tiny_zoo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RefusedError):
        export(AVERAGE, tiny_zoo, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


# Tokenizers.


def relabelled(zoo: Path, folder: Path) -> Path:
    variant(zoo / "two", folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_differing_vocabularies_are_refused_with_examples(tiny_zoo: Path, tmp_path: Path) -> None:
    other = relabelled(tiny_zoo, tmp_path / "other")
    with pytest.raises(CheckpointError, match=f"{other}: its vocabulary differs .*'a'.* sources must share"):
        export(two(tiny_zoo / "one", other), tiny_zoo, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["base", "union", "$two", "$nowhere"])
def test_the_tokenizer_comes_from_the_model_asked_for(tiny_zoo: Path, tmp_path: Path, source: str) -> None:
    marked = variant(tiny_zoo / "two", tmp_path / "two")
    (marked / "special_tokens_map.json").write_text("{}")
    variant(tiny_zoo / "one", tmp_path / "one")
    text = AVERAGE + f"tokenizer_source: {source}\n"
    if source == "$nowhere":
        with pytest.raises(ConfigurationError, match="expected base, union or one of the recipe's models"):
            export(text, tmp_path, tmp_path / "out")
        return
    export(text, tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "special_tokens_map.json").exists() == (source == "$two")


def test_a_chat_template_of_the_recipe_replaces_the_donors(tiny_zoo: Path, tmp_path: Path) -> None:
    variant(tiny_zoo / "one", tmp_path / "one")
    variant(tiny_zoo / "two", tmp_path / "two")
    (tmp_path / "one" / "chat_template.jinja").write_text("old {{ messages }}")
    export(AVERAGE, tmp_path, tmp_path / "kept")
    export(AVERAGE + "chat_template: 'new {{ messages }}'\n", tmp_path, tmp_path / "out")
    assert (tmp_path / "kept" / "chat_template.jinja").read_text() == "old {{ messages }}"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "new {{ messages }}"


def test_models_of_other_vocabularies_are_merged_when_the_recipe_says_how(
    tiny_zoo: Path, tmp_path: Path
) -> None:
    other = relabelled(tiny_zoo, tmp_path / "other")
    text = two(tiny_zoo / "one", other) + "tokenizer_source: base\n"
    export(text, tiny_zoo, tmp_path / "out", memory_budget=2**24)
    export(two(tiny_zoo / "one", tiny_zoo / "two"), tiny_zoo, tmp_path / "plain")
    found, plain = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    name = "model.embed_tokens.weight"
    (a, b) = (2, 3)  # the ids that `relabelled` exchanges
    assert not torch.equal(found[name][a], plain[name][a])
    assert torch.equal(found[name][b + 1 :], plain[name][b + 1 :])
    words = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert words == json.loads((tiny_zoo / "one" / "tokenizer.json").read_text())["model"]["vocab"]


def test_token_ids_of_the_generation_config_follow_the_vocabulary(tiny_zoo: Path, tmp_path: Path) -> None:
    content = json.loads((tiny_zoo / "two" / "tokenizer.json").read_text())
    words = content["model"]["vocab"]
    words["<eos>"], words["b"] = words["b"], words["<eos>"]
    for token in content["added_tokens"]:
        if token["content"] == "<eos>":
            token["id"] = words["<eos>"]
    other = variant(tiny_zoo / "two", tmp_path / "other", eos_token_id=words["<eos>"])
    (other / "tokenizer.json").write_text(json.dumps(content))
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": words["<eos>"], "top_k": 3}))
    text = f"models: [{{model: {other}}}, {{model: $one}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"
    export(text + "tokenizer_source: $one\n", tiny_zoo, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written == {"eos_token_id": 1, "top_k": 3}
    assert config(tmp_path / "out")["eos_token_id"] == 1


# Devices.


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(tiny_zoo: Path, tmp_path: Path, device: str) -> None:
    wanted = recipe(AVERAGE, tiny_zoo)
    with pytest.raises(ConfigurationError, match=rf"--device: .* got '{device}'"):
        export_model(wanted, models(wanted), tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()
