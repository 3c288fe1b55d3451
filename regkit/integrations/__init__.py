"""Activity penalties, logs and checkpoints in the trainers that people use; each module needs its own package."""
