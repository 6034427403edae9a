"""The state of a run that a checkpoint holds, and the optimiser steps that change it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vdm_hub.data.batches import training_batches
from vdm_hub.data.conditions import Condition
from vdm_hub.data.loading import RunData
from vdm_hub.diffusion.times import stratified_times
from vdm_hub.errors import ConfigurationError, explained
from vdm_hub.objectives.variational_bound import Bound
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.parts.early_stopping import EarlyStopping
from vdm_hub.training.parts.initial_models import InitialModel
from vdm_hub.training.parts.optimizers import build_optimizer
from vdm_hub.training.parts.processes import is_sharded, to_device
from vdm_hub.training.parts.setup import build_objective, count_steps, learning_rate, repeated_blocks
from vdm_hub.training.parts.shards import average_gradients, full_tensor, plan_shards
from vdm_hub.training.parts.weights import build_ema, step_ema
from vdm_hub.training.state.history import History
from vdm_hub.training.state.losses import GRADIENT_NORM, LossWatch
from vdm_hub.training.state.outputs import OutputFolder
from vdm_hub.training.state.provenance import Provenance

_HIDDEN = 105  # the stream of draws that says which images are trained on without their condition
_IMAGES_TO_PREPARE = 1024  # training images, from which a model may take how its latents are distributed


class RunState:
    """The state on which the next step of a run depends, and the steps."""

    def __init__(
        self,
        configuration: Configuration,
        accelerator: Accelerator,
        data: RunData,
        folder: OutputFolder,
        condition: Condition | None = None,
        initial: InitialModel | None = None,
    ) -> None:
        training = self.training = configuration.training
        self.configuration, self.accelerator, self.data, self.folder = configuration, accelerator, data, folder
        self.initial, self.step = initial, 0
        self.source = training_batches(
            data.train,
            training.train_batch_size,
            seed=training.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            random_flip=configuration.data.random_flip,
            accumulation=training.gradient_accumulation_steps,
            held_out=data.held_out,
        )
        self.total_steps = count_steps(training, self.source.steps_per_epoch)
        accumulation, processes = training.gradient_accumulation_steps, accelerator.num_processes
        self.global_batch_size = training.train_batch_size * accumulation * processes
        self.model = build_objective(configuration, data.shape, condition, data.tokenization, initial)
        self.model.to(accelerator.device)
        self.preparation = self.model.prepare(self._first_images())
        optimizer = build_optimizer(self.model, training, learning_rate(training, processes))
        self._replicated: list[torch.nn.Parameter] = []
        if is_sharded(accelerator):
            self._replicated = plan_shards(accelerator, self.model, repeated_blocks(self.model))
        with explained("accelerate can't prepare the run", "look at its ACCELERATE_ variables", ConfigurationError):
            self.objective, self.optimizer = accelerator.prepare(self.model, optimizer)
        # accelerate's wrapper looks for a package on the disk in each step, and does more only with fp16.
        wrapped = accelerator.scaler is None and isinstance(self.optimizer, AcceleratedOptimizer)
        self._stepping = self.optimizer.optimizer if wrapped else self.optimizer
        self.ema = build_ema(training, self.model, accelerator.device)
        self._parameters = list(self.model.parameters())  # listed once: walking the modules takes 1 % of a small step
        self.lr_scheduler = get_scheduler(
            training.lr_scheduler,
            optimizer,
            num_warmup_steps=training.lr_warmup_steps,
            num_training_steps=self.total_steps,
        )
        self.history, self.seconds = History(), 0.0  # of all parts of a run that was resumed
        self.losses = LossWatch(training, folder.checkpoints, looks_at_once=accelerator.device.type == "cpu")
        self.early_stopping = EarlyStopping(training.early_stopping_patience, training.early_stopping_threshold)
        origin = None if initial is None else initial.record
        self.provenance = Provenance(configuration, accelerator, self.model, data, origin)

    def _first_images(self) -> Iterator[dict[str, Tensor]]:
        """The first images, as many for any number of processes, so that all find the same scale of latents."""
        size = self.training.train_batch_size
        first = training_batches(self.data.train, size, seed=self.training.seed).batches()
        return (to_device(batch, self.accelerator.device) for batch in islice(first, -(-_IMAGES_TO_PREPARE // size)))

    def is_last(self) -> bool:
        """Whether the last step has been taken, or held-out bits/dim have stopped falling."""
        return self.step >= self.total_steps or self.early_stopping.is_over

    def batches(self) -> Iterator[list[dict[str, Tensor]]]:
        """The micro-batches of each optimiser step that is still to be taken."""
        accumulation = self.training.gradient_accumulation_steps
        source = self.source.batches(start_step=self.step * accumulation)
        while not self.is_last():
            yield [next(source) for _ in range(accumulation)]

    def optimise(self, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Take one optimiser step; every draw is a function of the seed, the step and the place in the global batch.

        Returns:
            The bound's terms in bits per dimension, their means over this process's images.
        """
        if not (self.model.training and self.model.body.training):
            self.objective.train()
        parts: list[dict[str, Tensor]] = []
        for part, batch in enumerate(batches):
            batch = to_device(self._condition(batch, part), self.accelerator.device)
            with self.accelerator.accumulate(self.objective):
                with self.accelerator.autocast():  # FSDP2 does not bring its own
                    bound: Bound = self.objective(batch, self._times(part), self._noise(batch, part))
                self.accelerator.backward(bound.loss)
                parts.append({name: value.detach().mean() for name, value in bound.bits_per_dim().items()})
                if self.accelerator.sync_gradients:
                    terms = {name: torch.stack([one[name] for one in parts]).mean() for name in parts[0]}
                    self._watch(terms, self._clip())
                    self._stepping.step()
                    self._stepping.zero_grad()
        self.lr_scheduler.step()
        if self.ema is not None:
            step_ema(self.ema, self._parameters, offload=self.training.offload_ema)
        self.step += 1
        return terms

    def _clip(self) -> Tensor:
        """Clip the gradient; returns its norm before that."""
        average_gradients(self.accelerator, self._replicated)
        limit = math.inf if self.training.max_grad_norm is None else self.training.max_grad_norm
        if self.accelerator.device.type != "cpu" or is_sharded(self.accelerator):
            norm: Tensor = self.accelerator.clip_grad_norm_(self._parameters, limit)
            return norm
        # Nothing waits for a number on a CPU, so a gradient that is short enough is left as it is.
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None], foreach=True)
        if not norm < limit - 1e-6:
            clip_grads_with_norm_(self._parameters, limit, norm, foreach=True)
        return norm

    def _place(self, part: int) -> int:
        """The number of this process's micro-batch among those of the global batch.

        N processes and one process with N accumulation steps share it, and so all of their draws.
        """
        return part * self.accelerator.num_processes + self.accelerator.process_index

    def _times(self, part: int) -> Tensor:
        """This process's share of the times, stratified over the global batch, all accumulation steps included."""
        size, parts = self.training.train_batch_size, self.training.gradient_accumulation_steps
        offset = np.random.default_rng([self.training.seed, self.step]).random()
        total = size * parts * self.accelerator.num_processes
        return stratified_times(size, offset, self._place(part) * size, total, self.accelerator.device)

    def _condition(self, batch: dict[str, Tensor], part: int) -> dict[str, Tensor]:
        """The batch with what the network is told of each datum, and that of some hidden from it."""
        condition = self.model.condition
        if condition is None:
            return batch
        return condition.told(self._hidden(condition, batch, part) if condition.dropout > 0 else batch)

    def _hidden(self, condition: Condition, batch: dict[str, Tensor], part: int) -> dict[str, Tensor]:
        """The batch with the condition of some of its data hidden.

        Which ones is a draw of their places in the global batch, the same for any number of processes that share it.
        """
        size, start = self.training.train_batch_size, self._place(part) * self.training.train_batch_size
        draws = np.random.default_rng([self.training.seed, self.step, _HIDDEN]).random(start + size)[start:]
        return condition.hide(batch, torch.from_numpy(draws < condition.dropout))

    def _noise(self, batch: dict[str, Tensor], part: int) -> dict[str, Tensor]:
        """The noise of this micro-batch; dropout draws from the global generator, which is seeded alike."""
        key = [self.training.seed, self.step, self._place(part)]
        noise_seed, dropout_seed = np.random.SeedSequence(key).generate_state(2, np.uint64) >> np.uint64(1)
        device = self.accelerator.device
        # `torch.manual_seed` also seeds devices that are not there, which takes 1 % of a small step.
        torch.default_generator.manual_seed(int(dropout_seed))
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(int(dropout_seed))
        generator = torch.Generator(device).manual_seed(int(noise_seed))
        return self.model.draw_noise(batch, generator)

    def _watch(self, terms: dict[str, Tensor], gradient_norm: Tensor) -> None:
        """Stop the run before the weights follow a loss or a gradient that is not finite.

        The gradient is the mean over all processes, so they all stop at the same step.
        """
        if self.accelerator.scaler is None:  # with fp16 it may overflow: the scaler then skips the step
            terms = terms | {GRADIENT_NORM: full_tensor(gradient_norm.detach())}
        self.losses.add(self.step + 1, terms)
