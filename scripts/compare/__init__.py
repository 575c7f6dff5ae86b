"""A comparison: the same training with several optimizers, and its report."""
