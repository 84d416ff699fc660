"""The scores against independent ways to compute them, and against values known by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats
from scipy.ndimage import laplace, uniform_filter
from sklearn.metrics.pairwise import cosine_similarity, polynomial_kernel

from dopsd.evaluation import metrics
from dopsd.evaluation.scoring import Bootstrap, interval


def _rows(count: int, dim: int, seed: int) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _picture(seed: int, count: int = 1, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_cosine_is_that_of_the_centred_rows():
    a, b, center = _rows(5, 7, 0), _rows(5, 7, 1), _rows(1, 7, 2)[0]
    expected = np.diag(cosine_similarity((a - center).numpy(), (b - center).numpy()))
    assert np.allclose(metrics.cosine(a, b, center).numpy(), expected, atol=1e-6)
    assert np.allclose(metrics.cosine(a, a).numpy(), 1, atol=1e-6)


def test_rank_counts_the_candidates_that_are_nearer():
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    samples = torch.tensor([[1.0, 0.1], [1.0, 0.1], [1.0, 0.1], [1.0, 0.1]])
    # angles to the candidates: 0 nearest, then 2 (45 degrees), then 1 (90), then 3 (180)
    assert metrics.retrieval_rank(samples, candidates, torch.tensor([0, 2, 1, 3])).tolist() == [0, 1, 2, 3]


def test_kid_is_the_unbiased_mmd_of_the_polynomial_kernel():
    a, b = _rows(6, 5, 0), _rows(9, 5, 1) + 0.5
    aa, bb, ab = (
        polynomial_kernel(x.double(), y.double(), degree=3, gamma=1 / 5, coef0=1) for x, y in ((a, a), (b, b), (a, b))
    )
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    assert metrics.kid(a, b) == pytest.approx(within[0] + within[1] - 2 * ab.mean(), rel=1e-9)


def test_kid_is_zero_on_average_for_one_distribution_and_grows_with_distance():
    draws = [metrics.kid(_rows(40, 8, 2 * i), _rows(40, 8, 2 * i + 1)) for i in range(60)]
    error = np.std(draws) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error
    far = [metrics.kid(_rows(40, 8, 0), _rows(40, 8, 1) + shift) for shift in (0.0, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]


def test_kid_of_single_pictures_is_a_clear_error():
    with pytest.raises(ValueError, match="at least two pictures on each side, got 1 and 3"):
        metrics.kid(_rows(1, 4, 0), _rows(3, 4, 1))


def test_laplacian_energy_is_scipys():
    picture = _picture(0)
    grey = (picture[0] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0).double().numpy()
    expected = np.square(laplace(grey, mode="nearest")).mean()
    assert float(metrics.laplacian_energy(picture)[0]) == pytest.approx(expected, rel=1e-4)
    assert float(metrics.laplacian_energy(torch.full((1, 3, 8, 8), 0.3))[0]) == pytest.approx(0, abs=1e-10)


def test_blur_lowers_sharpness():
    picture = _picture(1)
    blurred = torch.nn.functional.avg_pool2d(picture, 3, 1, 1)
    assert metrics.laplacian_energy(blurred)[0] < 0.5 * metrics.laplacian_energy(picture)[0]


def _reference_ssim(a: np.ndarray, b: np.ndarray, window: int = 7) -> float:
    def mean(x: np.ndarray) -> np.ndarray:
        edge = window // 2
        return uniform_filter(x, window)[edge:-edge, edge:-edge]

    unbias = window**2 / (window**2 - 1)
    ma, mb = mean(a), mean(b)
    va, vb = ((mean(x * x) - m * m) * unbias for x, m in ((a, ma), (b, mb)))
    vab = (mean(a * b) - ma * mb) * unbias
    c1, c2 = 0.01**2, 0.03**2
    return float(np.mean((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))))


def test_ssim_is_that_of_the_paper():
    a, b = _picture(0), 0.5 * _picture(0) + 0.5 * _picture(1)
    grey = [metrics.luminance(x)[0, 0].double().numpy() for x in (a, b)]
    assert float(metrics.ssim(a, b)[0]) == pytest.approx(_reference_ssim(*grey), abs=1e-4)
    assert float(metrics.ssim(a, a)[0]) == pytest.approx(1, abs=1e-5)


@settings(max_examples=12, deadline=None)
@given(dx=st.integers(-2, 2), dy=st.integers(-2, 2))
def test_structure_forgives_a_shift_of_two_pixels(dx, dy):
    large = _picture(3, side=40)
    a, b = large[:, :, 4:36, 4:36], large[:, :, 4 + dy : 36 + dy, 4 + dx : 36 + dx]
    assert float(metrics.structure(a, b)[0]) == pytest.approx(1, abs=1e-4)


def test_structure_is_the_best_ssim_over_all_shifts_and_forgives_no_more_than_two_pixels():
    a, b = metrics.luminance(_picture(4)).expand(-1, 3, -1, -1), metrics.luminance(_picture(5)).expand(-1, 3, -1, -1)
    core = a[:, :, 2:-2, 2:-2]
    best = max(float(metrics.ssim(core, b[:, :, y : y + 28, x : x + 28])[0]) for y in range(5) for x in range(5))
    assert float(metrics.structure(a, b)[0]) == pytest.approx(best, abs=1e-5)
    assert float(metrics.structure(a, a.roll(5, 3))[0]) < 0.5


@pytest.mark.parametrize("size", [(2000, 300), (300, 2000), (4000, 500)])
def test_a_banner_has_a_structure_too(size):
    banner = Image.fromarray(np.random.default_rng(0).integers(0, 255, (5, 40, 3), dtype=np.uint8)).resize(size)
    small = metrics.stack([banner], metrics.STRUCTURE_SIZE)
    assert max(small.shape[2:]) == 64
    assert min(small.shape[2:]) == 16
    assert float(metrics.structure(small, small)[0]) == pytest.approx(1, abs=1e-5)
    assert metrics.stack([banner.resize((128, 64))], 64).shape[2:] == (32, 64), "of others the shape is kept"


def test_pixel_mse():
    a = torch.zeros(2, 3, 4, 4)
    b = torch.stack([torch.full((3, 4, 4), 0.5), torch.zeros(3, 4, 4)])
    assert metrics.pixel_mse(a, b).tolist() == [0.25, 0.0]


def test_bootstrap_covers_the_mean_and_pairs_models():
    values = np.random.default_rng(0).normal(1.0, 1.0, 400)
    low, high = interval(Bootstrap(3).means(values))
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(400), rel=0.15)
    for count in (6, 12, 40):
        few = values[:count]
        by_t = stats.t.interval(0.95, count - 1, few.mean(), stats.sem(few))
        assert interval(Bootstrap(3).means(few)) == pytest.approx(by_t, abs=0.12 * (by_t[1] - by_t[0])), count
    bootstrap = Bootstrap(3)
    # a constant shift between two models has no uncertainty when the same prompts are drawn for both
    assert np.allclose(bootstrap.means(values + 0.25) - bootstrap.means(values), 0.25)
