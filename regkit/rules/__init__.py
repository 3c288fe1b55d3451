"""A plan's rules on the live model.

Each computes its value, gradient, proximal operator or projection on its blocks or activity. Equal rules are merged;
every kind is tried once before it is in force.
"""
