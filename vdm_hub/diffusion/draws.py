"""Base noise from one generator, or from one generator per datum, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator] | None
"""A generator for all data of a batch, one for each, or torch's own."""


def normal_noise(
    shape: Sequence[int], generator: Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Standard normal draws; with a list of generators, datum i is drawn from generator i alone.

    >>> one = normal_noise((2, 3), [torch.Generator().manual_seed(s) for s in (0, 1)], torch.device("cpu"))
    >>> two = normal_noise((1, 3), torch.Generator().manual_seed(1), torch.device("cpu"))
    >>> bool((one[1] == two[0]).all())
    True
    """
    return _draw(torch.randn, shape, generator, device, dtype)


def uniform_noise(
    shape: Sequence[int], generator: Generator, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Uniform draws from [0, 1), with generators as in `normal_noise`."""
    return _draw(torch.rand, shape, generator, device, dtype)


def _draw(
    draw: Callable[..., Tensor], shape: Sequence[int], generator: Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    def one(size: Sequence[int], source: torch.Generator | None) -> Tensor:
        # A generator draws on its own device, so a CPU generator gives the same numbers for every device.
        origin = source.device if source is not None else device
        arguments: dict[str, Any] = {"generator": source, "device": origin, "dtype": dtype}
        return draw(tuple(size), **arguments).to(device)

    if generator is None or isinstance(generator, torch.Generator):
        return one(shape, generator)
    if len(generator) != shape[0]:
        raise ValueError(f"a list of {len(generator)} generators was given for a batch of {shape[0]}: give one each.")
    return torch.cat([one((1, *shape[1:]), source) for source in generator])


def image_generator(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key alone: (seed, replicate, image, ...).

    >>> draws = [float(torch.rand((), generator=image_generator(0, 0, image))) for image in (1, 1, 2)]
    >>> draws[0] == draws[1], draws[0] == draws[2]
    (True, False)
    """
    (state,) = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
