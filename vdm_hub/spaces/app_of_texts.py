"""An app of a model of texts: samples as they open, holes that are filled, and the bits of texts.

It is this file and ``space.json`` beside it, which names the model; ``python app.py`` runs it.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

import vdm_hub
from vdm_hub import VDMHubError

FRAMES = 60  # of a sampling, at most
EFFORT = "replicates: more of them, a smaller error"
BITS = """The **bits** of a text are the length of the file that a perfect coder would make of it with this model, at
most. The fewer, the more it is what the model expects. A second text is measured by the same model."""


def refused(error: VDMHubError) -> gr.Error:
    """What vdm_hub refuses, as a message."""
    return gr.Error(str(error), duration=None, print_exception=False)


def sample(
    pipe: Any, prompt: str, count: int, length: int, steps: int, temperature: float, again: float, seed: int
) -> Iterator[tuple[str, str]]:
    """The texts as they open, then as they are."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(count)]
    given: dict[str, Any] = {"prompt": prompt} if prompt else {}
    given |= {"remasking": again} if again else {}

    def call(show: Any) -> Any:
        arguments = {"num_inference_steps": steps, "temperature": temperature, "generator": generators}
        return pipe(count, length, **given, **arguments, callback_on_step_end=show).texts

    try:
        for step, found in vdm_hub.watch(call, every=max(1, steps // FRAMES)):
            texts = "\n\n--------\n\n".join(found if step is None else found["texts"])
            yield texts, f"{count} texts." if step is None else f"Step {step + 1} of {steps}: what is open so far."
    except VDMHubError as error:
        raise refused(error) from error


def measure(pipe: Any, first: str, second: str, replicates: int) -> str:
    """The bits of texts, as Markdown."""
    try:
        lines, totals, errors, notes = [], [], [], []
        for i, text in enumerate([first, second] if second else [first]):
            report = pipe.log_likelihood(text, replicates=replicates)
            sign, tokens = "at most " if report.is_bound else "", report.dimensions * report.num_images
            byte = "" if report.bits_per_byte is None else f"{sign}**{report.bits_per_byte:.3f}**"
            byte += f" ± {report.leading_error:.3f}" if byte else "unknown"
            token = f"{sign}{report.bits_per_dim:.3f} ± {report.standard_error:.3f}"
            totals.append(report.bits_per_dim * tokens)
            errors.append(report.standard_error * tokens)
            notes += report.details.get("notes", [])
            lines.append(f"| {i + 1} | {byte} | {token} | {totals[-1]:.1f} | {report.perplexity:.1f} |")
    except VDMHubError as error:
        raise refused(error) from error
    table = ["| text | bits/byte | bits/token | bits in all | perplexity |", "| --- | --- | --- | --- | --- |", *lines]
    if len(totals) == 2:
        fewer = f"takes fewer bits, by {abs(totals[0] - totals[1]):.1f} ± {math.hypot(*errors):.1f}"
        table.append(f"\n**Text {1 + (totals[1] < totals[0])}** {fewer}: the model expects it more.")
    return "\n".join([*table, *(f"\n*{note}*" for note in dict.fromkeys(notes))])


def build(pipe: Any, title: str, about: str) -> gr.Blocks:
    """The app of a pipeline."""
    most, mask = pipe.cut.length, pipe.tokenizer.mask_token
    masks_again = hasattr(pipe.process, "with_remasking")
    with gr.Blocks(title=title, analytics_enabled=False) as app:
        gr.Markdown(f"# {title}\n{about}")
        with gr.Tab("Samples"), gr.Row():
            with gr.Column():
                asked = [gr.Textbox(label=f"a text to continue, or with holes, each a {mask}; none for a new text")]
                asked += [gr.Slider(1, 8, 2, step=1, label="texts")]
                asked += [gr.Slider(1, most, most, step=1, label="tokens of each")]
                asked += [gr.Slider(1, 1000, min(64, most), step=1, label="steps")]
                asked += [gr.Slider(0, 2, 1, step=0.05, label="temperature: below 1, likelier tokens")]
                asked += [gr.Slider(0, 1, 0, step=0.05, label="remasking: drawn anew", visible=masks_again)]
                asked += [gr.Number(0, label="seed", precision=0)]
                go, stop = gr.Button("Sample", variant="primary"), gr.Button("Stop")
            with gr.Column():
                shown = [gr.Textbox(label="texts", lines=20, elem_id="texts"), gr.Markdown()]
            stop.click(None, cancels=[go.click(functools.partial(sample, pipe), asked, shown, show_progress="hidden")])
        with gr.Tab("Bits of a text"):
            gr.Markdown(BITS)
            with gr.Row():
                texts = [gr.Textbox(label=one, lines=8) for one in ("text", "a second one, to compare")]
            more, go = gr.Slider(2, 64, 8, step=1, label=EFFORT), gr.Button("Measure", variant="primary")
            go.click(functools.partial(measure, pipe), [*texts, more], gr.Markdown())
    return app


if __name__ == "__main__":
    os.chdir(Path(__file__).parent)
    space = json.loads(Path("space.json").read_text("utf-8"))
    model = vdm_hub.load_pipeline(space["model"], **space["loading"])
    build(model, space["title"], space["about"]).launch()
