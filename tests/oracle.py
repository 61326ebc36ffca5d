"""mergekit as the oracle of tests, imported past the warnings it gives on import."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration, evaluate_setting
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import MergeOptions, run_merge
    from mergekit.merge_methods import registry

__all__ = [
    "LoaderCache",
    "MergeConfiguration",
    "MergeOptions",
    "ModelReference",
    "evaluate_setting",
    "registry",
    "run_merge",
]
