"""Numbers are read as people write them, and every difference to the paper's rule has its reason."""

from __future__ import annotations

import unicodedata
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.fitness.answers import COMMA_DECIMALS, DOT_GROUPS, final_number, sakana_number
from evomerge.fitness.maths import MGSM_LANGUAGES
from tests.fitness.answer_tables import ROWS, TABLES, number_of


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[name for name, _ in ROWS])
def test_the_number_of_a_written_answer_is_read(row: dict[str, Any]) -> None:
    assert final_number(row["out"], row["in"]) == number_of(row)


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[name for name, _ in ROWS])
def test_where_the_papers_rule_reads_another_number_the_row_says_why(row: dict[str, Any]) -> None:
    found, number = sakana_number(row["out"]), number_of(row)
    same = None if number is None else float(number)
    assert found == row.get("paper", same)
    assert ("paper" in row) == (found != same)
    assert ("why" in row) == ("paper" in row or "paper_in" in row)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_large_and_holds_right_wrong_and_missing_answers(name: str) -> None:
    rows = TABLES[name]
    assert len(rows) >= 60
    assert len({row["out"] for row in rows}) >= 58
    right = [number_of(row) == Fraction(str(row["gold"])) for row in rows]
    assert sum(right) >= 30
    assert sum(not good and row["number"] is not None for good, row in zip(right, rows, strict=True)) >= 1
    assert sum(row["number"] is None for row in rows) >= 3


def test_every_language_of_mgsm_is_in_a_table() -> None:
    assert {row["in"] for _, row in ROWS} == set(MGSM_LANGUAGES)


NATIVE_ZERO = {"bn": "০", "te": "౦", "th": "๐", "ja": "０", "zh": "０"}


def native(text: str, language: str) -> str:
    zero = ord(NATIVE_ZERO[language])
    return "".join(chr(zero + int(letter)) if letter.isdigit() else letter for letter in text)


@given(
    number=st.integers(-(10**12), 10**12),
    language=st.sampled_from(MGSM_LANGUAGES),
    before=st.sampled_from(["", "= ", "$", "x: ", "12 + 5 = ", "\n"]),
    after=st.sampled_from(["", ".", " $", "\n", "!", " ...", "。"]),
)
def test_a_grouped_integer_is_read_back(number: int, language: str, before: str, after: str) -> None:
    commas = f"{number:,}"
    ways = [str(number), commas, commas.replace(",", "\u202f")]
    if language in COMMA_DECIMALS:
        ways.append(commas.replace(",", " "))
    if language in DOT_GROUPS:
        ways.append(commas.replace(",", "."))
    if language in NATIVE_ZERO:
        ways += [native(way, language) for way in ways[:2]]
    for way in ways:
        assert final_number(f"{before}{way}{after}", language) == number


@given(number=st.decimals(0, 10**9, places=2), language=st.sampled_from(MGSM_LANGUAGES))
def test_a_decimal_is_read_back(number: Any, language: str) -> None:
    text = f"{number:,.2f}"
    if language in COMMA_DECIMALS:
        text = text.replace(",", " ").replace(".", ",")
    assert final_number(f"= {text}.", language) == Fraction(str(number))


@given(text=st.text(max_size=80), language=st.sampled_from(MGSM_LANGUAGES))
def test_any_text_is_judged_without_an_error(text: str, language: str) -> None:
    number, by_the_paper = final_number(text, language), sakana_number(text)
    if not any(unicodedata.category(letter).startswith("N") for letter in text):
        assert number is None
        assert by_the_paper is None


def test_endless_digits_are_one_number() -> None:
    assert final_number("9" * 5000, "en") == 10**5000 - 1
    assert final_number("1," * 5000 + "7", "en") == 7
    assert final_number("1/" * 5000 + "7", "en") == 7
