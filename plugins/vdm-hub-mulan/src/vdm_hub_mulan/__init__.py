"""MuLAN's learned multivariate noise (Sahoo et al., arXiv 2312.13236): a gamma per pixel, alone or given a latent."""

from vdm_hub_mulan.schedules import MulanLatentSchedule, MulanSchedule

__all__ = ["MulanLatentSchedule", "MulanSchedule"]
