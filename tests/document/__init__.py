"""Documents: reading, shorthand, mistakes, the JSON Schema, the canonical form."""
