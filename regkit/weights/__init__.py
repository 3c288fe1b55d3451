"""Where a weight lives, and how to read, add to and write it.

A storage is a parameter, a shard, a mask or a parametrization; a block is a gate's rows; a batch is many blocks for one
list operation. A snapshot is the model at a moment: which parameters it has, and where every block is kept in them.
"""
