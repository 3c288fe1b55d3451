"""Random models, rules and changes, and plain interpreters of them."""
