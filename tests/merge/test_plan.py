"""Plans: which tensors are made of which, and why models do not fit together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from evomerge.errors import CheckpointError, ConfigurationError
from evomerge.merge.execute import merge_tensor
from evomerge.merge.plan import plan_merge

from .models import variant
from .zoo import merged, models, plan, recipe, tensor_plan, tensors

AVERAGE = "models: [{model: $one}, {model: $two}]\nmerge_method: linear\nparameters: {weight: 1}\n"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def two(a: Path, b: Path) -> str:
    return f"models: [{{model: {a}}}, {{model: {b}}}]\nmerge_method: linear\nparameters: {{weight: 1}}\n"


def refusal(text: str, zoo: Path) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        plan(text, zoo)
    return [str(fault) for fault in caught.value.faults]


def test_every_tensor_of_the_models_is_planned(tiny_zoo: Path) -> None:
    found = plan(AVERAGE, tiny_zoo)
    assert [tensor.name for tensor in found.tensors] == sorted(tensors(tiny_zoo / "one"))
    assert found.num_layers == 4
    assert found.donor == f"{tiny_zoo}/one"
    assert {tensor.dtype for tensor in found.tensors} == {"bfloat16"}


@pytest.mark.parametrize(
    ("types", "expected"),
    [("", "bfloat16"), ("dtype: float32", "float32"), ("dtype: float32\nout_dtype: float16", "float16")],
)
def test_tensors_are_written_in_the_type_asked_for_or_the_sources(
    tiny_zoo: Path, types: str, expected: str
) -> None:
    assert tensor_plan(AVERAGE + types, tiny_zoo, Q_PROJ).dtype == expected
    wanted = recipe(AVERAGE + types, tiny_zoo)
    assert {str(tensor.dtype) for tensor in merged(wanted).values()} == {f"torch.{expected}"}


def test_results_are_rounded_once(tiny_zoo: Path) -> None:
    one, two = (tensors(tiny_zoo / name)[Q_PROJ].float() for name in ("one", "two"))
    text = "models: [{model: $one, parameters: {weight: 0.3}}, {model: $two, parameters: {weight: 0.7}}]\n"
    found = merged(recipe(text + "merge_method: linear\n", tiny_zoo))[Q_PROJ]
    # Rounded after every step, it would be another tensor.
    assert torch.equal(found, (0.3 * one + 0.7 * two).bfloat16())
    assert not torch.equal(found, 0.3 * one.bfloat16() + 0.7 * two.bfloat16())


def test_settings_nearer_to_the_model_win_where_they_match(tiny_zoo: Path) -> None:
    text = """
        modules:
          default:
            slices:
            - sources:
              - {model: $one, layer_range: [0, 4], parameters: {weight: [{filter: q_proj, value: 1}]}}
              - {model: $base, layer_range: [0, 4]}
              parameters: {weight: [{filter: self_attn, value: 2}]}
            parameters: {weight: [{filter: layers, value: 3}]}
        merge_method: ties
        base_model: $base
        parameters: {weight: 4}
        """

    def weight(name: str) -> float:
        return float(tensor_plan(text, tiny_zoo, name).values[0]["weight"])

    assert weight(Q_PROJ) == 1
    assert weight("model.layers.1.self_attn.k_proj.weight") == 2
    assert weight("model.layers.1.mlp.up_proj.weight") == 3
    assert weight("model.norm.weight") == 4


def test_gradients_run_over_the_layers_of_a_slice(tiny_zoo: Path) -> None:
    text = """
        slices:
        - sources: [{model: $one, layer_range: [0, 3]}]
          parameters: {weight: [0, 1]}
        - sources: [{model: $one, layer_range: [3, 4]}]
          parameters: {weight: [0, 1]}
        merge_method: linear
        """
    found = {tensor.name: tensor.values[0]["weight"] for tensor in plan(text, tiny_zoo).tensors}
    assert [found[f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(4)] == [0, 0.5, 1, 1]
    # Outside the layers a gradient has its first value, as in mergekit.
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == (0, 0)


def test_filters_see_the_models_own_layer_numbers_and_shared_ones_the_outputs(tiny_zoo: Path) -> None:
    text = """
        slices:
        - sources:
          - {model: $one, layer_range: [2, 3], parameters: {weight: [{filter: layers.2., value: 7}, {value: 1}]}}
          - {model: $base, layer_range: [1, 2]}
        merge_method: task_arithmetic
        base_model: $base
        parameters: {lambda: [{filter: layers.0., value: 5}, {value: 1}]}
        """
    found = tensor_plan(text, tiny_zoo, "model.layers.0.mlp.up_proj.weight")
    assert [name for _, name in found.inputs] == [f"model.layers.{i}.mlp.up_proj.weight" for i in (2, 1)]
    assert found.values == ({"weight": 7.0}, {})
    assert found.shared["lambda"] == 5


def test_the_layers_of_a_plan_say_where_they_stem_from(tiny_zoo: Path) -> None:
    text = """
        slices:
        - sources: [{model: $one, layer_range: [2, 4]}, {model: $base, layer_range: [0, 2]}]
        - sources: [{model: $two, layer_range: [3, 4]}, {model: $one, layer_range: [1, 2]}]
          base_model: $two
        merge_method: task_arithmetic
        base_model: $base
        parameters: {weight: 1}
        """
    found = plan(text, tiny_zoo)
    assert found.layers == ((f"{tiny_zoo}/base", 0), (f"{tiny_zoo}/base", 1), (f"{tiny_zoo}/two", 3))
    assert found.num_layers == 3


def test_a_required_parameter_whose_filters_match_nothing_is_a_fault(tiny_zoo: Path) -> None:
    text = "models: [{model: $one, parameters: {weight: [{filter: mlp, value: 1}]}}]\nmerge_method: linear"
    (fault,) = refusal(text, tiny_zoo)
    assert fault.startswith(
        f"parameters.weight: linear requires it, but no setting of {tiny_zoo}/one matches the "
    )


def test_the_recipes_seed_reaches_every_tensor(tiny_zoo: Path) -> None:
    text = "models: [{model: $one, parameters: {weight: 1, density: 0.5}}]\nmerge_method: dare_linear\n"
    text += "base_model: $base\n"
    first, again, other = (
        merged(recipe(text + end, tiny_zoo)) for end in ("", "evomerge: {seed: 0}", "evomerge: {seed: 1}")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].ndim > 1)


# Models that do not fit together.


def test_layers_beyond_a_models_depth_are_refused(tiny_zoo: Path) -> None:
    (fault,) = refusal(
        "slices: [{sources: [{model: $one, layer_range: [3, 5]}]}]\nmerge_method: passthrough", tiny_zoo
    )
    assert "slices.0.sources: " in fault
    assert f"{tiny_zoo}/one has 4 layers, got layer_range [3, 5]" in fault


def test_models_of_different_depth_are_refused_with_their_depths(tiny_zoo: Path, tmp_path: Path) -> None:
    def shorten(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ".layers.3." in name]:
            del state[name]

    short = variant(tiny_zoo / "two", tmp_path / "short", change=shorten, num_hidden_layers=3)
    (fault,) = refusal(two(tiny_zoo / "one", short), tiny_zoo)
    assert f"{tiny_zoo}/one 4, {short} 3" in fault


def test_a_layer_missing_in_the_middle_is_named(tiny_zoo: Path, tmp_path: Path) -> None:
    def cut(state: dict[str, Tensor]) -> None:
        for name in [name for name in state if ".layers.1." in name]:
            del state[name]

    (fault,) = refusal(
        two(tiny_zoo / "one", variant(tiny_zoo / "two", tmp_path / "cut", change=cut)), tiny_zoo
    )
    assert fault.startswith(f"{tmp_path}/cut: layers must be numbered from 0 without a gap")


def test_missing_and_surplus_tensors_are_named_with_their_models(tiny_zoo: Path, tmp_path: Path) -> None:
    def exchange(state: dict[str, Tensor]) -> None:
        del state["model.norm.weight"]
        state["model.layers.2.self_attn.q_proj.bias"] = torch.zeros(32)

    other = variant(tiny_zoo / "two", tmp_path / "other", change=exchange)
    found = refusal(two(tiny_zoo / "one", other), tiny_zoo)
    assert len(found) == 2
    assert any(
        fault.startswith(f"{other}: model.norm.weight: missing, but {tiny_zoo}/one has it") for fault in found
    )
    bias = f"{tiny_zoo}/one: model.layers.{{}}.self_attn.q_proj.bias: missing, but {other} has it"
    assert any(fault.startswith(bias) for fault in found)


def test_differing_shapes_are_named_with_both(tiny_zoo: Path, tmp_path: Path) -> None:
    def widen(state: dict[str, Tensor]) -> None:
        state["lm_head.weight"] = torch.zeros(65, 32, dtype=torch.bfloat16)

    wide = variant(tiny_zoo / "two", tmp_path / "wide", change=widen)
    (fault,) = refusal(two(tiny_zoo / "one", wide), tiny_zoo)
    assert fault == (
        f"lm_head.weight: the models differ in its shape: {tiny_zoo}/one [64, 32], {wide} [65, 32]"
    )


# Scales of merged tensors.


@pytest.mark.parametrize("text", [AVERAGE, "models: [{model: $one}]\nmerge_method: passthrough\n"])
def test_scales_reach_the_merged_tensors_they_name(tiny_zoo: Path, text: str) -> None:
    scales = f"[{{tensor: {Q_PROJ}, factor: -2, offset: 1}}, {{tensor: lm_head.weight, factor: 3}}]"
    found = {
        tensor.name: tensor.rescale
        for tensor in plan(f"{text}evomerge: {{scales: {scales}}}", tiny_zoo).tensors
    }
    expected = dict.fromkeys(found) | {Q_PROJ: (-2.0, 1.0), "lm_head.weight": (3.0, 0.0)}
    assert found == expected


def test_a_scale_of_no_merged_tensor_is_refused_with_the_nearest_name(tiny_zoo: Path) -> None:
    names = ("model.norms.weight", "model.layers.4.self_attn.q_proj.weight", "model.embed_tokens.weight")
    scales = ", ".join(f"{{tensor: {name}, factor: 2}}" for name in names)
    found = refusal(f"{AVERAGE}evomerge:\n  scales: [{scales}]\n", tiny_zoo)
    assert found == [
        "evomerge.scales.0.tensor: the merged model has no tensor 'model.norms.weight' (did you mean "
        "'model.norm.weight'?)",
        f"evomerge.scales.1.tensor: the merged model has no tensor '{names[1]}' (did you mean "
        "'model.layers.3.self_attn.q_proj.weight'?)",
    ]


def test_a_tensor_that_is_copied_cannot_be_scaled(tiny_zoo: Path, tmp_path: Path) -> None:
    def add(state: dict[str, Tensor]) -> None:
        state["model.table"] = torch.arange(3)

    model = variant(tiny_zoo / "one", tmp_path / "one", change=add)
    text = f"models: [{{model: {model}}}]\nmerge_method: passthrough\n"
    (fault,) = refusal(f"{text}evomerge: {{scales: [{{tensor: model.table, factor: 2}}]}}", tiny_zoo)
    assert fault.endswith(
        "evomerge.scales.0.tensor: 'model.table' is copied, not merged, so it cannot be scaled"
    )


def test_a_path_is_what_passes_every_tensor_of_one_model_on(tiny_zoo: Path) -> None:
    path = "slices: [{sources: [{model: $one, layer_range: [2, 3], parameters: {scale: 2}}]}]\n"
    path += "merge_method: passthrough\nevomerge: {scales: [{tensor: lm_head.weight, factor: 3}]}\n"
    assert plan(path, tiny_zoo).is_path
    single = "models: [{model: $one}]\nmerge_method: linear\nparameters: {weight: 1}\n"
    assert not plan(single, tiny_zoo).is_path


def untie(state: dict[str, Tensor]) -> None:
    del state["lm_head.weight"]


def copy_embedding(state: dict[str, Tensor]) -> None:
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()


def test_a_tied_and_an_untied_model_are_refused_with_the_reason(tiny_zoo: Path, tmp_path: Path) -> None:
    tied = variant(tiny_zoo / "two", tmp_path / "tied", change=untie, tie_word_embeddings=True)
    (fault,) = refusal(two(tiny_zoo / "one", tied), tiny_zoo)
    assert fault.startswith(f"{tied}: lm_head.weight: missing, but {tiny_zoo}/one has it")
    assert "this model ties its output head to its embedding" in fault


def test_a_stored_copy_of_a_tied_embedding_is_not_merged(tiny_zoo: Path, tmp_path: Path) -> None:
    """Some publishers store the tied head, others do not; both are the same model."""
    tied = variant(tiny_zoo / "one", tmp_path / "tied", change=untie, tie_word_embeddings=True)
    copied = variant(tiny_zoo / "two", tmp_path / "copied", change=copy_embedding, tie_word_embeddings=True)
    names = [tensor.name for tensor in plan(two(tied, copied), tiny_zoo).tensors]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names


# Tensors that are copied rather than merged.


@pytest.mark.parametrize(
    "made",
    [
        torch.tensor([1, 2, 3]),
        torch.tensor(5, dtype=torch.int32),
        torch.tensor([True, False]),
        torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
    ],
    ids=["int64", "scalar", "bool", "float8"],
)
def test_tensors_that_are_no_plain_floats_are_copied_if_equal(
    tiny_zoo: Path, tmp_path: Path, made: Tensor
) -> None:
    def add(state: dict[str, Tensor]) -> None:
        state["model.table"] = made.clone()

    def add_other(state: dict[str, Tensor]) -> None:
        state["model.table"] = torch.zeros_like(made)

    one, same, other = (
        variant(tiny_zoo / name, tmp_path / folder, change=change)
        for name, folder, change in (("one", "a", add), ("two", "b", add), ("two", "c", add_other))
    )
    found = merged(recipe(two(one, same), tiny_zoo))["model.table"]
    assert found.dtype == made.dtype
    assert torch.equal(found.float(), made.float())
    wanted = recipe(two(one, other), tiny_zoo)
    sources = models(wanted)
    table = next(tensor for tensor in plan_merge(wanted, sources).tensors if tensor.name == "model.table")
    with pytest.raises(
        CheckpointError, match=f"{other}: model.table is of type .* and differs between the models"
    ):
        merge_tensor(table, sources)
