"""Criteria: minus twice the log-likelihood, one module per structural form of the model."""
