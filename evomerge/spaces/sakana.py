"""The path of the data-flow model that the authors of the method released, EvoLLM-JP-v1-10B.

For every hop its files name the layer, and what the hop's input is multiplied by before it joins the residual
stream: the embedding for the first hop, else what the MLP of the hop before gave. So the path, written as a
recipe, makes an ordinary Mistral of it. `checkpoints/sakana.py` reads the files.

Meaning: https://github.com/SakanaAI/vllm/blob/evo/vllm/model_executor/models/evomistral.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from evomerge.checkpoints.architecture import num_layers
from evomerge.checkpoints.reader import Checkpoint
from evomerge.checkpoints.sakana import LAYERS, SCALES, open_layers, read_steering, wrong
from evomerge.merge.anatomy import anatomy_of
from evomerge.recipe import Recipe
from evomerge.spaces.folding import path_recipe
from evomerge.spaces.path import Hop


@dataclass(frozen=True, kw_only=True)
class SakanaModel:
    """A released data-flow model.

    Attributes:
        name: What recipes call its layers.
        checkpoint: Its layers, once each, as an ordinary Mistral.
        hops: The path through them; scales are of the semantics `branch`.
    """

    name: str
    checkpoint: Checkpoint
    hops: tuple[Hop, ...]

    def recipe(self, dtype: str) -> Recipe:
        """The recipe of the ordinary Mistral that computes the same.

        Args:
            dtype: Torch's name of the type its weights are rounded to.

        Raises:
            ConfigurationError: A scale cannot be folded into weights.
        """
        return path_recipe(self.hops, "branch", {self.name: anatomy_of(self.checkpoint)}, dtype=dtype)


def read_sakana(folder: Path) -> SakanaModel:
    """Read a folder in the format of the released model; none of the code in it is run.

    Raises:
        CheckpointError: It is in another format, or its path cannot be followed.
    """
    checkpoint = open_layers(folder)
    layers, scales = read_steering(folder)
    stored = num_layers(checkpoint.tensors)
    for hop, (layer, scale) in enumerate(zip(layers, scales, strict=True)):
        if not (type(layer) is int and 0 <= layer < stored):
            raise wrong(folder, f"{LAYERS}: hop {hop}", f"a layer from 0 to {stored - 1}", layer)
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise wrong(folder, f"{SCALES}: hop {hop}", "a finite number", scale)
    name = str(folder)
    hops = (Hop(model=name, layer=layer, scale=scale) for layer, scale in zip(layers, scales, strict=True))
    return SakanaModel(name=name, checkpoint=checkpoint, hops=tuple(hops))
