"""The provenance of a figure: the images, the weights, and the versions of the libraries."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vdm_hub.data.images import ImageLevels, ImageStream
from vdm_hub.data.sequences import TokenStream, TokenWindows
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors.secret_values import masked_values
from vdm_hub.files import found
from vdm_hub.version import __version__

if TYPE_CHECKING:
    from vdm_hub.pipelines.base import LikelihoodPipeline

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets", "huggingface-hub", "safetensors", "numpy")
_WHERE_INSTALLED = ("pyarrow", "scipy")


def library_versions() -> dict[str, str]:
    """The versions of vdm_hub, Python and the libraries that a figure may depend on.

    >>> list(library_versions())[:3]
    ['vdm-hub', 'python', 'torch']
    """
    own = {"vdm-hub": __version__, "python": platform.python_version()}
    found = {name: metadata.version(name) for name in LIBRARIES}
    return own | found | {name: version for name in _WHERE_INSTALLED if (version := _version(name)) is not None}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def describe_images(
    images: ImageLevels | ImageStream,
    name: str,
    split: str | None,
    *,
    config: str | None = None,
    resolution: int | None = None,
    color: str = "auto",
    image_column: str = "image",
) -> dict[str, Any]:
    """The public description of a dataset: of a local folder or file only the last part of its path.

    Args:
        images: The images, as they were loaded.
        name: The dataset's name on the Hub, ``"digits"``, or a local path.
        split: The split that they are.
        config: The configuration of the dataset, where it has several.
        resolution: The resolution that was asked for.
        color: How colours were converted.
        image_column: The column that held the images.

    Returns:
        ``name``, ``config``, ``split``, ``images`` (how many; null for a stream), ``shape`` (C, H, W), ``levels`` (K),
        ``resolution``, ``resized`` (whether an image was resized or cropped, so that bits/dim can't be compared with
        published ones; of a stream the first image answers), ``fingerprint`` (`fingerprint`; null for a stream), and
        ``color`` and ``image_column`` where they are not ``"auto"`` and ``"image"``.

    >>> from vdm_hub.data.loading import load_split
    >>> described = describe_images(load_split("digits", "test", num_levels=17), "digits", "test")
    >>> described["images"], described["shape"], described["resized"], described["fingerprint"][:12]
    (360, [1, 8, 8], False, 'sha256:8c431')
    """
    described = {
        "name": public_name(name),
        "config": config,
        "split": split,
        "images": len(images) if isinstance(images, ImageLevels) else None,
        "shape": list(images.image_shape),
        "levels": images.num_levels,
        "resolution": resolution,
        "resized": images.resized,
        "fingerprint": fingerprint(images.levels) if isinstance(images, ImageLevels) else None,
        **({} if color == "auto" else {"color": color}),
        **({} if image_column == "image" else {"image_column": image_column}),
    }
    return masked_values(described)


def describe_windows(
    windows: TokenWindows | TokenStream,
    name: str,
    split: str | None,
    *,
    config: str | None = None,
    text_column: str = "text",
) -> dict[str, Any]:
    """The public description of a dataset of texts: of a local folder or file only the last part of its path.

    Args:
        windows: The texts, as they were loaded.
        name: The dataset's name on the Hub, or a local path.
        split: The split that they are.
        config: The configuration of the dataset, where it has several.
        text_column: The column that held the texts.

    Returns:
        ``name``, ``config``, ``split``, ``windows`` (how many), ``shape`` (L,), ``levels`` (K), ``window_context``,
        ``documents``, ``characters``, ``unknown_characters``, ``tokens`` and ``bytes`` of the whole text, its
        ``fingerprint`` as windows, that of the ``tokenizer`` (`vocabulary_fingerprint`), and ``text_column`` where it
        is not ``"text"``. What only reading all of it would tell is null for a stream.
    """
    facts = None if isinstance(windows, TokenStream) else windows.facts
    known = None if isinstance(windows, TokenStream) else windows
    described = {
        "name": public_name(name),
        "config": config,
        "split": split,
        "windows": windows.count,
        "shape": list(windows.shape),
        "levels": windows.num_levels,
        "window_context": windows.cut.context,
        "documents": None if facts is None else facts.documents,
        "characters": None if facts is None else facts.characters,
        "unknown_characters": None if facts is None else facts.unknown,
        "tokens": None if known is None else len(known.tokens),
        "bytes": None if known is None else int(known.sizes.long().sum()),
        "fingerprint": None if known is None else fingerprint(known.levels),
        "tokenizer": vocabulary_fingerprint(windows.tokenization),
        **({} if text_column == "text" else {"text_column": text_column}),
    }
    return masked_values(described)


def fingerprint(levels: Tensor | tuple[Tensor, ...]) -> str:
    """The SHA-256 of images as levels: ``sha256(str(shape) + bytes)`` with the shape (N, C, H, W), in uint8.

    For images of different sizes, the same of each (C, H, W) one after the other.

    >>> import torch
    >>> fingerprint(torch.zeros(2, 1, 1, 1, dtype=torch.uint8)) == "sha256:" + hashlib.sha256(
    ...     b"(2, 1, 1, 1)" + bytes(2)
    ... ).hexdigest()
    True
    """
    digest = hashlib.sha256()
    for part in (levels,) if isinstance(levels, Tensor) else levels:
        digest.update(str(tuple(part.shape)).encode())
        digest.update(part.contiguous().numpy().data)
    return f"sha256:{digest.hexdigest()}"


def vocabulary_fingerprint(tokenization: Tokenization) -> str:
    """The SHA-256 of a tokenizer's tokens and their ids: without it windows of ids do not say which text they are.

    >>> from vdm_hub.data.tokenization import make_tokenizer
    >>> one, other = (Tokenization(make_tokenizer("character", lambda: [text])) for text in ("to be", "uo be"))
    >>> one.encode("to be").levels.tolist() == other.encode("uo be").levels.tolist()
    True
    >>> vocabulary_fingerprint(one) == vocabulary_fingerprint(other)
    False
    """
    rows = sorted((number, token) for token, number in tokenization.tokenizer.get_vocab().items())
    told = json.dumps([tokenization.mask_id, rows], separators=(",", ":"))
    return f"sha256:{hashlib.sha256(told.encode()).hexdigest()}"


def weights_fingerprint(pipeline: DiffusionPipeline) -> str:
    """The SHA-256 of all weights of a pipeline: it tells the model of a figure, wherever that is saved."""
    digest = hashlib.sha256()
    for component, module in sorted(pipeline.components.items()):
        if isinstance(module, nn.Module):
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(f"{component}.{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{digest.hexdigest()}"


def component_configs(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """What the components of a pipeline were built with, as plain JSON: weights alone do not tell a network.

    Of a network's config what is not its class's default, so that a newer library, which knows of more defaults, tells
    the same; of a tokenizer all that it does to a text; no scheduler's, which `LikelihoodPipeline.description` tells.
    """
    configs = {name: _config_of(one) for name, one in sorted(pipeline.components.items())}
    return {name: config for name, config in configs.items() if config is not None}


def model_fingerprint(pipeline: LikelihoodPipeline) -> str:
    """The SHA-256 of all that makes a model: weights, networks, process, tokenizer, the names of its classes.

    >>> from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
    >>> fields = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,)}
    >>> first, second = (UNetVDMModel(**fields, norm_num_groups=groups).eval() for groups in (2, 4))
    >>> second.load_state_dict(first.state_dict())
    <All keys matched successfully>
    >>> one, other = (VDMPipeline(unet, VDMScheduler(num_levels=17)) for unet in (first, second))
    >>> weights_fingerprint(one) == weights_fingerprint(other), model_fingerprint(one) == model_fingerprint(other)
    (True, False)
    """
    told: dict[str, Any] = {"config": pipeline.description(), "components": component_configs(pipeline)}
    told |= {"classes": pipeline.config.get("classes"), "weights": weights_fingerprint(pipeline)}
    described = json.dumps(told, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(described.encode()).hexdigest()}"


# Of transformers' configs: who wrote them, and what the weights say themselves.
_NOT_THE_MODEL = ("transformers_version", "architectures", "dtype", "torch_dtype")


def _config_of(component: Any) -> dict[str, Any] | None:
    if (backend := getattr(component, "backend_tokenizer", None)) is not None:
        told = json.loads(backend.to_str())  # truncation and padding are of a call, not of the tokenizer
        return {name: value for name, value in told.items() if name not in ("version", "truncation", "padding")}
    config = getattr(component, "config", None)
    if not isinstance(component, nn.Module) or config is None:
        return None
    if hasattr(config, "to_diff_dict"):  # of transformers
        chosen = {name: value for name, value in config.to_diff_dict().items() if name not in _NOT_THE_MODEL}
    else:
        taken = inspect.signature(type(component).__init__).parameters
        default = {name: _plain(one.default) for name, one in taken.items()}
        chosen = {name: value for name, value in config.items() if _plain(value) != default.get(name)}
    public = {name: value for name, value in chosen.items() if not name.startswith("_")}
    return {"class": type(component).__name__, "config": json.loads(_plain(public))}


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def public_name(source: str) -> str:
    """The name of a dataset; of a local folder or file only the last part of its path, which hides the machine.

    >>> public_name("uoft-cs/cifar10"), public_name("/home/ada/birds"), public_name("./birds.parquet")
    ('uoft-cs/cifar10', 'birds', 'birds.parquet')
    """
    place = found(source)
    local = source.startswith((".", "/", "~")) or source.endswith((".parquet", ".txt")) or place is not None
    return (place or Path(source)).absolute().name if local else source
