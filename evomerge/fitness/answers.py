r"""Reads the number on which a model's worked answer ends.

The answer is what stands in the last `\boxed{}` or after the last `####`, else the last number of the text.
Numbers are read as people write them: digits of any script, the thousands separators and the decimal mark of
the text's language, signs, fractions, and words that multiply (`8万`, `1.5 million`). A number spelled out in
words alone is no answer.

`sakana_number` is the rule of the released evaluation code of "Evolutionary Optimization of Model Merging
Recipes" (arXiv 2403.13187), kept for comparison with its numbers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache

COMMA_DECIMALS = frozenset({"de", "es", "fr", "ru"})
"""Languages that write 2,50 and group thousands by spaces."""

DOT_GROUPS = frozenset({"de", "es"})
"""Languages in which 1.234 is more than a thousand, not one and a bit."""

MULTIPLIERS: dict[str, dict[str, int]] = {
    "bn": {"হাজার": 10**3, "লাখ|লক্ষ": 10**5, "মিলিয়ন": 10**6, "কোটি": 10**7},
    "de": {"tausend": 10**3, "million(?:en)?|mio": 10**6, "milliarden?|mrd": 10**9},
    "en": {"thousands?": 10**3, "millions?": 10**6, "billions?": 10**9},
    "es": {"mil millones": 10**9, "mil": 10**3, "millón|millones": 10**6},
    "fr": {"mille": 10**3, "millions?": 10**6, "milliards?": 10**9},
    "ja": {"百万": 10**6, "千万": 10**7, "百": 10**2, "千": 10**3, "万": 10**4, "億": 10**8},
    "ru": {"тыс|тысяч[аиу]?": 10**3, "млн|миллион(?:а|ов)?": 10**6, "млрд|миллиард(?:а|ов)?": 10**9},
    "te": {"వేలు?": 10**3, "లక్ష(?:లు?)?": 10**5, "మిలియన్": 10**6, "కోట్లు?|కోటి": 10**7},
    "th": {"พัน(?!ธ)": 10**3, "หมื่น": 10**4, "แสน": 10**5, "ล้าน": 10**6},
    "zh": {"百万": 10**6, "千万": 10**7, "百(?!分)": 10**2, "千(?![克米瓦卡])": 10**3}
    | {"[万萬]": 10**4, "[亿億]": 10**8},
}
"""Words behind a number that multiply it, as patterns: 3千 is 3000, but 3千克 are 3 kilograms."""

LEADING_MULTIPLIERS: dict[str, dict[str, int]] = {"sw": {"elfu": 10**3, "laki": 10**5, "milioni": 10**6}}
"""Words before a number that multiply it."""

UNSPACED = frozenset({"ja", "th", "zh"})
"""Languages that put no space between words."""

PARTICLES = frozenset("はがをもにで是为為等于於คือ")
"""Letters that may stand right before a sign; after any other letter or digit a `-` joins or subtracts."""

SAME = str.maketrans("．－−‐‑–／％＝（）＄￥⁄", ".-----/%=()$¥/")
"""Characters that mean the same in a number."""

THIN = "\u00a0\u2009\u202f"  # spaces that do not break a number
GROUP = r"[1-9]\d{0,2}"
SPACED = rf"{GROUP}(?:[{THIN}]\d{{3}})+|{GROUP}(?:['’]\d{{3}})+"
COMMAS = rf"{GROUP}(?:,\d{{3}})+"
POINT_FORMS = (
    rf"({COMMAS}|[1-9]\d?(?:,\d\d)+,\d{{3}}|{SPACED}|\d+)(?:\.(\d+))?",
    rf"({GROUP}(?:\.\d{{3}}){{2,}})(?:,(\d+))?",
    rf"({GROUP}(?:\.\d{{3}})+),(\d+)",
)
COMMA_FORMS = (
    rf"({COMMAS})(?:\.(\d+))?",
    rf"({GROUP}(?:\.\d{{3}}){{2,}}|{GROUP}(?: \d{{3}})+|{SPACED})(?:[.,](\d+))?",
    rf"({GROUP}(?:\.\d{{3}})+),(\d+)",
    r"(\d+)(?:[.,](\d+))?",
)
RUN = re.compile(rf"\d(?:\d|[.,'’ {THIN}](?=\d))*")
DIGITS = re.compile(r"\d+")
EXPONENT = re.compile(r"(?:\^\s*\{?|(?<![^\W\d_])(?:[cdkm]?m|ft|yd|in))$")
MINUS = re.compile(
    r"(-|(?<![^\W\d_])(?:minus|menos|moins|минус)|マイナス|[负負]|ลบ|মাইনাস|మైనస్)(\s*)[$€£¥₹฿৳₽]?$",
    re.IGNORECASE,
)
BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{([^{}]*)\}")
HASHES = re.compile(
    r"####[ \t]*([^\d\n]{0,4}\d(?:[\d.,]*\d)?[ \t]*[^\W\d]{0,12}[%.。]?)[ \t]*$", re.MULTILINE
)


def final_number(text: str, language: str) -> Fraction | None:
    """Read the number on which a worked answer ends.

    Args:
        text: What the model wrote.
        language: ISO 639-1 code of the language it was asked to write in; decides what 1.234 and 2,50 mean.

    Returns:
        The number, exact; None when the text holds none.
    """
    text = _plain(text)
    for part in (*reversed(BOXED.findall(text)), *reversed(HASHES.findall(text)), text):
        numbers = _numbers(part, language)
        if numbers:
            return numbers[-1].value
    return None


def sakana_number(text: str) -> float | None:
    """Read the last number by the paper's rule: the last run of digits with at most one point.

    Commas end a run, so 1,234 reads as 234, and -5 as 5.
    """
    runs = re.findall(r"\d*\.?\d+", text)
    return float(runs[-1]) if runs else None


@dataclass(frozen=True, kw_only=True)
class _Number:
    """A number in a text, from `start` to `end`; `factor` is that of the word that multiplied it."""

    start: int
    end: int
    value: Fraction
    factor: int = 1


def _plain(text: str) -> str:
    """Bring digits, signs and LaTeX into one form."""
    # A full-width comma separates thousands only between full-width digits; elsewhere it ends a clause.
    text = re.sub(r"(?<=[０-９])，(?=[０-９]{3})", ",", text)
    text = re.sub(r"(?![0-9])\d", lambda found: str(unicodedata.decimal(found[0])), text)
    text = re.sub("[¼-¾⅐-⅞]", lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
    text = text.translate(SAME)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d)\\[,; ](?=\d)", "\u2009", text.replace("{,}", ",").replace(r"\!", ""))
    text = re.sub(r"\\[dt]?frac\s*\{\s*([\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}", r" \1/\2", text)
    return re.sub(r"\\([$%])", r"\1", text)


def _numbers(text: str, language: str) -> list[_Number]:
    """Every number of a text, signed and multiplied out; of a list such as 1,2,3 only the last."""
    found: list[_Number] = []
    for number in _fractions(text, _runs(text, language)):
        number = _multiplied(text, number, language)
        last = found[-1] if found else None
        if last and number.value < last.factor and not text[last.end : number.start].strip():
            # 11万4200: the parts of one number
            found[-1] = replace(number, start=last.start, value=last.value + number.value)
        else:
            found.append(number)
    return [
        replace(number, value=-number.value) if _is_negative(text, number.start) else number
        for number in found
    ]


def _runs(text: str, language: str) -> Iterator[_Number]:
    """Digits with what belongs between them."""
    for run in RUN.finditer(text):
        start, end = run.span()
        if EXPONENT.search(text[max(0, start - 4) : start]):
            continue
        # .5 after a space, but not Rs.5
        zero = "0." if re.fullmatch(r"(?:[\s=($€£¥:])?\.", text[max(0, start - 2) : start]) else ""
        while (parts := _form(zero + text[start:end], language)) is None:
            first = DIGITS.match(text, start)
            assert first is not None
            yield _Number(start=start, end=first.end(), value=Fraction(Decimal(zero + first[0])))
            start, zero = first.end() + 1, ""
        yield _Number(start=start, end=end, value=Fraction(Decimal(".".join(parts))))


def _form(run: str, language: str) -> tuple[str, str] | None:
    """Digits before and after the decimal mark, if the run is one number in that language."""
    for form in _forms(language):
        if match := form.fullmatch(run):
            return re.sub(r"\D", "", match[1]), match[2] or "0"
    return None


@cache
def _forms(language: str) -> tuple[re.Pattern[str], ...]:
    forms = COMMA_FORMS if language in COMMA_DECIMALS else POINT_FORMS
    dotted = (rf"({GROUP}\.\d{{3}})(\d{{0}})",) if language in DOT_GROUPS else ()
    return tuple(re.compile(form) for form in (*dotted, *forms))


def _fractions(text: str, numbers: Iterable[_Number]) -> list[_Number]:
    """Join 3/4, and 2 3/4; dates such as 3/4/2024 stay apart."""
    chains: list[list[_Number]] = []
    for number in numbers:
        if chains and re.fullmatch(r"\s?/\s?", text[chains[-1][-1].end : number.start]):
            chains[-1].append(number)
        else:
            chains.append([number])
    found: list[_Number] = []
    for chain in chains:
        if len(chain) != 2 or chain[1].value == 0:
            found += chain
            continue
        top, bottom = chain
        number = replace(bottom, start=top.start, value=top.value / bottom.value)
        whole = found[-1] if found else None
        if whole and number.value < 1 and whole.value.denominator == 1 and text[whole.end : top.start] == " ":
            number = replace(number, start=found.pop().start, value=whole.value + number.value)
        found.append(number)
    return found


def _multiplied(text: str, number: _Number, language: str) -> _Number:
    """Take in a word beside the number that multiplies it."""
    for pattern, factor in MULTIPLIERS.get(language, {}).items():
        boundary = "" if language in UNSPACED else r"(?![^\W\d_])"
        if word := re.compile(rf"\s?(?:{pattern}){boundary}", re.IGNORECASE).match(text, number.end):
            return replace(number, end=word.end(), value=number.value * factor, factor=factor)
    for pattern, factor in LEADING_MULTIPLIERS.get(language, {}).items():
        if re.search(rf"\b{pattern}\s+$", text[max(0, number.start - 12) : number.start], re.IGNORECASE):
            return replace(number, value=number.value * factor)
    return number


def _is_negative(text: str, start: int) -> bool:
    """Whether a minus before the number is a sign, and neither subtracts nor joins nor marks a list."""
    head = text[max(0, start - 24) : start]
    minus = MINUS.search(head)
    if minus is None:
        return False
    before = head[: minus.start()]
    if minus[1] == "-" and minus[2]:
        return before.rstrip().endswith("=")
    if before[-1:].isalpha() and before[-1] not in PARTICLES:
        return False
    return re.search(r"[\d)\]%]$", before.rstrip()) is None
