"""Named shapes of the family `diffusion`: networks, schedulers and autoencoders as diffusers' configs."""

from typing import Any


def small(widths: list[int]) -> dict[str, Any]:
    """A small UNet for pixels: one block a level, attention at the lowest."""
    rest = len(widths) - 1
    return {
        "class": "UNet2DModel", "in_channels": 6, "out_channels": 3, "block_out_channels": widths,
        "down_block_types": ["DownBlock2D"] * rest + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * rest,
        "layers_per_block": 1, "attention_head_dim": 16, "norm_num_groups": 8,
    }  # fmt: skip


def autoencoder(**settings) -> dict[str, Any]:
    """The autoencoder of Stable Diffusion, SDXL and Flux: 8 pixels along a latent's side."""
    return {
        "class": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, **settings,
    }  # fmt: skip


# Palette (arXiv 2111.05826) at 256 px: 62.6 M parameters.
PALETTE = {
    "class": "UNet2DModel", "in_channels": 6, "out_channels": 3, "block_out_channels": [64, 128, 256, 512],
    "layers_per_block": 2,
    "down_block_types": ["ResnetDownsampleBlock2D"] * 4, "up_block_types": ["ResnetUpsampleBlock2D"] * 4,
    "resnet_time_scale_shift": "scale_shift", "attention_head_dim": 32, "attn_norm_num_groups": 32,
}  # fmt: skip
LINEAR = {
    "num_train_timesteps": 2000, "beta_start": 1e-6, "beta_end": 0.01, "beta_schedule": "linear",
    "prediction_type": "epsilon",
}  # fmt: skip
# A small network learns the image itself faster than its noise.
COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
SCALED = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon", "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip

# Inpainting networks of Stable Diffusion 1 and 2, and SDXL: 9 channels in.
SD1 = {"class": "UNet2DConditionModel", "in_channels": 9, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = SD1 | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = SD1 | {
    "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "use_linear_projection": True,
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
# FLUX.1-Fill: 384 channels in, packed 2 x 2.
FILL = {"class": "FluxTransformer2DModel", "in_channels": 384, "out_channels": 64, "guidance_embeds": True}
SHIFTED = {
    "shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip
SD_VAE, SDXL_VAE = autoencoder(scaling_factor=0.18215), autoencoder(scaling_factor=0.13025, force_upcast=True)
FLUX_VAE = autoencoder(
    latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
    force_upcast=True,
)  # fmt: skip

# Small ones of the same classes on the latents of TAEF2: 32 channels, 8 pixels along a side.
SMALL_LATENT = {
    "class": "UNet2DConditionModel", "in_channels": 65, "out_channels": 32, "block_out_channels": [64, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 4, "norm_num_groups": 8, "cross_attention_dim": 32,
}  # fmt: skip
SMALL_FLUX = {
    "class": "FluxTransformer2DModel", "in_channels": 512, "out_channels": 128, "num_layers": 2, "num_single_layers": 4,
    "attention_head_dim": 32, "num_attention_heads": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32,
    "axes_dims_rope": [8, 12, 12],
}  # fmt: skip
ON_TAEF2 = {"vae": {"class": "TAEF2"}, "tokens": 4}

VARIANTS: dict[str, dict[str, Any]] = {
    "palette_256": {},
    "unet_nano_32": {"image_size": 32, "grid": 8, "network": small([16, 32, 64, 64]), "scheduler": COSINE},
    "unet_micro_64": {"image_size": 64, "network": small([16, 32, 64, 96]), "scheduler": COSINE},
    "sd1_inpaint_512": {"image_size": 512, "network": SD1, "scheduler": SCALED, "vae": SD_VAE},
    "sd2_inpaint_512": {"image_size": 512, "network": SD2, "scheduler": SCALED, "vae": SD_VAE},
    "sdxl_inpaint_1024": {"image_size": 1024, "network": SDXL, "scheduler": SCALED, "vae": SDXL_VAE},
    "flux_fill_1024": {"image_size": 1024, "network": FILL, "scheduler": SHIFTED, "vae": FLUX_VAE, "tokens": 512},
    "latent_micro_64": ON_TAEF2 | {"image_size": 64, "grid": 8, "network": SMALL_LATENT, "scheduler": COSINE},
    "latent_micro_128": ON_TAEF2 | {"image_size": 128, "network": SMALL_LATENT, "scheduler": COSINE},
    "flux_micro_128": ON_TAEF2 | {"image_size": 128, "network": SMALL_FLUX, "scheduler": {"shift": 1.0}},
}
