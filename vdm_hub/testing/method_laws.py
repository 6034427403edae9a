"""The laws of a likelihood method: a figure depends on data, weights, seed and what is said, and on nothing else.

They are tried on a small diffusion that denoises nothing: no likelihood of note, but one all the same. A method of
another kind of model says which by its ``example_fields``.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.diffusion.forward_process import ForwardProcess
from vdm_hub.errors import ConfigurationError
from vdm_hub.likelihood.measurement import Measurement
from vdm_hub.likelihood.methods import LikelihoodMethod, build_measurement
from vdm_hub.objectives.variational_bound import VDMObjective
from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.process_laws import FakeNetwork
from vdm_hub.testing.subjects import (
    json_round_trip,
    require_close,
    require_finite,
    require_registered,
    require_shape,
    seeded,
)

METHOD_LAWS = Laws("likelihood_methods", LikelihoodMethod)
_IMAGES = 4


class _Network(nn.Module):
    """The kit's fake network, called as a model's."""

    def __init__(self, process: ForwardProcess) -> None:
        super().__init__()
        self.fake = FakeNetwork(process)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.fake(sample, timestep),)


def _process(method: LikelihoodMethod) -> ForwardProcess:
    """The process that the method says it may be tried on."""
    cls, _ = registry.resolve_class("forward_processes", method.example_fields["forward_process"])
    process: ForwardProcess = cls.from_fields(method.example_fields)  # type: ignore[attr-defined]
    return process


def _batch(method: LikelihoodMethod, *indices: int) -> dict[str, Tensor]:
    process = _process(method)
    shape = (_IMAGES, *process.example_shape)
    levels = torch.randint(0, process.num_levels, shape, generator=seeded(1), dtype=torch.uint8)
    return {"levels": levels[list(indices)], "indices": torch.tensor(indices)}


def _measurement(method: LikelihoodMethod, seed: int = 0, state: dict[str, Any] | None = None) -> Measurement:
    """The measurement after its pilot, or with what another found in its own."""
    process = _process(method)
    measurement = build_measurement(
        VDMObjective(_Network(process), process, method.transitions), _IMAGES, method, seed
    )
    if state is not None:
        measurement.load_state(state)
        return measurement
    with torch.no_grad():
        measurement.fit(lambda: [_batch(method, 0, 1), _batch(method, 2, 3)])
    return measurement


def _total(method: LikelihoodMethod, measurement: Measurement, *indices: int, replicate: int = 0) -> Tensor:
    with torch.no_grad():
        terms = measurement.measure(_batch(method, *indices), replicate).terms
    return sum((term.double() for term in terms.values()), torch.zeros(len(indices), dtype=torch.float64))


@METHOD_LAWS.add
def frozen(method: LikelihoodMethod) -> None:
    """It is a frozen dataclass, so that what was measured is what was said."""
    require(is_dataclass(method), f"{type(method).__name__} is no dataclass")
    name = next(iter(one.name for one in fields(method)), "name")  # type: ignore[arg-type]
    try:
        setattr(method, name, getattr(method, name))
    except FrozenInstanceError:
        return
    require(False, f"its {name} can be set to {getattr(method, name)!r:.100} once it is built")


@METHOD_LAWS.add
def ranges(method: LikelihoodMethod) -> None:
    """A number outside the range that an option declares is refused."""
    for name, one in method.options().items():
        for word, bound in (one.metadata.get("bounds") or {}).items():
            beyond = {"at least": bound - 1, "at most": bound + 1}.get(word, bound)
            try:
                method.from_options(method.chosen() | {name: beyond})
            except ConfigurationError:
                continue
            require(False, f"{name} is {beyond}, and it is said to be {word} {bound}")


@METHOD_LAWS.add
def json_config(method: LikelihoodMethod) -> None:
    """Its `to_config` is JSON, and builds an equal method again."""
    config = json_round_trip(method.to_config(), "to_config()")
    require(type(method)(**config) == method, f"{config!r:.200} builds another method than {method!r:.200}")


@METHOD_LAWS.add
def options_round_trip(method: LikelihoodMethod) -> None:
    """What it says was `chosen` is JSON, and `from_options` builds an equal method of it."""
    chosen = json_round_trip(method.chosen(), "chosen()")
    require(method.from_options(chosen) == method, f"the options {chosen!r:.200} build another than {method!r:.200}")


@METHOD_LAWS.add
def terms(method: LikelihoodMethod) -> None:
    """Each term is one finite number an image, by a name."""
    with torch.no_grad():
        found = _measurement(method).measure(_batch(method, 0, 1, 2), 0).terms
    require(found, f"there are {len(found)} terms")
    for name, term in found.items():
        require_shape(term, (3,), f"the term {name!r} of 3 images")
        require_finite(term, f"the term {name!r}")


@METHOD_LAWS.add
def images_do_not_mix(method: LikelihoodMethod) -> None:
    """An image's figure is a function of seed, replicate and its index: other batches give the same."""
    measurement = _measurement(method)
    together, others = _total(method, measurement, 0, 1, 2, 3), _total(method, measurement, 3, 1)
    require_close(others, together[[3, 1]], "the figure in another batch", rtol=1e-6, atol=1e-9)


@METHOD_LAWS.add
def replicates_are_draws(method: LikelihoodMethod) -> None:
    """Another replicate is another draw of every image, and so is another seed, unless nothing is drawn."""
    measurement = _measurement(method)
    first, state = _total(method, measurement, 0, 1), measurement.state()
    second = _total(method, measurement, 0, 1, replicate=1)
    other = _total(method, _measurement(method, seed=1, state=state), 0, 1)
    moved = torch.stack([second - first, other - first]) != 0
    require(
        moved.all() | ~moved.any(),
        f"from {first.tolist()}: replicate 1 gives {second.tolist()}, seed 1 {other.tolist()}",
    )


@METHOD_LAWS.add
def state_round_trips(method: LikelihoodMethod) -> None:
    """What its pilot found is JSON, and another process that loads it measures the same, bit for bit."""
    measurement = _measurement(method)
    state = json_round_trip(measurement.state(), "state()")
    loaded = _total(method, _measurement(method, state=state), 0, 1)
    require_close(loaded, _total(method, measurement, 0, 1), "the figure after load_state()", rtol=0, atol=0)


@METHOD_LAWS.add
def json_protocol(method: LikelihoodMethod) -> None:
    """The protocol of a measurement is JSON, and it bears the method's name."""
    measurement = _measurement(method)
    json_round_trip(measurement.protocol(), "protocol()")
    require(
        measurement.method == method.name, f"the measurement is called {measurement.method!r}, not {method.name!r}"
    )


@METHOD_LAWS.add
def registered(method: LikelihoodMethod) -> None:
    """The class is the entry point of an installed package, under the name that it gives itself."""
    require_registered("likelihood_methods", type(method))
    found = registry.registration_of("likelihood_methods", type(method))
    require(
        found is not None and found.name == method.name,
        f"it is registered as {found and found.name!r}, and calls itself {method.name!r}",
    )
