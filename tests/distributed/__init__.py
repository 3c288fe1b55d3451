"""Training in several processes against training in one."""
