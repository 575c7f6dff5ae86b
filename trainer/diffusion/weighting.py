"""The weight of each timestep in the loss."""

from __future__ import annotations

from torch import Tensor


def min_snr_weights(snr_B: Tensor, gamma: float, prediction_kind: str) -> Tensor:
    """Return min(SNR, gamma)/SNR, or /(SNR + 1) for v-prediction (Hang et al. 2023, arXiv 2303.09556).

    At SNR 0 the epsilon weight takes its limit, 1.
    """
    clipped_B = snr_B.clamp(max=gamma)
    if prediction_kind == "v_prediction":
        return clipped_B / (snr_B + 1)
    return (clipped_B / snr_B).nan_to_num(nan=1.0)
