"""The tables of reports, image by image, as Parquet files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vdm_hub.data.images import ImageLevels
from vdm_hub.data.kinds import IMAGES, TOKENS
from vdm_hub.data.sequences import TokenWindows
from vdm_hub.files import written_beside
from vdm_hub.likelihood.classification_report import ClassificationReport
from vdm_hub.likelihood.report import LikelihoodReport


def write_table(report: LikelihoodReport, path: Path, data: Any) -> None:
    """Write one row per datum: `write_per_image` of images, `write_per_window` of texts."""
    write: dict[str, Callable[..., None]] = {IMAGES.name: write_per_image, TOKENS.name: write_per_window}
    write[report.units.kind.name](report, path, data)


def write_per_window(report: LikelihoodReport, path: Path, windows: TokenWindows) -> None:
    """Write one row per window, in their order, and the report as JSON in the file's metadata, under ``vdm_hub``.

    Columns: ``window``, its number; ``token``, the number of its first token in the text; ``tokens`` and ``bytes``, of
    those that it scores; ``bits``, of these together; and ``bits_standard_error``, over the replicates (null for one).
    Where the tokens don't say all of the texts, ``bytes`` is null in every row, as bits by byte would be too few.
    """
    count, starts = report.num_images, windows.places[0]
    error = report.standard_error_per_image if report.replicates > 1 else None
    tokens, sizes = windows.scored()
    columns = {
        "window": pa.array(range(count), pa.int64()),
        "token": pa.array(starts[:count].numpy()),
        "tokens": pa.array(tokens[:count].numpy()),
        "bytes": pa.array(sizes[:count].numpy()) if windows.facts.whole else pa.nulls(count, pa.int64()),
        "bits": pa.array((report.per_image * report.dimensions).numpy()),
        "bits_standard_error": pa.nulls(count, pa.float64())
        if error is None
        else pa.array((error * report.dimensions).numpy()),
    }
    table = pa.table(columns).replace_schema_metadata({"vdm_hub": json.dumps(report.to_dict())})
    with written_beside(path) as beside:
        pq.write_table(table, beside)


def write_per_image(report: LikelihoodReport, path: Path, images: ImageLevels) -> None:
    """Write one row per image, in their order, and the report as JSON in the file's metadata, under ``vdm_hub``.

    All figures are in bits/dim, as the columns' names say; nats are ``bits_per_dim * dimensions * ln 2``, with
    ``dimensions`` of the report.

    Columns: ``image``, its number in the split; ``file``, its name in the dataset (null where it has none);
    ``bits_per_dim``; ``bits_per_dim_standard_error``, over the replicates (null for one); each term, such as
    ``bits_per_dim_prior``; ``class_label``, where there are labels.
    """
    count, scale = report.num_images, report.dimensions * math.log(2)
    error = report.standard_error_per_image if report.replicates > 1 else None
    columns = {
        "image": pa.array(range(count), pa.int64()),
        "file": pa.array((images.names or [None] * count)[:count], pa.string()),
        "bits_per_dim": pa.array(report.per_image.numpy()),
        "bits_per_dim_standard_error": pa.nulls(count, pa.float64()) if error is None else pa.array(error.numpy()),
    }
    terms = {name: term.mean(0) / scale for name, term in report.terms_per_image.items()}
    columns |= {f"bits_per_dim_{name}": pa.array(term.numpy()) for name, term in terms.items()}
    if images.labels is not None:
        columns["class_label"] = pa.array(images.labels[:count].numpy())
    table = pa.table(columns).replace_schema_metadata({"vdm_hub": json.dumps(report.to_dict())})
    with written_beside(path) as beside:
        pq.write_table(table, beside)


def write_posterior(report: ClassificationReport, images: ImageLevels, path: Path) -> None:
    """Write one row per image, in their order, and the report as JSON in the file's metadata, under ``vdm_hub``.

    Columns: ``image`` and ``file``, as in `write_per_image`; ``found``, the name of the class found; ``is``, that of
    its label, where there are labels; ``evaluations``; ``decided``; and ``p(name)``, the posterior of each class.
    """
    count, standing = len(report.predicted), report.standing
    columns = {
        "image": pa.array(range(count), pa.int64()),
        "file": pa.array((images.names or [None] * count)[:count], pa.string()),
        "found": pa.array([report.names[found] for found in report.predicted.tolist()]),
    }
    if report.labels is not None:
        columns["is"] = pa.array([report.names[label] for label in report.labels.tolist()])
    columns |= {"evaluations": pa.array(standing.evaluations.numpy()), "decided": pa.array(standing.decided.tolist())}
    posterior = report.posterior.T.contiguous()
    columns |= {f"p({name})": pa.array(of.numpy()) for name, of in zip(report.names, posterior, strict=True)}
    table = pa.table(columns).replace_schema_metadata({"vdm_hub": json.dumps(report.to_dict())})
    with written_beside(path) as beside:
        pq.write_table(table, beside)
