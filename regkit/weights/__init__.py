"""The places where weights are kept: how a weight is read and written, and how a gradient is added.

A storage is a parameter, a shard, a mask or a parametrization; a block is a gate's rows; a batch is many blocks for one
list operation. A snapshot is the model at a moment: which parameters it has, and where every block is kept in them.
"""
