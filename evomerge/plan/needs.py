"""Memory of a worker and disk of a run."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.checkpoints.decoder import find_decoder, text_config
from evomerge.checkpoints.reader import Checkpoint
from evomerge.plan.records import DiskEntry, MemoryEntry
from evomerge.plan.tokens import TaskLoad
from evomerge.prepare import PreparedRun
from evomerge.workers import PROCESS_BYTES, available_memory, worker_memory

TORCH_ITEMSIZE = {"float64": 8, "float32": 4}
"""Bytes of an element; those of other types of live models are 2."""

BLOCK_BYTES = 4096
"""What a file takes at least."""

JOURNAL_BYTES = 1000
"""Line of the journal, the genome apart."""

GENE_BYTES = 22
SCORE_BYTES = 8
ARRAY_BYTES = 300
"""What each array adds to a file of scores beside its values."""


def worker_needs(
    prepared: PreparedRun, load: TaskLoad, *, most_parameters: int, most_layers: int
) -> MemoryEntry:
    """Memory of one worker.

    Args:
        prepared: The experiment.
        load: What it is scored on.
        most_parameters: Parameters of the largest candidate to be expected.
        most_layers: Layers of it.
    """
    donor = prepared.checkpoints[prepared.spec.donor]
    itemsize = live_itemsize(prepared)
    model = round(sum(tensor_sizes(donor)) * itemsize)
    # The winner is scored from its checkpoint, which may be larger than any source.
    largest = round(most_parameters * itemsize)
    working = max(pool_bytes(prepared) - model, largest)
    scoring = scoring_bytes(donor, load, itemsize=math.ceil(itemsize), layers=most_layers)
    sources = sum(checkpoint.nbytes for checkpoint in prepared.checkpoints.values())
    on_gpu = prepared.spec.device.startswith("cuda")
    copies = min(sources, prepared.spec.memory_budget or sources) if on_gpu else sources
    needed = model + working + (scoring or 0)
    return MemoryEntry(
        process=PROCESS_BYTES,
        live_model=model,
        working=working,
        scoring=scoring,
        sources=copies,
        # On its way to a GPU a model lies in main memory.
        host=PROCESS_BYTES + (max(model, largest) if on_gpu else needed),
        device=needed + copies if on_gpu else 0,
        host_available=available_memory(),
        device_available=free_gpu_memory() if on_gpu else 0,
    )


def pool_bytes(prepared: PreparedRun) -> int:
    """Memory by which the number of workers is chosen: what merging with models like these takes at most."""
    num_models = len(prepared.checkpoints) + len(prepared.stages) - 1
    donor = prepared.checkpoints[prepared.spec.donor]
    return worker_memory(tensor_sizes(donor), itemsize=live_itemsize(prepared), num_models=num_models)


def tensor_sizes(checkpoint: Checkpoint) -> list[int]:
    """Number of elements of every tensor."""
    return [math.prod(info.shape) for info in checkpoint.tensors.values()]


def mean_itemsize(checkpoint: Checkpoint) -> float:
    """Bytes per element of a checkpoint, on average."""
    return checkpoint.nbytes / max(1, sum(tensor_sizes(checkpoint)))


def live_itemsize(prepared: PreparedRun) -> float:
    """Bytes per parameter of the live model, on average."""
    dtype = prepared.experiment.evaluation.dtype
    if dtype != "auto":
        return TORCH_ITEMSIZE.get(dtype, 2)
    return mean_itemsize(prepared.checkpoints[prepared.spec.donor])


def scoring_bytes(donor: Checkpoint, load: TaskLoad, *, itemsize: int, layers: int) -> int | None:
    """Keys and values of a batch, its activations and its logits; None if the config does not tell."""
    config = read_config(donor)
    if config is None:
        return None
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    per_token = cache_bytes(config, layers=layers, itemsize=itemsize)
    passing = (2 * config.hidden_size + 3 * wide) * itemsize
    most = 0
    for batch in load.batches:
        # Of judged prompts the contexts are read first, and each of their choices has a copy.
        copies = 1.0 if batch.new.high else 1.25
        cache = (batch.length + batch.new.high) * per_token * copies
        # Of judged prompts all logits are kept, in float32 beside the model's own type; of others the last.
        logits = config.vocab_size * (itemsize + 4) * (1 if batch.new.high else batch.length)
        most = max(most, batch.rows * round(cache + batch.length * passing + logits))
    return most


def cache_bytes(config: Any, *, layers: int, itemsize: int) -> int:
    """Keys and values of one token, in a model with a config as `read_config` gives it."""
    heads = config.num_attention_heads
    kept = getattr(config, "num_key_value_heads", None) or heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * layers * kept * size * itemsize)


def read_config(donor: Checkpoint) -> Any:
    """The part of a config that describes the layers, as transformers reads it; None if that is not enough."""
    from transformers import CONFIG_MAPPING

    try:
        config = CONFIG_MAPPING[donor.config["model_type"]].from_dict(dict(donor.config)).get_text_config()
    except Exception:  # A config class may raise anything.
        return None
    known = all(
        isinstance(getattr(config, key, None), int)
        for key in ("num_attention_heads", "hidden_size", "vocab_size")
    )
    return config if known else None


def multiplied_parameters(donor: Checkpoint, parameters: float) -> float:
    """Parameters that are multiplied with every token: all but an embedding that is only looked up."""
    decoder = find_decoder(donor.tensors, text_config(donor.config))
    if decoder.tied or not decoder.head:
        return parameters
    return parameters - sum(math.prod(donor.tensors[name].shape) for name in decoder.token_embeddings)


def disk_needs(
    prepared: PreparedRun,
    *,
    statistics: int,
    stage_parameters: Sequence[int],
    num_searched: int,
    num_final: int,
    folder: Path,
) -> DiskEntry:
    """Disk of a run.

    Args:
        prepared: The experiment.
        statistics: Bytes of statistics of the sources.
        stage_parameters: Parameters of the largest candidate to be expected of each search.
        num_searched: Number of evaluations on the search documents.
        num_final: Number of evaluations on the held-out documents.
        folder: The run directory, which need not exist.
    """
    itemsize = mean_itemsize(prepared.checkpoints[prepared.spec.donor])
    *stages, last = (round(parameters * itemsize) for parameters in stage_parameters)
    winner = max([last, *stages])
    if not prepared.holdout_documents and not prepared.experiment.finish.export_model:
        winner = 0
    scores = num_searched * _file_bytes(prepared.search_documents, prepared.spec.metrics)
    scores += num_final * _file_bytes(prepared.holdout_documents, prepared.spec.metrics)
    genes = sum(len(stage.space.dimensions) * stage.evaluations for stage in prepared.stages)
    scores += (num_searched + num_final) * JOURNAL_BYTES + genes * GENE_BYTES
    return DiskEntry(
        statistics=statistics,
        scores=scores,
        winner=winner,
        stages=sum(stages),
        total=statistics + scores + winner + sum(stages),
        available=free_disk(folder),
    )


def _file_bytes(documents: Sequence[Any], metrics: Mapping[str, Sequence[Any]]) -> int:
    columns = [(len(item.doc_ids), 1 + len(metrics[item.name])) for item in documents]
    size = sum(count * (SCORE_BYTES * rows + ARRAY_BYTES) for rows, count in columns)
    return math.ceil(size / BLOCK_BYTES) * BLOCK_BYTES


def free_disk(folder: Path) -> int:
    """Free bytes where a folder is or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def free_gpu_memory() -> int:
    """Free bytes of the GPU that has the fewest."""
    import torch

    return min(int(torch.cuda.mem_get_info(index)[0]) for index in range(torch.cuda.device_count()))
