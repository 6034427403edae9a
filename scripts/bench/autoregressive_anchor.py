"""A run of texts beside an autoregressive model of the same size, data, steps and windows.

``python scripts/bench/autoregressive_anchor.py runs/shakespeare`` trains transformers' `LlamaForCausalLM`, as wide and
deep as the run's network, on the windows that the run trained on, at random places, by its optimiser, learning rate,
schedule and batch size. It prints both in bits/character of the text that is tested on, cut into windows without a
context and with one of half a window. The run's figure is a bound, with its Monte Carlo error; that of the
autoregressive model is exact. It is given every token of a window at every step, and so it learns a short text by
heart sooner: it is printed as it ends, and as it was at its best among `LOOKS`, by the tested text itself, which is a
little too good.
A step of both costs about the same; seconds can be compared where both trained on one idle machine.
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
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from vdm_hub import MuonAndAdamW, TokenWindows, evaluate, hidden_matrices, load_pipeline, load_windows

LOOKS = 14
"""So often the autoregressive model is measured while it trains."""


class Looks(TrainerCallback):
    """Bits of the tested text, for each context, and the seconds that the steps took until then."""

    def __init__(self, tests: dict[int, TokenWindows], every: int) -> None:
        self.tests, self.every = tests, every
        self.found: list[tuple[int, float, dict[int, float]]] = []
        self._seconds, self._since = 0.0, time.perf_counter()

    def on_step_end(self, arguments: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look, where it is time."""
        if state.global_step % self.every and state.global_step < state.max_steps:
            return
        self._seconds += time.perf_counter() - self._since
        model.eval()
        self.found.append((state.global_step, self._seconds, {c: bits(model, one) for c, one in self.tests.items()}))
        model.train()
        self._since = time.perf_counter()


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

    tests = {context: windows(recipe["test_split"], context) for context in (0, length // 2)}
    looks = Looks(tests, max(steps // LOOKS, 1))
    parameters = train(windows(recipe["train_split"], 0), recipe, steps, looks)
    print("| model | parameters | steps | seconds | given of each window | bits/character |")
    print("| --- | --- | --- | --- | --- | --- |")
    for context, test in tests.items():
        report = evaluate(pipeline, test, replicates=given.replicates, progress=False)
        bound = f"{report.bits_per_dim:.4f} ± {report.standard_error:.4f}"
        _row("diffusion", run["parameters"]["network"], run["steps"], run["training_seconds"], context, bound)
        best = min(looks.found, key=lambda look: look[2][context])
        for name, (step, seconds, figures) in (("as it ends", looks.found[-1]), ("at its best", best)):
            _row(f"autoregressive, {name}", parameters, step, seconds, context, f"{figures[context]:.4f}")


def train(windows: TokenWindows, recipe: dict[str, Any], steps: int, looks: Looks) -> int:
    """Train it, looked at on the way; returns how many parameters it has."""
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
            adam_beta1=recipe["adam_beta1"],
            adam_beta2=recipe["adam_beta2"],
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
            betas = recipe["adam_beta1"], recipe["adam_beta2"]
            groups = [{"params": model.parameters()}]
            optimizer = MuonAndAdamW(groups, hidden_matrices(model), lr=rate, betas=betas, weight_decay=decay)
        data = Places(windows, steps * recipe["train_batch_size"])
        Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[looks]).train()
    return int(model.num_parameters())


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
