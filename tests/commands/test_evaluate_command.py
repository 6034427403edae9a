"""``vdm-hub evaluate`` as a user sees it: methods, files, targets, and what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from naming import naming
from tiny import tiny_pipeline, tiny_unet
from vdm_hub import ImportanceWeighted, VDMPipeline, VDMScheduler, commands
from vdm_hub.commands import main
from vdm_hub.commands.evaluate import NOT_REACHED
from vdm_hub.data.loading import load_split
from vdm_hub.diffusion.gaussian_process import GaussianProcess
from vdm_hub.diffusion.noise_schedules import LinearSchedule
from vdm_hub.errors import ConfigurationError, DataError
from vdm_hub.evaluation.measuring import ReplicateStages
from vdm_hub.hub.records import read_evaluation
from vdm_hub.likelihood.methods import ProbabilityFlow
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.objectives.variational_bound import check_finite_ends
from vdm_hub.recipes.arguments import parse_recipe

ODE = ("--tolerance", "0.3", "--max_images", "2", "--replicates", "2")
METHODS: dict[str, tuple[str, ...]] = {
    "bound": ("--max_images", "6", "--replicates", "3"),
    "finite bound": ("--max_images", "6", "--replicates", "3", "--transitions", "4"),
    "ode": ("--method", "ode", *ODE, "--dequantization", "uniform", "--probes", "2"),
    "chains": ("--method", "importance_weighted", "--transitions", "3", "--draws", "4", "--max_images", "6"),
    "weighted flow": ("--method", "importance_weighted", *ODE, "--draws", "2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "pipeline"
    # A schedule so short that an ODE takes few steps.
    tiny_pipeline(noise_schedule={"name": "linear", "config": {"gamma_min": -1.0, "gamma_max": 1.0}}).save_pretrained(
        folder
    )
    return folder


def words(folder: Path, *more: object) -> list[str]:
    return ["evaluate", str(folder), "--dataset_name", "digits", *map(str, more)]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prints_an_object_a_table_and_writes_its_files(
    method: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = "--per_image", tmp_path / "images.parquet", "--plot", tmp_path / "bits.png"
    assert main(words(folder, *METHODS[method], *files, "--json")) == 0
    printed = capsys.readouterr().out
    (tmp_path / "evaluation.json").write_text(printed)
    figures = json.loads(printed)
    assert read_evaluation(tmp_path / "evaluation.json") == figures, "as a publication reads it"
    assert figures["bits_per_dim"] == pytest.approx(sum(figures["terms"].values()), rel=1e-9)
    assert figures["method"] == {"finite bound": "bound", "chains": "importance_weighted"}.get(
        method, "importance_weighted" if method == "weighted flow" else method
    )
    assert {"standard_error", "standard_error_over_images", "dataset", "versions", "seconds", "weights"} <= set(
        figures
    )
    assert figures["network_evaluations"] > 0 and figures["dataset"]["fingerprint"].startswith("sha256:")
    assert Image.open(tmp_path / "bits.png").width > 500
    table = pq.read_table(tmp_path / "images.parquet")
    rows: dict[str, Any] = {name: np.asarray(column) for name, column in table.to_pydict().items()}
    assert rows["image"].tolist() == list(range(figures["num_images"]))
    assert rows["bits_per_dim"].mean() == pytest.approx(figures["bits_per_dim"], rel=1e-12)
    terms = sum(rows[f"bits_per_dim_{name}"] for name in figures["terms"])
    np.testing.assert_allclose(terms, rows["bits_per_dim"], rtol=1e-9)
    others = {"image", "file"} | {name for name in rows if name.startswith("bits_per_dim")}
    assert set(rows) == others, "one unit, which the columns' names say"
    assert json.loads(table.schema.metadata[b"vdm_hub"])["bits_per_dim"] == figures["bits_per_dim"]

    assert main(words(folder, *METHODS[method])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"{figures['bits_per_dim']:.4f} bits/dim" in lines[0]
    shown = {line.split()[0]: line.split()[1] for line in lines[1 : 1 + len(figures["terms"])]}
    assert shown == {name: f"{value:.4f}" for name, value in figures["terms"].items()}, "each name beside its figure"
    if "probability_flow" in figures:
        flow = figures["probability_flow"]
        assert flow["tolerance"] == 0.3 and flow["evaluations_per_solve"] > 1
        assert f"{flow['evaluations_per_solve']:.1f} evaluations a solve" in "\n".join(lines)


def test_the_pipeline_says_what_the_command_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = VDMPipeline.from_pretrained(folder)
    levels = load_split("digits", "test[:2]", num_levels=17).levels
    flow = ProbabilityFlow(dequantization="uniform", probes=2, tolerance=0.3)
    assert main(words(folder, *METHODS["ode"], "--json")) == 0
    report = pipe.log_likelihood(levels, method=flow, replicates=2)
    assert report.bits_per_dim == pytest.approx(json.loads(capsys.readouterr().out)["bits_per_dim"], rel=1e-9)
    assert not report.is_bound and report.times is None
    weighted = pipe.log_likelihood(levels, method=ImportanceWeighted(draws=3, transitions=4), replicates=2)
    assert weighted.is_bound and weighted.transitions == 4
    assert weighted.details["importance_weights"]["draws"] == 3


# ---- targets --------------------------------------------------------------------------------------------------------


def test_a_target_is_met_in_stages(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = words(folder, "--max_images", 4, "--json")
    assert main(few) == 0
    first = json.loads(capsys.readouterr().out)
    target = 0.6 * first["standard_error"]
    assert main([*few, "--target_standard_error", str(target)]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["standard_error"] <= target and figures["replicates"] > first["replicates"]
    assert figures["target"]["reached"] is True


@pytest.mark.parametrize("budget", [("--max_replicates", 12), ("--max_evaluations", 299)])
def test_a_target_that_the_budget_cannot_reach_is_said_and_the_report_is_there(
    budget: tuple[str, int], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = words(folder, "--max_images", 4, "--target_standard_error", 1e-6, *budget)
    assert main([*arguments, "--per_image", str(tmp_path / "images.parquet")]) == NOT_REACHED
    shown = capsys.readouterr().out
    assert f"target standard error 1e-06 bits/dim: NOT REACHED within the budget: raise {budget[0]}" in shown
    assert "bits/dim" in shown
    assert (tmp_path / "images.parquet").is_file()
    assert main([*arguments, "--json"]) == NOT_REACHED
    figures = json.loads(capsys.readouterr().out)
    assert figures["target"]["reached"] is False
    assert figures["replicates"] == (12 if budget[0] == "--max_replicates" else 10)
    assert figures["network_evaluations"] == 256 + 4 * figures["replicates"]
    assert figures["target"]["ended_by"] == budget[0].removeprefix("--")


def test_stages_never_more_than_double_and_end_at_the_budget() -> None:
    def after(replicates: int, scale: float) -> LikelihoodReport:
        passes = torch.linspace(-1, 1, replicates, dtype=torch.float64)[:, None].expand(-1, 3) * scale
        return LikelihoodReport({"diffusion": passes}, None, dimensions=1, network_evaluations=3 * replicates)

    stages = ReplicateStages(8, target=1e-3, max_replicates=50)
    assert (
        stages.next(after(8, 1.0)) == 16 and stages.next(after(40, 1.0)) == 50 and stages.next(after(50, 1.0)) is None
    )
    assert stages.next(after(8, 0.0)) is None
    error = after(8, 1.0).standard_error
    assert ReplicateStages(8, target=error / 1.2, max_replicates=50).next(after(8, 1.0)) == 12  # 8 x 1.2^2 = 11.5


# ---- refusals -------------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and "Traceback" not in shown.err
    (said,) = [line for line in shown.err.splitlines() if line.startswith("error: ")]
    return said


def test_what_makes_no_sense_together_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "nowhere"
    (tmp_path / "there.parquet").write_text("years of work")
    for more, message in (
        (("--max_replicates", 9), "--max_replicates acts only with --target_standard_error"),
        (("--max_evaluations", 9), "--max_evaluations acts only with --target_standard_error"),
        (("--per_image", tmp_path / "images.csv"), "name a file that ends in .parquet"),
        (("--plot", tmp_path / "bits.jpeg"), "name a file that ends in .png"),
        (("--per_image", tmp_path / "there.parquet"), "exists: name another --per_image, or replace it"),
    ):
        assert message in refused(capsys, words(nowhere, *more))
    assert (tmp_path / "there.parquet").read_text() == "years of work"


def digits_folder(root: Path, count: int = 4) -> Path:
    root.mkdir(parents=True)
    for i in range(count):
        Image.new("L", (8, 8), round(255 * i / 16)).save(root / f"{i}.png")
    return root


def everything(root: Path) -> dict[str, bytes]:
    """What lies below a folder, by its path."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def test_an_output_that_would_be_among_the_images_is_refused_by_every_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that are measured, and those that a run was trained on, as its recipe says."""
    measured, trained = digits_folder(tmp_path / "data"), digits_folder(tmp_path / "trained")
    (trained / "class").mkdir()
    run = tmp_path / "run"
    shutil.copytree(folder, run / "pipeline")
    (run / "recipe.yaml").write_text(
        parse_recipe(["template", "--train_data_dir", str(trained), "--dataset_name", "none"]).to_yaml()
    )
    before = everything(tmp_path)
    for place in (measured, trained / "class"):
        for option, name in (("plot", "p.png"), ("per_image", "p.parquet"), ("journal", "j")):
            more = ("evaluate", str(run), "--dataset_name", str(measured), f"--{option}", str(place / name))
            assert f"--{option} elsewhere" in refused(capsys, [*more, "--split", "train"])
    for words in (("sample", str(run), "--output"), ("publish", str(run), "me/x", "--dry_run", "--output_dir")):
        assert "elsewhere" in refused(capsys, [*words, str(trained / "class" / "p.png")])
    assert everything(tmp_path) == before


def test_a_place_that_nothing_can_be_written_to_is_refused_before_anything_is_loaded(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chapter.tex").write_text("years of work")
    (tmp_path / "other" / "unclipped").mkdir(parents=True)
    (tmp_path / "other" / "unclipped" / "thesis.txt").write_text("years of work")
    before = everything(tmp_path)
    below_a_file, too_long = tmp_path / "chapter.tex" / "new" / "x", tmp_path / ("x" * 245)
    for place in (below_a_file, too_long, Path("/proc/nowhere/x")):
        for option, suffix in (("plot", ".png"), ("per_image", ".parquet")):
            named = place.with_name(place.name + suffix)
            assert "name another place" in refused(capsys, words(tmp_path / "nowhere", f"--{option}", named))
            assert everything(tmp_path) == before
    for place in (below_a_file, folder, tmp_path, tmp_path / "other", Path("/proc/nowhere")):
        said = refused(capsys, words(tmp_path / "nowhere", "--journal", place))
        assert str(place) in said and "name another" in said
    assert everything(tmp_path) == before and not (folder / "unclipped").exists()


def test_a_journal_is_gone_on_with_and_nothing_but_a_journal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = words(folder, "--max_images", 2, "--replicates", 1, "--pilot_evaluations", 0, "--journal", tmp_path / "j")
    assert main(more) == main(more) == 0
    capsys.readouterr()
    (tmp_path / "j" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused(capsys, more)
    inner = tmp_path / "j" / "unclipped"
    assert "key.json" in refused(capsys, [*more[:-1], str(inner)])


def test_the_figure_is_printed_even_where_its_files_can_not_be_written_any_more(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = commands.evaluate.evaluate

    def measured_while_a_folder_appears(*given: Any, **named: Any) -> LikelihoodReport:
        (tmp_path / "bits.png").mkdir()
        return measure(*given, **named)

    monkeypatch.setattr(commands.evaluate, "evaluate", measured_while_a_folder_appears)
    more = words(folder, "--max_images", 2, "--replicates", 2, "--pilot_evaluations", 0, "--json")
    assert main([*more, "--plot", str(tmp_path / "bits.png")]) == 2
    assert json.loads(capsys.readouterr().out)["num_images"] == 2


def test_what_this_package_draws_is_never_read_as_an_image(folder: Path, tmp_path: Path) -> None:
    data = digits_folder(tmp_path / "data")
    few = ["sample", str(folder), "--num_images", "1", "--num_inference_steps", "1"]
    assert main([*few, "--output", str(data / "grid.png")]) == 0
    drawn = words(folder, "--max_images", 2, "--replicates", 2, "--pilot_evaluations", 0, "--plot", data / "bits.png")
    assert main(drawn) == 0
    for name in ("bits.png", "grid.png"):
        with pytest.raises(DataError, match=f"{name}.*vdm_hub"):
            load_split(str(data), "train", color="grey", resolution=8)
        (data / name).unlink()
    assert len(load_split(str(data), "train", color="grey", resolution=8)) == 4


def test_what_the_model_has_no_likelihood_for_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (("--method", "ode", "--transitions", 5), "transitions is 5, and the method 'ode' has no such option"),
        (("--target_standard_error", 0.1, "--replicates", 4), "give at least 8"),
        (("--label_column", "label"), "the network is not class-conditional"),
        (("--num_levels", 16), "num_levels is 16, and the model's decoder knows 17"),
        (("--prediction_type", "score"), "prediction_type is for checkpoints of diffusers"),
        (("--tolerance", 0.1), "tolerance is 0.1, and the method 'bound' has no such option"),
        (("--method", '{"name": "ode", "config": {"probes": 2}}', "--probes", 2), "one of the two"),
        (("--target_standard_error", 0.1, "--max_evaluations", 300), "8 replicates takes "),
    ):
        assert message in refused(capsys, words(folder, *more))


def test_a_missing_solver_is_named_with_its_install_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "scipy.integrate", None)
    assert "pip install scipy" in refused(capsys, words(folder, "--method", "ode"))
    assert main(words(folder, "--max_images", 2, "--replicates", 1)) == 0, "the bound needs none"


def test_an_image_whose_term_is_not_finite_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=10))
    with torch.no_grad():
        pipe.unet.time_embedding.class_embedding[0].weight[digits_labels(4)[1]] = (
            3e38  # finite in the file, and in no output
        )
    pipe.save_pretrained(tmp_path / "pipeline")
    said = refused(capsys, words(tmp_path / "pipeline", "--label_column", "label", "--max_images", 4))
    assert digits_labels(4).count(digits_labels(4)[1]) == 1
    assert "the diffusion term of image 1 is not finite" in said


def digits_labels(count: int) -> list[int]:
    found = load_split("digits", f"test[:{count}]", num_levels=17, label_column="label").labels
    assert found is not None
    return [int(label) for label in found]


def test_a_class_conditional_network_is_given_the_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_pipeline(tiny_unet(num_class_embeds=10)).save_pretrained(tmp_path / "ten")
    tiny_pipeline(tiny_unet(num_class_embeds=2)).save_pretrained(tmp_path / "two")
    assert "conditioned on 10 classes" in refused(capsys, words(tmp_path / "ten"))
    labelled = ("--label_column", "label", "--max_images", 20, "--replicates", 2)
    assert "classes 0 to 1" in refused(capsys, words(tmp_path / "two", *labelled))
    assert main(words(tmp_path / "ten", *labelled, "--per_image", tmp_path / "a.parquet")) == 0
    assert pq.read_table(tmp_path / "a.parquet")["class_label"].to_pylist() == digits_labels(20)
    pipe = VDMPipeline.from_pretrained(tmp_path / "ten")
    levels = load_split("digits", "test[:20]", num_levels=17).levels
    report = pipe.bits_per_dim(levels, class_labels=digits_labels(20), replicates=2)
    expected = pq.read_table(tmp_path / "a.parquet")["bits_per_dim"].to_pylist()
    assert report.per_image.tolist() == pytest.approx(expected, rel=1e-5)
    other = pipe.bits_per_dim(levels, class_labels=[0] * 20, replicates=2)
    assert other.bits_per_dim != report.bits_per_dim


def test_a_schedule_without_finite_endpoints_is_refused() -> None:
    class Endless(LinearSchedule):
        def forward(self, t: torch.Tensor) -> torch.Tensor:
            return torch.logit(t)

    for method in ("bound", "ode", "importance_weighted"):
        pipe = VDMPipeline(tiny_unet(), VDMScheduler(num_levels=17))
        pipe.scheduler.process.schedule = Endless(-13.3, 5.0)
        with pytest.raises(ConfigurationError, match=naming("Endless", "gamma(0)", "-inf")):
            pipe.log_likelihood(torch.zeros(1, 1, 8, 8), method=method)
    check_finite_ends(GaussianProcess.from_fields({}))


def test_a_folder_is_measured_as_it_is_named_and_what_is_not_read_is_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside one that a pattern of that name would find."""
    for name, level, count in (("run1", 16, 3), ("run[1]", 0, 2)):
        for i in range(count):
            path = tmp_path / name / "test" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), round(255 * level / 16)).save(path)
    (tmp_path / "run[1]" / "test" / "0.txt").write_text("a caption")
    name = str(tmp_path / "run[1]")
    assert main(["evaluate", str(folder), "--dataset_name", name, "--replicates", "2", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["num_images"] == 2
    assert "2 images of 'test'" in printed.err and "0.txt" in printed.err
