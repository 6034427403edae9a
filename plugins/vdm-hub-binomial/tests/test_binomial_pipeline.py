"""Binomial diffusion through the whole way: binarised digits, training, bound, samples, loading, publishing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from naming import naming
from plugin_runs import check_the_whole_way, errors_without_plugins, train_a_little
from tiny import tiny_pipeline, tiny_unet
from vdm_hub import (
    ClassificationEffort,
    ConfigurationError,
    VariationalBound,
    VDMPipeline,
    VDMScheduler,
    load_split,
    parse_recipe,
)
from vdm_hub_binomial.binarise import binarise, main

RECIPE = Path(__file__).resolve().parents[1] / "binary_digits.yaml"
PROCESS = {"name": "binomial", "package": "vdm-hub-binomial"}
UNET = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "fourier_features": []}


@pytest.fixture(scope="module")
def binary_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "binary-digits"
    assert [path.name for path in binarise("digits", folder, ["train", "test"])] == ["train.parquet", "test.parquet"]
    return folder


@pytest.fixture(scope="module")
def run(binary_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {"num_levels": 2, "forward_process": PROCESS, "unet": UNET | {"add_input": False}}
    return train_a_little(tmp_path_factory.mktemp("runs") / "bits", train_data_dir=str(binary_digits), **fields)


def test_a_bit_is_one_where_the_pixel_is_nearer_to_white(binary_digits: Path) -> None:
    grey = load_split("digits", "test", num_levels=17).levels
    bits = load_split(str(binary_digits), "test", num_levels=2).levels
    assert torch.equal(bits, (grey >= 8).to(bits.dtype))  # level 8 of 17 is the byte 128


def test_the_whole_way(run: Path, binary_digits: Path) -> None:
    check_the_whole_way(run, str(binary_digits))


def test_samples_are_bits_and_both_bounds_are_measured(run: Path, binary_digits: Path) -> None:
    pipe = VDMPipeline.from_pretrained(run / "pipeline")
    assert pipe.noise_schedule is None
    pipe.set_progress_bar_config(disable=True)
    images = pipe(4, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="pt").images
    assert set(images.unique().tolist()) == {0.0, 1.0}
    bits = load_split(str(binary_digits), "test[:64]", num_levels=2).levels
    reports = [pipe.bits_per_dim(bits, VariationalBound(transitions), replicates=4) for transitions in (None, 1, 200)]
    for report in reports:
        assert report.is_bound and set(report.terms) == {"reconstruction", "prior", "diffusion"}
        assert report.terms["reconstruction"] == report.terms["prior"] == 0
    in_one_step = reports[1].bits_per_dim
    assert in_one_step > reports[2].bits_per_dim > 0  # one transition: independent bits; 200: nearly continuous time
    assert reports[2].bits_per_dim == pytest.approx(reports[0].bits_per_dim, rel=0.2)


@pytest.mark.parametrize("transitions", [None, 6])
def test_classes_are_compared_by_their_bounds_on_the_same_draws(transitions: int | None, binary_digits: Path) -> None:
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=3, add_input=False), num_levels=2, forward_process=PROCESS)
    bits = load_split(str(binary_digits), "test[:6]", num_levels=2).levels
    effort = ClassificationEffort(confidence=None, budget=600, pilot_evaluations=256)
    report = pipe.classify(bits, effort=effort, transitions=transitions)
    differences = report.standing.differences - report.standing.differences[:, :1]
    errors = report.standing.errors.amax(1)
    method = VariationalBound(transitions, pilot_evaluations=0)
    bounds = []
    for label in range(3):
        likelihood = pipe.log_likelihood(bits, method, replicates=100, class_labels=[label] * 6)
        bounds.append(sum(likelihood.terms_per_image.values()))
    for label in (1, 2):
        paired = bounds[label] - bounds[0]  # without a pilot all labels see the same draws
        error = (paired.var(0) / len(paired) + 2 * errors**2).sqrt()
        assert bool(((differences[:, label] - paired.mean(0)).abs() < 4.5 * error).all())


def test_a_likelihood_that_needs_gamma_is_refused(run: Path, binary_digits: Path) -> None:
    bits = load_split(str(binary_digits), "test[:2]", num_levels=2).levels
    with pytest.raises(ConfigurationError, match=naming("method='bound'")):
        VDMPipeline.from_pretrained(run / "pipeline").log_likelihood(bits, method="ode")


@pytest.mark.slow
def test_without_the_package_loading_says_what_to_install(run: Path, tmp_path: Path) -> None:
    (message,) = errors_without_plugins(tmp_path / "site-packages", run)
    assert "'binomial'" in message and "pip install vdm-hub-binomial" in message and "unverified" in message


@pytest.mark.slow
def test_binarised_mnist(tmp_path: Path) -> None:
    source = Path(os.environ.get("VDM_HUB_TEST_DATA", "nowhere")) / "mnist"
    if not source.is_dir():
        pytest.skip("set VDM_HUB_TEST_DATA to a folder that holds mnist")
    data = tmp_path / "binary-mnist"
    list(binarise(str(source), data, ["train[:256]", "test[:32]"]))
    fields = {"num_levels": 2, "forward_process": PROCESS, "unet": UNET | {"add_input": False}}
    run = train_a_little(tmp_path / "run", train_data_dir=str(data), max_train_steps=40, **fields)
    check_the_whole_way(run, str(data), transitions=20)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"exponnt": 2}, ("exponnt", "'exponent'")),
        ({"exponent": "a"}, ("exponent", "'a'")),
        ({"exponent": None}, ("exponent", "None")),
        ({"exponent": 0.5}, ("exponent", 0.5)),
        ({"num_train_timesteps": 7}, ("num_train_timesteps",)),
    ],
)
def test_arguments_that_it_has_not_or_that_are_wrong_are_refused(
    config: dict[str, object], words: tuple[object, ...]
) -> None:
    with pytest.raises(ConfigurationError, match=naming(*words)):
        VDMScheduler(forward_process=PROCESS | {"config": config}, num_levels=2)


def test_what_it_does_not_read_is_left_out_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="BinomialProcess") as said:
        made = VDMScheduler(
            forward_process=PROCESS, num_levels=2, noise_schedule="cosine", prediction_type="v_prediction"
        )
    assert len(said) == 2 and made.config.noise_schedule == "linear" and made.config.prediction_type == "epsilon"
    assert type(made).from_config(made.config).config == made.config


def test_the_recipe_of_the_readme_is_valid() -> None:
    configuration = parse_recipe([str(RECIPE)])
    assert configuration.data.num_levels == 2 and "binomial" in configuration.diffusion.forward_process


def test_binarising_keeps_a_label_column_and_says_what_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["digits", str(tmp_path), "--splits", "test[:8]", "--label_column", "label"])
    assert "image and label" in capsys.readouterr().out
    grey = load_split("digits", "test[:8]", label_column="label")
    binary = load_split(str(tmp_path / "test.parquet"), "train", num_levels=2, label_column="label")
    assert torch.equal(torch.as_tensor(binary.levels), (torch.as_tensor(grey.levels) > 127).to(torch.uint8))
    assert grey.labels is not None and binary.labels is not None and torch.equal(binary.labels, grey.labels)


def test_binarising_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="'picture'"):
        main(["digits", str(tmp_path / "out"), "--image_column", "picture"])
