"""How many network evaluations each estimator of a masked model's bound needs for the same Monte Carlo error.

``python scripts/bench/token_estimators.py`` measures texts of a Markov chain by its exact posterior;
with ``--text_file``, the end of that file by the chain of the pairs of characters in the rest of it; with a folder or
Hub id of a trained pipeline too, by that. An error falls with the root of the number of replicates, so what counts is
the variance of one replicate's mean times the evaluations that a replicate takes; a pilot is taken once, and shown
beside. On one core a chain takes about a minute.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdm_hub import (
    Batch,
    LikelihoodMethod,
    Measured,
    Measurement,
    Objective,
    VariationalBound,
    VDMObjective,
    image_generator,
    load_pipeline,
)
from vdm_hub_tokens import AbsorbingProcess, MaskedCounts, WeightedOrders
from vdm_hub_tokens.oracles import MarkovChain, MarkovDenoiser


@dataclass(frozen=True)
class IndependentTimes(LikelihoodMethod):
    """The bound at one time of each text's own, uniform and independent: what most projects estimate."""

    name = "independent_times"

    def build(self, objective: Objective, num_images: int, seed: int) -> Measurement:
        """An `IndependentMeasurement`."""
        return IndependentMeasurement(objective, seed)


class IndependentMeasurement(Measurement):
    """See `IndependentTimes`."""

    method = "independent_times"

    def measure(self, batch: Batch, replicate: int) -> Measured:
        """The terms of each text at its time."""
        generators = [image_generator(self.seed, replicate, int(i)) for i in batch["indices"]]
        times = torch.cat([torch.rand(1, generator=generator) for generator in generators])
        noise = self.objective.draw_noise(batch, generators)
        terms = self.objective(batch, times.to(batch["levels"].device), noise).terms
        found = {name: term.double().cpu() for name, term in terms.items()}
        return Measured(found, {"evaluations": torch.ones(len(times))})

    def protocol(self) -> dict[str, Any]:
        """Nothing is chosen."""
        return {}


METHODS: dict[str, LikelihoodMethod] = {
    "`bound`, independent t": IndependentTimes(),
    "`bound`, stratified t": VariationalBound(pilot_evaluations=0),
    "`bound`, its pilot": VariationalBound(),
    "`masked_counts`, no pilot": MaskedCounts(pilot_evaluations=0),
    "`masked_counts`, its pilot": MaskedCounts(),
    "`weighted_orders`, one order": WeightedOrders(draws=1),
}


def main() -> None:
    """Print a row for each estimator."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", nargs="?", help="a trained pipeline; without it, a Markov chain's exact posterior")
    parser.add_argument("--text_file", type=Path, help="of which the end is measured; without it, texts of a chain")
    parser.add_argument("--characters", type=int, default=16_384, help="of the end of the file (default: 16384)")
    parser.add_argument("--replicates", type=int, default=200, help="the more, the surer the factors (default: 200)")
    parser.add_argument("--orders", type=int, default=20, help="replicates of whole orders, 0 for none (default: 20)")
    given = parser.parse_args()
    if given.pipeline is not None and given.text_file is None:
        parser.error("a pipeline needs --text_file, a text to measure")
    print("| estimator | nats a text | evaluations for an error of 1 % | fewer, by | pilot |")
    print("| --- | --- | --- | --- | --- |")
    first = None
    for name, method in METHODS.items():
        if isinstance(method, WeightedOrders) and not given.orders:
            continue
        replicates = given.orders if isinstance(method, WeightedOrders) else given.replicates
        means, evaluations, pilot = _measured(given, method, replicates)
        mean, error = float(means.mean()), float(means.std()) / replicates**0.5
        needed = float(means.var()) * evaluations / (0.01 * mean) ** 2
        first = first or needed
        # On the exact denoiser all orders have one likelihood: nothing scatters but rounding.
        factor = f"{first / needed:.1f}" if needed > 1e-6 * first else "no error"
        print(f"| {name} | {mean:.2f} ± {error:.2f} | {needed:,.0f} | {factor} | {pilot:,} |", flush=True)


def _measured(given: argparse.Namespace, method: LikelihoodMethod, replicates: int) -> tuple[Tensor, float, int]:
    """The mean over texts of each replicate, in nats, the evaluations of one, and those of the pilot."""
    if given.pipeline is None:
        return _of_a_chain(given, method, replicates)
    text = given.text_file.read_text(encoding="utf-8")[-given.characters :]
    report = load_pipeline(given.pipeline).log_likelihood(text, method, replicates=replicates)
    means = torch.stack(list(report.terms_per_image.values())).sum(0).mean(1)
    pilot = report.details.get("estimator", {}).get("pilot_evaluations", 0)
    return means, (report.network_evaluations - pilot) / replicates, pilot


def _of_a_chain(given: argparse.Namespace, method: LikelihoodMethod, replicates: int) -> tuple[Tensor, float, int]:
    chain, levels = _texts(given)
    process, batch = AbsorbingProcess(chain.num_levels), {"levels": levels, "indices": torch.arange(len(levels))}
    measurement = method.build(VDMObjective(MarkovDenoiser(chain, process), process), len(levels), 0)
    with torch.no_grad():
        measurement.fit(lambda: [batch])
        found = [measurement.measure(batch, replicate) for replicate in range(replicates)]
    means = torch.stack([torch.stack(list(one.terms.values())).sum(0).mean() for one in found])
    if method == IndependentTimes():
        print(f"| exact -log p | {-float(chain.log_prob(levels).mean()):.2f} | | | |")
    return means, float(found[0].diagnostics["evaluations"].sum()), measurement.pilot_evaluations


def _texts(given: argparse.Namespace, length: int = 64) -> tuple[MarkovChain, Tensor]:
    """A chain, and texts: 256 of its own, or those of a file, by the pairs of characters before them."""
    if given.text_file is None:
        chain = MarkovChain.random(27)
        return chain, chain.draw(256, length, torch.Generator().manual_seed(0))
    text = given.text_file.read_text(encoding="utf-8")
    known = {character: number for number, character in enumerate(sorted(set(text)))}
    ids, k = torch.tensor([known[character] for character in text]), len(known)
    measured = given.characters // length * length
    before, after = ids[: -measured - 1], ids[1:-measured]
    pairs = torch.bincount(before * k + after, minlength=k * k).reshape(k, k) + 0.05  # so that none is impossible
    return MarkovChain(pairs.sum(1) / pairs.sum(), pairs / pairs.sum(1, keepdim=True)), ids[-measured:].reshape(
        -1, length
    )


if __name__ == "__main__":
    main()
