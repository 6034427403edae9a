"""Masked models without bits back: sites are coded in a fixed order, each under what the model says of it.

From left to right, one site an evaluation, the length is the likelihood of the sampler that opens them so,
``vdm_hub_tokens.ExactOrder``. Of several at once, which say nothing of each other, each goes through its own part of
the window from left to right, so that they are far apart. Windows whose given tokens are known are coded together; one
that is given a part of the window before it waits for that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import constriction
import numpy as np
import torch
from torch import Tensor

from vdm_hub import TokenPipeline, TokenWindows, VDMObjective
from vdm_hub_codec.blocks import Block, checksum, decoding
from vdm_hub_codec.decisions import Decisions, Floats, Integers
from vdm_hub_codec.distributions import Choices, ChoiceSymbols
from vdm_hub_codec.documents import lengths_of

Code = Callable[[Choices, ChoiceSymbols, Integers, Integers], Integers]
"""What is done with the values of some sites, (n,), of the windows of these numbers, (n,): encoded, or found."""


@dataclass
class OrderCoder:
    """Codes windows of tokens by a masked model.

    Attributes:
        objective: The model, in float64.
        mask_id: What stands for a masked site.
        sites_at_once: Sites that are coded by one evaluation.
        batch_size: Windows at once in the network.
        ideal: Bits of each window that was encoded, (windows,).
        values: How many tokens of each were, (windows,).
    """

    objective: VDMObjective
    mask_id: int
    sites_at_once: int
    batch_size: int
    evaluations: int = 0
    ideal: Floats = field(default_factory=lambda: np.zeros(0))
    values: Integers = field(default_factory=lambda: np.zeros(0, np.int64))

    def encode(self, windows: TokenWindows) -> Block:
        """All windows of a text."""
        encoder, decisions = constriction.stream.queue.RangeEncoder(), Decisions()
        self.ideal, self.values = np.zeros(len(windows)), np.zeros(len(windows), np.int64)

        def code(choices: Choices, symbols: ChoiceSymbols, values: Integers, numbers: Integers) -> Integers:
            encoder.encode(values.astype(np.int32), *symbols.model)
            np.subtract.at(self.ideal, numbers, choices.log2(values[:, None]))
            np.add.at(self.values, numbers, 1)
            return values

        tokens = windows.tokens.long()
        self._go_through(windows, tokens, code, decisions)
        levels = tokens.numpy()
        return Block(len(levels), [], encoder.get_compressed(), checksum(levels, lengths_of(windows)), decisions.notes)

    def decode(self, block: Block, empty: TokenWindows) -> Tensor:
        """The tokens of all texts, (N,), whose checksum is not looked at.

        Args:
            block: The texts.
            empty: As many tokens, of any value, cut into windows as the texts were.

        Raises:
            DataError: They can't be what was encoded.
        """
        decoder = constriction.stream.queue.RangeDecoder(block.words)
        tokens = torch.zeros_like(empty.tokens, dtype=torch.int64)

        def code(choices: Choices, symbols: ChoiceSymbols, values: Integers, numbers: Integers) -> Integers:
            found: Integers = decoder.decode(*symbols.model).astype(np.int64)
            return found

        with decoding():
            self._go_through(empty, tokens, code, Decisions.of(block.notes))
        return tokens

    def _go_through(self, windows: TokenWindows, tokens: Tensor, code: Code, by: Decisions) -> None:
        """Code all windows, whose tokens are put in their places as they become known."""
        starts, given = windows.places
        place = 0
        while place < len(starts):
            wave = 1
            while place + wave < len(starts) and int(given[place + wave]) == 0:
                wave += 1
            numbers = torch.arange(place, place + wave)
            self._wave(windows, tokens, numbers, code, by)
            place += wave

    def _wave(
        self,
        windows: TokenWindows,
        tokens: Tensor,
        numbers: Tensor,
        code: Code,
        by: Decisions,
    ) -> None:
        """Code windows together, whose given tokens are known."""
        length, starts = windows.cut.length, windows.places[0][numbers]
        batch = windows.take(numbers)
        known = batch.get("given", torch.zeros_like(batch["levels"], dtype=torch.bool)).clone()
        sites = (starts[:, None] + torch.arange(length)).clamp(max=len(tokens) - 1)
        to_open, (order, place) = (~known).sum(1), _order(length, self.sites_at_once)
        while bool((~known).any()):
            masked = ~known
            next_ones = masked & (masked[:, order].cumsum(1) <= self.sites_at_once)[:, place]
            rows = next_ones.any(1).nonzero().flatten()
            z = torch.where(masked, self.mask_id, tokens[sites])[rows]
            told = {name: value[rows] for name, value in batch.items() if name not in ("levels", "given")}
            probabilities = self._probabilities(z, masked[rows].sum(1) / to_open[rows], told, next_ones[rows])
            row, column = next_ones.nonzero().unbind(1)
            images = numbers[row].numpy()
            choices = Choices(probabilities[:, None])
            symbols = choices.decided(0, False, images * length + column.numpy(), by)
            where = sites[row, column]
            tokens[where] = torch.from_numpy(code(choices, symbols, tokens[where].numpy(), images))
            known |= next_ones

    def _probabilities(self, z: Tensor, lost: Tensor, told: dict[str, Tensor], chosen: Tensor) -> np.ndarray:
        """Of the values of the chosen sites, (n, K)."""
        found = []
        for part in torch.arange(len(z)).split(self.batch_size):
            batch = {"levels": z[part], **{name: value[part] for name, value in told.items()}}
            timestep = lost[part].double() * (self.objective.process.num_train_timesteps - 1)
            with torch.no_grad():
                logits = self.objective.network_on(batch)(z[part], timestep)
            self.evaluations += len(part)
            found.append(torch.softmax(logits[chosen[part]].double(), -1))
        return torch.cat(found).cpu().numpy()


def _order(length: int, at_once: int) -> tuple[Tensor, Tensor]:
    """The sites in the order in which they open, and the place of each site in it.

    >>> _order(6, 2)[0].tolist(), _order(3, 1)[0].tolist()
    ([0, 3, 1, 4, 2, 5], [0, 1, 2])
    """
    part = -(-length // at_once)
    sites = torch.arange(length)
    order = torch.argsort(sites % part * at_once + sites // part)
    return order, torch.argsort(order)


def windows_like(pipeline: TokenPipeline, count: int, length: int, context: int) -> TokenWindows:
    """So many unknown tokens, cut into windows."""
    zeros = torch.zeros(count, dtype=torch.int32)
    return TokenWindows(zeros, zeros, pipeline.tokenization, replace(pipeline.cut, length=length, context=context))
