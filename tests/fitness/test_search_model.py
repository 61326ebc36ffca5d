"""What is said and found likely while searching is what lm-eval finds in its own way, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from evomerge.fitness.quiet import quiet
from evomerge.fitness.search_model import SearchModel
from tests.architectures import tiny
from tests.fitness.test_fast_model import choices, generations, said, words
from tests.tiny import make_tokenizer

EXAMPLES = "q: abc=def\nq: 01=10\nq: hgf=012\n"


class Searching(SearchModel, HFLM):
    pass


@pytest.fixture(scope="module", params=["Llama", "Mistral", "Mixtral"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    model = tiny(request.param, vocab_size=64, max_position_embeddings=128).eval()
    model.generation_config.eos_token_id = 1
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # or it would say the same whatever it is asked
    return model


@pytest.fixture
def tokens(model: Any) -> Iterator[list[int]]:
    """Number of tokens that went into each forward pass."""
    found: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _module, args, kwargs: found.append(
            (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()
        ),
        with_kwargs=True,
    )
    yield found
    hook.remove()


def both(model: Any, **options: Any) -> tuple[Any, Any]:
    """lm-eval's own wrapper, and the one that searches."""
    options = {"tokenizer": make_tokenizer(), "batch_size": 4, "softmax_dtype": "float32", **options}
    with quiet():
        stock, search = HFLM(pretrained=model, **options), Searching(pretrained=model, **options)
    search.exact = False
    return stock, search


def allows(model: Any) -> bool:
    return type(model).__name__ not in ("MistralForCausalLM", "MixtralForCausalLM")


def assert_alike(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        torch.tensor([value for value, _ in found]),
        torch.tensor([value for value, _ in expected]),
        rtol=0,
        atol=1e-4,
    )


@pytest.mark.parametrize("opening", ["", EXAMPLES], ids=["nothing shared", "shared examples"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_same_is_said_with_less_work(
    model: Any, tokens: list[int], opening: str, batch_size: int
) -> None:
    stock, search = both(model, batch_size=batch_size)
    prompts = [opening + word for word in words(11, seed=3)]
    texts = said(both(model)[0], generations(prompts, []))
    letters = sorted({text[5] for text in texts if len(text) > 5} - set("<pad><eos>"))
    requests = generations(prompts, letters[:2])
    tokens.clear()
    expected, num_stock = said(stock, requests), sum(tokens)
    assert len(set(map(len, expected))) > 1
    tokens.clear()
    assert said(search, requests) == expected
    num_search = sum(tokens)
    assert num_search < num_stock if allows(model) and opening else num_search <= num_stock


@pytest.mark.parametrize(
    "setting", [{"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 1}, {"num_beams": 2}], ids=str
)
def test_what_a_model_asks_for_beyond_greedy_answers_is_heeded(model: Any, setting: dict[str, Any]) -> None:
    stock, search = both(model)
    requests = generations([EXAMPLES + word for word in words(9)], ["?"])
    plain = said(stock, requests)
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(**setting)
        expected = said(stock, requests)
        assert said(search, requests) == expected
        search.exact = True
        assert said(search, requests) == expected
    finally:
        model.generation_config.update(**{key: before[key] for key in setting})
    assert said(stock, requests) == plain
    assert expected != plain or "num_beams" in setting


def test_an_answer_of_no_tokens_is_left_to_lm_eval(model: Any) -> None:
    stock, search = both(model)
    contexts = [EXAMPLES + word for word in words(3)]
    requests = choices(contexts, ["a", "bc", ""])
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    assert_alike(search.loglikelihood(requests, disable_tqdm=True), expected)


def test_prompts_that_are_cut_to_the_context_say_the_same(model: Any) -> None:
    stock, search = both(model, max_length=60)
    requests = generations([EXAMPLES + word for word in words(8)], ["a", "b"])
    assert said(search, requests) == said(stock, requests)


@pytest.mark.parametrize("batch_size", [1, 7])
def test_answers_are_as_likely_with_less_work(model: Any, tokens: list[int], batch_size: int) -> None:
    stock, search = both(model, batch_size=batch_size)
    contexts = [EXAMPLES + word for word in words(5)]
    # More answers than a batch holds, some of one token, one of them twice.
    requests = choices([*contexts, contexts[0]], ["a", "b", "aa", "aab", "0123=abc", "hgfe"])
    tokens.clear()
    expected, num_stock = stock.loglikelihood(requests, disable_tqdm=True), sum(tokens)
    tokens.clear()
    assert_alike(search.loglikelihood(requests, disable_tqdm=True), expected)
    assert sum(tokens) < 0.5 * num_stock if allows(model) else sum(tokens) == num_stock


def test_greedy_answers_are_recognised(model: Any) -> None:
    _, search = both(model)
    prompts = [EXAMPLES + word for word in words(12)]
    answers = said(search, generations(prompts, ["\n"], max_gen_toks=1))
    # Of the others the tokenizer makes several tokens.
    found = [(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True) if answer.isalnum()]
    assert found
    for prompt, answer in found:
        pair = choices([prompt], [answer, answer + "?", "?" + answer])
        is_greedy = [greedy for _, greedy in search.loglikelihood(pair, disable_tqdm=True)]
        assert is_greedy[0]
        assert not is_greedy[2]


def test_texts_with_little_in_common_and_too_long_ones_are_left_to_lm_eval(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "evomerge.fitness.search_model.log_likelihoods", lambda *_: pytest.fail("not for this")
    )
    stock, search = both(model)
    apart = choices(words(6), ["0123=abc"])
    assert search.loglikelihood(apart, disable_tqdm=True) == stock.loglikelihood(apart, disable_tqdm=True)
    stock, search = both(model, max_length=40)
    long = choices([EXAMPLES + word for word in words(4)], ["a", "bc"])
    assert search.loglikelihood(long, disable_tqdm=True) == stock.loglikelihood(long, disable_tqdm=True)


def test_new_weights_are_not_read_with_what_the_old_ones_knew(model: Any) -> None:
    _, search = both(model)
    requests = generations([EXAMPLES + word for word in words(6)], ["?"])
    likely = choices([EXAMPLES + word for word in words(3)], ["a", "bc"])
    said(search, requests)
    weight = next(parameter for parameter in model.parameters() if parameter.ndim > 1)
    before = weight.clone()
    try:
        with torch.no_grad():
            weight.copy_(weight.flip(0))
        stock, fresh = both(model)
        assert said(search, requests) == said(fresh, requests) == said(stock, requests)
        assert_alike(
            search.loglikelihood(likely, disable_tqdm=True), stock.loglikelihood(likely, disable_tqdm=True)
        )
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_announced_numbers_take_lm_evals_own_way(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, search = both(model)
    search.exact = True
    monkeypatch.setattr("evomerge.fitness.search_model.Prefix", lambda *_: pytest.fail("not for this"))
    monkeypatch.setattr(
        "evomerge.fitness.search_model.log_likelihoods", lambda *_: pytest.fail("not for this")
    )
    said(search, generations([EXAMPLES + word for word in words(3)], ["a"]))
    search.loglikelihood(choices([EXAMPLES], ["a", "b"]), disable_tqdm=True)
