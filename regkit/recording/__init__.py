"""Forward hooks that record outputs until the loss consumes the records.

Tickets tell whether the penalty was backpropagated. The injector adds gradients where no loss can be edited.
"""
