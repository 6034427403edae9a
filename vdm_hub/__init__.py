"""Variational diffusion models in the Hugging Face ecosystem: train, measure in bits per dimension, publish, load.

Importing this package makes diffusers know its classes, so ``DiffusionPipeline.from_pretrained`` loads a VDM. Its
names are those of ``__init__.pyi``, and each is imported when it is first asked for.
"""

import lazy_loader

from vdm_hub.pipelines.registration import register
from vdm_hub.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register(__name__)
