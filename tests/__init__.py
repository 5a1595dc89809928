"""Tests of lmmax."""
