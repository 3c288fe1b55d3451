"""The optimizer step: whose it is, its rounds and checks, the watchdog."""
