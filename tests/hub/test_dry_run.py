"""A dry run can be repeated, replaces nothing but a former one, and shows a model of any number of timesteps."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DDPMPipeline, DDPMScheduler

from hub.publications import tiny_network, write_run
from naming import naming
from vdm_hub import VDMPipeline
from vdm_hub.commands import main
from vdm_hub.errors import ConfigurationError, OutputError
from vdm_hub.publishing.dry_run import LIST, write_publication


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return write_run(folder / "old"), write_run(folder / "new", seed=1)


def test_the_command_can_be_repeated(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["me/tiny", "--dry_run", "--output_dir", str(out)]
    assert main(["publish", str(runs[0]), *words]) == 0
    former = contents(out)
    said = capsys.readouterr().out
    assert all(Path(name).name in said for name in former)
    assert main(["publish", str(runs[1]), *words]) == 2
    assert "--overwrite" in capsys.readouterr().err and contents(out) == former
    assert main(["publish", str(runs[1]), *words, "--overwrite"]) == 0
    assert contents(out) != former and contents(out).keys() == former.keys()
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert contents(out)[f"main/{weights}"] == (runs[1] / "pipeline" / weights).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "nothing is left beside"


def test_without_a_dry_run_there_is_nothing_to_overwrite(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(runs[0]), "me/tiny", "--overwrite"]) == 2
    assert "--dry_run" in capsys.readouterr().err


def add(name: str) -> Callable[[Path], object]:
    return lambda out: (out / name).write_text("mine")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file beside": add("notes.txt"),
    "a file within": add("main/notes.txt"),
    "a hidden file": add("main/unet/.keep"),
    "an edited card": add("main/README.md"),
    "edited weights": lambda out: (out / "main/unet/diffusion_pytorch_model.safetensors").write_bytes(b""),
    "a folder of mine": lambda out: (out / "mine").mkdir(),
    "a link": lambda out: (out / "main" / "link").symlink_to(out / "main" / "README.md"),
    "a link to a folder": lambda out: (out / "link").symlink_to(out / "main"),
    "a link in a file's place": lambda out: (
        (out / "main/README.md").rename(out.parent / "card"),
        (out / "main/README.md").symlink_to(out.parent / "card"),
    ),
    "a file that is gone": lambda out: (out / "main/recipe.yaml").unlink(),
    "a list that is gone": lambda out: (out / LIST).unlink(),
    "a list that is damaged": lambda out: (out / LIST).write_text("[" * 9),
    "a list of something else": lambda out: (out / LIST).write_text('{"a": null}'),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_dry_run_did_not_write_stays(
    change: Callable[[Path], object], runs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_publication(runs[0], "me/tiny", out)
    change(out)
    before = contents(out), sorted(out.rglob("*"))
    assert main(["publish", str(runs[1]), "me/tiny", "--dry_run", "--output_dir", str(out), "--overwrite"]) == 2
    assert (contents(out), sorted(out.rglob("*"))) == before


def test_a_foreign_folder_or_file_is_never_replaced(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for place in ("photos", "file"):
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=place):
                write_publication(runs[0], "me/tiny", tmp_path / place, overwrite=overwrite)
    assert contents(tmp_path) == {"photos/a.txt": b"mine", "file": b"mine"}
    (tmp_path / "empty").mkdir()
    assert write_publication(runs[0], "me/tiny", tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert write_publication(runs[0], "me/tiny", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "main" / "README.md").is_file()


def test_a_publication_that_fails_leaves_the_former_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    write_publication(runs[0], "me/tiny", out)
    before = contents(out)
    shutil.copytree(runs[1], broken)
    (broken / "recipe.yaml").write_text("dataset_name: hf_oauth_abcdefgh\n")
    assert main(["publish", str(broken), "me/tiny", "--dry_run", "--output_dir", str(out), "--overwrite"]) == 2
    assert contents(out) == before and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    "revision", ["../x", "/x", "a/../../x", "a b", "a\nb", "-x", "x.lock", "", "a\u202eb", "diffusers", "x/"]
)
def test_a_branch_that_git_cannot_have_is_refused(revision: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="revision"):
        write_publication(runs[0], "me/tiny", tmp_path / "a" / "out", revision=revision)
    assert not list(tmp_path.iterdir())


def test_what_lies_beside_a_pipeline_is_named_and_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("notes.txt", "unet/notes.txt", "images/a.png"):
        (run / "pipeline" / name).parent.mkdir(exist_ok=True)
        (run / "pipeline" / name).write_text("mine")
    with pytest.warns(UserWarning, match=naming("images/a.png", "notes.txt", "unet/notes.txt")) as told:
        files = write_publication(run, "me/tiny", tmp_path / "out")
    assert len([one for one in told if "notes" in str(one.message)]) == 1
    assert not [path for path in files if path.name in ("notes.txt", "a.png")]


def test_nothing_says_where_the_model_lay(tmp_path: Path) -> None:
    run = write_run(tmp_path / "where-ada-works" / "run", stock=True)
    loaded = VDMPipeline.from_pretrained(run / "pipeline")
    loaded.save_pretrained(tmp_path / "again")  # diffusers notes in each config where its part came from
    assert "where-ada-works" in (tmp_path / "again/unet/config.json").read_text()
    for folder in (run, tmp_path / "again"):
        out = tmp_path / f"out of {folder.name}"
        write_publication(folder, "me/tiny", out, remote_code=True)
        texts = contents(out)
        assert {name.split("/")[0] for name in texts} > {"main", "diffusers", "remote-code"}
        assert not [
            name
            for name, content in texts.items()
            if b"where-ada-works" in content or str(tmp_path).encode() in content
        ]


# ---- any number of timesteps ----------------------------------------------------------------------------------------


def samples_as_the_card_says(out: Path) -> None:
    """Each way of sampling that the card shows works as it stands, but for the place."""
    calls = re.findall(
        r"pipe = (\w+)\.from_pretrained\((.*)\)\nimages = pipe\((.*)\)\.images", (out / "main/README.md").read_text()
    )
    assert [name for name, *_ in calls] == ["VDMPipeline", "DDPMPipeline"]
    for name, place, arguments in calls:
        pipeline = {"VDMPipeline": VDMPipeline, "DDPMPipeline": DDPMPipeline}[name]
        folder = out / ("diffusers" if 'revision="diffusers"' in place else "main")
        steps = int(re.fullmatch(r"batch_size=4, num_inference_steps=(\d+)", arguments)[1])  # type: ignore[index]
        loaded = pipeline.from_pretrained(folder)
        loaded.set_progress_bar_config(disable=True)
        assert len(loaded(batch_size=4, num_inference_steps=steps).images) == 4


@pytest.mark.parametrize(
    "timesteps", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (10, 49, 50, 51))]
)
def test_a_model_of_any_number_of_timesteps_publishes(timesteps: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", stock=True, num_train_timesteps=timesteps)
    write_publication(run, "me/tiny", tmp_path / "out")
    assert f"in {min(timesteps, 50)} steps" in (tmp_path / "out/main/README.md").read_text(), (
        "the twin's error is stated"
    )
    samples_as_the_card_says(tmp_path / "out")


@pytest.mark.parametrize("timesteps", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (20, 60))])
def test_an_imported_ddpm_of_any_number_of_timesteps_publishes(timesteps: int, tmp_path: Path) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=timesteps, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(tiny_network(stock=True), scheduler).save_pretrained(tmp_path / "ddpm")  # type: ignore[arg-type]
    VDMPipeline.from_diffusers(tmp_path / "ddpm", 17).save_pretrained(tmp_path / "pipeline")
    write_publication(tmp_path / "pipeline", "me/tiny", tmp_path / "out")
    samples_as_the_card_says(tmp_path / "out")
