"""Tests of regkit: a folder for each of its packages, and some for several of them together."""
