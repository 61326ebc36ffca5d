"""The documentation page of the merge methods, made from their declarations."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator

from evomerge.merge.methods import BasePolicy, Method, Parameter

WIDTH = 118
"""Characters in a line of prose."""

INTRODUCTION = """\
# Merge methods

<!-- Made from the methods' declarations by `evomerge methods --markdown > docs/methods.md`; do not edit. -->

Every method merges tensor by tensor, in float32. The difference of a model from the base is its task vector. The
names of methods and parameters are mergekit's, and so are the results, except as noted under a method.
"""

SCOPES = """\
A parameter *per recipe* has one value for a tensor, one *per model* a value for every input model, one *per non-base
model* a value for every input model but the base. Every value may depend on the tensor's name and depth, see
[recipes](recipes.md).
"""


def methods_page(methods: Iterable[Method]) -> str:
    """The page in Markdown: a table of all methods, then one section each."""
    methods = list(methods)
    table = ["| method | base model | what it does |", "|---|---|---|"]
    table += [
        f"| [`{method.name}`](#{method.name}) | {method.base} | {method.summary} |" for method in methods
    ]
    parts = [INTRODUCTION, "\n".join(table) + "\n", SCOPES, *("\n".join(_section(m)) for m in methods)]
    return "\n".join(parts)


def inputs_in_words(method: Method) -> str:
    """The models that a method takes, such as `a base model and exactly 1 other model`."""
    fewest, most = method.min_others, method.max_others
    kind = "other model" if method.base is BasePolicy.REQUIRED else "model"
    if method.base is BasePolicy.IGNORED:
        fewest = max(1, fewest)
    if fewest == most:
        number = f"exactly {fewest} {kind}{'' if fewest == 1 else 's'}"
    elif most is not None:
        number = f"{fewest} to {most} {kind}s"
    else:
        number = f"{fewest} or more {kind}s" if fewest else f"any number of {kind}s"
    if method.base is BasePolicy.REQUIRED:
        return f"a base model and {number}"
    if method.base is BasePolicy.OPTIONAL:
        return f"{number}, and a base model if there is one"
    return f"{number}, a base model counting as one of them"


def _section(method: Method) -> Iterator[str]:
    yield f"## {method.name}"
    yield ""
    yield f"**{method.title}.** {method.summary}"
    yield ""
    if method.concept:
        yield from _prose(method.concept)
    if method.when:
        yield from _prose(f"*When to use it:* {method.when}")
    yield from _prose(f"*Inputs:* {inputs_in_words(method)}.")
    if method.parameters:
        yield "| parameter | type | per | default | range | meaning |"
        yield "|---|---|---|---|---|---|"
        yield from map(_row, method.parameters)
    else:
        yield "It has no parameters."
    yield ""
    if method.random:
        yield from ("The result depends on the recipe's `seed`, and on nothing else that is random.", "")
    if method.differences:
        yield from _prose(f"*Differences from mergekit:* {method.differences}")
    yield f"*Reference:* <{method.reference}>"
    yield ""


def _prose(text: str) -> tuple[str, str]:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False), ""


def _row(parameter: Parameter) -> str:
    default = "none" if parameter.default is None else f"`{json.dumps(parameter.default)}`"
    cells = (
        f"`{parameter.name}`",
        parameter.kind,
        str(parameter.scope),
        "required" if parameter.required else default,
        parameter.range or "any",
        parameter.description,
    )
    return f"| {' | '.join(cells)} |"
