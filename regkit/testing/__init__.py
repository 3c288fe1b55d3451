"""The laws that penalties, constraints, schedules and adapters keep, for plugins to prove themselves by."""
