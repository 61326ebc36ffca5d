"""Chat templates are found where models keep them; the known ones are well-formed and give known prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from evomerge.checkpoints.chat_template import TEMPLATES, chat_template, template_fault
from evomerge.errors import CheckpointError
from tests.tiny import make_tokenizer

MESSAGES = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]

PROMPTS = {
    "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\nA\n\n### Instruction:\nV\n\n### Response:\n",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]S[|endofturn|]\n[|user|]U\n[|assistant|]A[|endofturn|]\n[|user|]V\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] S\n\nU [/INST] A</s> [INST] V [/INST]",
}


def prompt(name: str, messages: list[dict[str, str]], **options: Any) -> str:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    text = tokenizer.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=True, **options
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_known_templates_give_the_prompts_of_their_formats(name: str) -> None:
    assert template_fault(TEMPLATES[name]) is None
    assert prompt(name, MESSAGES) == PROMPTS[name]


def test_turns_that_the_format_does_not_have_are_refused() -> None:
    with pytest.raises(Exception, match="must take turns"):
        prompt("mistral", MESSAGES[:2] + MESSAGES[3:])
    assert prompt("exaone", MESSAGES[1:2]).startswith("[|system|][|endofturn|]\n[|user|]U")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("{{ messages }}", None),
        ("{% for m in messages %}{% if m %}{% continue %}{% endif %}{% endfor %}", None),
        ("{% generation %}{{ messages }}{% endgeneration %}", None),
        ("{% for m in messages %}", "line 1 of the template: Unexpected end of template"),
        ("a\n{{ messages", "line 2 of the template: unexpected end of template"),
        ("{% unheard of %}", "line 1 of the template: Encountered unknown tag 'unheard'"),
        ("{{" + "(" * 5000, "the template is nested too deeply"),
    ],
)
def test_what_is_no_template_is_told_with_its_line(text: str, fault: str | None) -> None:
    found = template_fault(text)
    assert found == fault or (fault is not None and found is not None and found.startswith(fault))


def test_templates_are_found_where_models_keep_them(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    settings: dict[str, Any] = {"chat_template": "in settings"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_template(tmp_path) == "in settings"
    settings["chat_template"] = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_template(tmp_path) == "d"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "older"}')
    assert chat_template(tmp_path) == "older"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert chat_template(tmp_path) == "own file"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read as text"):
        chat_template(tmp_path)
