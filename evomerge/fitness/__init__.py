"""Scoring a model: the evaluator protocol, lm-eval behind it, objectives and statistics."""
