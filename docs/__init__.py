"""The documentation: its pages, and the code that makes some of them."""
