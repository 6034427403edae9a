"""The network of a diffusion of tokens by itself: what data and recipe say of it, and what it begins from."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

import tiny_tokens
from naming import naming
from runs import configuration
from tiny_tokens import LENGTH, SIZES
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors import CheckpointError, ConfigurationError, VDMHubError
from vdm_hub.hub.repositories import ModelFiles, open_files
from vdm_hub.models.token_networks import TokenNetwork, TokenTimeEmbedding, positions_of
from vdm_hub.training.parts import token_networks
from vdm_hub.training.parts.networks import on_meta_device
from vdm_hub.training.parts.token_networks import build_token_network

WORDS = Tokenization(tiny_tokens.tokenizer())

pytestmark = pytest.mark.usefixtures("token_plugin")


def built(path: Path, length: int = LENGTH, words: Tokenization = WORDS, **fields: Any) -> TokenNetwork:
    return build_token_network(configuration(path / "run", **tiny_tokens.run_fields(path, **fields)), length, words)


def config(path: Path, name: str, length: int = LENGTH, **described: Any) -> Any:
    """The config of a model of that class, as the recipe describes it beside its sizes."""
    sizes = {} if "d_model" in described else SIZES
    return built(path, length, network={"_class_name": name} | sizes | described).model.config


# ---- a new one --------------------------------------------------------------------------------------------------


def test_vocabulary_and_length_are_those_of_the_data(tmp_path: Path) -> None:
    found = config(tmp_path, "BertForMaskedLM", 12)
    assert found.vocab_size == WORDS.num_ids and found.max_position_embeddings == 12 and found.hidden_size == 8
    assert config(tmp_path, "BertForMaskedLM", vocab_size=WORDS.num_ids).vocab_size == WORDS.num_ids
    with pytest.raises(ConfigurationError, match=naming("vocab_size", WORDS.num_ids, 5)):
        config(tmp_path, "BertForMaskedLM", vocab_size=5)
    assert config(tmp_path, "BertForMaskedLM", max_position_embeddings=20).max_position_embeddings == 20
    with pytest.raises(ConfigurationError, match=naming(4)):
        config(tmp_path, "BertForMaskedLM", max_position_embeddings=4)


def test_a_model_whose_positions_begin_behind_its_padding_has_as_many_more(tmp_path: Path) -> None:
    made = built(tmp_path, network=SIZES | {"_class_name": "RobertaForMaskedLM"}).model
    assert positions_of(made) == LENGTH and made.config.max_position_embeddings == LENGTH + 2
    assert made.config.hidden_size == 8 and made.config.vocab_size == WORDS.num_ids
    assert config(tmp_path, "RobertaForMaskedLM", pad_token_id=0).max_position_embeddings == LENGTH + 1
    with pytest.raises(ConfigurationError, match=naming(LENGTH)):
        config(tmp_path, "RobertaForMaskedLM", max_position_embeddings=LENGTH)


def test_a_config_gets_what_it_knows_and_nothing_else(tmp_path: Path) -> None:
    found = config(tmp_path, "XLNetLMHeadModel", d_model=8, n_layer=1, n_head=2, d_inner=16)
    assert "max_position_embeddings" not in found.to_dict() and found.vocab_size == WORDS.num_ids


def test_numbers_of_special_tokens_are_the_tokenizers(tmp_path: Path) -> None:
    """One for padding, which it has not, is the config's own where the vocabulary has such a row."""
    tokenizer = WORDS.tokenizer
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None
    for name, padding in (("BertForMaskedLM", 0), ("RobertaForMaskedLM", 1), ("ModernBertForMaskedLM", None)):
        found = config(tmp_path, name)
        assert found.pad_token_id == padding, name
        assert found.eos_token_id == tokenizer.eos_token_id and found.bos_token_id is None, name
    for size, padding in ((50_283, None), (50_284, 50_283)):
        words = Tokenization(tokenizer)
        words.num_ids = size
        with on_meta_device():
            made = built(tmp_path, words=words, network=SIZES | {"_class_name": "ModernBertForMaskedLM"})
        assert made.model.config.pad_token_id == padding


def test_every_token_learns_and_the_time_is_as_wide_as_an_embedding(tmp_path: Path) -> None:
    narrow = SIZES | {"_class_name": "AlbertForMaskedLM", "embedding_size": 4}
    made = built(tmp_path, network=narrow, time_embedding=True)
    assert made.time_embedding is not None and made.time_embedding.config.width == 4
    assert made.model.get_input_embeddings().padding_idx is None
    assert built(tmp_path).time_embedding is None


@pytest.mark.parametrize("name", ["BertForNothing", "pipeline", "BertConfig", "PreTrainedModel"])
def test_what_is_no_model_of_transformers_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=naming(name, "BertForMaskedLM")):
        built(tmp_path, network={"_class_name": name})


def test_what_no_config_reads_is_refused_and_what_all_models_take_is_not(tmp_path: Path) -> None:
    sizes = {"num_key_value_heads": 2, "is_causal": False, "attn_implementation": "eager"}
    assert config(tmp_path, "LlamaForCausalLM", **sizes).is_causal is False
    with pytest.raises(ConfigurationError, match=naming("hiden_size", "hidden_size")):
        config(tmp_path, "BertForMaskedLM", hiden_size=4)
    with pytest.raises(ConfigurationError, match=naming("BertForMaskedLM")):
        config(tmp_path, "BertForMaskedLM", num_attention_heads=3)


class Looking(BertForMaskedLM):
    """A model that looks at values while it is built, as those of some versions of transformers do."""

    config_class = BertConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.rates = torch.linspace(0, 1, 3)[1].item()


@pytest.mark.parametrize("name", ["BertForMaskedLM", "Looking"])
def test_a_sketch_has_the_parameters_of_the_network_and_no_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_networks.transformers, "Looking", Looking, raising=False)
    network = SIZES | {"_class_name": name}
    made = built(tmp_path, network=network, time_embedding=True)
    with on_meta_device():
        sketch = built(tmp_path, network=network, time_embedding=True)
    assert all(one.is_meta for one in sketch.parameters()) and not any(one.is_meta for one in made.parameters())
    shapes, of_sketch = ({name: p.shape for name, p in one.named_parameters()} for one in (made, sketch))
    assert shapes == of_sketch, "what is tied is counted once"


# ---- a trained one ----------------------------------------------------------------------------------------------


def trained(path: Path, vocabulary: int = WORDS.num_ids, **others: Any) -> tuple[Path, Any]:
    """The folder of a masked language model, and the model."""
    model = tiny_tokens.network(vocabulary, **others)
    model.save_pretrained(path / "bert")
    return path / "bert", model


def same(network: TokenNetwork, model: Any) -> bool:
    own = dict(model.named_parameters())
    return all(torch.equal(value, own[name]) for name, value in network.model.named_parameters())


@pytest.mark.filterwarnings("error")
def test_its_weights_are_those_of_the_folder(tmp_path: Path) -> None:
    place, model = trained(tmp_path)
    made = built(tmp_path, network_from=str(place))
    assert same(made, model) and made.time_embedding is None
    new = built(tmp_path, network_from=str(place), time_embedding=True).time_embedding
    assert new is not None and not any(bool(value.any()) for name, value in new.named_parameters() if "2" in name)
    with on_meta_device():
        sketch = built(tmp_path, network_from=str(place), time_embedding=True)
    assert all(one.is_meta for one in sketch.parameters())
    with pytest.raises(ConfigurationError, match=naming(LENGTH + 1)):
        built(tmp_path, LENGTH + 1, network_from=str(place))


def of_pipeline(path: Path, told: bool) -> tuple[Path, Any]:
    """The folder of a run that trained a model of texts, and its pipeline."""
    torch.manual_seed(1)
    time_embedding = TokenTimeEmbedding(8) if told else None
    if time_embedding is not None:
        torch.nn.init.ones_(time_embedding.embedding.linear_2.weight)
    pipe = tiny_tokens.pipeline(time_embedding=time_embedding)
    pipe.save_pretrained(path / "run of texts" / "pipeline")
    return path / "run of texts", pipe


@pytest.mark.filterwarnings("error")
def test_a_run_of_texts_gives_its_network_and_what_tells_it_the_time(tmp_path: Path) -> None:
    place, pipe = of_pipeline(tmp_path, True)
    for folder in (place, place / "pipeline"):
        made = built(tmp_path, network_from=str(folder), time_embedding=True)
        assert same(made, pipe.network) and made.time_embedding is not None
        kept = pipe.time_embedding.state_dict()
        assert all(torch.equal(value, kept[name]) for name, value in made.time_embedding.state_dict().items())
    with pytest.warns(UserWarning, match="time_embedding") as said:
        assert built(tmp_path, network_from=str(place)).time_embedding is None
    assert len(said) == 1
    with on_meta_device():
        sketch = built(tmp_path, network_from=str(place), time_embedding=True)
    assert all(one.is_meta for one in sketch.parameters()) and sketch.time_embedding is not None
    untold, _ = of_pipeline(tmp_path / "untold", False)
    assert built(tmp_path, network_from=str(untold)).time_embedding is None
    new = built(tmp_path, network_from=str(untold), time_embedding=True).time_embedding
    assert new is not None and not bool(new.embedding.linear_2.weight.any())


@pytest.mark.parametrize(
    ("named", "kind"),
    [
        (["BertForMaskedLM"], "BertForMaskedLM"),
        (["BertLMHeadModel"], "BertLMHeadModel"),
        (["BertModel"], "BertForMaskedLM"),
        (["BertForNothing"], "BertForMaskedLM"),
        (None, "BertForMaskedLM"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lack")
def test_its_class_is_the_one_that_was_saved_or_the_masked_one_of_its_kind(
    named: Any, kind: str, tmp_path: Path
) -> None:
    place, model = trained(tmp_path)
    described = json.loads((place / "config.json").read_text()) | {"architectures": named}
    (place / "config.json").write_text(json.dumps(described))
    made = built(tmp_path, network_from=str(place))
    assert type(made.model).__name__ == kind and same(made, model)


def test_what_gives_no_logits_of_tokens_is_refused(tmp_path: Path) -> None:
    place, _ = trained(tmp_path)
    described = json.loads((place / "config.json").read_text())
    for changes, shown in (
        ({"architectures": None, "model_type": "vit"}, "vit"),
        ({"architectures": ["ViTModel"], "model_type": "vit"}, "ViTModel"),
    ):
        (place / "config.json").write_text(json.dumps(described | changes))
        with pytest.raises(ConfigurationError, match=naming(shown)):
            built(tmp_path, network_from=str(place))
    code = {"auto_map": {"AutoModelForMaskedLM": "modeling.Network"}}
    (place / "config.json").write_text(json.dumps(described | code))
    with pytest.raises(VDMHubError, match=naming("auto_map")):
        built(tmp_path, network_from=str(place))
    with pytest.raises(ConfigurationError, match=naming("config.json")):
        built(tmp_path, network_from=str(tmp_path))
    run, _ = of_pipeline(tmp_path, False)
    (run / "pipeline" / "network" / "config.json").unlink()
    with pytest.raises(ConfigurationError, match=r"network/config\.json"):
        built(tmp_path, network_from=str(run))


def test_a_mask_that_was_added_to_the_tokenizer_gets_a_row(tmp_path: Path) -> None:
    model = tiny_tokens.network(WORDS.num_ids - 1)
    own = model.get_input_embeddings().weight
    own.data += 100
    model.save_pretrained(tmp_path / "bert")
    with pytest.warns(UserWarning, match="mask"):
        made = built(tmp_path, network_from=str(tmp_path / "bert"))
    rows = made.model.get_input_embeddings().weight
    assert rows.shape[0] == WORDS.num_ids and torch.equal(rows[:-1], own) and WORDS.mask_id == WORDS.num_ids - 1
    assert rows[-1].abs().max() < 10, "as a new network's, whatever the others are"
    place, _ = trained(tmp_path / "two", WORDS.num_ids - 2)
    with pytest.raises(ConfigurationError, match=naming(WORDS.num_ids)):
        built(tmp_path, network_from=str(place))


def test_a_mask_in_the_middle_of_the_vocabulary_was_not_added(tmp_path: Path) -> None:
    words = Tokenization(WORDS.tokenizer)
    words.mask_id = 0
    place, _ = trained(tmp_path, WORDS.num_ids - 1)
    with warnings.catch_warnings(), pytest.raises(ConfigurationError, match=naming(WORDS.num_ids)):
        warnings.simplefilter("error")
        built(tmp_path, words=words, network_from=str(place))


@pytest.mark.parametrize("more", [1, 12])
def test_rows_that_no_token_uses_are_said(more: int, tmp_path: Path) -> None:
    place, model = trained(tmp_path, WORDS.num_ids + more)
    with pytest.warns(UserWarning, match=naming(more, WORDS.num_ids)):
        assert same(built(tmp_path, network_from=str(place)), model)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_weights_that_are_missing_are_said_and_begin_at_random(count: int, tmp_path: Path) -> None:
    place, _ = trained(tmp_path)
    file = place / "model.safetensors"
    tensors = load_file(file)
    gone = sorted(name for name in tensors if "attention" in name)[:count]
    save_file({name: value for name, value in tensors.items() if name not in gone}, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="lack") as said:
        built(tmp_path, network_from=str(place))
    words = str(said[0].message)
    assert sum(name in words for name in gone) == min(count, 3) and ("and more" in words) is (count > 3)


def test_weights_that_are_damaged_are_refused(tmp_path: Path) -> None:
    place, _ = trained(tmp_path)
    file = place / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=naming(str(place))):
        built(tmp_path, network_from=str(place))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError):
        built(tmp_path, network_from=str(place))


@pytest.mark.parametrize("size", ["2KB", "1GB"])
@pytest.mark.parametrize("component", ["", "network"])
def test_of_a_model_elsewhere_what_is_read_is_fetched_before(
    component: str, size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sketch takes its config alone."""
    model, there = tiny_tokens.network(WORDS.num_ids), tmp_path / "there"
    model.save_pretrained(there / component, max_shard_size=size)
    if component:
        (there / "model_index.json").write_text("{}")
    (there / component / "other.bin").write_text("large, and never read")
    fetched: set[str] = set()

    def files(here: Path) -> ModelFiles:
        own = open_files(there)

        def fetch(path: str) -> Path:
            fetched.add(Path(path).name)
            (here / path).parent.mkdir(parents=True, exist_ok=True)
            return Path(shutil.copy(own.fetch(path), here / path))

        return replace(own, folder=here, fetch=fetch)

    for sketch in (True, False):
        fetched.clear()
        monkeypatch.setattr(token_networks, "open_files", lambda source, here=tmp_path / f"{sketch}": files(here))
        with on_meta_device() if sketch else contextlib.nullcontext():
            made = built(tmp_path, network_from="me/bert")
        read = {path.name for path in (there / component).iterdir() if path.suffix in (".json", ".safetensors")}
        assert fetched - {"model_index.json"} == ({"config.json"} if sketch else read - {"generation_config.json"})
        assert sketch or same(made, model)


def test_weights_in_parts_are_read(tmp_path: Path) -> None:
    model = tiny_tokens.network(WORDS.num_ids)
    model.save_pretrained(tmp_path / "parts", max_shard_size="2KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert same(built(tmp_path, network_from=str(tmp_path / "parts")), model)


def test_a_network_without_a_head_begins_with_one_at_random(tmp_path: Path) -> None:
    known = {"vocab_size": WORDS.num_ids, "max_position_embeddings": LENGTH, "pad_token_id": None}
    BertModel(BertConfig(**{**SIZES, **known})).save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning, match="lack"):
        assert type(built(tmp_path, network_from=str(tmp_path / "bare")).model).__name__ == "BertForMaskedLM"
