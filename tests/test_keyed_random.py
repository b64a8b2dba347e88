"""Counter-based randomness: uniform, and a function of its key alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpo.keyed_random import derive, uniform

MASK_64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix_finaliser(x: int) -> int:
    """Python integers, unlimited precision cut to 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def chain(key: tuple[int, ...]) -> int:
    state = 0
    for part in key:
        state = splitmix_finaliser((state + splitmix_finaliser((part + GOLDEN) & MASK_64) + GOLDEN) & MASK_64)
    return state


def test_first_output_of_splitmix64_as_published():
    # state 0 of the reference generator: finaliser(GOLDEN) = 0xE220A8397B1DCDAF
    assert splitmix_finaliser(GOLDEN) == 0xE220A8397B1DCDAF


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5))
def test_equals_the_same_chain_in_python_integers(key):
    assert uniform(*key).item() == ((chain(tuple(key)) >> 41) + 0.5) * 2.0**-23
    assert derive(*key) == chain(tuple(key)) >> 1


def test_open_interval_and_dtype():
    values = uniform(0, torch.arange(1_000_000))
    assert values.dtype == torch.float32
    assert values.min() > 0
    assert values.max() < 1
    # the extreme cells themselves: float32 must not round the largest one up to 1
    assert torch.tensor(float(2**23 - 1) + 0.5).item() * 2.0**-23 < 1


@pytest.mark.parametrize(
    "keys",
    [
        (7, torch.arange(200_000)),
        (torch.arange(200_000), 7),
        (0, 0, torch.arange(450)[:, None], torch.arange(450)),
        (3, torch.arange(200_000) * 2**32),
    ],
    ids=["last", "first", "grid", "high bits"],
)
def test_uniform_in_every_key_part(keys, chi_square):
    values = uniform(*keys).flatten()
    counts = torch.bincount((values * 64).long(), minlength=64)
    assert chi_square(counts, torch.ones(64)) > 1e-4
    assert values.mean().item() == pytest.approx(0.5, abs=4 * (1 / 12 / len(values)) ** 0.5)


def test_neighbouring_keys_are_independent(chi_square):
    grid = uniform(1, torch.arange(400)[:, None], torch.arange(400))
    for a, b in ((grid[:, 1:], grid[:, :-1]), (grid[1:], grid[:-1]), (grid.triu(1), grid.T.triu(1))):
        used = (a > 0) & (b > 0)
        cell = (a[used] * 8).long() * 8 + (b[used] * 8).long()
        assert chi_square(torch.bincount(cell, minlength=64), torch.ones(64)) > 1e-4


def test_a_number_does_not_depend_on_the_batch_it_is_drawn_in():
    rows, positions = torch.arange(5), torch.arange(7)
    whole = uniform(11, 2, rows[:, None], positions)
    assert whole.shape == (5, 7)
    for i, j in itertools.product(range(5), range(7)):
        assert uniform(11, 2, i, j) == whole[i, j]
    shuffled = torch.tensor([3, 0, 4])
    assert torch.equal(uniform(11, 2, shuffled[:, None], positions), whole[shuffled])
    assert torch.equal(uniform(11, 2, rows[:, None], positions[2:5]), whole[:, 2:5])


def test_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(0)
    before, first = torch.get_rng_state(), uniform(1, torch.arange(10))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(uniform(1, torch.arange(10)), first)


def test_distinct_keys_differ():
    # order, length and sign of the parts all matter: with 63 bits no two of these seeds should meet
    small = range(-2, 5)
    keys = [key for size in (1, 2, 3) for key in itertools.product(small, repeat=size)]
    assert len({derive(*key) for key in keys}) == len(keys)
    assert len({derive(0, i) for i in range(4000)}) == 4000


def test_derived_seeds_fit_other_generators():
    for i in range(1000):
        assert 0 <= derive(5, i) < 2**63
    torch.Generator().manual_seed(derive(5, 0))
