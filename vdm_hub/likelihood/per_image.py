"""What every likelihood per image shares: its draws, its calls of the network, and the collection into a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vdm_hub.errors import DataError, NonFiniteLossError
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.variational_bound import Batch


def image_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key alone: (seed, replicate, image, ...).

    >>> draws = [float(torch.rand((), generator=image_generator(0, 0, image))) for image in (1, 1, 2)]
    >>> draws[0] == draws[1], draws[0] == draws[2]
    (True, False)
    """
    state = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """``eval`` mode, every submodule put back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def collect(
    objective: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    num_images: int,
    replicates: int,
    terms_of: Callable[[Batch, int], dict[str, Tensor]],
    on_batch: Callable[[float], object],
) -> LikelihoodReport:
    """The report of per-image terms, over all batches and replicates, in ``eval`` mode and without gradients.

    Args:
        objective: Put into ``eval`` mode meanwhile.
        batches: Called once a replicate; each batch carries ``indices``, (B,), the images' indices.
        num_images: How many images all batches hold together.
        replicates: Independent estimates of each image.
        terms_of: ``(batch, replicate) -> terms``, each (B,), in nats; they sum to minus the log-likelihood.
        on_batch: Told how many images a batch had.

    Raises:
        NonFiniteLossError: A term of an image is not finite; the message names both.
    """
    if num_images < 1 or replicates < 1:
        raise DataError(f"{num_images} images and {replicates} replicates were given: give at least one of each.")
    collected: dict[str, Tensor] = {}
    empty = torch.full((replicates, num_images), torch.nan, dtype=torch.float64)
    with evaluating(objective), torch.no_grad():
        for replicate in range(replicates):
            for batch in batches():
                index = batch["indices"].cpu()
                for name, term in terms_of(batch, replicate).items():
                    _check_finite(name, term, index)
                    collected.setdefault(name, empty.clone())[replicate, index] = term.double().cpu()
                on_batch(len(index))
    seen = (~torch.isnan(next(iter(collected.values()))[0])).nonzero().flatten()
    terms = {name: values[:, seen] for name, values in collected.items()}
    return LikelihoodReport(terms, empty[:, seen], int(batch["levels"][0].numel()))


def _check_finite(name: str, term: Tensor, index: Tensor) -> None:
    if not bool(torch.isfinite(term).all()):
        image = int(index[(~torch.isfinite(term.cpu())).nonzero()[0, 0]])
        raise NonFiniteLossError(
            f"the {name} term of image {image} is not finite. The model's weights or its schedule's endpoints are at "
            f"fault: evaluate an earlier checkpoint, or look at that image."
        )


class CountedNetwork:
    """A network as float64 code sees it: called in its own precision, its calls counted per datum.

    Args:
        network: Any module called as ``network(sample, timestep, return_dict=False, **conditioning)[0]``.
        batch: What it is conditioned on, besides ``levels`` and ``indices``.
    """

    def __init__(self, network: nn.Module, batch: Batch) -> None:
        self.network, self.evaluations = network, 0
        self._arguments = {name: value for name, value in batch.items() if name not in ("levels", "indices")}
        floating = {tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()}
        # Half precisions get float32: the pipeline's network converts by itself, after its Fourier features.
        self._dtype = torch.float64 if not floating or torch.float64 in floating else torch.float32

    def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """The network's raw output, of the sample's dtype."""
        self.evaluations += sample.shape[0]
        arguments = sample.to(self._dtype), timestep.to(self._dtype)
        output: Tensor = self.network(*arguments, return_dict=False, **self._arguments)[0]
        return output.to(sample.dtype)


class Tally:
    """Counts what a likelihood cost."""

    def __init__(self) -> None:
        self.evaluations = 0
        self._steps: list[Tensor] = []

    def add(self, evaluations: int, steps: Tensor) -> None:
        """One solve: the network's evaluations, counted per datum, and the steps of each datum."""
        self.evaluations += evaluations
        self._steps.append(steps.cpu())

    def summary(self) -> dict[str, Any]:
        """Mean and most steps over all solves, and network evaluations per solve."""
        steps = torch.cat(self._steps)
        return {
            "steps_mean": float(steps.double().mean()),
            "steps_max": int(steps.max()),
            "evaluations_per_solve": self.evaluations / steps.numel(),
        }
