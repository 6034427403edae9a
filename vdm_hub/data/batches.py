"""Batches whose content is a pure function of the seed and the step, whatever the number of processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from itertools import count, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from vdm_hub.data.examples import Examples
from vdm_hub.errors import DataError, in_one_line

T = TypeVar("T")
Batch = dict[str, Tensor]


@dataclass(eq=False)
class TrainingBatches(ABC):
    """Training batches of images, or of data of another kind; `training_batches` takes those that suit the data.

    Args:
        images: The training data.
        batch_size: Data of one process in a batch.
        seed: Fixes order, mirroring and crops.
        rank: The number of this process.
        world_size: The number of processes.
        random_flip: Mirror each image left to right with probability 1/2.
        accumulation: How many batches make one optimiser step.
        held_out: How many more images there would be, were none held out; for messages.

    Attributes:
        steps_per_epoch: Batches of an epoch; ``None`` for a stream, which does not know its length.
    """

    images: Any
    batch_size: int
    _: KW_ONLY
    seed: int
    rank: int = 0
    world_size: int = 1
    random_flip: bool = False
    accumulation: int = 1
    held_out: int = 0
    steps_per_epoch: int | None = field(default=None, init=False)

    @abstractmethod
    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, without end."""


@dataclass(eq=False)
class ShuffledBatches(TrainingBatches):
    """Training batches of data that are held in memory.

    Epoch e is a permutation of the images, drawn from (seed, e) alone. A global batch is the next ``world_size *
    batch_size`` images of it, and each process has its contiguous slice. Mirroring and crops are drawn with the
    permutation, one draw for each of its places; so N processes see, image for image, what one process with an
    N-fold batch sees. An epoch repeats no image, and leaves out only its last, incomplete global batch, which is that
    of all accumulation steps together.

    Raises:
        DataError: There are fewer images than in one global batch.

    >>> from vdm_hub import ImageLevels
    >>> images = ImageLevels(torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1), (1, 1, 1), 256)
    >>> batches = ShuffledBatches(images, batch_size=5, seed=0)
    >>> sorted(torch.cat([batches.batch(step)["levels"].flatten() for step in (0, 1)]).tolist())
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    steps_per_epoch: int = field(init=False)

    def __post_init__(self) -> None:
        whole = len(self.images) // (self.batch_size * self.world_size)
        # Fewer than one optimiser step needs are refused by whoever counts those.
        self.steps_per_epoch = whole - whole % self.accumulation if whole >= self.accumulation else whole
        if self.steps_per_epoch == 0:
            raise _too_few(self, len(self.images))
        self._epoch: tuple[int, Tensor, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of this process at a step, counted from 0.

        Returns:
            As `Examples.take` gives it: of images ``levels``, uint8 of shape (B, C, H, W), and ``class_labels`` or
            ``captions``, (B,), where they have some.
        """
        epoch, step_of_epoch = divmod(step, self.steps_per_epoch)
        order, draws = self._plan(epoch)
        start = (step_of_epoch * self.world_size + self.rank) * self.batch_size
        places = slice(start, start + self.batch_size)
        batch: Batch = self.images.take(order[places], draws[places, 1:])
        return self.images.mirrored(batch, draws[places, 0]) if self.random_flip else batch

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, without end; nothing before it is read."""
        return (self.batch(step) for step in count(start_step))

    def _plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The epoch's order, (N,), and three draws from U[0, 1) for each of its places, (N, 3)."""
        if self._epoch is None or self._epoch[0] != epoch:
            generator, size = _generator(self.seed, epoch), len(self.images)
            order = torch.randperm(size, generator=generator)
            self._epoch = (epoch, order, torch.rand(size, 3, generator=generator))
        return self._epoch[1:]


class StreamedBatches(TrainingBatches):
    """Training batches of a stream, through a shuffle buffer.

    The order depends on the seed and the epoch alone: every process reads all of the stream, and decodes its own slice
    of each global batch, as `ShuffledBatches` divides it. An epoch leaves out only its last, incomplete global batch.
    To start at a step, the images before it are read again, though not decoded, so that the shuffle buffer is what it
    was.
    """

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches from a step on, without end; one is read ahead where the images have ``num_workers``.

        Raises:
            DataError: The stream has fewer images than one global batch.
        """
        batches = (self._decode(step, rows) for step, rows in islice(enumerate(self._rows()), start_step, None))
        return _read_ahead(batches) if self.images.num_workers else batches

    def _rows(self) -> Iterator[list[dict[str, Any]]]:
        """The rows of this process's batches, epoch after epoch."""
        dataset = self.images.dataset.shuffle(seed=self.seed, buffer_size=self.images.shuffle_buffer_size)
        together = self.batch_size * self.world_size
        for epoch in count():
            dataset.set_epoch(epoch)
            rows, complete = iter(dataset), 0
            while len(whole := _next(rows, together * self.accumulation)) == together * self.accumulation:
                for start in range(self.rank * self.batch_size, len(whole), together):
                    yield whole[start : start + self.batch_size]
                complete += 1
            if complete == 0:
                raise _too_few(self, len(whole), self.accumulation)

    def _decode(self, step: int, rows: list[dict[str, Any]]) -> Batch:
        place = step * self.world_size + self.rank  # in the order of the images, whatever the number of processes
        draws = torch.rand(self.batch_size, 3, generator=_generator(self.seed, place))
        batch: Batch = self.images.take(rows, draws[:, 1:])
        return self.images.mirrored(batch, draws[:, 0]) if self.random_flip else batch


def training_batches(images: Examples, batch_size: int, **arguments: Any) -> TrainingBatches:
    """`ShuffledBatches` or `StreamedBatches`, as the data are; the keyword arguments are theirs."""
    kind = StreamedBatches if images.is_stream else ShuffledBatches
    return kind(images, batch_size, **arguments)


def evaluation_batches(images: Any, batch_size: int, *, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """All images once, in order, the last incomplete batch included; image i goes to process ``i mod world_size``.

    Args:
        images: The data of a split, of any kind.
        batch_size: How many in a batch, at most.
        rank: The number of this process.
        world_size: The number of processes.

    Returns:
        Batches as `Examples.take` gives them, and ``indices``, int64 of shape (B,): each image's number in the split.
        Processes may have different numbers of batches.

    >>> from vdm_hub import ImageLevels
    >>> images = ImageLevels(torch.zeros(5, 1, 2, 2, dtype=torch.uint8), (1, 2, 2), 256)
    >>> [batch["indices"].tolist() for batch in evaluation_batches(images, 2)]
    [[0, 1], [2, 3], [4]]
    """
    if not images.is_stream:
        for indices in torch.arange(rank, len(images), world_size).split(batch_size):
            if len(indices):
                yield images.take(indices) | {"indices": indices}
        return
    numbered = islice(enumerate(images.dataset), rank, None, world_size)
    while batch := _next(numbered, batch_size):
        indices, rows = zip(*batch, strict=True)
        yield images.take(rows, indices=indices) | {"indices": torch.tensor(indices)}


def _next(rows: Iterator[T], number: int) -> list[T]:
    """The next ``number`` rows of a stream, or fewer at its end."""
    try:
        return list(islice(rows, number))
    except Exception as error:  # of a file, of the network, or of any library below `datasets`
        raise DataError(
            f"the stream broke off ({in_one_line(error)}): a file of the dataset is gone, or damaged, or out of "
            f"reach. Put it back as it was, and go on with --resume_from_checkpoint latest."
        ) from error


def _too_few(batches: TrainingBatches, count: int, accumulation: int = 1) -> DataError:
    """The error for images that can't fill one batch, with the fields that would help, and by how much."""
    batch_size, world_size, held_out = batches.batch_size, batches.world_size, batches.held_out
    data = batches.images.kind.data
    needed = batch_size * world_size * accumulation
    steps = f", {accumulation} times a step" if accumulation > 1 else ""
    remedies = []
    if held_out and count + held_out >= needed:
        remedies.append(
            f"hold out at most {count + held_out - needed} {data} (validation_size and the test {data}, together)"
        )
    if most := count // (world_size * accumulation):
        remedies.append(f"set train_batch_size to at most {most}")
    taken = f", for {held_out} of the {count + held_out} {data} are held out," if held_out else ""
    return DataError(
        f"{count} training {data}{taken} do not fill one batch of {batch_size} on each of {world_size} process(es)"
        f"{steps}: {', or '.join(remedies) or f'give more {data}'}."
    )


def _generator(*seeds: int) -> torch.Generator:
    """A generator whose stream depends on all the seeds, and differs for each tuple of them."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def _read_ahead(iterator: Iterator[T]) -> Iterator[T]:
    """The same items, the next one made on a thread while the last one is used. For endless iterators."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, iterator)
        while True:
            item = coming.result()
            coming = pool.submit(next, iterator)
            yield item
