"""A report image by image, as a Parquet file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from vdm_hub.files import written_beside
from vdm_hub.likelihood.report import LikelihoodReport


def write_per_image(report: LikelihoodReport, path: Path, labels: Tensor | None = None) -> None:
    """One row per image, in their order, and the whole report as JSON in the file's metadata, under ``vdm_hub``.

    Columns: ``image``, its number in the split; ``bits_per_dim``; ``log_likelihood``, in nats; ``standard_error`` of
    bits_per_dim, over the replicates (null for one); each term in nats, such as ``term_prior``; ``class_label``, where
    there are labels.
    """
    error = report.standard_error_per_image if report.replicates > 1 else None
    columns = {
        "image": pa.array(range(report.num_images), pa.int64()),
        "bits_per_dim": pa.array(report.per_image.numpy()),
        "log_likelihood": pa.array(report.log_likelihood.numpy()),
        "standard_error": pa.nulls(report.num_images, pa.float64()) if error is None else pa.array(error.numpy()),
    }
    columns |= {f"term_{name}": pa.array(term.mean(0).numpy()) for name, term in report.terms_per_image.items()}
    if labels is not None:
        columns["class_label"] = pa.array(labels[: report.num_images].numpy())
    table = pa.table(columns).replace_schema_metadata({"vdm_hub": json.dumps(report.to_dict())})
    with written_beside(path) as beside:
        pq.write_table(table, beside)
