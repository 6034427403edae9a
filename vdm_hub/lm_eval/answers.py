"""The log-likelihoods that the harness was told, with what it has no place for: their errors, and what they are of."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vdm_hub.errors import ConfigurationError, shortened


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
        whole: Whether the tokens say all of the text. Else the log-likelihood is that of its tokens alone, at least as
            high as the text's.
    """

    request_type: str
    task: str | None
    doc_id: int | None
    idx: int | None
    log_likelihood: float
    standard_error: float | None
    bytes: int
    whole: bool


def answers_of(
    kind: str, requests: Sequence[Any], texts: Sequence[str], whole: Sequence[bool], nats: Tensor
) -> list[Answer]:
    """The answers to some requests.

    Args:
        kind: The harness's name of them.
        requests: As the harness gives them.
        texts: Which each is of.
        whole: See `Answer`.
        nats: ``-log p`` of each, (replicates, requests).
    """
    errors = [None] * len(texts) if len(nats) < 2 or not texts else (nats.std(0) / math.sqrt(len(nats))).tolist()
    rows = zip(requests, nats.mean(0).tolist(), errors, texts, whole, strict=True)
    return [
        Answer(kind, request.task_name, request.doc_id, request.idx, -value, error, len(text.encode()), is_whole)
        for request, value, error, text, is_whole in rows
    ]


def summary_of(answers: Sequence[Answer], nats: Tensor, notes: Sequence[str]) -> dict[str, Any]:
    """All answers of a kind together: their sum and bits/byte, with both errors.

    There is no figure in bits/byte where tokens don't say all of the texts.
    """
    total = float(nats.sum(1).mean())
    whole = None if len(nats) < 2 else float(nats.sum(1).std()) / math.sqrt(len(nats))
    size, lossy = sum(answer.bytes for answer in answers), sum(not answer.whole for answer in answers)
    by_byte = None if lossy or not size else 1 / (math.log(2) * size)
    errors = [answer.standard_error for answer in answers if answer.standard_error is not None]
    return {
        "requests": len(answers),
        "log_likelihood": -total,
        "standard_error": whole,
        "largest_standard_error": None if whole is None else max(errors, default=0.0),
        "bytes": size,
        "texts_not_whole": lossy,
        "bits_per_byte": None if by_byte is None else total * by_byte,
        "bits_per_byte_standard_error": None if by_byte is None or whole is None else whole * by_byte,
        "notes": list(notes),
    }


def append_answers(path: Path, answers: Sequence[Answer]) -> None:
    """Write a line of JSON for each at the end of a file; none tries whether it can be written.

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
