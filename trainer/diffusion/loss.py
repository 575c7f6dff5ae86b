"""The loss of each image between prediction and target."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossType = Literal["mse", "huber", "mse_huber", "huber_mse"]


def image_losses(
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    t_B: Tensor,
    kind: LossType,
    timesteps: int = 1000,
    weights_B1HW: Tensor | None = None,
) -> Tensor:
    """Return loss_B in fp32, averaged over each image's elements after these are weighted.

    With b = t / timesteps, mse_huber is b*MSE + (1-b)*Huber and huber_mse is b*Huber + (1-b)*MSE; Huber's
    delta is 1.
    """

    def mean(loss_BCHW: Tensor) -> Tensor:
        return (loss_BCHW if weights_B1HW is None else loss_BCHW * weights_B1HW).mean(dim=(1, 2, 3))

    prediction_BCHW, target_BCHW = prediction_BCHW.float(), target_BCHW.float()
    mse_B = mean(F.mse_loss(prediction_BCHW, target_BCHW, reduction="none"))
    if kind == "mse":
        return mse_B
    huber_B = mean(F.huber_loss(prediction_BCHW, target_BCHW, reduction="none"))
    if kind == "huber":
        return huber_B
    b_B = t_B.float() / timesteps
    return b_B * mse_B + (1 - b_B) * huber_B if kind == "mse_huber" else b_B * huber_B + (1 - b_B) * mse_B
