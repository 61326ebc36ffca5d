"""The model card of a merged model."""

from __future__ import annotations

from evomerge.recipe import Recipe


def model_card(recipe: Recipe) -> str:
    """A README for the merged model: its parents, its recipe, and how to merge it again."""
    parents = "\n".join(f"- {name}" for name in recipe.model_names)
    return f"""---
library_name: transformers
tags: [merge, evomerge]
---
# Merged model

Merged with the `{recipe.merge_method}` method from:

{parents}

## Recipe

```yaml
{recipe.to_yaml()}```

`evomerge merge mergekit_config.yml OUT_DIR` makes this model again; mergekit reads the same file.
"""
