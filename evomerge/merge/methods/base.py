"""What a merge method is: its parameters, what it asks of its inputs, and its formula.

A method declares its parameters once; the recipe checker, the search spaces and the documentation read them
here. Modules of methods import torch only inside their formula, so that listing methods is quick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from evomerge.recipe import Kind

if TYPE_CHECKING:
    from torch import Tensor


class Scope(StrEnum):
    """Whose parameter it is."""

    RECIPE = "recipe"
    """One value for the tensor."""
    MODEL = "model"
    """One value per input model."""
    NON_BASE = "non-base model"
    """One value per input model other than the base."""


class BasePolicy(StrEnum):
    """Whether a method needs a base model."""

    REQUIRED = "required"
    IGNORED = "ignored"


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: Name in the recipe.
        kind: Type of its value.
        scope: Whose parameter it is.
        description: One sentence.
        default: Value when the recipe says nothing; ignored when `required`.
        required: Whether the recipe must say something.
        low: Smallest value allowed.
        high: Largest value allowed.
        exclude_low: Whether `low` itself is not allowed.
    """

    name: str
    kind: Kind
    scope: Scope
    description: str
    default: bool | int | float | None = None
    required: bool = False
    low: float | None = None
    high: float | None = None
    exclude_low: bool = False

    def check(self, value: bool | int | float) -> bool | int | float:
        """Return the value if it lies in the allowed range.

        Raises:
            ValueError: It does not.
        """
        too_low = self.low is not None and (value < self.low or (self.exclude_low and value == self.low))
        if too_low or (self.high is not None and value > self.high):
            raise ValueError(f"expected a number in {self.range}, got {value!r}")
        return value

    @property
    def range(self) -> str:
        """The allowed range in words, empty when any value is allowed."""
        if self.low is None and self.high is None:
            return ""
        left = "(" if self.exclude_low or self.low is None else "["
        right = ")" if self.high is None else "]"
        low = "-inf" if self.low is None else f"{self.low:g}"
        high = "inf" if self.high is None else f"{self.high:g}"
        return f"{left}{low}, {high}{right}"


@dataclass(frozen=True, kw_only=True)
class MergeInputs:
    """Everything a formula needs for one output tensor, or for a run of elements of one.

    Attributes:
        name: Name of the output tensor.
        tensors: One float32 tensor per input model, in the recipe's order, all of one shape.
        first: Position in the whole tensor of the first element of `tensors`; 0 unless the method is
            elementwise and gets the tensor in pieces.
        base: Position of the base model in `tensors`, or None.
        shared: Values of the parameters of scope `recipe`.
        values: Per input model, the values of its parameters; empty for a base without any.
        seed: The recipe's seed.
    """

    name: str
    tensors: Sequence[Tensor]
    base: int | None
    shared: Mapping[str, Any]
    values: Sequence[Mapping[str, Any]]
    seed: int
    first: int = 0

    @property
    def base_tensor(self) -> Tensor:
        """The base model's tensor, for methods that require one."""
        assert self.base is not None
        return self.tensors[self.base]

    @property
    def others(self) -> list[int]:
        """Positions of the input models other than the base."""
        return [index for index in range(len(self.tensors)) if index != self.base]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merge method.

    Attributes:
        name: The name people cite, as recipes write it.
        title: The name in prose.
        summary: One sentence: what it does.
        reference: Where it comes from.
        parameters: Its parameters.
        base: Whether a base model is needed.
        min_models: Fewest input models, the base counted when it is needed.
        max_models: Most input models, or None.
        random: Whether the result depends on the recipe's seed.
        elementwise: Whether an element of the result depends on the same element of the inputs only; such a
            method is given tensors in pieces that fit the processor's cache, with the same result.
        formula: Merges one tensor: float32 in, float32 of the same shape out, inputs left unchanged.
    """

    name: str
    title: str
    summary: str
    reference: str
    parameters: tuple[Parameter, ...]
    base: BasePolicy
    formula: Callable[[MergeInputs], Tensor]
    min_models: int = 1
    max_models: int | None = None
    random: bool = False
    elementwise: bool = False

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name, if the method has it."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)
