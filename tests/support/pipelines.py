"""Small pipelines of diffusers with random weights, text encoders and all."""

import torch

from unlearn.models.diffusion import autoencoder

import diffusers  # isort: skip  after the cure of torchvision
import transformers  # isort: skip

KL = {
    "class": "AutoencoderKL", "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 4,
}  # fmt: skip
FLUX_KL = KL | {"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159, "scaling_factor": 0.3611}
UNET = {
    "in_channels": 9, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4,
    "sample_size": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 16, "attention_head_dim": 4,
}  # fmt: skip
XL = UNET | {
    "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 12, "use_linear_projection": True,
}  # fmt: skip
TRANSFORMER = {
    "in_channels": 4 * (2 * 4 + 4), "out_channels": 16, "num_layers": 1, "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}  # fmt: skip


def clip(projected: bool = False, seed: int = 0):
    """(text encoder, tokenizer): CLIP's classes with letters for tokens."""
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(
        vocab={w: n for n, w in enumerate(vocabulary)}, merges=[], model_max_length=9
    )
    settings = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=12,
        max_position_embeddings=9, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return cls(settings).eval(), tokenizer


def t5():
    """(text encoder, tokenizer) of T5's classes."""
    torch.manual_seed(1)
    words = [(w, -1.0) for w in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz")]
    tokenizer = transformers.T5TokenizerFast(vocab=words, extra_ids=0)
    settings = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(settings).eval(), tokenizer


def made(kind: str):
    """A whole pipeline of diffusers with random weights."""
    torch.manual_seed(0)
    vae = autoencoder.whole(FLUX_KL if kind == "flux" else KL)
    text_encoder, tokenizer = clip()
    parts = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    if kind == "flux":
        second, tokenizer_2 = t5()
        return diffusers.FluxFillPipeline(
            **parts, text_encoder_2=second, tokenizer_2=tokenizer_2,
            transformer=diffusers.FluxTransformer2DModel(**TRANSFORMER),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    if kind == "xl":
        second, tokenizer_2 = clip(projected=True, seed=1)
        return diffusers.StableDiffusionXLInpaintPipeline(
            **parts,
            text_encoder_2=second,
            tokenizer_2=tokenizer_2,
            unet=diffusers.UNet2DConditionModel(**XL),
            scheduler=scheduler,
        )
    return diffusers.StableDiffusionInpaintPipeline(
        **parts, unet=diffusers.UNet2DConditionModel(**UNET), scheduler=scheduler, safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
