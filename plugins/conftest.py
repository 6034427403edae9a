"""Session settings for the tests of all plugins."""

from __future__ import annotations

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hugging Face library is imported: no test may need the network
torch.set_num_threads(1)
