"""The network, the regressor and the diffusion model against their formulas; what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ct_nb.layers.diffusion import DiffusionConfig
from ct_nb.slices import models as module
from ct_nb.slices.consistency import back_projection, interpolate_stack
from ct_nb.slices.models import (
    SliceDiffusion,
    SliceDiffusionConfig,
    SliceRegressor,
    SliceRegressorConfig,
    thick_neighbours,
)
from ct_nb.slices.network import NEIGHBOURS, SliceNetwork, SliceNetworkConfig, slice_positions
from ct_nb.slices.slice_profile import (
    SliceAxis,
    SliceProfile,
    average_slices,
    collate_stacks,
    slice_profile_matrix,
    thin_axis,
)
from ct_nb.slices.vae import SliceVAE

THICK, PROFILE = SliceAxis(4.0, 5.0, 3), SliceProfile(5.0)
THIN = thin_axis(THICK, 1.25)
MIXED = 0  # a seed that drops some conditions of three, not all
SMOKE = SliceNetworkConfig.preset("smoke")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def hu(seed, *shape):
    return 1500 * torch.rand(*shape, generator=seeded(seed)) - 900


def talking(model, seed=0):
    "With a last layer and modulations that are not zero."
    for name, p in model.named_parameters():
        if name.endswith(("last.weight", "modulation.weight")):
            p.data.normal_(0, 0.1, generator=seeded(seed))
    return model.eval()


def network(config=SMOKE, inputs=3, outputs=2, **settings):
    torch.manual_seed(0)
    return talking(SliceNetwork(config, inputs, outputs, **settings))


def regressor(**settings):
    torch.manual_seed(0)
    return talking(SliceRegressor(replace(SliceRegressorConfig.preset("smoke"), **settings)))


def diffusion(**settings):
    torch.manual_seed(0)
    config = replace(SliceDiffusionConfig.preset("smoke"), **settings)
    vae = SliceVAE(config.vae)
    for p in vae.parameters():
        p.data.add_(0.02 * random(1, *p.shape))
    model = talking(SliceDiffusion(config, vae))
    model.residual_scale.fill_(3.0)
    return model


# places


def test_places_by_hand():
    places = slice_positions(THICK, THIN, PROFILE, 2)
    assert places.features.shape == (2, 12, 7) and places.weights.shape == (2, 12, 3)
    for d, z in enumerate(THIN.positions_mm):
        place = (z - 4) / 5
        below = int(place // 1)
        assert places.place[1, d] == pytest.approx(place, abs=1e-6)
        assert (
            places.features[1, d, 0] == pytest.approx(place - below, abs=1e-5)
            and 0 <= places.features[1, d, 0] < 1
        )
        assert places.neighbours[1, d].tolist() == [min(max(below + n, 0), 2) for n in NEIGHBOURS]
        assert places.features[1, d, 3] == pytest.approx(
            min(place, 0) + max(place - 2, 0), abs=1e-5
        )
    assert torch.allclose(
        places.features[0, :, 4:],
        torch.tensor([0.0, 0.0, 1.25]).log2().nan_to_num(neginf=0.0),
        atol=1e-6,
    )
    wide = slice_positions(THICK, THIN, SliceProfile(7.5), 1)
    assert wide.features[0, 0, 5] == pytest.approx(0.585, abs=1e-3)


def test_slices_that_lie_on_a_centre_are_on_it():
    for first in (0.0, 0.1, -33.7, 1234.567):  # sums of decimal fractions round
        thick = SliceAxis(first + 1.2, 3.0, 40)
        t = slice_positions(thick, SliceAxis(first, 0.6, 200), PROFILE, 1).features[0, 2::5, 0]
        assert t.abs().max() < 1e-3


def test_a_list_is_one_by_one_and_shorter_cases_go_on():
    both = [SliceAxis(4.0, 5.0, 3), SliceAxis(0.5, 4.0, 3)]
    fine = [thin_axis(axis, 1.25) for axis in both]
    assert [axis.count for axis in fine] == [12, 10]
    places = slice_positions(both, fine, [PROFILE, SliceProfile(4.0)], 2)
    for k, profile in enumerate((PROFILE, SliceProfile(4.0))):
        alone = slice_positions(both[k], fine[k], profile, 1)
        for a, b in zip(places, alone):
            assert torch.allclose(a[k, : fine[k].count], b[0])
    assert places.place.shape == (2, 12) and torch.allclose(
        places.place[1].diff(), torch.full((11,), 1.25 / 4), atol=1e-5
    )


def test_around_gathers_the_neighbours():
    places = slice_positions(THICK, THIN, PROFILE, 2)
    x = random(0, 2, 5, 3, 4, 2)
    found = thick_neighbours(x, places)
    assert found.shape == (2, 20, 12, 4, 2)
    for n in range(4):
        for d in range(12):
            assert torch.equal(found[1, 5 * n : 5 * n + 5, d], x[1, :, places.neighbours[1, d, n]])


# the network


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (12, 16, 16), (13, 9, 14)])
@pytest.mark.parametrize("halvings", [0, 1, 2])
def test_any_size_by_repeating_and_cutting(shape, halvings):
    config = SliceNetworkConfig((4, 8, 8), depth_halvings=halvings, heads=2, features=8)
    net, axis = network(config), SliceAxis(0.0, 1.25, shape[0])
    x = random(0, 1, 3, *shape)
    assert net(x, slice_positions(THICK, axis, PROFILE, 1)).shape == (1, 2, *shape)
    assert net(x, slice_positions(THICK, axis, PROFILE, 1)).std() > 0
    more = [-n % 4 for n in shape[1:]]
    wide = F.pad(x, (0, more[1], 0, more[0], 0, 0), mode="replicate")
    assert torch.allclose(
        net(wide, slice_positions(THICK, axis, PROFILE, 1))[..., : shape[1], : shape[2]],
        net(x, slice_positions(THICK, axis, PROFILE, 1)),
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "config", [SMOKE, SliceNetworkConfig((4, 8, 8), blocks=2, heads=2, features=8)]
)
def test_nothing_beyond_the_halo_matters_and_what_is_nearer_does(config):
    net = network(config).double()
    places = slice_positions(THICK, SliceAxis(0.0, 2.5, 5), PROFILE, 1)
    step = config.plane_step
    places = places._replace(place=places.place.double(), features=places.features.double())
    side = 2 * config.halo + 3 * step
    x = random(0, 1, 3, 5, 2 * step, side).double()
    y = x.clone()
    y[..., 0] += 100.0
    change = (net(x, places) - net(y, places)).abs().amax((0, 1, 2, 3))
    assert change[config.halo + step :].max() < 1e-12 and change[1] > 1e-6
    reached = int(change.gt(1e-12).nonzero().max())
    assert config.halo / 2 < reached <= config.halo  # neither too small nor needlessly large


def test_every_slice_hears_of_every_other_and_of_its_place():
    net = network()
    places = slice_positions(THICK, THIN, PROFILE, 1)
    x = random(0, 1, 3, 12, 4, 4)
    y = x.clone()
    y[:, :, 0] += 3
    assert (net(x, places) - net(y, places))[:, :, -1].abs().max() > 1e-7
    other = slice_positions(THICK, THIN, SliceProfile(10.0), 1)
    assert (net(x, places) - net(x, other)).abs().max() > 1e-4
    moved = slice_positions(THICK, SliceAxis(THIN.first_mm + 1, 1.25, 12), PROFILE, 1)
    assert (net(x, places) - net(x, moved)).abs().max() > 1e-4


def test_cases_of_a_batch_do_not_meet():
    both = [SliceAxis(4.0, 5.0, 3), SliceAxis(0.5, 4.0, 3)]
    net = network(timed=True)
    x = random(0, 2, 3, 12, 8, 8)
    fine = SliceAxis(0.0, 1.25, 12)
    together = net(x, slice_positions(both, fine, PROFILE, 2), torch.tensor([0.2, 0.9]))
    for k, when in enumerate((0.2, 0.9)):
        assert torch.allclose(
            together[k : k + 1],
            net(x[k : k + 1], slice_positions(both[k], fine, PROFILE, 1), torch.tensor([when])),
            atol=1e-5,
        )
    assert (
        together[1:] - net(x[1:], slice_positions(both[1], fine, PROFILE, 1), torch.tensor([0.2]))
    ).abs().max() > 1e-5


def test_recomputing_gives_the_same_gradients():
    grads = []
    places = slice_positions(THICK, THIN, PROFILE, 1)
    x = random(0, 1, 3, 12, 8, 8)
    for recompute in (False, True):
        net = network(replace(SMOKE, recompute=recompute)).train()
        net(x, places).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads))


def test_presets_grow_and_settings_survive_json():
    import json

    with torch.device("meta"):
        sizes = [
            sum(
                p.numel() for p in SliceNetwork(SliceNetworkConfig.preset(name), 20, 4).parameters()
            )
            for name in ("smoke", "cpu", "gpu", "paper")
        ]
    assert sizes == sorted(sizes) and sizes[0] < 1e5 < sizes[1] < 1e6
    for kind in (SliceNetworkConfig, SliceRegressorConfig, SliceDiffusionConfig):
        for name in ("smoke", "cpu", "gpu", "paper"):
            config = kind.preset(name)
            assert kind.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# the regressor


def started(thick, start):
    return (
        back_projection(thick, THICK, THIN, slice_profile_matrix(THIN, THICK, PROFILE))
        if start == "back-projection"
        else interpolate_stack(thick, THICK, THIN, start)
    )


@pytest.mark.parametrize("start", ["back-projection", "nearest", "linear", "cubic"])
def test_untrained_it_is_its_start(start):
    torch.manual_seed(0)
    # beyond the window, too
    model = SliceRegressor(replace(SliceRegressorConfig.preset("smoke"), start=start))
    thick = 3 * hu(0, 2, 3, 7, 10)
    found = model(thick, THICK, THIN, PROFILE)
    assert (
        torch.equal(found, started(thick, start))
        if start != "back-projection"
        else torch.allclose(found, started(thick, start), atol=2e-3)
    )
    assert torch.equal(
        found, module.along_z(slice_positions(THICK, THIN, PROFILE, 2, start).weights, thick)
    )
    assert (regressor(start=start)(thick, THICK, THIN, PROFILE) - found).abs().max() > 1


@pytest.mark.parametrize(
    "spacing,convention", [(1.0, "slabs"), (0.7, "centres"), (5.0, "slabs"), (8.0, "slabs")]
)
@pytest.mark.parametrize("size", [(1, 1), (7, 10)])
def test_any_spacing_and_size_and_consistency(spacing, convention, size):
    model = regressor()
    thick = hu(0, 2, 3, *size)
    fine = thin_axis(THICK, spacing, convention)
    with torch.no_grad():
        loose, exact = (model(thick, THICK, fine, PROFILE, consistent=c) for c in (False, True))
    matrix = slice_profile_matrix(fine, THICK, PROFILE)
    assert loose.shape == exact.shape == (2, fine.count, *size)
    if fine.count >= 3:
        assert (
            (average_slices(exact.double(), matrix) - thick).abs().max()
            < 1e-2
            < (average_slices(loose, matrix) - thick).abs().max()
        )
    with torch.no_grad():
        calm = model(thick, THICK, fine, PROFILE, consistent=True, noise_hu=1.0)
    if fine.count >= 3:
        assert torch.allclose(
            (average_slices(calm.double(), matrix) - thick).square().mean((1, 2, 3)).sqrt(),
            torch.ones(2).double(),
            rtol=1e-2,
        )


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_tiles_are_the_whole(fold, monkeypatch):
    config = SliceNetworkConfig((4, 8), heads=2, features=8)
    model = regressor(fold=fold, network=config)
    thick = hu(0, 1, 3, 50, 67)
    with torch.no_grad():
        whole = model(thick, THICK, THIN, PROFILE)
        tiled = model(thick, THICK, THIN, PROFILE, tile=12)
    assert (
        torch.allclose(whole, tiled, atol=2e-2)
        and (whole - interpolate_stack(thick, THICK, THIN, "cubic")).abs().max() > 5
    )
    # a halo too small must show
    monkeypatch.setattr(SliceNetworkConfig, "halo", property(lambda self: 2))
    with torch.no_grad():
        assert not torch.allclose(whole, model(thick, THICK, THIN, PROFILE, tile=12), atol=2e-2)


def test_batches_of_the_data_set_go_in():
    items = []
    for k, axis in enumerate((SliceAxis(4.0, 5.0, 3), SliceAxis(0.5, 4.0, 3))):
        fine = thin_axis(axis, 1.25)
        profile = SliceProfile(axis.spacing_mm)
        matrix = torch.from_numpy(slice_profile_matrix(fine, axis, profile))
        thin = hu(k, fine.count, 8, 8)
        items.append(
            {
                "id": str(k),
                "thin": thin,
                "thick": average_slices(thin, matrix),
                "matrix": matrix,
                "thin_axis": fine,
                "thick_axis": axis,
                "profile": profile,
            }
        )
    batch, model = collate_stacks(items), regressor()
    given = (batch["thick"], batch["thick_axis"], batch["thin_axis"], batch["profile"])
    loss, figures = model.loss(batch["thin"], *given, mask=batch["mask"])
    with torch.no_grad():
        found = [
            model(item["thick"][None], item["thick_axis"], item["thin_axis"], item["profile"])[0]
            for item in items
        ]
        # a shorter case is continued before the network, so its last slices see what follows; all
        # but these agree
        together = model(*given)
        assert torch.allclose(together[0], found[0], atol=1e-2)

        def error(answer):
            "Mean over cases, however many slices each has."
            squares = [
                (answer[k, : len(item["thin"])] - item["thin"].clamp(-1024, 1024)).square().mean()
                for k, item in enumerate(items)
            ]
            return torch.stack(squares).mean().item()

        free = error(together)
        consistent = error(model(*given, consistent=True))
    assert loss.item() == pytest.approx(
        (consistent + 0.1 * free) / 102.4**2, rel=1e-4
    ) and figures["rms_hu"] == pytest.approx(consistent**0.5, rel=1e-4)
    moved = batch["thin"].clone()
    moved[1, 10:] += 1000  # padding
    assert model.loss(moved, *given, mask=batch["mask"])[0].item() == pytest.approx(
        loss.item(), rel=1e-6
    )
    assert model.loss(moved, *given)[0].item() > 1.05 * loss.item()
    with torch.no_grad():
        exact = model(*given, consistent=True)
    for k, item in enumerate(items):
        assert (
            average_slices(exact[k, : len(item["thin"])].double(), item["matrix"]) - item["thick"]
        ).abs().max() < 1e-2


def test_what_the_thick_slices_say_is_hardly_learned():
    "A change that consistency takes away costs a tenth of one of the same size that it leaves."
    axis, profile = SliceAxis(2.0, 5.0, 4), SliceProfile(5.0)
    fine = thin_axis(axis, 1.0)
    matrix = torch.from_numpy(slice_profile_matrix(fine, axis, profile))
    truth = hu(7, 1, fine.count, 8, 8).clamp(-900, 900)
    thick, model = average_slices(truth, matrix), regressor()
    seen = torch.ones(fine.count)  # the same everywhere
    unseen = torch.tensor([2.0, -1, -1, -1, 1] * 4)
    unseen *= (seen.square().mean() / unseen.square().mean()).sqrt()
    assert (matrix.float() @ unseen).abs().max() < 1e-5
    losses = []
    for change in (seen, unseen):
        model.forward = lambda *_, change=change, **__: truth + 30 * change[None, :, None, None]
        losses.append(model.loss(truth, thick, axis, fine, profile)[0].item())
    assert (
        losses[1] == pytest.approx(1.1 * (30 / 102.4) ** 2, rel=1e-3)
        and losses[0] < 0.11 * (30 / 102.4) ** 2
    )


def test_it_learns():
    thin = (
        torch.sigmoid(4 * random(0, 4, 1, 8, 8) + (torch.arange(12.0) - 6).view(1, 12, 1, 1)) * 1000
        - 500
    )
    thick = average_slices(thin, slice_profile_matrix(THIN, THICK, PROFILE))
    torch.manual_seed(0)
    model = SliceRegressor(SliceRegressorConfig.preset("smoke"))
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        loss, figures = model.loss(thin, thick, THICK, THIN, PROFILE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(figures["rms_hu"])
    assert losses[-1] < 0.9 * losses[0]


# the diffusion model


def knows(model, z0):
    "The network replaced by one that knows z0, and says it in the terms of its prediction."
    said = {
        "v": lambda a, s, z_t: (a * z_t - z0) / s,
        "epsilon": lambda a, s, z_t: (z_t - a * z0) / s,
        "x0": lambda a, s, z_t: z0,
    }[model.config.diffusion.prediction]

    def forward(x, places, time):
        at = (time * (model.config.diffusion.steps - 1)).round().long()
        return said(*model.diffusion._scales(at, x), x[:, :4])

    model.network.forward = forward


def test_the_same_trunk_of_the_same_size():
    for name in ("cpu", "gpu"):
        with torch.device("meta"):
            counts = [
                sum(p.numel() for p in kind(config.preset(name)).network.parameters())
                for kind, config in (
                    (SliceRegressor, SliceRegressorConfig),
                    (SliceDiffusion, SliceDiffusionConfig),
                )
            ]
        assert abs(counts[1] / counts[0] - 1) < 0.1


@pytest.mark.parametrize("prediction", ["v", "epsilon", "x0"])
@pytest.mark.parametrize("steps,sampler", [(1, "ddim"), (5, "ddim"), (5, "ddpm"), (5, "dpm++")])
def test_a_network_that_knows_the_residual_gives_it_back(steps, sampler, prediction):
    model = diffusion(diffusion=DiffusionConfig(clamp=10.0, prediction=prediction))
    thin = hu(0, 2, 12, 10, 19)
    thick = average_slices(thin, slice_profile_matrix(THIN, THICK, PROFILE))
    _, start, latent, _ = model.conditioned(thick, THICK, THIN, PROFILE)
    z0 = model.residual(thin, latent)
    knows(model, z0)
    found = model.sample(
        thick,
        THICK,
        THIN,
        PROFILE,
        steps=steps,
        sampler=sampler,
        consistent=False,
        generator=seeded(),
    )
    assert (
        torch.allclose(found, model.thin_from(z0, start, latent), atol=0.5)
        and (found - start).abs().max() > 5
    )

    def window(x):
        return model.window.to_network(x)[:, None]

    direct = (
        start
        + 1024
        * (
            model.vae.decode(model.vae.encode(window(thin)).mean, (10, 19))
            - model.vae.decode(latent, (10, 19))
        )[:, 0]
    )
    assert torch.allclose(model.thin_from(z0, start, latent), direct, atol=0.1)
    # and nothing is left to learn
    assert model.loss(thin, thick, THICK, THIN, PROFILE, generator=seeded())[0].item() < 1e-6


def test_the_loss_by_hand_and_its_generator():
    model = diffusion(diffusion=DiffusionConfig(clamp=10.0, condition_dropout=0.5))
    thin = hu(0, 3, 12, 8, 8)
    thick = average_slices(thin, slice_profile_matrix(THIN, THICK, PROFILE))
    before = torch.get_rng_state()
    with torch.no_grad():
        loss, figures = model.loss(thin, thick, THICK, THIN, PROFILE, generator=seeded(MIXED))
    assert torch.equal(torch.get_rng_state(), before)
    g = seeded(MIXED)
    with torch.no_grad():
        places, _, latent, condition = model.conditioned(thick, THICK, THIN, PROFILE)
        z0 = (model.vae.encode(model.window.to_network(thin)[:, None]).mean - latent) * 3.0
        dropped = torch.rand(3, generator=g) < 0.5
        step = model.diffusion.draw_steps(3, g)
        noise = torch.randn(z0.shape, generator=g)
        output = model.network(
            torch.cat(
                [model.diffusion.noised(z0, noise, step), condition * ~dropped.view(3, 1, 1, 1, 1)],
                1,
            ),
            places,
            step / 249,
        )
        by_hand = (
            model.diffusion.weight(step).view(3, 1, 1, 1, 1)
            * (output - model.diffusion.target(z0, noise, step)) ** 2
        ).mean()
        assert float(loss) == pytest.approx(float(by_hand), rel=1e-4) and figures[
            "diffusion"
        ] == float(loss)
        assert float(
            model.loss(thin, thick, THICK, THIN, PROFILE, generator=seeded(MIXED + 1))[0]
        ) != pytest.approx(float(loss), rel=1e-3)
        mask = torch.ones(3, 12, dtype=torch.bool)
        assert float(
            model.loss(thin, thick, THICK, THIN, PROFILE, mask, generator=seeded(MIXED))[0]
        ) == pytest.approx(float(loss), rel=1e-5)
        mask[:, 6:] = False
        assert float(
            model.loss(thin, thick, THICK, THIN, PROFILE, mask, generator=seeded(MIXED))[0]
        ) != pytest.approx(float(loss), rel=1e-4)
    assert dropped.any() and not dropped.all()


def test_the_condition_is_the_start_and_what_lies_around():
    model, thick = diffusion(), hu(0, 1, 3, 8, 8)
    fine = thin_axis(THICK, 1.0)  # the middle of each five lies on a thick slice
    places, start, latent, condition = model.conditioned(thick, THICK, fine, PROFILE)
    i = model.vae.to_normal(latent)
    assert (
        torch.equal(condition[:, :4], i)
        and torch.equal(condition[:, -1:], torch.ones_like(i[:, :1]))
        and condition.shape[1] == 21
    )
    for n in range(4):
        for d in range(15):
            assert torch.allclose(
                condition[0, 4 + 4 * n : 8 + 4 * n, d],
                i[0, :, 2 + 5 * int(places.neighbours[0, d, n])] - i[0, :, d],
                atol=1e-6,
            )


def test_draws():
    model = diffusion()
    thick = hu(0, 2, 3, 10, 13)
    before = torch.get_rng_state()

    def draw(seed, **settings):
        return model.sample(
            thick, THICK, THIN, PROFILE, steps=3, generator=seeded(seed), **settings
        )

    one = draw(0)
    assert (
        torch.equal(one, draw(0))
        and not torch.equal(one, draw(1))
        and torch.equal(torch.get_rng_state(), before)
    )
    assert (
        (average_slices(one.double(), slice_profile_matrix(THIN, THICK, PROFILE)) - thick)
        .abs()
        .max()
        < 1e-2
        < (
            average_slices(draw(0, consistent=False), slice_profile_matrix(THIN, THICK, PROFILE))
            - thick
        )
        .abs()
        .max()
    )
    assert not torch.equal(draw(0, guidance=3.0), one) and not torch.equal(
        draw(0, sampler="ddpm"), one
    )
    begin = random(5, 2, 4, 12, 2, 2)
    assert torch.equal(draw(0, noise=begin), draw(1, noise=begin)) and not torch.equal(
        draw(0, noise=begin), draw(0, noise=begin.flip(2))
    )


def test_no_residual_is_the_start_to_the_last_bit():
    model, thick = diffusion(), 3 * hu(0, 1, 3, 9, 8)
    _, start, latent, _ = model.conditioned(thick, THICK, THIN, PROFILE)
    assert torch.equal(model.thin_from(torch.zeros_like(latent), start, latent), start)
    assert torch.allclose(start, started(thick, "back-projection"), atol=2e-3)


def test_the_vae_stays_and_travels_with_the_weights():
    model, thin = diffusion().train(), hu(0, 2, 12, 8, 8)
    thick = average_slices(thin, slice_profile_matrix(THIN, THICK, PROFILE))
    assert not model.vae.training and model.network.training
    model.loss(thin, thick, THICK, THIN, PROFILE, generator=seeded())[0].backward()
    assert all(p.grad is None for p in model.vae.parameters()) and all(
        p.grad is not None for p in model.network.parameters()
    )
    other = SliceDiffusion(model.config)
    other.load_state_dict(model.state_dict())
    sampled = [
        m.eval().sample(thick, THICK, THIN, PROFILE, steps=2, generator=seeded())
        for m in (model, other)
    ]
    assert torch.equal(*sampled) and torch.equal(other.residual_scale, model.residual_scale)


def test_the_scale_is_measured_a_channel_its_own():
    model = diffusion()
    batches = []
    for k in range(2):
        thin = hu(k, 2, 12, 16, 16)
        batches.append(
            (
                thin,
                average_slices(thin, slice_profile_matrix(THIN, THICK, PROFILE)),
                THICK,
                THIN,
                PROFILE,
            )
        )
    model.measure_scale(batches)
    z = torch.cat([model.residual(thin, model.conditioned(*given)[2]) for thin, *given in batches])
    assert (
        torch.allclose(z.square().mean((0, 2, 3, 4)), torch.ones(4), atol=1e-4)
        and model.residual_scale.flatten().unique().numel() == 4
    )
    with pytest.raises(ValueError, match="batches"):
        model.measure_scale([])


# what is refused


def test_what_is_refused():
    model = regressor()
    draws = diffusion()
    thick = hu(0, 1, 3, 8, 8)
    bad = thick.clone()
    bad[0, 0, 0, 0] = torch.nan
    net = network()
    places = slice_positions(THICK, THIN, PROFILE, 1)
    for match, call in {
        "thick: axes": lambda: model(thick[:, :2], THICK, THIN, PROFILE),
        "thick: holds NaN": lambda: draws.sample(bad, THICK, THIN, PROFILE),
        "thick_axis": lambda: model(thick, [THICK] * 2, THIN, PROFILE),
        "thin_axis": lambda: model(thick, THICK, 1.0, PROFILE),
        "profile": lambda: model(thick, THICK, THIN, 5.0),
        "tile": lambda: model(thick, THICK, THIN, PROFILE, tile=3),
        "thin: the axes": lambda: model.loss(hu(0, 1, 3, 8, 8), thick, THICK, THIN, PROFILE),
        "thin: ": lambda: draws.loss(hu(0, 1, 3, 8, 8), thick, THICK, THIN, PROFILE),
        "x: must": lambda: net(random(0, 1, 2, 12, 4, 4), places),
        "places": lambda: net(random(0, 1, 3, 5, 4, 4), places),
        "time": lambda: net(random(0, 1, 3, 12, 4, 4), places, torch.zeros(1)),
        "preset": lambda: SliceNetworkConfig.preset("huge"),
        "channels": lambda: SliceNetworkConfig(()),
        "heads": lambda: SliceNetworkConfig((8, 9), heads=2),
        "depth_halvings": lambda: SliceNetworkConfig((8, 8), depth_halvings=2),
        "start": lambda: SliceRegressorConfig(start="spline"),
        "window": lambda: SliceRegressorConfig(window="brain"),
        "fold": lambda: SliceRegressorConfig(fold=0),
        "unknown settings": lambda: SliceRegressorConfig.from_dict({"width": 3}),
        "vae": lambda: SliceDiffusion(
            SliceDiffusionConfig.preset("cpu"), SliceVAE(SliceDiffusionConfig.preset("smoke").vae)
        ),
        "steps": lambda: draws.sample(thick, THICK, THIN, PROFILE, steps=0),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()
