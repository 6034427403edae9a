"""The answers to the requests of lm-evaluation-harness, by the likelihoods and samples of a `TokenPipeline`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors import ConfigurationError, shortened
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.fields import whole_number
from vdm_hub.files import expanded
from vdm_hub.likelihood.methods import method_of
from vdm_hub.pipelines.tokens import TokenPipeline

_LOGGER = logging.getLogger("lm_eval.vdm_hub")  # the harness shows its own
_BATCH = 32
_MOST_NEW = 256


@dataclass(frozen=True)
class Answer:
    """The log-likelihood of a request.

    Attributes:
        request_type: The harness's name of it.
        task: The task that asks.
        doc_id: Of which of its documents.
        idx: Which of the document's requests.
        log_likelihood: In nats; a lower bound where the method gives one.
        standard_error: Its Monte Carlo error; ``None`` where one replicate can't tell it.
        bytes: Of the text that it is of, in UTF-8.
    """

    request_type: str
    task: str | None
    doc_id: int | None
    idx: int | None
    log_likelihood: float
    standard_error: float | None
    bytes: int


class HarnessModel:
    """A `TokenPipeline` as a model of the harness, whose base class stands behind it.

    Args:
        pretrained: A run, a pipeline's folder, or a Hub id.
        revision: Of a Hub id.
        method: The likelihood by its name, such as ``bound``; by default the pipeline's `default_method`.
        replicates: Independent estimates of each request, behind its error.
        seed: Of all draws.
        num_inference_steps: Evaluations of the network for each part that is generated.
        greedy: Whether to find out if a continuation is what the likeliest tokens give, one opened after the other, at
            an evaluation for each token; the harness's ``acc`` of a continuation asks it. Else the answer is no.
        errors: A file for a line of JSON for each log-likelihood with its error: see `Answer`.
        batch_size: Windows at once; it changes no figure.
        max_batch_size: Nothing: sizes are not searched.
        device: Where to compute; on the CPU where it is a GPU and there is none, which is said.

    Raises:
        ConfigurationError: It is no model of texts, or a number is out of range.
    """

    def __init__(
        self,
        pretrained: str,
        revision: str | None = None,
        method: str | None = None,
        replicates: int = 8,
        seed: int = 0,
        num_inference_steps: int = 128,
        greedy: bool = False,
        errors: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        pipeline = load_pipeline(str(pretrained), revision=revision)
        if not isinstance(pipeline, TokenPipeline):
            raise ConfigurationError(
                f"{pretrained} holds a {type(pipeline).__name__}, and the harness asks of texts: name a TokenPipeline."
            )
        pipeline.set_progress_bar_config(disable=True)
        if str(device).startswith("cuda") and not torch.cuda.is_available():  # which the harness asks for by itself
            _LOGGER.warning("device is %s, and there is none: computing on the CPU", device)
            device = None
        self.pipeline: Any = pipeline if device is None else pipeline.to(device)
        self.name, self.greedy = str(pretrained), bool(greedy)
        self.method = method_of(pipeline.default_method if method is None else method)
        self.replicates, self.seed = whole_number("replicates", replicates), whole_number("seed", seed, 0)
        self.steps = whole_number("num_inference_steps", num_inference_steps)
        automatic = batch_size is None or str(batch_size).startswith("auto")
        self.batch_size = _BATCH if automatic else whole_number("batch_size", int(str(batch_size)))
        self.errors = None if errors is None else expanded(str(errors))
        self.answers: list[Answer] = []
        self._summaries: dict[str, dict[str, Any]] = {}

    @property
    def tokenizer_name(self) -> str:
        """The pipeline's name, which the harness keeps its requests under."""
        return self.name

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes of the model beside its results: how it was measured, and the errors."""
        how = {"method": self.method.name, "replicates": self.replicates, "seed": self.seed}
        return {"vdm_hub": how | {"weights": weights_fingerprint(self.pipeline)} | self._summaries}

    # ---- likelihoods ------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """``log p(continuation | context)`` of each request, and whether the continuation is the likeliest."""
        pairs = [(str(context), str(text)) for context, text in (request.args for request in requests)]
        nats = self._measured([text for _, text in pairs], [context for context, _ in pairs])
        self._record("loglikelihood", requests, [text for _, text in pairs], nats)
        if not self.greedy:
            _LOGGER.info("whether a continuation is the likeliest was not looked at (greedy=True): said to be no")
        greedy = [self.greedy and self._is_likeliest(*pair) for pair in tqdm(pairs, disable=not self.greedy)]
        answers = list(zip((-nats.mean(0)).tolist(), greedy, strict=True))
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)  # type: ignore[attr-defined]
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """``log p(text)`` of each request, in the windows that the pipeline's config says."""
        texts = [str(request.args[0]) for request in requests]
        nats = self._measured(texts)
        self._record("loglikelihood_rolling", requests, texts, nats)
        answers: list[float] = (-nats.mean(0)).tolist()
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)  # type: ignore[attr-defined]
        return answers

    def _measured(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> Tensor:
        """``-log p`` of each text in nats, (replicates, texts); zero of an empty one."""
        there = [place for place, text in enumerate(texts) if text]
        found = torch.zeros(self.replicates, len(texts), dtype=torch.float64)
        if not there:
            return found
        report = self.pipeline.log_likelihood(
            [texts[place] for place in there],
            self.method,
            self.replicates,
            self.seed,
            contexts=None if contexts is None else [contexts[place] for place in there],
            batch_size=self.batch_size,
        )
        for note in report.details.get("notes", ()):
            _LOGGER.warning("%s", note)
        nats = torch.stack(list(report.terms_per_image.values())).sum(0)
        parts = nats.split(report.details["windows_of_texts"], dim=1)
        found[:, there] = torch.stack([part.sum(1) for part in parts], 1)
        return found

    def _record(self, kind: str, requests: Sequence[Any], texts: Sequence[str], nats: Tensor) -> None:
        """Keep the errors of some answers, and say how large they are."""
        errors = [None] * len(texts) if len(nats) < 2 else (nats.std(0) / math.sqrt(len(nats))).tolist()
        whole = None if len(nats) < 2 else float(nats.sum(1).std()) / math.sqrt(len(nats))
        sizes = [len(text.encode("utf-8", "surrogatepass")) for text in texts]
        answers = [
            Answer(kind, request.task_name, request.doc_id, request.idx, -value, error, size)
            for request, value, error, size in zip(requests, nats.mean(0).tolist(), errors, sizes, strict=True)
        ]
        self.answers += answers
        by_byte = 1 / (math.log(2) * max(sum(sizes), 1))
        total = float(nats.sum(1).mean())
        self._summaries[kind] = {
            "requests": len(texts),
            "log_likelihood": -total,
            "standard_error": whole,
            "largest_standard_error": None if whole is None else max(filter(None, errors), default=0.0),
            "bytes": sum(sizes),
            "bits_per_byte": total * by_byte,
            "bits_per_byte_standard_error": None if whole is None else whole * by_byte,
        }
        _LOGGER.info("%s: %s", kind, json.dumps(self._summaries[kind]))
        if self.errors is not None:
            _append(self.errors, answers)

    def _is_likeliest(self, context: str, continuation: str) -> bool:
        words = self.pipeline.tokenization
        given, wanted = self._ids(context), words.ids_of(torch.from_numpy(words.encode(continuation).levels).long())
        length = len(wanted)
        if not 0 < length <= self.pipeline.cut.length:
            return length == 0
        drawn = self._opened(given, length, length, temperature=0.0)
        return drawn == wanted.tolist()

    # ---- texts ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first word to stop at or the end of a document.

        Parts of half a window are opened one after the other, until there are ``max_gen_toks`` tokens.
        """
        found = []
        for request in tqdm(requests, disable=disable_tqdm):
            context, options = request.args
            text = self._generated(str(context), options)
            self.cache_hook.add_partial("generate_until", (context, options), text)  # type: ignore[attr-defined]
            found.append(text)
        return found

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        until = options.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        most = whole_number("max_gen_toks", options.get("max_gen_toks", _MOST_NEW))
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        words: Tokenization = self.pipeline.tokenization
        half, text = max(1, self.pipeline.cut.length // 2), ""
        given, fresh, values = self._ids(context), list[int](), list[int]()
        while len(fresh) < most and words.end not in values:
            fresh += self._opened(given + fresh, min(half, most - len(fresh)), self.steps, temperature)
            values = words.levels_of(np.array(fresh)).tolist()
            text = words.decode(values[: values.index(words.end)] if words.end in values else values)
            ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
            if ends:
                return text[: min(ends)]
        return text

    def _opened(self, given: list[int], count: int, steps: int, temperature: float) -> list[int]:
        """Ids for so many holes after some ids, of which the last are read that a window has room for."""
        kept = given[max(0, len(given) + count - self.pipeline.cut.length) :]
        ids = self.pipeline(
            prompt=[*kept, *[None] * count],
            num_inference_steps=steps,
            temperature=temperature,
            generator=torch.Generator().manual_seed(self.seed),
        ).ids
        found: list[int] = ids[0, len(kept) :].tolist()
        return found

    def _ids(self, text: str) -> list[int]:
        words = self.pipeline.tokenization
        ids: list[int] = words.ids_of(torch.from_numpy(words.encode(text).levels).long()).tolist()
        return ids


def _append(path: Path, answers: Sequence[Answer]) -> None:
    """Write lines at the end of a file.

    Raises:
        ConfigurationError: It can't be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{json.dumps(asdict(answer))}\n" for answer in answers)
    except OSError as error:
        raise ConfigurationError(
            f"errors is {shortened(str(path))}, which can't be written ({error}): name a file in a folder "
            f"that is there."
        ) from error
