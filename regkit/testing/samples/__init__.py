"""Small tensors, weights and outputs to try kinds on."""
