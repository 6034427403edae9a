"""Checks of weights before they are read: the headers of safetensors files against the network of the config.

The network is built on the meta device, where it takes no memory, in no more steps than so many tensors need. So
neither a config nor a file can make a loader take more memory or time than the weights that are there are worth.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.overrides import TorchFunctionMode

from vdm_hub.errors import CheckpointError, MissingFileError, explained, warn
from vdm_hub.hub.json_files import MAX_JSON_BYTES, parse_json, read_json

WEIGHTS = "diffusion_pytorch_model"
_SHOWN = 3
# torch's functions that building a network calls for each of its tensors, and for the whole: generous bounds.
_CALLS_PER_TENSOR, _CALLS = 60, 2000
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_SAVED_AS = {torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


@dataclass(frozen=True)
class Saved:
    """A tensor as a file's header has it: its shape, and safetensors' name of its type."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class WeightFiles:
    """The files of one component's weights.

    Attributes:
        files: Names within the component's folder: one file, or the shards of ``index``.
        index: The list of shards, where there is one.
    """

    files: tuple[str, ...]
    index: str | None = None


def weight_files(
    names: Iterable[str],
    variant: str | None,
    place: str,
    read: Callable[[str], Mapping[str, Any]],
    stem: str = WEIGHTS,
) -> WeightFiles:
    """The files that a loader takes the weights from: those of the variant where there are any.

    Args:
        names: All that the component's folder holds.
        variant: Such as ``fp16``.
        place: The component, for messages.
        read: Gives the content of a JSON file.
        stem: How their names begin: as those of diffusers, or as those of transformers.

    Raises:
        CheckpointError: There are none, two sets of them, or the list of shards is damaged.
    """
    names = set(names)
    for suffix in dict.fromkeys((f".{variant}" if variant else "", "")):
        whole, index = f"{stem}{suffix}.safetensors", f"{stem}.safetensors.index{suffix}.json"
        if index in names:
            shards = _shards(names, f"{place}/{index}", read(index))
            if whole in names:
                raise CheckpointError(
                    f"{place} holds its weights twice, in {whole} and in the shards of {index}, and may mean either: "
                    f"remove those that an earlier save left there."
                )
            return WeightFiles(shards, index)
        if whole in names:
            return WeightFiles((whole,))
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".ckpt", ".pth")))
    why = f" (the weights in {pickled[0]} would have to be unpickled, which runs code)" if pickled else ""
    raise MissingFileError(
        f"{place} holds no weights in safetensors{why}: save the model again with safe_serialization=True, or "
        f"download it again."
    )


def _shards(names: set[str], place: str, index: Mapping[str, Any]) -> tuple[str, ...]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{place} has no weight_map: it is damaged. Save the model again, or download it again.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or shard not in names or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{place} has {tensor} in {shard!r}, which is no file beside it: refused, or incomplete."
            )
    return tuple(sorted(set(weight_map.values())))


def check_weights(cls: type, config: Mapping[str, Any], weights: WeightFiles, folder: Path, place: str) -> None:
    """Refuse weights that are not those of the config's network: by names, shapes and types, and nothing is read.

    Args:
        cls: Of the network: ours, or diffusers'.
        config: Of the network.
        weights: Its files.
        folder: Where they are.
        place: What messages call that.

    Raises:
        CheckpointError: A tensor is missing, unknown, of another shape or type; or the config describes no network.
    """
    saved = _saved(weights, folder, place)
    network = build_on_meta(cls, config, place, len(saved))
    shared = getattr(network, "all_tied_weights_keys", {}).keys()  # of transformers: each is saved once
    modernise = getattr(network, "_fix_state_dict_keys_on_load", None)
    if modernise is not None:  # names of attention blocks before diffusers 0.15
        modernise(saved)
    own = {name: tensor for name, tensor in network.state_dict().items() if name in saved or name not in shared}
    check_names(place, own.keys() - saved.keys(), saved.keys() - own.keys())
    for name, tensor in own.items():
        expected, found = tuple(tensor.shape), saved[name]
        floats = tensor.is_floating_point()
        if found.shape != expected:
            raise CheckpointError(
                f"the weights of {place} have {name} of shape {list(found.shape)}, and the config's network "
                f"{list(expected)}: config and weights do not belong together. Save the model again, or download it."
            )
        if found.dtype not in (_FLOATS if floats else (_SAVED_AS.get(tensor.dtype, found.dtype),)):
            raise CheckpointError(
                f"the weights of {place} have {name} of type {found.dtype}, where "
                f"{'a floating-point number' if floats else str(tensor.dtype)} is saved: they were changed. Save the "
                f"model again, or download it again."
            )


def check_names(place: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights that are not those of the network.

    Args:
        place: Where they come from, for the message.
        missing: Tensors that the network has and the file has not.
        unexpected: Tensors that the file has and the network has not.

    Raises:
        CheckpointError: There are any.
    """
    for words, names in (
        ("lack", sorted(missing)),
        ("hold, beyond those of its config's network,", sorted(unexpected)),
    ):
        if names:
            raise CheckpointError(
                f"the weights of {place} {words} {_listed(names)}: config and weights do not belong together. Save "
                f"the model again, or download it again."
            )


def check_finite_weights(place: str, network: nn.Module) -> None:
    """Refuse weights that no computation can use.

    Raises:
        CheckpointError: Some are NaN or infinite.
    """
    broken = [name for name, tensor in network.state_dict().items() if not _is_finite(tensor)]
    if broken:
        raise CheckpointError(
            f"the weights of {place} are NaN or infinite in {_listed(broken)}: the model diverged, or was converted "
            f"to a precision that can't hold them. Publish or load another checkpoint of it."
        )


def build_on_meta(cls: type, config: Mapping[str, Any], place: str, tensors: int) -> nn.Module:
    """The network of a config, without memory for its tensors.

    Args:
        cls: Its class.
        config: Its config.
        place: What messages call it.
        tensors: How many there are at most.

    Raises:
        CheckpointError: The config describes none, or one of many more tensors.
    """
    remedy = "its config is damaged, or of another version: save the model again, or download it again"
    with (
        explained(f"the network of {place} can't be built", remedy),
        torch.set_grad_enabled(torch.is_grad_enabled()),  # as it was, wherever the construction ends
        torch.device("meta"),
        _StepLimit(place, tensors),
    ):
        own = getattr(cls, "config_class", None)  # of a model of transformers
        described: Any = copy.deepcopy(dict(config))
        network: nn.Module = cls.from_config(described) if own is None else cls(own.from_dict(described))  # type: ignore[attr-defined]
    return network


class _StepLimit(TorchFunctionMode):
    """A mode that ends a construction which makes more tensors than a limit allows."""

    def __init__(self, place: str, tensors: int) -> None:
        super().__init__()
        self._place, self._tensors = place, tensors
        self._left = _CALLS + _CALLS_PER_TENSOR * tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._left -= 1
        if self._left == -1:  # once: what tidies up on the way out calls torch, too
            raise CheckpointError(
                f"the config of {self._place} describes a network far larger than the {self._tensors} tensors of its "
                f"weights: config and weights do not belong together. Save the model again, or download it again."
            )
        return func(*args, **(kwargs or {}))


def _saved(weights: WeightFiles, folder: Path, place: str) -> dict[str, Saved]:
    """The tensors of all files by name, as the headers have them."""
    found: dict[str, Saved] = {}
    placed: dict[str, str] = {}
    for name in weights.files:
        for tensor, about in read_header(folder / name, f"{place}/{name}").items():
            if tensor in found:
                raise CheckpointError(f"the weights of {place} hold {tensor} twice: save the model again.")
            found[tensor], placed[tensor] = about, name
    if weights.index is not None:
        listed = read_json(folder / weights.index)["weight_map"]
        check_names(place, listed.keys() - placed.keys(), placed.keys() - listed.keys())
        for tensor, shard in listed.items():
            if placed[tensor] != shard:
                raise CheckpointError(
                    f"{place}/{weights.index} has {tensor} in {shard}, and it is in {placed[tensor]}: save the model "
                    f"again, or download it again."
                )
    return found


def read_header(path: Path, name: str) -> dict[str, Saved]:
    """The tensors that a safetensors file holds, without reading them.

    Raises:
        CheckpointError: It is none, is truncated, or has an oversized header.
    """
    what = f"the weights in {name} can't be read, as the file is truncated or no safetensors file"
    with explained(what, "download or save it again"):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_JSON_BYTES:
                raise ValueError("its header is too large, as of a git-lfs pointer or another kind of file")
            header = file.read(size)
            if len(header) < max(size, 1):
                raise ValueError("its header is cut short")
            parse_json(header, f"the header of {name}")  # safetensors takes the last of a doubled tensor
        with safe_open(path, framework="pt") as tensors:
            slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - it is no mapping
            return {key: Saved(tuple(one.get_shape()), one.get_dtype()) for key, one in slices.items()}


def _is_finite(tensor: torch.Tensor) -> bool:
    # Eight-bit floats know no isfinite, and weights offloaded elsewhere have no values here.
    if not tensor.is_floating_point() or tensor.element_size() == 1 or tensor.is_meta:
        return True
    return bool(torch.isfinite(tensor).all())


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def replacing_weights(folder: Path, variant: str | None = None) -> Iterator[None]:
    """A block in which saved weights replace all that a component's folder held, in whatever files.

    diffusers leaves a whole file beside new shards, shards beside a new whole file, safetensors beside a new pickle:
    whoever loads the folder then gets the old weights.

    Args:
        folder: The component's.
        variant: That which is saved; others stay.
    """
    middle = f".{variant}" if variant else ""
    names = rf"{WEIGHTS}{re.escape(middle)}(-\d{{5}}-of-\d{{5}})?\.(safetensors|bin)"
    index = rf"{WEIGHTS}\.(safetensors|bin)\.index{re.escape(middle)}\.json"
    ours = re.compile(f"{names}|{index}")

    def held() -> dict[Path, tuple[int, int]]:
        found = [path for path in folder.glob(f"{WEIGHTS}*") if ours.fullmatch(path.name) and path.is_file()]
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}

    before = held()
    yield
    stale = [path for path, state in held().items() if before.get(path) == state]
    for path in stale:
        path.unlink()
    if stale:
        some = ", ".join(sorted(path.name for path in stale)[:_SHOWN])
        warn(f"{folder} held weights of an earlier save ({some}), which are removed.", stacklevel=4)
