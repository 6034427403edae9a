"""`encode` and `decode`: data as a file by a model's likelihood, and back."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub import (
    ConfigurationError,
    DataError,
    LikelihoodPipeline,
    TokenPipeline,
    TokenWindows,
    VDMPipeline,
    weights_fingerprint,
    whole_number,
)
from vdm_hub_codec.blocks import Block, Coder, Lengths, OtherNumbersError, checksum
from vdm_hub_codec.chains import Chain
from vdm_hub_codec.container import Container
from vdm_hub_codec.orders import OrderCoder, windows_like
from vdm_hub_codec.pictures import is_shorter
from vdm_hub_codec.spacing import StepCosts
from vdm_hub_codec.stack import Stack

TRANSITIONS = 100
"""T of a VDM where nobody says."""


@dataclass(frozen=True)
class CodecReport:
    """How long a file is, and why. All lengths are in bits/dim (of texts bits/token) over all data.

    Attributes:
        bytes: Of the file.
        bits_per_dim: Of the file.
        bound: On the draws that were made: what the file's length should be.
        start: More than the bound, by the data that are there as they are, to start with.
        quantisation: More, by bins, rounding and the coder's precision.
        header: The description, and what is left over in the coder.
        overhead: Of all that, relative to the bound.
        count: Of data, or windows.
        dimensions: Of all of them.
        evaluations: Of the network, of all data.
        transitions: T, the latents' number less one; none where no bits come back.
        seconds: It took.
    """

    bytes: int
    bits_per_dim: float
    bound: float
    start: float
    quantisation: float
    header: float
    overhead: float
    count: int
    dimensions: int
    evaluations: int
    transitions: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.bytes:,} bytes for {self.count:,} data of {self.dimensions // self.count:,} dimensions: "
            f"{self.bits_per_dim:.4f} bits/dim\n"
            f"  bound on the same draws {self.bound:.4f}, overhead {self.overhead:.2%}: start {self.start:+.4f}, "
            f"quantisation {self.quantisation:+.4f}, header {self.header:+.4f}\n"
            f"  {self.evaluations:,} network evaluations in {self.seconds:.1f} s, "
            f"{self.seconds / self.count:.3f} s each"
        )


def encode(
    pipeline: LikelihoodPipeline,
    data: Tensor | TokenWindows,
    *,
    transitions: int | None = None,
    block: int | None = None,
    sites_at_once: int = 1,
    batch_size: int = 64,
    name: str = "",
    progress: bool = False,
) -> tuple[bytes, CodecReport]:
    """Data as a file, losslessly, whose expected length is the bound of the model.

    By bits back (Townsend et al., arXiv 1901.04866; Kingma et al., arXiv 1905.06845): the bound with T transitions, or
    that of the hierarchical VAE. Of a masked model of tokens by arithmetic coding from left to right: the exact
    likelihood of that order.

    Args:
        pipeline: The model.
        data: Levels, (N, C, H, W), or windows of a text.
        transitions: T of a VDM; 100 where not given.
        block: Data that decode by themselves, so many together; all, where not given.
        sites_at_once: Of a masked model: sites coded by one evaluation.
        batch_size: Data at once in the network; it changes no content.
        name: Of the model, for who reads the file.
        progress: Whether to show a bar.

    Returns:
        The file's bytes, and the report on its length.

    Raises:
        ConfigurationError: The model has no finite chain, or a number is out of range.
        DataError: The data are not the model's, the tokenizer does not give the text back, or there are several.
    """
    started = time.perf_counter()
    for what, value in (("transitions", transitions), ("block", block)):
        if value is not None:
            whole_number(what, value)
    whole_number("sites_at_once", sites_at_once), whole_number("batch_size", batch_size)
    if isinstance(data, TokenWindows):
        if not isinstance(pipeline, TokenPipeline):
            raise ConfigurationError(
                "the data are windows of a text, and the model is one of images: give its images."
            )
        if block is not None:
            raise ConfigurationError(f"block is {block}, and a text is coded whole: leave it out.")
        _check_text(data)
        if pipeline.process.has_discrete_latents:
            container, parts = _encode_values(pipeline, data, transitions or TRANSITIONS, batch_size, name, progress)
        elif transitions is not None:
            raise ConfigurationError(
                f"transitions is {transitions}, and a masked model is coded in an order, without latents: leave it "
                f"out."
            )
        else:
            container, parts = _encode_text(pipeline, data, sites_at_once, batch_size, name)
    else:
        container, parts = _encode_images(pipeline, data, transitions, block, batch_size, name, progress)
    whole = container.to_bytes()
    return whole, _report(whole, parts, time.perf_counter() - started)


def decode(pipeline: LikelihoodPipeline, data: bytes, *, batch_size: int = 64, progress: bool = False) -> Tensor | str:
    """The data of a file: levels, (N, C, H, W), or a text.

    Args:
        pipeline: The model that made it.
        data: The file's bytes.
        batch_size: Data at once in the network; any.
        progress: Whether to show a bar.

    Raises:
        DataError: The file is none, damaged, or of another model, or the network gives other numbers here.
    """
    whole_number("batch_size", batch_size)
    container = Container.from_bytes(data)
    check_model(pipeline, container)
    if container.coder["kind"] == "order":
        return _decode_text(pipeline, container, batch_size)
    if container.coder["kind"] == "values":
        return _decode_values(pipeline, container, batch_size, progress)
    chain = chain_of(pipeline, container)
    count = sum(one.count for one in container.blocks)
    with tqdm(total=count, desc="decoding", unit="datum", disable=not progress) as bar:
        coder = Coder(chain, batch_size, "pictures" in container.coder, bar.update)
        found = [coder.decode(one) for one in container.blocks]
    return torch.from_numpy(np.concatenate(found))


def chain_of(pipeline: LikelihoodPipeline, container: Container) -> Chain:
    """The chain by which a file was made."""
    how, spacing = container.coder, container.coder.get("spacing")
    chain = _usual(Chain.of(pipeline, how["transitions"], None if spacing is None else bytes.fromhex(spacing)))
    return chain if "widths" not in how else replace(chain, exponents=tuple(how["widths"]))


def check_model(pipeline: LikelihoodPipeline, container: Container) -> None:
    """Refuse another model than the one that made a file.

    Raises:
        DataError: It is.
    """
    if (given := fingerprint_of(pipeline)) != container.fingerprint:
        raise DataError(
            f"the file was made with the model {container.model or 'of another name'} (fingerprint "
            f"{container.fingerprint}), and this one is another (fingerprint {given}): name that model, with its "
            f"revision. Nothing is decoded."
        )


def fingerprint_of(pipeline: LikelihoodPipeline) -> str:
    """Of a model's weights and of all in its config that decides a likelihood."""
    described = json.dumps(pipeline.description(), sort_keys=True, default=str)
    digest = hashlib.sha256(f"{weights_fingerprint(pipeline)} {described}".encode())
    return digest.hexdigest()[:24]


# ---- images by bits back --------------------------------------------------------------------------------------------


def _encode_images(
    pipeline: LikelihoodPipeline,
    levels: Tensor,
    transitions: int | None,
    block: int | None,
    batch_size: int,
    name: str,
    progress: bool,
) -> tuple[Container, _Parts]:
    if isinstance(pipeline, TokenPipeline):
        raise ConfigurationError("the model is one of texts: give windows of a text.")
    pipeline.check_data(levels, pipeline.num_levels)
    has_process = pipeline.process is not None
    transitions = (transitions or TRANSITIONS) if has_process else transitions
    spacing = None if transitions is None else _spacing(pipeline, levels, transitions)
    chain, whole = Chain.of(pipeline, transitions, spacing), levels.cpu().numpy().astype(np.int64)
    size = block or len(whole)
    with tqdm(total=len(whole), desc="encoding", unit="datum", disable=not progress) as bar:
        pictures = is_shorter(whole[0], pipeline.num_levels)
        coder = Coder(chain.with_bins_for(whole), batch_size, pictures, bar.update)
        blocks = [coder.encode(whole[start : start + size]) for start in range(0, len(whole), size)]
    how: dict[str, Any] = {"kind": "latents", "transitions": transitions}
    if spacing is not None:
        how["spacing"] = spacing.hex()
    if pictures:
        how["pictures"] = True
    if coder.chain.exponents is not None and coder.chain.exponents != _usual(chain).exponents:
        how["widths"] = list(coder.chain.exponents)
    parts = _Parts(coder.lengths, len(whole), whole.size, blocks, transitions)
    return Container(name, fingerprint_of(pipeline), how, blocks), parts


def _spacing(pipeline: LikelihoodPipeline, levels: Tensor, transitions: int) -> bytes | None:
    """How the times of a VDM's latents are best spaced for some data; ``None`` where they are equally far apart."""
    costs = StepCosts.of(pipeline, levels) if type(pipeline) is VDMPipeline else None
    return None if costs is None else costs.spacing(transitions)


def _usual(chain: Chain) -> Chain:
    """The chain with the bins that a VDM has, whatever the data; a file says those of others."""
    return chain.with_bins_for(np.zeros((1, *chain.shapes[0]), dtype=np.int64))


# ---- texts ----------------------------------------------------------------------------------------------------------


def _check_text(windows: TokenWindows) -> None:
    """Refuse tokens that are not a whole text."""
    if not windows.facts.whole:
        raise DataError(
            f"the tokens do not say all of the text ({'; '.join(windows.facts.notes)}), so it could not come back: "
            f"give a text that the tokenizer knows, or a model of bytes."
        )
    if windows.facts.documents > 1:
        raise DataError(
            f"the text is of {windows.facts.documents:,} documents, and a file keeps one: name one text file, or a "
            f"slice of one document."
        )


def _encode_values(
    pipeline: TokenPipeline, windows: TokenWindows, transitions: int, batch_size: int, name: str, progress: bool
) -> tuple[Container, _Parts]:
    """A text by bits back through latents of values: whole windows, and what is left of the text as it is."""
    if windows.cut.context:
        warnings.warn(  # noqa: TID251 - it holds nothing but a number
            f"the windows are coded each by itself, so that the {windows.cut.context} tokens before each are not "
            f"given to the model here.",
            stacklevel=3,
        )
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
    blocks = [block, Block(len(rest), [], stack.words(), checksum(rest), [])]
    how = {"kind": "values", "transitions": transitions, "length": length}
    parts = _Parts(coder.lengths, whole // length, len(tokens), blocks, transitions)
    return Container(name, fingerprint_of(pipeline), how, blocks), parts


def _decode_values(pipeline: LikelihoodPipeline, container: Container, batch_size: int, progress: bool) -> str:
    assert isinstance(pipeline, TokenPipeline)
    how, (block, last) = container.coder, container.blocks
    chain = Chain.of_objective(pipeline.objective(how["transitions"]), (how["length"],))
    with tqdm(total=block.count, desc="decoding", unit="window", disable=not progress) as bar:
        windows = Coder(chain, batch_size, advance=bar.update).decode(block)
    rest = Stack(last.words).pop_levels(last.count, pipeline.num_levels)
    if checksum(rest) != last.check:
        raise OtherNumbersError
    return pipeline.tokenization.decode(torch.from_numpy(np.concatenate([windows.ravel(), rest])))


def _encode_text(
    pipeline: TokenPipeline, windows: TokenWindows, sites_at_once: int, batch_size: int, name: str
) -> tuple[Container, _Parts]:
    coder = _order_coder(pipeline, sites_at_once, batch_size)
    block = coder.encode(windows)
    cut = windows.cut
    how = {"kind": "order", "sites": sites_at_once, "length": cut.length, "context": cut.context}
    lengths = Lengths(chain=coder.ideal, pushed=coder.ideal, evaluations=coder.evaluations)
    parts = _Parts(lengths, len(windows), len(windows.tokens), [block], None)
    return Container(name, fingerprint_of(pipeline), how, [block]), parts


def _decode_text(pipeline: LikelihoodPipeline, container: Container, batch_size: int) -> str:
    assert isinstance(pipeline, TokenPipeline)
    how, block = container.coder, container.blocks[0]
    coder = _order_coder(pipeline, how["sites"], batch_size)
    tokens = coder.decode(block, windows_like(pipeline, block.count, how["length"], how["context"]))
    return pipeline.tokenization.decode(tokens)


def _order_coder(pipeline: TokenPipeline, sites_at_once: int, batch_size: int) -> OrderCoder:
    mask_id = getattr(pipeline.process, "mask_id", None)
    if mask_id is None:
        raise ConfigurationError(
            f"the process is {type(pipeline.process).__name__}, and texts are coded by models of masked diffusion, or "
            f"of values that say their probabilities: give one of 'absorbing' or 'uniform'."
        )
    objective = copy.deepcopy(pipeline.objective()).double().eval()
    return OrderCoder(objective, mask_id, sites_at_once, batch_size)


# ---- the report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """What a report is made of."""

    lengths: Lengths
    count: int
    dimensions: int
    blocks: Sequence[Block]
    transitions: int | None


def _report(whole: bytes, parts: _Parts, seconds: float) -> CodecReport:
    lengths, dimensions = parts.lengths, parts.dimensions
    bits = 8 * len(whole)
    coded = (parts.count - lengths.started) / parts.count
    # What the data that are there as they are would have cost, as the others do.
    bound = lengths.chain / coded if coded else lengths.as_they_are
    start = lengths.as_they_are - (bound - lengths.chain)
    quantisation = lengths.pushed - lengths.chain
    scale = 1 / dimensions
    return CodecReport(
        bytes=len(whole),
        bits_per_dim=bits * scale,
        bound=bound * scale,
        start=start * scale,
        quantisation=quantisation * scale,
        header=(bits - lengths.as_they_are - lengths.pushed) * scale,
        overhead=bits / bound - 1 if bound else math.nan,
        count=parts.count,
        dimensions=dimensions,
        evaluations=lengths.evaluations,
        transitions=parts.transitions,
        seconds=seconds,
    )
