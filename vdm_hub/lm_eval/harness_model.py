"""The answers to the requests of lm-evaluation-harness, by the likelihoods and samples of a `TokenPipeline`."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm.auto import tqdm

from vdm_hub.commands.loading import load_pipeline
from vdm_hub.data.sequences import ContextFacts, TextFacts, encode_pair
from vdm_hub.data.tokenization import Tokenization
from vdm_hub.errors import ConfigurationError, DataError, explained, shortened, unknown_name
from vdm_hub.evaluation.provenance import weights_fingerprint
from vdm_hub.fields import whole_number
from vdm_hub.files import expanded
from vdm_hub.likelihood.methods import method_of
from vdm_hub.lm_eval.answers import Answer, answers_of, append_answers, summary_of
from vdm_hub.pipelines.tokens import TokenPipeline

_LOGGER = logging.getLogger("lm_eval.vdm_hub")  # the harness shows its own
_BATCH = 32
_MOST_NEW = 256
_ARGUMENTS = (
    *("pretrained", "revision", "method", "replicates", "seed", "num_inference_steps"),
    *("greedy", "errors", "batch_size", "device"),
)


class HarnessModel:
    """A `TokenPipeline` as a model of the harness, whose base class stands behind it.

    Args:
        pretrained: A run, a pipeline's folder, or a Hub id.
        revision: Of a Hub id.
        method: The likelihood by its name, such as ``bound``; by default the pipeline's `default_method`.
        replicates: Independent estimates of each request, behind its error.
        seed: Of all draws.
        num_inference_steps: Evaluations of the network for each part that is generated.
        greedy: Whether to find out if a continuation is what the likeliest tokens give, opened one after the other
            from left to right, at an evaluation for each token; the harness's ``acc`` of a continuation asks it. Else
            the answer is no.
        errors: A file for a line of JSON for each log-likelihood with its error: see `Answer`.
        batch_size: Windows at once; it changes no figure.
        max_batch_size: Nothing: sizes are not searched.
        device: Where to compute; on the CPU where it is a GPU and there is none, which is said.
        others: None is known.

    Raises:
        ConfigurationError: There are others, it is no model of texts, a number is out of range, or there is no such
            device or place.
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
        **others: Any,
    ) -> None:
        super().__init__()
        for other in others:
            raise unknown_name("argument of the model vdm_hub", other, _ARGUMENTS)
        pipeline = load_pipeline(str(pretrained), revision=revision)
        if not isinstance(pipeline, TokenPipeline):
            raise ConfigurationError(
                f"{pretrained} holds a {type(pipeline).__name__}, and the harness asks of texts: name a TokenPipeline."
            )
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline: Any = _placed(pipeline, device)
        self.words: Tokenization = pipeline.tokenization
        self.name, self.greedy = str(pretrained), _switch("greedy", greedy)
        self.method = method_of(pipeline.default_method if method is None else method)
        self.replicates, self.seed = whole_number("replicates", replicates), whole_number("seed", seed, 0)
        self.steps = whole_number("num_inference_steps", num_inference_steps)
        self.batch_size = _windows_at_once(batch_size)
        self.errors = None if errors is None else expanded(str(errors))
        if self.errors is not None:
            append_answers(self.errors, [])  # before anything is measured
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
        """``log p(continuation | context)`` of each request, and whether the continuation is the likeliest.

        Where the tokens don't say all of a continuation it is that of its tokens, which `Answer.whole` says.
        """
        pairs = [(str(context), str(text)) for context, text in (request.args for request in requests)]
        texts = [text for _, text in pairs]
        nats, notes = self._measured(texts, [context for context, _ in pairs])
        self._record("loglikelihood", requests, texts, nats, notes)
        if not self.greedy:
            _LOGGER.info("whether a continuation is the likeliest was not looked at (greedy=True): said to be no")
        greedy = [self.greedy and self._is_likeliest(*pair) for pair in tqdm(pairs, disable=not self.greedy)]
        answers = list(zip((-nats.mean(0)).tolist(), greedy, strict=True))
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)  # type: ignore[attr-defined]
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """``log p(text)`` of each request, in the windows that the pipeline's config says.

        Raises:
            DataError: The tokens don't say all of a text: the harness would make a figure by byte or word of theirs.
        """
        texts = [str(request.args[0]) for request in requests]
        self._refuse_lossy(requests, texts)
        nats, notes = self._measured(texts)
        self._record("loglikelihood_rolling", requests, texts, nats, notes)
        answers: list[float] = (-nats.mean(0)).tolist()
        for text, answer in zip(texts, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answer)  # type: ignore[attr-defined]
        return answers

    def _refuse_lossy(self, requests: Sequence[Any], texts: Sequence[str]) -> None:
        lossy = [place for place, text in enumerate(texts) if not self._facts(text).whole]
        if lossy:
            first, (why,) = requests[lossy[0]], self._facts(texts[lossy[0]]).notes
            raise DataError(
                f"the tokens of {self.name} don't say all of {len(lossy):,} of {len(texts):,} texts. Of document "
                f"{first.doc_id} of the task {first.task_name}, {why}; the harness would make one of the tokens' "
                f"likelihood, and it would be too low. Take these texts out, or measure a model of bytes or of their "
                f"pairs."
            )

    def _facts(self, text: str) -> TextFacts:
        """What the tokens say of a text."""
        encoded = self.words.encode(text)
        return TextFacts(1, encoded.characters, encoded.unknown, int(encoded.altered))

    def _measured(self, texts: Sequence[str], contexts: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
        """``-log p`` of each text in nats, (replicates, texts), zero of an empty one; and notes on them."""
        there = [place for place, text in enumerate(texts) if text]
        found = torch.zeros(self.replicates, len(texts), dtype=torch.float64)
        if not there:
            return found, []
        report = self.pipeline.log_likelihood(
            [texts[place] for place in there],
            self.method,
            self.replicates,
            self.seed,
            contexts=None if contexts is None else [contexts[place] for place in there],
            batch_size=self.batch_size,
        )
        notes = [str(note) for note in report.details.get("notes", ())]
        for note in notes:
            _LOGGER.warning("%s", note)
        nats = torch.stack(list(report.terms_per_image.values())).sum(0)
        parts = nats.split(report.details["windows_of_texts"], dim=1)
        found[:, there] = torch.stack([part.sum(1) for part in parts], 1)
        return found, notes

    def _record(
        self, kind: str, requests: Sequence[Any], texts: Sequence[str], nats: Tensor, notes: Sequence[str]
    ) -> None:
        """Keep the errors of some answers, and say how large they are."""
        answers = answers_of(kind, requests, texts, [self._facts(text).whole for text in texts], nats)
        self.answers += answers
        self._summaries[kind] = summary_of(answers, nats, notes)
        _LOGGER.info("%s: %s", kind, json.dumps(self._summaries[kind]))
        if self.errors is not None:
            append_answers(self.errors, answers)

    def _is_likeliest(self, context: str, continuation: str) -> bool:
        """Whether each token is the likeliest after those before it, where all that follow are holes."""
        given, wanted = (_ids_of(self.words, one.levels) for one in encode_pair(context, continuation, self.words))
        length = self.pipeline.cut.length
        if len(wanted) > length or not self._facts(continuation).whole:
            why = (
                f"it has {len(wanted)} tokens, and a window {length}" if len(wanted) > length else "tokens lose a part"
            )
            _LOGGER.warning("%s is said not to be the likeliest continuation: %s", shortened(continuation), why)
            return False
        kept = given[max(0, len(given) + len(wanted) - length) :]
        for places in torch.arange(len(wanted)).split(self.batch_size) if wanted else ():
            rows = [[*kept, *wanted[:place], *[None] * (len(wanted) - place)] for place in places.tolist()]
            generators = [self._generator() for _ in rows]
            drawn = self.pipeline(prompt=rows, num_inference_steps=1, temperature=0.0, generator=generators).ids.cpu()
            if drawn[torch.arange(len(rows)), len(kept) + places].tolist() != [wanted[place] for place in places]:
                return False
        return True

    # ---- texts ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, up to the first word to stop at or the end of a document.

        Parts of half a window are opened one after the other, until there are ``max_gen_toks`` tokens. Draws are a
        function of the seed, and where they are sampled of the task, the document, and how often it was asked before.
        """
        found, asked, before = [], Counter[tuple[Any, ...]](), ContextFacts()
        for request in tqdm(requests, disable=disable_tqdm):
            context, options = request.args
            key = (request.task_name, request.doc_id, request.idx)
            generator = self._generator(*key, asked[key]) if options.get("do_sample") else self._generator()
            asked[key] += 1
            text, facts = self._generated(str(context), options, generator)
            before += facts
            self.cache_hook.add_partial("generate_until", (context, options), text)  # type: ignore[attr-defined]
            found.append(text)
        for note in before.notes:
            _LOGGER.warning("%s", note)
        self._summaries["generate_until"] = {"requests": len(found), "notes": list(before.notes)}
        return found

    def _generated(
        self, context: str, options: Mapping[str, Any], generator: torch.Generator
    ) -> tuple[str, ContextFacts]:
        """A text after a context, and what was given of that."""
        until = options.get("until") or ()
        stops = [until] if isinstance(until, str) else list(until)
        most = whole_number("max_gen_toks", options.get("max_gen_toks", _MOST_NEW))
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        words = self.words
        half, text = max(1, self.pipeline.cut.length // 2), ""
        encoded, fresh, values = words.encode(context), list[int](), list[int]()
        given = _ids_of(words, encoded.levels)
        while len(fresh) < most and words.end not in values:
            fresh += self._opened(given + fresh, min(half, most - len(fresh)), temperature, generator)
            values = words.levels_of(np.array(fresh)).tolist()
            text = words.decode(values[: values.index(words.end)] if words.end in values else values)
            ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
            if ends:
                text = text[: min(ends)]
                break
        is_shortened = len(given) + min(half, most) > self.pipeline.cut.length
        facts = ContextFacts(1, encoded.characters, encoded.unknown, int(encoded.altered), int(is_shortened))
        return text, facts

    def _opened(self, given: list[int], count: int, temperature: float, generator: torch.Generator) -> list[int]:
        """Ids for so many holes after some ids, of which the last are read that a window has room for."""
        kept = given[max(0, len(given) + count - self.pipeline.cut.length) :]
        prompt = [*kept, *[None] * count]
        ids = self.pipeline(
            prompt=prompt, num_inference_steps=self.steps, temperature=temperature, generator=generator
        ).ids
        found: list[int] = ids[0, len(kept) :].tolist()
        return found

    def _generator(self, *key: Any) -> torch.Generator:
        """A generator that is a function of the seed and a key alone."""
        digest = hashlib.sha256(json.dumps([self.seed, *key]).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _ids_of(words: Tokenization, levels: npt.NDArray[np.int32]) -> list[int]:
    """Values as ids of the tokenizer."""
    ids: list[int] = words.ids_of(torch.from_numpy(levels).long()).tolist()
    return ids


def _placed(pipeline: TokenPipeline, device: str | None) -> Any:
    """The pipeline on a device; on the CPU where a GPU is named, as the harness does by itself, and there is none.

    Raises:
        ConfigurationError: There is no such device.
    """
    if device is None:
        return pipeline
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        _LOGGER.warning("device is %s, and there is none: computing on the CPU", device)
        return pipeline
    remedy = "name cpu, cuda, or one of several by its number, such as cuda:0"
    with explained(f"device is {shortened(device)}, where nothing can be computed", remedy, ConfigurationError):
        return pipeline.to(device)


def _windows_at_once(given: int | str | None) -> int:
    """The number of windows in a batch, a fixed one where it is to be searched.

    Raises:
        ConfigurationError: It is no number.

    >>> _windows_at_once("16"), _windows_at_once("auto:4")
    (16, 32)
    """
    word = str(given)
    if given is None or word.startswith("auto"):
        return _BATCH
    return whole_number("batch_size", int(word) if word.isdecimal() else given)


def _switch(name: str, given: Any) -> bool:
    """A switch that is on or off.

    Raises:
        ConfigurationError: It is neither.

    >>> _switch("greedy", "False"), _switch("greedy", 1)
    (False, True)
    """
    known = {"true": True, "1": True, "false": False, "0": False}
    if (found := known.get(str(given).lower())) is None:
        raise ConfigurationError(f"{name} is {shortened(given)}: give true or false.")
    return found
