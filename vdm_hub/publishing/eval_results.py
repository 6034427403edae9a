"""Figures as the Hub's own evaluation results, `.eval_results/*.yaml`: what is stated there, and what can't be."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from vdm_hub.data.held_out import SPLIT
from vdm_hub.data.kinds import Figure, kind_of
from vdm_hub.errors import shortened
from vdm_hub.publishing.markdown import visible

OWN_RESULTS = f"{EVAL_RESULTS_FOLDER}/vdm_hub.yaml"
"""The file of the model's own publication, which the next one replaces; submitted figures have files of their own."""
_HUB_DATASET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_WHOLE_SPLIT = re.compile(r"\w[\w.-]*", re.ASCII)
_COLUMNS = ("color", "image_column", "text_column")
"""What a dataset's description says only where it is not the data as they usually are."""
_EFFORT = ("times_per_datum", "times_per_image", "pilot_evaluations")
"""The options of a method that change the error of a figure alone."""
_USUAL_LEVELS = 256


@dataclass(frozen=True)
class Stated:
    """The place of a figure among others: two figures of one place should be equal within their errors.

    Attributes:
        dataset_id: The dataset on the Hub.
        task_id: The unit, configuration and split, as in ``bits_per_dim_test``, and what was done to the data.
        protocol: How it is measured: the method with its options, and what of the model was corrected.
    """

    dataset_id: str
    task_id: str
    protocol: str

    @property
    def file(self) -> str:
        """The path in a repository of a figure that is submitted.

        >>> Stated("uoft-cs/cifar10", "bits_per_dim_test", "bound").file
        '.eval_results/uoft-cs_cifar10_bits_per_dim_test_cf9c680f.yaml'
        """
        digest = hashlib.sha256(repr(self).encode()).hexdigest()[:8]
        name = f"{self.dataset_id.replace('/', '_')}_{self.task_id}"
        return f"{EVAL_RESULTS_FOLDER}/{name[:120]}_{digest}.yaml"

    def is_of(self, entry: EvalResultEntry) -> bool:
        """Whether an entry states a figure of this place."""
        same = (entry.dataset_id, entry.task_id) == (self.dataset_id, self.task_id)
        return same and str(entry.notes).endswith(f"; protocol: {self.protocol}.")


def not_stated(dataset: Mapping[str, Any]) -> str:
    """Why a figure on some data is none of a dataset on the Hub; empty where it is one.

    Args:
        dataset: What `vdm_hub.evaluation.provenance` says of the data.

    >>> not_stated({"name": "uoft-cs/cifar10", "split": "test"})
    ''
    >>> not_stated({"name": "digits", "split": "test"})
    "the data 'digits' are no dataset owner/name on the Hub"
    """
    name, split = dataset.get("name"), dataset.get("split")
    if not isinstance(name, str) or not _HUB_DATASET.fullmatch(name):
        return f"the data {shortened(name)} are no dataset owner/name on the Hub"
    if not isinstance(split, str) or not _WHOLE_SPLIT.fullmatch(split) or split == SPLIT:
        return f"the data are {shortened(split)} of {name}, which is no whole split of it"
    for limit in ("max_images", "max_windows"):
        if limit in dataset:
            return f"the data are the first {dataset[limit]:,} of the split {split!r} of {name}, and not all of it"
    return ""


def stated(
    dataset: Mapping[str, Any],
    method: str,
    options: Mapping[str, Any],
    condition: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Stated:
    """The place of a figure, which is known before it is measured.

    Args:
        dataset: What `vdm_hub.evaluation.provenance` says of the data, a dataset on the Hub.
        method: The name of the likelihood method.
        options: Those that were chosen.
        condition: What the model is told of each datum.
        overrides: What of the checkpoint's config was corrected.
    """
    of_texts = "windows" in dataset
    told = [] if condition is None else [f"given_{condition}"]
    done = [str(dataset[name]) for name in _COLUMNS if dataset.get(name) is not None]
    done += ["x".join(map(str, dataset["shape"][1:]))] if dataset.get("resized") else []
    done += [f"{dataset['levels']}_levels"] if not of_texts and dataset["levels"] != _USUAL_LEVELS else []
    words = [f"bits_per_{'byte' if of_texts else 'dim'}", *told, dataset.get("config"), dataset["split"], *done]
    chosen = {name: value for name, value in options.items() if name not in _EFFORT}
    if of_texts:
        chosen |= {"window_length": dataset["shape"][0], "window_context": dataset["window_context"]}
    chosen |= overrides or {}
    how = ", ".join([method, *(f"{name}={value}" for name, value in sorted(chosen.items()))])
    task = "_".join(re.sub(r"[^\w.-]+", "-", word, flags=re.ASCII) for word in words if word)
    return Stated(dataset["name"], task, visible(how).replace(";", ","))


def entry_of(
    evaluation: Mapping[str, Any],
    place: Stated,
    source_url: str,
    *,
    date: str | None = None,
    dataset_revision: str | None = None,
    measured: str = "",
) -> EvalResultEntry:
    """A figure as the Hub's evaluation result: nothing is in it that is not known, and no token vouches for it.

    Args:
        evaluation: What ``vdm-hub evaluate --json`` prints.
        place: Its `stated`.
        source_url: Where that record is, or will be.
        date: When it was measured, in ISO 8601.
        dataset_revision: The commit that the dataset was at.
        measured: Of which model, as words.
    """
    dataset = evaluation["dataset"]
    figure = kind_of(dataset).figures(evaluation)[0]
    return EvalResultEntry(
        dataset_id=place.dataset_id,
        task_id=place.task_id,
        value=round(float(figure.value), 6),
        dataset_revision=dataset_revision,
        date=date,
        source_url=source_url,
        source_name=source_url.rpartition("/")[2],
        notes="; ".join([*_words(evaluation, figure), *filter(None, [measured]), f"protocol: {place.protocol}."]),
    )


def _words(evaluation: Mapping[str, Any], figure: Figure) -> list[str]:
    dataset, data = evaluation["dataset"], kind_of(evaluation["dataset"]).data
    shape = "x".join(map(str, dataset["shape"]))
    what = "an upper bound of the" if evaluation["is_bound"] else "an estimate of the"
    resized = ["resized, so not comparable with published figures"] if dataset.get("resized") else []
    return [
        f"{figure.unit}, lower is better: {what} negative log-likelihood",
        f"standard error {_error(figure.standard_error)} (Monte Carlo, {evaluation['replicates']} replicates), "
        f"{_error(figure.standard_error_over_data)} (over {data})",
        f"{evaluation['num_images']:,} {data} of the split {dataset['split']}, {shape}, {dataset['levels']:,} levels",
        *resized,
        *_clipped(evaluation.get("clipped")),
        f"seed {evaluation['seed']}, vdm_hub {visible(evaluation['versions'].get('vdm-hub', 'of unknown version'))}",
    ]


def _clipped(figures: Mapping[str, Any] | None) -> list[str]:
    """The words on the clipped model of a checkpoint whose sampler clips: the value is that of the unclipped one."""
    if figures is None:
        return []
    value, error = figures["bits_per_dim"], _error(figures["standard_error"])
    return [f"without its sampler's clipping of estimates; with it {value:.4f} bits/dim, standard error {error}"]


def _error(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.2g}"


def results_yaml(entry: EvalResultEntry) -> str:
    """The text of a file in `.eval_results/`.

    >>> print(results_yaml(EvalResultEntry("a/b", "bits_per_dim_test", 2.5)), end="")
    - dataset:
        id: a/b
        task_id: bits_per_dim_test
      value: 2.5
    """
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True, width=10**6)


def published_results(evaluation: Mapping[str, Any], source_url: str) -> tuple[str, str]:
    """The text of the file that a publication states its figure in, or why there is none: one of the two is empty.

    Args:
        evaluation: What ``vdm-hub evaluate --json`` printed, or empty.
        source_url: Where that will be.
    """
    if not evaluation:
        return "", "nothing was measured"
    dataset = evaluation.get("dataset")
    if dataset is None:
        return "", "the record does not say on which data it was measured"
    if why := not_stated(dataset):
        return "", why
    place = stated(dataset, evaluation["method"], evaluation.get("options", {}), evaluation.get("condition"))
    if "windows" in dataset and evaluation.get("bits_per_byte") is None:
        return "", "bits/token depend on the tokenizer, and the record has no figure in bits/byte"
    return results_yaml(entry_of(evaluation, place, source_url)), ""
