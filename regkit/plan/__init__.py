"""A `Spec` resolved against one model.

Recurrent modules are found, adapters are asked and checked, targets select sites. A `Plan` holds names and numbers
only, and prints what will be optimized.
"""
