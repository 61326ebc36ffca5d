"""What follows a prefix that was read once has the logits of whole texts, wherever a model allows it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from evomerge.fitness.shared_prefix import Prefix, can_share, common_prefix, read
from tests.architectures import WORDS, tiny

ALLOWED = ("Llama", "Qwen2", "Phi3", "Olmo2", "StableLm", "Cohere", "GPTNeoX", "GPT2")
SLIDING = ("Mistral", "Qwen3", "Gemma2", "Gemma3Text")


def make(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    return tiny(name, **config).eval()


def texts(count: int, *, shared: int, seed: int = 0) -> list[list[int]]:
    """Random tokens behind a common prefix, of different lengths."""
    rng = random.Random(seed)
    prefix = [rng.randrange(3, WORDS) for _ in range(shared)]
    return [prefix + [rng.randrange(3, WORDS) for _ in range(1 + 4 * row)] for row in range(count)]


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("shared", [0, 1, 20])
def test_logits_are_those_of_each_text_read_whole(name: str, shared: int) -> None:
    model, rows = make(name), texts(4, shared=shared)
    assert can_share(model)
    logits, reading = Prefix(model, rows[0][:shared]).read(rows)
    assert reading.mask_BT.sum(1).tolist() == [len(row) for row in rows]
    # A step of generation, after which the second has left and the others have another order.
    following = [5, 6, 7]
    left = [2, 0, 3]
    next_logits = read(model, torch.tensor(following)[:, None], reading.select(left))[:, -1]
    with torch.no_grad():
        for found, row in zip(logits, rows, strict=True):
            torch.testing.assert_close(found, model(torch.tensor([row])).logits[0, -1], rtol=0, atol=1e-5)
        for found, place, token in zip(next_logits, left, following, strict=True):
            whole = model(torch.tensor([[*rows[place], token]])).logits[0, -1]
            torch.testing.assert_close(found, whole, rtol=0, atol=1e-5)


def test_a_prefix_serves_several_batches() -> None:
    model, rows = make("Llama"), texts(5, shared=12)
    prefix = Prefix(model, rows[0][:12])
    first, reading = prefix.read(rows[:3])
    read(model, torch.tensor([[4], [4], [4]]), reading)
    again, _ = prefix.read(rows[:3])
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", SLIDING)
def test_layers_with_a_window_are_refused(name: str) -> None:
    assert not can_share(make(name))


def test_windows_that_the_cache_does_not_know_of_are_refused() -> None:
    import transformers

    small = {"vocab_size": 32, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "window_size": 8}
    config = transformers.GPTNeoConfig(**small, attention_types=[[["global", "local"], 1]])
    assert not can_share(transformers.GPTNeoForCausalLM(config))


@pytest.mark.parametrize("name", ["Mistral", "Qwen3", "Gemma3Text"])
def test_what_counts_is_whether_a_layer_has_a_window(name: str) -> None:
    off = {"layer_types": ["full_attention"] * 3} if name == "Gemma3Text" else {"sliding_window": None}
    off |= {"use_sliding_window": False} if name == "Qwen3" else {}
    assert can_share(make(name, **off))


def test_recurrent_states_and_positions_that_move_are_refused() -> None:
    import transformers

    small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**small, state_size=4))
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    )
    moving = make("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    assert [can_share(model) for model in (mamba, bloom, moving)] == [False] * 3


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 4]], (1, 2)),
        ([[1, 2], [1, 2, 3]], (1,)),
        ([[1, 2, 3]], (1, 2)),
        ([[1, 2], [3]], ()),
        ([[7], [7]], ()),
    ],
)
def test_the_common_prefix_leaves_a_token_of_each(rows: list[list[int]], expected: tuple[int, ...]) -> None:
    assert common_prefix(rows) == expected
