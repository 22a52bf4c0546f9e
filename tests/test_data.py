"""Data: CIFAR-10 in every official form, damaged files, batches that follow from their seed."""

import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

from hta_fused import ops
from hta_fused.train import data

RECORDS = 20


@pytest.fixture
def small_files(monkeypatch):
    """CIFAR-10's layout with 20 images a file in place of 10,000."""
    monkeypatch.setattr(data, "_PER_FILE", RECORDS)
    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    return {
        name: (rng.integers(0, 256, (RECORDS, 3072), np.uint8), rng.integers(0, 10, RECORDS)) for name in data._FILES
    }


def binary(pixels, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), pixels], 1).tobytes()


def python2_pickle(pixels, labels):
    return pickle.dumps({b"batch_label": b"x", b"labels": [int(v) for v in labels], b"data": pixels}, protocol=2)


LAYOUTS = {"binary": ("cifar-10-batches-bin", ".bin", binary), "python": ("cifar-10-batches-py", "", python2_pickle)}


def write(folder, files, layout):
    name, suffix, encode = LAYOUTS[layout]
    (folder / name).mkdir(parents=True)
    for file, content in files.items():
        (folder / name / f"{file}{suffix}").write_bytes(encode(*content))
    return folder / name


def archive_bytes(files, layout):
    name, suffix, encode = LAYOUTS[layout]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for file, content in files.items():
            blob = encode(*content)
            info = tarfile.TarInfo(f"{name}/{file}{suffix}")
            info.size = len(blob)
            tar.addfile(info, io.BytesIO(blob))
    return out.getvalue()


def check(images, files):
    pixels = np.concatenate([files[f"data_batch_{i}"][0] for i in range(1, 6)])
    labels = np.concatenate([files[f"data_batch_{i}"][1] for i in range(1, 6)])
    assert torch.equal(images.train, torch.from_numpy(pixels).view(-1, 3, 32, 32))
    assert torch.equal(images.train_labels, torch.from_numpy(labels))
    assert torch.equal(images.test, torch.from_numpy(files["test_batch"][0]).view(-1, 3, 32, 32))
    assert images.train.dtype == torch.uint8


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unpacked_folders(tmp_path, small_files, layout):
    write(tmp_path, small_files, layout)
    check(data.cifar10(tmp_path), small_files)
    check(data.cifar10(tmp_path / LAYOUTS[layout][0]), small_files)  # the folder itself will do


@pytest.mark.parametrize("layout", LAYOUTS)
def test_archives_and_their_checksum(tmp_path, small_files, layout, monkeypatch):
    blob = archive_bytes(small_files, layout)
    name = f"cifar-10-{layout}.tar.gz"
    (tmp_path / name).write_bytes(blob)
    with pytest.raises(ValueError, match=f"{name} has SHA-256 .*truncated or altered"):
        data.cifar10(tmp_path)
    monkeypatch.setitem(data._ARCHIVES, name, (hashlib.sha256(blob).hexdigest(), LAYOUTS[layout][0]))
    check(data.cifar10(tmp_path), small_files)


def test_download_is_checked_and_never_left_half_written(tmp_path, small_files, monkeypatch):
    blob = archive_bytes(small_files, "binary")
    server = tmp_path / "server"
    server.mkdir()
    (server / "cifar-10-binary.tar.gz").write_bytes(blob)
    monkeypatch.setattr(data, "_URL", server.as_uri() + "/")
    here = tmp_path / "data"
    with pytest.raises(ValueError, match="truncated or altered"):
        data.cifar10(here, download=True)
    assert list(here.iterdir()) == []
    monkeypatch.setitem(
        data._ARCHIVES, "cifar-10-binary.tar.gz", (hashlib.sha256(blob).hexdigest(), "cifar-10-batches-bin")
    )
    check(data.cifar10(here, download=True), small_files)
    assert [p.name for p in here.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_missing_files_are_named(tmp_path, small_files):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*--download"):
        data.cifar10(tmp_path)
    folder = write(tmp_path, small_files, "binary")
    (folder / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin is missing"):
        data.cifar10(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_truncated_and_altered_files_are_named(tmp_path, small_files, layout):
    folder = write(tmp_path, small_files, layout)
    file = folder / f"data_batch_2{LAYOUTS[layout][1]}"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"data_batch_2.* truncated or altered"):
        data.cifar10(tmp_path)
    pixels, labels = small_files["data_batch_2"]
    file.write_bytes(LAYOUTS[layout][2](pixels, labels + 200))
    with pytest.raises(ValueError, match="data_batch_2.*altered"):
        data.cifar10(tmp_path)


class Bomb:
    def __reduce__(self):
        return (open, ("/tmp/should-not-exist", "w"))


def test_pickles_are_read_without_running_them(tmp_path, small_files):
    folder = write(tmp_path, small_files, "python")
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Bomb(), b"labels": []}, protocol=2))
    with pytest.raises(ValueError, match=r"test_batch is truncated or altered: it asks for \S*open"):
        data.cifar10(tmp_path)


def test_digits_are_the_real_ones():
    images = data.load("digits")
    assert len(images.train) + len(images.test) == 1797
    assert images.train.shape[1:] == (3, 32, 32)
    assert images.train.dtype == torch.uint8
    assert set(images.test_labels.tolist()) == set(range(10))
    assert not images.flip
    seen = {image.numpy().tobytes() for image in images.train}
    assert sum(image.numpy().tobytes() in seen for image in images.test) <= 1


def test_unknown_dataset():
    with pytest.raises(ValueError, match="dataset must be one of digits, cifar10, synthetic, got 'mnist'"):
        data.load("mnist")


def test_batches_follow_from_seed_and_epoch():
    images = data.synthetic(100, 20)
    batches = data.Batches(images, 32, seed=3)
    first, again, later = (list(batches.epoch(e)) for e in (1, 1, 2))
    assert len(first) == len(batches) == 4
    assert [len(y) for _, y in first] == [32, 32, 32, 4]
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(first[0][1], later[0][1])
    tail = list(batches.epoch(1, start=2))
    assert torch.equal(tail[0][0], first[2][0])
    assert sorted(torch.cat([y for _, y in first]).tolist()) == sorted(images.train_labels.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_batch_is_shuffled_cropped_mirrored_and_normalised(backend, layout, dtype):
    if backend == "cpu" and dtype == torch.bfloat16:
        pytest.skip("on the CPU batches are float32")
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(7) + 10
    order = torch.tensor([6, 2, 0, 5, 1])
    offsets = torch.tensor([[0, 4, 0, 8, 8], [0, 4, 4, 1, 0]])
    mirrored = torch.tensor([False, False, False, True, False])
    scale, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([-1.0, 0.0, 3.0])
    out = torch.empty(3, 3, 32, 32, dtype=dtype).to(memory_format=layout)
    out_labels = torch.empty(3, dtype=torch.int64)
    # The three in the middle of the order: image 2 as it is, image 0 four rows down, image 5 up, left and mirrored.
    arguments = out_labels, images, labels, order, offsets, mirrored, scale, shift, torch.tensor(1), 4
    ops.batch_(out, *arguments)
    wanted = torch.zeros(3, 3, 32, 32)
    wanted[0] = images[2]
    wanted[1, :, 4:] = images[0, :, :28]
    wanted[2, :, :28, 3:] = images[5, :, 4:, :29].float()
    wanted[2] = wanted[2].flip(-1)
    wanted = (wanted * scale.view(3, 1, 1) + shift.view(3, 1, 1)).to(dtype)
    assert out_labels.tolist() == [12, 10, 15]
    assert out.is_contiguous(memory_format=layout)
    assert torch.allclose(out.float(), wanted.float(), rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalised_batches(layout):
    images = data.synthetic(100, 20)
    batches = data.Batches(images, 50, memory_format=layout)
    x, y = next(batches.unaugmented("test"))
    mean, std = torch.tensor(images.mean).view(3, 1, 1), torch.tensor(images.std).view(3, 1, 1)
    assert torch.allclose(x, (images.test / 255 - mean) / std, atol=1e-5)
    assert x.is_contiguous(memory_format=layout)
    assert torch.equal(y, images.test_labels)


def seen_mirrored(batches, epoch):
    """For each image whether an epoch shows it mirrored, told from its pixels; where crops leave it as it is."""
    batches.begin(epoch)
    batches._offsets.fill_(data.PADDING)
    shown = torch.cat([batches.next(batches.size(i))[0] for i in range(len(batches))])
    plain = batches.normalise(batches.images.train[batches._order])
    mirrored = torch.tensor([torch.allclose(a, b.flip(-1)) for a, b in zip(shown, plain, strict=True)])
    as_it_is = torch.tensor([torch.allclose(a, b) for a, b in zip(shown, plain, strict=True)])
    assert torch.equal(mirrored, ~as_it_is)
    return torch.empty_like(mirrored).scatter_(0, batches._order, mirrored)


def test_an_alternating_flip_shows_each_image_once_mirrored_in_two_epochs():
    batches = data.Batches(data.synthetic(100, 20), 32, seed=5, flip="alternating")
    first, second, third = (seen_mirrored(batches, epoch) for epoch in (3, 4, 5))
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert 30 < first.sum() < 70


def test_copies_alternate_against_each_other():
    batches = data.Batches(data.synthetic(100, 20), 32, seed=5, flip="alternating")
    zero, one, two = (seen_mirrored(batches.of_copy(copy), 0) for copy in range(3))
    assert torch.equal(zero, ~one)
    assert torch.equal(zero, two)
    other = seen_mirrored(data.Batches(batches.images, 32, seed=6, flip="alternating"), 0)
    assert not torch.equal(zero, other)


def test_no_flip_mirrors_what_must_not_be_mirrored():
    images = data.synthetic(100, 20)
    images.flip = False
    for flip in ("random", "alternating"):
        assert not seen_mirrored(data.Batches(images, 32, flip=flip), 1).any()


def test_a_random_flip_is_the_one_that_it_was():
    batches = data.Batches(data.synthetic(64, 20), 32, seed=5)
    batches.begin(2)
    generator = torch.Generator().manual_seed(data.mixed(5, 2, 0))
    assert torch.equal(batches._order, torch.randperm(64, generator=generator))
    assert torch.equal(batches._offsets, torch.randint(9, (2, 64), generator=generator))
    assert torch.equal(batches._mirrored, torch.rand(64, generator=generator) < 0.5)
