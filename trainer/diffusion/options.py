"""Options of the objective: noise, target and loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The added noise, the prediction target and the weight of the loss."""

    loss_type: Literal["mse", "huber", "mse_huber", "huber_mse"] = "mse"
    """The loss between prediction and target; with b = t/1000, mse_huber is b*MSE + (1-b)*Huber, and
    huber_mse the reverse."""

    min_snr_gamma: Annotated[float, Gt(0)] | None = None
    """Weight the loss by min(SNR, gamma)/SNR (arXiv 2303.09556; /(SNR+1) for v-prediction); null leaves it
    unweighted, 5 is usual."""

    unmasked_weight: Annotated[float, Ge(0), Le(1)] = 0.0
    """The weight of the black parts of a mask in the loss, the white ones having 1; 1 ignores masks. A mask
    is `cat.mask.png` or `masks/cat.png` of the image `cat.jpg`, or its transparency by alpha_mask."""

    zero_frequency_noise_ratio: Annotated[float, Ge(0), Le(1)] = 0.02
    """Offset noise: the share of noise that is constant over a channel, which lets the model learn dark and
    bright images."""

    pyramid_noise_discount: Annotated[float, Ge(0), Le(1)] | None = None
    """Pyramid noise: add ever coarser noise, each level weighted by this factor once more, which moves whole
    areas of an image; null or 0 adds none, 0.03 is EveryDream2's shipped value."""

    embedding_perturbation: Annotated[float, Ge(0)] = 0.0
    """Add noise of about this length to each token's vector of the encoded caption, so that captions are
    learned less by heart."""

    input_perturbation: Annotated[float, Ge(0), Le(1)] = 0.0
    """Noise the latents with this much more noise than the UNet is asked to predict, since its input at
    sampling time never quite matches training (arXiv 2301.11706); 0.1 is usual."""

    enable_zero_terminal_snr: bool = False
    """Rescale the noise schedule so that the last timestep is noise alone (arXiv 2305.08891), for
    v-prediction models only; the exported scheduler says so, and samples use trailing timesteps and rescaled
    guidance. A model that was trained so needs no switch."""

    timestep_start: Annotated[int, Ge(0), Le(999)] = 0
    """The first timestep that is trained."""

    timestep_end: Annotated[int, Ge(1), Le(1000)] = 1000
    """The end of the trained timesteps, itself not trained."""

    clip_skip: Annotated[int, Ge(0), Le(12)] = 0
    """The hidden state of the text encoder that conditions the UNet, through the final layer norm: 0 or 1 the
    last, 2 the penultimate, n the n-th from the end, as in EveryDream2 and kohya's trainers."""

    @property
    def is_plain(self) -> bool:
        """True for the unweighted mean squared error."""
        return self.loss_type == "mse" and self.min_snr_gamma is None
