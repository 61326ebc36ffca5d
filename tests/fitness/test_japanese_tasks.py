"""lm-eval's Japanese tasks, named by the paper, can be objectives: checked on hand-written samples."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from evomerge.errors import TaskError
from evomerge.experiment import ObjectiveSettings
from evomerge.fitness.harness import TaskLibrary

CHOICES = {f"choice{number}": text for number, text in enumerate(["犬", "机", "空", "海", "本"])}

SAMPLES: dict[str, list[dict[str, Any]]] = {
    "jcommonsenseqa": [
        {"q_id": number, "question": question, **CHOICES, "label": label}
        for number, (question, label) in enumerate(
            [("吠える動物は？", 0), ("青くて広いものは？", 2), ("読むものは？", 4)]
        )
    ],
    "jnli": [
        {"sentence1": "男の人が走っている。", "sentence2": second, "label": label}
        for second, label in [("人が走っている。", 0), ("誰も動いていない。", 1), ("男の人は急いでいる。", 2)]
    ],
    "marc_ja": [
        {"sentence": text, "label": label, "review_id": text}
        for text, label in [
            ("とても良い商品でした。", 0),
            ("すぐに壊れました。", 1),
            ("買って良かったです。", 0),
        ]
    ],
    "jsquad": [
        {
            "id": str(number),
            "title": "富士山",
            "context": "富士山 [SEP] 富士山は日本一高い山で、高さは3776メートルである。",
            "question": question,
            "answers": {"text": [answer], "answer_start": [0]},
            "is_impossible": False,
        }
        for number, (question, answer) in enumerate(
            [("日本一高い山は？", "富士山"), ("高さは？", "3776メートル")]
        )
    ],
    "jaqket_v2": [
        {
            "qid": str(number),
            "question": question,
            "answers": {"text": [answer], "answer_start": [0]},
            "ctxs": {
                "id": ["1"],
                "title": [answer],
                "text": [f"{answer}は有名である。"],
                "score": [1.0],
                "has_answer": [True],
            },
        }
        for number, (question, answer) in enumerate(
            [("日本一高い山は？", "富士山"), ("日本の首都は？", "東京")]
        )
    ],
    "xwinograd": [
        {
            "sentence1": "花瓶が倒れたのは、それが重かったからだ。",
            "sentence2": "花瓶が倒れたのは、机が重かったからだ。",
            "answer": answer,
        }
        for answer in ("1", "2")
    ],
    "xlsum": [{"text": "今日は雪が降った。", "summary": "雪が降った", "title": "雪"} for _ in range(2)],
}
METRICS = {
    name: "exact_match" if name in ("jsquad", "jaqket_v2") else "acc" for name in SAMPLES if name != "xlsum"
}


def stock_task(name: str, folder: Path) -> TaskLibrary:
    """The stock task with its data set replaced by the samples, allowed no code of its own."""
    import lm_eval

    stock = Path(lm_eval.__file__).parent / "tasks" / "japanese_leaderboard" / f"ja_leaderboard_{name}.yaml"
    (folder / "samples.jsonl").write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in SAMPLES[name]), encoding="utf-8"
    )
    splits = ", ".join(f"{split}: samples.jsonl" for split in ("train", "validation", "test"))
    (folder / "own.yaml").write_text(
        f"include: {stock}\ntask: own\ndataset_path: json\ndataset_name: null\n"
        f"dataset_kwargs: {{data_files: {{{splits}}}}}\nnum_fewshot: 0\n"
    )
    return TaskLibrary(["own"], [folder], allow_code=False)


@pytest.mark.parametrize("name", METRICS)
def test_a_stock_task_judges_right_and_wrong_answers(name: str, tmp_path: Path) -> None:
    library, metric = stock_task(name, tmp_path), METRICS[name]
    task = library.tasks["own"]
    assert library.num_documents("own") == len(SAMPLES[name])
    objective = library.objective(ObjectiveSettings(task="own", metric=metric), 0)
    assert objective.maximize
    for document in task.eval_docs:
        if metric == "exact_match":
            gold = document["answers"]["text"][0]
            assert document["question"] in task.doc_to_text(document)
            judged = [task.process_results(document, [text])[metric] for text in (gold, f" {gold}\n", "違う")]
            assert judged == [1, 1, 0]
            continue
        choices, gold = task.doc_to_choice(document), task.doc_to_target(document)
        assert len(set(choices)) == len(choices) > gold
        for chosen in range(len(choices)):
            results = [(0.0 if number == chosen else -9.0, False) for number in range(len(choices))]
            assert task.process_results(document, results)[metric] == (chosen == gold)


def test_the_right_choice_of_a_sample_is_the_one_meant(tmp_path: Path) -> None:
    task = stock_task("jnli", tmp_path).tasks["own"]
    assert [task.doc_to_choice(row)[task.doc_to_target(row)] for row in task.eval_docs] == [
        "含意",
        "矛盾",
        "中立",
    ]


def test_the_summaries_need_packages_and_have_no_score_per_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "emoji", None)
    with pytest.raises(TaskError, match=r"own: cannot be loaded .*`emoji` is required"):
        stock_task("xlsum", tmp_path)
    for name in ("emoji", "neologdn", "fugashi"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["fugashi"], "Tagger", object, raising=False)
    library = stock_task("xlsum", tmp_path)
    with pytest.raises(TaskError, match="rouge2 is not the mean of a number per document"):
        library.objective(ObjectiveSettings(task="own", metric="rouge2"), 0)
