"""A Monte Carlo estimate of the bound with an honest error: independent replicates, stratified within each."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from vdm_hub.diffusion.times import stratified_times
from vdm_hub.errors import DataError, NonFiniteLossError
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.variational_bound import Batch, VDMObjective


def estimate_bound(
    objective: VDMObjective,
    batches: Callable[[], Iterable[Batch]],
    num_images: int,
    replicates: int = 8,
    seed: int = 0,
    on_batch: Callable[[float], object] = lambda images: None,
) -> LikelihoodReport:
    """The bound of a set of images, each estimated once in each of ``replicates`` independent passes.

    Within a pass the times are stratified over all images, so draws depend on each other; passes do not, and the
    standard error comes from them. An image's noise is a function of (seed, pass, its index), its time of those and
    the number of images: neither the batch size nor the number of processes changes an image's terms.

    Args:
        objective: The model; evaluated in ``eval`` mode, without gradients.
        batches: Called once a pass; each batch carries ``indices``, (B,), the images' indices.
        num_images: How many images all batches hold together.
        replicates: Independent passes; at least 2 for a standard error.
        seed: Of all draws.
        on_batch: Told how many images a batch had.

    Raises:
        NonFiniteLossError: A term of an image is NaN or infinite; the message names the image and the term.
    """
    if num_images < 1 or replicates < 1:
        raise DataError(f"{num_images} images and {replicates} replicates were given: give at least one of each.")
    collected: dict[str, Tensor] = {}
    modes, calls = {module: module.training for module in objective.modules()}, _count_calls(objective)
    objective.eval()
    try:
        with torch.no_grad():
            for replicate in range(replicates):
                for batch in batches():
                    _one_batch(objective, batch, (num_images, replicates, replicate, seed), collected)
                    on_batch(len(batch["indices"]))
    finally:
        for module, training in modes.items():
            module.training = training
        calls.remove()
    dimensions = int(batch["levels"][0].numel())
    seen = sorted({int(i) for i in (~torch.isnan(next(iter(collected.values()))[0])).nonzero().flatten()})
    terms = {name: values[:, seen] for name, values in collected.items()}
    times = torch.stack([_pass_times(seed, replicate, num_images)[seen] for replicate in range(replicates)])
    return LikelihoodReport(
        terms, times, dimensions, transitions=objective.transitions, network_evaluations=calls.evaluations
    )


def _one_batch(
    objective: VDMObjective, batch: Batch, plan: tuple[int, int, int, int], collected: dict[str, Tensor]
) -> None:
    num_images, replicates, replicate, seed = plan
    index, device = batch["indices"].cpu(), batch["levels"].device
    generators = [torch.Generator().manual_seed(_image_seed(seed, replicate, int(i))) for i in index]
    times = _pass_times(seed, replicate, num_images)[index].to(device)
    bound = objective(batch, times, objective.draw_noise(batch, generators))
    for name, term in bound.terms.items():
        values = term.double().cpu()
        if not bool(torch.isfinite(values).all()):
            image = int(index[(~torch.isfinite(values)).nonzero()[0, 0]])
            raise NonFiniteLossError(
                f"the {name} term of image {image} is not finite. The model's weights or its schedule's endpoints are "
                f"at fault: evaluate an earlier checkpoint, or look at that image."
            )
        empty = torch.full((replicates, num_images), torch.nan, dtype=torch.float64)
        collected.setdefault(name, empty)[replicate, index] = values


def _pass_times(seed: int, replicate: int, num_images: int) -> Tensor:
    """One stratified time for each image of a pass, assigned at random."""
    source = np.random.default_rng([seed, replicate])
    order = torch.from_numpy(source.permutation(num_images))
    return stratified_times(num_images, source.random())[order]


def _image_seed(seed: int, replicate: int, image: int) -> int:
    return int(np.random.SeedSequence([seed, replicate, image]).generate_state(1, np.uint64)[0] >> 1)


class _count_calls:
    """Counts the network's evaluations, per image."""

    def __init__(self, objective: VDMObjective) -> None:
        self.evaluations = 0
        self.remove = objective.network.register_forward_pre_hook(self._count).remove

    def _count(self, module: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.evaluations += int(arguments[0].shape[0])
