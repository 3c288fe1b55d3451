"""Helpers of the tests: models, loops, formulas, counters."""
