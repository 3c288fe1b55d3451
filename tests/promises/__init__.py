"""Promises from end to end: Keras, loops, silence, faults, leaks, resumed runs, costs, random trainings."""
