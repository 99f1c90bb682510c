"""Evaluate a model or a run on a task, and compare and report runs."""
