"""Losses against closed forms, brute force, a second library, and two processes."""

import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from places import PROGRAMS
from refusals import refused

from ct_nb.physics.geometry import ConeBeam
from ct_nb.physics.pose_errors import rotate
from ct_nb.physics.projector import project
from ct_nb.physics.volume import WINDOWS, Grid, hu_to_mu
from ct_nb.training.adversarial import (
    Adversary,
    adaptive_weight,
    discriminator_hinge,
    generator_hinge,
    patch_discriminator,
)
from ct_nb.training.losses import (
    LossWeights,
    kl_weight,
    reconstruction_loss,
    to_window,
    weighted_sum,
)
from ct_nb.training.projection_losses import (
    cross_view_infonce,
    distillation_error,
    drr_cycle_error,
    mask_patches,
    masked_error,
    third_view,
)

CHEST = WINDOWS["chest"]
PROGRAM = PROGRAMS / "gather_tokens.py"


def seeded(number):
    return torch.Generator().manual_seed(number)


def scene(batch=2, size=16, pixels=24, dtype=torch.float32):
    """HU (B, N, N, N) above vacuum with air around, X-rays, geometry of batch shape (B,) with
    another pose for each case.
    """
    geometry = ConeBeam.stack(
        [
            rotate(
                ConeBeam.biplanar(
                    grid=Grid.cube(size), detector_shape=(pixels, pixels), pixel_mm=500 / pixels
                ),
                [0.0, 0.0, 7.0 * b],
            )
            for b in range(batch)
        ]
    ).to(dtype)
    hu = F.pad(
        torch.rand(batch, size - 4, size - 4, size - 4, generator=seeded(0), dtype=dtype) * 600
        - 300,
        (2,) * 6,
        value=-1000.0,
    )
    return hu, project(hu_to_mu(hu), geometry), geometry


# the sum


def test_default_weights_are_the_absolute_error_alone():
    a, b = (torch.rand(1, 12, 12, 12, generator=seeded(k)) * 400 for k in (0, 1))
    loss, parts = reconstruction_loss(a, b, CHEST)
    assert parts == {
        "absolute": pytest.approx(((a - b).abs() / 2048).mean().item())
    } and loss.item() == pytest.approx(parts["absolute"])
    assert asdict(LossWeights())["absolute"] == 1 and sum(asdict(LossWeights()).values()) == 1


def test_terms_are_weighted_named_and_lazy():
    def never():
        raise AssertionError("computed at weight 0")

    x = torch.tensor(3.0, requires_grad=True)
    loss, parts = weighted_sum(
        LossWeights(absolute=0, kl=0.5, cycle=2),
        {"kl": x, "cycle": lambda: x * x, "contrast": never},
    )
    loss.backward()
    assert loss.item() == 1.5 + 18 and parts == {"kl": 3, "cycle": 9} and x.grad == 0.5 + 2 * 2 * 3


def test_a_given_term_replaces_the_built_in_one():
    a = torch.zeros(1, 12, 12, 12)
    assert reconstruction_loss(a, a, CHEST, others={"absolute": torch.tensor(7.0)})[0] == 7


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: LossWeights(kl=-1), "LossWeights"),
        (lambda: LossWeights(cycle=float("nan")), "LossWeights"),
        (lambda: weighted_sum(LossWeights(), {"cylce": torch.tensor(1.0)}), "terms"),
        (lambda: weighted_sum(LossWeights(), {"kl": torch.tensor(1.0)}), "weights"),
        (
            lambda: reconstruction_loss(
                torch.zeros(1, 2, 2, 2),
                torch.zeros(1, 2, 2, 2),
                CHEST,
                LossWeights(cycle=1, kl=1),
                {"kl": torch.tensor(1.0)},
            ),
            "others",
        ),
        (
            lambda: reconstruction_loss(torch.zeros(1, 2, 2, 2), torch.zeros(2, 2, 2, 2), CHEST),
            "prediction_hu",
        ),
    ],
)
def test_wrong_weights_are_refused(make, argument):
    with refused(argument):
        make()


def test_kl_weight():
    assert [kl_weight(s, 8) for s in (-1, 0, 2, 8, 9)] == [0, 0, 0.25, 1, 1] and kl_weight(
        0, 0
    ) == kl_weight(5, -1) == 1


# the cycle


def test_cycle_is_the_relative_l1_by_hand():
    hu, xrays, geometry = scene()
    other = hu + 50 * torch.randn(hu.shape, generator=seeded(1)).abs()
    projected = project(hu_to_mu(other), geometry)
    by_hand = [
        ((projected[b, v] - xrays[b, v]).abs().sum() / xrays[b, v].abs().sum()).item()
        for b in range(2)
        for v in range(2)
    ]
    assert drr_cycle_error(other, xrays, geometry).item() == pytest.approx(
        sum(by_hand) / 4, rel=1e-5
    )
    assert drr_cycle_error(hu, xrays, geometry) < 1e-6


def test_cycle_scales_with_density_and_not_with_the_beam():
    hu, _, geometry = scene()
    for energy in (40.0, 60.0, 120.0):
        xrays = project(hu_to_mu(hu, energy), geometry)
        assert drr_cycle_error(
            hu + 0.2 * (hu + 1000), xrays, geometry, energy
        ).item() == pytest.approx(0.2, rel=1e-4)


def test_cycle_does_not_penalise_noise():
    hu, xrays, geometry = scene()
    assert drr_cycle_error(hu, xrays + 0.03, geometry, sigma=0.031) == 0
    expected = (0.02 / (xrays + 0.03).mean((-2, -1))).mean().item()
    assert drr_cycle_error(hu, xrays + 0.03, geometry, sigma=0.01).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_cycle_gradient_is_the_transpose_and_survives_vacuum():
    hu, xrays, geometry = scene(dtype=torch.float64)
    guess = (
        (hu + torch.randn(hu.shape, generator=seeded(2), dtype=torch.float64) * 20)
        .float()
        .requires_grad_()
    )
    drr_cycle_error(guess, xrays, geometry).backward()
    direction = torch.randn(hu.shape, generator=seeded(3))

    def value(step):
        return drr_cycle_error(guess.detach() + step * direction, xrays, geometry).double()

    assert ((value(0.5) - value(-0.5)) / 1.0).item() == pytest.approx(
        (guess.grad * direction).sum().item(), rel=0.05
    )
    low = torch.full_like(guess, -1500.0).requires_grad_()
    drr_cycle_error(low, xrays, geometry).backward()
    assert (low.grad.abs() > 0).float().mean() > 0.9


def test_cycle_bins_fine_detectors():
    hu, _, geometry = scene(pixels=32)
    xrays = project(hu_to_mu(hu), geometry)
    coarse = F.avg_pool2d(xrays, 4)
    assert drr_cycle_error(hu + 40, xrays, geometry, most=8).item() == pytest.approx(
        drr_cycle_error(hu + 40, coarse, geometry.rebinned((8, 8))).item(), rel=1e-5
    )


def test_third_view_is_sampled_by_its_generator_and_projected_exactly():
    hu, xrays, geometry = scene()
    (a, where), (b, there), (c, elsewhere) = (
        third_view(hu, geometry, generator=seeded(s), most=12) for s in (5, 5, 6)
    )
    assert (
        torch.equal(a, b)
        and torch.equal(where.source_mm, there.source_mm)
        and not torch.equal(where.source_mm, elsewhere.source_mm)
    )
    assert (
        a.shape == (2, 1, 12, 12)
        and where.batch_shape == (2,)
        and not torch.allclose(where.azimuth_deg[0], where.azimuth_deg[1])
    )
    assert (
        torch.allclose(a, project(hu_to_mu(hu), where))
        and drr_cycle_error(hu, xrays, geometry, extra_view=(a, where)) < 1e-6
    )
    one = third_view(hu, geometry[0], generator=seeded(5))
    assert one[0].shape == (2, 1, 24, 24) and one[1].batch_shape == ()


def test_third_view_stays_on_its_band():
    _, _, geometry = scene(batch=1)
    geometry = ConeBeam.stack([geometry[0]] * 400)
    air = torch.full((400, 4, 4, 4), -1000.0)
    _, drawn = third_view(air, geometry, generator=seeded(0), tilt_deg=15.0, most=2)
    assert (
        drawn.elevation_deg.abs().max() <= 15.01
        and drawn.elevation_deg.abs().mean() == pytest.approx(7.5, abs=1)
    )
    quarters = torch.histc(drawn.azimuth_deg, 4, -180, 180)
    assert quarters.min() > 70, quarters
    assert torch.allclose(
        drawn.source_to_detector_mm, geometry.source_to_detector_mm[:, :1], rtol=1e-5
    )


def test_a_third_view_measures_the_null_space():
    from ct_nb.physics.solvers import null_component

    _, _, geometry = scene(batch=1)
    hu = torch.zeros(1, 16, 16, 16)
    # nothing falls below vacuum
    consistent = hu + 1000 * null_component(
        0.2 * torch.randn(hu.shape, generator=seeded(4)), geometry, iterations=60
    )
    xrays = project(hu_to_mu(hu), geometry)
    extra = third_view(hu, geometry, generator=seeded(7))
    apart = drr_cycle_error(consistent, *extra)
    assert apart > 5 * drr_cycle_error(consistent, xrays, geometry)
    assert drr_cycle_error(consistent, xrays, geometry, extra_view=extra).item() == pytest.approx(
        (2 * drr_cycle_error(consistent, xrays, geometry) + apart).item() / 3, rel=1e-4
    )


def test_cycle_of_the_wrong_shape_is_refused():
    hu, xrays, geometry = scene()
    with refused("xrays"):
        drr_cycle_error(hu, xrays[:, :1], geometry)
    with refused("sigma"):
        drr_cycle_error(hu, xrays, geometry, sigma=-1)


# InfoNCE


def infonce_by_hand(views, latents, temperature, patients=None):
    views, latents = (x / x.norm(dim=-1, keepdim=True) for x in (views, latents))
    total = 0.0
    batch, count = views.shape[:2]

    def allowed(b, d):
        return d == b or patients is None or patients[b] != patients[d]

    for v in range(count):
        s = [
            [float(views[b, v] @ latents[d]) / temperature for d in range(batch)]
            for b in range(batch)
        ]
        for b in range(batch):
            for row in (
                [s[b][d] for d in range(batch) if allowed(b, d)],
                [s[d][b] for d in range(batch) if allowed(b, d)],
            ):
                total += torch.tensor(row, dtype=torch.float64).logsumexp(0).item() - s[b][b]
    return total / (2 * batch * count)


@pytest.mark.parametrize("patients", [None, [0, 1, 1, 2, 0]])
def test_infonce_by_brute_force(patients):
    views = torch.randn(5, 3, 7, generator=seeded(0))
    latents = torch.randn(5, 7, generator=seeded(1))
    numbers = None if patients is None else torch.tensor(patients)
    assert cross_view_infonce(views, latents, 0.2, numbers).item() == pytest.approx(
        infonce_by_hand(views, latents, 0.2, patients), rel=1e-5
    )


def test_infonce_equals_cross_entropy_for_one_view():
    views = torch.randn(6, 1, 8, generator=seeded(2))
    latents = torch.randn(6, 8, generator=seeded(3))
    logits = F.normalize(views[:, 0], dim=-1) @ F.normalize(latents, dim=-1).T / 0.1
    own = torch.arange(6)
    assert cross_view_infonce(views, latents, 0.1).item() == pytest.approx(
        ((F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2).item(), rel=1e-5
    )


def test_infonce_of_one_is_zero_with_zero_gradients_and_of_nothing_is_finite():
    views = torch.randn(1, 2, 8, requires_grad=True)
    latents = torch.randn(1, 8, requires_grad=True)
    loss = cross_view_infonce(views, latents)
    loss.backward()
    assert loss == 0 and not views.grad.any() and not latents.grad.any()
    dead = torch.zeros(3, 2, 8, requires_grad=True)
    cross_view_infonce(dead, torch.zeros(3, 8)).backward()
    assert torch.isfinite(dead.grad).all()


def test_infonce_learns_its_temperature_and_refuses_wrong_shapes():
    temperature = torch.tensor(0.1, requires_grad=True)
    cross_view_infonce(torch.randn(4, 2, 8), torch.randn(4, 8), temperature).backward()
    assert temperature.grad.abs() > 0
    with refused("view_tokens"):
        cross_view_infonce(torch.randn(4, 8), torch.randn(4, 8))


def test_infonce_of_two_processes_is_that_of_one(tmp_path):
    "The value, and the gradient of the weights as data-parallel training averages it."
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(PROGRAM),
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    from programs.gather_tokens import loss_of, network

    model = network()
    loss = loss_of(model, slice(0, 6))
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
        for mine, theirs in zip(model.parameters(), found["gradients"]):
            assert torch.allclose(mine.grad, theirs, atol=1e-6)


# hidden patches and the teacher


@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (2, 3, 2, 32, 48)])
def test_masks_hide_whole_patches_exactly_as_many_and_channels_together(shape):
    images = torch.randn(shape, generator=seeded(0))
    hidden, mask = mask_patches(images, 0.6, 8, seeded(1))
    patches = F.max_pool2d(mask.flatten(0, -3).float(), 8)
    assert mask.shape == (2, 3, *(1,) * (len(shape) - 4), 32, 48) and torch.equal(
        patches, F.avg_pool2d(mask.flatten(0, -3).float(), 8)
    )
    assert (patches.sum((-2, -1)) == round(0.6 * 24)).all() and len(
        {tuple(p.flatten().tolist()) for p in patches}
    ) == 6
    full = mask.expand_as(images)
    assert torch.equal(hidden[~full], images[~full])
    for b in range(2):
        assert (
            torch.allclose(
                hidden[b, 0][full[b, 0]].mean(), images[b, 0][~full[b, 0]].mean(), atol=1e-5
            )
            or len(shape) == 5
        )
    assert torch.equal(mask, mask_patches(images, 0.6, 8, seeded(1))[1])


def test_masks_at_their_ends():
    images = torch.randn(1, 1, 16, 16)
    nothing, mask = mask_patches(images, 0.0, 8)
    assert (
        torch.equal(nothing, images)
        and not mask.any()
        and masked_error(images + 1, images, mask) == 0
    )
    # something is always left to see
    assert mask_patches(images, 0.99, 8)[1].float().mean() == 0.75
    with refused("images"):
        mask_patches(images, 0.5, 5)
    with refused("share"):
        mask_patches(images, 1.0, 8)
    with refused("predicted"):
        masked_error(images, images[..., :8], mask)


def test_masked_error_by_hand_and_blind_to_what_is_seen():
    truth = torch.randn(2, 2, 3, 16, 16, generator=seeded(0))
    _, mask = mask_patches(truth, 0.5, 4, seeded(1))
    predicted = torch.randn(truth.shape, generator=seeded(2)).requires_grad_()
    error = masked_error(predicted, truth, mask)
    error.backward()
    full = mask.expand_as(truth)
    assert error.item() == pytest.approx((predicted - truth)[full].square().mean().item(), rel=1e-5)
    assert not predicted.grad[~full].any() and predicted.grad[full].any()


def test_distillation_by_hand_and_without_a_gradient_to_the_teacher():
    student, teacher = (
        [
            torch.randn(2, c, n, n, generator=seeded(c + k)).requires_grad_()
            for c, n in ((4, 6), (8, 3))
        ]
        for k in (0, 100)
    )
    by_hand = (
        sum(
            (1 - (a / a.norm(dim=1, keepdim=True) * b / b.norm(dim=1, keepdim=True)).sum(1)).mean()
            for a, b in zip(student, teacher)
        )
        / 2
    )
    error = distillation_error(student, teacher)
    error.backward()
    assert (
        error.item() == pytest.approx(by_hand.item(), rel=1e-5)
        and all(t.grad is None for t in teacher)
        and all(s.grad is not None for s in student)
    )
    assert distillation_error(5 * teacher[0].detach(), teacher[0]) < 1e-6
    with refused("student"):
        distillation_error(student, teacher[:1])


# the adversarial loss


def test_hinge_agrees_with_monai_on_bounded_scores():
    "MONAI sends scores through tanh first; on these its hinge is ours."
    from monai.losses import PatchAdversarialLoss

    peer = PatchAdversarialLoss(criterion="hinge")
    real = torch.randn(2, 1, 4, 4, 4, generator=seeded(0))
    predicted = torch.randn(2, 1, 4, 4, 4, generator=seeded(1))
    theirs = peer(real, target_is_real=True, for_discriminator=True) + peer(
        predicted, target_is_real=False, for_discriminator=True
    )
    assert discriminator_hinge(real.tanh(), predicted.tanh()).item() == pytest.approx(
        theirs.item(), rel=1e-5
    )


def test_monai_has_no_gradient_where_the_discriminator_is_wrong():
    "Why the hinge losses are ours: MONAI applies a tanh to the scores."
    from monai.losses import PatchAdversarialLoss

    scores = torch.full((1, 1, 1, 1, 1), -9.0, requires_grad=True)
    theirs = PatchAdversarialLoss(criterion="hinge")(
        scores, target_is_real=True, for_discriminator=True
    )
    ours = discriminator_hinge(scores, torch.full_like(scores, -9.0))
    gradients = [torch.autograd.grad(loss, scores)[0].item() for loss in (theirs, ours)]
    assert abs(gradients[0]) < 1e-6 and gradients[1] == -1


def test_hinge_stops_at_the_margin_and_the_generator_does_not():
    scores = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
    assert torch.autograd.grad(discriminator_hinge(scores, torch.full((1,), -9.0)), scores)[
        0
    ].tolist() == [-0.25, -0.25, -0.25, 0]
    assert torch.autograd.grad(discriminator_hinge(torch.full((1,), 9.0), scores), scores)[
        0
    ].tolist() == [0, 0.25, 0.25, 0.25]
    assert torch.autograd.grad(generator_hinge(scores), scores)[0].tolist() == [-0.25] * 4


@pytest.mark.parametrize("layers, patch", [(1, 7), (2, 15), (3, 31)])
def test_a_score_depends_on_its_patch_alone(layers, patch):
    torch.manual_seed(0)
    discriminator = patch_discriminator(4, layers).eval()
    x = torch.rand(1, 1, 48, 48, 48, requires_grad=True)
    middle = 24 // 2**layers
    discriminator(x)[-1][0, 0, middle, middle, middle].backward()
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        assert (x.grad[0, 0].abs().amax(others) > 0).sum() == patch


def test_weights_have_unit_spectral_norm():
    torch.manual_seed(0)
    discriminator = patch_discriminator(4, 2)
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        for _ in range(60):
            discriminator(x)
    layers = [m for m in discriminator.modules() if isinstance(m, torch.nn.Conv3d)]
    assert len(layers) == 4
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item()
        assert norm == pytest.approx(1, abs=0.01)


def test_the_discriminator_takes_thin_stacks_and_no_batch_statistics():
    torch.manual_seed(0)
    discriminator = patch_discriminator(4, 2)
    x = torch.rand(3, 1, 4, 16, 16)
    with torch.no_grad():
        discriminator.eval()
        assert torch.allclose(discriminator(x)[-1][1:2], discriminator(x[1:2])[-1], atol=1e-6)
    with refused("layers"):
        patch_discriminator(4, 0)


def losses_of(adversary, prediction, step=0, **changes):
    truth = torch.rand(prediction.shape, generator=seeded(9)) * 500 - 500
    return adversary.losses(prediction, truth, CHEST, step, **changes)


def test_one_backward_pass_is_two_separate_ones():
    "The sum of both losses has, on each side, the gradient that alternating training would take."
    torch.manual_seed(0)
    adversary = Adversary(4, 2).eval()
    prediction = (torch.randn(2, 16, 16, 16) * 300).requires_grad_()
    losses = losses_of(adversary, prediction)
    (losses.generator + losses.discriminator).backward()
    separate = prediction.detach().clone().requires_grad_()
    network = -adversary.discriminator(to_window(separate, CHEST)[:, None])[-1].mean()
    assert torch.allclose(
        prediction.grad, torch.autograd.grad(network, separate)[0], rtol=1e-4, atol=1e-12
    )
    losses = losses_of(adversary, prediction.detach())
    for parameter, gradient in zip(
        adversary.parameters(),
        torch.autograd.grad(losses.discriminator, list(adversary.parameters())),
    ):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)


def test_late_start_and_ramp():
    torch.manual_seed(0)
    adversary = Adversary(4, 2, start_step=5, ramp_steps=4).eval()
    prediction = torch.randn(1, 16, 16, 16, requires_grad=True)
    before = losses_of(adversary, prediction, 4)
    assert (
        before.generator == 0
        and before.discriminator == 0
        and not before.generator.requires_grad
        and before.figures == {}
    )
    full = losses_of(adversary, prediction, 100).generator
    assert [
        round((losses_of(adversary, prediction, s).generator / full).item(), 5)
        for s in (5, 6, 7, 9)
    ] == [0, 0.25, 0.5, 1]
    assert losses_of(
        adversary, prediction, 5
    ).discriminator.requires_grad, "the discriminator learns from the first step on"
    assert Adversary(4, 2, start_step=5).share(5) == 1


def test_adaptive_weight_balances_and_is_bounded():
    torch.manual_seed(0)
    adversary = Adversary(4, 2).eval()
    prediction = (torch.randn(1, 16, 16, 16) * 300).requires_grad_()
    reconstruction = (to_window(prediction, CHEST) - 0.4).abs().mean()
    losses = losses_of(adversary, prediction, reconstruction=reconstruction)
    norms = [
        torch.autograd.grad(loss, prediction, retain_graph=True)[0].norm().item()
        for loss in (losses.generator, reconstruction)
    ]
    assert (
        norms[0] == pytest.approx(norms[1], rel=1e-4)
        and not torch.tensor(losses.figures["adversary_ratio"]).isnan()
    )
    bounded = Adversary(4, 2, largest=1e-3)
    assert losses_of(bounded, prediction, reconstruction=reconstruction).figures[
        "adversary_ratio"
    ] == pytest.approx(1e-3)
    x = torch.ones(1, 3, requires_grad=True)
    assert (
        adaptive_weight(x.sum(), 0 * x.sum(), x, largest=7.0) == 7
        and adaptive_weight(0 * x.sum(), x.sum(), x) == 0
    )
    assert adaptive_weight(1e-12 * x.sum(), 2e-12 * x.sum(), x).item() == pytest.approx(
        0.5
    ), "no constant in the denominator"


def test_cases_are_weighed_one_by_one():
    torch.manual_seed(0)
    adversary = Adversary(4, 2).eval()
    prediction = torch.randn(2, 16, 16, 16) * 300
    truth = prediction + torch.randn(2, 16, 16, 16) * torch.tensor([100.0, 1.0]).view(2, 1, 1, 1)

    def gradient(cases):
        x = prediction[cases].clone().requires_grad_()
        reconstruction = (to_window(x, CHEST) - to_window(truth[cases], CHEST)).square().mean()
        losses = adversary.losses(x, truth[cases], CHEST, 0, reconstruction)
        return torch.autograd.grad(losses.generator, x)[0]

    halves = torch.cat([gradient(slice(0, 1)), gradient(slice(1, 2))]) / 2
    assert torch.allclose(gradient(slice(0, 2)), halves, rtol=1e-4, atol=1e-12)


def test_spectral_norms_are_estimated_once_a_step():
    torch.manual_seed(0)
    adversary = Adversary(4, 2)
    prediction = torch.randn(1, 16, 16, 16) * 300

    def scores(step):
        return losses_of(adversary, prediction, step).discriminator.item()

    assert scores(1) == scores(1) != scores(2)


def test_a_discriminator_learns_and_can_be_saved(tmp_path):
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    adversary = Adversary(4, 2)
    optimizer = torch.optim.Adam(adversary.parameters(), lr=1e-2)
    history = []
    for step in range(40):
        rough = torch.randn(4, 16, 16, 16) * 800
        losses = adversary.losses(rough / 4, rough, CHEST, step)
        optimizer.zero_grad(), losses.discriminator.backward(), optimizer.step()
        history.append(losses.discriminator.item())
    assert history[-1] < 0.8 * history[0], history
    save_file(adversary.state_dict(), tmp_path / "discriminator.safetensors")
    again = Adversary(4, 2)
    again.load_state_dict(load_file(tmp_path / "discriminator.safetensors"))
    x = torch.rand(1, 1, 16, 16, 16)
    assert torch.equal(adversary.eval().frozen(x), again.eval().frozen(x))


# the structure


def test_structure_equals_a_convolution_and_keeps_its_precision():
    from ct_nb.training.losses import _gaussian_blur, structure_error

    x = torch.randn(2, 14, 16, 18, generator=seeded(0), dtype=torch.float64)
    taps = torch.arange(11.0, dtype=torch.float64) - 5
    kernel = torch.exp(-0.5 * (taps / 1.5) ** 2)
    kernel = torch.einsum("i,j,k->ijk", *[kernel / kernel.sum()] * 3)
    assert torch.allclose(
        _gaussian_blur(x), F.conv3d(x[:, None], kernel[None, None])[:, 0], atol=1e-7
    )
    a, b = (torch.rand(1, 16, 16, 16, generator=seeded(k)) * 100 for k in (1, 2))
    plain = structure_error(a, b, CHEST)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert structure_error(a, b, CHEST) == plain
