"""`encode` and `decode`: data as a file by a model's likelihood, and back."""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vdm_hub import (
    ConfigurationError,
    DataError,
    LikelihoodPipeline,
    TokenPipeline,
    TokenWindows,
    model_fingerprint,
    whole_number,
)
from vdm_hub_codec.blocks import Block
from vdm_hub_codec.chains import check_process
from vdm_hub_codec.container import MOST_TRANSITIONS, Container
from vdm_hub_codec.documents import checked
from vdm_hub_codec.images import check_levels, classes_of, decode_images, encode_images
from vdm_hub_codec.report import CodecReport, Parts
from vdm_hub_codec.texts import decode_texts, encode_texts

TRANSITIONS = 100
"""T of a VDM where nobody says."""


@dataclass(frozen=True)
class Decoded:
    """What a file keeps.

    Attributes:
        levels: Of images, (N, C, H, W), int64; ``None`` of texts.
        labels: The number of each image's class, (N,), where the file keeps them.
        texts: The documents, in their order; ``None`` of images.
    """

    levels: Tensor | None = None
    labels: Tensor | None = None
    texts: list[str] | None = None


def encode(
    pipeline: LikelihoodPipeline,
    data: Tensor | np.ndarray | TokenWindows,
    labels: Tensor | np.ndarray | None = None,
    *,
    transitions: int | None = None,
    block: int | None = None,
    sites_at_once: int | None = None,
    batch_size: int = 64,
    name: str | os.PathLike[str] = "",
    progress: bool = False,
) -> tuple[bytes, CodecReport]:
    """Data as a file, losslessly, whose expected length is the bound of the model.

    By bits back (Townsend et al., arXiv 1901.04866; Kingma et al., arXiv 1905.06845): the bound with T transitions, or
    that of the hierarchical VAE. Of a masked model of tokens by arithmetic coding from left to right: the exact
    likelihood of that order.

    Args:
        pipeline: The model.
        data: Levels, (N, C, H, W), a tensor or an array; or windows of texts.
        labels: The class of each image, (N,), by number, of a model that is told classes: the file keeps them. Not
            given, such a model is told none, where it was trained with condition dropout.
        transitions: T of a VDM, at most 65,536; 100 where not given.
        block: Data that decode by themselves, so many together; all, where not given.
        sites_at_once: Of a masked model: sites coded by one evaluation; 1 where not given.
        batch_size: Data at once in the network, and coded together at most. Other batches may make another file, of
            the same content; any number decodes it.
        name: Of the model, for who reads the file: its folder or its Hub id.
        progress: Whether to show a bar.

    Returns:
        The file's bytes, and the report on its length.

    Raises:
        ConfigurationError: The model has no finite chain, or is told captions or classes that are not given, or a
            number is out of range.
        DataError: The data are not the model's, or its tokens do not say all of the texts.
    """
    started = time.perf_counter()
    _check_pipeline(pipeline)
    if not isinstance(name, str | os.PathLike):
        raise ConfigurationError(f"name is a {type(name).__name__}: give the model's folder or Hub id.")
    for what, value in (("transitions", transitions), ("block", block), ("sites_at_once", sites_at_once)):
        if value is not None:
            whole_number(what, value)
    whole_number("batch_size", batch_size)
    if (transitions or 1) > MOST_TRANSITIONS:
        raise ConfigurationError(f"transitions is {transitions}, and a file has {MOST_TRANSITIONS:,} at most.")
    given: Any = _tensor("data", data)
    labels = None if labels is None else _tensor("labels", labels)
    if sites_at_once is not None and getattr(pipeline.process, "mask_id", None) is None:
        raise ConfigurationError(
            f"sites_at_once is {sites_at_once}, and it is of masked models of texts, which this is not: leave it out."
        )
    container, parts = (
        _windows(pipeline, given, labels, transitions, block, sites_at_once, batch_size, progress)
        if not isinstance(given, Tensor)
        else _images(pipeline, given, labels, transitions, block, batch_size, progress)
    )
    whole = replace(container, model=str(name), fingerprint=fingerprint_of(pipeline)).to_bytes()
    return whole, parts.report(len(whole), time.perf_counter() - started)


def _tensor(what: str, given: object) -> Any:
    """Windows as they are, and whole numbers as a tensor.

    Raises:
        DataError: It is neither.
    """
    if isinstance(given, Tensor) and given.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return given.long()  # torch knows no more of these types than their names
    if (isinstance(given, Tensor) and given.ndim) or (isinstance(given, TokenWindows) and what == "data"):
        return given
    if isinstance(given, np.ndarray) and given.ndim and given.dtype.kind in "iuf":
        return torch.from_numpy(given if given.dtype.kind == "f" else given.astype(np.int64))
    kind = f"a {type(given).__name__}"
    if isinstance(given, np.ndarray | Tensor):
        kind = f"{given.dtype} of shape {tuple(given.shape)}"
    raise DataError(f"the {what} are {kind}: give whole numbers as a tensor or an array, or the windows of a text.")


def _images(
    pipeline: LikelihoodPipeline,
    levels: Tensor,
    labels: Tensor | None,
    transitions: int | None,
    block: int | None,
    batch_size: int,
    progress: bool,
) -> tuple[Container, Parts]:
    check_levels(pipeline, levels)
    check_process(pipeline.process)
    classes = classes_of(pipeline, labels, len(levels))
    steps = (transitions or TRANSITIONS) if pipeline.process is not None else transitions
    return encode_images(
        pipeline, levels, classes, transitions=steps, block=block, batch_size=batch_size, progress=progress
    )


def _windows(
    pipeline: LikelihoodPipeline,
    windows: TokenWindows,
    labels: Tensor | None,
    transitions: int | None,
    block: int | None,
    sites_at_once: int | None,
    batch_size: int,
    progress: bool,
) -> tuple[Container, Parts]:
    if not isinstance(pipeline, TokenPipeline):
        raise ConfigurationError("the data are windows of a text, and the model is one of images: give its images.")
    for what, given in (("block", block), ("labels", labels)):
        if given is not None:
            raise ConfigurationError(f"{what} is given, and texts are coded together, without labels: leave it out.")
    windows = checked(windows)
    pipeline.check_data(windows.levels, windows.num_levels)
    has_latents = pipeline.process.has_discrete_latents
    if transitions is not None and not has_latents:
        raise ConfigurationError(
            f"transitions is {transitions}, and a masked model is coded in an order, without latents: leave it out."
        )
    return encode_texts(
        pipeline,
        windows,
        transitions=(transitions or TRANSITIONS) if has_latents else None,
        sites_at_once=sites_at_once or 1,
        batch_size=batch_size,
        progress=progress,
    )


def decode(
    pipeline: LikelihoodPipeline,
    data: bytes | bytearray | memoryview,
    *,
    blocks: Iterable[int] | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Decoded:
    """What a file keeps: images, and their classes where it has them, or texts.

    Args:
        pipeline: The model that made it.
        data: The file's bytes.
        blocks: The numbers of the blocks of images that are wanted, from 0, in any order; all, where not given.
        batch_size: Data at once in the network; any.
        progress: Whether to show a bar.

    Raises:
        ConfigurationError: The file has no such block.
        DataError: The file is none, damaged, or of another model, or the network gives other numbers here.
    """
    _check_pipeline(pipeline)
    whole_number("batch_size", batch_size)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise DataError(f"the file is given as a {type(data).__name__}: give its bytes, as Path(...).read_bytes().")
    container = Container.from_bytes(bytes(data))
    check_model(pipeline, container)
    _check_kind(pipeline, container)
    if blocks is not None:
        container = replace(container, blocks=_chosen(container, blocks))
    try:
        if isinstance(pipeline, TokenPipeline):
            return Decoded(texts=decode_texts(pipeline, container, batch_size, progress))
        return Decoded(*decode_images(pipeline, container, batch_size, progress))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate" not in str(error):
            raise
        raise DataError(
            f"the file says that it keeps {sum(one.count for one in container.blocks):,} data, and the memory is not "
            f"enough for them: give a smaller batch_size, or more memory. Nothing is decoded."
        ) from error


def _check_pipeline(pipeline: object) -> None:
    if not isinstance(pipeline, LikelihoodPipeline):
        raise ConfigurationError(
            f"the pipeline is a {type(pipeline).__name__}: give the model itself, as vdm_hub.load_pipeline opens it."
        )


def _chosen(container: Container, wanted: Iterable[int]) -> list[Block]:
    """The blocks of these numbers.

    Raises:
        ConfigurationError: The file has no such block.
    """
    known = len(container.blocks) if container.coder["kind"] == "latents" else 0
    try:
        numbers = [-1 if isinstance(one, bool) else operator.index(one) for one in wanted]
    except TypeError:
        numbers = []
    if not numbers or any(not 0 <= one < known for one in numbers):
        has = f"are numbers from 0 to {known - 1}" if known else "of a text are decoded together: leave blocks out"
        raise ConfigurationError(f"blocks is {wanted!s:.100}, and those of this file {has}.")
    return [container.blocks[one] for one in numbers]


def _check_kind(pipeline: LikelihoodPipeline, container: Container) -> None:
    """Refuse a description that is right of another model than the one that it names.

    Raises:
        DataError: It is one.
    """
    how, expected = container.coder, "latents"
    if isinstance(pipeline, TokenPipeline):
        expected = "values" if pipeline.process.has_discrete_latents else "order"
    transitions = how.get("transitions")
    if how["kind"] == expected and (expected == "order" or (transitions is None) == (pipeline.process is None)):
        return
    raise DataError(
        f"the file is said to be of the kind {how['kind']!r} with T = {transitions}, which its model does not make: "
        f"it is damaged, or was not made by `vdm-hub compress`. Nothing is decoded."
    )


def check_model(pipeline: LikelihoodPipeline, container: Container) -> None:
    """Refuse another model than the one that made a file.

    Raises:
        DataError: It is.
    """
    if (given := fingerprint_of(pipeline)) != container.fingerprint:
        raise DataError(
            f"the file was made with {maker(container)}, and this one is another (fingerprint {given}): name that "
            f"model, with its revision. Nothing is decoded."
        )


def maker(container: Container) -> str:
    """The model that made a file, in words."""
    name = f"the model {container.model}" if container.model else "a model without a name"
    return f"{name} (fingerprint {container.fingerprint})"


def fingerprint_of(pipeline: LikelihoodPipeline) -> str:
    """Of all that makes the model: as many digits of `vdm_hub.model_fingerprint` as a file has room for."""
    return model_fingerprint(pipeline).removeprefix("sha256:")[:24]
