"""``vdm-hub compress`` and ``vdm-hub decompress``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from vdm_hub import (
    Command,
    ConfigurationError,
    DataError,
    LikelihoodPipeline,
    TokenPipeline,
    TokenWindows,
    VDMHubError,
    check_output,
    labels_as,
    load_images,
    load_pipeline,
    load_windows,
)
from vdm_hub_codec.codec import TRANSITIONS, check_model, decode, encode, maker
from vdm_hub_codec.compare import image_formats, text_compressors
from vdm_hub_codec.container import Container
from vdm_hub_codec.decoded_files import check_place, write, written
from vdm_hub_codec.images import check_told, classes_of, costs_of
from vdm_hub_codec.progressive import progress_of
from vdm_hub_codec.spacing import DRAWS, StepCosts, bounds_of, plot_lengths

SUFFIX = ".vdmz"
_OF_IMAGES, _OF_TEXTS = ("image_column", "color", "resolution"), ("text_column",)


class Compress(Command):
    """Keep images or texts as a file whose length is a model's likelihood, losslessly."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """The model, the data, the file."""
        parser.add_argument("pipeline", help="a run's folder, a pipeline's, or a Hub id: the decoder needs it too")
        parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
        parser.add_argument("--dataset_name", required=True, help="'digits', a folder, a file, or a Hub dataset")
        parser.add_argument("--dataset_config_name", help="the configuration of the dataset, where it has several")
        parser.add_argument("--split", default="test", help="the split, such as 'test[:100]' (default: test)")
        parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write, ending in .vdmz")
        parser.add_argument("--overwrite", action="store_true", help="replace that file, where there is one")
        _add_reading(parser.add_argument_group("reading, if otherwise than the model was trained"))
        group = parser.add_argument_group("how")
        group.add_argument(
            "--transitions", type=_positive, help=f"T of a VDM: more are shorter, and slower (default: {TRANSITIONS})"
        )
        group.add_argument("--block", type=_positive, help="images that decode by themselves (default: all together)")
        group.add_argument(
            "--sites_at_once",
            type=_positive,
            help="of a masked model: sites coded by one evaluation; more are quicker, and longer (default: 1)",
        )
        group.add_argument(
            "--batch_size", type=_positive, default=64, help="data at once, and coded together (default: 64)"
        )
        group = parser.add_argument_group("classes, of a model that is told them: the file keeps them, too")
        group.add_argument("--label_column", help="the column of the classes (default: that of the training)")
        group.add_argument(
            "--untold",
            action="store_true",
            help="tell the network no class and keep none, where it was trained with condition dropout",
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
        data, labels = _data(pipeline, arguments)
        costs = _costs(pipeline, data, labels) if arguments.length_plot is not None else None
        whole, report = encode(
            pipeline,
            data,
            labels,
            transitions=arguments.transitions,
            block=arguments.block,
            sites_at_once=arguments.sites_at_once,
            batch_size=arguments.batch_size,
            name=arguments.pipeline,
            progress=not arguments.json,
        )
        with written(arguments.output) as beside:
            beside.write_bytes(whole)
        lengths = {} if costs is None else bounds_of(costs, report.transitions or TRANSITIONS)
        others, notes = _others(pipeline, data) if arguments.compare else ({}, [])
        if arguments.json:
            told = {"others": others, "notes": [*report.notes, *notes], "lengths": lengths}
            print(json.dumps(report.to_dict() | told))
        else:
            print(f"{arguments.output}: {report}")
            for number, (bits, error) in lengths.items():
                by = f"by {costs.data if costs else 0} of the data"
                print(f"  T = {number:<6}{bits:8.4f} bits/dim, about, {by}, standard error {error:.4f} (Monte Carlo)")
            for name, bits in sorted(others.items(), key=lambda item: item[1]):
                print(f"  {name:<16}{bits:8.4f} {report.unit}, the file {report.bits_per_dim / bits - 1:+.1%}")
            for note in notes:
                print(f"note: {note}.")
        if costs is not None:  # last, so that a full disk leaves the report
            with written(arguments.length_plot) as beside:
                plot_lengths(costs, lengths, report, beside)


class Decompress(Command):
    """Get back the images or the texts that a file keeps."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """The file, the model, the place."""
        parser.add_argument("file", type=Path, help="what `vdm-hub compress` wrote")
        parser.add_argument(
            "-o", "--output", type=Path, required=True, help="a folder, a .parquet file, or of one text a .txt file"
        )
        parser.add_argument("--model", help="the model that made it (default: the one that the file names)")
        parser.add_argument("--revision", help="a branch or commit of that Hub id (default: main)")
        parser.add_argument(
            "--blocks", type=int, nargs="+", metavar="N", help="of images: decode these blocks alone, numbered from 0"
        )
        parser.add_argument("--batch_size", type=_positive, default=64, help="data at once; any (default: 64)")
        parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
        parser.add_argument(
            "--progressive", type=Path, help="a .png of what is known after each latent, and of rate and distortion"
        )

    def run(self, arguments: argparse.Namespace) -> None:
        """Write what was decoded, where all of it is what was encoded."""
        if arguments.blocks is not None and arguments.progressive is not None:
            raise ConfigurationError(
                "--progressive is of a whole file, and --blocks of a part: leave one of them out."
            )
        output = arguments.output
        check_place(output, overwrite=arguments.overwrite)
        if arguments.progressive is not None:
            check_output(arguments.progressive, "progressive", ".png", overwrite=arguments.overwrite)
        try:
            content = arguments.file.read_bytes()
        except OSError as error:
            raise DataError(f"{arguments.file} can't be read ({error.strerror}): name a file.") from error
        container = Container.from_bytes(content)
        check_place(output, overwrite=arguments.overwrite, container=container)
        pipeline = _maker_of(container, arguments)
        wants = arguments.progressive is not None
        progress = progress_of(pipeline, content, batch_size=arguments.batch_size) if wants else None
        blocks = arguments.blocks
        found = decode(pipeline, content, blocks=blocks, batch_size=arguments.batch_size, progress=True)
        with written(output) as beside:
            said = write(found, pipeline, beside, output.suffix)
        some = "" if blocks is None else f", of the blocks {blocks} of {len(container.blocks)}"
        print(f"{output}: {said}, as encoded{some}")
        if progress is not None:
            for bits, away in zip(progress.bits_per_dim, progress.error, strict=True):
                print(f"{bits:8.4f} bits/dim read: the estimate is {away:.3f} levels off")
            with written(arguments.progressive) as beside:
                progress.save(beside, pipeline.num_levels)


def _say(said: str) -> None:
    print(said, file=sys.stderr)


def _data(pipeline: LikelihoodPipeline, arguments: argparse.Namespace) -> tuple[Tensor | TokenWindows, Tensor | None]:
    """The data, and the classes of images that the network is to be told."""
    is_text = isinstance(pipeline, TokenPipeline)
    if is_text or pipeline.num_classes is None:
        _refuse(arguments, ("label_column", "untold"), "is told no classes")
    _refuse(arguments, _OF_IMAGES if is_text else _OF_TEXTS, f"is one of {'texts' if is_text else 'images'}")
    config = arguments.dataset_config_name
    if isinstance(pipeline, TokenPipeline):
        column = arguments.text_column or (pipeline.config.get("windows") or {}).get("text_column", "text")
        return load_windows(
            arguments.dataset_name,
            arguments.split,
            pipeline.tokenization,
            pipeline.cut,
            config_name=config,
            text_column=column,
            say=_say,
        ), None
    check_told(pipeline, untold=arguments.untold)
    images, _, notes = load_images(
        pipeline,
        arguments.dataset_name,
        arguments.split,
        config_name=config,
        **{name: getattr(arguments, name) for name in (*_OF_IMAGES, "label_column")},
        say=_say,
        must_be_told=not arguments.untold,
    )
    for note in notes:
        _say(f"note: {note}.")
    if not isinstance(images.levels, Tensor):
        raise DataError("the images are of different sizes, and a file keeps those of one: name others.")
    classes = None if arguments.untold else pipeline.class_condition
    return images.levels, None if classes is None else labels_as(images.labels, images.class_names, classes)


def _add_reading(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--image_column", help="the column that holds the images")
    group.add_argument("--color", choices=("auto", "grey", "rgb"), help="convert the images first; so they come back")
    group.add_argument("--resolution", type=_positive, help="resize the images first; so they come back")
    group.add_argument("--text_column", help="the column that holds the texts")


def _refuse(arguments: argparse.Namespace, names: tuple[str, ...], what: str) -> None:
    for name in names:
        if getattr(arguments, name) not in (None, False):
            raise ConfigurationError(f"--{name} is given, and the model {what}: leave it out.")


def _maker_of(container: Container, arguments: argparse.Namespace) -> LikelihoodPipeline:
    """The model that made a file.

    Raises:
        VDMHubError: It is not there, or is another.
    """
    name = arguments.model or container.model
    if not name:
        raise DataError(f"the file was made with {maker(container)}: name it with --model.")
    try:
        pipeline = load_pipeline(name, revision=arguments.revision)
    except VDMHubError as error:
        if arguments.model:
            raise
        raise DataError(
            f"the file was made with {maker(container)}, which can't be loaded here: {error} If it is elsewhere, name "
            f"it with --model."
        ) from error
    check_model(pipeline, container)
    return pipeline


def _costs(pipeline: LikelihoodPipeline, data: Tensor | TokenWindows, labels: Tensor | None) -> StepCosts:
    """What steps of the model cost, for the picture of lengths."""
    costs = None
    if isinstance(data, Tensor):
        costs = costs_of(pipeline, data, classes_of(pipeline, labels, len(data)), DRAWS)
    if costs is None:
        raise ConfigurationError(
            "--length_plot is given, and the model is no VDM of images with one gamma a time: leave it out."
        )
    return costs


def _others(pipeline: LikelihoodPipeline, data: Any) -> tuple[dict[str, float], list[str]]:
    if isinstance(data, TokenWindows):
        texts = [pipeline.tokenization.decode(one) for one in data.documents]
        notes = ["the others are of all texts at once, with a zero byte between"] if len(texts) > 1 else []
        return text_compressors("\0".join(texts).encode(), len(data.tokens)), notes
    return image_formats(data, pipeline.num_levels)


def _positive(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is no whole number above zero")
    return int(word)
