"""The table of merge methods. A new method touches its own file, one line here, its test and its doc."""

from __future__ import annotations

from evomerge.merge.methods import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    dare_linear,
    dare_ties,
    della,
    della_linear,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    ramplus_tl,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
from evomerge.merge.methods.base import (
    Axis,
    BasePolicy,
    Combination,
    CombinationInputs,
    GramKind,
    MergeInputs,
    Method,
    Parameter,
    Scope,
)

METHODS: dict[str, Method] = {
    "linear": linear.METHOD,
    "slerp": slerp.METHOD,
    "nuslerp": nuslerp.METHOD,
    "multislerp": multislerp.METHOD,
    "karcher": karcher.METHOD,
    "task_arithmetic": task_arithmetic.METHOD,
    "ties": ties.METHOD,
    "dare_linear": dare_linear.METHOD,
    "dare_ties": dare_ties.METHOD,
    "della": della.METHOD,
    "della_linear": della_linear.METHOD,
    "breadcrumbs": breadcrumbs.METHOD,
    "breadcrumbs_ties": breadcrumbs_ties.METHOD,
    "model_stock": model_stock.METHOD,
    "sce": sce.METHOD,
    "ram": ram.METHOD,
    "ramplus_tl": ramplus_tl.METHOD,
    "nearswap": nearswap.METHOD,
    "arcee_fusion": arcee_fusion.METHOD,
    "passthrough": passthrough.METHOD,
}

__all__ = [
    "METHODS",
    "Axis",
    "BasePolicy",
    "Combination",
    "CombinationInputs",
    "GramKind",
    "MergeInputs",
    "Method",
    "Parameter",
    "Scope",
]
