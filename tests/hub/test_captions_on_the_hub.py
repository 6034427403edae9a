"""A pipeline with a text encoder is published, and loaded by its Hub id in another process: the same images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hub.readers import reader
from hub.server import LoopbackHub
from tiny import quiet, randomised, sampled, tiny_pipeline, tiny_unet
from tiny_text import LIMIT, WIDTH, text_folder, tiny_encoder, tiny_tokenizer
from vdm_hub import VDMPipeline
from vdm_hub.commands import main

CAPTIONS = {"column": "text", "template": None, "max_length": LIMIT, "dropout": 0.1, "examples": ["a cat"]}
PROMPTS = ["a cat", "a big dog"]
READ = f"""
import json, sys, torch
from diffusers import DiffusionPipeline
import vdm_hub
pipe = DiffusionPipeline.from_pretrained("me/captions")
pipe.set_progress_bar_config(disable=True)
given = {{"generator": torch.Generator().manual_seed(0), "output_type": "latent", "num_inference_steps": 4}}
print(json.dumps(pipe(prompt={PROMPTS!r}, guidance_scale=2.0, **given).images.tolist()))
"""
UPLOAD = """
import sys
from huggingface_hub import create_repo, upload_folder
create_repo("me/encoder")
upload_folder(repo_id="me/encoder", folder_path=sys.argv[1])
"""
ENCODE = """
from vdm_hub.models.installed_encoders import open_text_encoder
print(open_text_encoder("me/encoder").digest)
"""


@pytest.fixture
def pipe() -> Any:
    unet = randomised(tiny_unet(cross_attention_dim=WIDTH))
    text: Any = {"text_encoder": tiny_encoder(), "tokenizer": tiny_tokenizer()}
    return quiet(VDMPipeline(unet, tiny_pipeline().scheduler, captions=CAPTIONS, **text))


def test_what_is_published_is_what_is_loaded_by_its_id(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "pipeline")
    text_folder(tmp_path / "encoder")
    with LoopbackHub() as hub:
        author, user = reader(tmp_path / "author", hub, token="hf_loopback"), reader(tmp_path / "user", hub)
        author.shell_block(f"vdm-hub publish {tmp_path / 'pipeline'} me/captions")
        done = author.run(str(author.python), "-c", UPLOAD, str(tmp_path / "encoder"))
        assert done.returncode == 0, done.stderr
        files = set(hub.repositories["me/captions"].at("main").files)
        assert {"text_encoder/model.safetensors", "text_encoder/config.json", "tokenizer/tokenizer.json"} <= files
        read = user.run(str(user.python), "-c", READ)
        assert read.returncode == 0, read.stderr
        encoded = user.run(str(user.python), "-c", ENCODE)
        assert encoded.returncode == 0, encoded.stderr
    here = sampled(pipe, 1, prompt=PROMPTS, guidance_scale=2.0, output_type="latent")
    assert torch.equal(torch.tensor(json.loads(read.stdout.splitlines()[-1])), here)
    assert encoded.stdout.split()[-1] == pipe.text_condition.text.digest


def test_a_model_of_captions_without_its_encoder_is_not_published(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "whole")
    VDMPipeline.from_pretrained(tmp_path / "whole", text_encoder=None).save_pretrained(tmp_path / "bare")
    words = ["me/it", "--dry_run", "--output_dir", str(tmp_path / "card")]
    assert main(["publish", str(tmp_path / "bare"), *words]) == 2
    assert "text_encoder" in capsys.readouterr().err and not (tmp_path / "card").exists()
