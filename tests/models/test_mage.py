"""MAGE against an implementation of its own, written plainly from the paper and the public layout."""

import json

import numpy as np
import pytest
import torch
from support import runs
from support.mage import CODES, GRID, SMALL, VOCABULARY, build, double, draw, encoded, logits

from unlearn import config
from unlearn.errors import ConfigError, WeightsError
from unlearn.models import base, mage, mage_file, weights
from unlearn.models.mage import MaskedGenerativeEncoder


@pytest.mark.parametrize("kind, size", [("random", 0.75), ("centre", 0.5), ("outpaint", 0.5)])
def test_embedding_and_logits_of_a_public_checkpoint_are_those_of_the_reference(public_mage, loaded_mage, kind, size):
    view, w = draw(kind, size), double(public_mage)
    tokens = torch.randint(CODES, (2, 2, GRID * GRID), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for dtype, close in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
            model = loaded_mage.to(dtype)
            found = model.encode(tokens, view)
            guessed, loss = model.decoder(found, view.visible), float(model.training_loss(tokens, view))
            errors = []
            for row in range(2):
                visible, hidden = view.visible[row].tolist(), view.hidden[row].tolist()
                embedding = encoded(w, tokens[row, 0].numpy(), visible)
                expected = logits(w, embedding, visible)
                np.testing.assert_allclose(found[row], embedding, atol=close, rtol=close)
                np.testing.assert_allclose(guessed[row], expected, atol=close, rtol=close)
                for place in hidden:  # the label gets 0.9, and 0.1 is spread over the whole vocabulary
                    chance = expected[place] - np.log(np.exp(expected[place]).sum())
                    errors.append(-0.9 * chance[tokens[row, 1, place]] - 0.1 * chance.mean())
            assert loss == pytest.approx(np.mean(errors), rel=1e-5)
    loaded_mage.float()


@pytest.mark.parametrize("steps, temperature", [(1, 0.0), (5, 0.0), (5, 1.0), (1000, 0.5)])
def test_decoding_keeps_what_is_seen_and_repeats_in_any_batch(
    public_mage, public_tokenizer, loaded_mage, steps, temperature
):
    model = build(SMALL | {"decoding_steps": steps, "temperature": temperature})
    model.load_state_dict(loaded_mage.state_dict())
    tokens = torch.randint(CODES, (3, GRID * GRID), generator=torch.Generator().manual_seed(2))
    view, rounds, inner = draw(rows=3), [], model.encoder.forward
    model.encoder.forward = lambda tokens, known: (rounds.append(known), inner(tokens, known))[1]
    with torch.no_grad():
        full, again = model.complete(tokens, view), model.complete(tokens, view)
        assert torch.equal(full, again) and torch.equal(full[1:2], model.complete(tokens[1:2], view.rows(1, 2)))
    rounds = rounds[: len(rounds) // 3]
    assert torch.equal(full.gather(1, view.visible), tokens.gather(1, view.visible)) and int(full.max()) < CODES
    counts = [known.shape[1] for known in rounds]
    assert (
        len(counts) == min(steps, view.hidden.shape[1])
        and counts == sorted(set(counts))
        and counts[0] == view.visible.shape[1]
    )
    for earlier, later in zip(rounds, rounds[1:], strict=False):  # what is known stays known
        assert all(set(a) <= set(b) for a, b in zip(earlier.tolist(), later.tolist(), strict=True))


def test_one_round_takes_the_likeliest_code_of_each_hidden_place(loaded_mage):
    model = build(SMALL | {"decoding_steps": 1})
    model.load_state_dict(loaded_mage.state_dict())
    tokens, view = torch.randint(CODES, (2, GRID * GRID), generator=torch.Generator().manual_seed(2)), draw()
    with torch.no_grad():
        guessed = model.decoder(model.encoder(tokens, view.visible), view.visible)[..., :CODES].argmax(2)
        assert torch.equal(model.complete(tokens, view).gather(1, view.hidden), guessed.gather(1, view.hidden))


def test_a_temperature_draws_tokens_from_their_distribution_and_is_of_the_confidence_alone(loaded_mage, monkeypatch):
    """Of MAGE's two random choices the first, the token, does not know the temperature."""
    tokens, view, drawn = torch.zeros(1, GRID * GRID, dtype=torch.int64), draw(rows=1), {}
    for temperature in (0.5, 4.5):
        model = build(SMALL | {"decoding_steps": 1, "temperature": temperature})
        model.load_state_dict(loaded_mage.state_dict())
        with torch.no_grad():
            drawn[temperature] = model.complete(tokens, view)
    assert torch.equal(drawn[0.5], drawn[4.5])
    shares = torch.tensor([0.6, 0.3, 0.1]).log()
    given = torch.cat([shares, torch.full((VOCABULARY - 3,), -100.0)]).expand(1, GRID * GRID, -1)
    monkeypatch.setattr(model.decoder, "forward", lambda embedding, known: given)
    counts, drawing, gumbel = torch.zeros(CODES), torch.Generator().manual_seed(0), mage._gumbel
    # `complete` starts its own generator from the same seed every time.
    monkeypatch.setattr(mage, "_gumbel", lambda shape, generator: gumbel(shape, drawing))
    for _ in range(100):
        with torch.no_grad():
            counts += torch.bincount(model.complete(tokens, view)[0, view.hidden[0]], minlength=CODES)
    torch.testing.assert_close(counts[:3] / counts.sum(), shares.exp(), atol=0.06, rtol=0)


def test_it_is_written_back_for_the_code_of_mage(public_mage, public_tokenizer, loaded_mage, tmp_path):
    line = weights.convert(
        config.Model(family="mage", weights=_ours(loaded_mage, tmp_path / "ours")), str(tmp_path / "theirs")
    )
    assert line == f"model.load_state_dict(torch.load('{tmp_path / 'theirs'}/mage.pth')['model'])"
    back = torch.load(tmp_path / "theirs" / "mage.pth", weights_only=True)["model"]
    whole = public_mage | {f"vqgan.{name}": tensor for name, tensor in public_tokenizer.items()}
    unused = mage_file.UNUSED_NAMES[:-1]
    assert back.keys() == whole.keys() | set(back) and {n: back[n].shape for n in whole} == {
        n: t.shape for n, t in whole.items()
    }
    assert {n for n in back if n not in whole} <= {n for n in back if n.startswith(unused)}
    assert all(torch.equal(back[n], t) for n, t in whole.items() if not n.startswith(unused) or "learned" in n)
    trained = build(weights=str(tmp_path / "ours"))
    with torch.no_grad():
        trained.encoder.word_embeddings.weight.add_(1)
    with pytest.raises(WeightsError, match="in MAGE both are one tensor.*train_words false"):
        weights.convert(config.Model(family="mage", weights=_ours(trained, tmp_path / "trained")), str(tmp_path / "no"))
    kept = [p.shape for p in runs.method().trainable(build(SMALL | {"train_words": False}))]
    assert len(kept) == len(list(loaded_mage.encoder.parameters())) - 1


def _ours(model, folder) -> str:
    weights.write(model.float(), str(folder), {})
    return str(folder)


def test_moving_the_encoders_words_leaves_the_logits_words_alone(loaded_mage):
    assert torch.equal(loaded_mage.encoder.word_embeddings.weight, loaded_mage.decoder.head.weight)
    assert loaded_mage.encoder.word_embeddings.weight.data_ptr() != loaded_mage.decoder.head.weight.data_ptr()


@pytest.mark.parametrize("variant, encoder", [("mage_vit_base", 86_810_112), ("mage_vit_large", 304_650_240)])
def test_the_named_sizes_are_those_of_the_paper(variant, encoder):
    """Encoder: 12 or 24 blocks, norm, and the embedding of 2025 words and 257 places with its norm; 54.5 M
    tokenizer."""
    with torch.device("meta"):
        model = MaskedGenerativeEncoder(base.options(config.Model(family="mage", variant=variant)))
    assert sum(t.numel() for t in model.encoder.state_dict().values()) == encoder
    assert model.grid == 16 and model.decoder.head.weight.shape == (2025, model.options.width)


@pytest.mark.parametrize("variant", ["mage_nano_32", "mage_micro_64"])
def test_the_tiny_shapes_can_be_built(variant):
    model = weights.build(config.Model(family="mage", variant=variant))
    assert model.grid == 8 and json.dumps(model.options.model_dump(mode="json"))


@pytest.mark.parametrize(
    "options, message",
    [({"image_size": 18}, "18 is not a multiple of 4"), ({"heads": 3}, "width 16 must be a multiple"),
     ({"norm_groups": 3}, "multiples of norm_groups 3"),
     ({"class_token": 2}, "class_token 2 must lie after the 12 codes"),
     ({"decoding_steps": 0}, "decoding_steps must be 1 or more"), ({"channels": ()}, "multiples of norm_groups 2"),
     ({"tokeniser": "mage"}, "tokeniser")],
)  # fmt: skip
def test_a_shape_that_cannot_be_is_told(options, message):
    with pytest.raises(ConfigError, match=message):
        build(SMALL | options)


def test_activation_checkpointing_changes_no_gradient(loaded_mage):
    tokens, view = torch.randint(CODES, (2, 2, GRID * GRID), generator=torch.Generator().manual_seed(2)), draw()
    gradients = []
    for active_ in (False, True):
        loaded_mage.encoder.activation_checkpointing = active_
        loaded_mage.zero_grad()
        loaded_mage.encode(tokens, view).square().mean().backward()
        gradients.append([p.grad.clone() for p in loaded_mage.encoder.parameters()])
    loaded_mage.encoder.activation_checkpointing = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
