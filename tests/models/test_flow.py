"""Flow matching against the scheduler of diffusers."""

import numpy as np
import pytest
import torch

from unlearn.models.diffusion import flow


@pytest.mark.parametrize(
    "settings, shift", [({}, 1.0), ({"shift": 3.0}, 3.0), ({"use_dynamic_shifting": True}, np.exp(0.5))]
)
def test_flow_matching_is_what_its_scheduler_undoes(settings, shift):
    made, device = flow.FlowMatching(settings, 256), torch.device("cpu")
    clean, eps = torch.randn(2, 5, 4, 8, 8, dtype=torch.float64)
    sampler = made.sampler("", 5, device)
    s = np.linspace(1, 0.2, 5)
    np.testing.assert_allclose(sampler.timesteps, 1000 * shift * s / (1 + (shift - 1) * s), rtol=1e-5)
    noisy = made.noised(clean, eps, sampler.timesteps)
    reference = sampler.scale_noise(clean, sampler.timesteps, eps)
    torch.testing.assert_close(noisy, reference, atol=1e-6, rtol=1e-6)
    # the true velocity leads from noise to the clean image
    x = eps[:1]
    for t in sampler.timesteps:
        x = sampler.step(made.target(clean[:1], eps[:1], t.expand(1)), t, x).prev_sample
    torch.testing.assert_close(x.double(), clean[:1], atol=1e-5, rtol=1e-5)
    t = made.times(4000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1000
    assert float((t / 1000).median()) == pytest.approx(shift / (1 + shift), abs=0.02)


@pytest.mark.parametrize(
    "settings", [{"time_shift_type": "linear"}, {"stochastic_sampling": True}, {"invert_sigmas": True}]
)
def test_other_flows_are_refused(settings):
    with pytest.raises(ValueError, match="only exponential time shifts"):
        flow.FlowMatching(settings, 256)
