"""A shim for ``accelerate launch scripts/train.py RECIPE``; all of it is `vdm_hub.train`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from an uninstalled checkout, too

from vdm_hub.train import main

if __name__ == "__main__":
    sys.exit(main())
