"""The two distillation losses against their definitions."""

import pytest
import torch

from dopsd.distill.flow import clean_estimate
from dopsd.distill.loss import distillation_loss


def _velocities():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("sigma", [torch.tensor(0.75), torch.tensor([1.0, 0.9, 0.5])], ids=["scalar", "per example"])
def test_x0_loss_is_the_distance_of_clean_estimates_and_the_weighted_velocity_loss(sigma):
    student, teacher, x = _velocities()
    sigma = sigma.double()
    loss = distillation_loss("x0", student, teacher, sigma)
    estimates = clean_estimate(x, student, sigma), clean_estimate(x, teacher, sigma)
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(*estimates))
    each = [distillation_loss("velocity", s, t, 1.0) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(loss, (sigma.expand(3).square() * torch.stack(each)).mean())


def test_velocity_loss_is_the_mean_squared_difference_at_every_level():
    student, teacher, _ = _velocities()
    for sigma in (1.0, 0.1):
        torch.testing.assert_close(
            distillation_loss("velocity", student, teacher, sigma), torch.nn.functional.mse_loss(student, teacher)
        )


def test_no_gradient_flows_into_the_teachers_answer():
    student, teacher, _ = (v.requires_grad_() for v in _velocities())
    distillation_loss("x0", student, teacher, 0.5).backward()
    assert student.grad is not None
    assert teacher.grad is None
