"""Image observations of a tar: decoded, resized and normalised by Pillow and torch, or by NVIDIA DALI.

The two resize with different filters, so their values differ slightly: use one of them for training and evaluation.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from spear_megatron.data.dali import dali_modules
from spear_megatron.data.tar_index import Member, TarSample, write_index


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """What an image becomes: RGB of ``size`` x ``size`` pixels in [0, 1], minus ``mean``, over ``std``, by channel."""

    size: int = 224
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


def read_images(
    tar: Path,
    samples: Sequence[TarSample],
    spec: ImageSpec,
    *,
    reader: Literal["host", "dali"] = "host",
    device_id: int | None = None,
    num_threads: int = 2,
) -> torch.Tensor:
    """The images of samples, in the order given.

    Args:
        samples: each with one component, an encoded image (PNG or JPEG).
        device_id: CUDA device that DALI decodes on and leaves the result on; None for the host.
        num_threads: of DALI.

    Returns:
        float32 [samples, 3, size, size].

    Raises:
        ValueError: an image cannot be decoded (names tar and member), there are none, or DALI is not installed.
    """
    if not samples:
        raise ValueError(f"{tar}: no images were asked for")
    members = [sample[0] for sample in samples]
    if reader == "dali":
        return _read_dali(tar, members, spec, device_id, num_threads)
    return torch.stack([_decode(tar, member, spec) for member in members])


def _decode(tar: Path, member: Member, spec: ImageSpec) -> torch.Tensor:
    from PIL import Image, UnidentifiedImageError

    with open(tar, "rb") as stream:
        stream.seek(member.offset)
        content = stream.read(member.num_bytes)
    try:
        image = Image.open(io.BytesIO(content)).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{tar}: {member.name} is no image that can be decoded: write the tar anew") from error
    resized = image.resize((spec.size, spec.size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255.0).permute(2, 0, 1)
    mean, std = (torch.tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (spec.mean, spec.std))
    return (pixels - mean) / std


def _read_dali(
    tar: Path, members: Sequence[Member], spec: ImageSpec, device_id: int | None, num_threads: int
) -> torch.Tensor:
    dali, fn, types = dali_modules()
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    pipeline = dali.Pipeline(
        batch_size=len(members), num_threads=num_threads, device_id=device_id, prefetch_queue_depth=1
    )
    with tempfile.TemporaryDirectory(prefix="spear_megatron_") as folder:
        path = Path(folder) / "order.idx"
        write_index(path, [(member,) for member in members])
        with pipeline:
            encoded = fn.readers.webdataset(
                paths=[str(tar)], index_paths=[str(path)], ext=[members[0].component],
                missing_component_behavior="error",
            )  # fmt: skip
            images = fn.decoders.image(encoded, device="cpu" if device_id is None else "mixed", output_type=types.RGB)
            images = fn.resize(images, size=[spec.size, spec.size], antialias=True)
            mean, std = ([255.0 * value for value in part] for part in (spec.mean, spec.std))
            pipeline.set_outputs(fn.crop_mirror_normalize(images, dtype=types.FLOAT, mean=mean, std=std))
        try:
            pipeline.build()
            iterator = DALIGenericIterator([pipeline], ["images"], auto_reset=False, prepare_first_batch=False)
            images_out: torch.Tensor = next(iterator)[0]["images"]
        except RuntimeError as error:
            for member in members:
                _decode(tar, member, spec)  # says which it is
            raise ValueError(f"DALI cannot read the images of {tar}: {str(error).splitlines()[0]}") from error
    return images_out
