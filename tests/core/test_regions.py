"The table of regions."

from ct_nb.core.regions import REGIONS


def test_names_are_unique_and_numbers_fit_a_byte():
    names = [name for name, _ in REGIONS.values()]
    assert len(set(names)) == len(names) == 20 and all(0 < n < 256 for n in REGIONS)


def test_both_lungs_have_their_lobes():
    lobes = [name for name, _ in REGIONS.values() if name.endswith("lobe")]
    assert [n for n in range(1, 6)] == [n for n in REGIONS if REGIONS[n][0] in lobes]
    assert sum(name.startswith("left") for name in lobes) == 2
