"""Variational diffusion models in the Hugging Face ecosystem: train, measure in bits per dimension, publish, load.

Importing this package makes diffusers know its classes, so ``DiffusionPipeline.from_pretrained`` loads a VDM.
"""

import gc
import os
import signal
import sys

if {"vdm_hub.train", "vdm_hub.commands"} & set(sys.orig_argv[:4]) or sys.argv[0].endswith("vdm-hub"):
    # A command, whose libraries take seconds to import: until it looks after Ctrl-C itself, that is one line, too.
    def _leave(*_: object) -> None:
        os.write(2, b"\ninterrupted: nothing had begun.\n" if os.environ.get("RANK", "0") == "0" else b"")
        os._exit(128 + signal.SIGINT)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)

# Importing makes a million objects and no garbage: looking for some takes a sixth of the time.
_collects = gc.isenabled()
gc.disable()

# diffusers looks for these two by name in the library that a component comes from.
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from vdm_hub.diffusion.forward_process import BoundProcess, ForwardProcess
from vdm_hub.diffusion.noise_schedules import NoiseSchedule
from vdm_hub.diffusion.parameterizations import Parameterization
from vdm_hub.likelihood.hierarchical import HVAEObjective
from vdm_hub.likelihood.report import LikelihoodReport
from vdm_hub.likelihood.variational_bound import Bound, Objective, VDMObjective
from vdm_hub.models.first_stages import AutoencoderKLFirstStage
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.models.noise_schedule_model import NoiseScheduleModel
from vdm_hub.models.unet_vdm import UNetVDMModel
from vdm_hub.pipeline_hvae import HVAEPipeline
from vdm_hub.pipeline_latent_vdm import LatentVDMPipeline
from vdm_hub.pipeline_vdm import VDMPipeline
from vdm_hub.registration import register
from vdm_hub.scheduling_vdm import VDMScheduler
from vdm_hub.version import __version__ as __version__

__all__ = [
    "AutoencoderKLFirstStage",
    "Bound",
    "BoundProcess",
    "ForwardProcess",
    "HVAEObjective",
    "HVAEPipeline",
    "LatentVDMPipeline",
    "LikelihoodReport",
    "MarkovianHVAE",
    "ModelMixin",
    "NoiseSchedule",
    "NoiseScheduleModel",
    "Objective",
    "Parameterization",
    "SchedulerMixin",
    "UNetVDMModel",
    "VDMObjective",
    "VDMPipeline",
    "VDMScheduler",
]

if _collects:
    gc.enable()

register(
    sys.modules[__name__],
    [
        *(AutoencoderKLFirstStage, MarkovianHVAE, NoiseScheduleModel, UNetVDMModel, VDMScheduler),
        *(HVAEPipeline, LatentVDMPipeline, VDMPipeline),
    ],
)
