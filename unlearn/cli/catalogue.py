"""`unlearn models` and `methods`, which list what there is, and `convert`, which writes a model for other libraries."""

from typing import Annotated

import typer


def models(as_json: Annotated[bool, typer.Option("--json", help="print a JSON list, for programs")] = False):
    """List the model families and their named shapes, with the parameters of their parts."""
    import dataclasses
    import json

    from unlearn.models.catalogue import shapes

    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(shape) for shape in shapes()]))
        return
    from rich.table import Table

    from unlearn.cli.console import out

    table = Table("family", "variant", "image", "encoder", "decoder", "first stage", box=None)
    for shape in shapes():
        counts = (shape.encoder, shape.decoder, shape.first_stage)
        table.add_row(
            shape.family, shape.variant, f"{shape.image_size} px", *(f"{n / 1e6:,.1f} M" if n else "-" for n in counts)
        )
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
    option: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE of model.options, as image_size=256; may be repeated")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="type of the numbers: float32, float16, bfloat16; by default as the model was stored"),
    ] = None,
    ours: Annotated[bool, typer.Option("--ours", help="the other way: write a folder of ours, in float32")] = False,
):
    """Write a model as the library it comes from reads it: a folder of diffusers or transformers, a file of Palette,
    MAGE, MI-GAN.

    The line of Python that loads it there is printed. Example: `unlearn convert runs/half/model half-diffusers`
    """
    from unlearn.cli.console import out
    from unlearn.config import Model, override
    from unlearn.errors import ConfigError
    from unlearn.models import weights

    if dtype is not None and dtype not in weights.FLOATS:
        raise ConfigError(f"--dtype {dtype}: give one of {', '.join(weights.FLOATS)}")
    if wrong := next((item for item in option or [] if "=" not in item), None):
        raise ConfigError(f"--option {wrong}: write it as key=value, for example --option image_size=256")
    options = override({}, option or [])
    source = Model(family=family or weights.family(model), variant=variant, weights=model, options=options)
    if ours:
        weights.adopt(source, dest)
        out.print(f"written: {dest}", soft_wrap=True)
        return
    line = weights.convert(source, dest, dtype)
    out.print(f"written: {dest}", soft_wrap=True)
    out.print(f"loads with: {line}", soft_wrap=True, highlight=False, markup=False)
