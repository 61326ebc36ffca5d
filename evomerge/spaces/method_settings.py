"""What search space files say about a merge method; `method_numbers.py` gives it its meaning.

Only the file itself is checked here. What the method and the models have to say about it is checked when the
space is built.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from evomerge.records import Dimension
from evomerge.yaml_file import StrictRecord

Finite = Annotated[float, Field(allow_inf_nan=False)]


def _number_or_boolean(value: Any) -> Any:
    if not isinstance(value, (bool, int, float)):
        raise ValueError(f"expected a number, true or false, got {value!r}")
    return value


Constant = Annotated[bool | float, BeforeValidator(_number_or_boolean)]


class Range(StrictRecord):
    """Where a searched number may lie.

    Attributes:
        low: Smallest value; a negative one allows negative weights.
        high: Largest value.
        start: Where the search starts; the middle by default.
        scale: `log` searches ratios instead of differences.
    """

    low: Finite
    high: Finite
    start: Finite | None = None
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _check_order(self) -> Range:
        if self.low > self.high:
            raise ValueError(f"expected low <= high, got low {self.low:g} and high {self.high:g}; swap them")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"scale log needs low > 0, got {self.low:g}")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"expected start between {self.low:g} and {self.high:g}, got {self.start:g}")
        return self

    def dimension(self, name: str) -> Dimension:
        """The searched number of this range."""
        middle = (self.low * self.high) ** 0.5 if self.scale == "log" else (self.low + self.high) / 2
        start = middle if self.start is None else self.start
        return Dimension(name=name, low=self.low, high=self.high, start=start, log=self.scale == "log")


class Group(StrictRecord):
    """Tensors that share their numbers.

    Attributes:
        name: Name for tables and messages.
        filters: A tensor whose name contains one of them belongs to the group, unless an earlier group has
            it; a group without filters takes the rest and comes last.
        depth: Whether the numbers vary over depth as the space says; false for embeddings and heads.
    """

    name: str
    filters: list[str] = []
    depth: bool = True


class MethodSettings(StrictRecord):
    """The numbers of a merge method.

    Attributes:
        merge_method: The method whose parameters are searched.
        parameters: Searched parameter -> range.
        sources: Model -> searched parameter -> range, where a model needs another range.
        constants: Fixed parameters of the recipe, such as `normalize`.
        groups: Tensor groups; one group of all tensors by default.
        seed: Seed of DARE's masks.
    """

    merge_method: str
    parameters: Annotated[dict[str, Range], Field(min_length=1)]
    sources: dict[str, dict[str, Range]] = {}
    constants: dict[str, Constant] = {}
    groups: Annotated[list[Group], Field(min_length=1)] = [Group(name="all")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _check_groups(self) -> MethodSettings:
        names = [group.name for group in self.groups]
        if len(set(names)) < len(names):
            raise ValueError(f"groups: names must differ, got {', '.join(names)}")
        for group in self.groups[:-1]:
            if not group.filters:
                raise ValueError(
                    f"groups: only the last group may go without filters, {group.name!r} has none"
                )
        if self.groups[-1].filters:
            raise ValueError(
                "groups: the last group must have no filters, so that every tensor belongs to a group"
            )
        return self
