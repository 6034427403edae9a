"""The harness's own command line, which knows the model ``vdm_hub``."""

from __future__ import annotations

import sys
from functools import cache

from vdm_hub.errors import ConfigurationError, VDMHubError, in_one_line


@cache  # the harness takes a name once
def register() -> None:
    """Tell the harness of the model ``vdm_hub``.

    Raises:
        ConfigurationError: The harness is not installed.
    """
    try:
        from lm_eval.api.model import LM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ConfigurationError(
            f"the package lm-eval can't be imported ({in_one_line(error)}): install it with `pip install lm-eval`."
        ) from error
    from vdm_hub.lm_eval.harness_model import HarnessModel

    register_model("vdm_hub")(type("VDMHubLM", (HarnessModel, LM), {}))


def main() -> int:
    """Run the harness with the words of the command line.

    Returns:
        The exit status.
    """
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except VDMHubError as error:
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
