"""Documents and judgement of the worked-answer tasks in `tasks/maths`: MGSM and GSM8K.

Their task files name `documents` and `process_results`, so the stock `lm_eval` command runs them too where
evomerge is installed. Documents come from the Hugging Face hub, or from the files as their authors publish
them, in the folder of the setting `evaluation.data_dir` (for `lm_eval`: `--metadata '{"data_dir": ...}'`).

MGSM (https://github.com/google-research/url-nlp/tree/main/mgsm) translated the first 250 problems of GSM8K's
test set (https://github.com/openai/grade-school-math). Every load checks by content that no GSM8K document
is one of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import Fault, TaskError
from evomerge.fitness.answers import final_number, sakana_number
from evomerge.fitness.language import fasttext_probability, language_of

if TYPE_CHECKING:
    from datasets import Dataset

MGSM_LANGUAGES = ("bn", "de", "en", "es", "fr", "ja", "ru", "sw", "te", "th", "zh")

FIELD = "evaluation.data_dir"


def documents(
    *, source: str, language: str = "en", data_dir: str | None = None, **_: Any
) -> Mapping[str, Dataset]:
    """Load the documents of a task: lm-eval's `custom_dataset`.

    Args:
        source: `mgsm`; `gsm8k_train`; or `gsm8k_test_rest`, the problems 250-1318 of the test set, which are
            not in MGSM and are the paper's search documents before their translation.
        language: ISO 639-1 code of the language to answer in, and of MGSM's questions.
        data_dir: Folder with `mgsm_LANGUAGE.tsv`, `train.jsonl` or `test.jsonl`, or with the folders `mgsm` and
            `gsm8k` that hold them; None for the hub.
        _: What else lm-eval passes: the task's metadata.

    Returns:
        The split `test`, each document with `id` (its position in the source), `question`, `answer` (digits)
        and `language`.

    Raises:
        TaskError: A file is missing, is not in its authors' format or is empty, or the hub is out of reach.
    """
    from datasets import Dataset

    if source == "mgsm":
        if language not in MGSM_LANGUAGES:
            known = ", ".join(MGSM_LANGUAGES)
            raise _fault(f"MGSM has no language {language!r}; expected one of {known}")
        found = _load("juletxara/mgsm", language, "test", f"mgsm_{language}.tsv", data_dir, language)
    else:
        split = "train" if source == "gsm8k_train" else "test"
        found = _load("openai/gsm8k", "main", split, f"{split}.jsonl", data_dir, language)
        found = _apart_from_mgsm(found, split)
    return {"test": Dataset.from_list(found)}


def process_results(document: Mapping[str, Any], results: list[str]) -> dict[str, float]:
    """Judge one answer.

    Returns:
        `acc` (the final number is right), `acc_lang` (and the text is in the language asked for), the audit's
        `no_answer` and `wrong_language`, and `acc_sakana` and `acc_lang_sakana`, which are the same by the
        rules of the paper's released code. A text too short to tell its language counts for neither
        `acc_lang` nor `wrong_language`.
    """
    text, language = results[0], document["language"]
    answer, wanted = final_number(text, language), Fraction(document["answer"])
    spoken = language_of(text, language)
    right, sakana_right = answer == wanted, sakana_number(text) == float(wanted)
    return {
        "acc": float(right),
        "acc_lang": float(right and spoken == language),
        "no_answer": float(answer is None),
        "wrong_language": float(spoken not in (None, language)),
        "acc_sakana": float(sakana_right),
        "acc_lang_sakana": float(sakana_right and fasttext_probability(text, language) > 0.5),
    }


@cache
def mgsm_items() -> tuple[str, ...]:
    """Hashes of the questions that GSM8K's test set and MGSM share, in their order."""
    return tuple(Path(__file__).with_name("mgsm_items.txt").read_text(encoding="ascii").split())


def question_hash(question: str) -> str:
    """Hash of an English question's words; case, spaces and marks do not count."""
    words = " ".join(re.findall(r"\w+", question.casefold()))
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def _load(
    hub: str, name: str, split: str, file: str, data_dir: str | None, language: str
) -> list[dict[str, Any]]:
    """Read the documents from the hub or from their file."""
    if data_dir is None:
        origin, rows = f"{hub} ({name}, {split})", _hub_rows(hub, name, split, file)
    else:
        folder = Path(data_dir).expanduser()
        own = folder / hub.rpartition("/")[2] / file
        path = own if own.is_file() else folder / file
        origin, rows = str(path), _tsv_rows(path) if file.endswith(".tsv") else _json_rows(path)
    found = []
    for position, row in enumerate(rows):
        question, answer = str(row.get("question") or "").strip(), _answer(row)
        if not question or answer is None:
            raise _fault(
                f"{origin}: problem {position + 1}: expected a question and its number, got {row!r:.120}"
            )
        found.append({"id": position, "question": question, "answer": answer, "language": language})
    if not found:
        raise _fault(f"{origin}: holds no problems; expected the file as its authors publish it")
    return found


def _hub_rows(hub: str, name: str, split: str, file: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(hub, name, split=split)
    except Exception as error:  # datasets and the hub's client raise whatever comes
        reason = f"the data set {hub} cannot be loaded from the hub ({type(error).__name__}: {error}); "
        raise _fault(f"{reason}to work offline, name a folder that holds {file}") from error
    return rows


def _tsv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Rows of `question TAB answer`."""
    for number, line in enumerate(_lines(path), start=1):
        fields = line.split("\t")
        if len(fields) != 2:
            raise _fault(f"{path}:{number}: expected a question, a tab and a number, got {line!r:.120}")
        yield {"question": fields[0], "answer_number": fields[1]}


def _json_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise _fault(f"{path}:{number}: expected a JSON object on each line, got {line!r:.120}")
        yield row


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise _fault(f"no such file: {path}; expected the file as its authors publish it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise _fault(f"cannot read {path}: {error}") from error
    return [line for line in text.split("\n") if line.strip()]


def _answer(row: Mapping[str, Any]) -> str | None:
    """The right answer in plain digits: MGSM's number, or what stands behind GSM8K's last `####`."""
    text = str(row["answer_number"] if "answer_number" in row else row.get("answer", ""))
    digits = text.rpartition("####")[2].replace(",", "").strip()
    return digits if re.fullmatch(r"-?\d+(?:\.\d+)?", digits) else None


def _apart_from_mgsm(found: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Take out MGSM's problems, which open the test set, and make sure that none is left.

    Raises:
        TaskError: They are not where OpenAI's files have them.
    """
    items = mgsm_items()
    taken = items if split == "test" else ()
    for document in found:
        here = question_hash(document["question"])
        expected = taken[document["id"]] if document["id"] < len(taken) else None
        if here != expected if expected else here in items:
            place = f"GSM8K's {split} set: problem {document['id'] + 1}"
            reason = "is not the one that MGSM took from there" if expected else "is one of MGSM's"
            raise _fault(f"{place} {reason}; expected {split}.jsonl as OpenAI publishes it")
    if len(found) <= len(taken):
        reason = f"GSM8K's {split} set: holds {len(found)} problems, and the first {len(taken)} are MGSM's"
        raise _fault(f"{reason}; expected {split}.jsonl as OpenAI publishes it")
    return found[len(taken) :]


def _fault(reason: str) -> TaskError:
    return TaskError(Fault(path=FIELD, reason=reason))
