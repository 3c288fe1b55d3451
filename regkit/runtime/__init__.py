"""What torch is doing: optimizer hooks, the mode of a pass, shards, which parameters an optimizer step trains.

Nothing here knows of rules.
"""
