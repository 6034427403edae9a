"""Precision, compilation, memory layout and gradient checkpointing change the speed and nothing else."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import registered
from runs import LEARNED, ROOT, TORCHRUN, UNET, forget_accelerator, python, recipe, start, train_here, weights
from vdm_hub import UNetVDMModel, VDMPipeline
from vdm_hub.diffusion import decoders
from vdm_hub.diffusion.decoders import FactorisedDecoder
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.scaling import DataScaling
from vdm_hub.errors import ConfigurationError
from vdm_hub.objectives.variational_bound import Bound, VDMObjective
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.parts import setup
from vdm_hub.training.parts.processes import refuse_engine
from vdm_hub.training.state.checkpoints import checkpoints, load_checkpoint
from vdm_hub.training.state.losses import LossWatch

UNETS: dict[str, dict[str, Any]] = {
    "UNetVDMModel": UNET | {"_class_name": "UNetVDMModel", "dropout": 0.0},
    "UNet2DModel": {
        "_class_name": "UNet2DModel",
        "block_out_channels": [8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "dropout": 0.0,
    },
}
SOME_UNETS = [pytest.param(name, marks=pytest.mark.slow) if name == "UNet2DModel" else name for name in UNETS]
SCHEDULES: dict[str, Any] = {
    "linear": "linear",
    "cosine": "cosine",
    "learned_linear": "learned_linear",
    "learned_monotone": LEARNED,
    "tabulated": {"name": "tabulated", "config": {"gammas": [-8.0, -1.0, 5.0]}},
    "discrete_betas": {"name": "discrete_betas", "config": {"betas": [0.001 * i for i in range(1, 20)]}},
}


@pytest.fixture(autouse=True)
def compile_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    forget_accelerator()


def randomised(network: nn.Module) -> nn.Module:
    """Branches that start at zero would hide everything behind them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


class OneLayer(nn.Module):
    """A network that is compiled in no time, where the graph of the rest is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.of_time = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(1, 1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.convolution(sample) + self.of_time(timestep.reshape(-1, 1, 1, 1)),)


def build_objective(
    schedule: Any, transitions: int | None = None, network: nn.Module | None = None, **fields: Any
) -> VDMObjective:
    serialised = schedule if isinstance(schedule, str) else json.dumps(schedule)
    network = network or UNetVDMModel(in_channels=1, out_channels=1, **(UNET | {"dropout": 0.0}))
    process = GaussianProcess.from_fields({"noise_schedule": serialised, "num_levels": 17} | fields)
    return VDMObjective(randomised(network), process, transitions)


def draws(objective: VDMObjective) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batch = {"levels": torch.randint(0, 17, (4, 1, 8, 8), generator=generator, dtype=torch.uint8)}
    return batch, torch.tensor([0.05, 0.3, 0.55, 0.8]), objective.draw_noise(batch, generator)


def gradients(objective: VDMObjective, call: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """The terms and the gradient of every parameter."""
    objective.zero_grad()
    bound = (objective if call is None else call)(*draws(objective))
    bound.loss.backward()
    got = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return got | {name: term.detach() for name, term in bound.terms.items()}


# ---- compilation ----------------------------------------------------------------------------------------------------


_FIRST = "discrete_betas"
GRAPHS = [_FIRST, *(pytest.param(one, marks=pytest.mark.slow) for one in SCHEDULES if one != _FIRST)]


@pytest.mark.parametrize("transitions", [None, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("schedule", GRAPHS)
def test_network_and_bound_are_one_graph_with_the_same_gradients(schedule: str, transitions: int | None) -> None:
    conditioning = "table" if schedule == "discrete_betas" else "affine"
    network = None if schedule == "learned_monotone" else OneLayer()
    objective = build_objective(SCHEDULES[schedule], transitions, network, conditioning=conditioning)
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)  # raises at any break
    plain, ours = gradients(objective), gradients(objective, compiled)
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: name + text)


def test_the_ddpm_decoder_is_in_the_graph_too() -> None:
    objective = build_objective("linear", 10, decoder="ddpm", data_scaling="full")
    explained = torch._dynamo.explain(objective)(*draws(objective))
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


@pytest.mark.parametrize("network", SOME_UNETS)
def test_networks_are_one_graph_with_and_without_gradient_checkpointing(network: str, tmp_path: Path) -> None:
    run = start(tmp_path / "run", unet=UNETS[network])
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    for enabled in (False, True):
        unet = run.model.network
        unet.enable_gradient_checkpointing() if enabled else unet.disable_gradient_checkpointing()
        compiled = torch.compile(unet.train(), backend="aot_eager", fullgraph=True)
        compiled(sample, timestep, return_dict=False)[0].square().sum().backward()


@pytest.mark.parametrize("network", UNETS)
def test_regions_are_the_repeated_blocks(network: str, tmp_path: Path) -> None:
    run = start(tmp_path / "run", unet=UNETS[network], compile="regional")
    compiled = {type(m).__name__ for m in run.model.network.modules() if m._compiled_call_impl is not None}
    assert compiled == ({"ResnetBlock"} if network == "UNetVDMModel" else {"ResnetBlock2D", "Attention"})
    assert run.model._compiled_call_impl is None


@pytest.mark.slow
@pytest.mark.parametrize("network", SOME_UNETS)
@pytest.mark.parametrize("compile", ["whole", "regional"])
def test_compiled_runs_and_plain_ones_go_on_from_each_others_checkpoints(
    compile: str, network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "COMPILER", "aot_eager")  # the same graphs, without a minute of code generation
    fields = {"noise_schedule": LEARNED, "unet": UNETS[network], "adam_epsilon": 1e-3}
    train_here(tmp_path / "plain", **fields, max_train_steps=4)
    for name, modes in (("there", ("none", compile)), ("back", (compile, "none"))):
        train_here(tmp_path / name, **fields, max_train_steps=2, compile=modes[0])
        train_here(tmp_path / name, **fields, max_train_steps=4, compile=modes[1], resume_from_checkpoint="latest")
        expected, got = (load_checkpoint(checkpoints(tmp_path / f / "checkpoints")[-1]) for f in ("plain", name))
        for group, tensors in expected.tensors.items():
            assert got.tensors[group].keys() == tensors.keys(), "the names are those of the plain run"
            assert all(value.isfinite().all() for value in got.tensors[group].values())
        loaded = VDMPipeline.from_pretrained(tmp_path / name / "pipeline").unet.state_dict()
        assert not [key for key in loaded if "_orig_mod" in key]
        for key, value in expected.tensors["objective"].items():
            torch.testing.assert_close(got.tensors["objective"][key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_network_and_learned_schedule_into_one_graph_that_trains(tmp_path: Path) -> None:
    terms = {}
    for compile in ("none", "whole"):
        run = start(tmp_path / compile, noise_schedule=LEARNED, mixed_precision="bf16", compile=compile)
        torch._dynamo.utils.counters.clear()
        terms[compile] = [run.optimise(batches) for batches in run.batches()]
        breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
        assert breaks == 0, torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for plain, compiled in zip(terms["none"], terms["whole"], strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=2e-2, atol=1e-4)


@pytest.mark.slow  # each process generates code of its own
@pytest.mark.parametrize("compile", ["whole", "regional"])
def test_two_compiled_processes_train_what_two_plain_ones_train(compile: str, tmp_path: Path) -> None:
    # Without dropout: a generated kernel draws it from the same seed in its own way.
    fields: dict[str, Any] = {"noise_schedule": LEARNED, "unet": UNETS["UNetVDMModel"], "adam_epsilon": 1e-3}
    fields |= {"gradient_accumulation_steps": 2, "max_train_steps": 4, "train_batch_size": 8}
    fields |= {"gradient_checkpointing": True}
    ends = {}
    for mode in ("none", compile):
        path = recipe(tmp_path, tmp_path / mode, **fields, compile=mode)
        done = python(*TORCHRUN, "-m", "vdm_hub.train", path, ACCELERATE_USE_CPU="true")
        assert done.returncode == 0, done.stderr
        ends[mode] = load_checkpoint(checkpoints(tmp_path / mode / "checkpoints")[-1]).tensors["objective"]
    assert ends["none"].keys() == ends[compile].keys()
    for name, value in ends["none"].items():
        # A generated kernel adds in another order: 5e-7 was seen after four steps, each of which moves by up to 2e-3.
        torch.testing.assert_close(ends[compile][name], value, rtol=1e-4, atol=1e-5)


def test_validation_of_a_compiled_run_calls_the_plain_network(tmp_path: Path) -> None:
    run = start(tmp_path / "run", compile="whole")
    assert run.model._compiled_call_impl is not None
    assert all(module._compiled_call_impl is None for module in run.model.network.modules())


# ---- gradient checkpointing and memory layout -----------------------------------------------------------------------


@pytest.mark.parametrize("network", UNETS)
def test_gradient_checkpointing_takes_the_same_steps(network: str, tmp_path: Path) -> None:
    unet = UNETS[network] | {"dropout": 0.3}  # drawn again in the backward pass, alike
    runs = [start(tmp_path / str(on), unet=unet, gradient_checkpointing=on) for on in (False, True)]
    for run in runs:
        for batches in run.batches():
            run.optimise(batches)
    assert [run.model.network.is_gradient_checkpointing for run in runs] == [False, True]
    assert torch.equal(weights(runs[0]), weights(runs[1]))


@pytest.mark.parametrize("network", UNETS)
def test_gradient_checkpointing_keeps_fewer_activations(network: str, tmp_path: Path) -> None:
    kept = []
    for enabled in (False, True):
        run = start(tmp_path / str(enabled), unet=UNETS[network], gradient_checkpointing=enabled)
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bound = run.objective(run.source.batch(0), run._times(0), run._noise(run.source.batch(0), 0))
        kept.append(sum(sizes.values()))
        bound.loss.backward()
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.slow
@pytest.mark.parametrize("network", SOME_UNETS)
def test_channels_last_is_near_and_resumes_bit_for_bit(network: str, tmp_path: Path) -> None:
    fields = {"unet": UNETS[network], "max_train_steps": 6}
    train_here(tmp_path / "plain", **fields)
    train_here(tmp_path / "whole", **fields, channels_last=True)
    train_here(tmp_path / "parts", **fields | {"max_train_steps": 6, "checkpointing_steps": 3}, channels_last=True)
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    first = checkpoints(tmp_path / "parts" / "checkpoints")[0]
    train_here(tmp_path / "again", **fields, channels_last=True, resume_from_checkpoint=str(first))
    ends = {
        name: load_checkpoint(checkpoints(tmp_path / name / "checkpoints")[-1]).tensors
        for name in ("plain", "whole", "again")
    }
    for group, tensors in ends["whole"].items():
        for name, value in tensors.items():
            assert torch.equal(value, ends["again"][group][name]), f"{group}: {name}"
    for name, value in ends["plain"]["objective"].items():
        torch.testing.assert_close(ends["whole"]["objective"][name], value, rtol=0, atol=2e-3)


def test_channels_last_reaches_the_convolutions(tmp_path: Path) -> None:
    run = start(tmp_path / "run", channels_last=True)
    seen: list[Tensor] = []
    run.model.network.mid_blocks[0].conv2.register_forward_hook(lambda _, __, output: seen.append(output))
    run.optimise([run.source.batch(0)])
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not seen[0].is_contiguous()


# ---- the islands of float32 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("schedule", ["linear", "learned_monotone"])
def test_everything_but_the_networks_body_is_float32(schedule: str, dtype: str) -> None:
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    objective = build_objective(SCHEDULES[schedule])
    seen: dict[str, set[torch.dtype]] = {}

    def note(name: str, *values: Any) -> None:
        seen.setdefault(name, set()).update(v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point())

    def watch(owner: Any, method: str) -> None:
        call = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            note(f"{method}, in", *args)
            result = call(*args, **kwargs)
            note(f"{method}, out", *(result if isinstance(result, tuple) else (result,)))
            return result

        object.__setattr__(owner, method, wrapper)

    process, network = objective.process, objective.network
    watch(process.parameterization, "eps_error")
    watch(process.decoder, "negative_log_likelihood")
    watch(process.scaling, "encode")
    process.schedule.register_forward_hook(lambda _, args, out: note("gamma", *args, out))
    network.register_forward_hook(lambda _, args, out: note("z_t, timestep and prediction", *args, *out))
    network.input_features.register_forward_hook(lambda _, args, out: note("Fourier features", *args, out))
    network.mid_blocks[0].register_forward_hook(lambda _, args, out: note("body", out))
    with torch.autocast("cpu", low):
        bound = objective(*draws(objective))
    bound.loss.backward()
    note("terms", *bound.terms.values(), bound.loss)
    note("parameters", *objective.parameters(), *(p.grad for p in objective.parameters()))
    assert seen.pop("body") == {low}
    assert not seen.pop("encode, in")  # levels are integers
    for name, dtypes in seen.items():
        assert dtypes == {torch.float32}, name
    assert {"gamma", "z_t, timestep and prediction", "Fourier features", "eps_error, out", "terms"} <= seen.keys()


def test_a_run_with_bfloat16_keeps_its_schedule_in_float32(tmp_path: Path) -> None:
    run = start(tmp_path / "run", mixed_precision="bf16", noise_schedule=LEARNED)
    before = [parameter.detach().clone() for parameter in run.model.process.parameters()]
    for batches in run.batches():
        terms = run.optimise(batches)
    after = list(run.model.process.parameters())
    assert {parameter.dtype for parameter in after} == {torch.float32}
    assert {term.dtype for term in terms.values()} == {torch.float32}
    assert all(not torch.equal(one, other) for one, other in zip(before, after, strict=True))


# ---- the host waits for no device -----------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Where a value of a tensor is read by the host: what makes it wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def __torch_dispatch__(self, function: Any, _: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "unique", "masked_select"):
            frames = [f for f in traceback.extract_stack() if "vdm_hub" in f.filename and "test_" not in f.filename]
            self.places.add(frames[-1].name if frames else "elsewhere")
        return function(*args, **(kwargs or {}))


# On a CPU nothing waits, so these look; each first asks for the device, as the next test shows for two of them.
LOOK_ON_A_CPU = {"_check_draws", "_reach", "_clip"}


@pytest.mark.parametrize("schedule", ["linear", "learned_monotone", "tabulated"])
def test_a_step_reads_no_value_but_where_a_cpu_may(schedule: str, tmp_path: Path) -> None:
    fields = {"noise_schedule": SCHEDULES[schedule], "gradient_accumulation_steps": 2, "logging_steps": 100}
    run = start(tmp_path / "run", **fields, max_train_steps=2)
    for batches in run.batches():
        with Reads() as reads:
            run.optimise(batches)
            run.record({}, None)
        assert reads.places == LOOK_ON_A_CPU


@pytest.mark.parametrize(("decoder", "schedule"), registered.crossed(["ddpm", "factorised"], SCHEDULES))
def test_off_the_cpu_the_objective_reads_no_value(schedule: str, decoder: str) -> None:
    """On the meta device tensors have no values: whatever reads one raises. Only autocast does not know it."""
    conditioning = "table" if schedule == "discrete_betas" else "affine"
    objective = build_objective(SCHEDULES[schedule], decoder=decoder, conditioning=conditioning)
    batch, times, noise = draws(objective)
    objective.to("meta")
    on_meta = [{name: value.to("meta") for name, value in named.items()} for named in (batch, noise)]
    levels, noise, t = on_meta[0]["levels"], on_meta[1], times.to("meta")
    x = objective.process.encode(levels)
    extras, bound = objective.process.bind(x, noise)

    def network(sample: Tensor, timestep: Tensor) -> Tensor:
        output: Tensor = objective.network(sample, timestep, return_dict=False)[0]
        return output

    diffusion = bound.kl_rate(x, t, noise, network) + bound.transition_kl(x, 0.9 * t, t, noise, network)
    terms = (bound.reconstruction(levels, x, noise, network), bound.prior_kl(x), diffusion, *extras.values())
    loss = Bound({str(i): term for i, term in enumerate(terms)}, dimensions=64).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
    assert loss.device == norm.device == torch.device("meta")
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


def test_off_the_cpu_losses_are_looked_at_only_when_logged(tmp_path: Path) -> None:
    run = start(tmp_path / "run", logging_steps=3)
    run.losses = LossWatch(run.training, run.folder.checkpoints, looks_at_once=False)
    terms = {"diffusion": torch.tensor(1.0)}
    waiting = []
    for _ in range(3):
        run._watch(terms, torch.tensor(1.0))
        waiting.append(len(run.losses._unchecked))
    assert waiting == [1, 2, 0]


@pytest.mark.parametrize("gamma_0", [-13.3, -8.7, -2.0])
@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_decoder_that_looks_and_the_one_that_does_not_agree(
    gamma_0: float, num_levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling, generator = DataScaling("bin_centers", num_levels), torch.Generator().manual_seed(0)
    levels = torch.randint(0, num_levels, (3, 1, 4, 4), generator=generator)
    noise = torch.randn(3, 1, 4, 4, generator=generator)
    results = []
    for unseen in (False, True):
        gamma = torch.full((3,), gamma_0, requires_grad=True)
        z_0 = (scaling.encode(levels) + torch.exp(torch.tensor(gamma_0 / 2)) * noise).requires_grad_()
        if unseen:
            monkeypatch.setattr(decoders, "_moments_in_reach", decoders._moments_of_all)
        nll = FactorisedDecoder().negative_log_likelihood(levels, z_0, gamma, gamma, z_0.clone, scaling)
        results.append((nll, *torch.autograd.grad(nll.sum(), (z_0, gamma))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---- accelerate's configurations ------------------------------------------------------------------------------------


CONFIGURATIONS = sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path: Path) -> None:
    read = load_config_from_file(str(path))
    given = yaml.safe_load(path.read_text())
    assert given, "a file that says nothing would be read as well"
    for key, value in given.items():
        assert getattr(read, key) == (DistributedType(value) if key == "distributed_type" else value), key
    assert read.num_processes >= read.num_machines


def test_the_readme_names_each_configuration_once() -> None:
    rows = [line.split("|") for line in (ROOT / "scripts/accelerate/README.md").read_text().splitlines()]
    named = {row[1].strip().strip("`"): row[3].strip() for row in rows if len(row) == 5 and ".yaml" in row[1]}
    assert sorted(named) == [path.name for path in CONFIGURATIONS]
    assert {name for name, state in named.items() if state == "run"} == {"cpu.yaml"}


def test_megatron_is_refused_and_nothing_that_lies_ready() -> None:
    for path in CONFIGURATIONS:
        refuse_engine(load_config_from_file(str(path)).distributed_type)
    with pytest.raises(ConfigurationError, match=r"MEGATRON_LM.*fsdp2\.yaml"):
        refuse_engine(DistributedType.MEGATRON_LM)


# ---- the fields -----------------------------------------------------------------------------------------------------


def test_an_unknown_way_to_compile_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"compile.*regoinal.*regional"):
        Configuration.from_dict({"dataset_name": "digits", "max_train_steps": 1, "compile": "regoinal"})
