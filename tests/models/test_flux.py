"""Transformers of the FLUX.1-Fill kind: wherever they are cut, the parts are diffusers' whole model."""

import pytest
import torch

from unlearn.models.diffusion import flux

from diffusers import FluxFillPipeline, FluxTransformer2DModel  # isort: skip  after the cure of torchvision

SMALL = {
    "in_channels": 4 * (2 * 4 + 64), "out_channels": 16, "num_layers": 2, "num_single_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10, "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip
FILL = {"in_channels": 384, "out_channels": 64, "guidance_embeds": True}  # the rest are the defaults


def build(stop: int | None = None, **changes):
    """diffusers' model with random weights, and our three parts with the same ones and a prompt."""
    torch.manual_seed(0)
    whole = FluxTransformer2DModel(**SMALL | changes).eval()
    parts = torch.nn.ModuleDict(
        zip(("encoder", "decoder", "shared"), flux.split(SMALL | changes, 5, stop), strict=True)
    ).eval()
    prompt = {"shared.prompt": torch.randn(1, 5, 12), "shared.pooled": torch.randn(1, 10)}
    parts.load_state_dict(flux.from_public(whole.state_dict(), stop) | prompt)
    return whole, parts, prompt


def forward(parts, sample, t):
    emb, context = parts["shared"](t, sample.dtype)
    levels = parts["encoder"](sample, emb, context)
    return levels, parts["decoder"](levels, emb, context)


def pipeline_inputs(noisy, known, hidden):
    """What FluxFillPipeline gives its transformer, packed by its own functions."""
    b, c, h, w = noisy.shape
    mask = hidden.float()[:, 0].view(b, h, 8, w, 8).permute(0, 2, 4, 1, 3).reshape(b, 64, h, w)
    packed = [FluxFillPipeline._pack_latents(x, b, x.shape[1], h, w) for x in (noisy, known, mask)]
    return torch.cat(packed, dim=2), FluxFillPipeline._prepare_latent_image_ids(
        b, h // 2, w // 2, noisy.device, noisy.dtype
    )


@pytest.mark.parametrize("stop", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("guided", [True, False])
def test_the_parts_are_the_whole_model_as_the_pipeline_calls_it(stop, guided):
    whole, parts, prompt = build(stop, guidance_embeds=guided)
    noisy, known, t = torch.randn(3, 4, 6, 6), torch.randn(3, 4, 6, 6), torch.tensor([1.0, 317.7, 1000.0])
    hidden = torch.rand(3, 1, 48, 48) < 0.5
    tokens, ids = pipeline_inputs(noisy, known, hidden)
    with torch.no_grad():
        expected = whole(
            tokens, timestep=t / 1000, guidance=torch.full([3], 30.0) if guided else None, img_ids=ids,
            txt_ids=torch.zeros(5, 3),
            encoder_hidden_states=prompt["shared.prompt"].expand(3, -1, -1),
            pooled_projections=prompt["shared.pooled"].expand(3, -1),
        ).sample  # fmt: skip
        levels, found = forward(parts, flux.layout(noisy, known, hidden), t)
    expected = FluxFillPipeline._unpack_latents(expected, 48, 48, 8)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert len(levels) == 1 and levels[0].shape == (3, 5 + 9, 16)


def test_the_cut_is_where_the_config_says_and_tensors_follow_it():
    whole, parts, prompt = build()
    assert set(parts["encoder"].transformer_blocks) == {"0", "1"} and not parts["encoder"].single_transformer_blocks
    moved = flux.from_public(parts.state_dict(), 4)
    again = build(4)[1]
    assert moved.keys() == again.state_dict().keys()
    assert set(again["encoder"].single_transformer_blocks) == {"0", "1"} and set(
        again["decoder"].single_transformer_blocks
    ) == {"2"}
    assert flux.from_public(moved, 2).keys() == parts.state_dict().keys()
    extra = {"first_stage.conv_in.weight": torch.zeros(1), "decoder.back.conv_in.weight": torch.zeros(1)}
    public, expected = flux.to_public(moved | extra), whole.state_dict()
    assert public.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in public.items())
    assert extra.keys() <= flux.from_public(extra).keys()


@pytest.mark.parametrize("stop", [0, 5, -1])
def test_a_cut_that_leaves_one_side_empty_is_refused(stop):
    with pytest.raises(ValueError, match=f"encoder_blocks {stop}: of the 5 blocks"):
        flux.split(SMALL, 5, stop)


def test_a_larger_patch_is_refused():
    with pytest.raises(ValueError, match="patch_size 2"):
        flux.split(SMALL | {"patch_size": 2})


def test_the_full_shape_has_the_published_number_of_parameters():
    """That of FLUX.1-dev (11,901,408,320) and 320 input channels more."""
    with torch.device("meta"):
        parts = flux.split(FILL)
        emb, context = parts[2](torch.zeros(1), torch.float32)
        levels = parts[0](torch.zeros(1, 96, 64, 64), emb, context)
        assert levels[0].shape == (1, 512 + 1024, 3072) and parts[1](levels, emb, context).shape == (1, 16, 64, 64)
    assert sum(p.numel() for part in parts for p in part.parameters()) == 11_902_391_360
    assert len(parts[0].transformer_blocks) == 19 and len(parts[0].single_transformer_blocks) == 9


@pytest.mark.parametrize("stop", [2, 3])
def test_activation_checkpointing_changes_no_gradient_and_saves_memory(stop):
    _, parts, _ = build(stop)
    sample, gradients, saved = torch.randn(2, 72, 6, 6), [], []
    for active in (False, True):
        parts["encoder"].activation_checkpointing = active
        parts.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            levels, _ = forward(parts, sample, torch.tensor([10.0, 600.0]))
        levels[0].square().mean().backward()
        gradients.append([p.grad.clone() for p in parts["encoder"].parameters()])
        saved.append(sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < 0.8 * saved[0]
