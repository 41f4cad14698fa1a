"""Figures against computations of their own."""

import numpy as np
import pytest
import torch

from unlearn.evaluation import distributions, intervals, metrics


def normal(*shape, seed=0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, scale, shape)).float()


def fid(real, made):
    return distributions.frechet(real, made)[0]


@pytest.mark.parametrize("images", [70, 4])
def test_fid_is_the_frechet_distance(images):
    """Also of fewer images than features have numbers."""
    real, made = normal(60, 5).numpy().astype(float), normal(images, 5, seed=1, scale=1.7).numpy().astype(float) + 0.3
    a, b = np.cov(real.T), np.cov(made.T)
    values, vectors = np.linalg.eigh(a)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b @ root).clip(0)).sum()
    expected = ((real.mean(0) - made.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * cross
    # The expected root of a product that is singular is the coarser one.
    near = 1e-9 if images > 5 else 1e-6
    assert fid(torch.from_numpy(real), torch.from_numpy(made)) == pytest.approx(expected, rel=near)


def test_fid_of_few_images_is_a_number_and_of_one_is_none():
    few = normal(4, 50)
    assert fid(few, few) == pytest.approx(0, abs=1e-9)
    assert fid(few, few + 1) == pytest.approx(50, rel=1e-6)
    assert distributions.frechet(few[:1], few) is None


def test_inception_score_is_the_mean_of_ten_splits():
    scores = normal(40, 6, scale=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        order = torch.randperm(40).numpy()
    p = np.exp(scores.numpy().astype(float)[order])
    p /= p.sum(1, keepdims=True)
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.split(p, 10)]
    state = torch.random.get_rng_state()
    mean, std, _ = distributions.inception_score(scores, 3)
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are not touched"
    assert (mean, std) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts, ddof=1)))
    assert distributions.inception_score(scores[:1], 0) == (pytest.approx(1), None, None)


def test_splits_of_the_inception_score_are_even():
    """95 images are dealt to ten splits of nine or ten: none of five, whose score would stand far apart."""
    scores = normal(95, 6, scale=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        p = torch.softmax(scores.double()[torch.randperm(95)], 1).numpy()
    parts = [np.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in np.array_split(p, 10)]
    mean, std, _ = distributions.inception_score(scores, 3)
    assert (mean, std) == (pytest.approx(np.mean(parts)), pytest.approx(np.std(parts, ddof=1)))


def test_cosine_is_of_each_image_to_its_own_original():
    a, b = normal(9, 30), normal(9, 30, seed=1)
    x, y = a.numpy().astype(float), b.numpy().astype(float)
    expected = (x * y).sum(1) / np.sqrt((x * x).sum(1) * (y * y).sum(1))
    np.testing.assert_allclose(metrics.cosine(a, b).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert metrics.cosine(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0]


def test_psnr_is_of_the_hole_alone():
    from torchmetrics.image import PeakSignalNoiseRatio

    real, noise = torch.rand(6, 3, 8, 8), 0.1 * normal(6, 3, 8, 8)
    hidden = torch.zeros(6, 1, 8, 8, dtype=torch.bool)
    hidden[:, :, 2:6, 2:6] = True
    made = (real + noise).clamp(0, 1)
    outside = torch.where(hidden, made, 1 - made)
    errors = metrics.hole_errors(made, real, hidden)
    assert torch.equal(errors, metrics.hole_errors(outside, real, hidden)), "pixels outside the hole must not count"
    x, y = made.numpy().astype(float)[:, :, 2:6, 2:6], real.numpy().astype(float)[:, :, 2:6, 2:6]
    assert metrics.psnr(errors) == pytest.approx(-10 * np.log10(((x - y) ** 2).mean()), rel=1e-9)
    theirs = PeakSignalNoiseRatio(data_range=1.0)(made[:, :, 2:6, 2:6], real[:, :, 2:6, 2:6])
    assert metrics.psnr(errors) == pytest.approx(float(theirs), rel=1e-5)
    assert metrics.psnr(torch.zeros(3)) == 100


def test_fid_and_kid_are_those_of_torch_fidelity():
    """The figures on the right were computed by torch-fidelity 0.4.0 from the same features, KID with one subset of
    all."""
    rng = np.random.RandomState(7)
    real, made = (
        torch.from_numpy(rng.normal(*of).astype("float32")) for of in ((0, 1, (300, 24)), (0.2, 1.3, (200, 24)))
    )
    assert fid(real, made) == pytest.approx(5.128887221838937, rel=1e-6)
    found = intervals.kid(real[:200], made, 0)
    assert found is not None and found[0] == pytest.approx(0.22149157524108887, rel=1e-6)


def test_kid_is_that_of_other_implementations():
    from torchmetrics.image.kid import poly_mmd

    real, made = normal(60, 40), normal(60, 40, seed=1, scale=1.4)
    found = intervals.kid(real, made, 0)
    assert found is not None
    value, low, high = found
    assert value == pytest.approx(float(poly_mmd(real.double(), made.double())), rel=1e-9)
    assert low < value < high and found == intervals.kid(real, made, 0) != intervals.kid(real, made, 1)
    few = [
        k[0] for seed in range(60) if (k := intervals.kid(normal(8, 40, seed=seed), normal(8, 40, seed=99 + seed), 0))
    ]
    assert abs(np.mean(few)) < 3 * np.std(few) / 60**0.5, "few images of one distribution: nothing, on average"
    assert intervals.kid(real[:1], made, 0) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "KERNEL_ROWS", 7)
        few = intervals.kid(real, real, 0)
        assert few is not None and few[0] == pytest.approx(intervals.kid(real, real.clone(), 0)[0]) and few != found
    for seed in range(60):
        few = intervals.kid(normal(3, 8, seed=seed).abs() * 10, normal(3, 8, seed=99 + seed).abs() * 10, 0)
        assert few is not None and all(map(np.isfinite, few)), "also where a draw is of one image"


def test_intervals_cover_the_truth_as_often_as_they_say():
    inside, large = {"mean": 0, "kid": 0}, intervals.kid(normal(1500, 10), 0.5 + normal(1500, 10, seed=1), 0)
    assert large is not None
    for seed in range(150):
        low, high = intervals.of_mean(normal(50, seed=seed).square(), seed, lambda means: means) or (0, 0)
        inside["mean"] += low <= 1 <= high
        found = intervals.kid(normal(60, 10, seed=seed), 0.5 + normal(60, 10, seed=1000 + seed), seed)
        inside["kid"] += found is not None and found[1] <= large[0] <= found[2]
    assert all(0.85 <= count / 150 <= 0.99 for count in inside.values()), inside


def test_an_influence_is_what_the_figure_changes_by_with_the_weight_of_an_image():
    """Against the distance of weighted covariances, computed with a little more and a little less of one image."""
    real, made = normal(40, 6).double(), 0.3 + 1.5 * normal(30, 6, seed=1).double()
    _, of_real, of_made = distributions.frechet(real, made)

    def distance(a, b):
        """With weights a and b of the images; n - 1 in the covariance stays in proportion to n."""
        moments = []
        for x, w in ((real.numpy(), a), (made.numpy(), b)):
            mean = w @ x / w.sum()
            moments.append((mean, (w * (x - mean).T) @ (x - mean) / w.sum() * len(x) / (len(x) - 1)))
        (m, s), (n, t) = moments
        root = np.sqrt(np.linalg.eigvals(s @ t).real).sum()
        return ((m - n) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root

    for place in (0, 7, 29):
        ends = []
        for step in (1e-4, -1e-4):
            a, b = np.ones(40), np.ones(30)
            a[place] += step
            b[place] += step
            ends.append([distance(a, np.ones(30)), distance(np.ones(40), b)])
        slopes = np.subtract(*ends) / 2e-4 * [40, 30]
        found = [float(each[place]) for each in (of_real, of_made)]
        assert found == pytest.approx(slopes.tolist(), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("images", [30, 200])
def test_intervals_of_fid_and_is_are_as_wide_as_other_images_make_them(images):
    """Fewer and more images than features have numbers: 19 of 20 other samples are where the interval says."""
    found = []
    for seed in range(100):
        real = normal(images, 60, seed=seed)
        made = 0.3 + 0.8 * real + normal(images, 60, seed=1000 + seed, scale=0.5)
        holes = {"errors": torch.ones(images), "ssim": torch.ones(images)}
        found.append(metrics.scores(real, made, 2 * made[:, :9], holes, seed))
    for figure in ("fid", "is"):
        values = [row[figure] for row in found]
        inside = sum(row[f"{figure}_low"] <= np.mean(values) <= row[f"{figure}_high"] for row in found)
        widths = [row[f"{figure}_high"] - row[f"{figure}_low"] for row in found]
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(values), rel=0.3), figure
        assert 85 <= inside <= 100, figure


def test_ssim_is_of_the_hole_alone_and_torchmetrics_at_the_edges_too():
    import unlearn.torchvision_cpu  # noqa: F401
    from torchmetrics.functional.image import structural_similarity_index_measure  # isort: skip

    real = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    made = (real + 0.2 * normal(2, 3, 24, 24)).clamp(0, 1)
    hidden = torch.zeros(2, 1, 24, 24, dtype=torch.bool)
    hidden[0, :, 12, 11] = hidden[1, :, 10:13, 10:13] = True
    x, y = real[0].numpy().astype(float)[:, 7:18, 6:17], made[0].numpy().astype(float)[:, 7:18, 6:17]
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    mx, my = (window * x).sum((1, 2)), (window * y).sum((1, 2))
    vx, vy, both = ((window * z).sum((1, 2)) for z in (x * x, y * y, x * y))
    vx, vy, both = vx - mx**2, vy - my**2, both - mx * my
    c, d = 0.01**2, 0.03**2
    expected = (2 * mx * my + c) * (2 * both + d) / ((mx**2 + my**2 + c) * (vx + vy + d))
    assert float(metrics.hole_ssim(made, real, hidden)[0]) == pytest.approx(expected.mean(), rel=1e-6)
    assert metrics.hole_ssim(real, real, hidden).tolist() == [pytest.approx(1)] * 2
    _, every = structural_similarity_index_measure(
        made.double(), real.double(), data_range=1.0, reduction="none", return_full_image=True
    )
    whole = metrics.hole_ssim(made, real, torch.ones_like(hidden))
    assert whole.tolist() == pytest.approx(every.mean((1, 2, 3)).tolist(), rel=1e-12)
