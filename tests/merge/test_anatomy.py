"""The anatomy of a model: how its norms use their weights, and what cannot be understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from evomerge.checkpoints.reader import Checkpoint
from evomerge.errors import CheckpointError
from evomerge.merge import anatomy
from evomerge.merge.anatomy import anatomy_of
from tests.architectures import MODELS, SIZES, tiny

from .models import variant

ADDING_1 = {"Gemma2", "Gemma3Text", "Nemotron"}
OTHERS: dict[str, dict[str, Any]] = {"Nemotron": {}, "Glm4": {"head_dim": 8}}


def opened(folder: Path, name: str) -> Checkpoint:
    """A random model, its weights too large to be those of a fresh norm."""
    if name in MODELS:
        model = tiny(name)
    else:
        config = getattr(transformers, f"{name}Config")(**SIZES, **OTHERS[name])
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    model.save_pretrained(folder / name)
    return Checkpoint.open(folder / name)


@pytest.mark.parametrize("name", [*MODELS, *OTHERS])
def test_norms_that_add_1_to_their_weight_are_told_from_others(name: str, tmp_path: Path) -> None:
    found = anatomy_of(opened(tmp_path, name))
    assert found.norm_offset == (1.0 if name in ADDING_1 else 0.0)
    assert len(found.layers) == found.decoder.num_layers == 3
    assert found.layout[2].keys() == found.layout[0].keys()


def test_a_model_without_weights_in_its_norms_adds_nothing(tmp_path: Path) -> None:
    transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES)).save_pretrained(tmp_path)
    found = anatomy_of(Checkpoint.open(tmp_path))
    assert (found.norm_offset, found.decoder.final_norm) == (0.0, ())


class Doubled(nn.Module):
    """A norm of no known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(16, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 + self.weight)


@pytest.mark.parametrize("odd", [[Doubled()], [nn.LayerNorm(16, device="meta"), Doubled()]])
def test_norms_that_do_otherwise_are_refused(
    odd: list[nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = opened(tmp_path, "Llama")
    monkeypatch.setattr(anatomy, "_stream_norms", lambda checkpoint: odd)
    with pytest.raises(CheckpointError, match=r"Llama: expected norms that all .* Doubled adds nan"):
        anatomy_of(checkpoint)


def add_scalar(state: dict[str, Tensor]) -> None:
    for layer in range(3):
        state[f"model.layers.{layer}.layer_scalar"] = torch.ones(1)


def move_norm(state: dict[str, Tensor]) -> None:
    state["model.embedding_norm.weight"] = state.pop("model.norm.weight")


def drop_writer(state: dict[str, Tensor]) -> None:
    del state["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"change": add_scalar}, r"what model.layers.\{\}.layer_scalar does to the residual stream"),
        ({"change": move_norm}, "whether model.embedding_norm.weight acts before the layers or after them"),
        (
            {"change": drop_writer},
            "layer 1: expected the matrix through which its mlp branch adds to the res",
        ),
        ({"num_hidden_layers": 4}, "num_hidden_layers: 4, but the tensors make 3 layers"),
        ({"model_type": "unheard"}, "transformers cannot build this model from its config: KeyError"),
        ({"hidden_act": "unheard"}, "transformers cannot build this model from its config: KeyError"),
    ],
)
def test_a_model_that_cannot_be_understood_is_refused_with_what_was_found(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    opened(tmp_path, "Llama")
    folder = variant(tmp_path / "Llama", tmp_path / "odd", **changes)
    with pytest.raises(CheckpointError, match=f"odd: .*{message}"):
        anatomy_of(Checkpoint.open(folder))
