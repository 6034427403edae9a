"""All that the next step of a run depends on, to and from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from vdm_hub.errors import CheckpointError, in_one_line, shortened
from vdm_hub.hub import records
from vdm_hub.hub.records import Figure, Natural, Positive, Whole
from vdm_hub.hub.schemas import check_record
from vdm_hub.recipes.arguments import Configuration
from vdm_hub.recipes.configuration import differences
from vdm_hub.training.parts import optimizers
from vdm_hub.training.parts.shards import full_tensors, local_part, sharded_like
from vdm_hub.training.parts.weights import averages
from vdm_hub.training.state.checkpoints import Checkpoint
from vdm_hub.training.state.history import History
from vdm_hub.training.state.run_state import RunState
from vdm_hub.version import __version__


class _Optimizer(TypedDict):
    """The state of an optimiser besides tensors, as `optimizers.pack_optimizer` gives it."""

    parameters: dict[str, float | bool | str | None]
    groups: list[dict[str, float]]


class _EarlyStopping(TypedDict):
    best: Figure | None
    best_step: Whole
    waited: Whole


class _Scaler(TypedDict):
    """The state of a `torch.amp.GradScaler`."""

    scale: Positive
    growth_factor: Positive
    backoff_factor: Positive
    growth_interval: Natural
    _growth_tracker: Whole


class _State(TypedDict):
    """The state of a run besides tensors; learning rate and decay follow from the step."""

    step: Whole
    recipe: dict[str, Any]
    history: records.HistoryRecord
    optimizer: _Optimizer
    early_stopping: _EarlyStopping
    training_seconds: Positive
    provenance: records.RunRecord
    scaler: NotRequired[_Scaler]


_COUNTS = ("images", "windows")
"""The names under which a dataset's record says how many data there are."""


def pack_state(run: RunState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The state of a run as groups of tensors and as JSON; where they are sharded, all processes take part."""
    keep = run.accelerator.is_main_process
    moments, numbers = optimizers.pack_optimizer(run.optimizer)
    tensors = {"objective": full_tensors(run.model.state_dict(), keep), "optimizer": full_tensors(moments, keep)}
    state: dict[str, Any] = {
        "step": run.step,
        "optimizer": numbers,
        "recipe": run.configuration.to_dict(),
        "history": run.history.to_dict(),
        "early_stopping": run.early_stopping.state(),
        "training_seconds": run.seconds,
    }
    if run.early_stopping.weights:
        tensors["best"] = run.early_stopping.weights
    if run.ema is not None:
        tensors["ema"] = full_tensors(averages(run.model, run.ema), keep)
    if run.accelerator.scaler is not None:
        state["scaler"] = run.accelerator.scaler.state_dict()
    return tensors, state


def restore_state(run: RunState, path: Path, checkpoint: Checkpoint) -> None:
    """Put a run where a checkpoint was written.

    Raises:
        CheckpointError: The checkpoint is of another model or recipe, or was changed; the message says where.
    """
    _check_state(checkpoint.state, path / "state.json")
    try:
        # Weights that fit are not enough: under another process, or with other data, they are another run's.
        before, now = checkpoint.state["provenance"], run.provenance.describe(run.step, run.seconds)
        images = [provenance["dataset"]["fingerprint"] for provenance in (before, now)]
        same = None not in images and len(set(images)) == 1
        changed = differences(checkpoint.state["recipe"], run.configuration.to_dict(), same_images=same)
        if changed := changed + _other_circumstances(before, now):
            raise ValueError("; ".join(changed))
        _restore(run, checkpoint.tensors, checkpoint.state)
        if run.step > run.total_steps:
            raise ValueError(f"it has taken {run.step} steps, and max_train_steps is {run.total_steps}")
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {path} is of another model or recipe ({in_one_line(error)}). Resume with the recipe "
            f"it was made by ({path.parent.parent / 'recipe.yaml'}), or start anew in another output_dir."
        ) from error


def _check_state(state: dict[str, Any], path: Path) -> None:
    """Refuse a state that no run has written, or that contradicts itself."""
    check_record(_State, state, str(path))
    records.check_history(state["history"], path, state["step"])
    records.refuse(path, _contradictions(state))  # first, as what follows reads a recipe that is one
    records.check_run(state["provenance"], path, state["recipe"])


def _contradictions(state: dict[str, Any]) -> Iterator[str]:
    recipe, provenance, stopping = (state[name] for name in ("recipe", "provenance", "early_stopping"))
    try:
        whole = json.loads(json.dumps(Configuration.from_dict(recipe, where="in the recipe").to_dict()))
    except Exception as error:
        yield f"its recipe is none ({in_one_line(error)})"
        return
    is_older = provenance["versions"].get("vdm-hub") != __version__  # and may lack what was added since
    for field in whole:
        if recipe.get(field, whole[field] if is_older else ...) != whole[field]:
            yield f"{field} of the recipe is {shortened(recipe.get(field, 'not there'))}"
    if provenance["steps"] != state["step"]:
        yield f"step is {state['step']}, and the run had taken {provenance['steps']}"
    measured = state["history"]["validation"]
    figures = dict(zip(measured["step"], measured["bits_per_dim"], strict=True))
    best, at = stopping["best"], stopping["best_step"]
    if (best != figures.get(at) or stopping["waited"] > sum(step > at for step in figures)) and any(stopping.values()):
        yield f"early_stopping is {shortened(stopping)}, and the measurements do not say so"


def _other_circumstances(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Words for changes that no recipe names, and that decide which images a step sees."""
    changed = []
    if before["processes"] != now["processes"]:
        changed.append(f"processes was {before['processes']} and is {now['processes']}")
    images = [one["dataset"] for one in (before, now)]
    if any(images[0].get(name) != images[1].get(name) for name in (*_COUNTS, "shape", "levels", "fingerprint")):
        counts = " and ".join(
            f"{next((one[name] for name in _COUNTS if name in one), None)} of fingerprint "
            f"{str(one['fingerprint'])[:20]}"
            for one in images
        )
        changed.append(f"the training data are others ({counts})")
    words = [one.get("tokenizer") for one in images]
    if None not in words and words[0] != words[1]:
        changed.append(
            f"the tokenizer, or the texts that it is made from, are others (fingerprints of its tokens "
            f"{' and '.join(str(one)[:20] for one in words)})"
        )
    texts = [str(one.get("text_encodings"))[:16] for one in (before, now)]
    if len(set(texts)) > 1:
        changed.append(f"the captions, or their text encoder, are others (fingerprints {' and '.join(texts)})")
    origins = [(one.get("init_from") or {}).get("weights") for one in (before, now)]
    if origins[0] != origins[1]:
        changed.append(f"the model that it begins from is another (weights {' and '.join(map(str, origins))})")
    return changed


def _restore(run: RunState, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    own = run.model.state_dict()
    run.model.load_state_dict({name: sharded_like(value, own[name]) for name, value in tensors["objective"].items()})
    optimizers.unpack_optimizer(run.optimizer, tensors["optimizer"], state["optimizer"])
    _resume_learning_rate(run, state["step"])
    if run.ema is not None:
        for (name, parameter), shadow in zip(run.model.named_parameters(), run.ema.shadow_params, strict=True):
            shadow.copy_(local_part(sharded_like(tensors["ema"][name], parameter)))
        run.ema.optimization_step = state["step"]
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.early_stopping.load(state["early_stopping"], tensors.get("best", {}))
    run.history, run.seconds = History(state["history"]), state["training_seconds"]
    run.step = state["step"]


def _resume_learning_rate(run: RunState, step: int) -> None:
    """Let the schedule go on at a step, from the recipe's own learning rate, which may be a lower one now."""
    scheduler = run.lr_scheduler
    rates = [base * course(step) for base, course in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    at = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    scheduler.load_state_dict(scheduler.state_dict() | at)
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
