"""The bound of a dataset: every image once, whatever the batches."""

from __future__ import annotations

import hashlib
import math
from importlib import metadata
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from naming import naming
from runs import finished_run
from tiny import tiny_unet
from vdm_hub import VariationalBound, VDMPipeline, VDMScheduler
from vdm_hub.data.images import ImageLevels, ImageReader, ImageStream
from vdm_hub.data.levels import image_from_levels
from vdm_hub.data.loading import load_split
from vdm_hub.errors import ConfigurationError, DataError, NonFiniteLossError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.evaluation.provenance import describe_images


@pytest.fixture(scope="module")
def pipeline() -> VDMPipeline:
    run, done = finished_run()
    assert done.returncode == 0, done.stderr
    return VDMPipeline.from_pretrained(run / "pipeline")


@pytest.fixture(scope="module")
def images() -> ImageLevels:
    return load_split("digits", "test[:50]", num_levels=17)


@pytest.mark.parametrize("transitions", [None, 7])
def test_the_batch_size_changes_no_figure(transitions: int | None, pipeline: VDMPipeline, images: ImageLevels) -> None:
    reports = [
        evaluate(pipeline, images, VariationalBound(transitions), replicates=2, batch_size=size, progress=False)
        for size in (50, 16, 7)
    ]
    for report in reports[1:]:  # the pilot's sums are rounded otherwise, and with them the density of the times
        torch.testing.assert_close(report.times, reports[0].times, rtol=1e-5, atol=1e-6)
        for name, term in report.terms_per_image.items():
            torch.testing.assert_close(term, reports[0].terms_per_image[name], rtol=1e-5, atol=1e-5)


def test_the_report_adds_up_and_counts_everything(pipeline: VDMPipeline, images: ImageLevels) -> None:
    report = evaluate(pipeline, images, replicates=3, batch_size=16, progress=False)
    figures = report.to_dict()
    assert figures["bits_per_dim"] == pytest.approx(sum(figures["terms"].values()), rel=1e-12)
    assert list(figures["terms"]) == ["reconstruction", "prior", "diffusion"]
    pilot = 256
    assert (figures["num_images"], figures["replicates"], figures["network_evaluations"]) == (50, 3, pilot + 150)
    per_pass = torch.stack(list(report.terms_per_image.values())).sum(0).mean(1) / (64 * math.log(2))
    assert figures["standard_error"] == pytest.approx(float(per_pass.std() / math.sqrt(3)), rel=1e-9)
    assert figures["is_bound"] is True


def test_an_error_from_few_replicates_says_what_it_is_worth(pipeline: VDMPipeline, images: ImageLevels) -> None:
    words = "the Monte Carlo error is itself uncertain by"
    shown = {count: str(evaluate(pipeline, images, replicates=count, progress=False)) for count in (1, 2, 7, 8)}
    assert [words in text for text in shown.values()] == [False, True, True, False]
    assert f"{words} 71 %" in shown[2] and f"{words} 29 %" in shown[7]  # (2 (R - 1))^(-1/2)


def test_the_seed_decides(pipeline: VDMPipeline, images: ImageLevels) -> None:
    first, same, other = (
        evaluate(pipeline, images, replicates=1, seed=seed, progress=False).bits_per_dim for seed in (5, 5, 6)
    )
    assert first == same != other


def test_a_stream_gives_what_memory_gives_and_only_what_is_needed_is_read(
    pipeline: VDMPipeline, images: ImageLevels
) -> None:
    read: list[int] = []

    def rows() -> object:
        for index in range(50):
            read.append(index)
            yield {"image": image_from_levels(images.levels[index].numpy(), 17)}

    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.IterableDataset.from_generator(rows, features=features)
    encoded = dataset.cast_column("image", datasets.Image(decode=False))
    stream = ImageStream(encoded, "image", (1, 8, 8), 17, ImageReader(17))
    streamed = evaluate(pipeline, stream, replicates=1, batch_size=8, max_images=20, progress=False)
    held = evaluate(pipeline, images, replicates=1, batch_size=8, max_images=20, progress=False)
    assert streamed.num_images == held.num_images == 20
    assert streamed.bits_per_dim == held.bits_per_dim
    assert max(read) < 30


def test_what_does_not_fit_the_model_is_refused(pipeline: VDMPipeline) -> None:
    def of_shape(*shape: int, level: int = 0) -> ImageLevels:
        return ImageLevels(torch.full(shape, level, dtype=torch.uint8), shape[1:], 17)

    with pytest.raises(DataError, match=naming("1x9x9", "1x8x8", "--resolution 8")):
        evaluate(pipeline, of_shape(2, 1, 9, 9), progress=False)
    with pytest.raises(DataError, match=naming("3x8x8", "1x8x8")):
        evaluate(pipeline, of_shape(2, 3, 8, 8), progress=False)
    with pytest.raises(DataError, match=naming(17, 16)):
        evaluate(pipeline, of_shape(2, 1, 8, 8, level=17), progress=False)
    with pytest.raises(DataError, match="no images"):
        evaluate(pipeline, of_shape(0, 1, 8, 8), progress=False)
    with pytest.raises(DataError, match=naming(17, 256)):
        other = VDMPipeline(pipeline.unet, VDMScheduler(num_levels=256))
        evaluate(other, of_shape(2, 1, 8, 8), progress=False)
    with pytest.raises(ConfigurationError, match=naming("replicates", 0)):
        evaluate(pipeline, of_shape(2, 1, 8, 8), replicates=0, progress=False)
    with pytest.raises(ConfigurationError, match=naming("transitions", 0)):
        evaluate(pipeline, of_shape(2, 1, 8, 8), VariationalBound(0), progress=False)


def test_a_model_that_is_not_finite_is_named_with_the_image(images: ImageLevels) -> None:
    unet = tiny_unet()
    with torch.no_grad():
        next(unet.parameters()).fill_(np.nan)
    with pytest.raises(NonFiniteLossError, match=naming("diffusion", "image 0")):
        evaluate(VDMPipeline(unet, VDMScheduler(num_levels=17)), images, progress=False)


def test_measuring_leaves_the_model_as_it_was(pipeline: VDMPipeline, images: ImageLevels) -> None:
    pipeline.unet.train()
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    evaluate(pipeline, images, replicates=1, progress=False)
    assert pipeline.unet.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert not pipeline.unet._forward_pre_hooks
    pipeline.unet.eval()


# ---- what was measured, and with what -------------------------------------------------------------------------------


def test_a_report_names_the_images_and_the_libraries(pipeline: VDMPipeline, images: ImageLevels) -> None:
    told = describe_images(images, "digits", "test[:50]")
    figures = evaluate(pipeline, images, replicates=1, seed=7, progress=False, dataset=told).to_dict()
    assert figures["dataset"] == told
    assert (told["images"], told["shape"], told["levels"], told["split"]) == (50, [1, 8, 8], 17, "test[:50]")
    assert figures["versions"]["torch"] == metadata.version("torch")
    assert figures["seed"] == 7
    assert figures["seconds"] > 0
    assert "dataset" not in evaluate(pipeline, images, replicates=1, progress=False).to_dict()


def test_of_fewer_images_than_there_are_those_are_named_that_were_measured(
    pipeline: VDMPipeline, images: ImageLevels
) -> None:
    told = describe_images(images, "digits", "test")
    report = evaluate(pipeline, images, replicates=1, max_images=20, progress=False, dataset=told)
    assert isinstance(images.levels, torch.Tensor)
    digest = hashlib.sha256(b"(20, 1, 8, 8)" + images.levels[:20].numpy().tobytes()).hexdigest()
    assert report.details["dataset"] == told | {"images": 20, "fingerprint": f"sha256:{digest}"}
    assert told["images"] == 50, "what was given stays as it was"


def test_the_fingerprint_tells_images_from_others(images: ImageLevels) -> None:
    levels = images.levels
    assert isinstance(levels, torch.Tensor)
    changed = levels.clone()
    changed[3, 0, 2, 2] += 1
    variants = [levels, changed, levels.flip(0), levels[:49], levels.view(50, 1, 4, 16), levels.view(25, 2, 8, 8)]
    told = [
        describe_images(ImageLevels(variant, tuple(variant.shape[1:]), 17), "a", None)["fingerprint"]
        for variant in variants
    ]
    assert len(set(told)) == len(told)
    assert describe_images(ImageLevels(levels.clone(), (1, 8, 8), 17), "b", "c")["fingerprint"] == told[0]


@pytest.mark.parametrize(
    ("sizes", "resolution", "resized"),
    [
        ([(8, 8), (8, 8)], None, False),
        ([(8, 8), (8, 8)], 8, False),
        ([(8, 8), (9, 8)], 8, True),
        ([(16, 16), (8, 8)], 8, True),
        ([(8, 8), (16, 16)], 8, True),
    ],
)
def test_images_are_resized_where_one_of_them_is(
    sizes: list[tuple[int, int]], resolution: int | None, resized: bool, tmp_path: Path
) -> None:
    """Not where a resolution was asked for that they have already."""
    (tmp_path / "test").mkdir()
    for index, size in enumerate(sizes):
        Image.new("L", size, 255 * index).save(tmp_path / "test" / f"{index}.png")
    images = load_split(str(tmp_path), "test", resolution=resolution)
    told = describe_images(images, str(tmp_path), "test", resolution=resolution)
    assert (told["resized"], told["resolution"], told["name"]) == (resized, resolution, tmp_path.name)
