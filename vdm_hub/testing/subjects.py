"""The laws' tools: data, draws, copies as training leaves them, and comparisons that say where and by how much."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.testing.laws import require

SHAPE = (1, 8, 8)
"""The shape of a datum: every instance under the laws must accept data of it."""

BATCH = 3
CPU = torch.device("cpu")
GAMMAS = (-13.3, 13.0)
"""The range of gamma in which a target and a conditioning are held to their laws."""

OWN_TERMS = ("reconstruction", "prior", "diffusion")
"""The bound's own names of its terms, which no other may bear."""

M = TypeVar("M", bound=nn.Module)


def seeded(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def one_each(*seeds: int) -> list[torch.Generator]:
    """One generator per datum."""
    return [seeded(seed) for seed in seeds]


def evaluated(module: M, dtype: torch.dtype = torch.float32) -> M:
    """A copy in evaluation mode whose parameters have this type."""
    return nn.Module.to(copy.deepcopy(module), dtype).eval()  # diffusers' own warns of layers that it keeps


def trained(module: M, dtype: torch.dtype = torch.float32) -> M:
    """A copy in evaluation mode, its parameters moved, as training moves them."""
    moved = evaluated(module, dtype)
    generator = seeded(7)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.1)
    return moved


def cast(noise: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Base noise in the type that an evaluation has."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in noise.items()}


def require_close(
    actual: Tensor, expected: Tensor, what: str, rtol: float = 1e-6, atol: float | Tensor = 1e-6
) -> None:
    """Require two tensors to be close; the message names the worst element of both."""
    actual, expected = torch.broadcast_tensors(actual.detach().double(), expected.detach().double())
    excess = (actual - expected).abs() - rtol * expected.abs() - atol
    excess = torch.where((actual == expected) | (actual.isnan() & expected.isnan()), -torch.ones_like(excess), excess)
    worst = int(excess.nan_to_num(nan=torch.inf).flatten().argmax())
    require(
        not bool((~(excess <= 0)).any()),
        f"{what} is {actual.flatten()[worst].item():.9g} where it should be {expected.flatten()[worst].item():.9g} "
        f"(element {worst} of {actual.numel()})",
    )


def require_shape(actual: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Require a tensor's shape."""
    require(tuple(actual.shape) == shape, f"{what} has the shape {tuple(actual.shape)}, not {shape}")


def require_finite(actual: Tensor, what: str) -> None:
    """Require every element to be finite."""
    require(actual.isfinite().all(), f"{what} holds {actual[~actual.isfinite()].flatten()[:1].tolist()}")


def json_round_trip(config: Any, what: str) -> dict[str, Any]:
    """A config as it is after it was written to a file and read again; it must be a dict of JSON values."""
    require(isinstance(config, dict), f"{what} gives a {type(config).__name__}, not a dict of arguments by name")
    try:
        read: dict[str, Any] = json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError) as error:
        require(False, f"{what} gives {config!r:.200}, which is not JSON: {error}")
    return read


def require_registered(kind: str, cls: type) -> None:
    """Require that a class is what an installed distribution's entry point, or a built-in name, leads to."""
    found = registry.registration_of(kind, cls)
    require(
        found is not None,
        f'no installed package declares it. Its pyproject.toml needs [project.entry-points."vdm_hub.{kind}"] with '
        f'a line such as my_name = "{cls.__module__}:{cls.__qualname__}"; then install the package (again)',
    )
    if found is not None:
        require(
            registry.lookup(kind, found.name, found.package).load() is cls,
            f"the name {found.name!r} of {found.package} leads to another class than {cls.__qualname__}",
        )
