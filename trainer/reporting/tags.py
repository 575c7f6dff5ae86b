"""Names of recorded numbers, as TensorBoard and metrics.jsonl have them."""

LOSS = "loss/log_step"
EPOCH_LOSS = "loss/epoch"
FIXED_LOSS = "loss/stabilize-train"
VALIDATION_LOSS = "loss/val"
GAP = "loss/val minus stabilize-train"
SKIPPED = "optimizer/skipped steps"
NOT_FINITE = "optimizer/gradients not finite"
