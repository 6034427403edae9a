"""Secrets: found wherever they stand, however they are written, and shown by no message, record, card or tracker."""

from __future__ import annotations

import json
import pickle
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

from hub.publications import EVALUATION, write_run
from vdm_hub.commands import report_errors
from vdm_hub.data.loading import load_split
from vdm_hub.errors import (
    CheckpointError,
    ConfigurationError,
    MissingPluginError,
    PublishError,
    VDMHubError,
    in_one_line,
    shortened,
    warn,
)
from vdm_hub.errors.secret_values import find_secret, mask, masked_values
from vdm_hub.evaluation.provenance import describe_images
from vdm_hub.hub.outgoing import refuse_secrets
from vdm_hub.publishing.dry_run import write_publication
from vdm_hub.recipes.arguments import Configuration, parse_recipe
from vdm_hub.training.tracking import Trackers

# The whole text, and the part of it that nobody may see.
SECRETS = {
    "a user's token": ("hf_" + "aB1" * 12, "aB1aB1"),
    "an OAuth token": ("hf_oauth_abcdefgh", "abcdefgh"),
    "a JWT": ("hf_jwt_eyJhbGciOi", "eyJhbGciOi"),
    "an app's token": ("hf_app_zzzz", "zzzz"),
    "a token of a kind to come": ("hf_newkind_9f8E7d6C", "9f8E7d6C"),
    "a token in a path": ("/data/hf_abc123/x", "abc123"),
    "a token of letters": ("hf_abc", "abc"),
    "what looks like a folder": ("hf_runs/one", "runs"),
    "an address that became a path": (str(Path("https://ada:tigerP4ss@host.example/x")), "tigerP4ss"),
    "a bucket that became a path": (str(Path("s3://ada:tigerP4ss@bucket/x")), "tigerP4ss"),
    "a user of an address that became a path": (str(Path("https://s3cretuser@host/x")), "s3cretuser"),
    "an organisation's token": ("api_org_qwertyuiop", "qwertyuiop"),
    "a password in an address": ("https://ada:tiger@example.org/birds.zip", "tiger"),
    "keys of a bucket": ("s3://AKIDEXAMPLE:wJalrXUtnFEMI/K7MDENG+b@bucket/birds", "K7MDENG"),
    "a password of digits": ("ftp://ada:123456@example.org", "123456"),
    "a password with an @": ("postgresql+psycopg://ada:t1@ger@db.example.org/x", "ger@"),
    "a password without a user": ("redis://:tiger@example.org:6379/0", "tiger"),
    "a token for a user": ("git+https://glp_4kX@example.org/repo.git", "4kX"),
    "no scheme": ("ada:tig3r!@example.org/birds", "tig3r"),
    "a signed address": ("https://example.org/b.zip?v=1&X-Amz-Signature=5f3c9a", "5f3c9a"),
    "another host's token": ("ghp_" + "x1" * 18, "x1x1"),
    "a header": ("Authorization: Bearer abcdef.ghijkl", "ghijkl"),
    "npm's": ("npm_" + "x1Yz" * 9, "x1Yz"),
    "Google's": ("AIza" + "SyD-9tSrke72PouQMnMX-a7eZSW0jkFMBWY", "SyD-9t"),
    "PyPI's": ("pypi-AgEIcHlwaS5vcmcCJDU3" + "xY9_" * 9, "cHlwaS5v"),
    "GitHub's app": ("gho_" + "a1B2" * 9, "a1B2"),
    "GitHub's, of fine grain": ("github_pat_" + "11ABCDEFG0" * 4, "11ABCDEFG0"),
    "another model's service": ("sk-proj-" + "aB3-" * 10, "aB3-aB3"),
    "Slack's bot": ("xoxb-123456789012-abcdefABCDEF", "abcdefABCDEF"),
    "Slack's person": ("xoxp-123456789012-123456789012-abcdef", "123456789012-abcdef"),
    "Slack's hook": ("https://hooks.slack.com/services/T00/B00/XyZ123abc", "XyZ123abc"),
    "Amazon's": ("AKIAIOSFODNN7EXAMPLE", "IOSFODNN7"),
    "a user and a password": ("Authorization: Basic YWRhOnRpZ2Vy", "YWRhOnRpZ2Vy"),
    "the same without its header's name": ("Basic YWRhOnRpZ2Vy", "YWRhOnRpZ2Vy"),
    "a header in JSON": ('{"Authorization": "Bearer abcdef.ghijkl"}', "ghijkl"),
    "a header of another scheme": ("authorization: token 0123456789abcdef", "0123456789abcdef"),
    "a fragment": ("https://example.org/cb#access_token=abc123&state=x", "abc123"),
    "a query": ("https://example.org/x?token=abc123", "abc123"),
    "a private key": ("-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----", "MIIEow"),
    "a private key that is cut": ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNza\nC1rZXk", "b3BlbnNza"),
    "the value of a token's variable": ("say xyzzy-plugh!", "xyzzy-plugh"),
    "the value of a key's variable": ("prefix_correct/horse_suffix", "correct/horse"),
    "the value of a password's variable": ("swordfish", "swordfish"),
    "a secret of several words": ("open  sesame\nplease", "sesame"),
    "the client's stored token": ("stored.plain.token", "plain.token"),
    "another stored token": ("second.plain.token", "second.plain"),
}
ENVIRONMENT = {
    "MY_SERVICE_TOKEN": "xyzzy-plugh!",
    "my_api_key": "correct/horse",
    "DB_Password": "swordfish",
    "Some_Secret": "open sesame please",
    "SHORT_KEY": "test",
}
HARMLESS = [
    "hf_", "hf_hub_download", "HF_HUB_OFFLINE", "hf_xet", "uoft-cs/cifar10", "runs:/x@v1", "C:/a@b",
    "https://host:8080/birds@v1", "hf://datasets/ada/birds@main/data", "mailto:ada@example.org", "https://h.org/?v=1",
    "git@example.org:ada/birds.git", "abfs://container@account.dfs.core.windows.net/birds", "test", "12:30@noon",
    "Basic configuration of a run", "Basic UNet2DConditionModel", "Bearer of news", "Authorization is asked for",
    "a94a8fe5ccb19ba61c4c0873d391e987982fbc84", "e75d1b71124569a842262056a9fd4d6a521bc74085f828313ea4918f81294ec5",
    "sk-learn-digits-and-many-other-words", "npm_config_userconfig_and_more", "pypi-a-long-name-of-a-package-here",
    "stabilityai/stable-diffusion-xl-base-1.0", "me/vdm-digits@7290964e6138cd3d1ede70362a41a24ca0b742b4",
    "swordfishes", "sha256:" + "0f" * 32, "runs/digits/pipeline", "{'_class_name': 'UNet2DModel'}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text("stored.plain.token\n")
    (home / "stored_tokens").write_text("[mine]\nhf_token = second.plain.token\n")
    monkeypatch.setenv("HF_HOME", str(home))


@pytest.mark.parametrize(("text", "hidden"), SECRETS.values(), ids=SECRETS)
def test_a_secret_is_found_and_masked(text: str, hidden: str) -> None:
    assert find_secret(text) is not None
    assert hidden not in str(find_secret(text))
    assert hidden not in mask(f"the field is {text!r}: mend it.")
    assert find_secret(mask(text)) is None


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_is_left_alone(text: str) -> None:
    assert find_secret(text) is None
    assert masked_values({text: [text]}) == {text: [text]}


@pytest.mark.parametrize(
    "unit", ["//a:", "a.", "hf_", "eyJ-", "?token", "sk-", "-----BEGIN ", "Authorization: ", " \\\\"]
)
def test_a_long_text_costs_no_more_than_its_length(unit: str) -> None:
    def seconds(length: int) -> float:
        text, started = unit * (length // len(unit)), time.perf_counter()
        assert find_secret(text) is None or mask(text)
        return time.perf_counter() - started

    short = min(seconds(10_000) for _ in range(3))
    assert seconds(80_000) < 8 * short * 4 + 0.2


@pytest.mark.parametrize("secret", ["hf_oauth_abcdefgh", "https://ada:tiger@host/x", "xyzzy-plugh!"])
def test_it_is_found_wherever_it_stands_and_however_it_is_escaped(secret: str) -> None:
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in secret)
    percent = "".join(f"%{ord(letter):02X}" for letter in secret)
    markdown = "".join(letter if letter.isalnum() else f"\\{letter}" for letter in secret)
    entities = "".join(f"&#{ord(letter)};" for letter in secret)
    for text in (escaped, percent, markdown, entities, json.dumps(json.dumps([secret])), percent.replace("%", "%25")):
        assert find_secret(text) is not None, text
        assert mask(f"a {text} b") == "a *** b" or find_secret(mask(text)) is None
    for value in ({"unet": {"a": [1, (secret,)]}}, {secret: 1}, [[{"x": {secret: None}}]], {"a": {secret}}):
        assert find_secret(value) is not None, value


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [VDMHubError, ConfigurationError, CheckpointError, PublishError, MissingPluginError])
def test_no_error_of_ours_says_one(cls: type[VDMHubError]) -> None:
    for text, hidden in SECRETS.values():
        error = cls(f"the field is {text}: mend it.")
        copied = pickle.loads(pickle.dumps(error))
        assert not [said for said in (str(error), repr(error), str(copied)) if hidden in said]


def test_a_message_that_is_cut_shows_no_half_of_one() -> None:
    assert "tig" not in in_one_line(ValueError("x" * 970 + " https://ada:tiger-of-the-north@example.org"))


def test_a_value_that_is_shortened_shows_no_half_of_one() -> None:
    for length in range(60, 100):
        assert "tig" not in shortened("x" * length + " https://ada:tiger@example.org")


def test_the_doors_say_none_of_what_others_raise(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError("https://ada:tiger@example.org is not there, nor hf_oauth_abcdefgh")

    assert report_errors(fail) == 2
    said = capsys.readouterr().err
    assert "tiger" not in said and "abcdefgh" not in said and "example.org" in said


def test_no_warning_says_one_whoever_warns(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        for text, _ in SECRETS.values():
            warnings.warn(f"another library's: {text}", FutureWarning, stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *told, **more: print(warnings.formatwarning(*told[:4]), file=sys.stderr)
        assert report_errors(work) == 0
    said = capsys.readouterr().err
    assert said.count("another library's") == len(SECRETS)
    assert not [hidden for _, hidden in SECRETS.values() if hidden in said]
    for text, hidden in SECRETS.values():  # as it is, for those who call the package from their own code
        with pytest.warns(UserWarning, match="ours") as told:
            warn(f"ours: {text}\n\u202e")
        assert hidden not in str(told[0].message) and "\n" not in str(told[0].message)


# ---- recipes and records --------------------------------------------------------------------------------------------

SOME = [SECRETS[name] for name in ("an OAuth token", "a password in an address", "the value of a password's variable")]


@pytest.mark.parametrize(("secret", "hidden"), SOME)
def test_a_recipe_holds_none(secret: str, hidden: str, tmp_path: Path) -> None:
    nested = {"unet": {"_class_name": "UNet2DModel", "note": secret}}
    as_key = {"unet": {secret: 1}}
    escaped = '{"unet": {"note": "' + "".join(f"\\u{ord(letter):04x}" for letter in secret) + '"}}'
    for fields in ({"dataset_name": secret}, {"image_column": secret}, {"recipe": secret}, nested, as_key):
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"dataset_name": "digits", "max_train_steps": 1} | fields))
        for attempt in (
            lambda path=path: parse_recipe([str(path)]),
            lambda fields=fields: Configuration.from_dict(fields),
        ):
            with pytest.raises(ConfigurationError) as refused:
                attempt()
            assert "hf auth login" in str(refused.value) and hidden not in str(refused.value)
    for words in (["--train_data_dir", secret], ["--unet", json.dumps(as_key["unet"])], ["--unet", escaped]):
        with pytest.raises(ConfigurationError) as refused:
            parse_recipe(["digits", *words])
        assert "hf auth login" in str(refused.value) and hidden not in str(refused.value)


@pytest.mark.parametrize(("secret", "hidden"), SOME)
def test_a_record_of_images_holds_none(secret: str, hidden: str) -> None:
    images = load_split("digits", "test", num_levels=17)
    described = describe_images(images, secret, f"test of {secret}", config=secret)
    assert hidden not in json.dumps(described) and described["images"] == 360


@pytest.mark.parametrize(("secret", "hidden"), SOME)
def test_nothing_is_published_with_one(secret: str, hidden: str, tmp_path: Path) -> None:
    named = EVALUATION | {"dataset": EVALUATION["dataset"] | {"name": secret}}
    places: dict[str, dict[str, Any]] = {
        "a field of the recipe": {"recipe": {"dataset_name": secret}},
        "a key in the recipe": {"recipe": {"unet": {secret: 1}}},
        "run.json": {"run": {"command": f"train {secret}"}},
        "a key in run.json": {"run": {"versions": {secret: "1"}}},
        "evaluation.json": {"evaluation": named},
        "a note": {"evaluation": EVALUATION | {"notes": [secret]}},
    }
    for place, fields in places.items():
        folder = write_run(tmp_path / place, **fields)
        with pytest.raises((PublishError, ConfigurationError)) as refused:  # a recipe is read as a run reads it
            write_publication(folder, "me/tiny", tmp_path / "out")
        assert re.search("would hold|holds", str(refused.value)) and hidden not in str(refused.value), place
        assert not (tmp_path / "out").exists(), place


def test_what_is_said_beside_the_records_is_searched_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for arguments in ({"license": "hf_oauth_abcdefgh"}, {"revision": "hf_oauth_abcdefgh"}):
        with pytest.raises(PublishError, match="would hold"):
            write_publication(folder, "me/tiny", tmp_path / "out", **arguments)
    columns = {"step": [1], "bits_per_dim": [1.0], "https://ada:tiger@host": [1.0]}
    (folder / "history.json").write_text(json.dumps({"train": columns, "validation": columns}))
    with pytest.raises(PublishError, match=r"history\.json"):
        write_publication(folder, "me/tiny", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def picture(path: Path, note: str, compressed: bool) -> None:
    info = PngInfo()
    (info.add_text if not compressed else lambda key, text: info.add_text(key, text, zip=True))("comment", note)
    Image.new("L", (2, 2)).save(path, pnginfo=info)


def test_pictures_and_weights_are_read_as_what_they_are(tmp_path: Path) -> None:
    for number, note in enumerate(("hf_oauth_abcdefgh", "https://ada:tiger@host", "swordfish")):
        for kind in ("plain", "compressed", "weights"):
            folder = tmp_path / f"{kind}-{number}"
            folder.mkdir()
            if kind == "weights":
                save_file({"x": torch.zeros(1)}, folder / "w.safetensors", metadata={"by": note})
            else:
                picture(folder / "samples.png", note, kind == "compressed")
            with pytest.raises(PublishError, match="would hold"):
                refuse_secrets(folder)


def test_chance_is_no_secret(tmp_path: Path) -> None:
    """Compressed pixels hold any three letters; only long tokens and known values count there."""
    info = PngInfo()
    info.add(b"prVt", b"\x00hf_aB3\xff")  # bytes that are no text
    Image.new("L", (2, 2)).save(tmp_path / "samples.png", pnginfo=info)
    assert b"hf_aB3" in (tmp_path / "samples.png").read_bytes()
    refuse_secrets(tmp_path)


# ---- trackers -------------------------------------------------------------------------------------------------------


def test_a_tracker_gets_none(tmp_path: Path) -> None:
    trackers = Trackers(Accelerator(cpu=True, log_with="tensorboard", project_dir=str(tmp_path)), wanted=True)
    trackers.open(
        {"report_to": "tensorboard", "seed": 1, **{f"field{i}": text for i, (text, _) in enumerate(SECRETS.values())}}
    )
    trackers.close()
    sent = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"field3" in sent
    assert not [hidden for _, hidden in SECRETS.values() if hidden.encode() in sent]
