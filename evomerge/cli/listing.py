"""`evomerge methods`, `spaces`, `searchers`: what there is."""

from __future__ import annotations

import json
from typing import Any

import click

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


@click.command()
@as_json_option
@click.option("--markdown", is_flag=True, help="Print the documentation page docs/methods.md.")
def methods(as_json: bool, markdown: bool) -> None:
    """List the merge methods with their parameters and references."""
    from evomerge.merge.methods import METHODS
    from evomerge.report.methods import inputs_in_words, methods_page

    if markdown:
        click.echo(methods_page(METHODS.values()), nl=False)
        return
    entries: list[dict[str, Any]] = [
        {
            "name": method.name,
            "summary": method.summary,
            "reference": method.reference,
            "base_model": str(method.base),
            "inputs": inputs_in_words(method),
            "random": method.random,
            "parameters": [
                {
                    "name": parameter.name,
                    "type": parameter.kind,
                    "per": str(parameter.scope),
                    "default": "required" if parameter.required else parameter.default,
                    "range": parameter.range,
                    "description": parameter.description,
                }
                for parameter in method.parameters
            ],
        }
        for method in METHODS.values()
    ]
    _show(entries, as_json)


@click.command()
@as_json_option
def spaces(as_json: bool) -> None:
    """List the types of search spaces."""
    from evomerge.spaces import SPACES

    entries = [
        {"name": name, "summary": kind.summary, "reference": kind.reference} for name, kind in SPACES.items()
    ]
    _show(entries, as_json)


@click.command()
@as_json_option
def searchers(as_json: bool) -> None:
    """List the searchers with their options and references."""
    from evomerge.search import SEARCHERS

    entries: list[dict[str, Any]] = []
    for name, spec in SEARCHERS.items():
        properties = spec.options.model_json_schema().get("properties", {})
        options = [
            {
                "name": option,
                "default": found.get("default"),
                "description": found.get("description", ""),
            }
            for option, found in properties.items()
        ]
        entries.append(
            {"name": name, "summary": spec.summary, "reference": spec.reference, "parameters": options}
        )
    _show(entries, as_json)


def _show(entries: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    for entry in entries:
        click.echo(f"{entry['name']}: {entry['summary']}")
        if "reference" in entry:
            click.echo(f"  {entry['reference']}")
        if "inputs" in entry:
            click.echo(f"  Takes {entry['inputs']}.")
        for parameter in entry.get("parameters", []):
            default = parameter["default"]
            text = default if default == "required" else f"default {json.dumps(default)}"
            span = f", in {parameter['range']}" if parameter.get("range") else ""
            per = f" per {parameter['per']}" if parameter.get("per") else ""
            click.echo(f"  {parameter['name']}{per} ({text}{span}): {parameter['description']}")
