"""Prompts: names and checks as in diffusers' pipelines, and what is saved is what is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import BertModel

from naming import naming
from tiny import quiet, randomised, sampled, tiny_pipeline, tiny_unet
from tiny_text import LIMIT, WIDTH, tiny_encoder, tiny_tokenizer
from vdm_hub import ClassificationEffort, VDMPipeline
from vdm_hub.errors import CheckpointError, ConfigurationError

CAPTIONS = {"column": "text", "template": None, "max_length": LIMIT, "dropout": 0.1, "examples": ["a cat"]}
PROMPTS = ["a cat", "a big dog"]


def pipeline(**captions: Any) -> VDMPipeline:
    unet = randomised(tiny_unet(cross_attention_dim=WIDTH))
    text: Any = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer()}
    return quiet(VDMPipeline(unet, tiny_pipeline().scheduler, captions=CAPTIONS | captions, **text))


def drawn(pipe: Any, **arguments: Any) -> torch.Tensor:
    return sampled(pipe, 1, output_type="latent", **arguments)


def test_the_prompt_decides_the_image_and_scale_1_is_no_guidance() -> None:
    pipe = pipeline()
    plain = drawn(pipe, prompt=PROMPTS)
    assert len(plain) == 2 and torch.equal(plain, drawn(pipe, prompt=PROMPTS, guidance_scale=1))
    assert not torch.equal(plain, drawn(pipe, prompt=PROMPTS[::-1]))
    guided = drawn(pipe, prompt=PROMPTS, guidance_scale=3.0)
    empty = drawn(pipe, prompt=PROMPTS, guidance_scale=3.0, negative_prompt="")
    other = drawn(pipe, prompt=PROMPTS, guidance_scale=3.0, negative_prompt="eel")
    assert torch.equal(guided, empty) and not torch.equal(guided, plain) and not torch.equal(guided, other)


def test_scale_0_knows_nothing_of_the_prompt() -> None:
    pipe = pipeline()
    first, second = (drawn(pipe, prompt=[one], guidance_scale=0) for one in ("cat", "dog"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_guidance_is_the_formula_between_prompt_and_negative_prompt() -> None:
    pipe = pipeline()
    names = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    embeds = dict(zip(names, pipe.encode_prompt(PROMPTS, negative_prompt="eel"), strict=True))
    assert embeds["prompt_embeds"].shape == embeds["negative_prompt_embeds"].shape
    asked = {"guidance_scale": 2.0, "prompt": PROMPTS, "negative_prompt": "eel"}
    given = drawn(pipe, guidance_scale=2.0, **embeds)
    torch.testing.assert_close(drawn(pipe, **asked), given, rtol=0, atol=0)


def test_images_of_each_prompt_and_one_prompt_for_all() -> None:
    pipe = pipeline()
    each = pipe.encode_prompt(PROMPTS, num_images_per_prompt=3, do_classifier_free_guidance=False)[0]
    assert len(each) == 6 and torch.equal(each[0], each[2]) and not torch.equal(each[2], each[3])
    assert len(drawn(pipe, prompt=PROMPTS, num_images_per_prompt=3)) == 6
    assert len(sampled(pipe, 3, prompt="a cat")) == 3
    assert len(drawn(pipe, prompt="a cat", num_images_per_prompt=2, guidance_scale=2)) == 2


@pytest.mark.parametrize(
    ("captions", "arguments", "named"),
    [
        ({}, {}, ("prompt",)),
        ({}, {"prompt": "a", "prompt_embeds": torch.zeros(1, 2, WIDTH)}, ("prompt_embeds",)),
        ({}, {"prompt": 3}, ("prompt", 3)),
        ({}, {"prompt": ["a", None]}, ("prompt", "None")),
        ({}, {"prompt": []}, ("prompt",)),
        ({}, {"prompt_embeds": torch.zeros(2, WIDTH)}, ("prompt_embeds", WIDTH)),
        ({}, {"prompt_embeds": torch.zeros(1, 2, WIDTH + 1)}, (WIDTH + 1, WIDTH)),
        ({}, {"prompt": "a", "prompt_attention_mask": torch.ones(1, 2)}, ("prompt_attention_mask",)),
        *(
            (
                {},
                {"prompt_embeds": torch.zeros(1, 2, WIDTH), "prompt_attention_mask": mask},
                ("prompt_attention_mask", named),
            )
            for mask, named in ((torch.tensor([[1, 0.5]]), 0.5), (torch.zeros(1, 2, dtype=torch.bool), "row 0"))
        ),
        ({}, {"prompt": "a", "negative_prompt": "b"}, ("negative_prompt", "guidance_scale")),
        (
            {},
            {"prompt": ["a", "b"], "negative_prompt": ["a", "b", "c"], "guidance_scale": 2.0},
            (3, "negative_prompt"),
        ),
        ({}, {"prompt": "a", "negative_prompt": 3, "guidance_scale": 2.0}, (3, "negative_prompt")),
        ({}, {"prompt": "a", "num_images_per_prompt": 0}, ("num_images_per_prompt", 0)),
        ({}, {"class_labels": [1]}, ("class_labels", "prompt")),
        *(
            (
                {"dropout": 0.0},
                {"prompt": ["a", "b"], "guidance_scale": 2.0} | more,
                ("caption", "--condition_dropout"),
            )
            for more in ({}, {"negative_prompt": ""}, {"negative_prompt": ["c", ""]})
        ),
        (
            {},
            {"prompt": "a", "guidance_scale": 2.0, "negative_prompt_embeds": torch.zeros(1, 2, WIDTH + 1)},
            ("negative_prompt_embeds", WIDTH + 1, WIDTH),
        ),
        ({}, {"prompt": "a", "encoder_hidden_states": torch.zeros(1, 2, WIDTH)}, ("encoder_hidden_states",)),
    ],
)
def test_what_can_not_be_asked_for_is_refused(captions: Any, arguments: Any, named: Any) -> None:
    with pytest.raises(ConfigurationError, match=naming(*named)):
        drawn(pipeline(**captions), **arguments)


def test_a_prompt_has_a_name() -> None:
    with pytest.raises(ConfigurationError, match="prompt="):
        pipeline()("a cat")  # type: ignore[arg-type]


def test_a_prompt_is_refused_by_models_of_classes_and_of_nothing() -> None:
    unet = randomised(tiny_unet(num_class_embeds=3))
    for pipe, remedy in ((tiny_pipeline(), "leave it out"), (tiny_pipeline(unet), "class_labels")):
        for ask in (drawn, lambda pipe, **given: pipe.bits_per_dim(torch.zeros(1, 1, 8, 8), **given)):
            with pytest.raises(ConfigurationError, match=naming("prompt", remedy)):
                ask(pipe, prompt="a cat")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tokenizer": None}, ("tokenizer",)),
        ({"text_encoder": tiny_encoder(16)}, (16, WIDTH)),
        ({"classes": {"count": 3, "names": None, "dropout": 0.0, "column": "label"}}, ("classes", "captions")),
        ({"unet": tiny_unet()}, ("cross_attention_dim",)),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(arguments: Any, named: Any) -> None:
    parts = {"unet": tiny_unet(cross_attention_dim=WIDTH), "scheduler": tiny_pipeline().scheduler}
    parts |= {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer(), "captions": CAPTIONS}
    with pytest.raises(ConfigurationError, match=naming(*named)):
        VDMPipeline(**parts | arguments)


def test_a_likelihood_is_of_the_caption_and_says_so() -> None:
    pipe, images = pipeline(), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    report = pipe.bits_per_dim(images, prompt=PROMPTS, replicates=2)
    assert report.details["condition"] == "caption" and "p(x | caption)" in str(report)
    embeds = {"prompt_embeds": pipe.encode_prompt(PROMPTS)[0], "prompt_attention_mask": pipe.encode_prompt(PROMPTS)[1]}
    assert torch.equal(report.per_image, pipe.bits_per_dim(images, replicates=2, **embeds).per_image)
    assert not torch.equal(report.per_image, pipe.bits_per_dim(images, prompt="eel", replicates=2).per_image)


def test_a_caption_of_each_image_is_found_among_candidates() -> None:
    pipe, images = pipeline(), torch.zeros(2, 1, 8, 8, dtype=torch.long)
    report = pipe.classify(images, PROMPTS, effort=ClassificationEffort(budget=200, confidence=None))
    assert report.names == tuple(PROMPTS) and report.posterior.shape == (2, 2)
    swapped = pipe.classify(images, PROMPTS[::-1], effort=ClassificationEffort(budget=200, confidence=None))
    torch.testing.assert_close(report.posterior, swapped.posterior.flip(1))
    for wrong in (None, ["a cat"], ["a cat", "a cat"], ["a cat", 1], "ab"):
        with pytest.raises(ConfigurationError, match="candidates"):
            pipe.classify(images, wrong)


@pytest.mark.parametrize("left", [("text_encoder",), ("text_encoder", "tokenizer")])
def test_a_pipeline_without_its_encoder_takes_what_it_gave(tmp_path: Path, left: tuple[str, ...]) -> None:
    whole = pipeline()
    whole.save_pretrained(tmp_path / "whole")
    embeds, mask = whole.encode_prompt(PROMPTS, do_classifier_free_guidance=False)[:2]
    loaded = VDMPipeline.from_pretrained(tmp_path / "whole", **dict.fromkeys(left))
    loaded.save_pretrained(tmp_path / "bare")
    again = VDMPipeline.from_pretrained(tmp_path / "bare")
    for bare in (VDMPipeline(whole.unet, whole.scheduler, captions=CAPTIONS), loaded, again):
        assert bare.text_encoder is None
        given = drawn(quiet(bare), prompt_embeds=embeds, prompt_attention_mask=mask)
        assert torch.equal(given, drawn(whole, prompt=PROMPTS))
        with pytest.raises(ConfigurationError, match=naming("text_encoder", "prompt_embeds")):
            drawn(bare, prompt=PROMPTS)
    with pytest.raises(ConfigurationError, match="tokenizer"):
        VDMPipeline.from_pretrained(tmp_path / "whole", tokenizer=None)


@pytest.mark.parametrize("cls", [VDMPipeline, DiffusionPipeline])
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, cls: Any) -> None:
    pipe = pipeline()
    with pytest.warns(UserWarning):
        drawn(pipe, prompt="a b c d e f g h i j k l m n")  # leaves nothing in what is saved
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert (index["text_encoder"], index["tokenizer"]) == (
        ["transformers", "BertModel"],
        ["transformers", "BertTokenizer"],
    )
    loaded = quiet(cls.from_pretrained(tmp_path))
    assert isinstance(loaded.text_encoder, BertModel) and loaded.config.captions == CAPTIONS
    assert torch.equal(drawn(loaded, prompt=PROMPTS), drawn(pipe, prompt=PROMPTS))
    with pytest.warns(UserWarning):
        (cut,) = loaded.text_condition.text.tokens(["a b c d e f g h i j k l m n"])
    assert len(cut) == LIMIT and len(loaded.tokenizer("a b c d e f g h i j k l m n")["input_ids"]) == 16


def test_a_model_without_captions_says_nothing_of_them(tmp_path: Path) -> None:
    tiny_pipeline().save_pretrained(tmp_path)
    assert (
        not {"captions", "text_encoder", "tokenizer"} & json.loads((tmp_path / "model_index.json").read_text()).keys()
    )
    assert VDMPipeline.from_pretrained(tmp_path).text_encoder is None


def _index(change: dict[str, Any]) -> Any:
    def act(path: Path) -> None:
        index = json.loads((path / "model_index.json").read_text())
        changed = {key: value for key, value in (index | change).items() if value is not ...}
        (path / "model_index.json").write_text(json.dumps(changed))

    return act


def _config(path: Path) -> None:
    file = path / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "evil.Evil"}}))


def _pickled(path: Path) -> None:
    (path / "text_encoder" / "model.safetensors").unlink()
    torch.save(tiny_encoder().state_dict(), path / "text_encoder" / "pytorch_model.bin")


def _not_finite(path: Path) -> None:
    encoder = tiny_encoder()
    with torch.no_grad():
        next(encoder.parameters()).fill_(torch.nan)
    encoder.save_pretrained(path / "text_encoder")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_index({"unet": ["transformers", "BertModel"]}), ("unet", "BertModel")),
        (_index({"text_encoder": ["diffusers", "UNet2DModel"]}), ("text_encoder", "UNet2DModel")),
        (_index({"text_encoder": ["transformers", "GPT2Model"]}), ("BertModel", "GPT2Model")),
        (_index({"tokenizer": ["transformers", "BertModel"]}), ("tokenizer", "BertModel")),
        (_index({"tokenizer": ...}), ("tokenizer",)),
        (_config, ("auto_map",)),
        (_pickled, ("pytorch_model.bin",)),
        (_not_finite, ("text_encoder",)),
        (lambda path: tiny_encoder(16).save_pretrained(path / "other"), ()),
        (lambda path: [file.unlink() for file in (path / "tokenizer").iterdir()], ("tokenizer",)),
    ],
)
def test_what_was_not_saved_so_is_refused(tmp_path: Path, damage: Any, named: Any) -> None:
    pipeline().save_pretrained(tmp_path)
    damage(tmp_path)
    if not named:  # what nothing names is not looked at
        assert VDMPipeline.from_pretrained(tmp_path) is not None
        return
    with pytest.raises(CheckpointError, match=naming(*named)):
        VDMPipeline.from_pretrained(tmp_path)


def test_weights_of_another_encoder_are_refused_before_they_are_read(tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path)
    config = (tmp_path / "text_encoder" / "config.json").read_text()
    tiny_encoder(16).save_pretrained(tmp_path / "text_encoder")
    (tmp_path / "text_encoder" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="text_encoder"):
        VDMPipeline.from_pretrained(tmp_path)
