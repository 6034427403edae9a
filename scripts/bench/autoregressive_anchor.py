"""A run of texts beside an autoregressive model of the same size, data, steps and windows.

``python scripts/bench/autoregressive_anchor.py runs/shakespeare`` trains transformers' `LlamaForCausalLM`, as wide and
deep as the run's network, on the windows that the run trained on, at random places, by its optimiser, learning rate,
schedule and batch size. It prints both in bits/character of the text that is tested on, cut into windows without a
context and with one of half a window. The run's figure is a bound, with its Monte Carlo error; that of the
autoregressive model is exact. A step of both costs about the same; seconds can be compared where both trained on one
idle machine.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from vdm_hub import MuonAndAdamW, TokenWindows, evaluate, hidden_matrices, load_pipeline, load_windows


class Places(Dataset[dict[str, Tensor]]):
    """So many windows of a text, each at a random place, after the token that begins each."""

    def __init__(self, windows: TokenWindows, count: int) -> None:
        self.windows, self.count, self.draws = windows, count, random.Random(0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        length = self.windows.cut.length
        start = self.draws.randrange(len(self.windows.tokens) - length + 1)
        ids = _begun(self.windows.tokens[None, start : start + length].long(), self.windows.num_levels)[0]
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    """Train the autoregressive model, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of tokens")
    parser.add_argument("--replicates", type=int, default=8, help="of the bound (default: 8)")
    parser.add_argument("--max_steps", type=int, help="of the autoregressive model (default: the run's)")
    given = parser.parse_args()
    recipe = yaml.safe_load((given.run / "recipe.yaml").read_text())
    run = json.loads((given.run / "run.json").read_text())
    pipeline = load_pipeline(str(given.run))
    length, steps = pipeline.cut.length, given.max_steps or run["steps"]

    def windows(split: str, context: int) -> TokenWindows:
        cut = replace(pipeline.cut, context=context)
        return load_windows(recipe["dataset_name"], split, pipeline.tokenization, cut)

    model, seconds = train(windows(recipe["train_split"], 0), recipe, steps)
    print("| model | parameters | steps | seconds | given of each window | bits/character |")
    print("| --- | --- | --- | --- | --- | --- |")
    for context in (0, length // 2):
        test = windows(recipe["test_split"], context)
        report = evaluate(pipeline, test, replicates=given.replicates, progress=False)
        bound = f"{report.bits_per_dim:.4f} ± {report.standard_error:.4f}"
        _row("diffusion", run["parameters"]["network"], run["steps"], run["training_seconds"], context, bound)
        _row("autoregressive", model.num_parameters(), steps, seconds, context, f"{bits(model, test):.4f}")


def train(windows: TokenWindows, recipe: dict[str, Any], steps: int) -> tuple[LlamaForCausalLM, float]:
    """The model, and the seconds that its steps took."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    chosen = {name: recipe["network"][name] for name in sizes}
    values = windows.num_levels + 1  # and what a window begins with
    torch.manual_seed(recipe["seed"])
    model = LlamaForCausalLM(LlamaConfig(**chosen, vocab_size=values, bos_token_id=values - 1, eos_token_id=None))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=recipe["train_batch_size"],
            learning_rate=recipe["learning_rate"],
            lr_scheduler_type=recipe["lr_scheduler"],
            warmup_steps=recipe["lr_warmup_steps"],
            weight_decay=recipe["adam_weight_decay"],
            max_grad_norm=recipe["max_grad_norm"],
            report_to="none",
            save_strategy="no",
            logging_steps=100,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        optimizer = None
        if recipe.get("optimizer") == "muon":
            rate, decay = recipe["learning_rate"], recipe["adam_weight_decay"]
            groups = [{"params": model.parameters()}]
            optimizer = MuonAndAdamW(groups, hidden_matrices(model), lr=rate, weight_decay=decay)
        data = Places(windows, steps * recipe["train_batch_size"])
        started = time.perf_counter()
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()
        return model.eval(), time.perf_counter() - started


@torch.no_grad()
def bits(model: LlamaForCausalLM, windows: TokenWindows) -> float:
    """Bits of each scored token, given those before it in its window."""
    nats, scored = 0.0, 0
    for places in torch.arange(len(windows)).split(64):
        batch = windows.take(places)
        levels = batch["levels"]
        logits = model(_begun(levels, windows.num_levels)).logits[:, :-1].double()
        each = F.cross_entropy(logits.transpose(1, 2), levels, reduction="none")
        counted = ~batch.get("given", torch.zeros_like(levels, dtype=torch.bool))
        nats, scored = nats + float(each[counted].sum()), scored + int(counted.sum())
    return nats / scored / math.log(2)


def _begun(levels: Tensor, begin: int) -> Tensor:
    return F.pad(levels, (1, 0), value=begin)


def _row(name: str, parameters: int, steps: int, seconds: float, context: int, figure: str) -> None:
    print(f"| {name} | {parameters:,} | {steps:,} | {seconds:,.0f} | {context} | {figure} |", flush=True)


if __name__ == "__main__":
    main()
