"""The state that torch is in: optimizer hooks, the mode of a pass, shards, the parameters that a step trains.

Nothing here knows of rules.
"""
