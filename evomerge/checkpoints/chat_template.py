"""Chat templates: the one in a model's folder, the ones known by name, and whether a text is one.

A chat template is a Jinja text that turns a list of messages into a prompt. The known ones are written here
from the public descriptions of their formats, under the names that recipes use for them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.checkpoints.reader import contained, read_json
from evomerge.errors import CheckpointError

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

TEMPLATE_FILE = "chat_template.jinja"
LEGACY_TEMPLATE_FILE = "chat_template.json"

# https://github.com/tatsu-lab/stanford_alpaca, its prompts continued over several turns.
_ALPACA = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{- message.content | trim + '\\n\\n' -}}
{%- elif message.role == 'user' -%}
{{- '### Instruction:\\n' + message.content | trim + '\\n\\n' -}}
{%- elif message.role == 'user_context' -%}
{{- '### Input:\\n' + message.content | trim + '\\n\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '### Response:\\n' + message.content | trim + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
"""

# https://github.com/openai/openai-python/blob/release-v0.28.0/chatml.md
_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# https://huggingface.co/LGAI-EXAONE/EXAONE-3.0-7.8B-Instruct: every turn but the user's ends with a token.
_EXAONE = """\
{%- if messages and messages[0].role != 'system' -%}{{- '[|system|][|endofturn|]\\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '[|' + message.role + '|]' + message.content -}}
{{- '\\n' if message.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
"""

# https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/
_LLAMA3 = """\
{{- bos_token | default('') -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' -}}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# https://docs.mistral.ai/guides/tokenization/: a system message goes before the first instruction.
_MISTRAL = """\
{{- bos_token | default('') -}}
{%- set memory = namespace(system='', turn='user') -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first -%}
{%- set memory.system = message.content + '\\n\\n' -%}
{%- elif message.role != memory.turn -%}
{{- raise_exception('after an optional system message, user and assistant must take turns') -}}
{%- elif message.role == 'user' -%}
{{- ' [INST] ' + memory.system + message.content + ' [/INST]' -}}
{%- set memory.system = '' -%}
{%- set memory.turn = 'assistant' -%}
{%- else -%}
{{- ' ' + message.content + eos_token | default('') -}}
{%- set memory.turn = 'user' -%}
{%- endif -%}
{%- endfor -%}
"""

TEMPLATES = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}
"""Name -> template, for the names that mergekit knows."""


def chat_template(folder: Path) -> str | None:
    """Return the default chat template of a model's folder, or None if it has none.

    Raises:
        CheckpointError: The file that holds it is damaged or leads out of the folder.
    """
    if (folder / TEMPLATE_FILE).exists():
        path = contained(folder, TEMPLATE_FILE)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: cannot be read as text: {error}") from error
    for name in (LEGACY_TEMPLATE_FILE, "tokenizer_config.json"):
        if (folder / name).exists():
            text = _default(read_json(folder, name).get("chat_template"))
            if text is not None:
                return text
    return None


def template_fault(text: str) -> str | None:
    """Say why a text is no chat template, or return None if it is one. The text is parsed, not run."""
    from jinja2 import TemplateSyntaxError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block by which transformers marks what the assistant says."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, loopcontrols])
    try:
        environment.parse(text)
    except TemplateSyntaxError as error:
        return f"line {error.lineno} of the template: {error.message}"
    except RecursionError:
        return "the template is nested too deeply"
    return None


def _default(value: Any) -> str | None:
    """The template among several named ones, as transformers writes them, that counts if none is named."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None
