"""LoRA adapters as PEFT saves them: what their files say, and the formula.

    adapter_config.json ───────► Adapter.settings ┐
    adapter_model.safetensors ─► Adapter.weights ─┴► adapter_plan ─► Update ─► updated_tensor

With W a stored weight of shape [out, in], and A [r, in], B [out, r] the adapter's factors,

    W' = W + s * B A,    s = lora_alpha / r,  or lora_alpha / sqrt(r) with `use_rslora`,

in float32, rounded once to the type of W. Other tensors of the adapter's file replace the model's. What the
formula does not cover is refused by name, never skipped: the result would be a model that nobody trained.
Which tensor of a model is meant is `adapter_plan`'s business, where the result is kept `adapted`'s.

Sources: Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023, rsLoRA,
https://arxiv.org/abs/2312.03732; the files are PEFT's, https://huggingface.co/docs/peft/developer_guides/checkpoint

Shapes: R rank, I inputs, O outputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.mapped import stamp_of
from evomerge.checkpoints.reader import CONFIG, DTYPES, Checkpoint, contained, read_header, read_json
from evomerge.errors import CheckpointError

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
FLOATS = ("F32", "F16", "BF16")
"""safetensors types that can be merged."""

_MERGE_FIRST = "merge the adapter with peft's merge_and_unload and name the folder of the result instead"
_CONVERT = "load the adapter with peft and save it again with safe_serialization=True"
# PEFT writes most of these into every adapter, as false or null. Every other `use_*` field is refused too.
_REFUSED = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
)
# Other ways to start a LoRA change the weights of the model that it is trained on.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# A pattern is a regular expression from a stranger: nested or many repetitions could run for years.
_MAX_PATTERN_LENGTH, _MAX_REPETITIONS = 200, 3
_REPETITION, _NESTED = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `adapter_config.json` says about the formula.

    Attributes:
        rank: r.
        alpha: `lora_alpha`.
        rank_pattern: Pattern of module names -> their own r.
        alpha_pattern: Pattern of module names -> their own alpha.
        rslora: Whether s is alpha / sqrt(r).
        fan_in_fan_out: Whether the model stores its weights as [in, out].
        tied: Whether embedding and head were one tensor in training.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, float]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    fan_in_fan_out: bool
    tied: bool

    def rank_of(self, module: str) -> int:
        """The rank r of a module's factors."""
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """The scale s of a module's product B A."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter's folder, opened for reading.

    Attributes:
        folder: Where it lies.
        settings: What its config says.
        weights: Its tensors.
    """

    folder: Path
    settings: Settings
    weights: Checkpoint

    @property
    def config_file(self) -> Path:
        """Where its settings lie."""
        return self.folder / ADAPTER_CONFIG

    @property
    def file(self) -> Path:
        """Where its tensors lie."""
        return self.folder / ADAPTER_WEIGHTS

    @classmethod
    def open(cls, folder: Path) -> Adapter:
        """Read the settings and the header of an adapter's folder.

        Raises:
            CheckpointError: It is no adapter, or one of a kind that is not supported.
        """
        if not (folder / ADAPTER_CONFIG).exists():
            what = "a full model" if (folder / CONFIG).exists() else "no adapter"
            raise CheckpointError(
                f"{folder}: no {ADAPTER_CONFIG}, so this is {what}; name the folder of a PEFT adapter after '+'"
            )
        config = read_json(folder, ADAPTER_CONFIG)
        settings = _settings(config, folder / ADAPTER_CONFIG)
        if not (folder / ADAPTER_WEIGHTS).exists():
            raise CheckpointError(
                f"{folder}: no {ADAPTER_WEIGHTS}; pickles such as adapter_model.bin are not loaded, as they "
                f"can run code: {_CONVERT}"
            )
        file = contained(folder, ADAPTER_WEIGHTS)
        stamp = stamp_of(file.stat())
        tensors = read_header(file)
        if not tensors:
            raise CheckpointError(f"{file}: expected the tensors of an adapter, found none; {_CONVERT}")
        for name, info in tensors.items():
            if info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{file}: tensor '{name}': expected one of {', '.join(FLOATS)}, found {info.dtype}; {_CONVERT}"
                )
        weights = Checkpoint(
            folder=folder, config=config, tensors=tensors, files=(file,), stamps={file: stamp}
        )
        return cls(folder=folder, settings=settings, weights=weights)


@dataclass(frozen=True, kw_only=True)
class Update:
    """How one tensor of a model changes.

    Attributes:
        name: Its name in the model.
        replacement: The adapter's tensor that takes its place first, or None.
        factors: The adapter's tensors A and B, or None.
        offset: The adapter's tensor that is added times s, or None.
        scale: s.
        transposed: Whether the product B A is transposed.
    """

    name: str
    replacement: str | None = None
    factors: tuple[str, str] | None = None
    offset: str | None = None
    scale: float = 1.0
    transposed: bool = False


def updated_tensor(update: Update, adapter: Adapter, model: Checkpoint) -> torch.Tensor:
    """Compute a changed tensor, in the type that the model stores it in.

    Raises:
        CheckpointError: The adapter, or the result, holds NaN or infinity.
    """
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[model.tensors[update.name].dtype].torch_name)
    result = model.tensor(update.name) if update.replacement is None else _read(adapter, update.replacement)
    if update.factors is not None:
        a_RI, b_OR = (_read(adapter, name).float() for name in update.factors)
        delta_OI = b_OR @ a_RI
        # The scale after the product, as PEFT has it: the same numbers to the bit.
        result = (delta_OI.t() if update.transposed else delta_OI).mul_(update.scale).add_(result)
    if update.offset is not None:
        result = (_read(adapter, update.offset).float() * update.scale).add_(result)
    result = result.to(dtype)
    if not bool(torch.isfinite(result).all()):
        raise CheckpointError(
            f"{adapter.folder}: with this adapter '{update.name}' of {model.folder} holds NaN or infinity; "
            "check that the adapter was trained on this model"
        )
    return result


def _read(adapter: Adapter, name: str) -> torch.Tensor:
    import torch

    tensor = adapter.weights.tensor(name)
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(
            f"{adapter.file}: tensor '{name}': expected finite numbers, found NaN or infinity; the training "
            "went wrong, use an earlier save of the adapter"
        )
    return tensor


def _settings(config: Mapping[str, Any], file: Path) -> Settings:
    """Check the fields that matter; the rest is about training."""

    def refuse(field: str, expected: str, remedy: str = _MERGE_FIRST) -> CheckpointError:
        return CheckpointError(f"{file}: {field}: expected {expected}, found {config.get(field)!r}; {remedy}")

    def patterns(field: str, integer: bool) -> dict[str, float]:
        value = config.get(field) or {}
        if not isinstance(value, dict) or not all(_is_positive(each, integer) for each in value.values()):
            raise refuse(field, "names mapped to numbers above 0", _CONVERT)
        for pattern in value:
            if not _is_safe(pattern):
                raise refuse(field, "regular expressions without nested repetitions")
        return value

    if config.get("peft_type") != "LORA":
        raise refuse("peft_type", "'LORA'")
    for field in sorted(config):
        refused = field in _REFUSED or (field.startswith("use_") and field != "use_rslora")
        if refused and config[field] not in (None, False, [], {}):
            raise refuse(field, "it to be off")
    start = config.get("init_lora_weights")
    if not any(start is known or start == known for known in _HARMLESS_STARTS):
        raise refuse(
            "init_lora_weights",
            "a start that leaves the model as it is",
            "save the adapter with peft's path_initial_model_for_weight_conversion",
        )
    if not _is_positive(config.get("r"), integer=True):
        raise refuse("r", "a whole number above 0", _CONVERT)
    if not _is_positive(config.get("lora_alpha"), integer=False):
        raise refuse("lora_alpha", "a number above 0", _CONVERT)
    for field in ("use_rslora", "fan_in_fan_out", "ensure_weight_tying"):
        if config.get(field) not in (True, False, None):
            raise refuse(field, "true or false", _CONVERT)
    return Settings(
        rank=config["r"],
        alpha=config["lora_alpha"],
        rank_pattern=patterns("rank_pattern", integer=True),
        alpha_pattern=patterns("alpha_pattern", integer=False),
        rslora=bool(config.get("use_rslora")),
        fan_in_fan_out=bool(config.get("fan_in_fan_out")),
        tied=bool(config.get("ensure_weight_tying")),
    )


def _is_positive(value: object, integer: bool) -> bool:
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        return False
    return 0 < value < 2**31


def _is_safe(pattern: str) -> bool:
    if len(pattern) > _MAX_PATTERN_LENGTH or _NESTED.search(pattern):
        return False
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(_REPETITION.findall(pattern)) <= _MAX_REPETITIONS


def _first_match(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
