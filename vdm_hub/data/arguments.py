"""Which images, or texts, a run or an evaluation reads: the data part of a recipe."""

# ruff: noqa: RUF009 - `option` is dataclasses.field with a help text
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NewType

from vdm_hub.data.kinds import IMAGES, TOKENS, DataKind
from vdm_hub.data.templates import check_template
from vdm_hub.fields import check_fields, option, require

Share = NewType("Share", float)
"""How many images: as a share, a number between 0 and 1; or as a whole number, an ``int``."""


_OF_IMAGES = (
    *("image_column", "label_column", "num_classes", "caption_column", "caption_template", "resolution"),
    *("center_crop", "random_flip", "color", "num_levels", "skip_corrupt_images", "num_workers"),
)


@dataclass(frozen=True)
class DataArguments:
    """Which images, or texts, and what is done to them before they become levels, or tokens."""

    _argument_group_name = "data"

    dataset_name: str | None = option(
        None,
        "A dataset on the Hugging Face Hub, or a folder as for train_data_dir, or 'digits' for scikit-learn's digits, "
        "which need no network.",
    )
    dataset_config_name: str | None = option(None, "The configuration of the dataset, where it has several.")
    train_data_dir: str | None = option(
        None,
        "Instead of dataset_name: a folder of images or of Parquet files, or one Parquet file. Folders train/, "
        "validation/ and test/ in it are splits where they hold all of the images; else all are the split 'train'. "
        "With a tokenizer: a text file, or a folder of text files, of which, where no folders say otherwise, the last "
        "tenth by place is the split 'test', and the one before it 'validation'.",
    )
    image_column: str = option("image", "The column that holds the images.")
    tokenizer: str | None = option(
        None,
        "The data are texts, and this makes tokens of them: 'byte'; 'character', those of the training texts; 'bpe', "
        "byte pairs learned from them; or a folder or a Hub id with a fast tokenizer of transformers.",
    )
    vocabulary_size: int | None = option(
        None,
        "With tokenizer bpe: how many tokens there are, the mask not among them.",
        at_least=258,
        at_most=2**20,
        only_with="tokenizer",
    )
    text_column: str = option(
        "text", "With a tokenizer: the column that holds the texts, of data that have columns.", only_with="tokenizer"
    )
    window_length: int = option(
        128,
        "With a tokenizer: texts are cut into windows of so many tokens.",
        at_least=2,
        at_most=2**20,
        only_with="tokenizer",
    )
    window_context: int = option(
        0,
        "With a tokenizer: how many tokens at the start of a window, the last of the one before, are given and not "
        "scored.",
        at_least=0,
        at_most=2**20 - 1,
        only_with="tokenizer",
    )
    window_shift: bool = option(
        True,
        "With a tokenizer: begin each training window at a random place at each use, up to a window later; what is "
        "measured, and what is streamed, is cut at fixed places.",
        only_with="tokenizer",
    )
    label_column: str | None = option(
        None,
        "The column that holds the images' classes, integers or ClassLabel: the model is then conditioned on them.",
    )
    num_classes: int | None = option(
        None,
        "With a label_column of integers, which has no names: how many classes there are; not given, those that the "
        "training images have. A stream must be told.",
        at_least=1,
        at_most=10**7,
        only_with="label_column",
    )
    caption_column: str | None = option(
        None, "The column that holds the images' captions, texts: the model is then conditioned on them."
    )
    caption_template: str | None = option(
        None,
        "With a label_column of classes with names: make captions of them, such as 'a photo of a {label}', and "
        "condition the model on these instead.",
        only_with="label_column",
    )
    train_split: str = option("train", "The split to train on; slices such as 'train[:90%%]' are understood.")
    validation_split: str | None = option(None, "The split for held-out bits/dim while training.")
    test_split: str | None = option(
        "test", "The split for the evaluation at the end; with 'none', or where there is no test split: see test_size."
    )
    test_size: Share = option(
        Share(0),
        "Without a test split: what to hold out of the training split for the evaluation at the end, a share such as "
        "0.1, or a number of images; the same ones whatever the seed, spread over the classes of a label column. 0 "
        "takes none.",
        at_least=0,
        at_most=10**9,
    )
    validation_size: Share = option(
        Share(0),
        "Without a validation split: what to hold out of the training split for validation, a share such as 0.1 of "
        "what test_size leaves, or a number of images; the same ones whatever the seed. 0 takes none.",
        at_least=0,
        at_most=10**9,
    )
    resolution: int | None = option(
        None,
        "Resize the shorter side to this many pixels, then crop a square. Not given, images are used as they are; "
        "figures on resized images can't be compared with published ones.",
        at_least=1,
        at_most=16_384,
    )
    center_crop: bool = option(
        False, "With a resolution: crop the centre, instead of a random square at each use.", only_with="resolution"
    )
    random_flip: bool = option(False, "Mirror each training image left to right with probability 1/2.")
    color: Literal["auto", "grey", "rgb"] = option(
        "auto", "'auto' keeps grey (mode L) or RGB as found and refuses other modes; 'grey' and 'rgb' convert."
    )
    num_levels: int = option(
        256,
        "K, the number of levels of a channel: level i is stored in an 8-bit image as round(255 i/(K-1)).",
        at_least=2,
        at_most=256,
    )
    streaming: bool = option(False, "Read the training split as a stream, for data that do not fit in memory.")
    shuffle_buffer_size: int = option(
        10_000,
        "With streaming: how many images the shuffle buffer holds.",
        at_least=1,
        at_most=10**8,
        only_with="streaming",
    )
    max_train_samples: int | None = option(None, "Train on this many images only.", at_least=1, at_most=10**12)
    skip_corrupt_images: bool = option(
        False,
        "Train without the images that can't be decoded, instead of stopping at the first. Each training image is "
        "then decoded once more, to find out.",
    )
    num_workers: int = option(0, "Threads that decode images; 0 decodes in the main thread.", at_least=0, at_most=1024)

    def __post_init__(self) -> None:
        require(
            (self.dataset_name is None) != (self.train_data_dir is None),
            "dataset_name",
            self.dataset_name,
            f"give either dataset_name or train_data_dir (which is {self.train_data_dir!r})",
        )
        require(
            self.validation_split is None or not self.validation_size,
            "validation_size",
            self.validation_size,
            f"validation_split is {self.validation_split!r} already, so leave one of the two out",
        )
        check_fields(self)
        require(
            self.caption_column is None or self.label_column is None,
            "caption_column",
            self.caption_column,
            f"label_column is {self.label_column!r}, and a model is conditioned on one of the two: leave one out",
        )
        self._check_kind()
        if self.caption_template is not None:
            check_template(self.caption_template)
        for name in ("test_size", "validation_size"):
            size = getattr(self, name)
            whole_or_share = isinstance(size, int) or size < 1
            require(whole_or_share, name, size, "give a share below 1, such as 0.1, a whole number of images, or 0")

    def _check_kind(self) -> None:
        """Refuse fields of images for texts, and a vocabulary of a size that follows from something else."""
        for name in _OF_IMAGES if self.kind is TOKENS else ():
            require(
                getattr(self, name) == type(self).__dataclass_fields__[name].default,
                name,
                getattr(self, name),
                f"it acts on images, and tokenizer is {self.tokenizer!r}, so that the data are texts: leave one out",
            )
        made = self.tokenizer == "bpe"
        require(
            (self.vocabulary_size is not None) == made,
            "vocabulary_size",
            self.vocabulary_size,
            "tokenizer is 'bpe', so say how many tokens it is to learn, such as 1024"
            if made
            else f"tokenizer is {self.tokenizer!r}, whose size follows from itself, so leave it out",
        )
        require(
            self.window_context < self.window_length,
            "window_context",
            self.window_context,
            f"window_length is {self.window_length}, and what is given is not scored, so give less",
        )

    @property
    def kind(self) -> DataKind:
        """What the data are.

        >>> DataArguments(dataset_name="digits").kind.name, DataArguments("a.txt", tokenizer="byte").kind.name
        ('images', 'tokens')
        """
        return IMAGES if self.tokenizer is None else TOKENS

    @property
    def source(self) -> str:
        """The name of the dataset, or the place of the folder."""
        return self.train_data_dir or str(self.dataset_name)

    @property
    def has_captions(self) -> bool:
        """Whether the images have captions, or are given some."""
        return self.caption_column is not None or self.caption_template is not None
