"""The commands that list what there is, and write a model for other libraries: `unlearn models`, `methods`, `convert`."""

from typing import Annotated

import typer


def models():
    """List the model families and their named shapes, with the parameters of their parts."""
    from rich.table import Table

    from unlearn.cli.console import out
    from unlearn.models import base
    from unlearn.registry import MODELS

    table = Table("family", "variant", "image", "encoder", "decoder", "first stage", box=None)
    for family in MODELS:
        for variant in base.adapter(family).variants:
            model = base.shape(family, variant)
            parts = (model.encoder, model.decoder, model.first_stage)
            counts = (sum(p.numel() for p in part.parameters()) / 1e6 if part is not None else 0 for part in parts)
            table.add_row(family, variant, f"{model.options.image_size} px", *(f"{n:,.1f} M" if n else "-" for n in counts))
    out.print(table)


def methods():
    """List the methods, and the options of each: keys of `method` in a configuration."""
    from rich.table import Table

    from unlearn.cli.console import out
    from unlearn.methods.base import method_class
    from unlearn.registry import METHODS

    table = Table("method", "option", "default", "what it does", box=None)
    for name in METHODS:
        method = method_class(name)
        table.add_row(name, "", "", (method.__doc__ or "").strip().splitlines()[0])
        for option, field in method.Options.model_fields.items():
            if option != "name":
                table.add_row("", option, str(field.get_default(call_default_factory=True)), field.description or "")
    out.print(table)


def convert(
    model: Annotated[str, typer.Argument(help="weights: the folder `model` of a run, or a public checkpoint")],
    dest: Annotated[str, typer.Argument(help="a new folder, or s3://bucket/prefix")],
    family: Annotated[str | None, typer.Option(help="the family, where the weights do not say it")] = None,
    variant: Annotated[str | None, typer.Option(help="the named shape, where the weights do not say it")] = None,
):
    """Write a model as other libraries read it: a folder of diffusers (diffusion, mage) or transformers (mae).

    Example: `unlearn convert runs/half/model half-diffusers`
    """
    from unlearn.cli.console import out
    from unlearn.config import Model
    from unlearn.models import weights

    weights.convert(Model(family=family or weights.family(model), variant=variant, weights=model), dest)
    out.print(f"written: {dest}", soft_wrap=True)
