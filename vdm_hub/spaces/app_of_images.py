"""An app of a model of images: samples with their chain in view, and the bits of pictures, over pixels and over t.

It is this file and ``space.json`` beside it, which names the model; ``python app.py`` runs it.
"""

from __future__ import annotations

import functools
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import PIL.Image
import torch

import vdm_hub
from vdm_hub import (
    ConfigurationError,
    VariationalBound,
    VDMHubError,
    VDMPipeline,
    images_from_levels,
    levels_from_images,
)

CSS = ".pixels img {image-rendering: pixelated; object-fit: contain}"
CONVERT = "convert pictures of another kind: colours, size (of the middle), values to the nearest level"
BITS = """The **bits** of a picture are the length of the file that a perfect coder would make of it with this model,
at most. The fewer, the more it is what the model expects. A second picture is measured on the same scale."""


def picture(**look: Any) -> gr.Image:
    """An input of images that hands the file on as it is, so that the model's own reader judges it."""
    image = gr.Image(format="png", elem_classes="pixels", height=260, sources=["upload", "clipboard"], **look)
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


@contextmanager
def messages() -> Iterator[None]:
    """Show what vdm_hub refuses as a message, and no traceback."""
    try:
        yield
    except VDMHubError as error:
        raise gr.Error(str(error), duration=None, print_exception=False) from error


def drawn(draw: Callable[..., None], *arguments: Any) -> PIL.Image.Image:
    """The picture that a function writes into a file, its last argument."""
    draw(*arguments, file := io.BytesIO())
    return PIL.Image.open(file)


def told(pipe: Any, choice: Any) -> dict[str, Any]:
    """The argument for the class or the caption, where the model is told one."""
    return {} if pipe.condition is None else {pipe.condition.argument: choice}


def sample(pipe: Any, count: int, steps: int, seed: int, choice: Any, scale: float) -> Iterator[tuple[Any, str]]:
    """The chain as pictures, then the samples."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    given = told(pipe, choice) | ({} if scale == 1 else {"guidance_scale": scale})

    call = functools.partial(pipe.sample, count, generators, steps, **given)
    is_chain = isinstance(pipe, VDMPipeline) and pipe.shows_steps
    states = vdm_hub.watch(lambda show: call(callback_on_step_end=show) if is_chain else call(), max(1, steps // 40))
    with messages():
        for step, found in states:
            levels = None if step is None else pipe.process.quantise(found["latents"])
            images = found if levels is None else images_from_levels(levels, pipe.num_levels)
            words = f"{count} samples." if step is None else f"Step {step + 1} of {steps}, from noise to images."
            yield drawn(vdm_hub.save_grid, images), words


@messages()
def one_sample(pipe: Any, choice: Any) -> PIL.Image.Image:
    """A sample of the model, as the picture that its file would be."""
    levels = levels_from_images(pipe.sample(1, None, 100, **told(pipe, choice)), pipe.num_levels)
    return images_from_levels(levels, pipe.num_levels, "pil")[0]


@messages()
def measure(pipe: Any, first: Any, second: Any, fit: bool, replicates: int, choice: Any) -> tuple[str, Any]:
    """The bits of pictures in words, and a plot of where they lie, where that is anywhere."""
    read = functools.partial(vdm_hub.read_picture, shape=pipe.image_shape, num_levels=pipe.num_levels, fit=fit)
    pictures = [read(file) for file in (first, second) if file is not None]
    if not pictures:
        raise ConfigurationError("there is no picture yet: drop one.")
    notes = [f"Picture {i}: {', '.join(done)}." for i, (_, done) in enumerate(pictures, 1) if done]
    levels, given = torch.cat([levels for levels, _ in pictures]), told(pipe, choice)
    method = VariationalBound(times_per_datum=16) if isinstance(pipe, VDMPipeline) else None
    report = pipe.log_likelihood(levels, method, replicates, **given)
    bits = (report.per_image * report.dimensions).tolist()
    if len(bits) == 2:
        error = float(report.standard_error_per_image.norm()) * report.dimensions
        fewer = f"takes fewer bits, by {abs(bits[0] - bits[1]):.1f} ± {error:.1f}"
        notes.insert(0, f"**Picture {1 + (bits[1] < bits[0])}** {fewer}: the model expects it more.")
    try:
        profile = pipe.pixel_profile(levels, **given, evaluations=256)
        plot: Any = drawn(vdm_hub.plot_pixel_profile, profile, images_from_levels(levels, pipe.num_levels))
    except ConfigurationError as error:  # such as of latents, whose bits lie on no pixel
        notes.append(str(error))
        plot = None if report.times is None else drawn(vdm_hub.plot_likelihood, report)
    return "\n\n".join([report.table(), *notes, *report.details.get("notes", [])]), plot


def build(pipe: Any, title: str, about: str) -> gr.Blocks:
    """The app of a pipeline."""
    (channels, height, width), condition = pipe.image_shape, pipe.condition
    kind = f"{width}x{height} pixels, {'grey' if channels == 1 else 'RGB'}, {pipe.num_levels} levels"
    chosen: dict[str, Any] = {"visible": False}
    guided = condition is not None and condition.dropout > 0
    if condition is not None:
        choices = [(condition.name_of(one), one) for one in condition.choices]
        chosen = {"choices": choices, "label": condition.noun, "allow_custom_value": condition.argument == "prompt"}
    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.Markdown(f"# {title}\n{about}")
        with gr.Tab("Samples"), gr.Row():
            with gr.Column():
                steps = gr.Slider(2, 1000, 100, step=1, label="steps", visible=isinstance(pipe, VDMPipeline))
                asked = [gr.Slider(1, 64, 16, step=1, label="images"), steps, gr.Number(0, label="seed", precision=0)]
                asked += [gr.Dropdown(**chosen), gr.Slider(1, 10, 1, step=0.5, label="guidance", visible=guided)]
                go, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop")
            with gr.Column():
                shown = [gr.Image(label="chain", format="png", elem_classes="pixels", elem_id="chain"), gr.Markdown()]
            stop.click(None, cancels=[go.click(functools.partial(sample, pipe), asked, shown, show_progress="hidden")])
        with gr.Tab("Bits of a picture"):
            gr.Markdown(BITS)
            with gr.Row():
                inputs = [picture(label=one) for one in (f"picture: {kind}", "a second one, to compare")]
                with gr.Column():
                    effort = gr.Slider(2, 64, 16, step=1, label="replicates: more of them, a smaller error")
                    asked = [gr.Checkbox(label=CONVERT), effort, gr.Dropdown(**chosen)]
                    go, one = gr.Button("Measure", variant="primary"), gr.Button("Take a sample of the model")
            shown = [gr.Markdown(), gr.Image(show_label=False, format="png", elem_id="where")]
            go.click(functools.partial(measure, pipe), [*inputs, *asked], shown)
            one.click(functools.partial(one_sample, pipe), asked[-1], inputs[0])
    return app


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    space = json.loads(Path("space.json").read_text("utf-8"))
    model = vdm_hub.load_pipeline(space["model"], **space["loading"])
    build(model, space["title"], space["about"]).launch(css=CSS)
