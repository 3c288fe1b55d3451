"""Lightning, Accelerate, skorch and Transformers against loops written by hand."""
