"""README, the documentation and the examples, held to the code."""
