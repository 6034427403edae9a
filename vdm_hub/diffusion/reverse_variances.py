r"""The variance of the reverse step ``p(z_s|z_t)``, under diffusers' names for it.

A VDM's reverse step has the variance of the posterior, ``v_q = sigma_s^2 c`` with ``c = -expm1(gamma_s - gamma_t)``.
Checkpoints of the DDPM family may have another, ``v_p``. As the transition's own variance is ``sigma_t^2 c``, for the
larger of DDPM's two choices ``v_q / v_p = sigma_s^2 / sigma_t^2``, at any s and t, and nothing cancels.

Sources: DDPM section 3.2 (arXiv 2006.11239); the learned ones, Nichol & Dhariwal, arXiv 2102.09672, eq. 15.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from vdm_hub.errors import ConfigurationError, unknown_name


class ReverseVariance(ABC):
    """``v_p``, by its ratio to the posterior's; all tensors broadcast.

    Attributes:
        is_posterior: Whether it is the posterior's own, so that a transition's KL is that of the means alone.
        learned: Whether the second half of the network's output channels says it.
    """

    is_posterior = False
    learned = False

    @abstractmethod
    def log_ratio(self, prediction: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor:
        """``log(v_q / v_p)`` of the step from t to s.

        Args:
            prediction: What the network says of it, where it is learned; not looked at otherwise.
            gamma_s: Where the step ends.
            gamma_t: Where it begins.
        """

    def log_first(self, prediction: Tensor, posterior: Tensor, gamma_0: Tensor) -> Tensor:
        """``log v_p`` of the last step, from the first latent onto the data, where the posterior's is zero.

        As in the code of DDPM and its successors, it is the ``posterior`` variance of the step before.
        """
        return posterior.log()

    def check_continuous(self) -> None:  # noqa: B027 - most have nothing to refuse
        """Refuse continuous time, where infinitely many steps with this variance have no finite bound.

        Raises:
            ConfigurationError: They have none.
        """


class PosteriorVariance(ReverseVariance):
    """``fixed_small``: the posterior's own."""

    is_posterior = True

    def log_ratio(self, prediction: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor:
        return torch.zeros_like(gamma_t)


class TransitionVariance(ReverseVariance):
    """``fixed_large``: the transition's, ``sigma_t^2 c``, DDPM's beta.

    >>> gamma_s, gamma_t = torch.tensor([-1.0]), torch.tensor([1.0])
    >>> v_q = torch.sigmoid(gamma_s) * -torch.expm1(gamma_s - gamma_t)
    >>> beta = 1 - torch.sigmoid(-gamma_t) / torch.sigmoid(-gamma_s)
    >>> ratio = TransitionVariance().log_ratio(gamma_s, gamma_s, gamma_t).exp()
    >>> bool(torch.isclose(ratio, v_q / beta))
    True
    """

    def log_ratio(self, prediction: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor:
        return F.logsigmoid(gamma_s) - F.logsigmoid(gamma_t)


class InterpolatedVariance(TransitionVariance):
    """``learned_range``: between the two in the logarithm, at ``(prediction + 1) / 2`` of the way to the larger."""

    learned = True

    def log_ratio(self, prediction: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor:
        return 0.5 * (prediction + 1) * super().log_ratio(prediction, gamma_s, gamma_t)

    def log_first(self, prediction: Tensor, posterior: Tensor, gamma_0: Tensor) -> Tensor:
        least, most = posterior.log(), F.logsigmoid(gamma_0)
        return least + 0.5 * (prediction + 1) * (most - least)


class PredictedVariance(ReverseVariance):
    """``learned``: the prediction is the variance itself, as diffusers reads it."""

    learned = True

    def log_ratio(self, prediction: Tensor, gamma_s: Tensor, gamma_t: Tensor) -> Tensor:
        log_posterior = F.logsigmoid(gamma_s) + torch.log(-torch.expm1(gamma_s - gamma_t))
        return log_posterior - prediction.log()

    def log_first(self, prediction: Tensor, posterior: Tensor, gamma_0: Tensor) -> Tensor:
        return prediction.log()

    def check_continuous(self) -> None:
        raise ConfigurationError(
            "a variance that the network predicts freely (variance_type='learned') does not become the posterior's as "
            "steps grow small, so continuous time has no finite bound: give a number of transitions."
        )


REVERSE_VARIANCES: dict[str, type[ReverseVariance]] = {
    "fixed_small": PosteriorVariance,
    "fixed_small_log": PosteriorVariance,
    "fixed_large": TransitionVariance,
    "fixed_large_log": TransitionVariance,
    "learned": PredictedVariance,
    "learned_range": InterpolatedVariance,
}


def reverse_variance(name: str) -> ReverseVariance:
    """The variance of that name.

    Raises:
        ConfigurationError: There is none; the message names the nearest.

    >>> reverse_variance("fixed_small").is_posterior, reverse_variance("learned_range").learned
    (True, True)
    """
    if name not in REVERSE_VARIANCES:
        raise unknown_name("variance_type", name, REVERSE_VARIANCES)
    return REVERSE_VARIANCES[name]()
