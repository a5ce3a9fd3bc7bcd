import time

import numpy as np
import pytest
import torch

from regvit.features.float16 import BLOCK, DTYPE, INFINITY, largest_bits, to_float, to_half

EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)


def at_the_boundaries():
    """Every float16 as float32, what lies half-way to the next one, and both neighbours of each: 390,000 values."""
    halves = np.sort(EVERY_HALF[np.isfinite(EVERY_HALF)].astype(np.float64))
    beyond = [-70000, -65536, -65520, 65520, 65536, 70000, 1e38, -1e38, 1e-45, -1e-45, np.inf, -np.inf, np.nan]
    ties = (halves[1:] + halves[:-1]) / 2
    exact = np.concatenate([halves, ties, beyond, [-0.0]]).astype(np.float32)
    return np.concatenate([exact, np.nextafter(exact, np.float32(np.inf)), np.nextafter(exact, np.float32(-np.inf))])


def rounded_by_numpy(values):
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def same_bits(found, expected):
    """Equal in every bit; NaN need only be NaN."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    both_nan = np.isnan(found) & np.isnan(expected)
    bits = f"u{found.itemsize}"
    return bool(
        (both_nan | (np.ascontiguousarray(found).view(bits) == np.ascontiguousarray(expected).view(bits))).all()
    )


@pytest.mark.parametrize("shift", range(3))
def test_float32_is_rounded_as_numpy_rounds_it_at_every_boundary_of_float16(shift):
    values = at_the_boundaries()[shift:]  # shifted, as vectors of eight and what is left over go different ways
    assert len(values) > 10 * BLOCK
    assert same_bits(to_half(values), rounded_by_numpy(values))


@pytest.mark.parametrize("denormals_are_zero", [False, True])
def test_rounding_does_not_depend_on_what_torch_makes_of_tiny_numbers(denormals_are_zero):
    tiny = at_the_boundaries()
    tiny = tiny[np.abs(tiny) < 1e-3]
    torch.set_flush_denormal(denormals_are_zero)
    try:
        found = to_half(tiny)
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(found, rounded_by_numpy(tiny))


@pytest.mark.parametrize("n", [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5])
def test_arrays_of_any_size_are_rounded_to_their_last_value(n):
    values = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    assert same_bits(to_half(values), rounded_by_numpy(values))
    assert same_bits(to_float(to_half(values)), rounded_by_numpy(values).astype(np.float32))


def test_float64_is_rounded_once_and_not_by_way_of_float32():
    value = np.array([1 + 2.0**-11 + 2.0**-30])  # float32 makes it a tie, which goes to the even 1.0
    assert to_half(value)[0] == np.float16(1 + 2.0**-10) != np.float16(np.float32(value[0]))


@pytest.mark.parametrize(
    "values",
    [np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2], np.arange(24, dtype=np.float32).reshape(4, 6).T,
     np.arange(6, dtype=np.float32)[::-1], np.broadcast_to(np.float32(1.5), (3, 4)), np.arange(6, dtype=">f4"),
     np.arange(6), np.arange(6, dtype=">f2"), np.arange(6, dtype=np.float16)[::2]],
)  # fmt: skip
def test_arrays_of_any_layout_and_type_are_rounded(values):
    found = to_half(values)
    assert found.flags.c_contiguous and found.dtype == DTYPE
    np.testing.assert_array_equal(found, values.astype(np.float16))


def test_an_array_that_may_not_be_written_to_is_rounded_without_a_warning(recwarn):
    values = at_the_boundaries()
    values.flags.writeable = False
    assert same_bits(to_half(values), rounded_by_numpy(values))
    assert not recwarn.list


def test_every_float16_becomes_the_float32_that_numpy_makes_of_it():
    assert same_bits(to_float(EVERY_HALF), EVERY_HALF.astype(np.float32))


def test_what_is_float16_already_is_not_copied():
    half = np.zeros((2, 3), np.float16)
    assert to_half(half) is half


def test_each_of_all_float16_is_known_as_finite_infinite_or_nan_alone_and_among_others():
    for others in (0.0, 65504.0, -65504.0):
        found = np.array([largest_bits(np.array([others, half, others], np.float16)) for half in EVERY_HALF])
        np.testing.assert_array_equal(found < INFINITY, np.isfinite(EVERY_HALF))
        np.testing.assert_array_equal(found > INFINITY, np.isnan(EVERY_HALF))
    alone = np.array([largest_bits(half[None]) for half in EVERY_HALF])
    np.testing.assert_array_equal(alone, EVERY_HALF.view(np.uint16) & 0x7FFF)
    assert largest_bits(np.empty((0, 3), np.float16)) == 0


def test_one_bad_value_anywhere_in_a_large_array_is_seen():
    half = np.random.default_rng(0).standard_normal(10_000).astype(np.float16)
    for place in (0, 1, 4_999, 9_998, 9_999):
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = half.copy()
            spoilt[place] = bad
            assert largest_bits(spoilt) >= INFINITY


def test_rounding_runs_on_the_calling_thread_alone():
    """Threads of torch that wait for each other would take a hundred times as much of the CPU as the work."""
    values = np.zeros(100 * BLOCK, np.float32)
    to_half(values)
    own, all_threads = time.thread_time(), time.process_time()
    to_half(values)
    own, all_threads = time.thread_time() - own, time.process_time() - all_threads
    assert all_threads < 1.5 * own + 0.005
