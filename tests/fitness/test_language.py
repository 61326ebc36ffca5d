"""The language of an answer is told by its words, not by its numbers, and not told where words are missing."""

from __future__ import annotations

from typing import Any

import pytest

from evomerge.fitness.language import fasttext_probability, language_of
from tests.fitness.answer_tables import ROWS

SAMPLES = {
    "bn": "জেনেট প্রতিদিন নয়টি ডিম বিক্রি করেন এবং বাজারে টাকা উপার্জন করেন।",
    "de": "Janet verkauft jeden Tag neun Eier auf dem Markt und verdient damit Geld.",
    "en": "Janet sells nine eggs at the market every day and makes money with them.",
    "es": "Janet vende nueve huevos cada día en el mercado y gana dinero con ellos.",
    "fr": "Janet vend neuf œufs chaque jour au marché et gagne ainsi de l'argent.",
    "ja": "ジャネットは毎日市場で九個の卵を売ってお金を稼ぎます。",
    "ru": "Дженет каждый день продает на рынке девять яиц и зарабатывает деньги.",
    "sw": "Janet huuza mayai tisa kila siku katika soko la wakulima na hupata pesa kutokana na mayai hayo.",
    "te": "జానెట్ ప్రతిరోజూ మార్కెట్‌లో తొమ్మిది గుడ్లు అమ్మి డబ్బు సంపాదిస్తుంది.",
    "th": "เจเน็ตขายไข่เก้าฟองทุกวันที่ตลาดและได้เงิน",
    "zh": "珍妮特每天在市场上卖九个鸡蛋，并以此赚钱。",
}


@pytest.mark.parametrize("row", [row for _, row in ROWS], ids=[name for name, _ in ROWS])
def test_the_verdict_on_a_written_answer(row: dict[str, Any]) -> None:
    verdict = language_of(row["out"], row["in"])
    assert verdict == row["language"]
    by_the_paper = fasttext_probability(row["out"], row["in"]) > 0.5
    assert by_the_paper == row.get("paper_in", verdict == row["in"])
    assert ("paper_in" in row) == (by_the_paper != (verdict == row["in"]))


@pytest.mark.parametrize("expected", SAMPLES)
def test_a_sentence_is_known_whatever_language_was_expected(expected: str) -> None:
    assert {language: language_of(text, expected) for language, text in SAMPLES.items()} == {
        language: language for language in SAMPLES
    }


@pytest.mark.parametrize("language", SAMPLES)
def test_numbers_formulas_and_line_breaks_do_not_change_the_verdict(language: str) -> None:
    text = SAMPLES[language]
    formula = "\n$$x = \\frac{16 - 3 - 4}{2} \\times 2 = 18$$\n16-3-4=9\n"
    assert language_of(f"{text}{formula}{text}\n\n#### 18<|im_end|>", language) == language
    assert language_of(f"1234567890 * 17 = 20987654130\n{text}", language) == language


@pytest.mark.parametrize("language", [language for language in SAMPLES if language != "en"])
def test_a_mixed_text_has_the_language_of_its_larger_part(language: str) -> None:
    mine, english = SAMPLES[language], SAMPLES["en"]
    assert language_of(f"{mine}\n{mine}\n{mine}\nThe answer is 18.", language) == language
    assert language_of(f"{english}\n{english}\n{english}\n{mine[:12]}", language) == "en"


@pytest.mark.parametrize(
    "text", ["", " \n", "18", "１８", "१८", "x = 2y", "$18", "\\frac{1}{2}", "<|im_end|>", "2 km", "?!"]
)
@pytest.mark.parametrize("expected", ["en", "ja", "bn"])
def test_without_words_there_is_no_language(text: str, expected: str) -> None:
    assert language_of(text, expected) is None


def test_the_paper_measures_the_whole_text_without_its_line_breaks() -> None:
    assert (
        fasttext_probability("答えは\n18ドルです", "ja")
        == fasttext_probability("答えは18ドルです", "ja")
        > 0.9
    )
    assert fasttext_probability("", "ja") < 0.5
