"""Images in memory: CIFAR-10 from the official archives, scikit-learn's digits, and synthetic ones; and their batches.

Everything stays uint8 until a batch is made; flips, crops and normalisation act on whole batches, and every random
number of an epoch follows from (seed, epoch). No worker processes. Imports ops.py for the batches, files.py.
"""

import copy
import hashlib
import io
import pickle
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..extras import needs
from ..files import save_atomically
from ..ops import batch_

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the CIFAR-10 recipe uses
NEVER = 2**32 - 1  # an epoch for draws that are not an epoch's own
PADDING = 4  # random crops of 32 out of 40


@dataclass
class Images:
    """A training and a test set.

    Attributes:
        train, test: uint8 [n, 3, 32, 32].
        train_labels, test_labels: int64 [n].
        flip: whether a mirrored image still shows its class.
        mean, std: of each channel, for pixels in [0, 1].
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    flip: bool
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def fingerprint(self) -> str:
        """A digest of all images and labels, so that a run is only resumed on the data it began with."""
        digest = hashlib.sha256()
        for tensor in (self.train, self.train_labels, self.test, self.test_labels):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def tested(self, count: int, validate: bool) -> int:
        """How many images there are to test on where `count` training images are `drawn`.

        Raises:
            ValueError: as there.
        """
        total = len(self.train)
        if count > total - validate:
            raise ValueError(
                f"train_images must be at most {total - validate}{' to leave some to validate on' * validate}, got {count}"
            )
        return min(total - count, len(self.test)) if validate else len(self.test)

    def drawn(self, count: int, seed: int, validate: bool = False) -> "Images":
        """`count` of the training images, drawn by `seed`. With `validate` as many others as there are test images, or all
        that are left, stand in for these.

        Raises:
            ValueError: there are fewer, or none are left to validate on.
        """
        tested = self.tested(count, validate)
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(mixed(seed)), device="cpu")
        own = replace(self, train=self.train[order[:count]], train_labels=self.train_labels[order[:count]])
        if validate:
            others = order[count : count + tested]
            own.test, own.test_labels = self.train[others], self.train_labels[others]
        return own


def load(dataset: str, data_dir: Path = Path("data"), download: bool = False) -> Images:
    """The images of "digits", "cifar10" or "synthetic"; see each function below.

    Raises:
        ValueError: an unknown dataset, or a file that is truncated or altered (the message names it).
        FileNotFoundError: CIFAR-10 is not in data_dir and download is off.
    """
    if dataset == "digits":
        return digits()
    if dataset == "synthetic":
        return synthetic()
    if dataset == "cifar10":
        return cifar10(data_dir, download)
    raise ValueError(f"dataset must be one of digits, cifar10, synthetic, got {dataset!r}")


def digits() -> Images:
    """scikit-learn's 1,797 scanned digits (8×8, 17 grey levels), shown as 32×32; a fixed fifth is the test set."""
    with needs("train"):
        from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float()[:, None] / 16
    images = F.interpolate(grey, size=32, mode="bilinear", align_corners=False)
    images = (images * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0), device="cpu")
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    mean, std = (images[train] / 255).mean().item(), (images[train] / 255).std().item()
    return Images(images[train], labels[train], images[test], labels[test], False, (mean,) * 3, (std,) * 3)


def synthetic(train: int = 512, test: int = 256, classes: int = 10) -> Images:
    """One random coarse pattern per class under noise: learnable, made in a moment, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.rand(classes, 3, 4, 4, generator=generator, device="cpu"), size=32)
    labels = torch.randint(classes, (train + test,), generator=generator, device="cpu")
    noise = torch.rand(train + test, 3, 32, 32, generator=generator, device="cpu")
    images = ((0.6 * patterns[labels] + 0.4 * noise) * 255).to(torch.uint8)
    return Images(images[:train], labels[:train], images[train:], labels[train:], True)


# ---------------------------------------------------------------------------------------------------------- CIFAR-10

_URL = "https://www.cs.toronto.edu/~kriz/"
_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_PER_FILE, _RECORD = 10_000, 1 + 3 * 32 * 32
_ARCHIVES = {  # archive: (SHA-256, folder inside)
    "cifar-10-binary.tar.gz": (
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        "cifar-10-batches-bin",
    ),
    "cifar-10-python.tar.gz": (
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        "cifar-10-batches-py",
    ),
}


def cifar10(data_dir: Path, download: bool = False) -> Images:
    """CIFAR-10 from data_dir: an unpacked folder or an archive, in the binary or the Python layout.

    Archives are checked against the official SHA-256 and read without unpacking. Unpacked files are checked for their
    size and content, not for their checksum, so that re-encoded copies in the same layout can be used.
    """
    data_dir = Path(data_dir)
    for archive, (_, folder) in _ARCHIVES.items():
        for place in (data_dir / folder, data_dir):
            suffix = ".bin" if folder.endswith("bin") else ""
            if any((place / f"{name}{suffix}").exists() for name in _FILES):
                return _assemble({name: _read(place / f"{name}{suffix}") for name in _FILES}, str(place), suffix)
        if (data_dir / archive).exists():
            return _from_archive(data_dir / archive)
    archive = next(iter(_ARCHIVES))
    if not download:
        folders = " or ".join(folder for _, folder in _ARCHIVES.values())
        raise FileNotFoundError(
            f"CIFAR-10 is not in {data_dir}: neither {folders}, nor {' or '.join(_ARCHIVES)}; hta-train --download fetches it"
        )
    fetch(_URL + archive, data_dir / archive, _ARCHIVES[archive][0])
    return _from_archive(data_dir / archive, checked=True)


def fetch(url: str, path: Path, sha256: str) -> None:
    """Downloads url to path with a progress bar; the file appears under its name only once its checksum is right."""
    with needs("train"):
        from tqdm import tqdm

    def download(partial: Path) -> None:
        digest = hashlib.sha256()
        with urllib.request.urlopen(url, timeout=60) as response, open(partial, "wb") as out:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while block := response.read(1 << 20):
                    out.write(block)
                    digest.update(block)
                    bar.update(len(block))
        if digest.hexdigest() != sha256:
            raise ValueError(f"{url} has SHA-256 {digest.hexdigest()}, expected {sha256}: truncated or altered")

    path.parent.mkdir(parents=True, exist_ok=True)
    save_atomically(path, download)


def _from_archive(path: Path, checked: bool = False) -> Images:
    sha256, folder = _ARCHIVES[path.name]
    blob = path.read_bytes()
    if not checked and hashlib.sha256(blob).hexdigest() != sha256:
        raise ValueError(
            f"{path} has SHA-256 {hashlib.sha256(blob).hexdigest()}, expected {sha256}: truncated or altered"
        )
    suffix = ".bin" if folder.endswith("bin") else ""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(blob)) as archive:
        for name in _FILES:
            member = archive.extractfile(f"{folder}/{name}{suffix}")
            assert member is not None  # the checksum vouches for it
            files[name] = member.read()
    return _assemble(files, str(path), suffix)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None


def _assemble(files: dict[str, bytes], place: str, suffix: str) -> Images:
    decode = _decode_binary if suffix else _decode_pickle
    parts = {name: decode(blob, f"{place}/{name}{suffix}") for name, blob in files.items()}
    for name, (_, labels) in parts.items():
        if labels.max() > 9:
            file = f"{place}/{name}{suffix}"
            raise ValueError(f"{file} is altered: it holds label {labels.max()}, and CIFAR-10 has 0 to 9")
    train, test = [parts[name] for name in _FILES[:-1]], [parts[_FILES[-1]]]

    def joined(split: list[tuple[np.ndarray, np.ndarray]], index: int) -> Tensor:
        return torch.from_numpy(np.concatenate([part[index] for part in split]))

    return Images(joined(train, 0), joined(train, 1).long(), joined(test, 0), joined(test, 1).long(), flip=True)


def _decode_binary(blob: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of 1 label byte and 3072 pixel bytes: red, green and blue planes of 32×32."""
    if len(blob) != _PER_FILE * _RECORD:
        raise ValueError(f"{name} has {len(blob)} bytes, expected {_PER_FILE * _RECORD}: truncated or altered")
    records = np.frombuffer(blob, np.uint8).reshape(_PER_FILE, _RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


class _ArraysOnly(pickle.Unpickler):
    """Builds arrays and plain containers, and refuses to import anything else: nothing in the file is run."""

    def find_class(self, module: str, name: str):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _encode(text: str, encoding: str) -> bytes:
    return text.encode(encoding)


def _decode_pickle(blob: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(blob), encoding="bytes").load()
        data, labels = batch[b"data"], np.asarray(batch[b"labels"])
        if data.shape != (_PER_FILE, _RECORD - 1) or data.dtype != np.uint8 or labels.shape != (_PER_FILE,):
            raise ValueError(f"data is {data.dtype} {data.shape}, labels are {labels.shape}")
        if labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError("labels are not numbers from 0")
    except Exception as error:
        raise ValueError(f"{name} is truncated or altered: {error}") from None
    return data.reshape(-1, 3, 32, 32), labels


# ------------------------------------------------------------------------------------------------------------ batches


def mixed(*numbers: int) -> int:
    """A seed for a stream of its own for each tuple of as many numbers: 32 bits, which is all that torch's generator on the CPU
    takes of a seed. Zeros at its end change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Batches:
    """Turns uint8 images, held on the device, into augmented and normalised batches; on a GPU in one kernel each.

    One epoch is under way at a time. Its order, crops and mirrorings are drawn on the CPU, the same on every machine,
    and go to the device when it begins; nothing does after that.

    Args:
        images: the data.
        batch_size: of training batches; the last, smaller one of an epoch is kept.
        seed: every random number of epoch e of copy j follows from (seed, e, j).
        device, memory_format, dtype: of the batches.
        flip: "random" mirrors half of an epoch's images; "alternating" each image in every other epoch, from one that
            follows from the seed alone, and in odd-numbered copies in the epochs in which even-numbered ones do not.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        dtype: torch.dtype = torch.float32,
        flip: str = "random",
    ):
        self.images, self.batch_size, self.seed, self.copy = images, batch_size, seed, 0
        self.memory_format, self.dtype, self.flip = memory_format, dtype, flip
        self.data = {
            "train": (images.train.to(device), images.train_labels.to(device)),
            "test": (images.test.to(device), images.test_labels.to(device)),
        }
        scale = torch.tensor(images.std, device="cpu") * 255
        self._scale = (1 / scale).to(device)
        self._shift = (-torch.tensor(images.mean, device="cpu") * 255 / scale).to(device)
        self._arrange(device)

    def _arrange(self, device: torch.device | str) -> None:
        """Room for the epoch under way, at addresses that stay: a captured CUDA graph reads them."""
        count = len(self.images.train)
        self._order = torch.zeros(count, dtype=torch.int64, device=device)
        self._offsets = torch.zeros(2, count, dtype=torch.int64, device=device)
        self._mirrored = torch.zeros(count, dtype=torch.bool, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)

    def of_copy(self, number: int) -> "Batches":
        """The same images in an order, with crops and mirrorings, of copy number `number`'s own; 0 is this one."""
        if number == 0:
            return self
        other = copy.copy(self)
        other.copy = number
        other._arrange(self._position.device)
        return other

    def __len__(self) -> int:
        return -(-len(self.images.train) // self.batch_size)

    def size(self, batch: int) -> int:
        """The images in batch number `batch` of an epoch."""
        return min(self.batch_size, len(self.images.train) - batch * self.batch_size)

    def begin(self, epoch: int, start: int = 0) -> None:
        """Makes batch number `start` of an epoch the next one."""
        count = len(self.images.train)
        generator = torch.Generator().manual_seed(mixed(self.seed, epoch, self.copy))
        order = torch.randperm(count, generator=generator, device="cpu")
        self._order.copy_(order)
        self._offsets.copy_(torch.randint(2 * PADDING + 1, (2, count), generator=generator, device="cpu"))
        mirrored = torch.rand(count, generator=generator, device="cpu") < (0.5 if self.images.flip else 0.0)
        if self.flip == "alternating" and self.images.flip:
            generator.manual_seed(mixed(self.seed, NEVER))
            first = torch.rand(count, generator=generator, device="cpu") < 0.5
            mirrored = first[order] ^ bool((epoch + self.copy) % 2)
        self._mirrored.copy_(mirrored)
        self._position.fill_(start * self.batch_size)

    def next(self, size: int) -> tuple[Tensor, Tensor]:
        """The next `size` images of the epoch, shuffled, cropped and mirrored; int64 labels."""
        x, y = self.data["train"]
        images = torch.empty((size, *x.shape[1:]), dtype=self.dtype, device=x.device, memory_format=self.memory_format)
        labels = torch.empty(size, dtype=y.dtype, device=y.device)
        arrangement = self._order, self._offsets, self._mirrored, self._scale, self._shift, self._position
        batch_(images, labels, x, y, *arrangement, PADDING)
        self._position += size
        return images, labels

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches of an epoch, from number `start` on."""
        self.begin(epoch, start)
        for batch in range(start, len(self)):
            yield self.next(self.size(batch))

    def unaugmented(self, split: str, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """The images of "train" or "test" in order, normalised and no more."""
        x, y = self.data[split]
        for images, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            yield self.normalise(images), labels

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 to mean 0 and deviation 1, in the dtype and the memory format."""
        scale, shift = self._scale.view(1, -1, 1, 1), self._shift.view(1, -1, 1, 1)
        return torch.addcmul(shift, images.to(torch.float32, memory_format=self.memory_format), scale).to(self.dtype)
