"""A scaled module computes what one with scaled parameters does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from evomerge.merge.scaled_modules import forget, take
from tests.architectures import tiny

X = torch.linspace(-2, 2, 15).view(1, 3, 5)


def scaled(module: nn.Module, **factors: float) -> dict[str, Tensor]:
    return {name: p.data * factors.get(name, 1.0) for name, p in module.named_parameters()}


@pytest.mark.parametrize("factors", [{"weight": -0.5}, {"bias": 3.0}, {"weight": 0.0, "bias": -1.25}])
@pytest.mark.parametrize("make", [nn.Linear, lambda inputs, outputs: Conv1D(outputs, inputs)])
def test_a_product_takes_factors_of_matrix_and_bias(make: type[nn.Module], factors: dict[str, float]) -> None:
    torch.manual_seed(0)
    module = make(5, 4)
    nn.init.normal_(module.bias)
    plain = module(X)
    expected = torch.func.functional_call(module, scaled(module, **factors), (X,))
    before = {name: p.data_ptr() for name, p in module.named_parameters()}
    assert take(module, factors) == set(factors)
    torch.testing.assert_close(module(X), expected)
    assert {name: p.data_ptr() for name, p in module.named_parameters()} == before
    forget(module)
    assert torch.equal(module(X), plain)


def test_a_product_that_is_not_called_but_read_is_scaled_too() -> None:
    module = nn.Linear(5, 4)
    weight, bias = module.weight.data.clone(), module.bias.data.clone()
    take(module, {"weight": 2.0, "bias": -3.0})
    assert torch.equal(module.weight, 2 * weight)
    assert torch.equal(module.bias, -3 * bias)
    forget(module)
    assert module.weight is module._parameters["weight"]
    assert nn.Linear(5, 4, bias=False).bias is None


def test_a_product_without_bias_stays_without() -> None:
    module = nn.Linear(5, 4, bias=False)
    expected = module(X) * 0.5
    take(module, {"weight": 0.5})
    assert torch.equal(module(X), expected)
    assert module.bias is None


@pytest.mark.parametrize(
    "embedding", [nn.Embedding(7, 5, padding_idx=6), Gemma3TextScaledWordEmbedding(7, 5, 6, embed_scale=2.5)]
)
def test_an_embedding_takes_a_factor(embedding: nn.Embedding) -> None:
    words = torch.tensor([[1, 6, 0]])
    plain = embedding(words)
    state = torch.get_rng_state()
    assert take(embedding, {"weight": -1.5}) == {"weight"}
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(embedding(words), plain * -1.5)
    assert isinstance(embedding, nn.Embedding)
    forget(embedding)
    assert torch.equal(embedding(words), plain)
    assert take(embedding, {"weight": 2.0}) == {"weight"}
    assert torch.equal(embedding(words), plain * 2)


def test_an_embedding_that_does_more_than_look_up_takes_none() -> None:
    class Shifted(nn.Embedding):
        def forward(self, words: Tensor) -> Tensor:
            return super().forward(words) + 1

    embedding = Shifted(7, 5)
    assert take(embedding, {"weight": 2.0}) == set()
    assert type(embedding) is Shifted


def test_experts_take_the_factor_that_all_writers_share() -> None:
    experts = tiny("Mixtral").model.layers[0].mlp.experts
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    given = torch.randn(6, 16), torch.tensor([[0, 1]] * 6), torch.full((6, 2), 0.5)
    plain = experts(*given)
    expected = torch.func.functional_call(experts, scaled(experts, down_proj=-0.5), given)
    assert take(experts, {"gate_up_proj": 2.0}) == set()
    assert torch.equal(experts(*given), plain)
    assert take(experts, {"gate_up_proj": 2.0, "down_proj": -0.5}) == {"down_proj"}
    torch.testing.assert_close(experts(*given), expected)
    forget(experts)
    assert torch.equal(experts(*given), plain)


def test_experts_with_biases_take_a_factor_only_with_them() -> None:
    experts = tiny("Mixtral").model.layers[0].mlp.experts
    experts.down_proj_bias = nn.Parameter(torch.zeros(4, 16))
    assert take(experts, {"down_proj": 2.0}) == set()
    assert take(experts, {"down_proj": 2.0, "down_proj_bias": 3.0}) == set()
    assert take(experts, {"down_proj": 2.0, "down_proj_bias": 2.0}) == {"down_proj", "down_proj_bias"}


@pytest.mark.parametrize("module", [nn.LayerNorm(5), nn.Bilinear(5, 5, 4), nn.Conv1d(5, 4, 1)])
def test_others_take_none(module: nn.Module) -> None:
    kind = type(module)
    assert take(module, {"weight": 2.0, "bias": 2.0}) == set()
    assert type(module) is kind
