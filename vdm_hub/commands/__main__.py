"""``python -m vdm_hub.commands``: the command ``vdm-hub``, for launchers that start modules."""

import sys

from vdm_hub.commands import main

if __name__ == "__main__":
    sys.exit(main())
