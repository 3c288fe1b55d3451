"""Rules in force: merged, tried, as lists; constraints."""
