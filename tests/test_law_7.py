"""Law 7: a fake schedule with a gamma per pixel, a fake extra bound term, fake processes without gamma, with K logits
and with weights of their own, and a fake network run through objective, loop, scheduler and pipeline unchanged.

The fakes are a distribution of their own, installed into a temporary folder; configs name them, the core does not.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distributions import write_metadata
from naming import naming
from vdm_hub import VDMObjective, VDMPipeline, VDMScheduler, registry
from vdm_hub.commands import COMMANDS, TRAIN, main
from vdm_hub.commands.plugins import row_of
from vdm_hub.data.loading import load_split
from vdm_hub.diffusion.times import stratified_times
from vdm_hub.errors import CheckpointError, ConfigurationError
from vdm_hub.models.registered_model import bare_network
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.training.loop import train_model
from vdm_hub.training.parts.setup import build_objective, build_pipeline

PACKAGE, MODULE = "vdm-hub-fakes", "vdm_hub_fakes"
ENTRY_POINTS = f"""
[vdm_hub.noise_schedules]
pixelwise = {MODULE}:PixelwiseSchedule
context = {MODULE}:ContextSchedule
telling = {MODULE}:TellingSchedule

[vdm_hub.forward_processes]
resampling = {MODULE}:ResamplingProcess
logits = {MODULE}:LogitsProcess
holding = {MODULE}:HoldingProcess
learned_resampling = {MODULE}:LearnedResampling

[vdm_hub.networks]
pixel_network = {MODULE}:PixelNetwork

[vdm_hub.likelihood_methods]
mean_bound = {MODULE}:Mean

[vdm_hub.commands]
shout = {MODULE}:Shout
evaluate = {MODULE}:Shout
"""
UNET = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
SHAPE = (1, 8, 8)
CASES: dict[str, dict[str, Any]] = {
    "pixelwise": {"noise_schedule": {"name": "pixelwise", "config": {"size": 8}, "package": PACKAGE}},
    "context": {"noise_schedule": {"name": "context", "config": {"size": 8}, "package": PACKAGE}},
    "telling": {"noise_schedule": {"name": "telling", "config": {"size": 8}, "package": PACKAGE}},
    "resampling": {
        "forward_process": {"name": "resampling", "config": {"first_keep": 0.95}, "package": PACKAGE},
        "transitions": 5,
    },
    "logits": {"forward_process": {"name": "logits", "package": PACKAGE}, "transitions": 5},
    "learned_resampling": {"forward_process": {"name": "learned_resampling", "package": PACKAGE}, "transitions": 5},
    "pixel_network": {"unet": {"_class_name": "pixel_network", "width": 4}},
}
REPOSITORY = Path(__file__).resolve().parents[1]


def install(folder: Path) -> Path:
    """Install the fakes as pip would: a module, and a .dist-info that says what it brings."""
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("plugin_of_law_7.py"), folder / f"{MODULE}.py")
    return write_metadata(folder, PACKAGE, "0.1", ENTRY_POINTS)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = install(tmp_path_factory.mktemp("law_7") / "site-packages")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop(MODULE, None)


def configuration(case: str, folder: Path) -> Configuration:
    values = {
        "dataset_name": "digits",
        "num_levels": 17,
        "unet": UNET,
        "max_train_steps": 4,
        "train_batch_size": 32,
        "learning_rate": 0.01,
        "lr_warmup_steps": 0,
        "report_to": "none",
        "checkpointing_steps": 2,
        "validation_size": 8,
        "validation_steps": 2,
        "validation_images": 8,
        "sample_steps": 4,
        "num_sample_images": 2,
        "num_inference_steps": 3,
        "evaluation_replicates": 1,
        "output_dir": str(folder),
    }
    return Configuration.from_dict(values | CASES[case])


def six_digits() -> torch.Tensor:
    return load_split("digits", "test[:6]", num_levels=17).levels


MEASURE = """
def measure(folder, transitions):
    import torch
    from vdm_hub import VariationalBound, VDMPipeline, load_split
    torch.set_num_threads(1)
    pipe = VDMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(3, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="pt").images
    levels = load_split("digits", "test[:6]", num_levels=17).levels
    report = pipe.bits_per_dim(levels, VariationalBound(transitions), replicates=2)
    return images.tolist(), report.terms_per_image["diffusion"].tolist(), report.bits_per_dim
"""


def in_a_fresh_process(script: str, *python_path: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, *python_path)))}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pipeline folder of one short run of the training loop for each case."""
    folders = {case: tmp_path_factory.mktemp("runs") / case for case in CASES}
    for case, folder in folders.items():
        report = train_model(configuration(case, folder))
        assert report is not None and report.num_images == 360
    return {case: folder / "pipeline" for case, folder in folders.items()}


@pytest.fixture(scope="module")
def measured_afresh(trained: dict[str, Path], installed: Path) -> dict[str, Any]:
    """Samples and bounds of the saved pipelines in a process that has only read them."""
    arguments = {case: (str(folder), CASES[case].get("transitions")) for case, folder in trained.items()}
    calls = f"import json; print(json.dumps({{case: measure(*a) for case, a in {arguments!r}.items()}}))"
    done = in_a_fresh_process(MEASURE + calls, installed)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("case", CASES)
def test_the_objective_bounds_and_trains(installed: Path, tmp_path: Path, case: str) -> None:
    objective = build_objective(configuration(case, tmp_path), SHAPE)
    batch = {"levels": six_digits()}
    noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
    bound = objective(batch, stratified_times(6, 0.3), noise)
    bound.loss.backward()
    assert set(bound.terms) == {"reconstruction", "prior", "diffusion"} | (
        {"context"} if case in ("context", "telling") else set()
    )
    assert all(term.shape == (6,) and bool(torch.isfinite(term).all()) for term in bound.terms.values())
    assert float(bound.loss.detach()) > 0
    gradients = {name: parameter.grad for name, parameter in objective.process.named_parameters()}
    gradients |= {"network": objective.network.conv_out.weight.grad}  # type: ignore[union-attr]
    for name, gradient in gradients.items():
        assert gradient is not None and float(gradient.abs().max()) > 0, name


@pytest.mark.parametrize("case", CASES)
def test_what_the_loop_saves_is_what_a_fresh_process_loads(
    trained: dict[str, Path], measured_afresh: dict[str, Any], case: str
) -> None:
    here: dict[str, Any] = {}
    exec(MEASURE, here)
    images, diffusion, bits_per_dim = here["measure"](trained[case], CASES[case].get("transitions"))
    assert measured_afresh[case] == [images, diffusion, bits_per_dim]


@pytest.mark.parametrize("case", ["pixelwise", "context", "telling"])
def test_the_learned_weights_travel_with_the_pipeline(trained: dict[str, Path], tmp_path: Path, case: str) -> None:
    untrained = build_objective(configuration(case, tmp_path), SHAPE).process.state_dict()
    pipe = VDMPipeline.from_pretrained(trained[case])
    assert (trained[case] / "noise_schedule" / "diffusion_pytorch_model.safetensors").is_file()
    for name, weight in pipe.process.state_dict().items():
        assert not torch.equal(weight, untrained[name]), name


def test_the_weights_of_a_process_travel_with_the_pipeline(trained: dict[str, Path], tmp_path: Path) -> None:
    pipe = VDMPipeline.from_pretrained(trained["learned_resampling"])
    assert float(pipe.process.logit.detach()) != pytest.approx(math.log(19), abs=1e-4)
    assert pipe.to(torch.bfloat16).process.logit.dtype == torch.float32
    copy = tmp_path / "copy"
    shutil.copytree(trained["learned_resampling"], copy)
    assert (copy / "forward_process" / "diffusion_pytorch_model.safetensors").is_file()
    shutil.rmtree(copy / "forward_process")
    index = json.loads((copy / "model_index.json").read_text())
    del index["forward_process"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=naming("forward_process")):
        VDMPipeline.from_pretrained(copy)


def test_the_network_of_a_plugin_is_carried_and_cast(trained: dict[str, Path]) -> None:
    pipe = VDMPipeline.from_pretrained(trained["pixel_network"])
    config = json.loads((trained["pixel_network"] / "unet" / "config.json").read_text())
    assert config["network"]["package"] == PACKAGE and config["network"]["config"]["width"] == 4
    assert pipe.image_shape == SHAPE and type(pipe.unet.module).__name__ == "PixelNetwork"
    assert pipe.to(torch.bfloat16).unet.module.into.weight.dtype == torch.bfloat16
    with pytest.raises(ConfigurationError, match=naming("shift")):
        pipe(1, num_inference_steps=1, shift=torch.zeros(1))


def test_a_method_of_a_plugin_is_an_option_of_the_command(
    trained: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["evaluate", str(trained["pixelwise"]), "--dataset_name", "digits", "--max_images", "3", "--json"]
    assert main([*words, "--method", '{"name": "mean_bound", "config": {"times": 2}}', "--replicates", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["method"], figures["options"], figures["network_evaluations"]) == ("mean_bound", {"times": 2}, 12)
    assert main([*words, "--method", "mean_bound", "--draws", "2"]) == 2
    assert "no such option" in capsys.readouterr().err


def test_a_command_of_a_plugin_is_one_of_ours(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shout", "hello"]) == 0 and capsys.readouterr().out == "HELLO\n"
    assert main(["shout", "nothing"]) == 2 and "give another" in capsys.readouterr().err
    for words, said in ((["--help"], f"A command of the package {PACKAGE}."), (["shout", "--help"], "loudly")):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["shout"])
    assert "word" in capsys.readouterr().err
    assert {TRAIN, *COMMANDS} == set(registry.RESERVED["commands"])
    rows = {row["name"]: row["status"] for row in map(describe_row, registry.registrations("commands"))}
    assert "unusable" in rows["evaluate"] and rows["shout"] == "installed"


def describe_row(registration: registry.Registration) -> dict[str, str]:
    return row_of(registration, check=False)


def test_a_process_without_weights_carries_no_schedule(trained: dict[str, Path]) -> None:
    assert VDMPipeline.from_pretrained(trained["resampling"]).noise_schedule is None


@pytest.mark.parametrize("case", CASES)
def test_model_index_names_only_diffusers_and_the_core(trained: dict[str, Path], case: str) -> None:
    index = json.loads((trained[case] / "model_index.json").read_text())
    libraries = {value[0] for key, value in index.items() if isinstance(value, list) and not key.startswith("_")}
    assert libraries <= {"diffusers", "vdm_hub", None}


@pytest.mark.parametrize("case", CASES)
def test_an_image_from_its_own_generator_does_not_depend_on_its_batch(trained: dict[str, Path], case: str) -> None:
    pipe = VDMPipeline.from_pretrained(trained[case])
    pipe.set_progress_bar_config(disable=True)
    for parameter in bare_network(pipe.unet).conv_out.parameters():  # the identity: exact, whatever the batch
        torch.nn.init.zeros_(parameter)

    def draw(*seeds: int) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(len(seeds), generators, num_inference_steps=3, output_type="pt").images

    together = draw(0, 1, 2)
    assert torch.equal(draw(2)[0], together[2])
    assert not torch.equal(together[0], together[1])


def test_without_the_plugin_the_error_says_what_to_install(trained: dict[str, Path]) -> None:
    script = """
from vdm_hub import VDMPipeline
from vdm_hub.errors import MissingPluginError
for folder in FOLDERS:
    try:
        VDMPipeline.from_pretrained(folder)
    except MissingPluginError as error:
        print(error)
""".replace("FOLDERS", repr([str(folder) for folder in trained.values()]))
    done = in_a_fresh_process(script)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == len(CASES)
    for case, message in zip(trained, messages, strict=True):
        assert f"'{case}'" in message and f"pip install {PACKAGE}" in message and "unverified" in message


def test_a_bend_of_zero_is_the_linear_schedule(installed: Path, tmp_path: Path) -> None:
    """A gamma per pixel that is the same for every pixel gives the scalar schedule's bound."""
    linear = VDMScheduler(
        noise_schedule={"name": "linear", "config": {"gamma_min": -7.87}},
        num_levels=17,
        conditioning={"name": "affine", "config": {"gamma_min": -13.3}},
    ).build_process()
    batch, times = {"levels": six_digits()}, stratified_times(6, 0.3)
    for case in ("pixelwise", "context"):
        objective = build_objective(configuration(case, tmp_path), SHAPE).eval()
        for parameter in objective.process.parameters():
            torch.nn.init.zeros_(parameter)
        noise = objective.draw_noise(batch, torch.Generator().manual_seed(0))
        expected = VDMObjective(objective.network, linear)(batch, times, noise)
        bound = objective(batch, times, noise)
        for name, term in expected.terms.items():
            torch.testing.assert_close(bound.terms[name], term, rtol=1e-5, atol=1e-5)
        assert "context" not in bound.terms or not bool(bound.terms["context"].any())


def test_a_chain_keeps_one_context(trained: dict[str, Path]) -> None:
    """Bare steps can't carry the latent of a chain, so the scheduler refuses rather than draw another at each."""
    scheduler = VDMScheduler.from_pretrained(trained["context"], subfolder="scheduler")
    scheduler.set_timesteps(3)
    z = torch.zeros(1, *SHAPE)
    with pytest.raises(ConfigurationError, match="context"):
        scheduler.step(z, scheduler.timesteps[0], z)


def test_a_process_without_a_rate_asks_for_transitions(trained: dict[str, Path]) -> None:
    pipe = VDMPipeline.from_pretrained(trained["resampling"])
    with pytest.raises(ConfigurationError, match="transitions"):
        pipe.bits_per_dim(six_digits())


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"pixel_network"}))  # whose process is diffusers' own
def test_no_stock_sampler_is_given_a_process_it_cannot_run(trained: dict[str, Path], case: str) -> None:
    from diffusers import DDIMScheduler

    with pytest.raises(ConfigurationError, match=naming("VDMScheduler")):
        VDMPipeline.from_pretrained(trained[case]).scheduler.to_diffusers(DDIMScheduler)


def test_a_pipeline_holds_the_schedule_as_it_was(installed: Path, tmp_path: Path) -> None:
    """Training that goes on changes no pipeline that was built before."""
    objective = build_objective(configuration("context", tmp_path), SHAPE)
    before = build_pipeline(objective)
    initial = {name: weight.clone() for name, weight in objective.process.state_dict().items()}
    with torch.no_grad():
        for parameter in objective.process.parameters():
            parameter += 1.0
    after = build_pipeline(objective)
    for name, weight in initial.items():
        assert torch.equal(before.process.state_dict()[name], weight)
        assert torch.equal(after.process.state_dict()[name], weight + 1.0)
