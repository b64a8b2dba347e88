"""The count of hops: the two packages' functions alone, each once."""

import hops

from diffpo.keyed_random import uniform


def test_functions_of_the_packages_are_counted_once():
    names = {code.co_qualname for code in hops.traced(lambda: [uniform(1, 2), uniform(1, 2), sorted([1])])}
    assert "uniform" in names
    assert not any(name.startswith(("<", "sorted", "test_")) or "<lambda>" in name for name in names)


def test_a_prompt_passes_generate_and_the_kernels():
    files = hops.by_file(hops.one_prompt())
    assert "generate" in files["diffpo/decoding/generation.py"]
    assert any(name.startswith("diffpo_kernels/") for name in files)


def test_an_update_is_counted_without_its_rollouts():
    update, step = hops.one_group()
    names = {code.co_qualname for code in update}
    assert "accumulate_gradient" in names
    assert "generate" not in names
    assert {"generate", "collect"} <= {code.co_qualname for code in step - update}
