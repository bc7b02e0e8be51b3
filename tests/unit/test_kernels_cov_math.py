"""csrc/cov_math.h, compiled alone: exact sums are those of math.fsum, shares of a count those of Python."""

from __future__ import annotations

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from spear_megatron.algorithms.rounding import floor_share

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")
CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = """
#include "cov_math.h"
extern "C" double exact_sum(const double* values, int count) {
    spear::ExactSum sum;
    for (int i = 0; i < count; ++i) sum.add(values[i]);
    return sum.rounded();
}
extern "C" int64_t share(double ratio, int64_t count) { return spear::floor_share(ratio, count); }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("cov_math")
    (folder / "cov_math.cpp").write_text(SOURCE)
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{CSRC}"]
    subprocess.run(["g++", *flags, "cov_math.cpp", "-o", "cov_math.so"], cwd=folder, check=True, timeout=120)
    loaded = ctypes.CDLL(str(folder / "cov_math.so"))
    loaded.exact_sum.argtypes, loaded.exact_sum.restype = (ctypes.c_void_p, ctypes.c_int), ctypes.c_double
    loaded.share.argtypes, loaded.share.restype = (ctypes.c_double, ctypes.c_int64), ctypes.c_int64
    return loaded


def exact_sum(library: ctypes.CDLL, values: list[float]) -> float:
    held = np.array(values, dtype=np.float64)
    result: float = library.exact_sum(held.ctypes.data, len(held))
    return result


def test_sums_of_any_size_and_sign(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(1)
    for _ in range(300):
        count = int(generator.integers(0, 80))
        exponents = generator.integers(-120, 150, count)
        values = np.ldexp(generator.integers(-(2**24), 2**24, count).astype(np.float64), exponents - 24)
        values = np.concatenate([values, -values[: count // 2] * (1 + 2.0**-20)]).tolist()
        assert exact_sum(library, values) == math.fsum(values)
        assert exact_sum(library, values[::-1]) == math.fsum(values)


def test_half_way_cases(library: ctypes.CDLL) -> None:
    """One and half a unit in its last place: what lies far below decides to which side it goes."""
    for sign in (1.0, -1.0):
        for tiny in (0.0, 2.0**-120, -(2.0**-120)):
            for start in (1.0, 1.0 + 2**-52):
                values = [sign * start, sign * 2**-53, tiny]
                assert exact_sum(library, values) == math.fsum(values)
    above, below = (exact_sum(library, [1.0, 2**-53, tiny]) for tiny in (2.0**-120, -(2.0**-120)))
    assert above == 1 + 2**-52 and below == 1.0


def test_shares_are_those_of_python(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(2)
    for decimals in (2, 4, 6, 12):
        for _ in range(2000):
            ratio, count = round(float(generator.random()), decimals), int(generator.integers(0, 2**21))
            assert library.share(ratio, count) == floor_share(ratio, count)
    assert library.share(0.29, 100) == 29 and int(0.29 * 100) == 28
    for distance in (4e-10, 4.9e-10, 5.1e-10, 6e-10):
        assert library.share((29 - distance) / 100, 100) == floor_share((29 - distance) / 100, 100)
