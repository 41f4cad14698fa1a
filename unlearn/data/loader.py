"""Read ahead, decode, cache, hand out micro-batches.

Threads, not processes: the decoder releases the GIL. The loader has no state of its own: a micro-batch is a pure
function of its number, so going on after a stop is starting at another number.
"""

import io
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
import torch
from PIL import Image

from unlearn import config, views
from unlearn.data import order, selection, shards
from unlearn.data.selection import RowSet
from unlearn.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch. images: (B, 3, S, S) uint8, or (B, ...) latents, from the loader; on the device what the encoder takes.
    Rows [:retain] are the retain set's, the others the forget set's. seed: of everything random in this micro-batch.
    weight: of its loss in the step; 0 where it only keeps its worker in step with the others."""

    images: torch.Tensor
    view: views.View
    retain: int
    seed: int
    weight: float = 1.0

    def pin(self) -> "Batch":
        return replace(self, images=self.images.pin_memory(), view=self.view.pin())


def decode(data: memoryview | bytes) -> np.ndarray:
    """(H, W, 3) uint8 of an encoded image. Raises ValueError, OSError on damage."""
    if bytes(data[:2]) == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg(data, "RGB")
        except ValueError:
            pass  # rare colour spaces that only PIL converts; real damage fails there too
    try:
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    except (SyntaxError, Image.DecompressionBombError) as e:  # PIL's words for some broken PNGs, and for absurd sizes
        raise ValueError(str(e)) from None


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """(size, size, 3): the shorter side scaled to `size` (bicubic), the middle cut out."""
    height, width = image.shape[:2]
    if height == width == size:
        return image
    scale = size / min(height, width)
    wide, high = max(round(width * scale), size), max(round(height * scale), size)
    scaled = Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC)
    left, top = (wide - size) // 2, (high - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))


def crop_flip(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size, 3): a crop of 0.2 to 1 of the area, aspect 3/4 to 4/3, scaled; flipped half of the time."""
    height, width = image.shape[:2]
    area = height * width * rng.uniform(0.2, 1)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    w = min(max(round((area * aspect) ** 0.5), 1), width)
    h = min(max(round((area / aspect) ** 0.5), 1), height)
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    scaled = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return np.asarray(scaled)[:, ::-1] if rng.random() < 0.5 else np.asarray(scaled)


class Images:
    """Random access to the images of one RowSet, cached as the config says."""

    def __init__(self, rows: RowSet, data: config.Data):
        self.set, self.data = rows, data
        self.bad: dict[int, str] = {}
        self._cache: dict[int, memoryview | np.ndarray] = {}
        self._tables: OrderedDict[int, list[memoryview]] = OrderedDict()
        self._locks = [threading.Lock() for _ in rows.manifest.groups]
        self._lock = threading.Lock()

    def __getitem__(self, row: int) -> np.ndarray:
        """The decoded image of a row. Raises ValueError, OSError on damage."""
        found = self._cache.get(row)
        found = self._encoded(row) if found is None else found
        if isinstance(found, np.ndarray):  # another thread may have decoded it meanwhile
            return found
        image = decode(found)
        if self.data.cache == "decoded":
            self._cache[row] = image
        return image

    def sound(self, row: int) -> np.ndarray:
        """The decoded image of a row, or of the row that stands in for it where it is damaged."""
        while True:
            try:
                return self[row]
            except (ValueError, OSError) as e:
                row = self.skip(row, e)

    def _encoded(self, row: int) -> memoryview | np.ndarray:
        """What the cache holds of a row, else its bytes as they are stored."""
        group = int(np.searchsorted(self.set.manifest.starts, row, side="right") - 1)
        with self._locks[group]:  # two threads that want one row group read it once
            if self.data.cache != "none" and row in self._cache:
                return self._cache[row]
            views = self._tables.get(group)  # a thread that holds another row group's lock may drop it any time
            if views is None:
                views = list(shards.images(self.set.manifest.read(group, ["image"])))
                if self.data.cache != "none":
                    return self._keep(group, views, row)
                self._remember(group, views)
            return views[row - int(self.set.manifest.starts[group])]

    def _keep(self, group: int, views: list[memoryview], row: int) -> memoryview:
        """Copy the chosen rows of a row group into the cache, so that it is never read again."""
        first = int(self.set.manifest.starts[group])
        low, high = np.searchsorted(self.set.rows, (first, first + len(views)))
        for other in self.set.rows[low:high].tolist():
            self._cache.setdefault(other, memoryview(bytes(views[other - first])))
        return memoryview(bytes(views[row - first]))

    def _remember(self, group: int, views: list[memoryview]) -> None:
        """Keep the latest row groups: as many rows as two shuffle windows hold."""
        with self._lock:
            self._tables[group] = views
            while len(self._tables) > 2 and sum(map(len, self._tables.values())) > 2 * self.data.shuffle_rows:
                self._tables.popitem(last=False)

    def skip(self, row: int, error: Exception) -> int:
        """Count a damaged image; the row that stands in for it. Raises DataError past the limit."""
        with self._lock:
            if row not in self.bad:
                self.bad[row] = selection.name_row(self.set.manifest, row)
            if len(self.bad) > self.data.max_bad_images or len(self.bad) == len(self.set):
                names = ", ".join(list(self.bad.values())[:5])
                raise DataError(
                    f"{len(self.bad)} image(s) of {self.set.manifest.uri} do not decode: {names} ({str(error)[:80]}). "
                    f"Mend them, or raise data.max_bad_images (now {self.data.max_bad_images})"
                )
        return int(self.set.rows[(np.searchsorted(self.set.rows, row) + 1) % len(self.set)])


class Loader:
    """Micro-batches by number. grid, size: of the model; sets: {"retain": ..., "forget": ...}; latents: of each set, where
    the batches are to hold them in place of pixels."""

    def __init__(self, run: config.RunConfig, sets: dict[str, RowSet], grid: int, size: int, latents: dict | None = None):
        self.run, self.grid, self.size = run, grid, size
        fraction = run.training.forget_fraction if "forget" in sets else 0
        self.retain, self.forget = order.split(run.micro_batch, fraction)
        self.images = {name: latents[name].images if latents else Images(rows, run.data) for name, rows in sets.items()}
        self.latents = latents
        self.streams = {
            name: order.Stream(rows.rows, rows.groups, run.seed, number, run.data.shuffle_rows)
            for number, (name, rows) in enumerate(sorted(sets.items()))
        }

    @property
    def bad_images(self) -> dict[str, list[str]]:
        """Ids of the damaged images of each set that this worker has met so far."""
        return {name: sorted(images.bad.values()) for name, images in self.images.items() if images.bad}

    def batch(self, number: int) -> Batch:
        """Micro-batch `number`, computed in the calling thread."""
        rng = order.generator(self.run.seed, 1 << 20, number)
        if self.latents:
            return self._cached(number, rng)
        view = views.draw(self.run.train_views, self.grid, self.retain + self.forget, rng)
        pixels = np.empty((self.retain + self.forget, self.size, self.size, 3), np.uint8)
        place = 0
        for name, count in (("retain", self.retain), ("forget", self.forget)):
            for row in self.streams[name].take(number * count, count).tolist() if count else ():
                pixels[place] = self._image(name, row, rng)
                place += 1
        # The channels stay last in memory, as decoders give them: no pixel is moved once more.
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        return Batch(images, view, self.retain, int(rng.integers(1 << 62)))

    def _cached(self, number: int, rng: np.random.Generator) -> Batch:
        which = int(rng.integers(self.run.data.latent_views))
        rows = [(name, row) for name, count in (("retain", self.retain), ("forget", self.forget)) if count
                for row in self.streams[name].take(number * count, count).tolist()]  # fmt: skip
        latents = torch.stack([self.latents[name](row, which) for name, row in rows])
        view = views.repeated(next(iter(self.latents.values())).views[which], len(rows))
        return Batch(latents, view, self.retain, int(rng.integers(1 << 62)))

    def _image(self, name: str, row: int, rng: np.random.Generator) -> np.ndarray:
        image = self.images[name].sound(row)
        if self.run.data.augment == "crop_flip":
            return crop_flip(image, self.size, rng)
        return fit(image, self.size)

    def batches(self, numbers: Iterable[int], pin: bool = False) -> Iterator[Batch]:
        """The micro-batches of these numbers in turn, the next ones made in threads meanwhile."""
        make = (lambda n: self.batch(n).pin()) if pin else self.batch
        with ThreadPoolExecutor(self.run.data.decode_threads, thread_name_prefix="decode") as pool:
            ahead: deque = deque()
            try:
                for number in numbers:
                    ahead.append(pool.submit(make, number))
                    if len(ahead) > self.run.data.read_ahead:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()
