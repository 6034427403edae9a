"""From datasets to levels to batches: exact pixels, clear refusals, and the laws of the batch source."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from image_folders import refused
from naming import naming
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.batches import ShuffledBatches, StreamedBatches, evaluation_batches, training_batches
from vdm_hub.data.digits import digits
from vdm_hub.data.images import ImageLevels, ImageReader, ImageStream
from vdm_hub.data.levels import image_from_levels, levels_from_image, pixel_values
from vdm_hub.data.loading import load_data, load_split


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        # `datasets` sleeps for 5 s at the end of each epoch of a Parquet stream.
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
        yield


def numbered(count: int) -> ImageLevels:
    """Images of 1 x 2 pixels: the number, and 0; so that an image and its mirror can be told apart."""
    levels = torch.zeros(count, 1, 1, 2, dtype=torch.uint8)
    levels[:, 0, 0, 0] = torch.arange(1, count + 1)
    return ImageLevels(levels, (1, 1, 2), 256, labels=torch.arange(1, count + 1))


def parquet_folder(folder: Path, count: int = 60, shards: int = 3) -> Path:
    """Grey images of 2 x 2 pixels, all of the image's number, in several files."""
    images = [Image.new("L", (2, 2), i) for i in range(count)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    whole = datasets.Dataset.from_dict({"image": images, "label": list(range(count))}, features=features)
    for shard in range(shards):
        part = whole.shard(shards, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05d}-of-{shards:05d}.parquet")
    return folder


def png_folder(folder: Path, *images: Image.Image) -> str:
    for i, image in enumerate(images):
        image.save(folder / f"{i:03d}.png" if image.mode != "CMYK" else folder / f"{i:03d}.tiff")
    return str(folder)


# --- pixels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_levels", range(2, 257))
def test_levels_are_stored_at_distinct_bytes_by_the_one_formula(num_levels: int) -> None:
    values = pixel_values(num_levels).tolist()
    assert values == [round(255 * i / (num_levels - 1)) for i in range(num_levels)]
    assert values == sorted(set(values)) and (values[0], values[-1]) == (0, 255)


@given(st.integers(2, 256), st.sampled_from([1, 3]), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_images_give_back_their_levels_through_png(k: int, channels: int, height: int, width: int, seed: int) -> None:
    levels = np.random.default_rng(seed).integers(0, k, (channels, height, width), dtype=np.uint8)
    file = io.BytesIO()
    image_from_levels(levels, k).save(file, "png")
    back = levels_from_image(Image.open(file), k)
    assert back.dtype == np.uint8 and np.array_equal(back, levels)


@given(st.integers(2, 255), st.integers(0, 255))
def test_a_pixel_is_a_level_or_refused(num_levels: int, value: int) -> None:
    image = Image.new("L", (2, 2), 0)
    image.putpixel((1, 0), value)
    if value in pixel_values(num_levels):
        assert pixel_values(num_levels)[levels_from_image(image, num_levels)[0, 0, 1]] == value
    else:
        message = refused(levels_from_image, image, num_levels, name="image 7")
        assert (
            f"image 7 has the pixel value {value} at row 0, column 1" in message and f"{num_levels} levels" in message
        )


def test_levels_out_of_range_make_no_image() -> None:
    assert "0..16" in refused(image_from_levels, np.full((1, 2, 2), 17), 17)
    assert "float64" in refused(image_from_levels, np.zeros((1, 2, 2)), 17)
    assert "(2, 2)" in refused(image_from_levels, np.zeros((2, 2), dtype=int), 17)


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_other_modes_are_refused_unless_a_color_is_asked_for(mode: str) -> None:
    grey = Image.linear_gradient("L")
    image = Image.new("I;16", (4, 4)) if mode == "I;16" else grey.convert("RGB").convert(mode)
    assert mode in refused(levels_from_image, image, 256)
    if mode == "I;16":
        assert "8 bits" in refused(levels_from_image, image, 256, color="grey")
    else:
        assert levels_from_image(image, 256, color="grey").shape == (1, 256, 256)
        assert levels_from_image(image, 256, color="rgb").shape == (3, 256, 256)
    if mode in ("LA", "RGBA", "P"):
        assert np.array_equal(levels_from_image(image, 256, color="grey")[0], np.asarray(image.convert("L")))


def test_transparent_pixels_are_never_dropped() -> None:
    image = Image.new("RGBA", (2, 2), (1, 2, 3, 128))
    assert "transparent" in refused(levels_from_image, image, 256, color="rgb")


# --- datasets -----------------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_levels_in_its_split() -> None:
    loaded = load_digits()
    train, test = train_test_split(loaded.images.astype(np.uint8), test_size=360, random_state=0)
    data = load_data(DataArguments(dataset_name="digits", num_levels=17))
    assert isinstance(data.train, ImageLevels) and isinstance(data.test, ImageLevels)
    assert np.array_equal(data.train.levels[:, 0], train) and np.array_equal(data.test.levels[:, 0], test)
    assert data.validation is None and data.shape == (1, 8, 8) and data.num_levels == 17
    assert digits()["test"][0]["image"].mode == "L"
    part = load_split("digits", "train[100:200]", num_levels=17, label_column="label")
    assert torch.equal(part.levels, data.train.levels[100:200])
    assert part.labels is not None and part.labels.tolist() == digits()["train"]["label"][100:200]


def test_cifar10_keeps_its_exact_bytes(data_folder: Path) -> None:
    images = load_split(str(data_folder / "cifar10"), "test[:500]", label_column="label")
    file = data_folder / "cifar10" / "test-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(file)).cast_column("image", datasets.Image(decode=False))[:500]
    expected = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in rows["image"]])
    assert np.array_equal(images.levels, expected.transpose(0, 3, 1, 2))
    assert images.labels is not None and images.labels.tolist() == rows["label"]


def test_mnist_prefix_is_grey_and_256_levels(data_folder: Path) -> None:
    images = load_split(str(data_folder / "mnist"), "train[:1000]")
    assert images.image_shape == (1, 28, 28) and isinstance(images.levels, torch.Tensor)
    assert float(images.levels.float().mean()) / 255 == pytest.approx(0.1307, abs=0.01)
    assert "pixel value" in refused(load_split, str(data_folder / "mnist"), "train[:10]", num_levels=2)


def test_held_out_images_are_disjoint_and_always_the_same(tmp_path: Path) -> None:
    arguments = DataArguments(train_data_dir=str(parquet_folder(tmp_path)), validation_size=13, test_split=None)
    first, second = load_data(arguments), load_data(arguments)
    assert isinstance(first.train, ImageLevels) and isinstance(first.validation, ImageLevels)
    train, held = (images.levels[:, 0, 0, 0].tolist() for images in (first.train, first.validation))
    assert len(held) == 13 and sorted(train + held) == list(range(60))
    assert isinstance(second.validation, ImageLevels)
    assert torch.equal(first.validation.levels, second.validation.levels)
    assert held != list(range(13)) and held != list(range(47, 60))


def test_a_parquet_file_and_a_limit(tmp_path: Path) -> None:
    folder = parquet_folder(tmp_path)
    images = load_split(str(folder / "train-00001-of-00003.parquet"), "train", max_samples=5)
    assert images.levels[:, 0, 0, 0].tolist() == [20, 21, 22, 23, 24]
    data = load_data(DataArguments(train_data_dir=str(folder), max_train_samples=7, test_split="train[50:]"))
    assert isinstance(data.train, ImageLevels) and isinstance(data.test, ImageLevels)
    assert (len(data.train), len(data.test)) == (7, 10)


def test_a_folder_of_images_without_a_test_split_trains_with_a_warning(tmp_path: Path) -> None:
    folder = png_folder(tmp_path, *(Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(5)))
    with pytest.warns(UserWarning, match=naming("--test_split")):
        data = load_data(DataArguments(train_data_dir=folder))
    assert data.test is None and data.shape == (3, 4, 4)
    assert "'tset'" in refused(load_data, DataArguments(train_data_dir=folder, test_split="tset"))


def test_resizing_warns_and_cropping_keeps_pixels(tmp_path: Path) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (8, 12), dtype=np.uint8)
    tall = Image.fromarray(wide).transpose(Image.Transpose.TRANSPOSE)
    folder = png_folder(tmp_path, Image.fromarray(wide), tall)
    with pytest.warns(UserWarning, match="published"):
        centre = load_split(folder, "train", resolution=8)
    assert np.array_equal(centre.levels[0, 0], wide[:, 2:10]) and np.array_equal(centre.levels[1, 0], wide[:, 2:10].T)
    with pytest.warns(UserWarning, match="12 x 8"):
        data = load_data(DataArguments(train_data_dir=folder, resolution=8, test_split=None))
    batches = training_batches(data.train, 2, seed=0)
    crops = {tuple(b["levels"].flatten(1).sum(1).sort().values.tolist()) for b in islice(batches.batches(), 12)}
    assert len(crops) > 3, "each use draws its own crop"
    with pytest.warns(UserWarning):
        assert load_split(folder, "train", resolution=4).levels.shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    "more", [{}, {"streaming": True}, {"test_split": None, "validation_size": 1}, {"test_size": 1}]
)
def test_resizing_is_said_once_whatever_splits_there_are(tmp_path: Path, more: dict[str, object]) -> None:
    for split, width in (("train", 9), ("validation", 12), ("test", 10)):
        for name in "ab":
            (tmp_path / split).mkdir(exist_ok=True)
            Image.new("L", (width, 8)).save(tmp_path / split / f"{name}.png")
    splits: dict[str, Any] = {"validation_split": None if "validation_size" in more else "validation"}
    with pytest.warns(UserWarning) as warned:
        load_data(DataArguments(train_data_dir=str(tmp_path), resolution=8, **splits | more))
    said = [str(one.message) for one in warned if "are resized" in str(one.message)]
    assert len(said) == 1 and "9 x 8 pixels" in said[0]


def test_equal_resolution_changes_nothing(recwarn: pytest.WarningsRecorder) -> None:
    as_is, asked = (load_split("digits", "test", num_levels=17, resolution=r) for r in (None, 8))
    assert torch.equal(as_is.levels, asked.levels)  # type: ignore[arg-type]
    assert not [w for w in recwarn if "resized" in str(w.message)]


def test_bad_datasets_are_named(tmp_path: Path) -> None:
    folder = str(parquet_folder(tmp_path))
    assert "image, label" in refused(load_split, folder, "train", image_column="img")
    assert "not images" in refused(load_split, folder, "train", image_column="label")
    message = refused(load_split, folder, "tain")
    assert "'tain'" in message and "it has train;" in message
    assert "'tain'" in refused(load_data, DataArguments(train_data_dir=folder, train_split="tain", streaming=True))
    assert "train, test" in refused(load_split, "digits", "tain")
    assert "no images" in refused(load_split, folder, "train[:0]")
    assert "no images" in refused(load_split, "digits", "train[:0]", num_levels=17)
    assert "nowhere" in refused(load_data, DataArguments(train_data_dir=str(tmp_path / "nowhere")))
    assert "has the pixel value" in refused(load_split, "digits", "train", num_levels=16)
    assert "hold out fewer" in refused(load_data, DataArguments(train_data_dir=folder, validation_size=60))


def test_mixed_images_are_named_with_what_to_do(tmp_path: Path) -> None:
    small, large = Image.new("L", (4, 4)), Image.new("L", (6, 5))
    (tmp_path / "sizes").mkdir()
    message = refused(load_split, png_folder(tmp_path / "sizes", small, small, large), "train")
    assert (
        "image 0 (000.png) is grey, 4 x 4 and image 2 (002.png) is grey, 6 x 5" in message and "resolution" in message
    )
    (tmp_path / "modes").mkdir()
    folder = png_folder(tmp_path / "modes", small, Image.new("RGB", (4, 4)))
    message = refused(load_split, folder, "train")
    assert "image 0 (000.png) is grey" in message and "image 1 (001.png) is RGB" in message and "color" in message
    assert load_split(folder, "train", color="rgb").image_shape == (3, 4, 4)


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    folder = Path(png_folder(tmp_path, *[Image.effect_noise((32, 32), 50)] * 3))
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:200])
    assert "001.png) of the dataset can't be decoded" in (said := refused(load_split, str(folder), "train"))
    assert "image 1 (" in said


def test_an_unreachable_dataset_is_one_paragraph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    message = refused(load_split, "nobody/no-such-dataset", "train")
    assert "'nobody/no-such-dataset'" in message and "--train_data_dir" in message


# --- the batch source ---------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4)).filter(lambda s: s[0] >= s[1] * s[2])
seeds = st.integers(0, 2**63)


@given(sizes, seeds, st.integers(0, 3), st.booleans())
def test_an_epoch_has_every_image_once_over_all_ranks_but_the_last_incomplete_batch(
    size: tuple[int, int, int], seed: int, epoch: int, flip: bool
) -> None:
    count, batch_size, world_size = size
    seen: list[int] = []
    for rank in range(world_size):
        batches = ShuffledBatches(
            numbered(count), batch_size, seed=seed, rank=rank, world_size=world_size, random_flip=flip
        )
        steps = count // (batch_size * world_size)
        assert batches.steps_per_epoch == steps
        for step in range(epoch * steps, (epoch + 1) * steps):
            batch = batches.batch(step)
            assert batch["levels"].shape == (batch_size, 1, 1, 2) and batch["levels"].dtype == torch.uint8
            numbers = batch["levels"].amax(dim=(1, 2, 3)).tolist()
            assert numbers == batch["class_labels"].tolist()
            seen += numbers
    assert len(seen) == len(set(seen)) == count - count % (batch_size * world_size)
    assert set(seen) <= set(range(1, count + 1))


@given(sizes, seeds, st.integers(0, 40), st.booleans())
def test_processes_see_the_slices_of_what_one_process_sees(
    size: tuple[int, int, int], seed: int, step: int, flip: bool
) -> None:
    count, batch_size, world_size = size
    images = numbered(count)
    whole = ShuffledBatches(images, batch_size * world_size, seed=seed, random_flip=flip).batch(step)["levels"]
    parts = [
        ShuffledBatches(images, batch_size, seed=seed, rank=rank, world_size=world_size, random_flip=flip).batch(step)
        for rank in range(world_size)
    ]
    assert torch.equal(torch.cat([part["levels"] for part in parts]), whole)


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 4), seeds)
def test_processes_and_accumulation_steps_divide_a_global_batch_alike(
    count: int, batch_size: int, parts: int, seed: int
) -> None:
    """Over several epochs; and no optimiser step holds an image twice."""
    assume(count >= batch_size * parts)
    images, steps = numbered(count), 3 * (count // (batch_size * parts)) + 1
    one = ShuffledBatches(images, batch_size, seed=seed, accumulation=parts)
    several = [ShuffledBatches(images, batch_size, seed=seed, rank=r, world_size=parts) for r in range(parts)]
    for step in range(steps):
        accumulated = [one.batch(step * parts + part)["class_labels"].tolist() for part in range(parts)]
        assert accumulated == [source.batch(step)["class_labels"].tolist() for source in several]
        numbers = [number for part in accumulated for number in part]
        assert len(set(numbers)) == len(numbers)


@given(sizes, seeds, st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_stream_is_divided_alike_whatever_its_shards(
    size: tuple[int, int, int], seed: int, accumulation: int
) -> None:
    count, batch_size, world_size = size
    assume(count >= batch_size * world_size * accumulation)
    shards = [list(range(count))[start::3] for start in range(3)]  # unequal, some perhaps empty

    def rows(shards: list[list[int]]) -> Iterator[dict[str, int]]:
        for shard in shards:
            yield from ({"number": number} for number in shard)

    dataset = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": shards})
    stream = ImageStream(dataset, "number", (1, 1, 1), 256, ImageReader(), shuffle_buffer_size=7)

    def numbers(batch: int, rank: int, world: int, parts: int) -> list[list[int]]:
        source = StreamedBatches(stream, batch, seed=seed % 2**32, rank=rank, world_size=world, accumulation=parts)
        steps = 2 * (count // (batch_size * world_size * accumulation)) * parts
        return [[row["number"] for row in part] for part in islice(source._rows(), steps)]

    ranks = [numbers(batch_size, rank, world_size, accumulation) for rank in range(world_size)]
    alone = numbers(batch_size, 0, 1, accumulation * world_size)
    assert [part for parts in zip(*ranks, strict=True) for part in parts] == alone
    epoch = [number for part in alone[: len(alone) // 2] for number in part]
    assert len(set(epoch)) == len(epoch) == count - count % (batch_size * world_size * accumulation)


@given(sizes, seeds, st.integers(0, 30))
def test_a_restart_equals_continuing(size: tuple[int, int, int], seed: int, start: int) -> None:
    count, batch_size, _ = size
    images = numbered(count)
    continued = ShuffledBatches(images, batch_size, seed=seed, random_flip=True).batches()
    restarted = ShuffledBatches(images, batch_size, seed=seed, random_flip=True).batches(start_step=start)
    for one, other in zip(islice(continued, start, start + 12), restarted, strict=False):
        assert torch.equal(one["levels"], other["levels"])


def test_epochs_and_seeds_differ_and_half_of_the_images_are_mirrored() -> None:
    def epoch(seed: int, number: int, flip: bool = True) -> torch.Tensor:
        return ShuffledBatches(numbered(200), 200, seed=seed, random_flip=flip).batch(number)["levels"]

    assert not torch.equal(epoch(0, 0).amax(3), epoch(0, 1).amax(3))
    assert not torch.equal(epoch(0, 0).amax(3), epoch(1, 0).amax(3))
    mirrored = torch.stack([epoch(0, number)[:, 0, 0, 0] == 0 for number in range(20)]).float()
    assert abs(float(mirrored.mean()) - 0.5) < 0.05  # 6 standard deviations of 4,000 draws
    assert bool((epoch(0, 0, flip=False)[:, 0, 0, 0] > 0).all())


def test_too_few_images_for_a_batch_are_refused() -> None:
    message = refused(ShuffledBatches, numbered(7), 4, seed=0, world_size=2)
    assert "7 training images" in message and "train_batch_size to at most 3" in message


@pytest.mark.parametrize(("count", "held_out", "most"), [(45, 256, 173), (127, 1, 0), (0, 128, 0)])
def test_too_few_images_since_others_are_held_out_names_that_field(count: int, held_out: int, most: int) -> None:
    message = refused(ShuffledBatches, numbered(count), 128, seed=0, held_out=held_out)
    assert f"{held_out} of the {count + held_out}" in message and "validation_size" in message
    assert f"hold out at most {most} images" in message


def test_no_field_is_named_that_would_not_help() -> None:
    message = refused(ShuffledBatches, numbered(3), 128, seed=0, held_out=10)
    assert "validation_size" not in message and "train_batch_size to at most 3" in message
    message = refused(ShuffledBatches, numbered(1), 4, seed=0, world_size=2)
    assert "train_batch_size" not in message and "more images" in message


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 4))
def test_evaluation_has_every_image_once_with_its_index(count: int, batch_size: int, world_size: int) -> None:
    images = numbered(count)
    seen = []
    for rank in range(world_size):
        for batch in evaluation_batches(images, batch_size, rank=rank, world_size=world_size):
            assert 1 <= len(batch["indices"]) <= batch_size
            assert torch.equal(batch["levels"][:, 0, 0, 0].long(), batch["indices"] + 1)
            seen += batch["indices"].tolist()
    assert sorted(seen) == list(range(count))


# --- streams ------------------------------------------------------------------------------------------------------


def stream(folder: Path, **arguments: object) -> tuple[ImageStream, ImageLevels | None]:
    given_ = {"test_split": None, "streaming": True, "shuffle_buffer_size": 16} | arguments
    data = load_data(DataArguments(train_data_dir=str(folder), **given_))  # type: ignore[arg-type]
    assert isinstance(data.train, ImageStream) and not isinstance(data.validation, ImageStream)
    return data.train, data.validation


def numbers(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [number for batch in batches for number in batch["levels"][:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_streams_are_disjoint_over_ranks_and_reshuffled(tmp_path: Path, world_size: int) -> None:
    images, _ = stream(parquet_folder(tmp_path))
    per_rank = 60 // world_size
    ranks = [
        numbers(
            list(islice(StreamedBatches(images, 5, seed=3, rank=r, world_size=world_size).batches(), per_rank // 5))
        )
        for r in range(world_size)
    ]
    assert sorted(number for rank in ranks for number in rank) == list(range(60))
    one = StreamedBatches(images, 5, seed=3, world_size=world_size)
    twice = numbers(list(islice(one.batches(), 2 * per_rank // 5)))
    assert twice[:per_rank] == ranks[0] != sorted(ranks[0])
    assert twice[per_rank:] != ranks[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_restarts_where_it_was(tmp_path: Path, num_workers: int) -> None:
    images, _ = stream(parquet_folder(tmp_path), num_workers=num_workers, random_flip=True)
    batches = StreamedBatches(images, 7, seed=1, random_flip=True)
    continued = numbers(list(islice(batches.batches(), 20)))
    assert numbers(list(islice(StreamedBatches(images, 7, seed=1).batches(13), 7))) == continued[13 * 7 :]


@pytest.mark.parametrize("world_size", [1, 3])
def test_streams_never_train_on_what_is_held_out(tmp_path: Path, world_size: int) -> None:
    images, held_out = stream(parquet_folder(tmp_path), validation_size=6)
    assert held_out is not None and sorted(held_out.levels[:, 0, 0, 0].tolist()) == list(range(6))  # type: ignore[call-overload]
    seen: set[int] = set()
    for rank in range(world_size):
        batches = StreamedBatches(images, 2, seed=0, rank=rank, world_size=world_size)
        seen |= set(numbers(list(islice(batches.batches(), 2 * 54 // (2 * world_size)))))
    assert seen == set(range(6, 60))


def test_a_stream_is_evaluated_in_order_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    images, _ = stream(parquet_folder(tmp_path))
    for rank in range(2):
        batches = list(evaluation_batches(images, 8, rank=rank, world_size=2))
        assert numbers(batches) == torch.cat([b["indices"] for b in batches]).tolist() == list(range(rank, 60, 2))
    batches = StreamedBatches(images, 100, seed=0).batches()
    assert "60 training images" in refused(next, batches)
