"""Models that do not fit each other are refused, and the message names in what they differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merge.compatible import check_compatible, differing_keys
from tests.modular import make_family
from tests.tiny import make_model


def check(one: Path, other: Path, *, movable: bool) -> None:
    check_compatible(Checkpoint.open(one), Checkpoint.open(other), "the first", movable=movable)


@pytest.fixture(scope="module")
def donor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("compatible") / "donor", seed=0)


def edited(folder: Path, **changes: Any) -> Path:
    """The same model with another config."""
    make_model(folder, seed=1)
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("movable", [False, True])
def test_models_of_one_family_fit(donor: Path, tmp_path: Path, movable: bool) -> None:
    check(make_model(tmp_path / "one", seed=1), donor, movable=movable)


def test_layers_on_a_path_may_be_of_models_of_another_depth(donor: Path, tmp_path: Path) -> None:
    deeper = make_model(tmp_path / "deeper", seed=1, num_hidden_layers=6)
    check(deeper, donor, movable=True)
    with pytest.raises(CheckpointError, match=r"model\.layers\.4\..*the first has not"):
        check(deeper, donor, movable=False)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_size": 64}, r"hidden_size is 64, that of the first is 32"),
        ({"intermediate_size": 80}, r"mlp\.\w+_proj\.weight: in its layer 0 its shape is \[.*80.*48"),
        ({"num_attention_heads": 8}, r"num_attention_heads is 8, that of the first is 4"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads is 4, that of the first is 2"),
        ({"rms_norm_eps": 0.5}, r"rms_norm_eps is 0\.5"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'"),
        (
            {"attention_bias": True},
            r"k_proj.bias: in its layer 0 its shape is \[16\], in the first it is missing",
        ),
    ],
)
def test_layers_on_a_path_must_compute_alike(
    donor: Path, tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        check(make_model(tmp_path / "one", seed=1, **config), donor, movable=True)


@pytest.mark.parametrize("key", ["rope_theta", "rope_scaling", "partial_rotary_factor"])
def test_another_scheme_of_positions_is_refused_on_a_path(donor: Path, tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"its {key} is 0.25, that of the first is None"):
        check(edited(tmp_path / "one", **{key: 0.25}), donor, movable=True)


@pytest.mark.parametrize("movable", [False, True])
def test_another_vocabulary_is_refused(donor: Path, tmp_path: Path, movable: bool) -> None:
    one = make_model(tmp_path / "one", seed=1)
    file = one / "tokenizer.json"
    file.write_text(file.read_text().replace('"q"', '"Q"'))
    with pytest.raises(CheckpointError, match="its vocabulary differs from that of the first"):
        check(one, donor, movable=movable)


@pytest.mark.parametrize("movable", [False, True])
def test_another_architecture_is_refused(donor: Path, tmp_path: Path, movable: bool) -> None:
    with pytest.raises(CheckpointError, match="its model_type is mistral, that of the first is llama"):
        check(edited(tmp_path / "one", model_type="mistral"), donor, movable=movable)


@pytest.mark.parametrize("movable", [False, True])
@pytest.mark.parametrize(
    ("name", "found"), [("Llava", "language_model.model.layers"), ("T5", "decoder.block")]
)
def test_models_of_several_modules_are_refused(
    donor: Path, tmp_path: Path, name: str, found: str, movable: bool
) -> None:
    folder = make_family(tmp_path, name)
    with pytest.raises(CheckpointError) as caught:
        check(folder / "two", folder / "one", movable=movable)
    assert f"expected one stack of decoder layers, found several: '{found}' of 3, " in str(caught.value)
    assert "a search takes plain language models" in str(caught.value)
    check(donor, folder / "one", movable=movable)  # told of that model itself, once


def test_models_on_a_path_may_differ_in_how_long_a_text_they_take(donor: Path, tmp_path: Path) -> None:
    check(make_model(tmp_path / "one", seed=1, max_position_embeddings=128), donor, movable=True)


def test_what_computes_nothing_may_differ(donor: Path, tmp_path: Path) -> None:
    one = Checkpoint.open(edited(tmp_path / "one", use_cache=False, tie_word_embeddings=None, extra=1))
    assert differing_keys(one, Checkpoint.open(donor)) == ["extra", "tie_word_embeddings"]
