"""``vdm-hub compress`` and ``decompress``, as a user calls them."""

from __future__ import annotations

import argparse
import csv
import json
import re
import resource
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForMaskedLM

from tiny import tiny_pipeline, tiny_unet
from vdm_hub import (
    Command,
    HVAEPipeline,
    MarkovianHVAE,
    OutputError,
    TokenPipeline,
    VDMHubError,
    VDMPipeline,
    VDMScheduler,
    load_split,
    make_tokenizer,
)
from vdm_hub_codec import Decoded, encode
from vdm_hub_codec.commands import Compress, Decompress
from vdm_hub_codec.decoded_files import write, written


@pytest.fixture
def model(tmp_path: Path) -> str:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def run(command: Command, *words: object) -> None:
    parser = argparse.ArgumentParser()
    command.declare(parser)
    command.run(parser.parse_args([str(word) for word in words]))


def compress(model: str, output: Path, *more: str) -> None:
    words = [model, "--dataset_name", "digits", "--split", "test[:6]", "-o", output, "--transitions", "4"]
    run(Compress(), *words, *more)


def text_model(text: str) -> TokenPipeline:
    words = make_tokenizer("character", lambda: [text])
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=12, **sizes)
    process = {"name": "absorbing", "package": "vdm-hub-tokens"}
    scheduler = VDMScheduler(num_levels=len(words) - 1, forward_process=process)
    windows = {"length": 12, "context": 0, "text_column": "text"}
    return TokenPipeline(BertForMaskedLM(config).eval(), words, scheduler, windows=windows)


@pytest.mark.parametrize("output", ["again", "again.parquet"])
def test_images_come_back_as_they_are_read(model: str, tmp_path: Path, output: str) -> None:
    file, again = tmp_path / "digits.vdmz", tmp_path / output
    compress(model, file)
    run(Decompress(), file, "-o", again, "--batch_size", 2)
    expected = load_split("digits", "test[:6]", num_levels=17).levels
    found = load_split(str(again), "train", num_levels=17).levels
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


def test_the_report_is_one_object_with_what_others_make(model: str, tmp_path: Path, capsys: Any) -> None:
    compress(model, tmp_path / "a.vdmz", "--json", "--compare")
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == (tmp_path / "a.vdmz").stat().st_size
    assert {"PNG, each", "PNG, a sheet", "WEBP, each", "WEBP, a sheet"} <= told["others"].keys()


def test_pictures_of_lengths_and_of_what_is_known_on_the_way(model: str, tmp_path: Path, capsys: Any) -> None:
    file, plot, steps = (tmp_path / name for name in ("a.vdmz", "lengths.png", "steps.png"))
    compress(model, file, "--json", "--length_plot", str(plot))
    lengths, errors = zip(*json.loads(capsys.readouterr().out)["lengths"].values(), strict=True)
    assert list(lengths) == sorted(lengths, reverse=True) and plot.stat().st_size > 1000
    assert min(errors) > 0 and errors[-1] < 0.05 * lengths[-1]
    run(Decompress(), file, "-o", tmp_path / "again", "--progressive", steps)
    HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)])).save_pretrained(
        tmp_path / "vae"
    )
    words = ["--dataset_name", "digits", "--split", "test[:2]", "-o", tmp_path / "vae.vdmz"]
    run(Compress(), tmp_path / "vae", *words)
    with pytest.raises(VDMHubError, match="gamma"):
        run(Decompress(), tmp_path / "vae.vdmz", "-o", tmp_path / "none", "--progressive", tmp_path / "none.png")
    assert not (tmp_path / "none").exists() and not (tmp_path / "none.png").exists()
    assert steps.stat().st_size > 1000 and "0.000 levels off" in capsys.readouterr().out


def test_a_full_disk_at_the_plot_leaves_the_file_and_its_report(model: str, tmp_path: Path, capsys: Any) -> None:
    kept, plot = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "lengths.png"
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, kept[1]))  # room for the file, and none for the plot
        with pytest.raises(OutputError, match=re.escape("lengths.png")):
            compress(model, tmp_path / "a.vdmz", "--length_plot", str(plot))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert not plot.exists() and (tmp_path / "a.vdmz").exists()
    said = capsys.readouterr().out
    assert "bits/dim" in said and "by 6 of the data" in said and "32 of" not in said


def test_classes_come_back_with_their_names(tmp_path: Path, capsys: Any) -> None:
    """By the model's own numbers, whose order is not that of the dataset."""
    names = [str(9 - number) for number in range(10)]
    classes = {"count": 10, "names": names, "dropout": 0.1, "column": "label"}
    pipe = VDMPipeline(tiny_unet(num_class_embeds=11), VDMScheduler(num_levels=17), classes=classes)
    pipe.save_pretrained(tmp_path / "told")
    compress(str(tmp_path / "told"), tmp_path / "a.vdmz")
    assert "the classes of the images" in capsys.readouterr().out
    given = load_split("digits", "test[:6]", num_levels=17, label_column="label")
    assert given.labels is not None
    labels = 9 - given.labels
    for name in ("again", "again.parquet"):
        run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / name)
        found = load_split(str(tmp_path / name), "train", num_levels=17, label_column="label")
        assert found.labels is not None and torch.equal(found.labels, labels)
        assert torch.equal(torch.as_tensor(found.levels), torch.as_tensor(given.levels))
    assert found.class_names == tuple(names)
    rows = list(csv.DictReader((tmp_path / "again" / "metadata.csv").open()))
    assert [row["label_name"] for row in rows] == [names[number] for number in labels]
    compress(str(tmp_path / "told"), tmp_path / "b.vdmz", "--untold")
    assert "class of no image" in capsys.readouterr().out
    run(Decompress(), tmp_path / "b.vdmz", "-o", tmp_path / "untold")
    assert not (tmp_path / "untold" / "metadata.csv").exists()


def test_several_texts_come_back_in_a_folder_and_as_rows(tmp_path: Path, capsys: Any) -> None:
    texts = ["a bad cab", "faced\r\na bag", "fed"]
    text_model("".join(texts)).save_pretrained(tmp_path / "texts")
    rows = [{"text": text} for text in ["", *texts]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [tmp_path / "texts", "--dataset_name", tmp_path / "rows.jsonl", "--split", "train"]
    run(Compress(), *words, "-o", tmp_path / "a.vdmz", "--compare")
    said = capsys.readouterr()
    assert "1 of 4 documents are empty" in said.err and "bits/token" in said.out
    run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / "again")
    files = sorted((tmp_path / "again").iterdir())
    assert [file.read_bytes().decode() for file in files] == texts
    run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / "again.parquet")
    assert datasets.Dataset.from_parquet(str(tmp_path / "again.parquet"))["text"][:] == texts
    with pytest.raises(VDMHubError, match="several texts"):
        run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / "again.txt")
    with pytest.raises(VDMHubError, match="label_column"):
        run(Compress(), *words, "-o", tmp_path / "b.vdmz", "--label_column", "label")


def test_nothing_is_written_where_something_is_wrong(model: str, tmp_path: Path) -> None:
    file = tmp_path / "a.vdmz"
    compress(model, file)
    tiny_pipeline(noise_schedule="cosine").save_pretrained(tmp_path / "other")
    content = file.read_bytes()
    (tmp_path / "cut.vdmz").write_bytes(content[:-9])
    (tmp_path / "other.vdmz").write_bytes(b"PNG" + content)
    folder = tmp_path / "x"
    for command, words, said in (
        (Decompress(), (tmp_path / "cut.vdmz", "-o", folder), "cut off"),
        (Decompress(), (tmp_path / "other.vdmz", "-o", folder), "VDMZ"),
        (Decompress(), (tmp_path / "none.vdmz", "-o", folder), "none.vdmz"),
        (Decompress(), (file, "-o", folder, "--model", tmp_path / "other"), model),
        (Decompress(), (file, "-o", tmp_path / "x.txt"), "a folder or a .parquet file"),
        (Decompress(), (file, "-o", tmp_path / "x.csv"), ".csv"),
        (Decompress(), (file, "-o", tmp_path / "x", "--blocks", "7"), "[7]"),
        (Decompress(), (file, "-o", tmp_path / "x", "--blocks", "0", "--progressive", tmp_path / "x.png"), "--blocks"),
        (Decompress(), (file, "-o", tmp_path / "x.png", "--progressive", tmp_path / "x.png"), ".png"),
        (Compress(), (model, "--dataset_name", "digits", "-o", tmp_path / "y.vdmz", "--text_column", "a"), "text_col"),
        (Compress(), (model, "--dataset_name", "digits", "-o", file), "exists"),
    ):
        with pytest.raises(VDMHubError, match=re.escape(said)):
            run(command, *words)
    assert not any((tmp_path / name).exists() for name in ("x", "x.txt", "x.csv", "x.png", "y.vdmz"))


def test_a_model_that_is_not_there_is_named(model: str, tmp_path: Path) -> None:
    compress(model, tmp_path / "a.vdmz")
    Path(model).rename(tmp_path / "moved")
    with pytest.raises(VDMHubError, match=re.escape(f"made with the model {model} (fingerprint ")) as caught:
        run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / "x")
    assert "--model" in str(caught.value)
    run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / "x", "--model", tmp_path / "moved")
    pipe = tiny_pipeline()
    (tmp_path / "b.vdmz").write_bytes(encode(pipe, torch.zeros(1, *pipe.image_shape, dtype=torch.long))[0])
    with pytest.raises(VDMHubError, match="without a name") as caught:
        run(Decompress(), tmp_path / "b.vdmz", "-o", tmp_path / "y")
    assert "--model" in str(caught.value)


def test_images_and_texts_are_read_as_the_options_say(model: str, tmp_path: Path) -> None:
    pixels = torch.arange(16 * 16).reshape(16, 16).remainder(2).numpy().astype("uint8")
    picture = Image.fromarray(pixels * 255).convert("RGB")
    datasets.Dataset.from_dict(
        {"pic": [picture] * 2}, features=datasets.Features({"pic": datasets.Image()})
    ).to_parquet(tmp_path / "rows.parquet")
    words = [model, "--dataset_name", tmp_path / "rows.parquet", "--split", "train", "-o", tmp_path / "a.vdmz"]
    run(Compress(), *words, "--image_column", "pic", "--color", "grey", "--resolution", 8)
    run(Decompress(), tmp_path / "a.vdmz", "-o", tmp_path / "again")
    assert torch.as_tensor(load_split(str(tmp_path / "again"), "train", num_levels=17).levels).shape == (2, 1, 8, 8)
    text_model("abc def").save_pretrained(tmp_path / "texts")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"said": "a bad cab"}) + "\n")
    rows = [
        tmp_path / "texts",
        "--dataset_name",
        tmp_path / "rows.jsonl",
        "--split",
        "train",
        "-o",
        tmp_path / "b.vdmz",
    ]
    run(Compress(), *rows, "--text_column", "said")
    run(Decompress(), tmp_path / "b.vdmz", "-o", tmp_path / "again.txt")
    assert (tmp_path / "again.txt").read_text() == "a bad cab"


@pytest.mark.parametrize("name", ["again", "again.parquet", "again.txt"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, name: str) -> None:
    place, kept = tmp_path / name, resource.getrlimit(resource.RLIMIT_FSIZE)
    found = Decoded(torch.zeros(3, 1, 8, 8, dtype=torch.long)) if name != "again.txt" else Decoded(texts=["ab" * 99])
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, kept[1]))
        with pytest.raises(OutputError, match="make room"), written(place) as beside:
            write(found, tiny_pipeline(), beside, place.suffix)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert list(tmp_path.iterdir()) == []
