"""`VDMScheduler`: the VDM posterior as a diffusers scheduler. Its config is the whole truth of the process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin as SchedulerMixin  # vdm_hub exports it
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from vdm_hub import registry
from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.parameterizations import Velocity
from vdm_hub.diffusion.reverse_kernel import ReverseKernel
from vdm_hub.diffusion.scaling import ScalingName
from vdm_hub.errors import ConfigurationError, explained, shortened
from vdm_hub.fields import whole_number
from vdm_hub.hub.schemas import Within, check_arguments
from vdm_hub.models.loading import CheckedLoading
from vdm_hub.registry import Serialised
from vdm_hub.schedulers.configs import (
    SHOWN_SAMPLERS,
    SHOWN_STEPS,
    STOCK_TARGETS,
    as_vdm_config,
    changes_process,
    check_betas,
    check_grid,
    check_sampler,
    check_steps,
    derived_betas,
    is_beta_table,
    unread_fields,
    without_steps,
)
from vdm_hub.schedulers.families import family_of, process_config
from vdm_hub.schedulers.stock_ddpm import StockDDPM

# Keys that no stock scheduler reads: only these may be listed as defaults, or `from_config` would drop the process.
_OWN_KEYS = ("forward_process", "num_levels", "data_scaling", "decoder")
_Steps = Annotated[int, Within(2, 20_000)]
_Levels = Annotated[int, Within(2, 65_536)]
_Share = Annotated[float, Within(0, 1)]
_BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]
_Variance = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]


@dataclass
class VDMSchedulerOutput(BaseOutput):
    """The output of one reverse step.

    Attributes:
        prev_sample: ``z_s``, (B, *data).
        pred_original_sample: The estimate of the data behind it, for previews.
        log_prob: ``log p(z_s|z_t)`` of that draw, (B,), nats, where it was asked for.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    log_prob: Tensor | None = None


class VDMScheduler(CheckedLoading, SchedulerMixin, ConfigMixin):
    r"""Ancestral sampling from ``p(z_s|z_t) = q(z_s|z_t, x_hat)`` (VDM eq. 10; Luo eq. 84), for diffusers.

    ``timesteps`` are float tensors ``tau(gamma(t_j))`` in [0, num_train_timesteps - 1]; time stays continuous, so any
    number of steps is exact for its own grid. ``num_inference_steps = n`` is n network evaluations: n transitions end
    at ``z_0``, from which ``p(x|z_0)`` is decoded. A DDPM-family config keeps DDPM's grid, arithmetic and last step.

    Args:
        num_train_timesteps: T, the scale of the timesteps and the length of the table for stock samplers.
        noise_schedule: Name or serialised form; ``None`` is ``linear``, or ``discrete_betas`` with `trained_betas`.
        prediction_type: The network's target: ``epsilon``, ``sample``, ``score``, ``v_prediction`` or a plugin's.
        conditioning: What the network reads of the noise level; ``None`` is derived from the schedule and recorded.
        num_levels: K, the number of levels of the data.
        data_scaling: ``bin_centers``, ``full``, ``unit``; ``None``: ``full`` for a beta table, else ``bin_centers``.
        decoder: ``factorised`` or ``ddpm``; ``None`` is ``ddpm`` for a beta table, else ``factorised``.
        forward_process: ``gaussian`` or a plugin's.
        final_sigmas_type: ``sigma_min`` ends at z_0, ``zero`` at the data as DDPM does; ``None`` as `data_scaling`.
        trained_betas: The table behind ``discrete_betas``; otherwise derived, so that stock samplers read the process.
        beta_start: DDPM's first beta, for ``discrete_betas``.
        beta_end: Its last one.
        beta_schedule: How the betas run from one to the other.
        variance_type: DDPM's name for the variance of the reverse step; this and what follows acts on
            ``discrete_betas``, and is carried for stock samplers.
        clip_sample: Whether estimates of the data are clipped.
        clip_sample_range: To which size.
        thresholding: Whether they are clipped to a quantile of their own sizes instead.
        dynamic_thresholding_ratio: Which quantile.
        sample_max_value: The largest size that it may be.
        timestep_spacing: DDPM's: ``leading``, ``linspace`` or ``trailing``.
        steps_offset: What is added to the timesteps of ``leading``.
        rescale_betas_zero_snr: Whether the betas are rescaled so that the last latent holds no signal.

    Example:
        >>> import torch
        >>> scheduler = VDMScheduler()
        >>> scheduler.set_timesteps(4)
        >>> scheduler.timesteps
        tensor([999.0000, 749.2500, 499.5000, 249.7500])
        >>> z = torch.randn(2, 3, 8, 8)
        >>> scheduler.step(torch.zeros_like(z), scheduler.timesteps[0], z).prev_sample.shape
        torch.Size([2, 3, 8, 8])
    """

    order = 1
    _compatibles = list(SHOWN_SAMPLERS)

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: _Steps = 1000,
        noise_schedule: Serialised | None = None,
        prediction_type: Serialised = "epsilon",
        conditioning: Serialised | None = None,
        num_levels: _Levels = 256,
        data_scaling: ScalingName | None = None,
        decoder: Serialised | None = None,
        forward_process: Serialised = "gaussian",
        final_sigmas_type: Literal["sigma_min", "zero"] | None = None,
        trained_betas: Sequence[_Share] | np.ndarray | None = None,
        beta_start: _Share = 0.0001,
        beta_end: _Share = 0.02,
        beta_schedule: _BetaSchedule = "linear",
        variance_type: _Variance = "fixed_small",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: _Share = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None,
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        check_arguments(type(self), self.config)
        prediction_type, forward_process = copy.deepcopy((prediction_type, forward_process))
        given_betas = None if trained_betas is None else [float(b) for b in trained_betas]
        if noise_schedule is None:
            noise_schedule = "linear" if given_betas is None else "discrete_betas"
        is_table = is_beta_table(noise_schedule)
        self.register_to_config(
            noise_schedule=copy.deepcopy(noise_schedule),
            prediction_type=prediction_type,
            forward_process=forward_process,
            trained_betas=given_betas,
            data_scaling=data_scaling or ("full" if is_table else "bin_centers"),
            decoder=copy.deepcopy(decoder) or ("ddpm" if is_table else "factorised"),
            final_sigmas_type=final_sigmas_type or ("zero" if is_table else "sigma_min"),
            timestep_spacing=timestep_spacing or ("leading" if is_table else "trailing"),
            conditioning=without_steps(conditioning) or ("table" if is_table else "affine"),
        )
        self._name_packages()
        self._stock = self._stock_ddpm() if is_table else None
        check_steps(conditioning, self.config.num_train_timesteps)
        self.process = self.build_process()
        self.register_to_config(**unread_fields(self.process, self.config))
        self._record_derived(given_betas)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.set_timesteps(self.config.num_train_timesteps)
        self.num_inference_steps = None

    # ---- construction -----------------------------------------------------------------------------------------------

    def _name_packages(self) -> None:
        """Say in the config which package brings each plugin, where it was given by its name alone."""
        named = {
            field: registry.with_package(kind, self.config[field])
            for field, kind in registry.SERIALISED_FIELDS.items()
        }
        self.register_to_config(**named)

    def _stock_ddpm(self) -> StockDDPM:
        """The stock DDPM of this table: its betas are ours, and its steps too, where the chain ends at the data."""
        betas = registry.parse_serialised("noise_schedules", self.config.noise_schedule)[1].get("betas")
        if betas is not None:
            check_betas(self.config.trained_betas, betas)
            self.register_to_config(trained_betas=list(betas))  # where stock samplers look for it
        if self.config.trained_betas is not None:
            self.register_to_config(num_train_timesteps=len(self.config.trained_betas))
        return StockDDPM(self.config)

    def build_process(self, schedule: nn.Module | None = None) -> ForwardProcess:
        """A new process of this config, with its own parameters; ``schedule`` stands for weights carried elsewhere."""
        fields = dict(self.config)
        fields["trained_betas"] = None if self._stock is None else self._stock.ddpm.betas.tolist()
        form = fields["forward_process"]
        cls, arguments = registry.resolve("forward_processes", form)
        if not issubclass(cls, ForwardProcess):
            raise ConfigurationError(f"{cls.__name__} is not a ForwardProcess: derive it from that class.")
        if taken := sorted(arguments.keys() & fields.keys()):
            raise ConfigurationError(
                f"the config of the forward process {registry.parse_serialised('forward_processes', form)[0]!r} holds "
                f"{', '.join(taken)}: give it beside the process, as a field of the scheduler."
            )
        with registry.building("forward_processes", form, arguments):
            return cls.from_fields(fields, schedule)

    def _record_derived(self, given_betas: list[float] | None) -> None:
        """Write what was derived into the config, and tell stock samplers to believe all of it."""
        if self._stock is not None:
            self.betas, self.alphas_cumprod = self._stock.ddpm.betas, self._stock.ddpm.alphas_cumprod
        else:
            derived = derived_betas(self.process)
            check_betas(given_betas, derived)
            self.betas = torch.tensor(derived or [], dtype=torch.float32)
            self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
            self.register_to_config(trained_betas=derived)
        own_table = self._stock is not None and self.config.conditioning == "table"  # a table through its own betas
        if isinstance(self.process, GaussianProcess) and not own_table:
            constants = registry.serialise("conditionings", self.process.conditioning, complete=True)
            self.register_to_config(conditioning=without_steps(constants))
        # From this name a stock scheduler's `from_config` knows which keys are ours, and does not warn of them.
        self.register_to_config(_class_name=type(self).__name__)
        if "_use_default_values" in self.config:
            own = [key for key in _OWN_KEYS if key in self.config["_use_default_values"]]
            self.register_to_config(_use_default_values=own)

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A VDM scheduler for another scheduler's config, or for its own.

        A config with ``noise_schedule`` is a VDM's. One without it but with betas is of the DDPM family and gives
        bitwise the same process. One of flow matching, EDM or VE (`vdm_hub.schedulers.families`) is that process, if
        what it leaves undefined is given: ``num_levels``, ``data_scaling``, ``decoder``. Anything else is refused.

        Raises:
            ConfigurationError: The config describes a process that is none of these, or something must be given.
        """
        if not isinstance(config, Mapping):
            return super().from_config(config)  # which refuses it
        config = process_config(config)
        if config.get("noise_schedule") is None and (family := family_of(config)) is not None:
            config, kwargs = (
                family.fields(f"the config of a {config.get('_class_name', 'scheduler')}", config, kwargs),
                {},
            )
        config = as_vdm_config(copy.deepcopy(dict(config)), kwargs, cls)
        if changes_process(config, kwargs):
            replaced = super().from_config(dict(config)).process
            config |= {"conditioning": registry.serialise("conditionings", replaced.conditioning)}
            config |= {key: None for key in ("trained_betas", "final_sigmas_type") if "noise_schedule" in kwargs}
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def to_diffusers(self, scheduler_class: type, **kwargs: Any) -> Any:
        """A stock sampler of the same process, such as ``to_diffusers(DPMSolverMultistepScheduler)``.

        Args:
            scheduler_class: One that is shown to run it: see `vdm_hub.schedulers.configs.SHOWN_SAMPLERS`.
            kwargs: Options of its constructor that are shown to leave the process what it is.

        Raises:
            ConfigurationError: No stock sampler can run it (the score target, a gamma per pixel, another process), or
                the sampler or an option is not shown to, or two options do not run together.
        """
        self.check_stock_process()
        check_sampler(scheduler_class, self.config.prediction_type, kwargs)
        with explained(f"no {scheduler_class.__name__} can be made", "leave an option out", ConfigurationError):
            made = scheduler_class.from_config(self.config, **kwargs)  # type: ignore[attr-defined]
        other = "choose another sampler, VDMScheduler among them, or other options of it"
        check_grid(made, min(SHOWN_STEPS, self.config.num_train_timesteps), other)
        return made

    def check_stock_process(self) -> None:
        """Refuse a process that none of diffusers' samplers can run.

        Raises:
            ConfigurationError: Its network predicts the score, or it has a gamma per pixel, or is another process.
        """
        target = self.config.prediction_type
        if target not in STOCK_TARGETS:
            raise ConfigurationError(
                f"diffusers' samplers know no target {target!r}, only {', '.join(STOCK_TARGETS)}: sample with "
                f"VDMScheduler, or train with one of those."
            )
        if not self.config.trained_betas and self._stock is None:
            raise ConfigurationError(
                "diffusers' samplers need one noise level per time, told as an integer; this process has a gamma per "
                "pixel or per datum, or none at all, or tells it otherwise. Sample it with VDMScheduler."
            )

    # ---- the grid ---------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Choose the grid: n equal steps in t, or descending ``timesteps``, or descending ``sigmas`` = sigma/alpha.

        Args:
            num_inference_steps: n, a whole number; of DDPM's own chain at most ``num_train_timesteps``.
            device: Of ``timesteps``.
            timesteps: On the scale of `timesteps`; of DDPM's own chain whole numbers.
            sigmas: Within the schedule; a last one of zero, as diffusers has it, is the chain's end, which is none of
                its steps.

        Raises:
            ConfigurationError: Not exactly one of them was given, or it is out of range or order.
        """
        if sum(grid is not None for grid in (num_inference_steps, timesteps, sigmas)) != 1:
            raise ConfigurationError("give exactly one of num_inference_steps, timesteps and sigmas.")
        if (stock := self._ending_stock) is not None and sigmas is None:
            given = None if timesteps is None else _descending("timesteps", timesteps).tolist()
            self._set_grid(*stock.grid(num_inference_steps, given), device)
            return
        if num_inference_steps is not None:
            steps = whole_number("num_inference_steps", num_inference_steps)
            times = 1 - torch.arange(steps, dtype=torch.float64) / steps
        elif timesteps is not None:
            times = self._times_of_timesteps(_descending("timesteps", timesteps))
        else:
            times = self._times_of_sigmas(sigmas)
        self._set_grid(times, self.process.timestep(times).float() if timesteps is None else timesteps, device)

    def _set_grid(self, times: Tensor, timesteps: Any, device: Any) -> None:
        values = torch.as_tensor(timesteps)
        values = values.float() if values.is_floating_point() or self._ending_stock is None else values
        self.timesteps: Tensor = values.to(device)
        self.times: list[float] = [*times.tolist(), 0.0]
        self._index = {value: i for i, value in enumerate(values.tolist())}
        self.num_inference_steps = len(times)

    def _times_of_timesteps(self, timesteps: Tensor) -> Tensor:
        first, last = self.process.timestep(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        if bool(((timesteps < first - 1e-3) | (timesteps > last + 1e-3)).any()):
            raise ConfigurationError(f"timesteps {timesteps.tolist()[:5]} leave this process's {first:g} to {last:g}.")
        return self.process.time(timesteps)

    def _times_of_sigmas(self, sigmas: Any) -> Tensor:
        schedule = self.process.scalar_gamma
        if schedule is None:
            raise ConfigurationError("sigmas need a process with one noise level per time: give timesteps instead.")
        given = _descending("sigmas", sigmas)
        given = given[:-1] if len(given) > 1 and given[-1] == 0 else given
        last, first = (math.exp(gamma / 2) for gamma in schedule.endpoints())
        if not bool(((given >= last * 0.999) & (given <= first * 1.001)).all()):
            raise ConfigurationError(f"sigmas {given.tolist()[:5]} leave this schedule's {first:g} to {last:g}.")
        return schedule.inverse(2 * torch.log(given))

    @property
    def _bound(self) -> BoundProcess:
        """The process bound to no batch, for callers that bring none."""
        if self.process.has_weights:
            raise ConfigurationError(
                f"{type(self.process).__name__} has weights of its own, which a scheduler's config does not hold: "
                f"sample with VDMPipeline, or give the trained process, process=pipe.process.bind(None, {{}})[1]."
            )
        try:
            return self.process.bind(None, {})[1]
        except KeyError as missing:
            raise ConfigurationError(
                f"this process draws a context ({missing}) once for each chain: sample with VDMPipeline, or give "
                f"step() the bound process."
            ) from missing

    @property
    def _ending_stock(self) -> StockDDPM | None:
        """Diffusers' own chain, where it ends at the data."""
        return self._stock if self._stock is not None and self._stock.ends_at_data else None

    @property
    def clipping(self) -> Callable[[Tensor], Tensor] | None:
        """What the sampler's steps do to their estimates of the data, where they do: thresholding, or clipping."""
        return None if self._stock is None else self._stock.clipping

    @property
    def ends_at_data(self) -> bool:
        """Whether the last step leaves data (DDPM's), rather than the latent z_0, which is still to be decoded."""
        return self._ending_stock is not None

    def interval(self, timestep: float | Tensor) -> tuple[float, float]:
        """``(s, t)`` of the step that starts at a timestep, on the grid or between its points.

        Raises:
            ConfigurationError: It is no number of the process's range.
        """
        value = self._checked_timestep(timestep)
        if value in self._index:
            index = self._index[value]
            return self.times[index + 1], self.times[index]
        t = float(self.process.time(torch.tensor(value, dtype=torch.float64)))
        return max((time for time in self.times if time < t), default=t), t

    # ---- diffusers' contract ----------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The sample itself: the VDM's latents have variance near one at every time."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
        process: BoundProcess | None = None,
        return_log_prob: bool = False,
    ) -> VDMSchedulerOutput | tuple[Tensor | None, ...]:
        """Draw ``z_s`` from ``q(z_s|z_t, x_hat)``: from one grid point to the next.

        Args:
            model_output: The network's prediction in the terms of `prediction_type`, (B, *data).
            timestep: One of `timesteps`, or any value between.
            sample: ``z_t``, (B, *data).
            generator: One, or a list with one per datum.
            return_dict: Whether to return a `VDMSchedulerOutput` or a tuple in its order.
            process: The process bound to this chain, where it carries a context (as `VDMPipeline` does).
            return_log_prob: Whether to return `transition_log_prob` of the draw, held fixed, as the last of a tuple.

        Raises:
            ConfigurationError: The timestep is no number of the process's range, or the output has another shape than
                its network's for the sample.
        """
        self._check_output(model_output, sample)
        kernel = self._kernel(sample, model_output, timestep, process) if return_log_prob else None
        output: tuple[Tensor | None, ...]
        if (stock := self._ending_stock) is not None:
            assert isinstance(self.process, GaussianProcess)
            output = stock.step(self.process, model_output, self._checked_timestep(timestep), sample, generator)
        else:
            s, t = (time_tensor(time, sample) for time in self.interval(timestep))
            output = (process or self._bound).reverse_step(model_output, sample, s, t, generator)
        if kernel is not None:
            assert output[0] is not None
            output = (*output, kernel.log_prob(_double(output[0].detach())))
        return VDMSchedulerOutput(*output) if return_dict else output

    def _check_output(self, output: Tensor, sample: Tensor) -> None:
        """Refuse an output that would be broadcast."""
        if not isinstance(self.process, GaussianProcess):
            return
        needed = self.process.output_shape(sample.shape[1:])
        if output.shape[1:] != needed:
            raise ConfigurationError(
                f"model_output is {tuple(output.shape)} for a sample {tuple(sample.shape)}, and the process needs "
                f"{(len(sample), *needed)}: give what its network gives."
            )

    def _checked_timestep(self, timestep: float | Tensor) -> float:
        """The timestep of a step: one of the grid or, of a VDM's own chain, any between its ends."""
        with explained(f"timestep is {shortened(timestep)}", "give one of timesteps", ConfigurationError):
            value = float(timestep)
        if value in self._index:
            return value
        first, last = sorted(map(float, self.process.timestep(torch.tensor([0.0, 1.0], dtype=torch.float64))))
        rounding = 1e-6 * (last - first)  # of float32
        if self._ending_stock is not None or not first - rounding <= value <= last + rounding:
            between = f", or a number from {first:g} to {last:g}" if self._ending_stock is None else ""
            raise ConfigurationError(
                f"timestep is {value:g}, which is none of this scheduler's: give one of timesteps "
                f"({shortened(self.timesteps.tolist())}){between}."
            )
        return value

    def transition_log_prob(
        self,
        prev_sample: Tensor,
        sample: Tensor,
        model_output: Tensor,
        timestep: float | Tensor,
        process: BoundProcess | None = None,
    ) -> Tensor:
        """``log p(z_s|z_t)`` of one step of the sampler, per datum, (B,), nats, in float64.

        It is a function of the prediction that autograd differentiates: the policy's log-probability, where a sampler
        is trained by reinforcement (Black et al., arXiv 2305.13301, eq. 4 to 7).

        Args:
            prev_sample: ``z_s``, as `step` drew it, (B, *data).
            sample: ``z_t``, likewise.
            model_output: The network's prediction at ``z_t``, in the terms of `prediction_type`.
            timestep: As for `step`, on the same grid; or one for each datum, (B,).
            process: As for `step`.

        Raises:
            ConfigurationError: The process's reverse step is not Gaussian; or it is the last of DDPM's chain, which
                ends at the data without a draw; or the shapes differ.

        Example:
            >>> import torch
            >>> scheduler = VDMScheduler()
            >>> scheduler.set_timesteps(4)
            >>> z_t, output = torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8, requires_grad=True)
            >>> drawn = scheduler.step(output, scheduler.timesteps[0], z_t, return_log_prob=True)
            >>> again = scheduler.transition_log_prob(drawn.prev_sample, z_t, output, scheduler.timesteps[0])
            >>> torch.equal(drawn.log_prob, again), again.requires_grad
            (True, True)
        """
        if prev_sample.shape != sample.shape:
            raise ConfigurationError(
                f"prev_sample has shape {tuple(prev_sample.shape)}, and sample {tuple(sample.shape)}: give both of "
                f"the same data."
            )
        kernel = self._kernel(sample, model_output, timestep, process)
        return kernel.log_prob(_double(prev_sample))

    def _kernel(
        self, sample: Tensor, model_output: Tensor, timestep: float | Tensor, process: BoundProcess | None
    ) -> ReverseKernel:
        """``p(z_s|z_t)`` of the step that starts at a timestep, or at one of each datum, in float64."""
        stock, given = self._ending_stock, torch.as_tensor(timestep)
        if given.ndim > 1 or given.numel() not in (1, len(sample)):
            raise ConfigurationError(
                f"timestep has shape {tuple(given.shape)} for {len(sample)} data: give one, or one for each."
            )
        chain = self if stock is None else stock
        pairs = [chain.interval(self._checked_timestep(one)) for one in given.flatten()]
        s, t = zip(*pairs, strict=True) if len(pairs) > 1 else pairs[0]
        bound = process or self._bound
        if self.clipping is not None:
            clipped = self.build_process()
            clipped.clipping = self.clipping  # type: ignore[assignment]
            bound = clipped.bind(None, {})[1]
        z_t, output = _double(sample), _double(model_output)
        return bound.reverse_kernel(output, z_t, time_tensor(s, z_t), time_tensor(t, z_t))[1]

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``z_t = alpha_t x + sigma_t eps`` at each datum's timestep, (B,)."""
        if not isinstance(self.process, GaussianProcess):
            raise ConfigurationError("only a Gaussian process adds normal noise: bind() the process and sample().")
        if self._stock is not None and not timesteps.is_floating_point():
            noised: Tensor = self._stock.ddpm.add_noise(original_samples, noise, timesteps)
            return noised
        t = self.process.time(timesteps.cpu()).to(_double_device(original_samples))
        return self._bound.sample(original_samples, t, {"marginal": noise}).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``v = alpha_t eps - sigma_t x`` at each datum's timestep, (B,)."""
        if not isinstance(self.process, GaussianProcess):
            raise ConfigurationError("only a Gaussian process has a velocity.")
        if self._stock is not None and not timesteps.is_floating_point():
            velocity: Tensor = self._stock.ddpm.get_velocity(sample, noise, timesteps)
            return velocity
        gamma = self.process.schedule(self.process.time(timesteps.cpu())).to(_double_device(sample))
        return Velocity().target(sample, noise, gamma).to(sample.dtype)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)


def _floats(values: Any) -> list[float]:
    with explained(f"{shortened(values)} can't be read", "give a list of numbers", ConfigurationError):
        return [float(value) for value in values]


def _descending(name: str, values: Any) -> Tensor:
    """The values, float64, (N,).

    Raises:
        ConfigurationError: They are not finite, not in strictly descending order, or none.
    """
    found = torch.tensor(_floats(values), dtype=torch.float64)
    if found.numel() == 0 or not bool(found.isfinite().all()) or not bool((found.diff() < 0).all()):
        raise ConfigurationError(
            f"{name} are {shortened(found.tolist())}: give at least one, finite and in strictly descending order."
        )
    return found


def time_tensor(time: float | Sequence[float], sample: Tensor) -> Tensor:
    """A time as a tensor, (), or some as (B,), in float64 where the device has it."""
    return torch.tensor(time, dtype=torch.float64, device=_double_device(sample))


def _double(sample: Tensor) -> Tensor:
    return sample.to(_double_device(sample)).double()


def _double_device(sample: Tensor) -> torch.device:
    # Apple's GPUs have no float64; scalars on the CPU combine with tensors anywhere.
    return torch.device("cpu") if sample.device.type == "mps" else sample.device


VDMScheduler.__module__ = "vdm_hub"
VDMSchedulerOutput.__module__ = "vdm_hub"
