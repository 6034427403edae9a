"""`TokenPipeline`: samples of text from a diffusion of tokens, texts with holes filled, and their likelihood."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers import PreTrainedModel

from vdm_hub.data.kinds import TOKENS, DataKind, kind_of
from vdm_hub.data.sequences import Cut, WindowsMapping, encode_each
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.diffusion.draws import Generator
from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess
from vdm_hub.errors import ConfigurationError, DataError, NonFiniteLossError, shortened
from vdm_hub.fields import whole_number
from vdm_hub.hub.schemas import check_arguments
from vdm_hub.likelihood.measurement import collect
from vdm_hub.likelihood.methods import Method, build_measurement, method_of
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.models.calls import Call, evaluating
from vdm_hub.models.token_networks import TokenNetwork, TokenTimeEmbedding, check_token_model, positions_of
from vdm_hub.objectives.tokens import TokenObjective, check_token_process
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.schedulers.vdm import VDMScheduler, time_tensor

TextPrompt: TypeAlias = str | Sequence[int | None]
"""A text, in which the tokenizer's mask token stands for a hole; or ids of the tokenizer, ``None`` for a hole."""

StepCallback: TypeAlias = Callable[[DiffusionPipeline, int, Tensor, dict[str, Any]], dict[str, Any] | None]

_USUAL_LENGTH = 512  # of a window, where neither pipeline nor network says one
_COLDEST = 1e-4
_TRIED = 8  # tokens, on which a network is tried


@dataclass
class TokenPipelineOutput(BaseOutput):
    """Samples of text.

    Attributes:
        texts: Each as text.
        ids: As ids of the tokenizer, int64, (B, L).
    """

    texts: list[str]
    ids: Tensor


class TokenPipeline(LikelihoodPipeline):
    """A diffusion of a text's tokens: call it for texts, ask it for a likelihood.

    Args:
        network: A model of transformers that gives logits of each token and whose attention is not causal.
        tokenizer: Its fast tokenizer, with a mask token.
        scheduler: `VDMScheduler`, whose process is one of K values: all tokens but the mask.
        time_embedding: What tells the network the timestep, where something does.
        windows: How texts are cut into windows, as `vdm_hub.data.sequences.Windows` has it.

    Raises:
        ConfigurationError: Network, tokenizer and process do not belong together.
    """

    model_cpu_offload_seq = "time_embedding->network"
    _optional_components = ["time_embedding"]
    _left_out_where_none = ("time_embedding", "windows")
    _of_transformers = ("network", "tokenizer")
    _callback_tensor_inputs = ["latents", "texts"]

    def __init__(
        self,
        network: nn.Module,
        tokenizer: object,
        scheduler: SchedulerMixin,
        time_embedding: TokenTimeEmbedding | None = None,
        windows: WindowsMapping | None = None,
    ) -> None:
        super().__init__()
        check_arguments(type(self), {"windows": windows})
        values = Tokenization(tokenizer).num_values
        if not isinstance(scheduler, VDMScheduler):
            raise ConfigurationError(
                f"the scheduler is a {type(scheduler).__name__}: give a VDMScheduler of a process of tokens, such as "
                f"absorbing of the package vdm-hub-tokens."
            )
        check_token_process(scheduler.process)
        if scheduler.process.num_levels != values:
            raise ConfigurationError(
                f"the tokenizer has {values:,} tokens beside its mask, and the scheduler's num_levels is "
                f"{scheduler.process.num_levels:,}: give VDMScheduler(num_levels={values}, ...)."
            )
        if not isinstance(network, PreTrainedModel):
            raise ConfigurationError(
                f"the network is {shortened(network)}, a {type(network).__name__}: give a model of transformers that "
                f"gives logits of each token, such as BertForMaskedLM."
            )
        check_token_model(network, min(windows["length"], _TRIED) if windows else 2)
        self.register_modules(network=network, tokenizer=tokenizer, scheduler=scheduler, time_embedding=time_embedding)
        if windows is not None:
            check_token_model(network, windows["length"])
            Cut(windows["length"], windows["context"])
            self.register_to_config(windows=dict(windows))
        self.token_network()

    @property
    def kind(self) -> DataKind:
        """What it is a model of."""
        return TOKENS

    @property
    def tokenization(self) -> Tokenization:
        """Its tokenizer, as the process sees it."""
        return Tokenization(self.tokenizer)

    @property
    def cut(self) -> Cut:
        """How it cuts texts into windows."""
        if (windows := self.config.get("windows")) is not None:
            return Cut(windows["length"], windows["context"])
        return Cut(min(positions_of(self.network) or _USUAL_LENGTH, _USUAL_LENGTH))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a window, (L,)."""
        return (self.cut.length,)

    @property
    def num_levels(self) -> int:
        """The number of values of a token, K."""
        return self.process.num_levels

    @property
    def process(self) -> ForwardProcess:
        """The forward process of the scheduler's config, on the pipeline's device."""
        return self.scheduler.process.to(self._execution_device)

    @property
    def main_model(self) -> Any:
        """The network."""
        return self.network

    def token_network(self) -> TokenNetwork:
        """The network as the process calls it."""
        return TokenNetwork(self.network, self.tokenization, self.time_embedding)

    def description(self) -> dict[str, Any]:
        """The scheduler's config, and how texts are cut."""
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        return config | {"windows": self.config.get("windows")}

    def check_data(self, levels: Tensor, given_levels: int) -> None:
        """Refuse windows of another vocabulary, or longer ones than the network takes.

        Raises:
            DataError: They are.
        """
        most = positions_of(self.network)
        if most is not None and levels.shape[1] > most:
            raise DataError(
                f"the windows are {levels.shape[1]} tokens long, and the network takes {most}: give shorter ones."
            )
        if given_levels != self.num_levels or int(levels.max()) >= self.num_levels:
            raise DataError(
                f"the texts were read as tokens 0 to {max(given_levels - 1, int(levels.max()))}, and the model knows "
                f"0 to {self.num_levels - 1}: read them with the model's own tokenizer."
            )

    def may_be_of(self, dataset: Mapping[str, Any]) -> bool:
        """Whether a record is of texts that it knows; a measurement may have cut them into other windows."""
        most = positions_of(self.network) or dataset["shape"][0]
        return kind_of(dataset) is TOKENS and dataset["levels"] == self.num_levels and dataset["shape"][0] <= most

    # ---- samples ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int = 1,
        length: int | None = None,
        prompt: TextPrompt | Sequence[TextPrompt] | None = None,
        num_inference_steps: int = 128,
        temperature: float = 1.0,
        remasking: float | None = None,
        generator: Generator = None,
        callback_on_step_end: StepCallback | None = None,
        return_dict: bool = True,
    ) -> TokenPipelineOutput | tuple[list[str], Tensor]:
        """Draw texts, or fill the holes of some.

        Args:
            num_samples: How many; of each prompt, where there are some.
            length: L, the tokens of each; those of a window where not given. What a prompt lacks of it are holes after
                its end, so that it is continued.
            prompt: What is given, with holes: see `TextPrompt`. One, or several. With holes and without a length, it
                is as long as it is.
            num_inference_steps: Evaluations of the network; each opens about as many tokens.
            temperature: By which logits are divided: below 1 the likelier tokens are drawn still more often, and at 0
                the likeliest alone.
            remasking: Of a masked process: how much of what is open is masked again on the way, and so drawn anew, of
                the most that there may be, from 0 to 1; as the model's process says where not given.
            generator: One, or a list with one for each text.
            callback_on_step_end: Called as ``callback(pipe, step, timestep, kwargs)`` after each step, where
                ``kwargs`` has ``latents``, (B, L), and ``texts``, as far as they are opened. It gives ``None``, or a
                dict whose ``latents`` take the place of those: values of tokens, K for what is masked.
            return_dict: Whether to give a `TokenPipelineOutput`; else ``(texts, ids)``.

        Raises:
            ConfigurationError: An argument is out of range, a prompt is none or has a token that the model does not
                know, or what a callback gives back is of another kind.
            NonFiniteLossError: The network gave NaN.
        """
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise ConfigurationError(
                f"callback_on_step_end is {shortened(callback_on_step_end)}: give a function, or leave it out."
            )
        levels, given = self._start(num_samples, length, prompt)
        steps = whole_number("num_inference_steps", num_inference_steps)
        if not (isinstance(temperature, int | float) and 0 <= temperature < float("inf")):
            raise ConfigurationError(f"temperature is {shortened(temperature)}: give a number of at least 0.")
        _check_generators(generator, len(levels))
        process, device = self._remasked(remasking), self._execution_device
        x, noise = process.encode(levels), process.draw_context(tuple(levels.shape), generator, device)
        _, bound = process.bind(None, noise) if not bool(given.any()) else process.bind_given(x, noise, given)
        network = _Tempered(self.token_network(), max(float(temperature), _COLDEST))
        with evaluating(self.network):
            latents = self._opened(bound, network, tuple(levels.shape), steps, generator, callback_on_step_end)
            drawn = bound.decode(latents, network, generator)
        found = torch.where(given, levels, drawn)
        tokenization = self.tokenization
        texts, ids = [tokenization.decode(row) for row in found.cpu()], tokenization.ids_of(found)
        return TokenPipelineOutput(texts=texts, ids=ids) if return_dict else (texts, ids)

    def _remasked(self, remasking: float | None) -> ForwardProcess:
        """The process, whose sampler masks open sites again where that is asked for."""
        process = self.process
        if remasking is None:
            return process
        if (again := getattr(process, "with_remasking", None)) is None:
            raise ConfigurationError(
                f"remasking is {shortened(remasking)}, and {type(process).__name__} has no masked sites: leave it out."
            )
        remasked: ForwardProcess = again(remasking).to(self._execution_device)
        return remasked

    def _opened(
        self,
        bound: BoundProcess,
        network: _Tempered,
        shape: tuple[int, ...],
        steps: int,
        generator: Generator,
        callback: StepCallback | None,
    ) -> Tensor:
        """What all reverse steps make of z_1."""
        scheduler: Any = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(steps, device=self._execution_device)
        latents = bound.prior_sample(shape, generator, self._execution_device)
        tokenization, broken = self.tokenization, torch.zeros(shape[0], dtype=torch.bool, device=latents.device)
        for i, timestep in enumerate(self.progress_bar(scheduler.timesteps)):
            output = bound.predict(network, latents, time_tensor(scheduler.times[i], latents))
            broken |= output.isnan().flatten(1).any(1)
            latents = scheduler.step(output, timestep, latents, generator, process=bound).prev_sample
            if callback is not None:
                texts = [tokenization.decode(row.long()) for row in latents.cpu()]
                given = callback(self, i, timestep, {"latents": latents, "texts": texts})
                latents = _latents_of(given, latents, tokenization.num_values)
        if bool(broken.any()):  # looked at once: a draw from NaN is a token like any
            raise NonFiniteLossError(
                f"the network gave NaN for {int(broken.sum())} of {len(broken)} texts (the first: "
                f"{int(broken.int().argmax())}): look at the model's weights."
            )
        return latents

    def _start(self, num_samples: int, length: int | None, prompt: Any) -> tuple[Tensor, Tensor]:
        """The values that are given, (B, L), any where none is, and where they are."""
        count = whole_number("num_samples", num_samples)
        prompts = [self._holes(one) for one in _prompts_of(prompt)]
        if length is None:
            holes = bool(prompts) and all(None in one for one in prompts)
            length = max(map(len, prompts)) if holes else self.cut.length
        most = positions_of(self.network)
        length = whole_number("length", length, 1, most)
        if (longest := max(map(len, prompts), default=0)) > length:
            raise ConfigurationError(
                f"a prompt has {longest} tokens, and length is {length}: give a length of at least so many"
                f"{'' if most is None else f', of the {most} that the network takes'}, or a shorter prompt."
            )
        rows = [[*one, *[None] * (length - len(one))] for one in prompts or [[]]]
        given = torch.tensor([[one is not None for one in row] for row in rows])
        levels = torch.tensor([[one or 0 for one in row] for row in rows])
        device = self._execution_device
        return levels.repeat_interleave(count, 0).to(device), given.repeat_interleave(count, 0).to(device)

    def _holes(self, prompt: TextPrompt) -> list[int | None]:
        """A prompt as values, ``None`` for a hole.

        Raises:
            ConfigurationError: It has a token that the model does not know.
        """
        tokenization = self.tokenization
        if isinstance(prompt, str):
            values: list[int] = tokenization.prompt(prompt)
            return [None if value == tokenization.num_values else value for value in values]
        ids = [
            None if one is None else whole_number("an id of a prompt", one, 0, tokenization.num_ids - 1)
            for one in prompt
        ]
        return [None if one in (None, tokenization.mask_id) else one - (one > tokenization.mask_id) for one in ids]

    def sample(
        self, batch_size: int, generator: Generator = None, num_inference_steps: int = 128, **arguments: Any
    ) -> Tensor:
        """Samples as ids of the tokenizer, (B, L): `TokenPipeline.__call__` with ids alone."""
        found = self(
            batch_size, generator=generator, num_inference_steps=num_inference_steps, return_dict=False, **arguments
        )
        assert isinstance(found, tuple)
        return found[1]

    # ---- likelihood -------------------------------------------------------------------------------------------------

    def objective(self, transitions: int | None = None) -> TokenObjective:
        """The bound of this pipeline as a module."""
        return TokenObjective(self.token_network(), self.process, transitions)

    @torch.no_grad()
    def log_likelihood(  # type: ignore[override]
        self,
        texts: str | Sequence[str],
        method: Method | None = None,
        replicates: int = 8,
        seed: int = 0,
        *,
        contexts: str | Sequence[str] | None = None,
        batch_size: int = 32,
    ) -> LikelihoodReport:
        """The log-likelihood of texts, in bits/token and bits/byte, with its errors.

        Each text is cut into windows by itself, as the pipeline's config says: see `vdm_hub.data.sequences.Windows`.

        Args:
            texts: One, or several.
            method: What it is measured by: `VariationalBound`, or another that is registered; or a method's name. By
                default the process's own: of masked diffusion ``masked_counts``.
            replicates: Independent estimates of each window, behind the standard error.
            seed: Of all draws.
            contexts: What stands before each text, given and in no term, so that the figure is of ``p(text|context)``:
                see `vdm_hub.data.sequences.encode_after`. One for all, or one each.
            batch_size: Windows at once, at most; it changes no figure.

        Returns:
            The report of all windows; under ``details["windows_of_texts"]`` how many each text has.

        Raises:
            DataError: A text is empty, or is no text, or there is another number of contexts.
            ConfigurationError: The method is unknown, or the model has no such likelihood.
        """
        batch_size, replicates = whole_number("batch_size", batch_size), whole_number("replicates", replicates)
        given = [texts] if isinstance(texts, str) else texts
        if not (isinstance(given, Sequence) and given and all(isinstance(one, str) and one for one in given)):
            raise DataError(f"texts are {shortened(texts)}: give a text that is not empty, or a list of such.")
        method, device = method_of(self.default_method if method is None else method), self._execution_device
        before = [contexts] * len(given) if isinstance(contexts, str) else contexts
        if before is not None and not (
            isinstance(before, Sequence) and len(before) == len(given) and all(isinstance(one, str) for one in before)
        ):
            raise DataError(f"contexts are {shortened(contexts)}: give a text, or one for each of {len(given)} texts.")
        whole, units, windows = encode_each(given, self.tokenization, self.cut, before)
        count = len(whole["levels"])
        whole["indices"] = torch.arange(count)

        def batches() -> Iterator[Mapping[str, Tensor]]:
            for part in torch.arange(count).split(batch_size):
                yield {name: value[part].to(device) for name, value in whole.items()} | {"indices": part}

        measurement = build_measurement(self.objective(method.transitions), count, method, seed)
        report = collect(measurement, batches, count, replicates, units)
        report.details["windows_of_texts"] = windows
        return report.with_notes([*self.notes(method.transitions), *units.notes])

    def classify(self, *arguments: Any, **named: Any) -> Any:
        """Nothing: a model of texts is told no class.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("a TokenPipeline is told nothing of a text, so that it classifies none.")


class _Tempered:
    """A network whose logits are divided by a temperature."""

    def __init__(self, network: TokenNetwork, temperature: float) -> None:
        self._network, self._call, self._temperature = network, Call.of(network), temperature

    def __call__(self, sample: Tensor, timestep: Tensor, **context: Tensor) -> Tensor:
        output = self._call(self._network, sample, timestep, **context)
        return output if self._temperature == 1 else output / self._temperature


def joined_texts(texts: Sequence[str]) -> str:
    """Texts for a reader, one after the other, each below a line of its number.

    >>> print(joined_texts(["To be", "or not"]), end="")
    ---- 1 ----
    To be
    ---- 2 ----
    or not
    """
    return "".join(f"---- {number} ----\n{text}\n" for number, text in enumerate(texts, 1))


def _prompts_of(prompt: Any) -> list[TextPrompt]:
    """The prompts of an argument that may be one, several, or none.

    Raises:
        ConfigurationError: It is neither; the message says which.
    """
    if prompt is None:
        return []
    if hasattr(prompt, "tolist"):  # a tensor, or an array
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        return [prompt]
    several = list(prompt) if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) else []
    found = [one.tolist() if hasattr(one, "tolist") else one for one in several]
    if _is_ids(found):
        return [found]
    wrong = [one for one in found if not (isinstance(one, str) or _is_ids(one))]
    if wrong or not found:
        which = f", of which {shortened(wrong[0])} is none" if wrong else ""
        raise ConfigurationError(
            f"prompt is {shortened(prompt)}{which}: give a text, or ids of the tokenizer with None for a hole, or a "
            f"list of such that is not empty; leave prompt out for texts of which nothing is given."
        )
    return found


def _is_ids(prompt: Any) -> bool:
    """Whether something is one prompt of ids, rather than several prompts."""
    is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes) and len(prompt) > 0
    return is_list and all(one is None or hasattr(one, "__index__") for one in prompt)


def _latents_of(given: Any, latents: Tensor, num_values: int) -> Tensor:
    """The latents that a callback gave back, or those that it was given.

    Raises:
        ConfigurationError: They are none of so many texts, or no values of tokens.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigurationError(
            f"callback_on_step_end gave {shortened(given)}: let it give None, or a dict with latents."
        )
    found = (given or {}).get("latents", latents)
    if found is latents:
        return latents
    is_alike = isinstance(found, Tensor) and found.shape == latents.shape
    if not is_alike or not bool(((found >= 0) & (found <= num_values) & (found == found.round())).all()):
        what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else shortened(found)
        raise ConfigurationError(
            f"the latents that callback_on_step_end gave are {what}: give whole numbers from 0 to {num_values}, "
            f"{num_values} for what is masked, of shape {tuple(latents.shape)}."
        )
    return found.to(latents)


def _check_generators(generator: Any, count: int) -> None:
    several = isinstance(generator, Sequence)
    if several and len(generator) != count:
        raise ConfigurationError(f"{len(generator)} generators for {count} texts: give one each, or just one.")
    if not all(one is None or isinstance(one, torch.Generator) for one in (generator if several else [generator])):
        raise ConfigurationError(
            f"generator is {shortened(generator)}: give a torch.Generator, or a list with one for each text."
        )


TokenPipeline.__module__ = "vdm_hub"
