"""The picture of a refinement: its differences are those that their titles say."""

import matplotlib.pyplot as plt
import numpy as np

from ct_nb.physics.volume import Grid, Volume
from ct_nb.refine.figures import refinement_figure
from ct_nb.viewer.figures import ERROR_HU, PLANES, along_lps, plane


def three():
    "Coarse, refined and true, all different everywhere."
    draw = np.random.default_rng(0)
    affine = Grid.cube(12).affine
    return [Volume(draw.uniform(-900, 900, (12, 12, 12)), affine) for _ in range(3)]


def test_difference_maps_are_refined_and_coarse_minus_the_truth():
    coarse, refined, truth = three()
    figure = refinement_figure(coarse, refined, truth)
    expected = (coarse.hu, refined.hu, truth.hu, coarse.hu - truth.hu, refined.hu - truth.hu)
    for line, kind in enumerate(PLANES):
        for column, hu in enumerate(expected):
            image = figure.axes[5 * line + column].images[0]
            assert np.allclose(
                image.get_array(), plane(along_lps(Volume(hu, truth.affine)), kind)[0], atol=1e-3
            ), (kind, column)
            assert image.get_clim()[1] == (1024 if column < 3 else ERROR_HU / 2)
    titles = [
        axis.get_title(loc)
        for axis in figure.axes[:5]
        for loc in ("left", "center")
        if axis.get_title(loc)
    ]
    assert [title.split(",")[0] for title in titles] == [
        "coarse",
        "refined",
        "CT",
        "coarse − CT",
        "refined − CT",
    ]
    plt.close(figure)
