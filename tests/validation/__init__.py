"""Simulated models, each compared with the best optimum that other software finds."""
