"""The file of a public MAGE checkpoint (LTH14/mage): its names and ours, read and written."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from unlearn.errors import WeightsError
from unlearn.models import tokenizer

if TYPE_CHECKING:
    from unlearn.models.mage import MAGEOptions

PUBLIC_FILE = "mage.pth"  # what `write` makes
# Beginnings of names in a public MAGE checkpoint -> the names in our model that replace them.
MAGE_NAMES = {
    "token_emb.word_embeddings.": ["encoder.word_embeddings.", "decoder.head."],
    "token_emb.position_embeddings.": ["encoder.position_embeddings."],
    "token_emb.LayerNorm.": ["encoder.embed_norm."],
    "blocks.": ["encoder.blocks."],
    "norm.": ["encoder.norm."],
    "decoder_embed.": ["decoder.embed."],
    "decoder_pos_embed_learned": ["decoder.pos_embed"],
    "decoder_blocks.": ["decoder.blocks."],
    "decoder_norm.": ["decoder.norm."],
    "mlm_layer.fc.": ["decoder.fc."],
    "mlm_layer.ln.": ["decoder.ln."],
    "mlm_layer.bias": ["decoder.head.bias"],
}
# Beginnings of names in such a checkpoint that its own model never uses.
UNUSED_NAMES = (
    "cls_token", "pos_embed", "mask_token", "patch_embed.", "decoder_pos_embed", "decoder_pred.",
    "token_emb.position_ids",
)  # fmt: skip


def write(own: dict[str, torch.Tensor], options: "MAGEOptions", folder: Path) -> str:
    """Write PUBLIC_FILE for LTH14/mage: one file, the tokenizer in it. What its code holds and never uses is zero.

    own: the tensors of our model. Returns the line that loads the file there. Raises WeightsError.
    """
    o = options
    if not torch.equal(own["encoder.word_embeddings.weight"], own["decoder.head.weight"]):
        raise WeightsError(
            "the token embedding was trained, but the decoder's head was not, and in MAGE both are one tensor: its "
            "code cannot load this model. Train with model.options.train_words false to write it back"
        )
    if o.tokenizer != "mage":
        raise WeightsError("the tokenizer is of diffusers' kind, which MAGE's code does not load")
    tensors = {f"vqgan.{name}": t for name, t in tokenizer.to_public(own).items()}
    for theirs, (ours, *_) in MAGE_NAMES.items():
        tensors |= {theirs + n.removeprefix(ours): t for n, t in own.items() if n.startswith(ours)}
    tensors["mlm_layer.bias"] = tensors["mlm_layer.bias"].view(1, 1, -1)
    places, patch = o.grid**2 + 1, o.image_size // o.grid
    unused = {
        "cls_token": (1, 1, o.width), "pos_embed": (1, places, o.width), "mask_token": (1, 1, o.decoder_width),
        "patch_embed.proj.weight": (o.width, 3, patch, patch), "patch_embed.proj.bias": (o.width,),
        "decoder_pos_embed": (1, places, o.decoder_width), "decoder_pred.weight": (3 * patch**2, o.decoder_width),
        "decoder_pred.bias": (3 * patch**2,),
    }  # fmt: skip
    dtype = tensors["norm.weight"].dtype
    tensors |= {name: torch.zeros(shape, dtype=dtype) for name, shape in unused.items()}
    tensors["token_emb.position_ids"] = torch.arange(places)[None]
    torch.save({"model": {name: t.contiguous() for name, t in tensors.items()}}, folder / PUBLIC_FILE)
    return f"model.load_state_dict(torch.load(FOLDER + '/{PUBLIC_FILE}')['model'])"


def from_public(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by our names, of a checkpoint of LTH14/mage. The tokenizer is in it under `vqgan.`, or comes from
    model.first_stage."""
    if any(name.startswith("encoder.") for name in tensors):
        return tensors
    vqgan = {n.removeprefix("vqgan."): t for n, t in tensors.items() if n.startswith("vqgan.")}
    ours = tokenizer.from_public(vqgan)
    for name, tensor in tensors.items():
        prefix = next((p for p in MAGE_NAMES if name.startswith(p)), None)
        if prefix is not None:
            tensor = tensor.flatten() if name == "mlm_layer.bias" else tensor
            ours |= {replacement + name.removeprefix(prefix): tensor for replacement in MAGE_NAMES[prefix]}
        elif not name.startswith(("vqgan.", *UNUSED_NAMES)):
            ours[name] = tensor  # unknown: kept, so that filling the model reports it as unexpected
    return ours
