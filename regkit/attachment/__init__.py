"""Rules in force on a model: attach, detach, copies, state.

The attachment holds the model weakly and leaves no trace.
"""
