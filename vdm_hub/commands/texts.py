"""The commands on models of texts: which windows they are measured on, and the file of texts that they draw."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from vdm_hub.data.sequences import Cut, TokenWindows
from vdm_hub.data.text_loading import load_windows
from vdm_hub.diffusion.samplers import ANCESTRAL
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.evaluation.provenance import describe_windows
from vdm_hub.files import written_beside
from vdm_hub.pipelines.guidance import GUIDER
from vdm_hub.pipelines.tokens import TokenPipeline, joined_texts

_OF_IMAGES = (
    "image_column",
    "label_column",
    "caption_column",
    "color",
    "resolution",
    "num_levels",
    "marginal",
    "fit_split",
)
_OF_IMAGE_SAMPLES = {
    **dict.fromkeys(("class_labels", "negative_prompt")),
    "sampler": ANCESTRAL,
    "guidance_scale": 1.0,
    "guider": GUIDER,
}
"""The options of a sampling that texts know nothing of, with what they are where nobody gives them."""
OF_TEXTS = ("text_column", "window_length", "window_context")
"""The options of an evaluation that only models of texts take."""
OF_TEXT_SAMPLES = ("length", "temperature", "remasking")
"""The options of a sampling that only models of texts take."""


def refuse_options(
    arguments: argparse.Namespace, names: tuple[str, ...], what: str, usual: Mapping[str, object] | None = None
) -> None:
    """Refuse options that say nothing of a model.

    Args:
        arguments: The command line's.
        names: The options.
        what: The model is one of.
        usual: What those are that are not given, where that is neither ``None`` nor false.

    Raises:
        ConfigurationError: One is given.
    """
    for name in names:
        if (value := getattr(arguments, name)) not in (None, False, (usual or {}).get(name)):
            raise ConfigurationError(f"--{name} is {shortened(value)}, and the model is one of {what}: leave it out.")


def windows_of(
    arguments: argparse.Namespace, pipeline: TokenPipeline, say: Callable[[str], None]
) -> tuple[TokenWindows, dict[str, Any], list[str]]:
    """The windows of the texts that a command line names, cut as the model's own unless it says otherwise.

    Returns:
        The windows; what `describe_windows` says of them; and what the reader of a figure must know.

    Raises:
        ConfigurationError: An option is one of images.
        DataError: There are no such texts.
    """
    refuse_options(arguments, _OF_IMAGES, "texts")
    own = pipeline.cut
    cut = Cut(arguments.window_length or own.length, own.context)
    if arguments.window_context is not None:
        cut = Cut(cut.length, arguments.window_context)
    column = arguments.text_column or (pipeline.config.get("windows") or {}).get("text_column", "text")
    split = arguments.split or "test"
    windows = load_windows(
        arguments.dataset_name,
        split,
        pipeline.tokenization,
        cut,
        config_name=arguments.dataset_config_name,
        text_column=column,
        max_windows=arguments.max_images,
        say=say,
    )
    config = arguments.dataset_config_name
    description = describe_windows(windows, arguments.dataset_name, split, config=config, text_column=column)
    description |= {} if arguments.max_images is None else {"max_windows": arguments.max_images}
    other = {"window_length": (cut.length, own.length), "window_context": (cut.context, own.context)}
    notes = [
        f"{name} is {used}, and the model was trained with {trained}"
        for name, (used, trained) in other.items()
        if used != trained
    ]
    return windows, description, notes


def draw_texts(arguments: argparse.Namespace, pipeline: TokenPipeline, output: Path) -> str:
    """Draw texts, or fill the holes of some, into a file.

    Returns:
        What to say of it.

    Raises:
        ConfigurationError: An option is one of images, or a prompt is longer than a text is to be.
    """
    refuse_options(arguments, tuple(_OF_IMAGE_SAMPLES), "texts", _OF_IMAGE_SAMPLES)
    prompts = arguments.prompt or [None]
    told = [one for one in prompts for _ in range(max(1, arguments.num_images // len(prompts)))]
    other = "" if len(told) == arguments.num_images else f" of {arguments.num_images}, as many for each prompt"
    texts: list[str] = []
    for start in range(0, len(told), arguments.batch_size):
        part = told[start : start + arguments.batch_size]
        seeds = [torch.Generator().manual_seed(arguments.seed + start + place) for place in range(len(part))]
        given = {"num_samples": len(part)} if arguments.prompt is None else {"prompt": part}
        drawn = pipeline(
            **given,
            length=arguments.length,
            num_inference_steps=arguments.num_inference_steps,
            temperature=1.0 if arguments.temperature is None else arguments.temperature,
            remasking=arguments.remasking,
            generator=seeds,
            return_dict=False,
        )
        texts += drawn[0]
    with written_beside(output) as beside:
        beside.write_text(joined_texts(texts), "utf-8")
    return f"{len(texts)} samples{other}: {output}"
