"""From JSON to a `Spec`.

Text is read with positions, shorthand is made canonical, kinds are validated by the registry's classes. Every mistake
is reported at once, with line and column.
"""
