"""Networks of the Stable Diffusion kind: their two halves are diffusers' whole model, in the three shapes that people
have."""

import pytest
import torch

from unlearn.models.diffusion import unet_condition

from diffusers import UNet2DConditionModel  # isort: skip  after the cure of torchvision

SMALL = {
    "in_channels": 9, "out_channels": 4, "block_out_channels": (8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 12, "attention_head_dim": 4,
}  # fmt: skip
KINDS = {
    "SD-1.5": SMALL,
    "SD-2": SMALL | {"use_linear_projection": True, "attention_head_dim": (2, 4, 4), "upcast_attention": True},
    "SDXL": SMALL
    | {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 10,
    },
}  # fmt: skip
FULL = {
    "SD-1.5": (859_535_364, {"in_channels": 9, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "SD-2": (
        865_925_124,
        {"in_channels": 9, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True},
    ),
    "SDXL": (
        2_567_478_084,
        {
            "in_channels": 9, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
            "use_linear_projection": True,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


def whole_and_parts(kind: str):
    """diffusers' model with random weights, and our three parts with the same ones and a prompt."""
    torch.manual_seed(0)
    whole = UNet2DConditionModel(**KINDS[kind]).eval()
    parts = torch.nn.ModuleDict(
        zip(("encoder", "decoder", "shared"), unet_condition.split(KINDS[kind], 5, 64), strict=True)
    ).eval()
    prompt = {"shared.prompt": torch.randn(1, 5, 12)} | (
        {"shared.pooled": torch.randn(1, 10)} if kind == "SDXL" else {}
    )
    parts.load_state_dict(unet_condition.from_public(whole.state_dict()) | prompt)
    return whole, parts, prompt


def forward(parts, sample, t):
    emb, context = parts["shared"](t, sample.dtype)
    levels = parts["encoder"](sample, emb, context)
    return levels, parts["decoder"](levels, emb, context)


@kinds
@pytest.mark.parametrize("side", [16, 10])
def test_the_parts_are_the_whole_model(kind, side):
    whole, parts, prompt = whole_and_parts(kind)
    sample, t = torch.randn(3, 9, side, side), torch.tensor([0, 500, 999])
    more = {}
    if kind == "SDXL":
        sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, -1)
        more["added_cond_kwargs"] = {"text_embeds": prompt["shared.pooled"].expand(3, -1), "time_ids": sizes}
    with torch.no_grad():
        expected = whole(sample, t, encoder_hidden_states=prompt["shared.prompt"].expand(3, -1, -1), **more).sample
        levels, found = forward(parts, sample, t)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # conv_in, one a ResNet block and one a downsampler, then the middle
    assert len(levels) == 1 + 3 + 2 + 1 and all(len(level) == 3 for level in levels)


@kinds
def test_prompt_and_sizes_reach_the_prediction(kind):
    _, parts, prompt = whole_and_parts(kind)
    sample, t = torch.randn(1, 9, 16, 16), torch.tensor([500])
    with torch.no_grad():
        _, before = forward(parts, sample, t)
        for name in (*prompt, *(["shared.sizes"] if kind == "SDXL" else [])):
            buffer = getattr(parts["shared"], name.partition(".")[2])
            kept = buffer.clone()
            buffer.mul_(3)
            assert not torch.equal(forward(parts, sample, t)[1], before), name
            buffer.copy_(kept)


@kinds
def test_names_go_to_diffusers_and_back(kind):
    whole, parts, _ = whole_and_parts(kind)
    tensors = parts.state_dict() | {
        "first_stage.encoder.conv_in.weight": torch.zeros(1),
        "decoder.back.decoder.conv_in.weight": torch.zeros(1),
    }
    public, expected = unet_condition.to_public(tensors), whole.state_dict()
    assert public.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in public.items())
    ours = unet_condition.from_public(tensors)
    assert ours.keys() == tensors.keys()  # our own names are left alone


@kinds
def test_activation_checkpointing_changes_no_gradient_and_saves_memory(kind):
    _, parts, _ = whole_and_parts(kind)
    sample, gradients, saved = torch.randn(2, 9, 16, 16), [], []
    for active in (False, True):
        parts["encoder"].activation_checkpointing = active
        parts.zero_grad()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: (kept.append(t.numel()), t)[1], lambda t: t):
            levels, _ = forward(parts, sample, torch.tensor([10, 600]))
        sum(level.square().mean() for level in levels).backward()
        gradients.append([p.grad.clone() for p in parts["encoder"].parameters()])
        saved.append(sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert saved[1] < 0.8 * saved[0]


@pytest.mark.parametrize("kind", FULL)
def test_the_full_shapes_have_the_published_numbers_of_parameters(kind):
    """Those of the text-to-image models (859,520,964, 865,910,724, 2,567,463,684) and five input channels more."""
    count, config = FULL[kind]
    with torch.device("meta"):
        parts = unet_condition.split(config)
        emb, context = parts[2](torch.zeros(1, dtype=torch.long), torch.float32)
        levels = parts[0](torch.zeros(1, 9, 64, 64), emb, context)
        assert parts[1](levels, emb, context).shape == (1, 4, 64, 64)
    assert sum(p.numel() for part in parts for p in part.parameters()) == count
    assert len(levels) == {"SD-1.5": 13, "SD-2": 13, "SDXL": 10}[kind]


def test_the_layout_is_noise_hole_known():
    noisy, known = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    hidden = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hidden[..., 8:24, 16:] = True
    sample = unet_condition.layout(noisy, known, hidden)
    assert torch.equal(sample[:, :4], noisy) and torch.equal(sample[:, 5:], known)
    assert sample[0, 4].tolist() == [[0] * 4, [0, 0, 1, 1], [0, 0, 1, 1], [0] * 4]


@pytest.mark.parametrize(
    "change, message",
    [({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"mid_block_type": None}, "mid_block_type None"),
     ({"addition_embed_type": "text", "encoder_hid_dim": 8}, "addition_embed_type 'text'"),
     ({"attention_head_dim": (1, 2)}, "same number")],
)  # fmt: skip
def test_other_kinds_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        unet_condition.split(SMALL | {"addition_embed_type_num_heads": 2} | change)
