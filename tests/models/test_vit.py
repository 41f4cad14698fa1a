"""What the two families of Vision Transformers share."""

import pytest
import torch

from unlearn import config
from unlearn.errors import ConfigError
from unlearn.models import base, vit


def test_take_picks_entries_row_by_row():
    values, index = torch.arange(2 * 5 * 3).view(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    picked = vit.take(values, index)
    assert picked.shape == (2, 2, 3)
    assert all(torch.equal(picked[row, n], values[row, index[row, n]]) for row in range(2) for n in range(2))
    assert torch.equal(vit.take(values[..., 0], index), picked[..., 0])


@pytest.mark.parametrize("family", ["mae", "mage"])
@pytest.mark.parametrize("change", [{"heads": 5}, {"decoder_heads": 5}])
def test_heads_divide_their_width_in_both_families(family, change):
    with pytest.raises(ConfigError, match=r"model.options.*must be a multiple of its 5 heads"):
        base.options(config.Model(family=family, options=change))


def test_linear_layers_start_as_xavier_draws_with_zero_biases():
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(300, 100), torch.nn.LayerNorm(100), torch.nn.Conv2d(3, 4, 2))
    others = [t.clone() for t in layers[1:].state_dict().values()]
    vit.initialise_linear(layers)
    bound = (6 / 400) ** 0.5
    assert not layers[0].bias.any() and layers[0].weight.abs().max() <= bound
    assert float(layers[0].weight.std()) == pytest.approx(bound / 3**0.5, rel=0.02)
    assert all(torch.equal(a, b) for a, b in zip(others, layers[1:].state_dict().values(), strict=True))
