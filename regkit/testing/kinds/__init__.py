"""Laws of penalties, constraints and schedules."""
