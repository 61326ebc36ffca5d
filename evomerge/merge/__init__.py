"""Merging: methods, plans, live models and export."""
