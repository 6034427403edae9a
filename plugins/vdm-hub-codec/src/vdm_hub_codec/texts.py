"""Texts as a file, by bits back or in an order, and back."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub import ConfigurationError, DataError, TokenPipeline, TokenWindows
from vdm_hub_codec.blocks import Block, Coder, Lengths, OtherNumbersError, checksum, decoding
from vdm_hub_codec.chains import Chain
from vdm_hub_codec.container import Container
from vdm_hub_codec.documents import apart, are_several, description_of, lengths_of
from vdm_hub_codec.orders import OrderCoder, windows_like
from vdm_hub_codec.report import Parts
from vdm_hub_codec.stack import Stack


def encode_texts(
    pipeline: TokenPipeline,
    windows: TokenWindows,
    *,
    transitions: int | None,
    sites_at_once: int,
    batch_size: int,
    progress: bool,
) -> tuple[Container, Parts]:
    """The file, of no name, and what its report is made of.

    Args:
        pipeline: The model.
        windows: Of whole texts, as `vdm_hub_codec.documents.checked` gives them.
        transitions: T, where bits come back; of a masked model none.
        sites_at_once: Of a masked model: sites coded by one evaluation.
        batch_size: Windows at once in the network.
        progress: Whether to show a bar.
    """
    if transitions is None:
        container, parts = _encode_order(pipeline, windows, sites_at_once, batch_size)
    else:
        container, parts = _encode_values(pipeline, windows, transitions, batch_size, progress)
    container.coder.update(description_of(windows))
    return container, parts


def decode_texts(pipeline: TokenPipeline, container: Container, batch_size: int, progress: bool) -> list[str]:
    """The texts of a file.

    Raises:
        DataError: They are not what was encoded: the last block's checksum is of the documents' lengths, too.
    """
    how, tokenization = container.coder, pipeline.tokenization
    if how["kind"] == "order":
        tokens = _decode_order(pipeline, container, batch_size)
    else:
        tokens = _decode_values(pipeline, container, batch_size, progress)
    with decoding():
        documents = apart(tokens, how, tokenization.end)
    lengths = np.array([len(one) for one in documents]) if are_several(how) else None
    checked = tokens if how["kind"] == "order" else tokens[len(tokens) - container.blocks[-1].count :]
    if checksum(checked.numpy(), lengths) != container.blocks[-1].check:
        raise OtherNumbersError
    return [tokenization.decode(one) for one in documents]


def _encode_values(
    pipeline: TokenPipeline, windows: TokenWindows, transitions: int, batch_size: int, progress: bool
) -> tuple[Container, Parts]:
    """Texts by bits back through latents of values: whole windows, and what is left of the tokens as they are."""
    tokens, length = windows.tokens.numpy().astype(np.int64), windows.cut.length
    whole = len(tokens) // length * length
    if not whole:
        raise DataError(
            f"the text has {len(tokens)} tokens, and a window {length}: give a longer text, as what is left over of "
            f"whole windows is kept as it is."
        )
    chain = Chain.of_objective(pipeline.objective(transitions), (length,))
    with tqdm(total=whole // length, desc="encoding", unit="window", disable=not progress) as bar:
        coder = Coder(chain, batch_size, advance=bar.update)
        block, rest, stack = coder.encode(tokens[:whole].reshape(-1, length)), tokens[whole:], Stack()
    stack.push_levels(rest, pipeline.num_levels)
    coder.lengths.as_they_are += len(rest) * math.log2(pipeline.num_levels)
    coder.lengths.started += len(rest) > 0
    blocks = [block, Block(len(rest), [], stack.words(), checksum(rest, lengths_of(windows)), [])]
    how = {"kind": "values", "transitions": transitions, "length": length}
    coder.lengths.evaluations = chain.evaluations.count
    notes = [
        f"the windows are coded each by itself, so that the {windows.cut.context} tokens before each are not given to "
        f"the model here"
    ]
    told = notes if windows.cut.context else []
    return Container("", "", how, blocks), Parts(
        "windows", whole // length + (len(rest) > 0), len(tokens), coder.lengths, transitions, told
    )


def _decode_values(pipeline: TokenPipeline, container: Container, batch_size: int, progress: bool) -> Tensor:
    how, (block, last) = container.coder, container.blocks
    chain = Chain.of_objective(pipeline.objective(how["transitions"]), (how["length"],))
    with tqdm(total=block.count, desc="decoding", unit="window", disable=not progress) as bar:
        windows = Coder(chain, batch_size, advance=bar.update).decode(block)
    with decoding():
        rest = Stack(last.words).pop_levels(last.count, pipeline.num_levels)
    return torch.from_numpy(np.concatenate([windows.ravel(), rest]))


def _encode_order(
    pipeline: TokenPipeline, windows: TokenWindows, sites_at_once: int, batch_size: int
) -> tuple[Container, Parts]:
    coder = _order_coder(pipeline, sites_at_once, batch_size)
    block, cut = coder.encode(windows), windows.cut
    how: dict[str, Any] = {"kind": "order", "sites": sites_at_once, "length": cut.length, "context": cut.context}
    lengths = Lengths(
        each=coder.ideal.tolist(),
        values=coder.values.tolist(),
        pushed=float(coder.ideal.sum()),
        evaluations=coder.evaluations,
    )
    return Container("", "", how, [block]), Parts("windows", len(windows), len(windows.tokens), lengths)


def _decode_order(pipeline: TokenPipeline, container: Container, batch_size: int) -> Tensor:
    how, block = container.coder, container.blocks[0]
    coder = _order_coder(pipeline, how["sites"], batch_size)
    return coder.decode(block, windows_like(pipeline, block.count, how["length"], how["context"]))


def _order_coder(pipeline: TokenPipeline, sites_at_once: int, batch_size: int) -> OrderCoder:
    mask_id = getattr(pipeline.process, "mask_id", None)
    if mask_id is None:
        raise ConfigurationError(
            f"the process is {type(pipeline.process).__name__}, and texts are coded by models of masked diffusion, or "
            f"of values that say their probabilities: give one of 'absorbing' or 'uniform'."
        )
    objective = copy.deepcopy(pipeline.objective()).double().eval()
    return OrderCoder(objective, mask_id, sites_at_once, batch_size)
