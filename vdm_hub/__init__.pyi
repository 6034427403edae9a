"""The public names, and where each is defined: docs, plugins and scripts import from ``vdm_hub``, nothing deeper."""

# Networks, schedulers and pipelines.
# What plugins extend, and the mathematics that they are made of.
from . import registry as registry

# Images, runs and commands.
from .command_line import Parser as Parser
from .commands import report_errors as report_errors
from .commands.images import load_images as load_images
from .commands.loading import load_pipeline as load_pipeline
from .commands.outputs import check_output as check_output
from .data.images import ImageLevels as ImageLevels
from .data.loading import Data as Data
from .data.loading import load_split as load_split
from .diffusion.conditioning import AffineConditioning as AffineConditioning
from .diffusion.conditioning import Conditioning as Conditioning
from .diffusion.continuous_time import DiffusionSDE as DiffusionSDE
from .diffusion.decoders import FactorisedDecoder as FactorisedDecoder
from .diffusion.draws import Generator as Generator
from .diffusion.draws import normal_noise as normal_noise
from .diffusion.draws import uniform_noise as uniform_noise
from .diffusion.forward_process import BoundProcess as BoundProcess
from .diffusion.forward_process import ForwardProcess as ForwardProcess
from .diffusion.forward_process import Network as Network
from .diffusion.forward_process import Noise as Noise
from .diffusion.gaussian import alpha as alpha
from .diffusion.gaussian import broadcast as broadcast
from .diffusion.gaussian import marginal_sample as marginal_sample
from .diffusion.gaussian import posterior as posterior
from .diffusion.gaussian import prior_kl as prior_kl
from .diffusion.gaussian import sigma as sigma
from .diffusion.gaussian import sum_dimensions as sum_dimensions
from .diffusion.gaussian_process import GaussianProcess as GaussianProcess
from .diffusion.latent_process import LatentProcess as LatentProcess
from .diffusion.levels import DataScaling as DataScaling
from .diffusion.noise_schedules import BoundGamma as BoundGamma
from .diffusion.noise_schedules import CosineSchedule as CosineSchedule
from .diffusion.noise_schedules import Gamma as Gamma
from .diffusion.noise_schedules import LinearSchedule as LinearSchedule
from .diffusion.noise_schedules import NoiseSchedule as NoiseSchedule
from .diffusion.noise_schedules import check_endpoints as check_endpoints
from .diffusion.noise_schedules import gamma_and_derivative as gamma_and_derivative
from .diffusion.parameterizations import Epsilon as Epsilon
from .diffusion.parameterizations import Parameterization as Parameterization
from .diffusion.reverse_kernel import ReverseKernel as ReverseKernel
from .diffusion.samplers import SAMPLERS as SAMPLERS
from .diffusion.samplers import build_sampler as build_sampler
from .diffusion.times import stratified_times as stratified_times

# What a user may meet.
from .errors import CheckpointError as CheckpointError
from .errors import ConfigurationError as ConfigurationError
from .errors import DataError as DataError
from .errors import HubError as HubError
from .errors import MissingFileError as MissingFileError
from .errors import MissingPluginError as MissingPluginError
from .errors import NonFiniteLossError as NonFiniteLossError
from .errors import OutputError as OutputError
from .errors import PublishError as PublishError
from .errors import VDMHubError as VDMHubError

# What training minimises, and what evaluation measures.
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.measuring import Stages as Stages
from .evaluation.measuring import measure as measure
from .images import images_from_levels as images_from_levels
from .images import levels_from_images as levels_from_images
from .likelihood.consistency import transition_profile as transition_profile
from .likelihood.decompositions import compare_decompositions as compare_decompositions
from .likelihood.decompositions import decompositions as decompositions
from .likelihood.estimator import BoundEstimator as BoundEstimator
from .likelihood.hierarchical import HVAEObjective as HVAEObjective
from .likelihood.hierarchical import joint_terms as joint_terms
from .likelihood.hierarchical import log_density as log_density
from .likelihood.hierarchical import standard_kl as standard_kl
from .likelihood.lockstep import Trajectory as Trajectory
from .likelihood.lockstep import integrate as integrate
from .likelihood.probability_flow import FlowMeasurement as FlowMeasurement
from .likelihood.protocol import ProbabilityFlow as ProbabilityFlow
from .likelihood.report import LikelihoodReport as LikelihoodReport
from .likelihood.restrictions import as_hierarchical_vae as as_hierarchical_vae
from .likelihood.variational_bound import Bound as Bound
from .likelihood.variational_bound import Objective as Objective
from .likelihood.variational_bound import VDMObjective as VDMObjective
from .likelihood_pipeline import LikelihoodPipeline as LikelihoodPipeline
from .models.first_stages import AutoencoderKLFirstStage as AutoencoderKLFirstStage
from .models.hvae import MarkovianHVAE as MarkovianHVAE
from .models.loading import ModelMixin as ModelMixin  # diffusers looks for it, and for the next, in each library
from .models.noise_schedule_model import NoiseScheduleModel as NoiseScheduleModel
from .models.unet_vdm import UNetVDMModel as UNetVDMModel
from .pipeline_hvae import HVAEPipeline as HVAEPipeline
from .pipeline_latent_vdm import LatentVDMPipeline as LatentVDMPipeline
from .pipeline_vdm import VDMPipeline as VDMPipeline
from .plots import plot_decompositions as plot_decompositions
from .plots import save_grid as save_grid
from .recipes.arguments import parse as parse
from .scheduling_vdm import SchedulerMixin as SchedulerMixin
from .scheduling_vdm import VDMScheduler as VDMScheduler
from .scheduling_vdm import VDMSchedulerOutput as VDMSchedulerOutput
from .testing.checks import Check as Check
from .testing.checks import parametrize_with_checks as parametrize_with_checks
from .training.loop import Run as Run
from .training.loop import train_model as train_model
from .training.outputs import OutputFolder as OutputFolder
from .training.processes import build_accelerator as build_accelerator
from .version import __version__ as __version__
