"""The commands on shards: `unlearn shards build`, `index`, `verify`, `inspect`."""

from typing import Annotated, Literal

import typer

from unlearn.cli.options import Set, required

app = typer.Typer(no_args_is_help=True, help="Pack, index, check and describe Parquet shards of images.")


@app.command()
def build(
    src: Annotated[str, typer.Argument(help="a folder, tar or zip, here or s3://, of CLASS/FILE images")],
    dest: Annotated[str, typer.Argument(help="an empty folder, or s3://bucket/prefix")],
    split: Annotated[
        str | None, typer.Option(help="take only images below a folder of this name, as in train/CLASS/FILE")
    ] = None,
    shard_mib: Annotated[int, typer.Option(help="size of one shard")] = 256,
    rows_per_group: Annotated[int, typer.Option(help="images of one row group, the unit of reading")] = 256,
    layout: Annotated[
        Literal["folder", "imagenet", "places365", "webdataset"] | None,
        typer.Option(help="how images and classes are laid out; guessed where it is plain"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="text file of labels: NAME LABEL a line, or LABEL in the order of the names")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="text file with the names of labels 0, 1, ..., one a line")
    ] = None,
):
    """Pack images into shards; the encoded images are kept as they are.

    Example: `unlearn shards build ILSVRC2012_img_train.tar s3://bucket/imagenet`
    """
    from unlearn.cli.console import progress
    from unlearn.data import classes as class_lists
    from unlearn.data import packing

    names = class_lists.read(classes) if classes else None
    with progress("packing") as advance:
        packing.build(
            src,
            dest,
            split,
            rows_per_group,
            shard_mib << 20,
            lambda rows, total: advance(rows, total, "images"),
            layout,
            labels,
            names,
        )
    inspect(dest)


def pack(
    source: Annotated[str, typer.Argument(metavar="PACK.yaml", help="a YAML file (path or s3://)")],
    overrides: Set = [],  # noqa: B006  read only
):
    """Pack images into shards by many workers, scaled where it is wanted; goes on where it was stopped.

    Example: `unlearn pack pack.yaml --set size=256 --set cluster.workers=8`
    """
    from jobs import pack as job
    from jobs.owner import owned
    from unlearn.cli.console import progress
    from unlearn.data import pack_file

    required()
    found = pack_file.load(source, overrides)
    with owned(found.dest, "pack"), progress("packing") as advance:
        job.pack(found, lambda done, total: advance(done, total, "shards"))
    inspect(found.dest)


Split = Annotated[str | None, typer.Option(help="the split that is meant, where the folder holds files of several")]


@app.command()
def index(
    uri: Annotated[str, typer.Argument(help="folder of .parquet files with images and labels, or ids, or subjects")],
    split: Split = None,
    image_column: Annotated[str | None, typer.Option(help="column of the images, when not `image`")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="column of the labels, when not `label`; none: go without")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="column of the ids, when not `id`; none: go without")] = None,
    subject_column: Annotated[
        str | None, typer.Option(help="column of the subjects, when not `subject`; none: go without")
    ] = None,
    classes: Annotated[
        str | None, typer.Option(help="text file with the names of labels 0, 1, ..., one a line")
    ] = None,
):
    """Write the manifest of shards that exist already; nothing is converted. Stopped, it goes on when it is called
    again.

    Example: `unlearn shards index s3://bucket/cifar100 --split train --label-column fine_label`
    """
    from unlearn.cli.console import progress
    from unlearn.data import classes as class_lists
    from unlearn.data import shards

    columns = {"image": image_column, "label": label_column, "id": id_column, "subject": subject_column}
    given = {role: column for role, column in columns.items() if column is not None}
    names = class_lists.read(classes) if classes else None
    with progress("indexing") as advance:
        shards.index(uri, split, given, names, lambda done, total: advance(_mib(done), _mib(total), "MiB"))
    inspect(uri, split)


def _mib(size: int) -> int:
    """Bytes in whole MiB, upwards: nothing is done before its last byte."""
    return -(-size >> 20)


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(help="folder of shards")],
    threads: Annotated[int, typer.Option(help="decoding threads")] = 4,
    split: Split = None,
):
    """Check every checksum and decode every image; names what is damaged and exits with 2."""
    from unlearn.cli.console import out, progress
    from unlearn.data import checking, shards

    with progress("verifying") as advance:
        rows = checking.verify(uri, threads, lambda done, total: advance(done, total, "images"), split)
    checked = (
        "every checksum and every image is good"
        if shards.is_indexed(uri, split)
        else "every image is good; no manifest, so no checksums"
    )
    out.print(f"{uri}: {rows} images, {checked}", soft_wrap=True)


@app.command()
def inspect(uri: Annotated[str, typer.Argument(help="folder of shards")], split: Split = None):
    """Tell what shards hold: images, bytes, classes, columns."""
    from rich.table import Table

    from unlearn.cli.console import out
    from unlearn.data import checking

    about = checking.inspect(uri, split)
    table = Table("", "", box=None, show_header=False)
    for key, value in about.items():
        table.add_row(key, str(value))
    out.print(table)
