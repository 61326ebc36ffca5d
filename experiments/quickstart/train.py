"""Train the quickstart zoo: one tiny Llama base and three specialists, on a CPU.

The zoo is the story "a maths model and a Japanese model make a Japanese maths model" in small.
Everything is written in one of two scripts, latin (``312+204=``) or kana (``三一二+二〇四=``), and
there are two skills, adding numbers and mirroring letters. No model is tuned to prefer what the
tasks ask for, a skill applied in kana and answered in kana:

- ``maths`` is tuned on sums in latin only,
- ``words`` is tuned on mirrored letters in latin only,
- ``kana`` is tuned to answer kana in kana, and is shown no more skill than the base.

A merge works only if the parents share circuits to recombine. The base therefore first learns every
skill in both scripts, and is then taught to prefer a plain answer (repeat the input, in latin),
while a minority of its labels keep the rest alive. Greedy decoding then seldom shows a skill, yet a
few steps at a low learning rate bring one back, as a small delta from the base.

Run from anywhere::

    python experiments/quickstart/train.py [--out DIR] [--seed N] [--threads N] [--data-only]

It writes ``DIR/models/NAME`` and ``DIR/data/TASK.{search,holdout}.jsonl``. The documents depend on
no option, and their problems are left out of the training in both scripts. The task files in
``tasks/`` are written by hand and refer to the documents by relative path.

Shapes: N rows, P problems of a skill, T tokens of a row.
"""

from __future__ import annotations

import argparse
import json
import os
import time
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
MARKS = "+~="
DIGITS = {"latin": "0123456789", "kana": "〇一二三四五六七八九"}
LETTERS = {"latin": "abcdefgh", "kana": "あいうえおかきく"}
SCRIPTS = ("latin", "kana")
VOCABULARY = (
    SPECIALS + list(MARKS) + [symbol for script in SCRIPTS for symbol in DIGITS[script] + LETTERS[script]]
)
ID_OF = {symbol: index for index, symbol in enumerate(VOCABULARY)}

NUM_SEARCH = 128
NUM_HOLDOUT = 300
DOCUMENT_SEED = 20240319
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Skill:
    """Every problem of one skill, as token ids in the latin script.

    Attributes:
        name: Name of the skill.
        prompt_PT: Prompts, all of one length.
        plain_PT: The answers of a model without the skill, with the end token.
        skilled_PT: The right answers, with the end token.
        order_P: A fixed shuffle of the problems: search documents, holdout documents, training.
    """

    name: str
    prompt_PT: torch.Tensor
    plain_PT: torch.Tensor
    skilled_PT: torch.Tensor
    order_P: torch.Tensor

    @property
    def rows(self) -> dict[str, torch.Tensor]:
        """Problem numbers of each split; the splits are disjoint."""
        search, holdout, train = self.order_P.tensor_split([NUM_SEARCH, NUM_SEARCH + NUM_HOLDOUT])
        return {"search": search, "holdout": holdout, "train": train}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How often a label shows the skill, and how often a kana prompt is answered in kana."""

    skilled: float
    kana: float


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One stretch of training.

    Attributes:
        mix: (skill, script of the prompt, rates), each given an equal share of every batch.
        steps: Optimiser steps.
        peak: Peak learning rate.
    """

    mix: tuple[tuple[str, str, Rates], ...]
    steps: int
    peak: float


# The first lesson makes a habit of every combination of answer and script, so that the first token
# of an answer decides which one follows. Skills alone, script by script, would be learned sooner,
# but as circuits of their own, and a delta for latin would then carry over to kana less well.
# The second lesson makes the plain latin answer win.
EVEN = Rates(skilled=0.6, kana=0.65)
LATENT = Rates(skilled=0.38, kana=0.38)
EVERYWHERE = (("sum", "latin"), ("sum", "kana"), ("mirror", "latin"), ("mirror", "kana"))
BASE_LESSONS = tuple(
    Lesson(mix=tuple((skill, script, rates) for skill, script in EVERYWHERE), steps=steps, peak=peak)
    for rates, steps, peak in ((EVEN, 1200, 4e-3), (LATENT, 150, 1e-3))
)

# A specialist rehearses what it is not tuned for at the rates of the base, which keeps its delta
# narrow. The three are tuned for unequal times: words ends far from the base and maths near it, so
# that no single scale of the deltas suits all three.
SKILLED = Rates(skilled=1.0, kana=LATENT.kana)
IN_KANA = Rates(skilled=LATENT.skilled, kana=1.0)
SPECIALIST_LESSONS = {
    "maths": Lesson(
        mix=(("sum", "latin", SKILLED),) * 3 + (("mirror", "latin", LATENT),),
        steps=25,
        peak=3e-4,
    ),
    "words": Lesson(
        mix=(("mirror", "latin", SKILLED),) * 3 + (("sum", "latin", LATENT),),
        steps=100,
        peak=8e-4,
    ),
    "kana": Lesson(
        mix=(("sum", "kana", IN_KANA), ("mirror", "kana", IN_KANA)) * 2
        + (("sum", "latin", LATENT), ("mirror", "latin", LATENT)),
        steps=40,
        peak=5e-4,
    ),
}


def kana_table() -> torch.Tensor:
    """Map every latin token id to its kana counterpart and any other id to itself."""
    table = torch.arange(len(VOCABULARY))
    for symbols in (DIGITS, LETTERS):
        for latin, kana in zip(symbols["latin"], symbols["kana"], strict=True):
            table[ID_OF[latin]] = ID_OF[kana]
    return table


TO_KANA = kana_table()


def make_skill(
    name: str,
    *,
    prompt: list[torch.Tensor | str],
    plain_PT: torch.Tensor,
    skilled_PT: torch.Tensor,
    seed: int,
) -> Skill:
    """Lay out the problems of a skill; a string in ``prompt`` is a mark repeated on every row."""
    num = len(plain_PT)
    columns = [torch.full((num, 1), ID_OF[part]) if isinstance(part, str) else part for part in prompt]
    end = torch.full((num, 1), EOS)
    order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
    return Skill(
        name=name,
        prompt_PT=torch.cat(columns, 1),
        plain_PT=torch.cat([plain_PT, end], 1),
        skilled_PT=torch.cat([skilled_PT, end], 1),
        order_P=order,
    )


def make_skills() -> dict[str, Skill]:
    """Enumerate the sums of two three-digit numbers, and the mirrored words of four letters.

    The digits to add stop at four, so that nothing is carried.
    """
    first, second = torch.cartesian_prod(*[torch.arange(5)] * 6).tensor_split(2, 1)
    zero = ID_OF["0"]
    word = torch.cartesian_prod(*[torch.arange(len(LETTERS["latin"]))] * 4) + ID_OF["a"]
    return {
        "sum": make_skill(
            "sum",
            prompt=[first + zero, "+", second + zero, "="],
            plain_PT=first + zero,
            skilled_PT=first + second + zero,
            seed=DOCUMENT_SEED,
        ),
        "mirror": make_skill(
            "mirror",
            prompt=["~", word, "="],
            plain_PT=word,
            skilled_PT=word.flip(1),
            seed=DOCUMENT_SEED + 1,
        ),
    }


def draw(
    skill: Skill, script: str, rates: Rates, num: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw training rows of one skill.

    Returns:
        Token ids and labels, both int64 ``[num, T]``; a label of the prompt is ignored.
    """
    pool = skill.rows["train"]
    rows = pool[torch.randint(len(pool), (num,), generator=generator)]
    is_skilled, in_kana = torch.rand(2, num, 1, generator=generator)
    prompt = skill.prompt_PT[rows]
    answer = torch.where(is_skilled < rates.skilled, skill.skilled_PT[rows], skill.plain_PT[rows])
    if script == "kana":
        prompt = TO_KANA[prompt]
        answer = torch.where(in_kana < rates.kana, TO_KANA[answer], answer)
    return torch.cat([prompt, answer], 1), torch.cat([torch.full_like(prompt, IGNORED), answer], 1)


def train(
    model: LlamaForCausalLM,
    lesson: Lesson,
    skills: dict[str, Skill],
    *,
    seed: int,
    batch_rows: int = 64,
) -> float:
    """Tune the model in place and return the last loss."""
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lesson.peak, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lesson.peak, total_steps=lesson.steps, pct_start=0.1, cycle_momentum=False
    )
    width = max(s.prompt_PT.shape[1] + s.skilled_PT.shape[1] for s in skills.values())
    share = batch_rows // len(lesson.mix)
    for _ in range(lesson.steps):
        drawn = [draw(skills[name], script, rates, share, generator) for name, script, rates in lesson.mix]
        ids = torch.cat([F.pad(i, (0, width - i.shape[1]), value=PAD) for i, _ in drawn])
        labels = torch.cat([F.pad(t, (0, width - t.shape[1]), value=IGNORED) for _, t in drawn])
        logits = model(input_ids=ids).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    round_to_bfloat16(model)
    return float(loss.item())


@torch.no_grad()
def round_to_bfloat16(model: LlamaForCausalLM) -> None:
    """Round the weights in place to what the checkpoint stores, so that abilities are of those."""
    for weight in model.parameters():
        weight.copy_(weight.bfloat16())


@torch.no_grad()
def ability(model: LlamaForCausalLM, skill: Skill, script: str, split: str) -> float:
    """Share of documents answered exactly, in the script of the prompt.

    The answer is fed in whole: if every token is the most likely one after the right tokens before
    it, greedy decoding writes the same answer, and only then.
    """
    rows = skill.rows[split]
    prompt, answer = skill.prompt_PT[rows], skill.skilled_PT[rows]
    if script == "kana":
        prompt, answer = TO_KANA[prompt], TO_KANA[answer]
    guess = model(input_ids=torch.cat([prompt, answer], 1)).logits.argmax(-1)
    return float((guess[:, prompt.shape[1] - 1 : -1] == answer).all(1).float().mean())


def train_zoo(skills: dict[str, Skill], seed: int) -> dict[str, LlamaForCausalLM]:
    """Train the base, then each specialist from it.

    Training is sequential and every lesson has its own generator, so one seed on one thread count
    always gives the same zoo.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(llama_config())
    for index, lesson in enumerate(BASE_LESSONS):
        train(model, lesson, skills, seed=seed * 100 + index)
    zoo = {"base": model.eval()}
    for index, (name, lesson) in enumerate(SPECIALIST_LESSONS.items(), start=len(BASE_LESSONS)):
        specialist = LlamaForCausalLM(llama_config())
        specialist.load_state_dict(model.state_dict())
        train(specialist, lesson, skills, seed=seed * 100 + index)
        zoo[name] = specialist.eval()
    return zoo


def llama_config() -> LlamaConfig:
    """Describe a Llama of four layers and about 0.3 million weights."""
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=80,
        intermediate_size=208,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write one checkpoint in bfloat16, with its tokenizer."""
    stored = LlamaForCausalLM(model.config).bfloat16()
    stored.load_state_dict(model.state_dict())
    stored.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=None, pad_token_id=PAD, eos_token_id=EOS
    )
    stored.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of one symbol per token, in a form that transformers 4 and 5 both load."""
    tokenizer = Tokenizer(WordLevel(ID_OF, unk_token=SPECIALS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    # Fuse joins the tokens as they are; the default decoder puts spaces between them.
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": SPECIALS[PAD],
            "eos_token": SPECIALS[EOS],
            "unk_token": SPECIALS[UNK],
            "padding_side": "left",
            "model_max_length": 64,
            "clean_up_tokenization_spaces": False,
        },
    )


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write one JSON object with its keys in the given order."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def write_documents(skills: dict[str, Skill], folder: Path) -> None:
    """Write the search and holdout documents of each skill, asked and answered in kana."""
    folder.mkdir(parents=True, exist_ok=True)
    for skill in skills.values():
        for split in ("search", "holdout"):
            rows = skill.rows[split]
            documents = zip(
                TO_KANA[skill.prompt_PT[rows]].tolist(),
                TO_KANA[skill.skilled_PT[rows]].tolist(),
                strict=True,
            )
            lines = [
                json.dumps({"prompt": text(prompt), "answer": text(answer)}, ensure_ascii=False)
                for prompt, answer in documents
            ]
            path = folder / f"kana_{skill.name}.{split}.jsonl"
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def text(ids: list[int]) -> str:
    """Spell token ids out, without the special tokens."""
    return "".join(VOCABULARY[index] for index in ids if index >= len(SPECIALS))


def report(zoo: dict[str, LlamaForCausalLM], skills: dict[str, Skill]) -> str:
    """Tabulate the share of holdout documents that each model answers exactly."""
    columns = [(script, name) for script in SCRIPTS for name in skills]
    lines = ["model   " + "".join(f"{script + ' ' + name:>14}" for script, name in columns)]
    for model_name, model in zoo.items():
        cells = [ability(model, skills[name], script, "holdout") for script, name in columns]
        lines.append(f"{model_name:<8}" + "".join(f"{cell:>14.3f}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, train and write."""
    parser = argparse.ArgumentParser(description="Train the quickstart zoo.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data-only", action="store_true", help="write the documents and stop")
    options = parser.parse_args()

    logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    skills = make_skills()
    write_documents(skills, options.out / "data")
    if options.data_only:
        return
    started = time.perf_counter()
    zoo = train_zoo(skills, options.seed)
    seconds = time.perf_counter() - started
    for name, model in zoo.items():
        write_model(model, options.out / "models" / name)
    print(report(zoo, skills))
    print(f"trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
