"""A masking process, a tokenizer and a network of transformers, all tiny, for models of texts in tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from distributions import write_metadata
from vdm_hub import BoundProcess, ForwardProcess, Generator, Network, Noise, TokenPipeline, VDMScheduler, registry
from vdm_hub.data.tokenization import END, MASK, UNKNOWN, make_tokenizer
from vdm_hub.diffusion.draws import uniform_noise

LENGTH = 8
LETTERS = "abcdefg "
PROCESS = {"name": "tiny_masking", "package": "vdm-hub-tiny-tokens"}
TEXT = "a bad cab faced a bag; fed, a gab ebbed. " * 12
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
NETWORK = SIZES | {"hidden_dropout_prob": 0.1}


class MaskingProcess(ForwardProcess):
    """Sites are masked at a rate t: z_t is the id K there."""

    example_shape = (LENGTH,)

    def __init__(self, num_levels: int = 4, num_train_timesteps: int = 1000) -> None:
        super().__init__()
        self.num_levels, self.num_train_timesteps = num_levels, num_train_timesteps

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any], schedule: Any = None) -> MaskingProcess:
        return cls(fields["num_levels"], fields.get("num_train_timesteps", 1000))

    def to_config(self) -> dict[str, Any]:
        return {}

    def fields(self) -> dict[str, Any]:
        form = registry.serialise("forward_processes", self)
        sizes = {"num_levels": self.num_levels, "num_train_timesteps": self.num_train_timesteps}
        return {"forward_process": form} | sizes

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (*shape, self.num_levels)

    def encode(self, levels: Tensor) -> Tensor:
        return levels.float()

    def quantise(self, x: Tensor) -> Tensor:
        return x.long().clamp(0, self.num_levels - 1)

    def draw_noise(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> dict[str, Tensor]:
        return {"marginal": uniform_noise(shape, generator, device)}

    def bind(self, x: Tensor | None, noise: Noise) -> tuple[dict[str, Tensor], Masked]:
        return {}, Masked(self, x, None)

    def bind_given(self, x: Tensor, noise: Noise, given: Tensor) -> tuple[dict[str, Tensor], Masked]:
        return {}, Masked(self, x, given)


class Masked(BoundProcess):
    def __init__(self, process: MaskingProcess, x: Tensor | None, given: Tensor | None) -> None:
        self.process, self.x, self.given = process, x, given

    def _held(self, z: Tensor) -> Tensor:
        return z if self.given is None or self.x is None else torch.where(self.given, self.x, z)

    def sample(self, x: Tensor, t: Tensor, noise: Noise) -> Tensor:
        return self._held(torch.where(noise["marginal"] < t.reshape(-1, 1), float(self.process.num_levels), x))

    def predict(self, network: Network, z_t: Tensor, t: Tensor) -> Tensor:
        return network(z_t, (t * 999).float().to(z_t.device).expand(len(z_t)))

    def _costs(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        z_t = self.sample(x, t, noise)
        costs = F.cross_entropy(self.predict(network, z_t, t).movedim(-1, 1), x.long(), reduction="none")
        return torch.where(z_t == self.process.num_levels, costs, 0.0).sum(1)

    def transition_kl(self, x: Tensor, s: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        return (t - s) / t * self._costs(x, t, noise, network)

    def kl_rate(self, x: Tensor, t: Tensor, noise: Noise, network: Network) -> Tensor:
        return self._costs(x, t, noise, network) / t.clamp(min=1e-6)

    def prior_kl(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x))

    def reconstruction(self, levels: Tensor, x: Tensor, noise: Noise, network: Network) -> Tensor:
        return x.new_zeros(len(x))

    def prior_sample(self, shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
        return self._held(torch.full(shape, float(self.process.num_levels), device=device))

    def reverse_step(
        self, output: Tensor, z_t: Tensor, s: Tensor, t: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        masked = z_t == self.process.num_levels
        turns, values = uniform_noise((len(z_t), 2, *z_t.shape[1:]), generator, z_t.device).unbind(1)
        upto = output.softmax(-1).cumsum(-1)
        drawn = (values[..., None] > upto).sum(-1).clamp(max=self.process.num_levels - 1).to(z_t.dtype)
        opens = masked & (turns < float((t - s) / t))
        return self._held(torch.where(opens, drawn, z_t)), self._held(torch.where(masked, output.argmax(-1), z_t))

    def decode(self, z_0: Tensor, network: Network, generator: Generator) -> Tensor:
        return self.process.quantise(z_0)


def install(folder: Path) -> Path:
    """The process as that of an installed distribution; for processes of their own, with this module beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "tiny_tokens.py")
    shutil.copy(Path(__file__).with_name("distributions.py"), folder / "distributions.py")
    entry = "[vdm_hub.forward_processes]\ntiny_masking = tiny_tokens:MaskingProcess\n"
    return write_metadata(folder, PROCESS["package"], "0.1", entry)


def tokenizer() -> Any:
    return make_tokenizer("character", lambda: [LETTERS])


def without_mask(words: Any) -> Any:
    """The same tokenizer as it would be, had it no mask token, which is its last."""
    described = json.loads(words.backend_tokenizer.to_str())
    described["added_tokens"] = [one for one in described["added_tokens"] if one["content"] != MASK]
    model = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token=UNKNOWN, eos_token=END)


def network(vocabulary: int, length: int = LENGTH, seed: int = 0, **others: Any) -> BertForMaskedLM:
    torch.manual_seed(seed)
    known = {"vocab_size": vocabulary, "max_position_embeddings": length, "pad_token_id": None}
    return BertForMaskedLM(BertConfig(**{**SIZES, **known, "initializer_range": 0.5, **others})).eval()


def pipeline(length: int = LENGTH, context: int = 0, **others: Any) -> TokenPipeline:
    words = tokenizer()
    scheduler = VDMScheduler(num_levels=len(words) - 1, forward_process=PROCESS)
    windows = {"length": length, "context": context, "text_column": "text"}
    made = TokenPipeline(network(len(words), length), words, scheduler, windows=windows, **others)
    made.set_progress_bar_config(disable=True)
    return made


def run_fields(path: Path, **others: Any) -> dict[str, Any]:
    """The fields of a recipe for a run on `TEXT`, which is written into the folder."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "a.txt").write_text(TEXT)
    usual = {"num_levels": 256, "noise_schedule": "linear", "unet": {}, "model": "tokens", "forward_process": PROCESS}
    texts = {"dataset_name": str(path / "a.txt"), "tokenizer": "character", "window_length": LENGTH}
    network = {} if "network_from" in others else {"network": NETWORK}
    return {**usual, **texts, **network} | others
