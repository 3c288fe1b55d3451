"""The standard kinds and adapters against their formulas."""
