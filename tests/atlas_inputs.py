"""Settings that the tests of the atlas share."""

from ct_nb.atlas.fit import FitSettings, Level
from ct_nb.physics.volume import Grid

QUICK = FitSettings(levels=(Level(16, 4, 10), Level(32, 8, 10)))
CUBE = Grid.cube(32)
