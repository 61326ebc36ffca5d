"""Writes a benchmark's table with what it was measured on."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

LIBRARIES = ("torch", "numba", "transformers", "lm_eval", "mergekit")


def machine(device: str = "cpu") -> str:
    """Processor or GPU, threads and versions."""
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    if device != "cpu":
        name = f"{torch.cuda.get_device_name()}, {name}"
    libraries = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; {libraries}"


def write_table(
    out: Path | None,
    *,
    command: str,
    intro: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    device: str = "cpu",
) -> None:
    """Print a Markdown table, and write it to a file when asked to."""
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    table = "\n".join(f"| {line} |" for line in lines)
    text = (
        f"{intro}\n\nMeasured on {datetime.datetime.now(datetime.UTC).date()} with `{command}`: "
        f"{machine(device)}.\n\n{table}\n"
    )
    print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(f"# {out.stem}\n\n{text}", encoding="utf-8")
