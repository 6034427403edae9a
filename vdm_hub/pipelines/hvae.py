"""`HVAEPipeline`: samples, latents and likelihood of a variational autoencoder or a hierarchy of them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from vdm_hub.data.levels import images_from_levels
from vdm_hub.data.preprocessing import HeldOutMapping, PreprocessingMapping
from vdm_hub.diffusion import gaussian
from vdm_hub.diffusion.draws import Generator, normal_noise
from vdm_hub.errors import ConfigurationError, DataError, unknown_name
from vdm_hub.models.hvae import MarkovianHVAE
from vdm_hub.objectives.hierarchical import HVAEObjective
from vdm_hub.pipelines.base import LikelihoodPipeline

_OUTPUT_TYPES = ("pil", "np", "pt")


class HVAEPipeline(LikelihoodPipeline):
    """A hierarchical VAE, at depth 1 the VAE: call it for samples, ask it for latents or a likelihood.

    Args:
        hvae: The model.
        preprocessing: How images become the model's levels, as `vdm_hub.data.preprocessing.Preprocessing` has it.
        held_out: How its test images were held out, as `vdm_hub.data.preprocessing.HeldOut` has it.

    Example:
        >>> import torch
        >>> from vdm_hub import HVAEPipeline, MarkovianHVAE
        >>> pipe = HVAEPipeline(MarkovianHVAE(8, in_channels=1, num_levels=17, latent_shapes=[(4,)]))
        >>> images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        >>> [tuple(z.shape) for z in pipe.encode(images)], tuple(pipe.reconstruct(images, output_type="pt").shape)
        ([(2, 4)], (2, 1, 8, 8))
        >>> tuple(pipe.interpolate(images[:1], images[1:], steps=5, output_type="pt").shape)
        (5, 1, 8, 8)
        >>> list(pipe.bits_per_dim(images).terms)
        ['reconstruction', 'prior']
    """

    model_cpu_offload_seq = "hvae"

    def __init__(
        self,
        hvae: MarkovianHVAE,
        preprocessing: PreprocessingMapping | None = None,
        held_out: HeldOutMapping | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(hvae=hvae)
        self._register_images(preprocessing, held_out)

    # ---- what every rung offers -------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of its images."""
        shape: tuple[int, int, int] = self.hvae.image_shape
        return shape

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of the top latent, ``z_T``."""
        shape: tuple[int, ...] = self.hvae.latent_shapes[-1]
        return shape

    @property
    def num_levels(self) -> int:
        """The number of levels, K."""
        return int(self.hvae.num_levels)

    @property
    def main_model(self) -> ModelMixin:
        """The hierarchical VAE."""
        return self.hvae

    def objective(self, transitions: int | None = None) -> HVAEObjective:
        """The bound of this pipeline as a module.

        Raises:
            ConfigurationError: Transitions were given: the depth is fixed.
        """
        if transitions is not None:
            raise ConfigurationError(
                f"transitions is {transitions}, and a hierarchical VAE has its {self.hvae.depth} latents, no more and "
                f"no fewer: leave it out."
            )
        return HVAEObjective(self.hvae)

    def description(self) -> dict[str, Any]:
        """The model's config."""
        return {name: value for name, value in self.hvae.config.items() if not name.startswith("_")}

    def sample(
        self, batch_size: int, generator: Generator = None, num_inference_steps: int = 1000, **arguments: Any
    ) -> Tensor:
        """Samples in [0, 1], (B, C, H, W); a hierarchy has as many steps as latents, whatever is asked for."""
        samples: Tensor = self(batch_size, generator, **arguments, output_type="pt", return_dict=False)[0]
        return samples

    @torch.no_grad()
    def examine(self, levels: Tensor) -> tuple[dict[str, Any], list[str]]:
        """The information of each latent on the one below, and of z_1 on the data; those that say nothing are named.

        The latents are a Markov chain: where one says nothing of what is below it, none above it does. A term of the
        bound would not tell: consistency terms are no divergences, and may be zero of latents that carry much.
        """
        source = torch.Generator().manual_seed(0)
        noise = [normal_noise((len(levels), *shape), source, levels.device) for shape in self.hvae.latent_shapes]
        found = [gaussian.information(q.mean, q.scale**2) for q, _ in self.hvae.climb(self.hvae.scale(levels), noise)]
        notes = []
        collapsed = [t for t, nats in enumerate(found, 1) if nats < gaussian.COLLAPSED]
        if len(levels) > 1 and collapsed:
            first, last = collapsed[0], self.hvae.depth
            which = f"z_{first} carries" if first == last else f"z_{first} to z_{last} carry"
            below = f"z_{first - 1}" if first > 1 else "x"
            notes.append(
                f"posterior collapse: over {len(levels)} images q(z_{first}|{below}) is nearly the same for all "
                f"({found[first - 1]:.2g} nats of information by its moments), so {which} nothing of the data"
            )
        return {"latents": {"images": len(levels), "information": found}}, notes

    # ---- samples and latents ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generator = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images: ``z_T`` from N(0, I), down the hierarchy, then ``p(x|z_1)``.

        Args:
            batch_size: How many images.
            generator: One, or a list with one per image; images then do not depend on the batch they are in.
            latents: ``z_T``, (B, *shape), instead of a draw.
            output_type: ``pil``, ``np`` (B, H, W, C) or ``pt`` (B, C, H, W), the last two in [0, 1].
            return_dict: Whether to return an `ImagePipelineOutput` or a tuple.

        Raises:
            ConfigurationError: The latents have another shape than ``z_T``.
        """
        if output_type not in _OUTPUT_TYPES:
            raise unknown_name("output_type", output_type, _OUTPUT_TYPES)
        model, device = self.hvae, self.device_of_latents
        shape = self._batch_shape(batch_size, latents, generator)
        if latents is None:
            latents = normal_noise(shape, generator, device)
        below = [(latents.shape[0], *shape) for shape in model.latent_shapes[-2::-1]]
        z = model.descend(latents.to(device), [normal_noise(shape, generator, device) for shape in below])
        images = self._images(self.hvae.draw_levels(z, generator), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def encode(self, images: Any, generator: Generator = None, mean: bool = False) -> list[Tensor]:
        """``z_1`` to ``z_T`` of images, drawn from ``q(z_1..z_T|x)``.

        Args:
            images: As `log_likelihood` takes them.
            generator: Of the draws; one, or a list with one per image.
            mean: Take each latent's mean instead of a draw.

        Raises:
            DataError: A pixel is none of the K levels, or the images have another shape.
        """
        levels, device = self._levels(images), self.device_of_latents
        shapes = [(levels.shape[0], *shape) for shape in self.hvae.latent_shapes]
        noise = [
            torch.zeros(shape, device=device) if mean else normal_noise(shape, generator, device) for shape in shapes
        ]
        return list(self.hvae.latents(self.hvae.scale(levels), noise))

    @torch.no_grad()
    def reconstruct(self, images: Any, from_latent: int = 1, output_type: str = "pil") -> Any:
        """The images as a latent keeps them: encoded up to it, decoded from it, all at the mean.

        Args:
            images: As `log_likelihood` takes them.
            from_latent: Which latent, from 1 to T; the higher, the less it knows of the image.
            output_type: As `__call__`'s.

        Raises:
            ConfigurationError: There is no such latent.
        """
        if not 1 <= from_latent <= self.hvae.depth:
            raise ConfigurationError(f"from_latent is {from_latent}; the model has latents 1 to {self.hvae.depth}.")
        z = self.encode(images, mean=True)[from_latent - 1]
        return self._images(self._likeliest_levels(z, from_latent), output_type)

    @torch.no_grad()
    def interpolate(self, first: Any, last: Any, steps: int = 8, output_type: str = "pil") -> Any:
        """Images between two, along the straight line between their top latents, decoded at the mean.

        Args:
            first: Images, as `log_likelihood` takes them.
            last: As many.
            steps: Points on each line, both ends included.
            output_type: As `__call__`'s; a row of ``steps`` images for each pair, one row after the other.

        Raises:
            DataError: There are not as many last as first images.
            ConfigurationError: There are fewer than two steps.
        """
        if steps < 2:
            raise ConfigurationError(f"steps is {steps}: a line needs both of its ends, so give at least 2.")
        start, end = (self.encode(images, mean=True)[-1] for images in (first, last))
        if start.shape != end.shape:
            raise DataError(f"{start.shape[0]} first and {end.shape[0]} last images were given: give pairs.")
        weights = torch.linspace(0, 1, steps, device=start.device)
        line = torch.stack([torch.lerp(start, end, float(weight)) for weight in weights], dim=1)
        return self._images(self._likeliest_levels(line.flatten(0, 1), self.hvae.depth), output_type)

    def _likeliest_levels(self, z: Tensor, t: int) -> Tensor:
        """The likeliest level of each pixel, down the hierarchy from ``z_t`` by the means."""
        for level in range(t - 1, 0, -1):
            z = self.hvae.decode(level, z).mean
        levels: Tensor = self.hvae.likeliest_levels(z)
        return levels

    def _images(self, levels: Tensor, output_type: str) -> Any:
        return images_from_levels(levels, self.num_levels, output_type)


HVAEPipeline.__module__ = "vdm_hub"
