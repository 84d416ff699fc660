"""Flow matching's identities, and the map from uniform numbers to the pipeline's own distribution of noise levels."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dopsd.distill.flow import add_noise, clean_estimate, euler_step, velocity_target, warp


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


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1))
def test_flow_matching_levels_follow_the_static_shift(uniform):
    """Against the closed form of shift 3, ``3 u / (1 + 2 u)``."""
    u = torch.linspace(1, 1 / 1000, 1000)
    grid = torch.cat([3 * u / (1 + 2 * u), torch.zeros(1)])
    sigma = warp(torch.tensor([uniform]), grid)
    torch.testing.assert_close(sigma, torch.tensor([3 * uniform / (1 + 2 * uniform)]), atol=2e-5, rtol=0)


def test_flow_matching_levels_come_from_the_familys_own_grid(family):
    grid = family.sigmas(1000, 64, 64)
    sigma = warp(torch.tensor([1.0, 0.5, 0.0]), grid)
    torch.testing.assert_close(sigma, torch.tensor([1.0, 0.75, 0.0]), atol=1e-4, rtol=0)
