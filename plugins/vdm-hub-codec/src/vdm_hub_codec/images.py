"""Images as a file, by bits back, and back; with their classes, where the network is told them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub import ConfigurationError, DataError, LikelihoodPipeline, TokenPipeline, VDMPipeline
from vdm_hub_codec.blocks import Coder
from vdm_hub_codec.chains import CLASS_LABELS, Chain
from vdm_hub_codec.container import Container
from vdm_hub_codec.pictures import is_shorter
from vdm_hub_codec.report import Parts
from vdm_hub_codec.spacing import StepCosts


@dataclass(frozen=True)
class Classes:
    """The classes that a network is told.

    Attributes:
        count: C, how many there are.
        labels: Of each image, (N,), where they are kept.
        untold: The class that is told where none is: number C.
    """

    count: int
    labels: Tensor | None

    @property
    def untold(self) -> int:
        """The class that the network is told of an image whose class is not known."""
        return self.count

    def told(self, count: int) -> Tensor:
        """What the network is told of so many images."""
        return torch.full((count,), self.untold) if self.labels is None else self.labels


def classes_of(pipeline: LikelihoodPipeline, labels: Tensor | None, count: int) -> Classes | None:
    """The classes of so many images, as the network is told them; ``None`` where it knows none.

    Raises:
        ConfigurationError: They are missing, or of no class of the model's, or it knows none, or captions.
    """
    check_told(pipeline, untold=labels is None)
    if (classes := pipeline.class_condition) is None:
        if labels is not None:
            raise ConfigurationError("labels are given, and the model is told no classes: leave them out.")
        return None
    if labels is None:
        return Classes(classes.count, None)
    found = classes.numbers(labels)
    if tuple(found.shape) != (count,):
        raise ConfigurationError(f"there are labels of shape {tuple(found.shape)} for {count} images: give one each.")
    return Classes(classes.count, found)


def check_told(pipeline: LikelihoodPipeline, *, untold: bool) -> None:
    """Refuse a model that must be told what a file does not keep.

    Args:
        pipeline: The model.
        untold: Whether a network that knows classes is told none.

    Raises:
        ConfigurationError: It is told captions, or knows no image without its class.
    """
    condition = pipeline.condition
    if condition is not None and condition.entry != CLASS_LABELS:
        raise ConfigurationError(
            f"the model is told the {condition.noun} of an image, and a file keeps none: give a model that is told "
            f"classes, or nothing."
        )
    if condition is not None and untold and not condition.dropout:
        raise ConfigurationError(
            f"the model is told the class of an image, one of {pipeline.num_classes}, and knows no image without one, "
            f"as it was trained without condition dropout: give the labels."
        )


def check_levels(pipeline: LikelihoodPipeline, levels: Tensor) -> None:
    """Refuse what are no levels of the model's.

    Raises:
        ConfigurationError: The model is one of texts.
        DataError: They are none, or not whole numbers, or not the model's.
    """
    if isinstance(pipeline, TokenPipeline):
        raise ConfigurationError("the model is one of texts: give windows of a text.")
    if not len(levels) or levels.is_floating_point() or levels.dtype == torch.bool or int(levels.min()) < 0:
        raise DataError(
            f"the images are {levels.dtype} of shape {tuple(levels.shape)}: give at least one, of levels, which are "
            f"whole numbers from 0 to {pipeline.num_levels - 1}."
        )
    pipeline.check_data(levels, pipeline.num_levels)


def encode_images(
    pipeline: LikelihoodPipeline,
    levels: Tensor,
    classes: Classes | None,
    *,
    transitions: int | None,
    block: int | None,
    batch_size: int,
    progress: bool,
) -> tuple[Container, Parts]:
    """The file, of no name, and what its report is made of.

    Args:
        pipeline: The model.
        levels: Of the images, (N, C, H, W).
        classes: What the network is told of them.
        transitions: T of what has transitions.
        block: How many images decode by themselves; all, where not given.
        batch_size: Images at once in the network.
        progress: Whether to show a bar.
    """
    costs = None if transitions is None else costs_of(pipeline, levels, classes)
    spacing = None if costs is None or transitions is None else costs.spacing(transitions)
    chain, whole = Chain.of(pipeline, transitions, spacing), levels.cpu().numpy().astype(np.int64)
    labels = None if classes is None or classes.labels is None else classes.labels.cpu().numpy()
    size, pictures = block or len(whole), is_shorter(whole[0], pipeline.num_levels)
    how: dict[str, Any] = {"kind": "latents", "transitions": transitions}
    how |= {} if spacing is None else {"spacing": spacing.hex()}
    how |= {"pictures": True} if pictures else {}
    how |= {} if labels is None else {"labels": True}
    with tqdm(total=len(whole), desc="encoding", unit="datum", disable=not progress) as bar:
        coder = coder_of(pipeline, chain.with_bins_for(whole), how, batch_size, bar.update)
        parts = [slice(start, start + size) for start in range(0, len(whole), size)]
        blocks = [coder.encode(whole[part], None if labels is None else labels[part]) for part in parts]
    if coder.chain.exponents is not None and coder.chain.exponents != _usual(chain).exponents:
        how["widths"] = list(coder.chain.exponents)
    coder.lengths.evaluations = chain.evaluations.count + (0 if costs is None else costs.evaluations)
    parts_of_report = Parts(
        "images", len(whole), whole.size, coder.lengths, transitions, _notes(pipeline, classes, transitions)
    )
    return Container("", "", how, blocks), parts_of_report


def _notes(pipeline: LikelihoodPipeline, classes: Classes | None, transitions: int | None) -> list[str]:
    notes = []
    if pipeline.clipped_objective(transitions) is not None:
        notes.append("the model's sampler clips its estimates, and the file is by the model without clipping")
    if classes is not None and classes.labels is None:
        notes.append("the network is told the class of no image, and the file keeps none")
    return notes


def costs_of(
    pipeline: LikelihoodPipeline, levels: Tensor, classes: Classes | None, draws: int = 1
) -> StepCosts | None:
    """What steps of a VDM cost of some data; ``None`` of a model without one gamma a time."""
    told = None if classes is None else classes.told(len(levels))
    return StepCosts.of(pipeline, levels, told, draws) if type(pipeline) is VDMPipeline else None


def decode_images(
    pipeline: LikelihoodPipeline, container: Container, batch_size: int, progress: bool
) -> tuple[Tensor, Tensor | None]:
    """The levels of a file, (N, C, H, W), and the classes, (N,), where it keeps them."""
    chain = chain_of(pipeline, container)
    count = sum(one.count for one in container.blocks)
    with tqdm(total=count, desc="decoding", unit="datum", disable=not progress) as bar:
        coder = coder_of(pipeline, chain, container.coder, batch_size, bar.update)
        found = [coder.decode(one) for one in container.blocks]
    labels = [label for one in container.blocks if (label := coder.opened(one)[1]) is not None]
    return torch.from_numpy(np.concatenate(found)), torch.from_numpy(np.concatenate(labels)) if labels else None


def coder_of(
    pipeline: LikelihoodPipeline,
    chain: Chain,
    how: dict[str, Any],
    batch_size: int,
    advance: Callable[[int], object] = lambda count: None,
) -> Coder:
    """What codes the blocks of a file that says how it is made."""
    count = pipeline.num_classes or 0
    return Coder(chain, batch_size, "pictures" in how, count if "labels" in how else None, count, advance)


def chain_of(pipeline: LikelihoodPipeline, container: Container) -> Chain:
    """The chain by which a file was made."""
    how, spacing = container.coder, container.coder.get("spacing")
    chain = _usual(Chain.of(pipeline, how["transitions"], None if spacing is None else bytes.fromhex(spacing)))
    return chain if "widths" not in how else replace(chain, exponents=tuple(how["widths"]))


def _usual(chain: Chain) -> Chain:
    """The chain with the bins that a VDM has, whatever the data; a file says those of others."""
    return chain.with_bins_for(np.zeros((1, *chain.shapes[0]), dtype=np.int64))
