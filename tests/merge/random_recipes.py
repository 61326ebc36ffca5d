"""Random recipes over tiny models: every method and form, parameters at every level, in mergekit's YAML.

What mergekit cannot merge, or merges differently on purpose, is left out; a comment beside the code says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.merge.methods import METHODS, BasePolicy, Scope
from tests.tiny import NAMES, make_model

from .test_vocabulary import TOKENS
from .test_vocabulary import model as make_word_model

NUM_LAYERS = 3
SIZES = {
    "vocab_size": 37,
    "hidden_size": 21,
    "head_dim": 6,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "intermediate_size": 25,
    "num_hidden_layers": NUM_LAYERS,
}
"""Odd sizes, and no two alike."""

ZOOS: dict[str, dict[str, Any]] = {
    "float32": {"dtypes": ["float32"]},
    "bfloat16": {"dtypes": ["bfloat16"]},
    "float16, tied": {"dtypes": ["float16"], "tie_word_embeddings": True},
    "mixed": {"dtypes": ["bfloat16", "float32", "float16", "bfloat16"]},
    "words": {"dtypes": ["float32", "bfloat16", "float32", "float16"]},
}
"""Name -> the types its models are stored in, and what is unusual about their config."""

WORDS = {**TOKENS, "three": (["<pad>", "<eos>", "b", "a", "h"], {"<x>": False, "<z>": True})}
"""Vocabularies of the zoo of that name: ordinary and added tokens of each model, numbered differently."""

RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")
TRIMMED = ("ties", "breadcrumbs", "breadcrumbs_ties")

FILTERS = [
    "self_attn",
    "mlp",
    "norm",
    "input_layernorm",
    "q_proj",
    "down_proj",
    "layers.0.",
    "layers.1.mlp",
    "layers.2",
    "embed",
    "lm_head",
    "weight",
    "*",
]
TRUE_OR_FALSE = [True, False, True, False, "true", "no", "on", "False", 0, 1]


def make_zoos(folder: Path) -> dict[str, Path]:
    """Write the models of every zoo."""
    for zoo, options in ZOOS.items():
        config = {key: value for key, value in options.items() if key != "dtypes"}
        for seed, name in enumerate(NAMES):
            dtypes = options["dtypes"]
            given = {"seed": seed, "dtype": dtypes[seed % len(dtypes)], **SIZES, **config}
            if zoo == "words":
                del given["vocab_size"]
                ordinary, added = WORDS[name]
                # Rows behind the last token belong to none.
                make_word_model(
                    folder / zoo / name, ordinary=ordinary, added=added, spare=2 * (seed == 3), **given
                )
            else:
                make_model(folder / zoo / name, **given)
    return {zoo: folder / zoo for zoo in ZOOS}


@dataclass(frozen=True, kw_only=True)
class RandomRecipe:
    """A recipe, its models named by `$`.

    Attributes:
        zoo: The zoo that has the models.
        form: How it states its inputs: models or slices, in modules or not.
        data: The recipe's plain values.
    """

    zoo: str
    form: str
    data: dict[str, Any]


def random_recipe(
    draw: random.Random, method: str, *, zoo: str | None = None, num_others: int | None = None
) -> RandomRecipe:
    """Draw a recipe of a method; `dtype: float32` unless all models are stored so.

    Args:
        draw: Source of randomness.
        method: Name of the method.
        zoo: The zoo, or None to draw one.
        num_others: Number of models besides the base in every merge, or None to draw it.
    """
    return _Recipe(draw, method, zoo or draw.choices(list(ZOOS), [5, 5, 3, 4, 2])[0], num_others).build()


class _Recipe:
    def __init__(self, draw: random.Random, method: str, zoo: str, num_others: int | None) -> None:
        self.draw = draw
        self.method = METHODS[method]
        self.zoo = zoo
        self.num_others = num_others
        parameters = self.method.parameters
        self.shared = [parameter.name for parameter in parameters if parameter.scope is Scope.RECIPE]
        self.own = [parameter.name for parameter in parameters if parameter.scope is not Scope.RECIPE]
        has_base = {BasePolicy.REQUIRED: 1.0, BasePolicy.OPTIONAL: 0.5, BasePolicy.IGNORED: 0.3}
        self.base = draw.choice(NAMES) if draw.random() < has_base[self.method.base] else None
        # Never two models whose weights nearly cancel: one model at most has a weight up to 0, and a small one.
        self.states_base = True
        self.dark = draw.choice(NAMES) if draw.random() < 0.4 else None
        # DELLA's chances must stay between 0 and 1 at every mixture of levels.
        self.keep_all = method in RANDOM and draw.random() < 0.25

    def chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    def build(self) -> RandomRecipe:
        as_slices = self.chance(0.5)
        form = self.slices() if as_slices else self.models()
        kind = "slices" if as_slices else "models"
        if self.chance(0.3):
            form = {"modules": {"default": {**form, **self.some(self.shared + self.own, 0.4)}}}
            kind += " in modules"
        data: dict[str, Any] = {**form, "merge_method": self.method.name}
        top = {
            name: self.setting(name, total=True)
            for name in (p.name for p in self.method.parameters)
            if name in ("weight", "t") or self.chance(0.5)
        }
        if self.keep_all:
            top["density"] = 1
        elif self.method.name in RANDOM:
            top["density"] = self.setting("density", total=True)
        if self.chance(0.1):
            # What belongs to another method only is ignored.
            top[self.draw.choice([name for name in ("scale", "select_topk", "gamma") if name not in top])] = (
                0.5
            )
        if top:
            data["parameters"] = top
        if self.base is not None and self.states_base:
            data["base_model"] = self.model(self.base)
        if self.zoo != "float32" or self.chance(0.8):
            data["dtype"] = "float32"
        if self.chance(0.6) and not (self.method.name in RANDOM and not self.keep_all):
            data["out_dtype"] = self.draw.choice(["bfloat16", "float16", "float32", "bfloat16"])
        if self.zoo == "words":
            data |= self.tokenizer(form)
        if self.chance(0.1):
            data["evomerge"] = {"seed": self.draw.randrange(1000)}
        return RandomRecipe(zoo=self.zoo, form=kind, data=data)

    # Inputs.

    def model(self, name: str) -> Any:
        return {"model": {"path": f"${name}"}} if self.chance(0.05) else f"${name}"

    def names(self, base: str | None) -> list[str]:
        """The models of one merge, in any order."""
        method = self.method
        weighed = [name for name in NAMES if name != base or method.base is BasePolicy.IGNORED]
        fewest = method.min_others or (0 if method.base is BasePolicy.REQUIRED and self.chance(0.1) else 1)
        most = min(len(weighed), method.max_others or len(weighed))
        count = self.num_others or self.draw.randint(fewest, max(fewest, most))
        names = self.draw.sample(weighed, count)
        if base is not None and base not in names and method.base is not BasePolicy.IGNORED:
            names.insert(self.draw.randint(0, len(names)), base)
        return names

    def source(self, name: str, among: list[str], base: str | None) -> dict[str, Any]:
        result: dict[str, Any] = {"model": self.model(name)}
        without_effect = name == base and self.method.base is not BasePolicy.IGNORED
        if without_effect and self.chance(0.8):
            return result
        chosen = self.some(self.own, 0.6).get("parameters", {})
        weighed = [other for other in among if other != base]
        if name == self.dark and "weight" in self.own and len(weighed) > 1 and not without_effect:
            chosen["weight"] = self.draw.choice([-0.1, "-1e-1", 0, [0, -0.12], [-0.15, 0.0, -0.05]])
        if self.chance(0.05) and self.shared:
            # A parameter of the whole merge has no effect on a single model.
            name = self.draw.choice(self.shared)
            chosen[name] = self.value(name)
        return {**result, "parameters": chosen} if chosen else result

    def models(self) -> dict[str, Any]:
        names = self.names(self.base)
        ignored = self.method.base is BasePolicy.IGNORED
        if self.base in names and not ignored and len(names) > 1 and self.chance(0.5):
            names.remove(self.base)
        if ignored and self.base is not None and self.base not in names and self.method.max_others:
            # It would join by itself, one too many.
            self.base = names[0]
        return {"models": [self.source(name, names, self.base) for name in names]}

    def slices(self) -> dict[str, Any]:
        pieces = []
        own_bases = self.method.base is not BasePolicy.IGNORED and self.base is not None and self.chance(0.3)
        for _ in range(self.draw.choice([1, 2, 2, 3])):
            base = self.draw.choice(NAMES) if own_bases and self.chance(0.7) else self.base
            names = self.names(base)
            length = self.draw.randint(1, NUM_LAYERS)
            sources = []
            for name in names:
                first = self.draw.randint(0, NUM_LAYERS - length)
                sources.append({**self.source(name, names, base), "layer_range": [first, first + length]})
            piece = {"sources": sources, **self.some(self.shared + self.own, 0.3)}
            if base != self.base:
                piece["base_model"] = f"${base}"
            pieces.append(piece)
        # mergekit gives the output head as many inputs as the first slice has, which fails if that is too few.
        if len(pieces[0]["sources"]) < len(pieces[-1]["sources"]):
            pieces[0], pieces[-1] = pieces[-1], pieces[0]
        # Where every slice names its own base, the recipe need not.
        self.states_base = not all("base_model" in piece for piece in pieces) or self.chance(0.5)
        return {"slices": pieces}

    # Parameters.

    def some(self, pool: list[str], probability: float) -> dict[str, Any]:
        chosen = {name: self.setting(name) for name in pool if self.chance(probability)}
        return {"parameters": chosen} if chosen else {}

    def setting(self, name: str, *, total: bool = False) -> Any:
        """A scalar, a gradient, or conditional values; `total` ones say something for every tensor."""
        form = self.draw.random()
        if form < 0.35:
            return self.value(name)
        if form < 0.55:
            return self.gradient(name)
        some = [
            {"filter": text, "value": self.gradient(name) if self.chance(0.4) else self.value(name)}
            for text in self.draw.sample(FILTERS, self.draw.randint(1, 3))
        ]
        if self.chance(0.1) and not total:
            some.append({"value": []})
        if total or self.chance(0.3):
            some.append({**({"filter": "*"} if self.chance(0.3) else {}), "value": self.value(name)})
        return some[0] if len(some) == 1 and self.chance(0.5) else some

    def gradient(self, name: str) -> Any:
        """Numbers over the depth; a count has none, as mergekit refuses fractions of it."""
        if name == "max_iter":
            return self.value(name)
        return [self.value(name, alone=False) for _ in range(self.draw.randint(1, 5))]

    def value(self, name: str, *, alone: bool = True) -> Any:
        draw = self.draw
        between: dict[str, tuple[float, float]] = {
            "weight": (0.3, 1.5),
            "density": (0.15, 1),
            "gamma": (0, 0.2),
            "lambda": (0.2, 2),
            "t": (0, 0.05) if self.method.name == "nearswap" else (-0.2, 1.2),
            "scale": (-2, 2),
            "select_topk": (0, 1),
            "r": (-0.5, 0.5),
            "alpha": (0, 1),
            "epsilon": (0, 0.02),
        }
        others: dict[str, list[Any]] = {
            "weight": [1, "5e-1", "0.8"],
            "density": [1, "1e0", 0.5],
            "gamma": [0, "1e-2"],
            "lambda": [1, "1.5e0", -0.7],
            "t": ["1e-2", 0],
            "scale": [1, 0, "2e-1"],
            "select_topk": [1, 0, "5e-1"],
            "alpha": [0, "2e-1"],
            "r": [0, "1e-1"],
            "epsilon": [0, "1e-3", 1e-5],
            "max_iter": [0, 1, 3, "10", 12],
            "tol": [1e-5, "1e-7", 1e-4],
            "eps": [1e-8, "1e-6", 1e-2],
        }
        if self.method.name in RANDOM and name == "density":
            if self.keep_all or (alone and self.chance(0.2)):
                return draw.choice([1, 1.0, "1e0"])
            della = self.method.name.startswith("della")
            return round(draw.uniform(*((0.35, 0.65) if della else (0.15, 0.95))), 3)
        if self.method.name in RANDOM and name == "epsilon":
            return draw.choice([round(draw.uniform(0.01, 0.3), 3), "1e-1", 0])
        if name not in others:
            return draw.choice(TRUE_OR_FALSE)
        if name in between and self.chance(0.7):
            return round(draw.uniform(*between[name]), 3)
        return draw.choice(others[name])

    # Tokenizers.

    def tokenizer(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """A source of the vocabulary, and what becomes of single tokens.

        Embeddings of tokens come from models that give both ends of the merged model: mergekit has no others.
        """
        holder = form["modules"]["default"] if "modules" in form else form
        pieces = holder.get("slices") or [{"sources": holder["models"]}]
        everyone = [_name(source["model"]) for piece in pieces for source in piece["sources"]]
        ends = [{_name(source["model"]) for source in pieces[place]["sources"]} for place in (0, -1)]
        usable = [name for name in NAMES if all(name in end for end in ends)]
        sources = ["union", "union", f"${self.draw.choice(everyone)}"]
        if self.chance(0.5):
            # Without base_model, mergekit's base is any of the models.
            sources += ["base"] if self.base is not None and self.states_base else []
            return {"tokenizer_source": self.draw.choice(sources)}
        settings: dict[str, Any] = {"source": self.draw.choice(sources)}
        if self.chance(0.5):
            settings["pad_to_multiple_of"] = self.draw.choice([1, 4, 8, "16"])
        tokens = {}
        for _ in range(self.draw.randint(0, 2)):
            name = self.draw.choice(usable) if usable else None
            token, source = self.token(name)
            tokens[token] = {"source": source, **({"force": True} if self.chance(0.4) else {})}
        return {"tokenizer": {**settings, **({"tokens": tokens} if tokens else {})}}

    def token(self, name: str | None) -> tuple[str, Any]:
        """A token, and where its embedding comes from."""
        every = sorted({token for known in WORDS.values() for part in known for token in part})
        choices: list[Callable[[], tuple[str, Any]]] = [
            lambda: (self.draw.choice(["<new>", *every]), {"kind": "zero"})
        ]
        if name is not None:
            known = [token for part in WORDS[name] for token in part]
            row = {"kind": "model_token", "model": f"${name}"}
            choices += [
                lambda: (self.draw.choice(known), f"${name}"),
                lambda: (self.draw.choice(["<new>", *every]), {**row, "token": self.draw.choice(known)}),
                lambda: (
                    self.draw.choice(["<new>", *every]),
                    {**row, "token_id": self.draw.randrange(len(known))},
                ),
            ]
        return self.draw.choice(choices)()


def _name(model: Any) -> str:
    text = model if isinstance(model, str) else model["model"]["path"]
    return str(text).removeprefix("$")
