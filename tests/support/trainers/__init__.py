"""Models, runs and hand-written loops for the tests of trainers."""
