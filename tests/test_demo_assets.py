"""The shipped images and weights: shapes, sizes, provenance, and the accuracy they have together."""

from __future__ import annotations

import ast
import gzip
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit.demo
from lowbit.demo import DemoResNet, load_images, load_network
from lowbit.demo.data import IMAGES, TrainingImages, augment, read_idx
from lowbit.demo.network import WEIGHTS
from lowbit.errors import LowbitError

# Where Debian's package dataset-fashion-mnist puts the original files.
ORIGINALS = Path("/usr/share/datasets/fashion-mnist")


def test_all_assets_together_fit_in_6_megabytes() -> None:
    sizes = {path.name: path.stat().st_size for path in IMAGES.parent.iterdir()}
    assert {IMAGES.name, WEIGHTS.name, "LICENSE.fashion-mnist"} <= sizes.keys()
    assert sum(sizes.values()) <= 6_000_000, sizes


@pytest.mark.parametrize(("split", "count"), [("train", 10_000), ("test", 3_000)])
def test_images_have_their_shapes_types_and_normalization(split: str, count: int) -> None:
    x, y = load_images(split)
    assert x.shape == (count, 1, 28, 28)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    assert y.shape == (count,)
    assert y.dtype == torch.int64
    # The constants are those of the 60,000 official images, so a part of them is only nearly standard.
    assert x.mean().abs() < 0.02
    assert (x.std() - 1).abs() < 0.02
    share = torch.bincount(y, minlength=10) / count
    assert len(share) == 10
    assert (share - 0.1).abs().max() < 0.02


def test_unknown_split_is_refused_with_the_cure() -> None:
    with pytest.raises(LowbitError, match=r"'valid'.*use 'train' or 'test'"):
        load_images("valid")


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="the original idx files are not installed")
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_shipped_images_are_the_first_of_the_originals(split: str, prefix: str) -> None:
    x = read_idx(ORIGINALS / f"{prefix}-images-idx3-ubyte.gz")
    y = read_idx(ORIGINALS / f"{prefix}-labels-idx1-ubyte.gz")
    with np.load(IMAGES) as archive:
        shipped_x, shipped_y = archive[f"x_{split}"], archive[f"y_{split}"]
    assert shipped_x.dtype == shipped_y.dtype == np.uint8
    assert np.array_equal(shipped_x, x[: len(shipped_x)].numpy())
    assert np.array_equal(shipped_y, y[: len(shipped_y)].numpy())


def test_training_images_come_shuffled_flipped_and_shifted() -> None:
    data = TrainingImages(1000)
    torch.manual_seed(1)
    epochs = [list(data), list(data)]
    torch.manual_seed(1)
    assert all(torch.equal(x, again) for (x, _), (again, _) in zip(epochs[0], data, strict=True))
    assert len(data) == len(epochs[0]) == 10
    labels = [torch.cat([y for _, y in epoch]) for epoch in epochs]
    assert not torch.equal(*labels)
    assert all(torch.equal(y.sort().values, load_images("train")[1].sort().values) for y in labels)


def test_an_augmented_image_is_one_of_fifty() -> None:
    x = torch.randint(1, 256, (40, 28, 28)).byte()
    found = augment(x, torch.Generator().manual_seed(2))
    seen = set()
    for image, made in zip(x, found, strict=True):
        ways = {}
        for flip in (False, True):
            padded = torch.nn.functional.pad(image.flip(1) if flip else image, [2] * 4)
            ways |= {(flip, i, j): padded[i : i + 28, j : j + 28] for i in range(5) for j in range(5)}
        seen |= {way for way, wanted in ways.items() if torch.equal(wanted, made)}
    assert len(seen) > 20  # of 40 draws from 50; an image that is none of its fifty adds nothing
    assert {flip for flip, _, _ in seen} == {False, True}
    assert {i for _, i, _ in seen} == {j for _, _, j in seen} == set(range(5))


@pytest.mark.parametrize("size", [0, 10_001])
def test_a_batch_of_no_image_is_refused(size: int) -> None:
    with pytest.raises(LowbitError, match=f"{size} is not from 1 to 10000"):
        TrainingImages(size)


def test_idx_reader_reads_the_header_and_refuses_a_wrong_one(tmp_path: Path) -> None:
    path = tmp_path / "values.gz"
    header = bytes([0, 0, 8, 2]) + (2).to_bytes(4, "big") + (3).to_bytes(4, "big")
    path.write_bytes(gzip.compress(header + bytes(range(6))))
    assert read_idx(path).equal(torch.arange(6, dtype=torch.uint8).reshape(2, 3))
    path.write_bytes(gzip.compress(header + bytes(5)))
    with pytest.raises(LowbitError, match="holds 5 values"):
        read_idx(path)
    path.write_bytes(gzip.compress(bytes([0, 0, 13, 2]) + header[4:] + bytes(24)))
    with pytest.raises(LowbitError, match="00000d02"):
        read_idx(path)


def test_network_is_float32_in_eval_mode_and_small() -> None:
    network = load_network()
    assert isinstance(network, DemoResNet)
    assert not any(module.training for module in network.modules())
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    assert 150_000 <= sum(p.numel() for p in network.parameters()) <= 300_000


def test_network_classifies_the_shipped_test_images() -> None:
    network = load_network()
    x, y = load_images("test")
    with torch.inference_mode():
        predicted = torch.cat([network(part).argmax(1) for part in x.split(500)])
    assert (predicted == y).float().mean().item() >= 0.91


def test_demo_imports_nothing_but_torch_numpy_and_safetensors() -> None:
    allowed = {"lowbit", "torch", "numpy", "safetensors"} | sys.stdlib_module_names
    for path in Path(lowbit.demo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, path.name
