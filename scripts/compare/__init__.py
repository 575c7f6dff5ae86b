"""The same training with several optimizers, and a report of how they compare."""
