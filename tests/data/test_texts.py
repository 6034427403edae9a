"""Texts as windows of tokens: each byte counted once, nothing lost unsaid."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from naming import naming
from tiny_text import tiny_tokenizer
from vdm_hub.data.arguments import DataArguments
from vdm_hub.data.batches import training_batches
from vdm_hub.data.loading import load_data
from vdm_hub.data.sequences import Cut, TokenWindows, encode_after, encode_each, encode_texts
from vdm_hub.data.text_loading import load_windows
from vdm_hub.data.texts import read_text
from vdm_hub.data.tokenization import END, MASK, UNKNOWN, Tokenization, make_tokenizer, open_tokenizer, with_mask
from vdm_hub.errors import CheckpointError, ConfigurationError, DataError
from vdm_hub.likelihood.report import LikelihoodReport

BYTE = Tokenization(make_tokenizer("byte"))
TEXT = "The rain in Spain stays mainly in the plain. " * 20


def scored(windows: TokenWindows) -> list[int]:
    """The tokens that the windows score, in their order."""
    batch = windows.take(torch.arange(len(windows)))
    given_sites = batch.get("given", torch.zeros_like(batch["levels"], dtype=torch.bool))
    return batch["levels"][~given_sites].tolist()


def run_data(path: Path, **fields: Any) -> Any:
    return load_data(DataArguments(str(path), **{"tokenizer": "byte", "window_length": 8} | fields))


# ---- windows --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=1, max_size=60), length=st.integers(2, 20), data=st.data())
def test_each_byte_is_counted_once(text: str, length: int, data: Any) -> None:
    cut = Cut(length, data.draw(st.integers(0, length - 1)))
    try:
        size = len(text.encode())
    except UnicodeEncodeError:  # half of a pair of surrogates is no text
        return
    windows = encode_texts([text], BYTE, cut)
    units = windows.units(len(windows))
    assert scored(windows) == windows.tokens.tolist() == list(text.encode())
    assert units.per_datum * len(windows) == pytest.approx(size)
    assert units.bytes_per_value is not None and units.bytes_per_value * units.per_datum * len(windows) == (
        pytest.approx(size)
    )


def test_a_window_is_given_what_comes_before_it() -> None:
    windows = encode_texts(["abcdefghij"], BYTE, Cut(4, 2))
    batch = windows.take(torch.arange(len(windows)))
    assert ["".join(map(chr, row)) for row in batch["levels"].tolist()] == ["abcd", "cdef", "efgh", "ghij"]
    assert batch["given"].sum(1).tolist() == [0, 2, 2, 2]


def test_a_short_text_is_filled_up_and_what_fills_it_is_given() -> None:
    batch = encode_texts(["ab"], BYTE, Cut(4)).take(torch.arange(1))
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0]]
    assert batch["given"].tolist() == [[False, False, True, True]]


@given(texts=st.integers(1, 6).flatmap(lambda size: st.tuples(*[st.text("abc", min_size=size, max_size=size)] * 2)))
def test_what_fills_a_window_tells_nothing_of_the_text(texts: tuple[str, str]) -> None:
    """A network that reads what its mask hides is told the number of tokens, and no token."""
    for name in ("byte", "character"):
        words = Tokenization(make_tokenizer(name, lambda: ["abc"]))
        first, second = (encode_texts([text], words, Cut(8)).take(torch.arange(1)) for text in texts)
        filled = first["attention_mask"] == 0
        assert torch.equal(first["levels"][filled], second["levels"][filled]) and int(filled.sum()) == 8 - len(
            texts[0]
        )
        assert int(first["levels"].max()) < words.num_values


def test_documents_are_joined_by_their_ends_which_stand_for_no_byte() -> None:
    windows = encode_texts(["abc", "de"], BYTE, Cut(4))
    assert BYTE.decode(windows.tokens) == f"abc{END}de{END}"
    units = windows.units(len(windows))
    assert units.bytes_per_value == pytest.approx(5 / 7)


def test_shifted_windows_lie_within_the_text_and_begin_anywhere() -> None:
    windows = encode_texts([TEXT], BYTE, Cut(16), shifted=True)
    draws = torch.rand(len(windows), 2, generator=torch.Generator().manual_seed(0))
    rows = [bytes(row).decode() for row in windows.take(torch.arange(len(windows)), draws)["levels"].tolist()]
    assert all(row in TEXT for row in rows)
    fixed = windows.take(torch.arange(len(windows)))["levels"]
    assert fixed[:-1].flatten().tolist() == list(TEXT.encode())[: fixed[:-1].numel()]
    assert len({TEXT.index(row) % 16 for row in rows}) > 4


def test_many_processes_train_on_the_windows_of_one() -> None:
    windows = encode_texts([TEXT], BYTE, Cut(16), shifted=True)
    one = training_batches(windows, 4, seed=3)
    two = [training_batches(windows, 2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    for batches in itertools.islice(zip(one.batches(), *(part.batches() for part in two), strict=False), 30):
        assert torch.equal(batches[0]["levels"], torch.cat([batch["levels"] for batch in batches[1:]]))


# ---- tokenizers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["byte", "character", "bpe"])
def test_a_made_tokenizer_gives_the_text_back(name: str) -> None:
    text = "naïve ☃ snow\r\nman \t[MASK] 😀 " * 30
    tokenization = open_tokenizer(name, lambda: [text], 400 if name == "bpe" else None)
    encoded = tokenization.encode(text)
    assert tokenization.decode(encoded.levels.tolist()) == text and not encoded.altered and not encoded.unknown
    assert int(encoded.sizes.sum()) == len(text.encode())
    assert int(encoded.levels.max()) < tokenization.num_values == tokenization.mask_id


def test_texts_that_spell_the_mask_are_no_holes_and_prompts_that_do_are() -> None:
    assert BYTE.num_values not in BYTE.encode(f"a{MASK}").levels
    assert BYTE.prompt(f"a{MASK}b") == [97, BYTE.num_values, 98]


def test_a_mask_in_the_midst_of_the_ids_leaves_no_gap_among_the_values() -> None:
    tokenization = Tokenization(tiny_tokenizer())
    levels = torch.arange(tokenization.num_values + 1)
    ids = tokenization.ids_of(levels)
    assert sorted(ids.tolist()) == levels.tolist() and int(ids[-1]) == tokenization.tokenizer.mask_token_id == 4
    assert torch.equal(torch.from_numpy(tokenization.levels_of(ids.numpy())), levels)


def test_unknown_characters_are_counted_and_leave_no_figure_by_byte() -> None:
    known = Tokenization(make_tokenizer("character", lambda: ["abc"]))
    windows = encode_texts(["abxyc"], known, Cut(4))
    units = windows.units(len(windows))
    assert (windows.facts.unknown, units.bytes_per_value, units.leading) == (2, None, "bits/token")
    assert "2 of 5 characters" in units.notes[0]


def test_unknown_characters_of_the_tested_texts_are_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("to be " * 100 + "😀" * 120)
    with pytest.warns(UserWarning, match=naming("test", "72 of 72", "100 %")):
        run_data(tmp_path / "a.txt", tokenizer="character")


def test_eight_bit_texts_are_not_taken_for_latin_1(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("雪が降る".encode("shift-jis"))
    with pytest.raises(DataError, match=r"which encoding.*if that is Latin-1"):
        read_text(tmp_path / "a.txt")


def dropping(letters: str, unknown: str | None = None, **parts: Any) -> Tokenization:
    """A tokenizer of some letters without an unknown token, or with one that its model alone knows of."""
    vocabulary = {letter: number for number, letter in enumerate([*letters, *filter(None, [unknown])])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=unknown))
    model.decoder = decoders.Fuse()
    for name, part in parts.items():
        setattr(model, name, part)
    return Tokenization(PreTrainedTokenizerFast(tokenizer_object=model, mask_token=MASK))


@given(text=st.text("ab\n x☃", min_size=1, max_size=20))
def test_characters_that_no_token_says_are_unknown_whether_or_not_there_is_a_token_for_them(text: str) -> None:
    letters = Tokenization(make_tokenizer("character", lambda: ["ab"]))
    strange = sum(character not in "ab" for character in text)
    for known in (letters, dropping("ab"), dropping("ab", "?")):
        encoded = known.encode(text)
        assert encoded.unknown == strange and encoded.altered == bool(strange)


def test_white_space_that_words_are_split_at_is_not_unknown() -> None:
    words = dropping("ab", pre_tokenizer=pre_tokenizers.WhitespaceSplit())
    assert words.encode("ab a").unknown == 0 and words.encode("ab ☃ a").unknown == 1
    wordpieces = Tokenization(tiny_tokenizer())
    assert wordpieces.encode("a b").unknown == 0 and wordpieces.encode("a ☃").unknown == 1
    assert open_tokenizer("bpe", lambda: ["a b  c\n"] * 9, 300).encode("x  \n ☃").unknown == 0


def test_a_prompt_of_unknown_characters_names_them_and_is_refused() -> None:
    letters = Tokenization(make_tokenizer("character", lambda: ["ab "]))
    for known in (letters, dropping("ab "), dropping("ab ", "?")):
        for prompt in (f"aé{MASK}b", "é", f"{MASK}ab é"):
            with pytest.raises(ConfigurationError, match=r"é.*hole"):
                known.prompt(prompt)
        assert known.prompt(f"a{MASK}b") == [*known.encode("a").levels, known.num_values, *known.encode("b").levels]
    assert letters.tokenizer.convert_ids_to_tokens(letters.prompt(f"a{UNKNOWN}"))[1] == UNKNOWN  # asked for by name


@pytest.mark.parametrize("half", ["\ud800", "a\udfff", "\ude00\ud83d"])
def test_half_of_a_pair_of_surrogates_is_refused_with_its_place(half: str) -> None:
    place = str(max(half.find("\udfff"), 0))
    with pytest.raises(DataError, match=rf"ud.*{place}.*take it out"):
        BYTE.encode(half)
    with pytest.raises(ConfigurationError, match=rf"ud.*{place}.*take it out"):
        BYTE.prompt(half)


def test_a_tokenizer_that_changes_texts_leaves_no_figure_by_byte() -> None:
    model = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    model.normalizer, model.decoder = normalizers.Lowercase(), decoders.Fuse()
    lower = Tokenization(with_mask(PreTrainedTokenizerFast(tokenizer_object=model, mask_token=MASK)))
    assert encode_texts(["abab"], lower, Cut(2)).units(2).bytes_per_value == 1
    assert encode_texts(["ABab"], lower, Cut(2)).units(2).bytes_per_value is None


def test_a_missing_mask_is_added_and_said(tmp_path: Path) -> None:
    model = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    model.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=model).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no mask token"):
        tokenization = open_tokenizer(str(tmp_path))
    assert tokenization.num_values == 2 and tokenization.prompt(f"a{MASK}b") == [0, 2, 1]


@pytest.mark.parametrize("name", ["nowhere-at-all/none", "./nothing"])
def test_a_tokenizer_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises((CheckpointError, ConfigurationError, OSError), match=name.rpartition("/")[2]):
        open_tokenizer(name)


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_one_file_is_divided_by_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(map(chr, range(40, 140))))
    data = run_data(tmp_path / "a.txt", validation_split="validation")
    parts = [BYTE.decode(part.tokens) for part in (data.train, data.validation, data.test)]
    assert "".join(parts) == (tmp_path / "a.txt").read_text() and [len(part) for part in parts] == [80, 10, 10]
    assert "by place" in data.summary


def test_folders_and_columns_say_the_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "files" / split).mkdir(parents=True)
        (tmp_path / "files" / split / "a.txt").write_text(f"{split} " * 9)
        (tmp_path / "rows").mkdir(exist_ok=True)
        rows = datasets.Dataset.from_dict({"body": [f"{split} ", "", f"{split} " * 8]})
        rows.to_parquet(tmp_path / "rows" / f"{split}-00000-of-00001.parquet")
    files, rows = run_data(tmp_path / "files"), run_data(tmp_path / "rows", text_column="body")
    assert BYTE.decode(files.test.tokens) == "test " * 9
    assert BYTE.decode(rows.test.tokens).replace(END, "") == "test " * 9 and rows.test.facts.documents == 2


ROWS = {"train": ["to be,", 'or "not"\nto be'], "test": ["that is"]}


def _written(kind: str, folder: Path) -> Path:
    """The rows in a kind of files, whose column of texts is ``body``."""
    folder.mkdir()
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict({"body": rows}) for name, rows in ROWS.items()})
    if kind == "saved":
        saved.save_to_disk(folder)
        return folder
    for name, rows in saved.items():
        getattr(rows, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[kind])(folder / f"{name}.{kind}")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["saved", "jsonl", "csv", "parquet"])
def test_rows_of_any_kind_are_the_texts_of_their_column(kind: str, streaming: bool, tmp_path: Path) -> None:
    folder = _written(kind, tmp_path / "rows")
    (folder / "README.md").write_text("about")
    data = run_data(folder, text_column="body", streaming=streaming)
    assert BYTE.decode(data.test.tokens).replace(END, "") == "that is"
    if not streaming:
        assert BYTE.decode(data.train.tokens).replace(END, "") == "".join(ROWS["train"])
    with pytest.raises(DataError, match=naming("body", "--text_column")):
        run_data(folder)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_file_of_rows_is_read_by_its_name_and_one_that_is_damaged_is_refused(kind: str, tmp_path: Path) -> None:
    file = _written(kind, tmp_path / "rows") / f"train.{kind}"
    data = run_data(file, text_column="body", test_split=None)
    assert BYTE.decode(data.train.tokens).replace(END, "") == "".join(ROWS["train"])
    file.write_text(file.read_text() + '{"body": "\n"a",b,c')
    with pytest.raises(DataError, match=file.name):
        run_data(file, text_column="body", test_split=None)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_of_texts_and_rows_is_refused_with_both_named(kind: str, tmp_path: Path) -> None:
    folder = _written(kind, tmp_path / "rows")
    (folder / "a.txt").write_text("to be")
    with pytest.raises(DataError, match=naming("a.txt", f"train.{kind}")):
        run_data(folder, text_column="body")


def test_files_without_such_folders_are_divided_by_their_names(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"{number:02}.py").write_text(f"x = {number}\n")
    (tmp_path / "notes.bin").write_bytes(b"\0")
    data = run_data(tmp_path, validation_split="validation")
    assert BYTE.decode(data.test.tokens) == "x = 11\n" and BYTE.decode(data.validation.tokens) == "x = 10\n"
    assert data.train.facts.documents == 10 and "notes.bin" in data.summary


def test_what_is_held_out_comes_from_the_end(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [f"row {number};" for number in range(10)]})
    rows.to_parquet(tmp_path / "rows.parquet")
    data = run_data(tmp_path / "rows.parquet", test_size=0.2, validation_size=1)
    texts = [BYTE.decode(part.tokens) for part in (data.train, data.validation, data.test)]
    assert [text.count("row") for text in texts] == [7, 1, 2] and "row 9" in texts[2]


def test_a_stream_has_the_windows_of_the_whole(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": [TEXT[:50], TEXT[50:97], TEXT[97:200]]})
    rows.to_parquet(tmp_path / "rows.parquet")
    fields = {"test_split": None, "window_context": 3, "window_shift": False}
    whole = run_data(tmp_path / "rows.parquet", **fields).train
    stream = run_data(tmp_path / "rows.parquet", streaming=True, **fields).train
    read = stream.take(list(stream.dataset))
    kept = whole.take(torch.arange(len(read["levels"])))
    assert torch.equal(read["levels"], kept["levels"]) and torch.equal(read["given"], kept["given"])
    batches = training_batches(stream, 2, seed=0).batches()
    again = training_batches(stream, 2, seed=0).batches(start_step=5)
    assert torch.equal(list(itertools.islice(batches, 6))[5]["levels"], next(again)["levels"])


def test_a_split_is_read_as_it_was_trained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    said: list[str] = []
    windows = load_windows(str(tmp_path / "a.txt"), "test", BYTE, Cut(8), max_windows=3, say=said.append)
    assert len(windows) == 3 and torch.equal(windows.levels, run_data(tmp_path / "a.txt").test.levels[:3]) and said


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"caf\xe9 au lait, s'il vous plait", "0xe9"), (b"a", "none is left")],
)
def test_files_that_are_no_texts_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        run_data(tmp_path / "a.txt")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", ["To be, or not\nto be\n", "naïve ☃ snow", "雪 が 降る。\n 😀"])
def test_texts_in_another_encoding_are_refused_with_the_command_that_converts_them(
    tmp_path: Path, encoding: str, text: str
) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match="iconv") as refused:
        read_text(tmp_path / "a.txt")
    (named,) = re.findall(r"iconv -f (\S+) -t utf-8", str(refused.value))
    assert (tmp_path / "a.txt").read_bytes().decode(named) == text


@pytest.mark.parametrize("content", [b"\x7fELF\0\0\0\1", b"abcd\0ef\n"])
def test_bytes_that_are_no_text_in_any_encoding_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.txt.*byte 4.*name another"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize("split", ["train[:50%]", "test[:50%]", "test[1:]", "train[:0]+test[:0]"])
def test_a_slice_without_a_document_is_refused_and_says_what_counts_windows(tmp_path: Path, split: str) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(DataError, match=r"documents.*--max_images"):
        load_windows(str(tmp_path / "a.txt"), split, BYTE, Cut(8))
    with pytest.raises(DataError, match=r"documents.*--max_train_samples"):
        run_data(tmp_path / "a.txt", train_split=split, test_split=None)


def test_what_is_about_a_folder_is_none_of_its_texts_and_is_named(tmp_path: Path) -> None:
    about = ["README.md", "meta.json", "LICENSE.txt", "dataset_info.json"]
    for name in (*about, "a.txt", "b.txt", "deep/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name};")
    data = run_data(tmp_path, test_split=None, validation_split=None, train_split="train+test+validation")
    assert BYTE.decode(data.train.tokens).replace(END, "") == "a.txt;deep/README.md;b.txt;"
    assert "README.md" in data.summary and "about the folder" in data.summary
    for name in ("a.txt", "b.txt", "deep/README.md"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match=r"README\.md.*its own name"):
        run_data(tmp_path)


def test_a_folder_without_texts_and_a_column_without_texts_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"1")
    with pytest.raises(DataError, match=r"a\.bin"):
        run_data(tmp_path)
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match="row 0"):
        run_data(tmp_path / "numbers.parquet", test_split=None)
    with pytest.raises(DataError, match="text_column"):
        run_data(tmp_path / "numbers.parquet", test_split=None, text_column="body")


@pytest.mark.parametrize(
    ("named", "fields"),
    [
        ("random_flip", {"tokenizer": "byte", "random_flip": True}),
        ("window_context", {"tokenizer": "byte", "window_context": 128}),
        ("vocabulary_size", {"tokenizer": "bpe"}),
        ("vocabulary_size", {"tokenizer": "byte", "vocabulary_size": 512}),
        ("window_length", {"window_length": 64}),
        ("text_column", {"text_column": "body"}),
    ],
)
def test_fields_that_contradict_each_other_are_refused(named: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=named):
        DataArguments("a.txt", **fields)


def test_a_stream_makes_no_tokenizer_of_its_texts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(DataError, match="--streaming"):
        run_data(tmp_path / "a.txt", tokenizer="character", streaming=True)


def test_windows_of_other_lengths_with_the_same_bits_a_token_have_no_error_among_them() -> None:
    windows = encode_texts(["abcdefghij"], BYTE, Cut(4))
    each = windows.scored()[0].double()
    terms = {"diffusion": (each * 3 * math.log(2)).expand(2, -1)}
    units = windows.units(len(windows))
    report = LikelihoodReport(terms, None, units.per_datum, units=units)
    assert report.bits_per_dim == pytest.approx(3) and report.standard_error_over_images < 1e-12


def test_a_token_that_would_belong_to_context_and_text_is_none_and_each_byte_counts_once() -> None:
    """Of byte pairs that know "ab": "b" after "a" is a token by itself."""
    pairs = Tokenization(make_tokenizer("bpe", lambda: ["ab ab ab ab"], 259))
    assert len(pairs.encode("ab").levels) == 1
    for context, text in (("a", "b"), ("ab", "ab"), ("ab a", "b ab"), ("☃a", "b☃")):
        after = encode_after(text, context, pairs, Cut(16))
        units, size = after.units(1), len(text.encode())
        assert units.bytes_per_value is not None and units.per_datum * units.bytes_per_value == size
        given = after.take(torch.arange(1))["given"][0]
        scored = after.tokens[int(given.long().argmin()) :][: int((~given).sum())]
        assert pairs.decode(scored) == text


@settings(max_examples=60)
@given(text=st.integers(1, 20), context=st.integers(1, 20), overlap=st.integers(0, 3))
def test_what_is_given_of_a_context_is_what_the_notes_say(text: int, context: int, overlap: int) -> None:
    after = encode_after("a" * text, "b" * context, BYTE, Cut(8, overlap))
    batch = after.take(torch.arange(len(after)))
    given_sites = batch.get("given", torch.zeros_like(batch["levels"], dtype=torch.bool))
    kept = int((given_sites & (batch["levels"] == ord("b"))).sum(1).max())
    before = after.facts.before
    assert (before.contexts, before.left_out, before.shortened) == (1, kept == 0, 0 < kept < context)
    assert len(after.facts.notes) == (kept < context) and scored(after) == [ord("a")] * text


def test_what_the_tokenizer_loses_of_a_context_is_noted_and_takes_no_figure_of_the_text() -> None:
    letters = Tokenization(make_tokenizer("character", lambda: ["abc"]))
    units = encode_each(["ab", "c"], letters, Cut(8), ["aé☃", "ab"])[1]
    assert units.bytes_per_value == 1 and "2 of 5 characters" in units.notes[0] and "contexts" in units.notes[0]
    lower = dropping("ab", normalizer=normalizers.Lowercase())
    units = encode_each(["ab"], lower, Cut(8), ["AB"])[1]
    assert units.bytes_per_value == 1 and "1 of 1 contexts" in units.notes[0]
