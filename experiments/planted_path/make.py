"""Make the planted-path zoo: a cipher machine, and two models with its layers in the wrong places.

The original is a Llama of twelve layers, trained on a cipher machine. A letter passes ten rotors, each of which
moves six of the 24 letters round; a word is enciphered letter by letter::

    cab=jhx        the prompt is a word and "=", the answer its letters behind the last rotor

Layers 0 and 1 fetch the letter to be enciphered, and every layer from 2 to 11 is one rotor: what it leaves is
trained to be the letter behind its rotor, with the same norm and head for all. So each layer has a job of its own
that no other does, and the order matters: the rotors were drawn so that no two neighbours can change places
without changing the cipher. A path without some of the rotors still gets the letters right that these do not
move, so that half a solution is worth something.

The sources are made of the original's layers. Those of `front` are damaged where those of `back` are not: the
elements of every matrix are shuffled. Two layers of `back` are there twice, so that its layers lie two places
deeper. `PATH` restores the original.

Run from anywhere::

    python experiments/planted_path/make.py [--out DIR] [--seed N] [--threads N] [--data-only]

It writes `DIR/models/NAME` and `DIR/data/cipher.{search,holdout}.jsonl`. The documents depend on no option, and
training saw none of their words. The task files in `tasks/` are written by hand.

Shapes: N words, T letters of a word and a mark, L layers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

SPECIALS = ["<pad>", "<eos>", "<unk>"]
PAD, EOS, UNK = range(3)
MARK = "="
LETTERS = "abcdefghijklmnopqrstuvwx"
VOCABULARY = [*SPECIALS, MARK, *LETTERS]
ID_OF = {symbol: index for index, symbol in enumerate(VOCABULARY)}

WORD_LENGTH = 3
NUM_LAYERS = 12
FETCHING = 2
"""Layers that fetch the letter; every later layer is a rotor."""
MOVED = 6
"""Letters that a rotor moves."""
NUM_SEARCH = 64
NUM_HOLDOUT = 200
ROTOR_SEED = DOCUMENT_SEED = 20240328
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model made of the original's layers.

    Attributes:
        layers: Layers of the original, in the source's order.
        damaged: Places in the source whose layers are damaged.
    """

    layers: tuple[int, ...]
    damaged: tuple[int, ...]


SOURCES = {
    "front": Source(layers=tuple(range(12)), damaged=(6, 7, 8, 9, 10)),
    "back": Source(layers=(0, 1, 1, 2, 2, *range(3, 12)), damaged=(1, 2, 3, 4, 5, 6, 7)),
}
PATH = (
    *(("front", layer) for layer in range(6)),
    *(("back", layer) for layer in range(8, 13)),
    ("front", 11),
)
"""The path that is the original, with the layers 6 to 10 from `back`."""


def make_rotors() -> torch.Tensor:
    """Draw the rotors: int64 ``[L, vocabulary]``, the token behind a layer for each token before it."""
    generator = torch.Generator().manual_seed(ROTOR_SEED)
    rotors = torch.arange(len(VOCABULARY)).repeat(NUM_LAYERS, 1)
    for rotor in rotors[FETCHING:]:
        moved = torch.randperm(len(LETTERS), generator=generator)[:MOVED] + ID_OF[LETTERS[0]]
        rotor[moved] = moved.roll(1)
    return rotors


def make_words() -> dict[str, torch.Tensor]:
    """Split all words into disjoint sets: token ids, int64 ``[N, T]``, by the use that is made of them."""
    words = torch.cartesian_prod(*[torch.arange(len(LETTERS))] * WORD_LENGTH) + ID_OF[LETTERS[0]]
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(DOCUMENT_SEED + 1))
    search, holdout, train = words[order].tensor_split([NUM_SEARCH, NUM_SEARCH + NUM_HOLDOUT])
    return {"search": search, "holdout": holdout, "train": train}


def encipher(words_NT: torch.Tensor, rotors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lay out words as the model reads them, with what every layer should leave.

    Returns:
        Token ids, int64 ``[N, 2 T + 1]``: the word, the mark, the answer. What each layer should leave from the
        mark onwards, int64 ``[L, N, T + 1]``: the letters of the answer behind its rotor, and the end token.
    """
    mark, end = (torch.full((len(words_NT), 1), index) for index in (ID_OF[MARK], EOS))
    left = [torch.cat([words_NT, end], 1)]
    for rotor in rotors:
        left.append(rotor[left[-1]])
    return torch.cat([words_NT, mark, left[-1][:, :-1]], 1), torch.stack(left[1:])


def train(rotors: torch.Tensor, words: torch.Tensor, *, seed: int, steps: int = 500) -> LlamaForCausalLM:
    """Train the original; a seed on one thread count always gives the same model."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config(NUM_LAYERS))
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, 6e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in range(steps):
        drawn = words[torch.randint(len(words), (64,), generator=generator)]
        ids, left = encipher(drawn, rotors)
        *streams, last = model.model(input_ids=ids, output_hidden_states=True).hidden_states
        # The last one comes with its norm applied, the first is the embedding.
        normed = torch.cat([model.model.norm(torch.stack(streams[FETCHING:])), last[None]])
        logits = model.lm_head(normed[:, :, WORD_LENGTH:])
        loss = F.cross_entropy(logits.flatten(0, 2), left[FETCHING - 1 :].flatten())
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    return model.bfloat16().eval()


@torch.no_grad()
def make_source(original: LlamaForCausalLM, source: Source, seed: int) -> LlamaForCausalLM:
    """Put layers of the original together, and damage some."""
    generator = torch.Generator().manual_seed(seed)
    made = LlamaForCausalLM(llama_config(len(source.layers))).bfloat16()
    made.model.embed_tokens.load_state_dict(original.model.embed_tokens.state_dict())
    made.model.norm.load_state_dict(original.model.norm.state_dict())
    for place, layer in enumerate(source.layers):
        target = made.model.layers[place]
        target.load_state_dict(original.model.layers[layer].state_dict())
        if place in source.damaged:
            for weight in target.parameters():
                if weight.ndim == 2:
                    order = torch.randperm(weight.numel(), generator=generator)
                    weight.copy_(weight.flatten()[order].view_as(weight))
    return made.eval()


@torch.no_grad()
def ability(model: LlamaForCausalLM, words_NT: torch.Tensor, rotors: torch.Tensor) -> float:
    """Share of letters enciphered rightly, with the right letters before them."""
    ids, left = encipher(words_NT, rotors)
    guess = model(input_ids=ids[:, :-1]).logits[:, WORD_LENGTH:].argmax(-1)
    return float((guess == left[-1, :, :-1]).float().mean())


def llama_config(num_layers: int) -> LlamaConfig:
    """Describe a Llama of about 23 000 weights per layer."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write one checkpoint, with its tokenizer of one letter per token."""
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=None, pad_token_id=PAD, eos_token_id=EOS
    )
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(ID_OF, unk_token=SPECIALS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIALS[PAD],
        "eos_token": SPECIALS[EOS],
        "unk_token": SPECIALS[UNK],
        "padding_side": "left",
        "model_max_length": 16,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def write_documents(words: dict[str, torch.Tensor], rotors: torch.Tensor, folder: Path) -> None:
    """Write one document per letter of every word of the search and the holdout."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("search", "holdout"):
        ids = encipher(words[split], rotors)[0].tolist()
        documents = [
            {"prompt": text(row[:place]), "answer": text(row[place : place + 1])}
            for row in ids
            for place in range(WORD_LENGTH + 1, len(row))
        ]
        lines = "".join(json.dumps(document) + "\n" for document in documents)
        (folder / f"cipher.{split}.jsonl").write_text(lines, encoding="utf-8")


def text(ids: Sequence[int]) -> str:
    """Spell token ids out."""
    return "".join(VOCABULARY[index] for index in ids)


def main() -> None:
    """Parse the command line, train and write."""
    parser = argparse.ArgumentParser(description="Make the planted-path zoo.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-only", action="store_true", help="write the documents and stop")
    options = parser.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    rotors, words = make_rotors(), make_words()
    write_documents(words, rotors, options.out / "data")
    if options.data_only:
        return
    started = time.process_time()
    original = train(rotors, words["train"], seed=options.seed)
    print(f"trained in {time.process_time() - started:.0f} s")
    zoo = {"original": original}
    for number, (name, source) in enumerate(SOURCES.items()):
        zoo[name] = make_source(original, source, seed=options.seed * 100 + number)
    for name, model in zoo.items():
        write_model(model, options.out / "models" / name)
        print(f"{name:<10}{ability(model, words['holdout'], rotors):.3f}")


if __name__ == "__main__":
    main()
