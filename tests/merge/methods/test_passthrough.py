"""Passthrough: one model's tensors, optionally scaled."""

from __future__ import annotations

from .inputs import merge


def test_a_tensor_passes_unchanged() -> None:
    assert merge("passthrough", [[1.0, -2.0]]).tolist() == [1.0, -2.0]


def test_a_scale_multiplies_it() -> None:
    assert merge("passthrough", [[1.0, -2.0]], [{"scale": -0.5}]).tolist() == [-0.5, 1.0]
    assert merge("passthrough", [[1.0, -2.0]], [{"scale": 0.0}]).tolist() == [0.0, 0.0]
