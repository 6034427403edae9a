"""`vdm-hub evaluate --submit`: what is checked before the evaluation, and what follows its report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vdm_hub.commands.options import given_overrides
from vdm_hub.data.examples import Examples
from vdm_hub.data.kinds import TOKENS
from vdm_hub.errors import ConfigurationError
from vdm_hub.evaluation.processes import Processes
from vdm_hub.likelihood.methods import method_of
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.pipelines.base import LikelihoodPipeline
from vdm_hub.publishing.eval_results import Stated, not_stated, stated
from vdm_hub.publishing.submission import Target, check_place, open_target, submit, submitted_files


@dataclass
class Submission:
    """The submission of an evaluation's figure, where one was asked for; only the main process asks and sends.

    Attributes:
        arguments: The command line's.
        processes: Those that evaluate.
    """

    arguments: argparse.Namespace
    processes: Processes
    _target: Target | None = field(default=None, init=False)
    _place: Stated | None = field(default=None, init=False)

    def open(self) -> None:
        """Ask the Hub whether a figure could be submitted; all processes then load the model of one commit.

        Raises:
            VDMHubError: It couldn't.
        """
        if not self.arguments.submit:
            return
        self._target = self.processes.together(self._open)
        commit = None if self._target is None else self._target.commit
        self.arguments.revision = self.processes.broadcast(commit)

    def _open(self) -> Target | None:
        arguments = self.arguments
        if not self.processes.is_main:
            return None
        sends = not arguments.dry_run
        return open_target(arguments.pipeline, arguments.revision, arguments.dataset_name, sends=sends)

    def check(self, pipeline: LikelihoodPipeline, data: Examples, dataset: Mapping[str, Any]) -> None:
        """Refuse what could not be stated of the data as they were read, or is stated already.

        Raises:
            VDMHubError: It is such.
        """
        if self.arguments.submit:
            self.processes.together(lambda: self._check(pipeline, data, dataset))

    def _check(self, pipeline: LikelihoodPipeline, data: Examples, dataset: Mapping[str, Any]) -> None:
        if self._target is None:
            return
        if why := not_stated(dataset):
            raise ConfigurationError(f"no figure can be submitted: {why}. Name a whole split, or leave out --submit.")
        if data.kind is TOKENS and data.units(dataset[TOKENS.data]).bytes_per_value is None:
            raise ConfigurationError(
                "no figure can be submitted: bits/token depend on the tokenizer, and these texts have no figure in "
                "bits/byte. Leave out --submit."
            )
        given = self.arguments.method
        method = method_of(pipeline.default_method if given is None else given)
        overrides = given_overrides(self.arguments)
        if self.arguments.fit_split is not None:
            overrides["fit_split"] = self.arguments.fit_split
        condition = None if pipeline.condition is None else pipeline.condition.noun
        self._place = stated(dataset, method.name, method.chosen(), condition, overrides)
        check_place(self._target, self._place)

    def finish(self, report: LikelihoodReport) -> None:
        """Submit the figure of a printed report, or show what would be submitted.

        Raises:
            PublishError: It could not be, and is kept.
        """
        if self._target is None or self._place is None:
            return
        if not report.reached:
            self._say("not submitted: the standard error that was asked for was not reached.")
            return
        files = submitted_files(self._target, self._place, report.to_dict())
        if self.arguments.dry_run:
            self._say(f"would be submitted to {self._target.repository.repo_id} as a pull request, and was not:")
            for path, text in sorted(files.items()):
                self._say(f"{len(text.encode()):>12,}  {path}")
            self._say(files[self._place.file].rstrip())
            return
        self._say(f"submitted: {submit(self._target, self._place, files)}")

    def _say(self, text: str) -> None:
        """Print beside the report, whose JSON has standard output for itself."""
        print(text, file=sys.stderr if self.arguments.json else sys.stdout, flush=True)


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict a submission, before anybody is asked.

    Raises:
        ConfigurationError: Some do.
    """
    if not arguments.submit:
        if arguments.dry_run:
            raise ConfigurationError("--dry_run acts only with --submit: add it, or leave it out.")
        return
    if arguments.max_images is not None:
        raise ConfigurationError(
            f"--max_images is {arguments.max_images}, and a figure of part of a split is none of the split: leave it "
            f"out, or leave out --submit."
        )
    if arguments.replicates < 2:
        raise ConfigurationError(
            f"--replicates is {arguments.replicates}, which tells no error, and a figure is submitted with its error: "
            f"give at least 2, or leave out --submit."
        )
