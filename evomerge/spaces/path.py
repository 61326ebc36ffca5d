"""A path through the layers of the source models, the explicit form of everything data-flow spaces search.

"Evolutionary Optimization of Model Merging Recipes" (Akiba et al., 2024, https://arxiv.org/abs/2403.13187),
section 3.2. `folding.py` turns a path into a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Semantics = Literal["branch", "stream"]
"""What the scale of a hop multiplies.

`branch`: the MLP branch of the hop before it, on its way to the residual stream, or the embedding for the
first hop; the rule of the inference code that the paper's authors released. `stream`: the hidden state that
enters the hop, as the paper's text has it.
"""


@dataclass(frozen=True, kw_only=True)
class Hop:
    """One layer on a path.

    Attributes:
        model: The source model as recipes name it.
        layer: Number of its layer, from 0.
        scale: Factor on the way into this layer, see `Semantics`; finite, and not 0 for `stream`.
    """

    model: str
    layer: int
    scale: float = 1.0
