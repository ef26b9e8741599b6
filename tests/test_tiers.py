"""The choice of what runs by default: every pair of values is there, and `--full` leaves nothing out."""

import sys
from itertools import combinations, product
from types import ModuleType

import pytest

pytest_plugins = ["pytester"]


@pytest.fixture(scope="module")
def tiers() -> ModuleType:
    return sys.modules["hf_sparse_tests_tiers"]


@pytest.mark.parametrize("sizes", [(7,), (3, 4), (3, 3, 3), (2, 5, 3, 2), (4, 1, 4, 4), (25, 3, 2), (2,) * 8], ids=str)
@pytest.mark.parametrize("strength", [1, 2, 3])
def test_every_combination_of_values_is_covered(tiers, sizes, strength):
    rows = list(product(*map(range, sizes)))
    chosen = [rows[i] for i in tiers.covering(rows, strength)]
    strength = min(strength, len(sizes))
    for axes in combinations(range(len(sizes)), strength):
        assert {tuple(row[axis] for axis in axes) for row in chosen} == set(product(*(range(sizes[a]) for a in axes)))
    largest = 1
    for size in sorted(sizes)[-strength:]:
        largest *= size
    assert largest <= len(chosen) == len(set(chosen)) <= 2 * largest + 4


def test_a_pair_that_is_nowhere_is_not_asked_for(tiers):
    rows = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 1, 1)]
    assert tiers.covering(rows, 1) == [0, 3]
    assert tiers.covering(rows, 2) == [0, 1, 2, 3]
    assert tiers.covering([], 2) == []


MODULE = """
import pytest

@pytest.fixture(params=["x", "y", "z"])
def letter(request):
    return request.param

@pytest.mark.cross
@pytest.mark.parametrize("first, second", [(1, 2), (3, 4), (5, 6)])
@pytest.mark.parametrize("flag", [True, False])
def test_pairs(letter, first, second, flag):
    pass

@pytest.mark.cross("values")
class TestValues:
    @pytest.mark.parametrize("number", range(4))
    def test_values(self, letter, number):
        pass

    @pytest.mark.parametrize("number", range(4))
    def test_sharing_values(self, letter, number):
        pass

    @pytest.mark.cross
    @pytest.mark.parametrize("number", range(4))
    def test_the_nearest_marker_counts(self, letter, number):
        pass

@pytest.mark.full
def test_slow():
    pass

@pytest.mark.cross
@pytest.mark.parametrize("number", [0, 1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("flag", [True, False])
def test_both_markers(number, flag):
    pass

@pytest.mark.parametrize("number", range(4))
def test_plain(number):
    pass
"""


def test_what_runs(tiers, pytester):
    pytester.makeini("[pytest]\nmarkers =\n  full: x\n  cross: x\naddopts = --strict-markers")
    pytester.makepyfile(test_crossed=MODULE)
    found = {}
    for options in ([], ["--full"], ["--values"]):
        result = pytester.inline_run("-p", "no:cacheprovider", *options, plugins=[tiers])
        names = [report.nodeid.split("::")[-1] for report in result.getreports("pytest_runtest_logreport")
                 if report.when == "call" and report.passed]  # fmt: skip
        found[" ".join(options)] = names
    assert len(found["--full"]) == 18 + 12 + 12 + 12 + 1 + 6 + 4 and set(found[""]) < set(found["--full"])
    assert 3 * 3 <= sum(name.startswith("test_pairs") for name in found[""]) < 18
    tests = ("test_values", "test_sharing", "test_the_nearest", "test_slow", "test_both", "test_plain")
    counts = {option: [sum(name.startswith(test) for name in names) for test in tests]
              for option, names in found.items()}  # fmt: skip
    assert counts[""] == [4, 4, 12, 0, 4, 4] and counts["--values"][2:] == [4, 0, 2, 4]
    shared = [name for name in found["--values"] if name.startswith(("test_values", "test_sharing"))]
    assert len(shared) == 4 and all(counts["--values"][:2])
    assert all(any(value in name.partition("[")[2] for name in shared) for value in "xyz0123")
    assert sum(name.startswith("test_pairs") for name in found["--values"]) == 3
