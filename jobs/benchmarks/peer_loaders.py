"""The loaders that people use, each with its usual decode and resize or with ours: what jobs.benchmarks.peers measures.

A function each: (folder of the images, what turns an encoded image into pixels) -> a function that gives the batches
of an epoch.
"""

# The peers are no dependencies.
# pyright: reportMissingImports=false

import functools
import io
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unlearn.data.decode import decode
from unlearn.data.scaling import fit

WORKERS, BATCH = 2, 64
Epochs = Callable[[], Iterable[Any]]  # batches of one epoch, whose length is the number of images


class Ours:
    """Our decode and resize. A class, so that processes that are spawned can be sent it."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, data: bytes) -> torch.Tensor:
        return torch.from_numpy(fit(decode(data), self.size)).permute(2, 0, 1)


class Usual:
    """What the examples of most loaders do: PIL, and torchvision's transforms."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.of_image(_pil(data))

    def of_image(self, image: Any) -> torch.Tensor:
        return _transform(self.size)(image.convert("RGB"))


@functools.cache
def _transform(size: int) -> Callable[[Any], torch.Tensor]:
    from unlearn import torchvision_cpu  # noqa: F401  before torchvision, in each process

    from torchvision import transforms  # isort: skip

    steps = [transforms.Resize(size, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, transforms.PILToTensor()])


To = Ours | Usual


def _pil(data: bytes):
    from PIL import Image

    return Image.open(io.BytesIO(data))


def one_thread(_: int = 0) -> None:
    torch.set_num_threads(1)


def _in_processes(dataset: Any) -> Epochs:
    """Epochs of torch's DataLoader, whose processes stay."""
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, num_workers=WORKERS, persistent_workers=True, worker_init_fn=one_thread
    )
    return lambda: loader


def webdataset(folder: Path, to: To) -> Epochs:
    import webdataset as wds

    pattern = str(folder / "tar" / f"{{000..{WORKERS - 1:03d}}}.tar")
    data = wds.WebDataset(pattern, shardshuffle=False, empty_check=False)
    if isinstance(to, Usual):
        return _in_processes(data.decode("pil").to_tuple("jpg").map_tuple(to.of_image).map(_first))
    return _in_processes(data.to_tuple("jpg").map_tuple(to).map(_first))


def _first(sample: tuple) -> torch.Tensor:
    return sample[0]


def streaming(folder: Path, to: To) -> Epochs:
    from unlearn import torchvision_cpu  # noqa: F401  before what imports torchvision

    from streaming import StreamingDataset  # isort: skip

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> torch.Tensor:
            return to(super().__getitem__(index)["image"])

    return _in_processes(Images(local=str(folder / "mds"), shuffle=False, batch_size=BATCH))


def ray(folder: Path, to: To) -> Epochs:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray.data

    if not ray.is_initialized():
        ray.init(
            address="local", num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.enable_operator_progress_bars = False

    def decoded(batch: Any) -> dict:
        one_thread()
        return {"image": np.stack([to(data).numpy() for data in batch["image"]])}

    def epoch() -> Iterator[Any]:
        data = ray.data.read_parquet(str(folder / "parquet")).map_batches(decoded, batch_size=BATCH)
        yield from (batch["image"] for batch in data.iter_batches(batch_size=BATCH))

    ray.data.range(WORKERS * 4).map_batches(
        lambda batch: (one_thread(), batch)[1]
    ).materialize()  # processes that then stay
    return epoch


def datasets(folder: Path, to: To) -> Epochs:
    from datasets import Image, load_dataset

    files = [str(path) for path in sorted((folder / "parquet").glob("*.parquet"))]
    data: Any = load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "huggingface"))
    data = data.cast_column("image", Image(decode=isinstance(to, Usual)))

    def transformed(rows: dict) -> dict:
        return {"image": [to.of_image(i) if isinstance(to, Usual) else to(i["bytes"]) for i in rows["image"]]}

    epochs = _in_processes(data.with_transform(transformed))
    return lambda: (batch["image"] for batch in epochs())


def spdl(folder: Path, to: To) -> Epochs:
    import spdl.io
    from spdl.pipeline import PipelineBuilder

    def by_ffmpeg(data: bytes) -> torch.Tensor:
        scale = f"scale=w={to.size}:h={to.size}:flags=bicubic:force_original_aspect_ratio=increase"
        wanted = f"{scale},crop={to.size}:{to.size},format=pix_fmts=rgb24"
        buffer = spdl.io.load_image(data, filter_desc=wanted)
        return spdl.io.to_torch(buffer).permute(2, 0, 1)

    def epoch() -> Iterator[torch.Tensor]:
        pipe = to if isinstance(to, Ours) else by_ffmpeg
        builder = PipelineBuilder().add_source(encoded(folder)).pipe(pipe, concurrency=WORKERS).aggregate(BATCH)
        pipeline = builder.pipe(torch.stack).add_sink(3).build(num_threads=WORKERS)
        with pipeline.auto_stop():
            yield from pipeline

    return epoch


def pyarrow(folder: Path, to: To) -> Epochs:
    class Images(torch.utils.data.IterableDataset):
        def __iter__(self) -> Iterator[torch.Tensor]:
            worker = torch.utils.data.get_worker_info()
            return map(to, encoded(folder, worker.id if worker else 0, WORKERS))

    return _in_processes(Images())


def encoded(folder: Path, part: int = 0, parts: int = 1) -> Iterator[bytes]:
    """The images of every `parts`-th row group of the Parquet files."""
    import pyarrow.parquet as pq

    files = [pq.ParquetFile(path) for path in sorted((folder / "parquet").glob("*.parquet"))]
    groups = [(file, group) for file in files for group in range(file.num_row_groups)]
    for file, group in groups[part::parts]:
        for value in file.read_row_group(group, ["image"])["image"]:
            yield value.as_buffer().to_pybytes()


PEERS = {each.__name__: each for each in (webdataset, streaming, ray, datasets, spdl, pyarrow)}
