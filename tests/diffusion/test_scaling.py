"""K levels and the reals that stand for them."""

from __future__ import annotations

import pytest
import torch

from naming import naming
from vdm_hub.diffusion.scaling import SCALINGS, DataScaling
from vdm_hub.errors import ConfigurationError


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("num_levels", [2, 17, 256, 65536])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_inverts_encode_for_every_level(name: str, num_levels: int, dtype: torch.dtype) -> None:
    scaling, levels = DataScaling(name, num_levels), torch.arange(num_levels)
    x = scaling.encode(levels, dtype)
    assert x.dtype == dtype and float(x.abs().max()) <= 1
    assert torch.equal(scaling.nearest(x), levels)
    outside = torch.tensor([-7.0, 7.0], dtype=dtype)
    assert scaling.nearest(outside).tolist() == [0, num_levels - 1]


@pytest.mark.parametrize("num_levels", [2, 17, 256])
def test_the_scalings_are_those_of_their_papers(num_levels: int) -> None:
    levels = torch.arange(num_levels, dtype=torch.float64)
    centers, full, unit = (DataScaling(name, num_levels).encode(levels, torch.float64) for name in SCALINGS)
    torch.testing.assert_close(centers, 2 * (levels + 0.5) / num_levels - 1, rtol=0, atol=1e-15)
    torch.testing.assert_close(full, 2 * levels / (num_levels - 1) - 1, rtol=0, atol=1e-15)
    torch.testing.assert_close(unit, levels / (num_levels - 1), rtol=0, atol=1e-15)


def test_an_unknown_scaling_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=naming("'bin_centers'")):
        DataScaling("bin_center", 256)
