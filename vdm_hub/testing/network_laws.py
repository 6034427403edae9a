"""The laws of a network: what a process, a pipeline and a saved model take for granted of one."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vdm_hub.testing.laws import Laws, require
from vdm_hub.testing.subjects import (
    BATCH,
    SHAPE,
    evaluated,
    json_round_trip,
    require_close,
    require_finite,
    require_registered,
    seeded,
    trained,
)

NETWORK_LAWS = Laws("networks", ModelMixin)
_TIMESTEPS = (50.0, 900.0)


def _config(network: Any) -> dict[str, Any]:
    return {name: value for name, value in network.config.items() if not name.startswith("_")}


def _sample(network: Any, size: int = BATCH, dtype: torch.dtype = torch.float64) -> Tensor:
    config = _config(network)
    side = config.get("sample_size") or SHAPE[1:]
    shape = (config.get("in_channels", SHAPE[0]), *((side, side) if isinstance(side, int) else side))
    return torch.randn(size, *shape, generator=seeded(1), dtype=torch.float64).to(dtype)


def _timestep(size: int = BATCH, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linspace(*_TIMESTEPS, size, dtype=torch.float64).to(dtype)


def _call(network: Any, sample: Tensor, timestep: Tensor) -> Tensor:
    """The output as whatever trains or samples asks for it, with a context and a class where its config has them."""
    size, classes = _config(network).get("context_size"), _config(network).get("num_class_embeds")
    told = {} if size is None else {"context": torch.linspace(-1, 1, size).to(sample).expand(len(sample), size)}
    told |= {} if classes is None else {"class_labels": torch.zeros(len(sample)).long()}
    output: Tensor = network(sample, timestep, return_dict=False, **told)[0]
    require(isinstance(output, Tensor), f"its output's first entry is a {type(output).__name__}, not a tensor")
    return output


@NETWORK_LAWS.add
def output(network: Any) -> None:
    """The output is finite, of the sample's type, and of one shape a datum, also at the ends of the timesteps."""
    made, shapes = evaluated(network), set()
    for size in (1, BATCH):
        for ends in (0.0, 999.0):
            sample = _sample(network, size, torch.float32)
            found = _call(made, sample, torch.full((size,), ends))
            require_finite(found, f"the output at timestep {ends:g}")
            require(found.dtype == sample.dtype, f"the output of a sample in {sample.dtype} is {found.dtype}")
            require(len(found) == size, f"the output of {size} data has the shape {tuple(found.shape)}")
            shapes.add(tuple(found.shape[1:]))
    require(len(shapes) == 1, f"the output has the shapes {sorted(shapes)} a datum for batches of 1 and {BATCH}")


@NETWORK_LAWS.add
def data_do_not_mix(network: Any) -> None:
    """In evaluation mode, the output of a datum does not depend on the others in its batch."""
    made, sample, timestep = trained(network, torch.float64), _sample(network), _timestep()
    together = _call(made, sample, timestep)
    for i in range(BATCH):
        alone = _call(made, sample[i : i + 1], timestep[i : i + 1])
        require_close(together[i : i + 1], alone, "the output among others, against alone,", 1e-6, 1e-6)


@NETWORK_LAWS.add
def one_timestep_for_all(network: Any) -> None:
    """A timestep of shape () means the same as one of each datum, (B,)."""
    made, sample = trained(network, torch.float64), _sample(network)
    one = torch.tensor(_TIMESTEPS[0], dtype=torch.float64)
    each = _call(made, sample, one.expand(BATCH))
    require_close(_call(made, sample, one), each, "the output at one timestep for all", 1e-6, 1e-6)


@NETWORK_LAWS.add
def deterministic(network: Any) -> None:
    """In evaluation mode, it draws nothing: whatever the random state, the output is the same."""
    made, sample, timestep = trained(network, torch.float64), _sample(network), _timestep()
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # which the law puts back
        found.append(_call(made, sample, timestep))
    require_close(found[1], found[0], "the output after torch.manual_seed(2), against 1,", rtol=0, atol=0)


@NETWORK_LAWS.add
def reads_the_timestep(network: Any) -> None:
    """The output depends on the timestep, once it is trained."""
    made, sample = trained(network, torch.float64), _sample(network)
    first, last = (_call(made, sample, torch.full((BATCH,), t, dtype=torch.float64)) for t in _TIMESTEPS)
    require((first - last).abs().max() > 1e-9, f"the outputs at timesteps {_TIMESTEPS} are equal")


@NETWORK_LAWS.add
def precision(network: Any) -> None:
    """It computes in float64, too, and float32 is that to a hundredth of the output's size."""
    found = []
    for dtype in (torch.float64, torch.float32):
        sample, timestep = _sample(network, dtype=dtype), _timestep(dtype=dtype)
        found.append(_call(trained(network, dtype), sample, timestep).detach())
    require(found[0].dtype == torch.float64, f"the output of a sample in float64 is {found[0].dtype}")
    size = float(found[0].abs().max())
    require_close(found[1], found[0], "the output in float32, against float64,", rtol=0, atol=0.01 * size)


@NETWORK_LAWS.add
def parameters_are_trained(network: Any) -> None:
    """Every parameter that asks for a gradient gets a finite one from the output."""
    made = trained(network, torch.float64)
    _call(made, _sample(network), _timestep()).square().sum().backward()
    asking = {name: one for name, one in made.named_parameters() if one.requires_grad}
    without = [name for name, one in asking.items() if one.grad is None or not bool(one.grad.isfinite().all())]
    require(not without, f"no finite gradient reaches {', '.join(without)}")


@NETWORK_LAWS.add
def saved_and_loaded(network: Any) -> None:
    """After `save_pretrained` and `from_pretrained` the output is the same, bit for bit."""
    made, sample, timestep = trained(network), _sample(network, dtype=torch.float32), _timestep(dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        loaded = type(network).from_pretrained(folder).eval()
        after, before = _call(loaded, sample, timestep), _call(made, sample, timestep)
    require_close(after, before, "the output of the loaded network", rtol=0, atol=0)


@NETWORK_LAWS.add
def json_config(network: Any) -> None:
    """Its config is JSON, and builds a network with the same weights by name and shape."""
    config = json_round_trip(_config(network), "its config")
    before, after = (
        {name: tuple(value.shape) for name, value in one.state_dict().items()}
        for one in (network, type(network)(**config))
    )
    other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    require(not other, f"rebuilt from {config!r:.200}, it has other weights: {', '.join(other)}")


@NETWORK_LAWS.add
def registered(network: Any) -> None:
    """The class is the entry point of an installed package, so that a config can name it."""
    require_registered("networks", type(network))
