"""The recording of outputs in a forward pass, until the loss takes them."""
