"""The standard kinds of regkit, one family of mathematics per room, which come through the same door as a stranger's.

Each room is a plugin, but `foreach`, which holds what their list forms have in common.
"""
