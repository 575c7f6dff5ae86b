"""Names of recorded numbers, as TensorBoard, metrics.jsonl and Weights & Biases have them.

TensorBoard sorts the groups by name, so that losses come first and rates next.
"""

LOSS = "loss/log_step"
EPOCH_LOSS = "loss/epoch"
FIXED_LOSS = "loss/stabilize-train"
VALIDATION_LOSS = "loss/val"
GAP = "loss/val minus stabilize-train"
RATE = "lr/"
D = "optimizer/d "
D_HAT = "optimizer/d_hat "
UNCAPPED = "optimizer/d*lr "
DECAYED = "optimizer/decay so far "
NORM = "optimizer/grad norm "
GRAD_SCALE = "optimizer/grad scale"
SKIPPED = "optimizer/skipped steps"
NOT_FINITE = "optimizer/gradients not finite "
DATA_WAIT = "performance/data wait"
IMAGES_PER_SECOND = "performance/images per second"
MINUTES_PER_EPOCH = "performance/minutes per epoch"
VRAM = "performance/vram"
RAM = "performance/ram"

DESCRIPTIONS = {
    LOSS: "Mean loss of the images trained since the last report. No unit. Noise and timesteps differ from "
    "step to step, so it is noisy.",
    EPOCH_LOSS: "Mean loss of the images trained in the epoch. No unit.",
    FIXED_LOSS: "Fixed-noise loss: training images with the same noise and timesteps every time. No unit.",
    VALIDATION_LOSS: "Loss of validation images, with the same noise and timesteps every time. No unit.",
    GAP: "Validation loss minus fixed-noise loss. No unit. It grows when the model overfits.",
    RATE: "Effective learning rate of the coming step: d x lr for D-Adaptation, at most rate_max. "
    "EveryDream2 calls it hyperparameter/lr.",
    D: "D-Adaptation's estimate of the distance to the solution. It only grows.",
    D_HAT: "The estimate that d follows upwards. Below 0 the gradients contradict each other.",
    UNCAPPED: "The rate d x lr without the cap rate_max.",
    DECAYED: "Share of every weight that weight decay alone has taken since the start, 0 to 1.",
    NORM: "L2 norm of the gradient, before clipping.",
    GRAD_SCALE: "Factor of the loss scaling of fp16. EveryDream2 calls it hyperparameter/grad scale.",
    SKIPPED: "Steps without an update since the start, because a gradient was not finite.",
    NOT_FINITE: "Gradients skipped since the start, because they were not finite.",
    DATA_WAIT: "Seconds a step that training waited for images.",
    IMAGES_PER_SECOND: "Images trained per second, without samples, checkpoints and evaluations.",
    MINUTES_PER_EPOCH: "Minutes of the epoch, with everything.",
    VRAM: "Peak GPU memory of tensors, in GiB.",
    RAM: "Memory of the process, in GiB.",
}

LOGARITHMIC = (RATE, D)
"""Tags that TensorBoard also shows as log10: its tables round 1e-5 to 0."""

FORMER = {"hyperparameter/lr ": RATE, "dadapt/d ": D}
"""Starts of tags in checkpoints and records of older versions."""


def describe(tag: str) -> str:
    """Return the description of a tag, "" for an unknown one."""
    plain = tag.replace("/log10 ", "/")
    start = max((start for start in DESCRIPTIONS if plain.startswith(start)), key=len, default=None)
    if start is None:
        return ""
    return DESCRIPTIONS[start] if plain == tag else f"The base-10 logarithm. {DESCRIPTIONS[start]}"


def logarithmic(tag: str) -> str | None:
    """Return the tag of the number's log10, None if it has none."""
    start = next((start for start in LOGARITHMIC if tag.startswith(start)), None)
    return None if start is None else f"{start.partition('/')[0]}/log10 {tag.partition('/')[2]}"


def current(tag: str) -> str:
    """Return today's name of a tag."""
    return next((new + tag.removeprefix(old) for old, new in FORMER.items() if tag.startswith(old)), tag)
