"""All that the next step of a run depends on, to and from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NotRequired, TypedDict

from torch import Tensor

from vdm_hub.errors import CheckpointError, in_one_line
from vdm_hub.hub.records import Positive, Whole
from vdm_hub.hub.schemas import check_record
from vdm_hub.recipes.configuration import differences
from vdm_hub.training import optimizers
from vdm_hub.training.checkpoints import Checkpoint
from vdm_hub.training.history import History
from vdm_hub.training.run_state import RunState
from vdm_hub.training.shards import gathered, own_part, sharded_like
from vdm_hub.training.weights import averages


class _State(TypedDict):
    """What a run's next step depends on, besides tensors."""

    step: Whole
    recipe: dict[str, Any]
    history: dict[str, Any]
    optimizer: dict[str, Any]
    lr_scheduler: dict[str, Any]
    early_stopping: dict[str, Any]
    training_seconds: Positive
    provenance: dict[str, Any]
    ema_step: NotRequired[Whole]
    scaler: NotRequired[dict[str, Any]]


def pack_state(run: RunState) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The state of a run as groups of tensors and as JSON; where they are sharded, all processes take part."""
    keep = run.accelerator.is_main_process
    moments, numbers = optimizers.pack_state(run.optimizer)
    tensors = {"objective": gathered(run.model.state_dict(), keep), "optimizer": gathered(moments, keep)}
    state: dict[str, Any] = {
        "step": run.step,
        "lr_scheduler": run.lr_scheduler.state_dict(),
        "optimizer": numbers,
        "recipe": run.configuration.to_dict(),
        "history": run.history.to_dict(),
        "early_stopping": run.early_stopping.state(),
        "training_seconds": run.seconds,
    }
    if run.early_stopping.weights:
        tensors["best"] = run.early_stopping.weights
    if run.ema is not None:
        tensors["ema"] = gathered(averages(run.model, run.ema), keep)
        state["ema_step"] = run.ema.optimization_step
    if run.accelerator.scaler is not None:
        state["scaler"] = run.accelerator.scaler.state_dict()
    return tensors, state


def restore_state(run: RunState, path: Path, checkpoint: Checkpoint) -> None:
    """Put a run where a checkpoint was written.

    Raises:
        CheckpointError: The checkpoint is of another model or recipe; the message says what differs.
    """
    check_record(_State, checkpoint.state, str(path / "state.json"))
    try:
        # Weights that fit are not enough: under another process, or with other data, they are another run's.
        before, now = checkpoint.state["provenance"], run.provenance.describe(run.step, run.seconds)
        images = [told["dataset"]["fingerprint"] for told in (before, now)]
        same = images[0] is not None and images[0] == images[1]
        changed = differences(checkpoint.state["recipe"], run.configuration.to_dict(), same_images=same)
        if changed := changed + _other_circumstances(before, now):
            raise ValueError("; ".join(changed))
        _restore(run, checkpoint.tensors, checkpoint.state)
        if run.step > run.total_steps:
            raise ValueError(f"it has taken {run.step} steps, and max_train_steps is {run.total_steps}")
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the checkpoint {path} is of another model or recipe ({in_one_line(error)}). Resume with the recipe "
            f"it was made by ({path.parent.parent / 'recipe.yaml'}), or start anew in another output_dir."
        ) from error


def _other_circumstances(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What no recipe says, and yet decides which images a step sees."""
    changed = []
    if before["processes"] != now["processes"]:
        changed.append(f"processes was {before['processes']} and is {now['processes']}")
    images = [told["dataset"] for told in (before, now)]
    if images[0]["fingerprint"] != images[1]["fingerprint"]:
        counts = " and ".join(f"{told['images']} of fingerprint {str(told['fingerprint'])[:20]}" for told in images)
        changed.append(f"the training images are others ({counts})")
    return changed


def _restore(run: RunState, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    own = run.model.state_dict()
    run.model.load_state_dict({name: sharded_like(value, own[name]) for name, value in tensors["objective"].items()})
    optimizers.unpack_state(run.optimizer, tensors["optimizer"], state["optimizer"])
    _resume_learning_rate(run, state["lr_scheduler"])
    if run.ema is not None:
        for (name, parameter), shadow in zip(run.model.named_parameters(), run.ema.shadow_params, strict=True):
            shadow.copy_(own_part(sharded_like(tensors["ema"][name], parameter)))
        run.ema.optimization_step = state["ema_step"]
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.early_stopping.load(state["early_stopping"], tensors.get("best", {}))
    run.history, run.seconds = History(state["history"]), state["training_seconds"]
    run.step = int(state["step"])


def _resume_learning_rate(run: RunState, state: dict[str, Any]) -> None:
    """The schedule goes on where it was, from the recipe's own learning rate, which may be a lower one now."""
    scheduler = run.lr_scheduler
    scheduler.load_state_dict(state | {"base_lrs": scheduler.base_lrs})
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    for group, (base, course) in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = base * course(scheduler.last_epoch)
