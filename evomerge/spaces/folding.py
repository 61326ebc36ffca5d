"""A path through layers with scales -> an ordinary recipe for the same model.

A layer adds what its two branches write to the residual stream x; every branch reads the stream through a norm:

    x ← x + writers(branch(input norm(x)))        logits = head(final norm(x))

Scales need no code of their own at inference, because they fold into weights exactly:

- `branch` multiplies what an MLP writes, so its writers, or the norm behind them, take the factor. Hop 0
  scales the embedding; where that is the output head too, the final norm takes the inverse.
- `stream` multiplies x before each hop. A norm ignores the size of its input, so x may stay as it is and all
  that follows be written in its measure: with c_t the product of the scales up to hop t, what hop t writes is
  multiplied by 1/c_t. A norm does not ignore the sign: a negative c_t flips the weights of the input norms,
  never their biases. A branch without an input norm reads x itself, so its readers are multiplied by c_t.

Norms add a small epsilon to the mean square of their input; next to it alone the size of x matters.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.2, and the inference code its authors released; see `path.Semantics`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evomerge.checkpoints.architecture import TensorRole, before_layers, layer_name
from evomerge.checkpoints.decoder import Branch, Decoder
from evomerge.errors import ConfigurationError, Fault, nearest
from evomerge.merge.anatomy import Anatomy
from evomerge.recipe import Recipe
from evomerge.spaces.path import Hop, Semantics

LARGEST = 2.0**126
"""Largest factor; it and its inverse are ordinary float32 numbers."""

Factors = dict[str, float]
"""Name of a source's tensor -> what multiplies it. For the weight of a norm: what multiplies its result."""


def path_recipe(
    hops: Sequence[Hop], semantics: Semantics, anatomies: Mapping[str, Anatomy], *, dtype: str
) -> Recipe:
    """Write a path as a recipe, one slice per hop.

    The embedding is the first hop's model's, the final norm and the head are the last one's.

    Args:
        hops: The path, at least one hop.
        semantics: What scales multiply.
        anatomies: Model -> its anatomy, for every model on the path.
        dtype: Torch's name of the type the merged weights are rounded to.

    Returns:
        A passthrough recipe. Where mergekit's `scale` cannot express a factor, in norms that multiply by
        (1 + w), it stands under `evomerge: scales`, and mergekit would leave it out.

    Raises:
        ConfigurationError: There is no such layer, or a scale cannot be folded into weights; names the hop.
    """
    _check(hops, anatomies)
    per_hop = _fold_branch(hops, anatomies) if semantics == "branch" else _fold_stream(hops, anatomies)
    slices: list[dict[str, Any]] = []
    rescaled: list[dict[str, Any]] = []
    for number, (hop, factors) in enumerate(zip(hops, per_hop, strict=True)):
        source: dict[str, Any] = {"model": hop.model, "layer_range": [hop.layer, hop.layer + 1]}
        if factors:
            anatomy = anatomies[hop.model]
            roles = {role.name: role for role in _roles_at(hops, number, anatomy)}
            shifted = {name for name in factors if anatomy.norm_offset and _is_norm_weight(roles[name])}
            rescaled += [
                {
                    "tensor": layer_name(roles[name].template, number),
                    "factor": factors.pop(name),
                    "offset": anatomy.norm_offset,
                }
                for name in sorted(shifted)
            ]
            if factors:
                source["parameters"] = {"scale": filters(factors, roles)}
        slices.append({"sources": [source]})
    return Recipe.from_dict(
        {
            "slices": slices,
            "merge_method": "passthrough",
            "dtype": "float32",
            "out_dtype": dtype,
            **({"evomerge": {"scales": rescaled}} if rescaled else {}),
        }
    )


def filters(factors: Mapping[str, float], names: Iterable[str]) -> list[dict[str, Any]]:
    """Conditional values of a setting that give tensors their factors.

    Args:
        factors: Tensor -> its factor.
        names: All tensors that the setting reaches; those without a factor must keep out of it.

    Returns:
        Filters with their values, each as short as the others allow. A filter matches the names that contain
        it, and the first that matches counts.
    """
    names = list(names)
    found: list[dict[str, Any]] = []
    settled: set[str] = set()
    for name in sorted(factors):
        if name in settled:
            continue
        for text in _shortenings(name):
            hit = [other for other in names if text in other]
            alike = all(factors.get(other, 1.0) == factors[name] for other in hit)
            if alike and settled.isdisjoint(hit):
                found.append({"filter": text, "value": factors[name]})
                settled.update(hit)
                break
        else:
            # The whole name is a part of others, which therefore come before it.
            hit.sort(key=len, reverse=True)
            found = [{"filter": other, "value": factors.get(other, 1.0)} for other in hit] + found
            settled.update(hit)
    return found


def _fold_branch(hops: Sequence[Hop], anatomies: Mapping[str, Anatomy]) -> list[Factors]:
    """The factors of every hop's tensors, the embedding's with the first and the final norm's with the last."""
    per_hop: list[Factors] = [{} for _ in hops]
    for number, hop in enumerate(hops[1:], start=1):
        if hop.scale:
            _check_size(number, "its scale", hop.scale)
        before = hops[number - 1]
        _multiply_written(per_hop[number - 1], anatomies[before.model].layers[before.layer].mlp, hop.scale)
    scale = hops[0].scale
    first, last = _ends(hops, anatomies)
    if scale:
        _check_size(0, "its scale", scale)
    if first.embedding_norm:
        per_hop[0] |= _factors(first.embedding_norm, scale)
        return per_hop
    per_hop[0] |= _factors(first.token_embeddings + first.position_embeddings, scale)
    if first.tied and scale != 1:
        if scale == 0:
            raise _fault(0, f"scale 0 of the embedding, which {hops[0].model} uses as its output head too")
        if not last.final_norm:
            raise _fault(0, f"a scale of the embedding, as {hops[-1].model} has no final norm with weights")
        per_hop[-1] |= _factors(last.final_norm, 1 / scale)
    return per_hop


def _fold_stream(hops: Sequence[Hop], anatomies: Mapping[str, Anatomy]) -> list[Factors]:
    """As `_fold_branch`."""
    per_hop: list[Factors] = [{} for _ in hops]
    product = 1.0  # c_t
    for number, (hop, factors) in enumerate(zip(hops, per_hop, strict=True)):
        product *= hop.scale
        _check_size(number, "the product of the scales up to it", product)
        layer = anatomies[hop.model].layers[hop.layer]
        for part, branch in (("attention", layer.attention), ("MLP", layer.mlp)):
            if product != 1 and not branch.input_norm and not branch.readers:
                raise _fault(number, f"a scale before its {part} branch, whose input norm has no weights")
            _multiply_written(factors, branch, 1 / product)
            factors |= _factors(branch.readers, product)
            factors |= _factors(_weights(branch.input_norm), math.copysign(1, product))
    _, last = _ends(hops, anatomies)
    if product != 1 and not last.final_norm:
        raise _fault(len(hops) - 1, f"a scale, as {hops[-1].model} has no final norm with weights")
    per_hop[-1] |= _factors(_weights(last.final_norm), math.copysign(1, product))
    return per_hop


def _multiply_written(factors: Factors, branch: Branch, factor: float) -> None:
    """Multiply what a branch adds to the residual stream."""
    factors |= _factors(branch.post_norm or branch.writers, factor)


def _factors(names: Iterable[str], factor: float) -> Factors:
    return dict.fromkeys(names, factor) if factor != 1 else {}


def _weights(names: Sequence[str]) -> list[str]:
    return [name for name in names if not _is_bias(name)]


def _is_bias(name: str) -> bool:
    return name.endswith("bias")


def _is_norm_weight(role: TensorRole) -> bool:
    return role.part == "norm" and not _is_bias(role.name)


def _ends(hops: Sequence[Hop], anatomies: Mapping[str, Anatomy]) -> tuple[Decoder, Decoder]:
    """What comes before the first hop and what after the last one."""
    return anatomies[hops[0].model].decoder, anatomies[hops[-1].model].decoder


def _roles_at(hops: Sequence[Hop], number: int, anatomy: Anatomy) -> list[TensorRole]:
    """The tensors that the settings of a hop's slice reach."""
    roles = list(anatomy.layout[hops[number].layer].values())
    for role in anatomy.layout.get(None, {}).values():
        if number == (0 if before_layers(role) else len(hops) - 1):
            roles.append(role)
    return roles


def _shortenings(name: str) -> list[str]:
    """Parts of a name by which it may be known: its module, then itself, each from short to long."""
    pieces = name.split(".")
    starts = range(len(pieces) - 2, 0, -1)
    modules = [".".join(pieces[start:-1]) for start in starts]
    return [*modules, *(".".join(pieces[start:]) for start in starts), name]


def _check(hops: Sequence[Hop], anatomies: Mapping[str, Anatomy]) -> None:
    if not hops:
        raise ConfigurationError(Fault(path="path", reason="expected at least one hop, got none"))
    for number, hop in enumerate(hops):
        anatomy = anatomies.get(hop.model)
        if anatomy is None:
            reason = f"no source model is called {hop.model!r}{nearest(hop.model, anatomies)}"
            raise ConfigurationError(Fault(path=f"hop {number}", reason=reason))
        if not 0 <= hop.layer < len(anatomy.layers):
            reason = f"{hop.model} has {len(anatomy.layers)} layers, numbered from 0, got layer {hop.layer}"
            raise ConfigurationError(Fault(path=f"hop {number}", reason=reason))
    first, last = _ends(hops, anatomies)
    if first.tied != last.tied:
        tied, untied = (hops[0], hops[-1]) if first.tied else (hops[-1], hops[0])
        reason = (
            f"it begins with {hops[0].model} and ends with {hops[-1].model}, but {tied.model} uses its "
            f"embedding as its output head and {untied.model} does not; begin and end it with one model"
        )
        raise ConfigurationError(Fault(path="path", reason=reason))


def _check_size(number: int, what: str, value: float) -> None:
    # Not a number fails every comparison.
    if not 1 / LARGEST <= abs(value) <= LARGEST:
        reason = f"expected {what} to lie between {1 / LARGEST:.1e} and {LARGEST:.1e} in size, got {value}"
        raise ConfigurationError(Fault(path=f"hop {number}", reason=reason))


def _fault(number: int, what: str) -> ConfigurationError:
    reason = f"cannot be folded into weights: {what}; keep the scale at 1"
    return ConfigurationError(Fault(path=f"hop {number}", reason=reason))
