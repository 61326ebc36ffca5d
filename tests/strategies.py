"""Hypothesis strategies shared by several tests."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TRICKY_TEXT = ["no", "yes", "on", "off", "~", "null", "true", "1e-3", "1e5", "0x10", "1_0", "1:30", ".5", "-"]
TRICKY_TEXT += ["2024-01-01", "", " ", "a: b", "# x", "[a]", "{a}", "&a", "*a", "!x", "%", "@", "`", "'", '"']
TRICKY_TEXT += [
    "<<",
    "=",
    "---",
    "...",
    "a\nb",
    "a\n\nb ",
    "\ttab",
    "\x85",
    "\u2028",
    "日本",
    "🙂",
    "é",
    "\ufeff",
]

numbers = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**53), 2**53))

texts = st.one_of(
    st.sampled_from(TRICKY_TEXT),
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Cn", "Co"]), max_size=12),
)

plain_values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
"""What JSON and YAML have in common."""

model_names = st.from_regex(r"[A-Za-z0-9./_-]{1,12}", fullmatch=True).filter(
    lambda text: text not in ("union", "base")
)
filters = st.sampled_from(["*", "mlp", "self_attn", "layers.1.", "no", "1e-3", "lm_head", ""])
scalars = st.one_of(
    numbers, st.booleans(), st.sampled_from(["1e-3", "0.5", "no", "true"]), st.floats(-2, 2, width=16)
)


@st.composite
def _conditionals(draw: st.DrawFn) -> list[dict[str, Any]]:
    values = draw(st.lists(st.one_of(scalars, st.lists(scalars, max_size=3)), min_size=1, max_size=3))
    result: list[dict[str, Any]] = []
    for value in values:
        item = {"value": value}
        if draw(st.booleans()):
            item["filter"] = draw(filters)
        result.append(item)
    return result


settings = st.one_of(
    scalars, st.lists(scalars, max_size=4), _conditionals(), _conditionals().map(lambda items: items[0])
)
parameters = st.dictionaries(
    st.sampled_from(["weight", "density", "normalize", "lambda", "t", "scale"]), settings, max_size=3
)


def _optional(required: dict[str, Any], **optional: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries(required, optional=optional)


_input_models = _optional({"model": model_names}, parameters=parameters)


@st.composite
def _output_slices(draw: st.DrawFn) -> dict[str, Any]:
    length = draw(st.integers(1, 4))
    sources = []
    for source in draw(st.lists(_input_models, min_size=1, max_size=3)):
        first = draw(st.integers(0, 5))
        sources.append({**source, "layer_range": [first, first + length]})
    rest = draw(_optional({}, base_model=model_names, parameters=parameters))
    return {"sources": sources, **rest}


_forms = st.one_of(
    st.fixed_dictionaries({"models": st.lists(_input_models, min_size=1, max_size=3)}),
    st.fixed_dictionaries({"slices": st.lists(_output_slices(), min_size=1, max_size=3)}),
)


_row_sources = st.one_of(
    model_names,
    st.just({"kind": "zero"}),
    st.fixed_dictionaries({"kind": st.just("model_token"), "model": model_names, "token": texts}),
    st.fixed_dictionaries(
        {"kind": st.just("model_token"), "model": model_names, "token_id": st.integers(0, 2**17)}
    ),
)
_token_settings = st.one_of(_optional({}), _optional({"source": _row_sources}, force=st.booleans()))
tokenizer_settings = _optional(
    {},
    source=st.one_of(st.sampled_from(["union", "base"]), model_names),
    tokens=st.dictionaries(texts, _token_settings, max_size=3),
    pad_to_multiple_of=st.integers(1, 256),
)


_finite = st.floats(allow_nan=False, allow_infinity=False)
_tensor_scales = _optional({"tensor": texts, "factor": _finite}, offset=_finite)
extensions = _optional(
    {},
    seed=st.integers(0, 2**63 - 1),
    scales=st.lists(_tensor_scales, max_size=3, unique_by=lambda scale: scale["tensor"]),
)


@st.composite
def recipe_data(draw: st.DrawFn) -> dict[str, Any]:
    """The plain values of a recipe of any form, as somebody may write it; not always sensible to merge."""
    form = draw(_forms)
    if draw(st.booleans()):
        form = {"modules": {"default": {**form, **draw(_optional({}, parameters=parameters))}}}
    rest = draw(
        _optional(
            {"merge_method": st.sampled_from(["linear", "ties", "slerp", "dare_ties"])},
            base_model=model_names,
            parameters=parameters,
            dtype=st.sampled_from(["float32", "bfloat16"]),
            out_dtype=st.sampled_from(["float16", "bfloat16"]),
            chat_template=texts,
            evomerge=extensions,
        )
    )
    tokenizer = draw(
        st.one_of(
            _optional({}, tokenizer_source=st.one_of(st.sampled_from(["union", "base"]), model_names)),
            st.fixed_dictionaries({"tokenizer": tokenizer_settings}),
        )
    )
    return {**form, **rest, **tokenizer}
