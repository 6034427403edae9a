"""Verify the results of ``scripts/gpu/cifar10.py`` from the weights: ``python scripts/gpu/verify.py RESULTS``.

It loads the pipeline beside the results file, compares the fingerprints of weights, shards and test images, adds the
figures up again from those of each image, and measures some images anew, by the stored protocol and draws, against
what is stored of them. The images are other ones each time unless ``--seed`` says which. Of addtt's VDM it compares
the weights' SHA-256 and adds up its batches; with ``--addtt CHECKOUT``, on the kind of device that measured it, some
batches are measured anew. The exit status is 1 where anything differs. What weights can't tell, seconds and the step's
ratio, is named.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from phases import exact_float32
from records import figures, fingerprint, read, sha256, shards_of

from vdm_hub import BoundEstimator, MissingFileError, VDMPipeline, load_split, report_errors, weights_fingerprint

SAME_DEVICE, OTHER_DEVICE = 1e-4, 1e-3
"""The tolerance of one image in bits/dim: rounding in float32, of other batches, and of other kernels."""
SUMMED = 1e-9  # of the sum of ten thousand float64 numbers, in another order

Differences = Iterator[str]


def main() -> int:
    """Check everything, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path, help="the shards (default: the folder that the results name)")
    parser.add_argument("--images", type=int, default=64, help="measured anew (default: 64)")
    parser.add_argument("--seed", type=int, help="of which images (default: others each time)")
    parser.add_argument("--addtt", type=Path, help="a checkout of addtt's repository")
    parser.add_argument("--batches", type=int, default=2, help="of addtt's, measured anew (default: 2)")
    return report_errors(lambda: Verification(parser.parse_args()).go())


class Verification:
    """The checks of one results file.

    Raises:
        MissingFileError: There is no such file, or nothing in it to check.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.folder = arguments, arguments.results.parent
        self.results = read(arguments.results)
        parts = ("data", "train", "measure", "addtt")
        if not isinstance(self.results, dict) or not all(isinstance(self.results.get(one), dict) for one in parts):
            raise MissingFileError(f"{arguments.results} is no results file of scripts/gpu/cifar10.py: name one.")
        self.measured, self.data = self.results["measure"], arguments.data or Path(self.results["data"]["data"])
        if "blank" in self.measured:
            raise MissingFileError(
                f"{arguments.results} has no figure to check ({self.measured['blank']}): go on with its run first."
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.chosen = random.Random(arguments.seed)
        exact_float32()

    def go(self) -> int:
        """Run the checks; 1 where one finds a difference."""
        checks: dict[str, Callable[[], Differences]] = {
            "shards": self.shards,
            "test images": self.test_images,
            "weights": self.weights,
            "course of training": self.course,
            "sums": self.sums,
            "images measured anew": self.images,
            "addtt's VDM": self.addtt,
        }
        differing = 0
        for name, check in checks.items():
            try:
                found = list(check())
            except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OSError) as error:
                found = [f"it can't be checked: {type(error).__name__}: {error}"]
            differing += bool(found)
            print("\n".join([f"{name:<22}{'ok' if not found else 'DIFFERS'}", *(f"    {one}" for one in found)]))
        print("not to be known from weights: seconds, images/s, the step's ratio to the bare network")
        return 1 if differing else 0

    def shards(self) -> Differences:
        """The shards' names, sizes and SHA-256."""
        if (found := shards_of(self.data)) != (stored := self.results["data"]["shards"]):
            changed = [one["name"] for one in stored if one not in found] or ["there are more"]
            yield f"the shards of {self.data} are others: {', '.join(changed)}"

    def test_images(self) -> Differences:
        """The test images' fingerprint and number."""
        split = self.results["data"]["test_split"]
        self.levels = load_split(str(self.data), split, num_levels=256).levels
        yield from differs("the images", fingerprint(self.levels), self.measured["images"])
        yield from differs("their number", len(self.levels), self.measured["num_images"])

    def weights(self) -> Differences:
        """The fingerprint of all weights of the pipeline."""
        self.pipeline = VDMPipeline.from_pretrained(self.folder / self.results["pipeline"])
        yield from differs("the weights", weights_fingerprint(self.pipeline), self.measured["weights"])

    def course(self) -> Differences:
        """The training's record and curve, as the run's own files have them."""
        record, history = (read(self.folder / "train" / name) for name in ("run.json", "history.json"))
        train = self.results["train"]
        for name in ("steps", "training_seconds", "global_batch_size", "mixed_precision", "parameters", "dataset"):
            yield from differs(name, record[name], train[name])
        for name, values in train["curve"].items():
            yield from differs(f"the curve's {name}", history["train"][name], values)

    def sums(self) -> Differences:
        """The figures, from those of each image and each replicate."""
        stored, per_image = self.measured, self.measured["per_image"]
        for name, values in per_image.items():
            yield from differs(f"the number of images of {name}", len(values), stored["num_images"])
        yield from differs("the number of replicates", len(stored["replicate_means"]), stored["replicates"])
        found = figures(per_image, stored["replicate_means"])
        for name in ("bits_per_dim", "standard_error", "standard_error_over_images"):
            yield from far(name, found[name], stored[name], SUMMED)
        yield from differs("the names of the terms", sorted(found["terms"]), sorted(stored["terms"]))
        for name, value in found["terms"].items():
            yield from far(f"the {name} term", value, stored["terms"][name], SUMMED)
        mean = math.fsum(stored["replicate_means"]) / len(stored["replicate_means"])
        yield from far("the mean of the replicates", mean, stored["bits_per_dim"], SUMMED)

    def images(self) -> Differences:
        """Some images, measured again in all replicates, by the stored seed and the pilot's findings."""
        stored, count = self.measured, self.measured["num_images"]
        yield from differs("the pilot", sha256(self.folder / stored["pilot"]["file"]), stored["pilot"]["sha256"])
        chosen = torch.tensor(sorted(self.chosen.sample(range(count), min(self.arguments.images, count))))
        self.pipeline.to(self.device)
        estimator = BoundEstimator(self.pipeline.objective(None).eval(), count, stored["seed"])
        estimator.load_state(read(self.folder / stored["pilot"]["file"])["found"]["state"])
        batch = {"levels": self.levels[chosen].to(self.device), "indices": chosen}
        with torch.no_grad():
            rows = [estimator.measure(batch, replicate).terms for replicate in range(stored["replicates"])]
        scale = self.levels[0].numel() * math.log(2) * len(rows)
        tolerance = SAME_DEVICE if stored["device"] == self.device.type else OTHER_DEVICE
        yield from differs("the names of the terms", sorted(rows[0]), sorted(stored["per_image"]))
        for name in rows[0]:
            again = torch.stack([row[name].double().cpu() for row in rows]).sum(0) / scale
            kept = torch.tensor(stored["per_image"][name], dtype=torch.float64)[chosen]
            worst = int((again - kept).abs().argmax())
            yield from far(f"the {name} term of image {int(chosen[worst])}", again[worst], kept[worst], tolerance)

    def addtt(self) -> Differences:
        """The weights and sums of addtt's VDM, and some of its batches measured again."""
        stored = self.results["addtt"]
        if "blank" in stored:
            print(f"addtt's VDM is blank: {stored['blank']}")
            return
        from public_vdm import PublicVDM, addtt_figures

        weights = self.folder / "addtt" / "weights.safetensors"
        yield from differs("the weights", sha256(weights), stored["weights"])
        yield from differs("the images", fingerprint(self.levels), stored["images"])
        found = addtt_figures(stored["rows"])
        yield from differs("the number of passes", found["passes"], stored["passes"])
        for name in ("bits_per_dim", "standard_error"):
            yield from far(name, found[name], stored[name], SUMMED)
        if self.arguments.addtt is None or stored["device"] != self.device.type:
            print(
                "addtt's batches are not measured anew: that takes --addtt, and the kind of device they were drawn on"
            )
            return
        public = PublicVDM(self.arguments.addtt, stored["settings"], tuple(self.levels.shape[1:]))
        public.load(weights)
        torch.backends.cudnn.allow_tf32 = True  # torch's default, by which they were measured
        for _ in range(self.arguments.batches):
            draw = self.chosen.randrange(len(stored["rows"]))
            number = self.chosen.randrange(len(stored["rows"][draw]))
            again = public.evaluate(self.levels, draw, range(number, number + 1))[0]
            yield from far(f"batch {number} of pass {draw}", again, stored["rows"][draw][number], 10 * OTHER_DEVICE)


def differs(what: str, found: object, stored: object) -> Differences:
    """Words, where two things are not equal."""
    if found != stored:
        yield f"{what}: {str(found)[:80]} now, {str(stored)[:80]} in the results"


def far(what: str, found: Any, stored: Any, tolerance: float) -> Differences:
    """Words, where two numbers are not equal up to a tolerance; ``None`` equals itself alone."""
    if found is None or stored is None:
        yield from differs(what, found, stored)
    elif not abs(float(found) - float(stored)) <= tolerance:
        yield f"{what}: {float(found):.6f} now, {float(stored):.6f} in the results (tolerance {tolerance:g})"


if __name__ == "__main__":
    sys.exit(main())
