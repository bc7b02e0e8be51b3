"""The data source on NVIDIA DALI: reading, padding and copying to the device on its own threads, in our order.

DALI shuffles through a buffer, which is no permutation, and restores a checkpoint of another shard count without a
word. So it decides nothing here: it is given the samples of the next steps by name, as a list of files (``numpy``), as
an index of the tar in our order (``webdataset``), or by a callback (``packed`` and ``memory``), and what it returns is
held against the table.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spear_megatron.data.corpus import LENGTH, Array, Corpus
from spear_megatron.data.corpus_files import COMPONENTS, TAR_NAME, NumpyCorpus, TarCorpus
from spear_megatron.data.dali import dali_modules
from spear_megatron.data.data_source import Batch, OrderedSource, Place, Reading, make_batch
from spear_megatron.data.tar_index import write_index

_WINDOW = 4096
"""Samples that one pipeline is built for; the next one takes some ten milliseconds."""


class DaliSource(OrderedSource):
    """Gives the batches that :class:`spear_megatron.data.data_source.MappedSource` gives."""

    def __init__(
        self,
        corpus: Corpus,
        reading: Reading,
        *,
        device_id: int | None = None,
        num_threads: int = 2,
        prefetch: int = 2,
        window: int = _WINDOW,
    ) -> None:
        """Nothing is read before the first batch.

        Args:
            device_id: CUDA device that ids and masks are copied to; None leaves them in the host's memory.
            num_threads: of the pipeline, which read, pad and copy. prefetch: steps that are made ready ahead.
            window: samples that one pipeline is built for.

        Raises:
            ValueError: DALI is not installed, or a number is not positive.
        """
        super().__init__(corpus, reading)
        dali_modules()
        if min(num_threads, prefetch, window) < 1:
            raise ValueError(f"num_threads={num_threads}, prefetch={prefetch} and window={window} must be positive")
        self._device_id, self._num_threads, self._prefetch, self._window = device_id, num_threads, prefetch, window
        self._steps: deque[list[Place]] = deque()
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._iterator: Any = None

    def _fetch(self, position: int) -> Batch:
        if not self._steps:
            self._open_window(position)
        places = self._steps[0]
        if not places:  # the filler's row is still there to be passed over
            self._next_rows()
            self._steps.popleft()
            return self._empty()
        rows = self._next_rows()
        batch = self._batch(places, *rows)
        self._steps.popleft()
        return batch

    def _next_rows(self) -> tuple[torch.Tensor, ...]:
        """The components of one step: on the host, and once more on the device if there is one."""
        try:
            values = next(self._iterator)[0]
        except (RuntimeError, StopIteration) as error:
            for places in list(self._steps)[: self._prefetch + 1]:
                for place in places:
                    self.corpus.read(place.sample)  # says which file it is
            raise ValueError(f"DALI cannot read {self.corpus.name}: {_first_line(error)}") from error
        return tuple(values[name] for name in self._outputs())

    def _batch(self, places: Sequence[Place], *outputs: torch.Tensor) -> Batch:
        count = len(places)
        ids, mask, ids_lengths, mask_lengths = (value[:count] for value in outputs[:4])
        lengths = np.stack([ids_lengths.numpy().reshape(-1), mask_lengths.numpy().reshape(-1)], axis=1)
        for row, place in enumerate(places):
            ids_length, mask_length = lengths[row]
            self.corpus.check(place.sample, ids.numpy()[row, :ids_length], mask.numpy()[row, :mask_length])
        if self._device_id is not None:
            ids, mask = (value[:count] for value in outputs[4:])
        return make_batch(places, ids, mask, lengths[:, 0])

    def _empty(self) -> Batch:
        device = "cpu" if self._device_id is None else f"cuda:{self._device_id}"
        ids = torch.zeros((0, 0), dtype=torch.int32, device=device)
        return make_batch([], ids, ids.to(torch.uint8), np.zeros(0))

    def _open_window(self, position: int) -> None:
        """Plan the next steps and build a pipeline that reads them, every step filled up to the same width."""
        batch_size = self.reading.batch_size
        count = max(self._window // batch_size, 1)
        steps = [self.share(position + step * batch_size) for step in range(count)]
        width = max(1, max(len(step) for step in steps))
        # A filler is a sample of the step itself, so that it makes no padding longer.
        filled = [[place.sample for place in step] or [0] for step in steps]
        filled = [indices + [indices[0]] * (width - len(indices)) for indices in filled]
        self._moved()
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        try:
            self._iterator = DALIGenericIterator(
                [self._pipeline(filled, width)], self._outputs(), auto_reset=False, prepare_first_batch=False
            )
        except RuntimeError as error:
            raise ValueError(f"DALI cannot open {self.corpus.name}: {_first_line(error)}") from error
        self._steps = deque(steps)

    def _outputs(self) -> list[str]:
        host = ["ids", "loss_mask", "ids_length", "loss_mask_length"]
        return host if self._device_id is None else [*host, "device_ids", "device_loss_mask"]

    def _pipeline(self, steps: list[list[int]], width: int) -> Any:
        dali, fn, _ = dali_modules()
        pipeline = dali.Pipeline(
            batch_size=width,
            num_threads=self._num_threads,
            device_id=self._device_id,
            prefetch_queue_depth=self._prefetch,
        )
        with pipeline:
            parts = self._reader(steps)
            padded = [fn.pad(part, fill_value=0) for part in parts]
            outputs = [*padded, *(part.shape() for part in parts)]
            if self._device_id is not None:
                outputs += [part.gpu() for part in padded]
            pipeline.set_outputs(*outputs)
        pipeline.build()
        return pipeline

    def _reader(self, steps: list[list[int]]) -> list[Any]:
        """DALI's nodes for ids and mask of the samples, step after step."""
        _, fn, types = dali_modules()
        corpus, indices = self.corpus, [index for step in steps for index in step]
        if isinstance(corpus, NumpyCorpus):
            files = [corpus.files(index) for index in indices]
            return [fn.readers.numpy(files=[str(pair[part]) for pair in files]) for part in range(len(COMPONENTS))]
        if isinstance(corpus, TarCorpus):
            self._folder = tempfile.TemporaryDirectory(prefix="spear_megatron_")
            path = Path(self._folder.name) / "order.idx"
            write_index(path, [corpus.samples[index] for index in indices])
            return list(
                fn.readers.webdataset(
                    paths=[str(corpus.folder / TAR_NAME)],
                    index_paths=[str(path)],
                    ext=list(COMPONENTS),
                    dtypes=[types.INT32, types.UINT8],
                    missing_component_behavior="error",
                )
            )
        source = _callback(corpus, steps)
        return list(fn.external_source(source=source, num_outputs=2, dtype=[types.INT32, types.UINT8], ndim=1))

    def _moved(self) -> None:
        self._steps.clear()
        self._iterator = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _callback(corpus: Corpus, steps: list[list[int]]) -> Callable[[], tuple[list[Array], list[Array]]]:
    """What feeds the pipeline one step per call; damaged samples are passed on and found when they are checked."""
    waiting = deque(steps)

    def give() -> tuple[list[Array], list[Array]]:
        if not waiting:
            raise StopIteration
        samples = [corpus.read(index) for index in waiting.popleft()]
        return [ids for ids, _ in samples], [mask for _, mask in samples]

    return give


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
