"""The bound of a dataset: every image once, whatever the batches."""

from __future__ import annotations

import math

import datasets
import numpy as np
import pytest
import torch

from runs import finished_run
from vdm_hub import UNetVDMModel, VDMPipeline, VDMScheduler
from vdm_hub.data.images import Decoder, ImageLevels, ImageStream
from vdm_hub.data.loading import load_split
from vdm_hub.errors import ConfigurationError, DataError, NonFiniteLossError
from vdm_hub.evaluation.evaluate import evaluate
from vdm_hub.pixels import image_from_levels


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
        evaluate(pipeline, images, transitions, replicates=2, batch_size=size, progress=False) for size in (50, 16, 7)
    ]
    for report in reports[1:]:
        assert torch.equal(report.times, reports[0].times)
        for name, term in report.terms_per_image.items():
            torch.testing.assert_close(term, reports[0].terms_per_image[name], rtol=1e-5, atol=1e-5)


def test_the_report_adds_up_and_counts_everything(pipeline: VDMPipeline, images: ImageLevels) -> None:
    report = evaluate(pipeline, images, replicates=3, batch_size=16, progress=False)
    figures = report.to_dict()
    assert figures["bits_per_dim"] == pytest.approx(sum(figures["terms"].values()), rel=1e-12)
    assert list(figures["terms"]) == ["reconstruction", "prior", "diffusion"]
    assert (figures["num_images"], figures["replicates"], figures["network_evaluations"]) == (50, 3, 150)
    per_pass = torch.stack(list(report.terms_per_image.values())).sum(0).mean(1) / (64 * math.log(2))
    assert figures["standard_error"] == pytest.approx(float(per_pass.std() / math.sqrt(3)), rel=1e-9)
    assert figures["is_bound"] is True


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
    stream = ImageStream(encoded, "image", (1, 8, 8), 17, Decoder(17))
    streamed = evaluate(pipeline, stream, replicates=1, batch_size=8, max_images=20, progress=False)
    held = evaluate(pipeline, images, replicates=1, batch_size=8, max_images=20, progress=False)
    assert streamed.num_images == held.num_images == 20
    assert streamed.bits_per_dim == held.bits_per_dim
    assert max(read) < 30


def test_what_does_not_fit_the_model_is_refused(pipeline: VDMPipeline) -> None:
    def of_shape(*shape: int, level: int = 0) -> ImageLevels:
        return ImageLevels(torch.full(shape, level, dtype=torch.uint8), shape[1:], 17)

    with pytest.raises(DataError, match=r"images are 1x9x9, the model's 1x8x8.*--resolution 8"):
        evaluate(pipeline, of_shape(2, 1, 9, 9), progress=False)
    with pytest.raises(DataError, match="images are 3x8x8, the model's 1x8x8"):
        evaluate(pipeline, of_shape(2, 3, 8, 8), progress=False)
    with pytest.raises(DataError, match="level 17; the model knows 0 to 16"):
        evaluate(pipeline, of_shape(2, 1, 8, 8, level=17), progress=False)
    with pytest.raises(DataError, match="no images"):
        evaluate(pipeline, of_shape(0, 1, 8, 8), progress=False)
    with pytest.raises(DataError, match="0 replicates"):
        evaluate(pipeline, of_shape(2, 1, 8, 8), replicates=0, progress=False)
    with pytest.raises(ConfigurationError, match="transitions is 0"):
        evaluate(pipeline, of_shape(2, 1, 8, 8), transitions=0, progress=False)


def test_a_model_that_is_not_finite_is_named_with_the_image(images: ImageLevels) -> None:
    unet = UNetVDMModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
    )
    with torch.no_grad():
        next(unet.parameters()).fill_(np.nan)
    with pytest.raises(NonFiniteLossError, match="the diffusion term of image 0 is not finite"):
        evaluate(VDMPipeline(unet, VDMScheduler(num_levels=17)), images, progress=False)


def test_measuring_leaves_the_model_as_it_was(pipeline: VDMPipeline, images: ImageLevels) -> None:
    pipeline.unet.train()
    before = {name: tensor.clone() for name, tensor in pipeline.unet.state_dict().items()}
    evaluate(pipeline, images, replicates=1, progress=False)
    assert pipeline.unet.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipeline.unet.state_dict().items())
    assert not pipeline.unet._forward_pre_hooks
    pipeline.unet.eval()
