"""Inference from a fitted model: tests and standard errors."""
