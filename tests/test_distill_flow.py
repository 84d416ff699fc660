"""Flow matching's identities, and the map from uniform numbers to the pipeline's own distribution of noise levels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd.distill.flow import add_noise, clean_estimate, euler_step, velocity_target
from tests import tiny


def _pair(batch=3):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 4, 6, 6)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_true_velocity_leads_from_any_level_to_any_other():
    x0, eps = _pair()
    u = velocity_target(x0, eps)
    for sigma, sigma_next in ((1.0, 0.9), (0.75, 0.5), (0.5, 0.0)):
        reached = euler_step(add_noise(x0, eps, sigma), u, sigma, sigma_next)
        torch.testing.assert_close(reached, add_noise(x0, eps, sigma_next))
        torch.testing.assert_close(clean_estimate(add_noise(x0, eps, sigma), u, sigma), x0)


def test_a_level_per_example_is_the_level_of_that_example():
    x0, eps = _pair()
    levels = torch.tensor([1.0, 0.75, 0.1])
    noised = add_noise(x0, eps, levels)
    for i, level in enumerate(levels):
        torch.testing.assert_close(noised[i], add_noise(x0[i], eps[i], level))
        estimate = clean_estimate(noised, velocity_target(x0, eps), levels)[i]
        torch.testing.assert_close(estimate, x0[i])


@pytest.mark.parametrize("level", [1, 0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)], ids=str)
def test_one_level_for_all_leaves_the_latents_their_precision(level):
    x0, eps = (x.bfloat16() for x in _pair())
    noised = add_noise(x0, eps, level)
    assert noised.dtype == torch.bfloat16
    assert torch.equal(noised, (1 - float(level)) * x0 + float(level) * eps)


def test_levels_go_to_where_the_latents_are():
    """The ``meta`` device stands for a GPU."""
    x = torch.zeros(2, 1, 1, 1, device="meta")
    assert add_noise(x, x, torch.tensor([0.3, 0.8])).device.type == "meta"


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-6, 1))
def test_flow_matching_levels_follow_the_static_shift(uniform):
    """Against the closed form of shift 3, ``3 u / (1 + 2 u)``, whatever the number of steps."""
    family = tiny.tiny_family_of_grids()
    (sigma,) = family.levels(torch.tensor([uniform], dtype=torch.float64), 4, 64, 64).tolist()
    assert sigma == pytest.approx(3 * uniform / (1 + 2 * uniform), abs=1e-6)


def test_flow_matching_levels_of_the_grids_own_points_are_the_grid(family):
    sigmas = family.sigmas(4, 64, 64)
    assert torch.equal(family.levels(torch.tensor([1.0, 0.75, 0.5, 0.25]), 4, 64, 64), sigmas[:-1])
