"""``vdm-hub compress`` and ``vdm-hub decompress``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import datasets
from torch import Tensor

from vdm_hub import (
    Command,
    ConfigurationError,
    DataError,
    LikelihoodPipeline,
    TokenPipeline,
    TokenWindows,
    VDMPipeline,
    check_output,
    images_from_levels,
    load_images,
    load_pipeline,
    load_windows,
    written_beside,
)
from vdm_hub_codec.codec import TRANSITIONS, check_model, decode, encode
from vdm_hub_codec.compare import image_formats, text_compressors
from vdm_hub_codec.container import Container
from vdm_hub_codec.progressive import progress_of
from vdm_hub_codec.spacing import StepCosts, plot_lengths

SUFFIX = ".vdmz"


class Compress(Command):
    """Keep images or a text as a file whose length is a model's likelihood, losslessly."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """The model, the data, the file."""
        parser.add_argument("pipeline", help="a run's folder, a pipeline's, or a Hub id: the decoder needs it too")
        parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
        parser.add_argument("--dataset_name", required=True, help="'digits', a folder, a file, or a Hub dataset")
        parser.add_argument("--dataset_config_name", help="the configuration of the dataset, where it has several")
        parser.add_argument("--split", default="test", help="the split, such as 'test[:100]' (default: test)")
        parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write, ending in .vdmz")
        parser.add_argument("--overwrite", action="store_true", help="replace that file, where there is one")
        group = parser.add_argument_group("how")
        group.add_argument(
            "--transitions", type=_positive, help=f"T of a VDM: more are shorter, and slower (default: {TRANSITIONS})"
        )
        group.add_argument("--block", type=_positive, help="images that decode by themselves (default: all together)")
        group.add_argument(
            "--sites_at_once",
            type=_positive,
            default=1,
            help="of a masked model: sites coded by one evaluation; more are quicker, and longer (default: 1)",
        )
        group.add_argument(
            "--batch_size", type=_positive, default=64, help="data at once; changes no content (default: 64)"
        )
        group = parser.add_argument_group("output")
        group.add_argument(
            "--compare", action="store_true", help="PNG, WebP and JPEG XL of the same images, or gzip, bzip2 and xz"
        )
        group.add_argument("--length_plot", type=Path, help="a .png of the length against T, of a VDM of images")
        group.add_argument("--json", action="store_true", help="print one JSON object")

    def run(self, arguments: argparse.Namespace) -> None:
        """Write the file, and print how long it is and why."""
        check_output(arguments.output, "output", SUFFIX, overwrite=arguments.overwrite)
        if arguments.length_plot is not None:
            check_output(arguments.length_plot, "length_plot", ".png", overwrite=arguments.overwrite)
        pipeline = load_pipeline(arguments.pipeline, revision=arguments.revision)
        data = _data(pipeline, arguments)
        costs = _costs(pipeline, data) if arguments.length_plot is not None else None
        whole, report = encode(
            pipeline,
            data,
            transitions=arguments.transitions,
            block=arguments.block,
            sites_at_once=arguments.sites_at_once,
            batch_size=arguments.batch_size,
            name=arguments.pipeline,
            progress=not arguments.json,
        )
        with written_beside(arguments.output) as beside:
            beside.write_bytes(whole)
        lengths = {}
        if costs is not None:
            with written_beside(arguments.length_plot) as beside:
                lengths = plot_lengths(costs, report, beside)
        others, notes = _others(pipeline, data) if arguments.compare else ({}, [])
        if arguments.json:
            print(json.dumps(report.to_dict() | {"others": others, "notes": notes, "lengths": lengths}))
            return
        print(f"{arguments.output}: {report}")
        for number, bits in lengths.items():
            print(f"  T = {number:<6}{bits:8.4f} bits/dim, about, by 32 of the data")
        for name, bits in sorted(others.items(), key=lambda item: item[1]):
            print(f"  {name:<16}{bits:8.4f} bits/dim, the file {report.bits_per_dim / bits - 1:+.1%}")
        for note in notes:
            print(f"note: {note}.")


class Decompress(Command):
    """Get back the images or the text that a file keeps."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """The file, the model, the place."""
        parser.add_argument("file", type=Path, help="what `vdm-hub compress` wrote")
        parser.add_argument("-o", "--output", type=Path, required=True, help="a folder, a .parquet or a .txt file")
        parser.add_argument("--model", help="the model that made it (default: the one that the file names)")
        parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
        parser.add_argument("--batch_size", type=_positive, default=64, help="data at once; any (default: 64)")
        parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
        parser.add_argument(
            "--progressive", type=Path, help="a .png of what is known after each latent, and of rate and distortion"
        )

    def run(self, arguments: argparse.Namespace) -> None:
        """Write what was decoded, where all of it is what was encoded."""
        output = arguments.output
        if output.suffix in (".parquet", ".txt"):
            check_output(output, "output", output.suffix, overwrite=arguments.overwrite)
        elif output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigurationError(f"--output {output} is there, and not an empty folder: name another.")
        if arguments.progressive is not None:
            check_output(arguments.progressive, "progressive", ".png", overwrite=arguments.overwrite)
        try:
            content = arguments.file.read_bytes()
        except OSError as error:
            raise DataError(f"{arguments.file} can't be read ({error.strerror}): name a file.") from error
        container = Container.from_bytes(content)
        is_text = container.coder["kind"] in ("order", "values")
        if is_text != (output.suffix == ".txt"):
            raise ConfigurationError(
                f"--output is {output}, and the file keeps {'a text' if is_text else 'images'}: name "
                f"{'a .txt file' if is_text else 'a folder or a .parquet file'}."
            )
        pipeline = load_pipeline(arguments.model or container.model, revision=arguments.revision)
        check_model(pipeline, container)
        wants = arguments.progressive is not None
        progress = progress_of(pipeline, content, batch_size=arguments.batch_size) if wants else None
        found = decode(pipeline, content, batch_size=arguments.batch_size, progress=True)
        with written_beside(output) as beside:
            _write(found, pipeline, beside, output.suffix)
        if progress is not None:
            with written_beside(arguments.progressive) as beside:
                progress.save(beside, pipeline.num_levels)
            for bits, away in zip(progress.bits_per_dim, progress.error, strict=True):
                print(f"{bits:8.4f} bits/dim read: the estimate is {away:.3f} levels off")
        print(f"{output}: {'a text' if isinstance(found, str) else f'{len(found):,} images'}, as encoded")


def _data(pipeline: LikelihoodPipeline, arguments: argparse.Namespace) -> Tensor | TokenWindows:
    def say(said: str) -> None:
        print(said, file=sys.stderr)

    config = arguments.dataset_config_name
    if isinstance(pipeline, TokenPipeline):
        column = (pipeline.config.get("windows") or {}).get("text_column", "text")
        return load_windows(
            arguments.dataset_name,
            arguments.split,
            pipeline.tokenization,
            pipeline.cut,
            config_name=config,
            text_column=column,
            say=say,
        )
    images, _, notes = load_images(pipeline, arguments.dataset_name, arguments.split, config_name=config, say=say)
    for note in notes:
        say(f"note: {note}.")
    if not isinstance(images.levels, Tensor):
        raise DataError("the images are of different sizes, and a file keeps those of one: name others.")
    return images.levels


def _costs(pipeline: LikelihoodPipeline, data: Tensor | TokenWindows) -> StepCosts:
    """What steps of the model cost, for the picture of lengths."""
    costs = StepCosts.of(pipeline, data) if type(pipeline) is VDMPipeline and isinstance(data, Tensor) else None
    if costs is None:
        raise ConfigurationError(
            "--length_plot is given, and the model is no VDM of images with one gamma a time: leave it out."
        )
    return costs


def _others(pipeline: LikelihoodPipeline, data: Any) -> tuple[dict[str, float], list[str]]:
    if isinstance(data, TokenWindows):
        text = pipeline.tokenization.decode(data.tokens)
        return text_compressors(text.encode(), len(data.tokens)), []
    return image_formats(data, pipeline.num_levels)


def _write(found: Tensor | str, pipeline: LikelihoodPipeline, beside: Path, suffix: str) -> None:
    if isinstance(found, str):
        beside.write_bytes(found.encode())
        return
    images = images_from_levels(found, pipeline.num_levels, "pil")
    if suffix == ".parquet":
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": images}, features=features).to_parquet(beside)
        return
    beside.mkdir()
    digits = len(str(len(images) - 1))
    for number, image in enumerate(images):
        image.save(beside / f"{number:0{digits}}.png")


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above zero")
    return int(word)
