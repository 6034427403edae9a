"""What a run tells its network of each image: its class, or its caption."""

from __future__ import annotations

from dataclasses import replace

from accelerate import Accelerator

from vdm_hub.data.captions import LONGEST, MOST_EXAMPLES, ImageCaptions, StreamCaptions
from vdm_hub.data.conditions import Condition
from vdm_hub.data.loading import RunData
from vdm_hub.errors import ConfigurationError
from vdm_hub.models.installed_encoders import open_text_encoder
from vdm_hub.models.text_conditions import TextCondition
from vdm_hub.models.text_encoders import TextEncoder
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.parts.initial_models import InitialModel


def build_condition(
    configuration: Configuration, data: RunData, accelerator: Accelerator, initial: InitialModel | None = None
) -> Condition | None:
    """The condition of a run; of captions with their encodings, which are made here unless the disk has them.

    Args:
        configuration: The recipe.
        data: Its images.
        accelerator: The processes; of several the main one makes the encodings, on its device.
        initial: The model that the run begins from.
    """
    dropout = configuration.model.condition_dropout
    if data.classes is not None:
        return replace(data.classes, dropout=dropout)
    if data.train.captions is None:
        return None
    arguments = configuration.data
    text = _text_encoder(configuration, initial)
    condition = TextCondition(
        text.width,
        str(arguments.caption_column or arguments.label_column),
        arguments.caption_template,
        text.limit,
        dropout,
        _examples(data, is_template=arguments.caption_template is not None),
        text=text,
    )
    texts = data.train.captions.texts
    with accelerator.main_process_first():
        text.encoder.to(accelerator.device)
        encodings = text.stored(texts, progress=accelerator.is_main_process)
        text.encoder.to("cpu")  # the network's memory is worth more; a few prompts are encoded there, too
    return replace(condition, encodings=encodings)


def _text_encoder(configuration: Configuration, initial: InitialModel | None) -> TextEncoder:
    """The text encoder of the recipe, or of the model that the run begins from, where that has one.

    Raises:
        ConfigurationError: There is none, or the recipe asks for another than the network was trained with.
    """
    model, known = configuration.model, None if initial is None else initial.pipeline.condition
    own = known.text if isinstance(known, TextCondition) else None
    if model.text_encoder is None:
        if own is None:
            raise ConfigurationError(
                f"{model.init_from} has no text encoder with it: give the --text_encoder that it was trained with."
            )
        return own
    text = open_text_encoder(model.text_encoder, model.caption_max_length)
    if isinstance(known, TextCondition) and text.width != known.width:
        raise ConfigurationError(
            f"text_encoder is {model.text_encoder!r}, whose vectors are {text.width} wide, and the network of "
            f"{model.init_from} attends to {known.width}: leave it out, or give the one that it was trained with."
        )
    if own is not None and text.digest != own.digest:
        raise ConfigurationError(
            f"text_encoder is {model.text_encoder!r}, which is another than that of {model.init_from}: its network "
            f"knows the vectors of its own alone. Leave text_encoder out."
        )
    return text


def _examples(data: RunData, *, is_template: bool) -> tuple[str, ...]:
    """Captions for pictures: of each class, where they are made from classes; else of images that are held out."""
    held_out = [images for images in (data.validation, data.test) if images is not None and not is_template]
    captions: ImageCaptions | StreamCaptions | None = [*held_out, data.train][0].captions
    assert captions is not None
    return tuple(one for one in captions.examples(MOST_EXAMPLES) if len(one) <= LONGEST)
