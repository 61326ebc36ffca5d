"""The modules of a model: its language model, its towers for images or sound, what joins them.

    language_model.model.layers.0.self_attn.q_proj.weight ─► text_decoder
    multi_modal_projector.linear_1.weight                 ─► multi_modal_projector
    vision_tower.encoder.layers.0.mlp.fc1.weight          ─► vision_tower

A model with one stack of layers is one module. Where there are several, the pieces of the names in which the
stacks part tell the modules; every other tensor beside them is a module of its own, but embedding, final norm
and head belong to the language model. Modules are called as their tensors are, except for the names that
mergekit's recipes use, https://github.com/arcee-ai/mergekit.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile

from evomerge.checkpoints.architecture import TensorRole, classify, part_outside, stacks

DEFAULT = "default"
"""The module of a model that has only one."""

TEXT_DECODER = "text_decoder"
"""The language model among several modules."""

_TEXT = ("language_model", "text_model", "llm", "model")
_NAMES = {**dict.fromkeys(_TEXT, TEXT_DECODER), "visual": "vision_tower"}
_PROJECTOR = "multi_modal_projector"
_MERGER = re.compile(r"(deepstack_)?merger(_|$)")
# Who holds an output head that lies beside all modules.
_HEAD_HOLDERS = (TEXT_DECODER, "shared", "decoder")
# What transformers puts before the names of a module, or not, from version to version.
_WRAPPERS = re.compile(r"^(model\.)?(?P<tower>vision_tower\.)?(?(tower)(vision_model\.)?)")
_TEXT_WRAPPER = re.compile(r"(^|\.)(language_model|text_model|llm)\.")


def find_modules(names: Iterable[str]) -> dict[str, dict[str, TensorRole]]:
    """Return module -> name of each of its tensors -> role.

    Raises:
        ValueError: The modules cannot be told from each other, or the layers of one are not numbered
            without a gap; the message says what was found.
    """
    names = sorted(set(names))
    found = stacks(names)
    owners = _owners(names, list(found)) if len(found) > 1 else {}
    modules: dict[str, list[str]] = {}
    for name in names:
        modules.setdefault(owners.get(name, DEFAULT), []).append(name)
    if len(modules) == 1:
        return {DEFAULT: classify(names)}
    return {module: classify(inside, _largest(found, inside)) for module, inside in sorted(modules.items())}


def shared_template(module: str, template: str) -> str:
    """What the template of a tensor's name is in every model that has the module.

    The language model inside another model has the names it has when it stands alone.
    """
    if module == DEFAULT:
        return template
    if module == TEXT_DECODER:
        return _TEXT_WRAPPER.sub(r"\1", template, count=1)
    return _WRAPPERS.sub(lambda match: match["tower"] or "", template)


def _owners(names: Sequence[str], containers: Sequence[str]) -> dict[str, str]:
    """Tensor -> module, where there are several stacks of layers."""
    paths = [container.split(".") for container in containers]
    shared = takewhile(lambda pieces: len(set(pieces)) == 1, zip(*paths, strict=False))
    depth = min(len(list(shared)), *(len(path) - 1 for path in paths))
    wrapper = paths[0][:depth]
    roots = {path[depth] for path in paths}
    if len(roots) == 1:
        return {}
    # Layers straight in the wrapper, beside a tower: what else lies there may be the language model's.
    direct = {path[depth] for path in paths if len(path) == depth + 1}
    titles = {root: TEXT_DECODER if root in direct else _NAMES.get(root, root) for root in roots}
    if doubled := [title for title, count in Counter(titles.values()).items() if count > 1]:
        listed = ", ".join(f"'{container}'" for container in containers)
        raise ValueError(f"expected one stack of layers for the module {doubled[0]}, found several: {listed}")
    rests = {}
    for name in names:
        pieces = name.split(".")
        rests[name] = pieces[depth:] if pieces[:depth] == wrapper and len(pieces) > depth else pieces
    known = {*titles.values(), *(rest[0] for rest in rests.values())}
    holder = next((each for each in _HEAD_HOLDERS if each in known), None)
    loose = {"head", "embedding", "norm"} if direct else {"head"}
    owners = {}
    for name, rest in rests.items():
        title = titles.get(rest[0])
        if title is None:
            joins = holder is not None and part_outside(rest[0]) in loose
            title = str(holder) if joins else _NAMES.get(rest[0], rest[0])
        elif title != TEXT_DECODER and len(rest) > 1 and _MERGER.match(rest[1]):
            title = _PROJECTOR
        owners[name] = title
    return owners


def _largest(containers: Iterable[str], names: Sequence[str]) -> str:
    """The stack of layers of a module, the largest of several; empty if it has none."""
    sizes: Mapping[str, int] = {
        container: sum(name.startswith(f"{container}.") for name in names) for container in containers
    }
    found = max(sizes, key=lambda container: sizes[container], default="")
    return found if sizes.get(found) else ""
