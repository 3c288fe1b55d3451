"""Laws of kinds that see a part of a weight: by elements, by rows, by sums."""
