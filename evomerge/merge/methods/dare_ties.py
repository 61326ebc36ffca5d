"""DARE-TIES: drop random elements of the task vectors, rescale the rest, merge them with TIES' sign election.

Yu et al., "Language Models are Super Mario", 2023, https://arxiv.org/abs/2311.03099; sign election from
Yadav et al., "TIES-Merging", 2023, https://arxiv.org/abs/2306.01708. This is the method that the paper
"Evolutionary Optimization of Model Merging Recipes" searches with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evomerge.merge.methods.base import BasePolicy, MergeInputs, Method
from evomerge.merge.methods.dare_linear import PARAMETERS, drop_and_rescale
from evomerge.merge.methods.ties import elect_and_merge

if TYPE_CHECKING:
    from torch import Tensor


def dare_ties(inputs: MergeInputs) -> Tensor:
    """Drop and rescale as in DARE, then elect and merge as in TIES."""
    return elect_and_merge(inputs, drop_and_rescale(inputs))


METHOD = Method(
    name="dare_ties",
    title="DARE-TIES",
    summary="Drops random elements of the task vectors, rescales the rest, merges what agrees in sign.",
    reference="https://arxiv.org/abs/2311.03099",
    parameters=PARAMETERS,
    base=BasePolicy.REQUIRED,
    random=True,
    elementwise=True,
    formula=dare_ties,
)
