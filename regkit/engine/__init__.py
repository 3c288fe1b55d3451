"""The work at an optimizer step.

The tracker decides whose step it is; the engine checks, adds gradients, projects. The watchdog raises when weights move
without a step.
"""
