"""What an entry of an experiment measures: a metric of its task, or something of the user's own.

Shape and ranges only; `fitness.own` says what a function and a judge are, and checks them against the task.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, Strict, field_validator, model_validator

from evomerge.sizes import as_seconds
from evomerge.yaml_file import StrictRecord

Finite = Annotated[float, Field(allow_inf_nan=False)]

ENDPOINT = "/chat/completions"

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""`package.module:function`."""


class FunctionSettings(StrictRecord):
    """A Python function of the user's.

    Attributes:
        name: `package.module:function`.
        given: What it is called with beside the documents: what the model said, or the model itself.
    """

    name: str
    given: Literal["generations", "model"] = "generations"


class JudgeSettings(StrictRecord):
    """A model behind an HTTP server that marks what candidates say; see `fitness.judge`.

    Attributes:
        url: Where the server's OpenAI interface begins, such as `http://localhost:8000/v1`.
        model: The judge, as the server knows it.
        prompt: What it is asked, a Jinja template.
        scale: Lowest and highest mark; scores are marks as shares of the way from one to the other.
        name: Name in tables; the model's by default.
        api_key_env: Environment variable that holds the key, where the server wants one.
        max_tokens: Longest reply in tokens; null to leave that to the server.
        concurrency: Questions on their way at the same time, from each worker.
        timeout: Longest wait for one reply, such as 60s.
        retries: How often a question is asked again when the server is busy or out of reach.
    """

    url: str
    model: Annotated[str, Field(pattern=r"^\S+$")]
    prompt: str
    scale: Annotated[tuple[Finite, Finite], Strict(False)]
    name: Annotated[str, Field(pattern=r"^\S+( \S+)*$")] | None = None
    api_key_env: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = 1024
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout: Annotated[float, Field(gt=0), BeforeValidator(as_seconds)] = 60.0
    retries: Annotated[int, Field(ge=0, le=20)] = 5

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            parts.port  # noqa: B018 - raises where it is no number
        except ValueError as error:
            raise ValueError(f"not a valid address: {error}") from None
        if parts.username is not None or parts.password is not None:
            raise ValueError("an address must not hold a password or key; name its variable in api_key_env")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected an address such as http://localhost:8000/v1, got {url!r}")
        if parts.query or parts.fragment or any(letter.isspace() for letter in url):
            raise ValueError("expected an address without '?', '#' and spaces")
        if parts.path.rstrip("/").endswith(ENDPOINT):
            raise ValueError(f"{ENDPOINT} is added to it; write what comes before, such as http://host/v1")
        return url.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _check_variable(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            # What was written may be the key.
            raise ValueError(
                "expected the name of an environment variable, such as MY_KEY, never a key itself"
            )
        return name

    @field_validator("scale")
    @classmethod
    def _check_scale(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] >= scale[1]:
            raise ValueError(f"expected the lowest mark before the highest, got {list(scale)}")
        return scale

    @property
    def label(self) -> str:
        """Name of the judge's marks among the metrics of a task."""
        return f"judge {self.name or self.model}"


OwnSettings = FunctionSettings | JudgeSettings


class MeasureSettings(StrictRecord):
    """What an entry measures.

    Attributes:
        task: Name of an lm-eval task.
        metric: One of the task's metrics, or `likelihood` or `output_tokens`; see `fitness.metrics`.
        filter: Which of the task's filters to read the metric from; its first by default.
        fitness: A function of the user's, `package.module:function`, instead of a metric.
        given: What the function is called with: `generations`, the default, or `model`.
        judge: A judge instead of a metric.
        direction: Whether larger or smaller is better; what the task says by default, larger for one's own.
    """

    task: str | None = None
    metric: str | None = None
    filter: str | None = None
    fitness: str | None = None
    given: Literal["generations", "model"] | None = None
    judge: JudgeSettings | None = None
    direction: Literal["maximize", "minimize"] | None = None

    @field_validator("fitness")
    @classmethod
    def _check_fitness(cls, name: str | None) -> str | None:
        if name is not None and not FUNCTION.fullmatch(name):
            raise ValueError(f"expected package.module:function, such as my_fitness:score, got {name!r}")
        return name

    @model_validator(mode="after")
    def _check_measure(self) -> MeasureSettings:
        named = [key for key in ("metric", "fitness", "judge") if getattr(self, key) is not None]
        if len(named) > 1:
            raise ValueError(f"expected one of metric, fitness and judge, got {' and '.join(named)}")
        if self.given is not None and self.fitness is None:
            raise ValueError("given: says what a function is called with; name the function in fitness")
        return self

    @property
    def own(self) -> OwnSettings | None:
        """The user's own measure, if it is one."""
        if self.fitness is not None:
            return FunctionSettings(name=self.fitness, given=self.given or "generations")
        return self.judge

    @property
    def measured(self) -> str | None:
        """Name of what is measured, among the metrics of the task."""
        if self.judge is not None:
            return self.judge.label
        return self.fitness or self.metric
