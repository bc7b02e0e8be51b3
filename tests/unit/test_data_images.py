"""Image observations: Pillow and DALI decode the same pictures, in the order asked for."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spear_megatron.data.dali import has_dali
from spear_megatron.data.images import ImageSpec, read_images
from spear_megatron.data.tar_index import TarSample, write_tar

READERS = ["host", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="DALI is not installed"))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TarSample], list[np.ndarray]]:
    """Six smooth pictures of 96 x 96, each of its own brightness."""
    y, x = np.mgrid[:96, :96]
    waves = [np.stack([np.sin(x / 9 + i), np.cos(y / 7), np.sin((x + y) / 11)], axis=-1) for i in range(6)]
    arrays = [(90 + 20 * i + 30 * wave).astype(np.uint8) for i, wave in enumerate(waves)]
    contents = []
    for array in arrays:
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "PNG")
        contents.append({"png": buffer.getvalue()})
    path = tmp_path_factory.mktemp("pictures") / "pictures.tar"
    return path, write_tar(path, contents), arrays


@pytest.mark.parametrize("reader", READERS)
def test_without_resizing_the_pixels_are_exact(reader: str, pictures: tuple) -> None:
    path, samples, arrays = pictures
    spec = ImageSpec(size=96, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    order = [4, 0, 4, 2]
    found = read_images(path, [samples[i] for i in order], spec, reader=reader)  # type: ignore[arg-type]
    expected = torch.stack([torch.from_numpy(arrays[i]).float().permute(2, 0, 1) / 255 for i in order])
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6, rtol=0)


@pytest.mark.skipif(not has_dali(), reason="DALI is not installed")
@pytest.mark.parametrize("size", [224, 48])
def test_resized_and_normalised_they_agree_within_the_filters(size: int, pictures: tuple) -> None:
    path, samples, _ = pictures
    spec = ImageSpec(size=size)
    host = read_images(path, samples, spec, reader="host")
    dali = read_images(path, samples, spec, reader="dali")
    assert host.shape == dali.shape == (6, 3, size, size)
    step = 1 / 255 / min(spec.std)  # Pillow rounds to whole levels between the two passes and after them
    difference = (host - dali).abs()
    assert difference.max() < 4 * step and difference.mean() < step
    assert (host[0] - dali[1]).abs().mean() > 4 * step, "other pictures differ by more"


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_picture_is_named(reader: str, pictures: tuple, tmp_path: Path) -> None:
    path, samples, _ = pictures
    data = bytearray(path.read_bytes())
    start = samples[3][0].offset
    data[start : start + 64] = bytes(64)
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match="damaged.tar: 000000003.png"):
        read_images(damaged, samples, ImageSpec(), reader=reader)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images"):
        read_images(path, [], ImageSpec(), reader=reader)  # type: ignore[arg-type]
