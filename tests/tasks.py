"""Writes two small lm-eval tasks with their data: one generates, one chooses."""

from __future__ import annotations

import json
import random
from pathlib import Path

GENERATE = """\
task: gen
dataset_path: json
dataset_kwargs: {data_files: {test: gen.jsonl, train: examples.jsonl}}
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 2
output_type: generate_until
doc_to_text: "{{q}}="
doc_to_target: "{{a}}"
target_delimiter: ""
generation_kwargs: {do_sample: false, max_gen_toks: 4, until: ["\\n"]}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""

CHOOSE = """\
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: choose.jsonl}}
test_split: test
num_fewshot: 0
output_type: multiple_choice
doc_to_text: "{{q}}="
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def write_tasks(folder: Path, *, count: int = 8) -> Path:
    """Write the tasks `gen` and `choose` with `count` documents each.

    Args:
        folder: Where to; made if need be.
        count: Documents of each task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gen.yaml").write_text(GENERATE)
    (folder / "choose.yaml").write_text(CHOOSE)
    rng = random.Random(0)

    def word(length: int) -> str:
        return "".join(rng.choice("abcdefghij0123456789") for _ in range(length))

    _write(folder / "gen.jsonl", [{"q": word(3), "a": word(1)} for _ in range(count)])
    _write(folder / "examples.jsonl", [{"q": word(3), "a": word(1)} for _ in range(6)])
    choices = [
        {"q": word(4), "options": [word(length) for length in (1, 2, 3)], "answer": rng.randrange(3)}
        for _ in range(count)
    ]
    _write(folder / "choose.jsonl", choices)
    return folder


def _write(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
