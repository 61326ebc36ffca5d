"""The work that is left out changes no score, and is left out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from evomerge.fitness.fast_model import FastModel
from evomerge.fitness.quiet import quiet
from tests.tiny import make_model, make_tokenizer


class Fast(FastModel, HFLM):
    pass


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoModelForCausalLM

    folder = make_model(
        tmp_path_factory.mktemp("model"), seed=1, dtype=request.param, max_position_embeddings=96
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=request.param).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # or it would say the same whatever it is asked
    return model


@pytest.fixture
def steps(model: Any) -> Iterator[list[int]]:
    """Positions that went into each forward pass."""
    found: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _module, args, kwargs: found.append(
            (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1]
        ),
        with_kwargs=True,
    )
    yield found
    hook.remove()


def both(model: Any, tokenizer: Any = None, **options: Any) -> tuple[Any, Any]:
    """lm-eval's own wrapper, and the fast one."""
    options = {
        "tokenizer": tokenizer or make_tokenizer(),
        "batch_size": 4,
        "softmax_dtype": "float32",
        **options,
    }
    with quiet():
        return HFLM(pretrained=model, **options), Fast(pretrained=model, **options)


def words(count: int, *, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("abcdefgh0123=") for _ in range(rng.randrange(2, 30))) for _ in range(count)]


def generations(prompts: list[str], stop: list[str], **options: Any) -> list[Instance]:
    settings = {"until": stop, "do_sample": False, "max_gen_toks": 24, **options}
    return [Instance("generate_until", {}, (prompt, settings), index) for index, prompt in enumerate(prompts)]


def choices(contexts: list[str], answers: list[str]) -> list[Instance]:
    return [
        Instance("loglikelihood", {}, (context, answer), index)
        for index, (context, answer) in enumerate((c, a) for c in contexts for a in answers)
    ]


def said(lm: Any, requests: list[Instance]) -> list[str]:
    return list(lm.generate_until(requests, disable_tqdm=True))


# Log-likelihoods


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_log_likelihoods_are_the_same_to_the_last_bit(model: Any, batch_size: int) -> None:
    stock, fast = both(model, batch_size=batch_size)
    # One letter shares the logits of its context, "aa" and "a" overlap, the empty context is another path.
    requests = choices([*words(9), "", "aaaa"], ["a", "b", "aa", "aab", "0123=abc", "hgfe"])
    assert fast.loglikelihood(requests, disable_tqdm=True) == stock.loglikelihood(requests, disable_tqdm=True)


def test_log_likelihoods_of_texts_that_are_cut_to_the_context_are_the_same(model: Any) -> None:
    stock, fast = both(model, max_length=12)
    requests = choices(words(8), ["ab", "0123=abcdef"])
    assert fast.loglikelihood(requests, disable_tqdm=True) == stock.loglikelihood(requests, disable_tqdm=True)
    whole = [Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(words(5))]
    assert fast.loglikelihood_rolling(whole, disable_tqdm=True) == stock.loglikelihood_rolling(
        whole, disable_tqdm=True
    )


def test_texts_that_end_in_the_token_that_pads_are_scored_the_same(model: Any) -> None:
    stock, fast = both(model)
    requests = choices(["<pad><pad>", "ab<pad>", "ab<pad><pad><pad>"], ["<pad>", "a", "<pad><pad>b"])
    assert fast.loglikelihood(requests, disable_tqdm=True) == stock.loglikelihood(requests, disable_tqdm=True)


def test_only_the_logits_of_answers_are_turned_into_probabilities(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, fast = both(model)
    positions: list[int] = []
    softmax = torch.nn.functional.log_softmax

    def counting(logits: Any, *args: Any, **kwargs: Any) -> Any:
        positions.append(logits.shape[0] * logits.shape[1])
        return softmax(logits, *args, **kwargs)

    monkeypatch.setattr("lm_eval.models.huggingface.F.log_softmax", counting)
    requests = choices([text * 3 for text in ("abcdefgh", "hgfedcba")], ["01", "10"])
    fast.loglikelihood(requests, disable_tqdm=True)
    assert positions == [4 * 2]
    stock.loglikelihood(requests, disable_tqdm=True)
    assert positions[1:] == [4 * (24 + 1)]


def test_a_text_is_tokenised_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fast = both(model)
    requests = choices(words(3), ["a", "bc"])
    first = fast.loglikelihood(requests, disable_tqdm=True)
    monkeypatch.setattr(HFLM, "tok_encode", lambda *_, **__: pytest.fail("tokenised again"))
    assert fast.loglikelihood(requests, disable_tqdm=True) == first


# Generation


def spread(model: Any, prompts: list[str]) -> list[str]:
    """Letters that the model says early on some prompts and on others not."""
    stock, _ = both(model)
    texts = said(stock, generations(prompts, []))
    counts = {
        letter: sum(letter in text for text in texts) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"
    }
    found = sorted(
        (letter for letter, count in counts.items() if 0 < count < len(prompts)), key=counts.__getitem__
    )
    assert len(found) >= 2, texts
    return [found[0], found[-1]]


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_generations_are_the_same_and_end_sooner(model: Any, steps: list[int], batch_size: int) -> None:
    prompts = words(16, seed=3)
    stop = spread(model, prompts)
    stock, fast = both(model, batch_size=batch_size)
    steps.clear()
    expected, num_stock = said(stock, generations(prompts, stop)), len(steps)
    steps.clear()
    assert said(fast, generations(prompts, stop)) == expected
    assert len(set(map(len, expected))) > 1
    assert len(steps) <= num_stock


def test_a_batch_ends_when_all_its_sequences_do_whatever_ended_them(model: Any, steps: list[int]) -> None:
    stock, fast = both(model, batch_size=2)
    prompts = words(40, seed=5)
    texts = said(both(model, batch_size=1)[0], generations(prompts, []))
    # Two prompts of one length, the first letters of whose answers differ.
    first, second = next(
        (i, j)
        for i in range(40)
        for j in range(i)
        if len(prompts[i]) == len(prompts[j])
        and texts[i][:1] not in texts[j]
        and texts[j][:1] not in texts[i]
    )
    requests = generations([prompts[first], prompts[second]], [texts[first][0], texts[second][0]])
    steps.clear()
    assert said(fast, requests) == ["", ""]
    assert len(steps) == 1
    steps.clear()
    assert said(stock, requests) == ["", ""]
    assert len(steps) > 1


@pytest.fixture
def says_pads(model: Any) -> Iterator[None]:
    """Have the model say a special token, which decoding leaves out, wherever it would say a digit."""

    def replace(_module: Any, _inputs: Any, output: Any) -> None:
        is_digit = (output.logits.argmax(-1) >= 28) & (output.logits.argmax(-1) < 38)
        output.logits[..., 0].masked_fill_(is_digit, 1e4)

    hook = model.register_forward_hook(replace)
    yield
    hook.remove()


@pytest.mark.usefixtures("says_pads")
def test_a_stop_text_that_decoding_leaves_out_is_left_to_lm_eval(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval does not cut the text there, so it holds what comes behind."""
    stock, fast = both(model)
    monkeypatch.setattr("evomerge.fitness.fast_model.StopEach", lambda *_, **__: pytest.fail("not for this"))
    requests = generations(words(12), ["<pad>"])
    expected = said(stock, requests)
    assert any(expected)
    assert said(fast, requests) == expected


@pytest.mark.usefixtures("says_pads")
def test_a_stop_text_within_one_that_decoding_leaves_out_is_left_to_lm_eval(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, fast = both(model)
    calls: list[int] = []
    generate = HFLM._model_generate
    monkeypatch.setattr(HFLM, "_model_generate", lambda *a, **k: (calls.append(1), generate(*a, **k))[1])
    requests = generations(words(12), ["pad", "e"])
    expected = said(stock, requests)
    assert len(calls) == 3
    assert said(fast, requests) == expected
    assert len(calls) > 3


def test_the_end_token_ends_a_sequence(model: Any, steps: list[int]) -> None:
    stock, fast = both(model)
    requests = generations(words(12), ["e"])
    end = spread(model, words(12))[0]
    model.generation_config.eos_token_id = [1, make_tokenizer().convert_tokens_to_ids(end)]
    try:
        steps.clear()
        expected, num_stock = said(stock, requests), len(steps)
        assert any(text.endswith(end) for text in expected)
        steps.clear()
        assert said(fast, requests) == expected
        assert len(steps) <= num_stock
    finally:
        model.generation_config.eos_token_id = 1


def test_sampling_and_experts_are_left_to_lm_eval(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    monkeypatch.setattr("evomerge.fitness.fast_model.StopEach", lambda *_, **__: pytest.fail("not for this"))
    _, fast = both(model)
    said(fast, generations(words(2), ["a"], do_sample=True, temperature=0.7))
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    stock, fast = both(MixtralForCausalLM(config).eval(), max_length=64)
    requests = generations(words(5), ["a", "b"])
    assert said(fast, requests) == said(stock, requests)
