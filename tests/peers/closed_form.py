"Exact line integrals of ellipsoids and Gaussian blobs, and voxel grids of them."

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ellipsoid:
    "A solid of constant attenuation: |A (x - center)| <= 1 with A = diag(1/semi_axes) · rotationᵀ."

    center_mm: tuple
    semi_axes_mm: tuple
    rotation: np.ndarray  # (3, 3) columns are the axes
    mu: float  # mm⁻¹

    @property
    def matrix(self):
        return (self.rotation / np.array(self.semi_axes_mm)).T

    def line_integral(self, source_mm, direction):
        "μ times the chord of each line source + t·direction (|direction| = 1); (..., 3) -> (...)."
        offset = (source_mm - np.array(self.center_mm)) @ self.matrix.T
        step = direction @ self.matrix.T
        a = (step**2).sum(-1)
        b = (offset * step).sum(-1)
        c = (offset**2).sum(-1) - 1
        return self.mu * 2 * np.sqrt(np.maximum(b * b - a * c, 0)) / a

    def voxels(self, shape, affine, supersampling=6):
        """Attenuation on a grid: the share of each voxel inside, by supersampling³ points in the
        voxels that the surface may cross.
        """
        share = np.zeros(shape)
        # of a voxel's corner, in units of the radius
        reach = np.linalg.norm(self.matrix, 2) * np.linalg.norm(affine[:3, :3], axis=0).sum() / 2
        steps = ((np.arange(supersampling) + 0.5) / supersampling - 0.5) * np.eye(3)[:, :, None]
        within = (
            steps[0][:, :, None, None] + steps[1][:, None, :, None] + steps[2][:, None, None, :]
        )
        points = (self.matrix @ affine[:3, :3] @ within.reshape(3, -1)).T  # (supersampling³, 3)
        box = self._box(shape, affine)
        for z in range(box[0].start, box[0].stop):
            here = _centers((slice(z, z + 1), *box[1:]), affine)
            at = (here - np.array(self.center_mm)) @ self.matrix.T
            radius = np.sqrt((at**2).sum(-1))
            inside = (radius < 1).astype(np.float64)
            edge = abs(radius - 1) <= reach
            near = at[edge]
            inside[edge] = sum(((near + point) ** 2).sum(-1) <= 1 for point in points) / len(points)
            share[z, box[1], box[2]] = inside[0]
        return self.mu * share

    def _box(self, shape, affine):
        "The slices (z, y, x) of the grid that hold the solid, with a voxel to spare."
        to_index = np.linalg.inv(affine[:3, :3])
        middle = to_index @ (np.array(self.center_mm) - affine[:3, 3])
        half = np.linalg.norm(to_index @ np.linalg.inv(self.matrix), axis=1) + 1
        return [
            slice(max(0, int(np.floor(c - h))), min(n, int(np.ceil(c + h)) + 1))
            for c, h, n in zip(middle[::-1], half[::-1], shape)
        ]


@dataclass(frozen=True)
class Blob:
    """A Gaussian of attenuation: mu · exp(-|A (x - center)|² / 2); smooth, so it shows the order of
    a method.
    """

    center_mm: tuple
    semi_axes_mm: tuple  # standard deviations
    rotation: np.ndarray
    mu: float

    matrix = Ellipsoid.matrix

    def line_integral(self, source_mm, direction):
        "The integral over the whole line; the source must lie outside the blob."
        offset = (source_mm - np.array(self.center_mm)) @ self.matrix.T
        step = direction @ self.matrix.T
        a, b = (step**2).sum(-1), (offset * step).sum(-1)
        return self.mu * np.sqrt(2 * np.pi / a) * np.exp(-((offset**2).sum(-1) - b * b / a) / 2)

    def voxels(self, shape, affine):
        "Attenuation at the voxel centres."
        offset = (
            _centers([slice(0, n) for n in shape], affine) - np.array(self.center_mm)
        ) @ self.matrix.T
        return self.mu * np.exp(-(offset**2).sum(-1) / 2)


def _centers(box, affine):
    "Centres in mm of the voxels in the slices (z, y, x), (D, H, W, 3)."
    z, y, x = (np.arange(s.start, s.stop, dtype=np.float64) for s in box)
    return (
        affine[:3, 3]
        + z[:, None, None, None] * affine[:3, 2]
        + y[None, :, None, None] * affine[:3, 1]
        + x[None, None, :, None] * affine[:3, 0]
    )


def rotation(axis, degrees):
    "Rodrigues' formula: the rotation matrix about `axis`."
    axis = np.array(axis, dtype=np.float64) / np.linalg.norm(axis)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.deg2rad(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def ellipsoid_phantom():
    """A body with two lungs, a spine, a heart and two small nodules, off the axes and off the
    centre, within a 256 mm cube.
    """
    turn = rotation
    return [
        Ellipsoid((3, -2, 1), (108, 84, 112), turn((0, 0, 1), 4), 0.02),
        Ellipsoid((-46, -6, 8), (34, 52, 76), turn((0, 1, 0.2), 9), -0.015),
        Ellipsoid((50, -4, 6), (31, 50, 73), turn((0.1, 1, 0), -8), -0.015),
        Ellipsoid((12, -22, -18), (30, 36, 42), turn((1, 1, 0), 24), 0.006),
        Ellipsoid((2, 56, 0), (15, 15, 98), turn((1, 0, 0), 6), 0.014),
        Ellipsoid((-51, 9, 22), (7, 7, 7), np.eye(3), 0.017),
        Ellipsoid((44, -19, -25), (4.5, 6, 5), turn((1, 0.3, 0.5), 40), 0.018),
    ]


def blob_phantom():
    "Three overlapping Gaussian blobs well inside a 256 mm cube."
    return [
        Blob((0, 0, 0), (22, 18, 26), rotation((1, 2, 0.5), 30), 0.02),
        Blob((-25, 12, 14), (12, 15, 11), rotation((0, 1, 1), 50), 0.03),
        Blob((21, -16, -20), (13, 11, 14), rotation((1, 0, 0), 15), -0.01),
    ]


def voxelize(solids, shape, affine):
    """(D, H, W) float32: the sum of the solids on the grid with this affine (voxel index (x, y, z)
    -> mm).
    """
    return sum(
        solid.voxels(shape, np.asarray(affine, dtype=np.float64)) for solid in solids
    ).astype(np.float32)


def line_integrals(solids, source_mm, pixel_mm):
    """Exact line integrals from `source_mm` (V, 3) to each pixel centre (V, R, C, 3); returns (V,
    R, C) float64.
    """
    source = np.asarray(source_mm, dtype=np.float64)[:, None, None, :]
    ray = np.asarray(pixel_mm, dtype=np.float64) - source
    direction = ray / np.linalg.norm(ray, axis=-1, keepdims=True)
    return sum(solid.line_integral(source, direction) for solid in solids)
