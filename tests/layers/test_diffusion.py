"""The diffusion process against exact denoisers and its formulas written out; refused inputs.

Each named defect is put back to see its test fail.
"""

import math
from dataclasses import replace

import pytest
import torch
from refusals import refused

from ct_nb.layers import diffusion as module
from ct_nb.layers.diffusion import (
    PREDICTIONS,
    SAMPLERS,
    Diffusion,
    DiffusionConfig,
    cosine_alphas_cumprod,
    exact_denoiser,
    mixture_posterior_mean,
    quantile_noise,
    respaced,
)

# (weight, mean, standard deviation) of each mode
ONE = ((1.0, 0.3, 0.2),)
TWO = ((0.3, -0.6, 0.1), (0.7, 0.5, 0.15))
SHAPE = (4, 1, 16, 16, 16)
DEFAULT = Diffusion()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random(seed, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def recorded(denoise, calls):
    "The denoiser, with its inputs appended to `calls`."

    def recording(x, time):
        calls.append((x.clone(), time.clone()))
        return denoise(x, time)

    return recording


def by_hand(abars, modes, sampler, x, generator=None):
    """The three samplers written out in float64; `abars` are those of the visited steps, noisiest
    first.
    """
    older = None
    for k, now in enumerate(abars):
        x0 = mixture_posterior_mean(x, now, modes)
        if k == len(abars) - 1:
            return x0
        after = abars[k + 1]
        if sampler == "ddim":
            x = after.sqrt() * x0 + (1 - after).sqrt() * (x - now.sqrt() * x0) / (1 - now).sqrt()
        elif sampler == "ddpm":
            removed = 1 - now / after
            x = (after.sqrt() * removed * x0 + (now / after).sqrt() * (1 - after) * x) / (
                1 - now
            ) + ((1 - after) / (1 - now) * removed).sqrt() * torch.randn(
                x.shape, generator=generator, dtype=x.dtype
            )
        else:
            now = now.clamp_min(2**-24)
            level = [torch.log(v / (1 - v)) / 2 for v in (now, after)]
            guess = (
                x0
                if older is None
                else x0 + (level[1] - level[0]) / (level[0] - older[0]) / 2 * (x0 - older[1])
            )
            ratio = ((1 - after) / (1 - now)).sqrt()
            older = (level[0], x0)
            x = ratio * x + (after.sqrt() - ratio * now.sqrt()) * guess


# named defects


def test_defect_01_noise_is_recovered_by_the_inverse_of_mixing():
    x0 = random(0, 250, 3, 4).clamp(-1, 1)
    noise = random(1, 250, 3, 4)
    step = torch.arange(250)
    x = DEFAULT.noised(x0, noise, step)
    a = DEFAULT.alphas_cumprod.sqrt().view(-1, 1, 1)
    s = (1 - DEFAULT.alphas_cumprod).sqrt().view(-1, 1, 1)
    assert torch.allclose(DEFAULT.to_noise(x0, x, step), noise, atol=1e-10)
    for wrong in (x - a * x0, (x - x0) / s, (x - a * x0) / s**2, (x - a**2 * x0) / s):
        assert not torch.allclose(wrong, noise, atol=0.1)


def moved_noise_fits(monkeypatch=None):
    """Is each x_t of a DDIM run made of the x0 that `correct` returned and of the noise that fits
    this x0?
    """
    if monkeypatch is not None:

        class Stale:
            """Keeps the noise of the network's own output, as a scheduler does that clamps x0 and
            not the noise with it.
            """

            def __init__(self, abars):
                self.abars = abars

            def step(self, x0, t, x, generator=None):
                now, after = self.abars[t], self.abars[t - 1]
                noise = (x - now.sqrt() * mixture_posterior_mean(x, now, ONE)) / (1 - now).sqrt()
                return type(
                    "Result", (), {"prev_sample": after.sqrt() * x0 + (1 - after).sqrt() * noise}
                )

        monkeypatch.setattr(module, "respaced", lambda sampler, abars: Stale(abars))
    calls = []
    moved = []
    noise = quantile_noise((2, 1, 4, 4, 4))

    def correct(x0, time):
        moved.append(x0 + 0.2)
        return moved[-1]

    DEFAULT.sample(
        recorded(exact_denoiser(DEFAULT, ONE), calls), noise.shape, 10, correct=correct, noise=noise
    )
    steps = DEFAULT.sampling_steps(10)
    return all(
        torch.allclose(
            calls[k + 1][0],
            DEFAULT.noised(
                moved[k], DEFAULT.to_noise(moved[k], calls[k][0], steps[k]), steps[k + 1]
            ),
            atol=1e-10,
        )
        for k in range(9)
    )


def test_defect_01_a_sampler_recovers_the_noise_from_the_x0_it_uses(monkeypatch):
    assert moved_noise_fits()
    assert not moved_noise_fits(monkeypatch)


@pytest.mark.parametrize("steps", [7, 25, 100])
def test_defect_02_sampling_and_training_use_the_same_time(steps, monkeypatch):
    def times_of(process):
        calls = []
        process.sample(
            recorded(exact_denoiser(process, ONE), calls),
            (2, 3),
            steps,
            noise=quantile_noise((2, 3)),
        )
        return torch.stack([time for _, time in calls])

    process = Diffusion(DiffusionConfig(steps=100))
    visited = torch.tensor(process.sampling_steps(steps))
    right = process.time(visited)
    assert (
        torch.equal(times_of(process), right[:, None].expand(-1, 2))
        and right[0] == 1
        and torch.equal(right, visited / 99)
    )
    for wrong in (visited / 100, torch.arange(steps, 0, -1) / steps, torch.linspace(1, 0, steps)):
        assert steps == 100 and torch.equal(wrong, visited / 99) or not torch.equal(wrong, right)
    # there is no second way to make a time
    monkeypatch.setattr(Diffusion, "time", lambda self, step: torch.as_tensor(step) / 1000)
    assert torch.equal(times_of(process), visited[:, None].expand(-1, 2) / 1000)


def test_defect_02_another_normalisation_shows_in_the_samples():
    network = exact_denoiser(DEFAULT, ONE)

    def std(denoise):
        return DEFAULT.sample(denoise, SHAPE, 50, noise=quantile_noise(SHAPE)).std().item()

    assert abs(std(network) / 0.2 - 1) < 4 / 50
    # by another length, not at all, by another range
    for wrong in (
        lambda x, time: network(x, time * 249 / 1000),
        lambda x, time: network(x, time * 249),
        lambda x, time: network(x, time * 0.9),
    ):
        assert abs(std(wrong) / 0.2 - 1) > 4 / 50


def clamped_right(process):
    "Inside ±1.5 with a network that results anything, untouched where the answer is possible."
    prediction = torch.tensor([[-50.0, -1.4, -1.0, 0.3, 1.2, 9.0]], dtype=torch.float64)
    corrected_inputs = []

    def denoise(x, time):
        step = round(float(time) * 249)
        a, s = (f(process.alphas_cumprod[step]) for f in (torch.sqrt, lambda v: (1 - v).sqrt()))
        return (a * x - prediction) / s

    out = process.sample(
        denoise,
        (1, 6),
        8,
        correct=lambda x0, time: corrected_inputs.append(x0) or x0,
        noise=quantile_noise((1, 6)),
    )
    expected = torch.tensor([[-1.5, -1.4, -1.0, 0.3, 1.2, 1.5]], dtype=torch.float64)
    return (
        torch.allclose(out, expected, atol=1e-9)
        and len(corrected_inputs) == 8
        and all(torch.allclose(x, expected, atol=1e-9) for x in corrected_inputs)
    )


def test_defect_03_x0_is_clamped_to_the_range_of_the_data_with_a_margin():
    assert DiffusionConfig().clamp == 1.5 and clamped_right(DEFAULT)
    for wrong in (None, 1.0, 6.0):
        assert not clamped_right(Diffusion(DiffusionConfig(clamp=wrong)))


def test_defect_03_the_clamp_does_not_change_possible_values():
    wide = Diffusion(DiffusionConfig(clamp=None))
    for sampler in SAMPLERS:
        samples = [
            p.sample(
                exact_denoiser(p, TWO),
                (2, 1, 8, 8, 8),
                20,
                sampler,
                noise=quantile_noise((2, 1, 8, 8, 8)),
                generator=seeded(),
            )
            for p in (DEFAULT, wide)
        ]
        assert torch.equal(*samples)


def first_step_holds_noise(process):
    x0, noise = random(0, 2, 5).clamp(-1, 1), random(1, 2, 5)
    x = process.noised(x0, noise, 0)
    return bool(process.alphas_cumprod[0] < 1) and torch.allclose(
        process.to_noise(x0, x, 0), noise, atol=1e-9
    )


def test_defect_08_the_first_step_already_holds_noise(monkeypatch):
    for steps in (2, 10, 250, 1000, 4000):
        assert first_step_holds_noise(Diffusion(DiffusionConfig(steps=steps)))

    def from_zero(steps, zero_snr=True):
        f = (
            ((torch.arange(steps, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2)
            .cos()
            .square()
        )
        return f / f[0]

    monkeypatch.setattr(module, "cosine_alphas_cumprod", from_zero)
    assert not first_step_holds_noise(Diffusion())


# the schedule, and how errors are weighted


@pytest.mark.parametrize("steps", [2, 25, 250, 1000])
@pytest.mark.parametrize("zero", [True, False])
def test_the_schedule_is_that_of_diffusers(steps, zero):
    from diffusers import DDPMScheduler

    ours = cosine_alphas_cumprod(steps, zero)
    peer = DDPMScheduler(
        num_train_timesteps=steps, beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=zero
    ).alphas_cumprod.double()
    assert (
        torch.allclose(ours, peer, atol=2e-6)
        and (ours.diff() < 0).all()
        and (ours[-1] == 0) == zero
        and 0 < ours[0] < 1
    )


def test_the_schedule_is_the_cosine():
    u = (torch.arange(249, dtype=torch.float64) + 1) / 250

    def f(u):
        return torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    assert torch.allclose(
        cosine_alphas_cumprod(250, False)[:-1], f(u) / f(torch.zeros(())), atol=1e-9
    )
    # stretched by sqrt(abar) of the last step, 2e-4
    assert (cosine_alphas_cumprod(250)[:-1] - f(u) / f(torch.zeros(()))).abs().max() < 5e-4


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights(gamma):
    for prediction in PREDICTIONS:
        process = Diffusion(DiffusionConfig(prediction=prediction, min_snr_gamma=gamma))
        for step in (0, 40, 66, 100, 200, 248):
            snr = float(process.alphas_cumprod[step] / (1 - process.alphas_cumprod[step]))
            expected = min(snr, gamma) / {"v": snr + 1, "epsilon": snr, "x0": 1}[prediction]
            assert float(process.weight(step)) == pytest.approx(expected, rel=1e-5)
        weights = process.weight(torch.arange(250))
        assert torch.isfinite(weights).all() and (weights > 0).all() and weights[-1] == 1


def test_weights_are_the_same_for_each_prediction():
    """An error of x0 must cost the same in whatever is predicted: it moves v by 1/s and epsilon by
    a/s times as much.
    """
    x0 = random(0, 200, 6)
    error = 0.1 * random(2, 200, 6)
    noise = random(1, 200, 6)
    step = torch.arange(200)
    costs = []
    for prediction in PREDICTIONS:
        process = Diffusion(DiffusionConfig(prediction=prediction, zero_snr=False))
        x = process.noised(x0, noise, step)
        # the output of a network that predicts x0 + error for x0
        predicted = process.target(x0 + error, process.to_noise(x0 + error, x, step), step)
        assert torch.allclose(process.to_x0(predicted, x, step), x0 + error, atol=1e-8)
        costs.append(
            (
                process.weight(step).double()[:, None]
                * (predicted - process.target(x0, noise, step)).square()
            ).mean(1)
        )
    assert torch.allclose(costs[0], costs[2], rtol=1e-5) and torch.allclose(
        costs[1], costs[2], rtol=1e-5
    )


# what is predicted


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-3), (torch.bfloat16, None)]
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_inverted(prediction, dtype, tolerance):
    process = Diffusion(DiffusionConfig(prediction=prediction))
    step = torch.arange(250)
    x0 = random(0, 250, 1, 2, 3, 4).clamp(-1, 1).to(dtype)
    noise = random(1, 250, 1, 2, 3, 4).to(dtype)
    x = process.noised(x0, noise, step)
    output = process.target(x0, noise, step)
    assert (
        x.dtype
        == output.dtype
        == process.to_x0(output, x, step).dtype
        == process.to_noise(x0, x, step).dtype
        == dtype
    )
    if tolerance:
        assert torch.allclose(process.to_x0(output, x, step), x0, atol=tolerance)
    variance = process.noised(noise, noise.flip(0), step).double().var()
    assert variance == pytest.approx(1, abs=0.03)  # bfloat16 scales would miss it
    # a step for all, and one for each
    assert torch.equal(x[7:8], process.noised(x0[7:8], noise[7:8], 7))


def test_velocity_at_both_ends():
    x0, noise = random(0, 2, 5), random(1, 2, 5)
    assert torch.allclose(DEFAULT.target(x0, noise, 249), -x0) and torch.allclose(
        DEFAULT.target(x0, noise, 0), noise, atol=0.05
    )
    assert torch.allclose(DEFAULT.target(x0, noise, torch.tensor([249, 249])), -x0) and torch.equal(
        DEFAULT.noised(x0, noise, 249), noise
    )


def test_epsilon_and_zero_snr():
    with refused("zero_snr"):
        DiffusionConfig(prediction="epsilon", zero_snr=True)
    short = Diffusion(replace(DiffusionConfig(), prediction="epsilon"))
    assert 0 < short.alphas_cumprod[-1] < 1e-7 and DEFAULT.alphas_cumprod[-1] == 0
    assert (short.alphas_cumprod - DEFAULT.alphas_cumprod).abs().max() < 5e-4
    # even nonsense stays within the clamp
    blind = short.sample(lambda x, time: torch.zeros_like(x), (2, 8), 10, generator=seeded())
    assert torch.isfinite(blind).all() and blind.abs().max() <= 1.5


# exact results


@pytest.fixture(scope="module")
def samples():
    return {
        (modes, sampler, n): DEFAULT.sample(
            exact_denoiser(DEFAULT, modes),
            SHAPE,
            n,
            sampler,
            noise=quantile_noise(SHAPE),
            generator=seeded(1),
        )
        for modes in (ONE,)
        for sampler in SAMPLERS
        for n in (10, 20, 50, 100)
    }


def test_the_orders_are_those_of_theory(samples):
    def lost(sampler, n):
        return 1 - (samples[ONE, sampler, n].std() / 0.2).item()

    assert lost("ddim", 10) / lost("ddim", 100) == pytest.approx(10, rel=0.25) and lost(
        "dpm++", 10
    ) > 20 * abs(lost("dpm++", 50))


@pytest.mark.parametrize("n", [10, 100])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_are_what_they_are_written_out(samples, sampler, n):
    abars = DEFAULT.alphas_cumprod[DEFAULT.sampling_steps(n)]
    expected = by_hand(abars, ONE, sampler, quantile_noise(SHAPE), seeded(1))
    # DPM-Solver++ of diffusers works in float32
    assert (samples[ONE, sampler, n] - expected).abs().max() < (
        1e-5 if sampler == "dpm++" else 1e-9
    )


def test_the_spread_of_ddpm_in_closed_form(samples):
    for n in (10, 20, 50, 100):
        variance = 1.0
        abars = DEFAULT.alphas_cumprod[DEFAULT.sampling_steps(n)]
        for k, now in enumerate(abars):
            slope = now.sqrt() * 0.04 / (now * 0.04 + 1 - now)
            if k == n - 1:
                break
            after = abars[k + 1]
            removed = 1 - now / after
            factor = (after.sqrt() * removed * slope + (now / after).sqrt() * (1 - after)) / (
                1 - now
            )
            variance = factor**2 * variance + (1 - after) / (1 - now) * removed
        assert samples[ONE, "ddpm", n].std().item() == pytest.approx(
            float(slope * variance**0.5), rel=0.02
        )


@pytest.mark.parametrize("sampler, n", [("ddim", 10), ("ddpm", 10), ("dpm++", 10), ("ddim", 50)])
def test_three_predictions_agree(sampler, n):
    shape = (2, 1, 8, 8, 8)
    for modes in (ONE, TWO):
        results = []
        for prediction in PREDICTIONS:
            process = Diffusion(DiffusionConfig(prediction=prediction, zero_snr=False))
            results.append(
                process.sample(
                    exact_denoiser(process, modes),
                    shape,
                    n,
                    sampler,
                    noise=quantile_noise(shape),
                    generator=seeded(1),
                )
            )
        to_zero = [
            p.sample(
                exact_denoiser(p, modes),
                shape,
                n,
                sampler,
                noise=quantile_noise(shape),
                generator=seeded(1),
            )
            for p in (DEFAULT, Diffusion(DiffusionConfig(prediction="x0")))
        ]
        assert (
            max((a - results[0]).abs().max() for a in results) < 1e-5
            and (to_zero[0] - to_zero[1]).abs().max() < 1e-5
        )


def test_epsilon_as_it_comes_keeps_the_distribution():
    """Its schedule ends just short of noise, so single samples differ from those of v; the
    distribution does not.
    """
    process = Diffusion(DiffusionConfig(prediction="epsilon"))
    for sampler in SAMPLERS:
        a, b = (
            p.sample(
                exact_denoiser(p, TWO),
                SHAPE,
                20,
                sampler,
                noise=quantile_noise(SHAPE),
                generator=seeded(1),
            )
            for p in (process, DEFAULT)
        )
        assert abs(a.mean() - b.mean()) < 1e-3 and abs(a.std() - b.std()) < 1e-3


@pytest.mark.parametrize(
    "put_back", ["abar of t - 1", "stride of T // n", "noise scaled by 1 - abar"]
)
def test_wrong_samplers_are_detected(put_back):
    "The judgement above, of formulas known to be wrong."
    n = 100 if "stride" in put_back else 25
    visited = DEFAULT.sampling_steps(n)
    x = quantile_noise(SHAPE)
    generator = seeded(1)
    for k, t in enumerate(visited):
        now = DEFAULT.alphas_cumprod[t]
        x0 = mixture_posterior_mean(x, now, ONE)
        if k == n - 1:
            x = x0
        elif put_back == "abar of t - 1":
            before = DEFAULT.alphas_cumprod[t - 1]
            removed = 1 - now / before
            x = (before.sqrt() * removed * x0 + (now / before).sqrt() * (1 - before) * x) / (
                1 - now
            ) + ((1 - before) / (1 - now) * removed).sqrt() * torch.randn(
                x.shape, generator=generator, dtype=x.dtype
            )
        else:
            after = (
                DEFAULT.alphas_cumprod[t - 250 // n]
                if "stride" in put_back
                else DEFAULT.alphas_cumprod[visited[k + 1]]
            )
            noise = (x - now.sqrt() * x0) / (
                (1 - now) if "scaled" in put_back else (1 - now).sqrt()
            )
            x = after.sqrt() * x0 + (1 - after).sqrt() * noise
    assert abs(x.std() / 0.2 - 1) > (8 / n if "t - 1" in put_back else 4 / n) + 0.004


# few steps of many


@pytest.mark.parametrize("total", [2, 10, 100, 250])
def test_every_count_of_steps_visits_as_many(total):
    process = Diffusion(DiffusionConfig(steps=total))
    for n in range(1, total + 1):
        visited = process.sampling_steps(n)
        assert (
            len(visited) == n
            and visited[0] == total - 1
            and visited[-1] >= 0
            and all(b < a for a, b in zip(visited, visited[1:]))
        )
        assert max(abs(a - (total * (n - k) / n - 1)) for k, a in enumerate(visited)) <= 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_network_is_called_once_a_step(sampler):
    for n in (1, 2, 3, 61, 250):  # diffusers' own grid has 62 steps for 61
        calls, done = [], []
        out = DEFAULT.sample(
            recorded(exact_denoiser(DEFAULT, ONE), calls),
            (1, 4),
            n,
            sampler,
            noise=quantile_noise((1, 4)),
            generator=seeded(),
            on_step=lambda k, x0, done=done: done.append((k, x0)),
        )
        assert (
            len(calls) == n
            and [k for k, _ in done] == list(range(1, n + 1))
            and torch.equal(done[-1][1], out)
        )
    single = DEFAULT.sample(
        exact_denoiser(DEFAULT, ONE), (1, 4), 1, sampler, noise=quantile_noise((1, 4))
    )
    # from pure noise nothing but the mean is known
    assert torch.allclose(single, torch.full_like(single, 0.3))


def test_our_grid_is_that_of_diffusers_where_that_is_right():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=250, timestep_spacing="trailing")
    wrong = 0
    for n in range(1, 251):
        scheduler.set_timesteps(n)
        theirs = scheduler.timesteps.tolist()
        # halves may round either way: theirs are sums of rounded numbers
        if len(theirs) == n:
            assert max(abs(a - b) for a, b in zip(theirs, DEFAULT.sampling_steps(n))) <= 1
        else:
            wrong += 1
    assert wrong == 12  # one step too many, to step −1


def test_respaced_schedulers_hold_the_visited_noise():
    abars = DEFAULT.alphas_cumprod[DEFAULT.sampling_steps(20)[::-1]]
    for sampler in SAMPLERS:
        scheduler = respaced(sampler, abars)
        assert (
            scheduler.timesteps.tolist() == list(range(19, -1, -1))
            and torch.equal(scheduler.alphas_cumprod[:-1], abars[:-1])
            and scheduler.alphas_cumprod.dtype == torch.float64
        )
        assert (
            scheduler.config.timestep_spacing == "trailing"
            and scheduler.config.rescale_betas_zero_snr
        )


# guidance, correction, starts


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_guidance(sampler):
    with_condition = exact_denoiser(DEFAULT, ((1.0, 0.3, 0.2),))
    without = exact_denoiser(DEFAULT, ((1.0, 0.0, 0.2),))

    def sampled(denoise, **more):
        return DEFAULT.sample(
            denoise, SHAPE, 20, sampler, noise=quantile_noise(SHAPE), generator=seeded(), **more
        )

    assert torch.equal(
        sampled(with_condition, guidance=0.0, unconditional=without), sampled(without)
    )
    # not called
    assert torch.equal(
        sampled(with_condition, guidance=1.0, unconditional=lambda x, time: 1 / 0),
        sampled(with_condition),
    )
    assert abs(sampled(with_condition, guidance=2.5, unconditional=without).mean() - 0.75) < 0.02


def test_condition_dropout():
    condition = 1 + torch.rand(5000, 2, 3, generator=seeded(3))
    condition[0] = torch.nan  # dropped or not, it must not spread
    remaining, dropped = DEFAULT.drop(condition, seeded())
    assert (
        dropped.dtype == torch.bool
        and dropped.shape == (5000,)
        and abs(dropped.float().mean() - 0.1) < 0.02
    )
    assert (
        (remaining[dropped] == 0).all()
        and torch.equal(remaining[~dropped][1:], condition[~dropped][1:])
        and torch.equal(DEFAULT.drop(condition, seeded())[1], dropped)
    )
    for share, expected in ((0.0, 0), (1.0, 5000)):
        assert (
            int(Diffusion(DiffusionConfig(condition_dropout=share)).drop(condition)[1].sum())
            == expected
        )
    assert (Diffusion(DiffusionConfig(condition_dropout=1.0)).drop(condition)[0] == 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_result_is_the_corrected_x0(sampler):
    moved, order = [], []

    def correct(x0, time):
        assert time.shape == (3,) and x0.shape == (3, 2) and x0.abs().max() <= 1.5
        order.append(float(time[0]))
        # beyond the clamp: the correction is not clamped
        moved.append(x0 - x0.mean(1, keepdim=True) + 2.0)
        return moved[-1]

    out = DEFAULT.sample(
        exact_denoiser(DEFAULT, TWO),
        (3, 2),
        15,
        sampler,
        correct=correct,
        noise=quantile_noise((3, 2)),
        generator=seeded(),
    )
    assert (
        torch.equal(out, moved[-1])
        and len(moved) == 15
        and order == sorted(order, reverse=True)
        and order[0] == 1
    )


def test_a_correction_may_take_gradients():
    def correct(x0, time):
        with torch.enable_grad():
            leaf = x0.clone().requires_grad_()
            (slope,) = torch.autograd.grad((leaf - 0.7).square().sum(), leaf)
        return x0 - 0.5 * slope

    assert torch.allclose(
        DEFAULT.sample(
            exact_denoiser(DEFAULT, ONE), (2, 5), 10, correct=correct, noise=quantile_noise((2, 5))
        ),
        torch.full((2, 5), 0.7, dtype=torch.float64),
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_start_begins_at_its_noise(sampler):
    volume = torch.full((2, 1, 4, 4, 4), 0.5, dtype=torch.float64)
    noise = quantile_noise((2, 1, 4, 4, 4))
    calls = []
    out = DEFAULT.sample(
        recorded(exact_denoiser(DEFAULT, ONE), calls),
        volume.shape,
        10,
        sampler,
        start=(volume, 0.4),
        noise=noise,
        generator=seeded(),
    )
    assert (
        len(calls) == 10
        and torch.equal(calls[0][0], DEFAULT.noised(volume, noise, 100))
        and torch.equal(calls[0][1], DEFAULT.time(torch.tensor([100, 100])))
    )
    assert torch.isfinite(out).all()
    full = [
        DEFAULT.sample(
            exact_denoiser(DEFAULT, ONE),
            volume.shape,
            10,
            sampler,
            start=s,
            noise=noise,
            generator=seeded(),
        )
        for s in ((volume, 1.0), None)
    ]
    assert torch.equal(*full)  # at time 1 nothing of it is left


# reproducibility, types, devices


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_generator_decides_everything(sampler):
    def network(x, time):
        return torch.tanh(x)

    state = torch.get_rng_state()
    first, again, other = (
        DEFAULT.sample(network, (2, 1, 4, 4, 4), 12, sampler, generator=seeded(s))
        for s in (5, 5, 6)
    )
    assert (
        torch.equal(first, again)
        and not torch.equal(first, other)
        and first.dtype == torch.float32
        and torch.equal(state, torch.get_rng_state())
    )
    steps = [DEFAULT.draw_steps(1000, seeded(s)) for s in (0, 0, 1)]
    assert (
        torch.equal(steps[0], steps[1])
        and not torch.equal(steps[0], steps[2])
        and steps[0].min() >= 0
        and steps[0].max() == 249
    )


@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 4, 3), (1, 1, 2, 3, 4)])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_shape_and_type(sampler, shape):
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        out = DEFAULT.sample(
            lambda x, time: 0.5 * x,
            shape,
            5,
            sampler,
            noise=quantile_noise(shape).to(dtype),
            generator=seeded(),
        )
        assert out.shape == shape and out.dtype == dtype and torch.isfinite(out).all()
    # as under autocast
    assert (
        DEFAULT.sample(
            lambda x, time: (0.5 * x).bfloat16(), shape, 5, sampler, generator=seeded()
        ).dtype
        == torch.float32
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gpu_samples_the_same(sampler):
    on = [
        DEFAULT.sample(
            lambda x, time: 0.5 * x, (2, 1, 8, 8, 8), 10, sampler, generator=seeded(), device=d
        ).cpu()
        for d in ("cpu", "cuda")
    ]
    assert torch.allclose(*on, atol=1e-5)
    x0 = torch.rand(4, 3, device="cuda")
    step = torch.arange(4, device="cuda")
    x = DEFAULT.noised(x0, torch.zeros_like(x0), step)
    assert (
        x.device == x0.device
        and DEFAULT.weight(step).device == DEFAULT.time(step).device == x0.device
        and DEFAULT.drop(x0)[1].device == x0.device
    )


def test_gradients_reach_the_network_and_not_the_sampler():
    scale = torch.tensor(0.5, requires_grad=True)
    step = torch.tensor([3, 200])
    x0, noise = random(0, 2, 5), random(1, 2, 5)
    DEFAULT.to_x0(
        scale * DEFAULT.noised(x0, noise, step), DEFAULT.noised(x0, noise, step), step
    ).sum().backward()
    assert scale.grad is not None and torch.isfinite(scale.grad)
    assert not DEFAULT.sample(
        lambda x, time: scale * x, (2, 5), 3, generator=seeded()
    ).requires_grad


# settings


def test_settings_survive_a_file():
    import json

    for config in (DiffusionConfig(), DiffusionConfig(steps=30, prediction="epsilon", clamp=None)):
        assert DiffusionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="DiffusionConfig: unknown settings beta"):
        DiffusionConfig.from_dict({"beta": 1})


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(steps=1), "steps: must be an integer from 2 on, got 1"),
        (dict(steps=10.0), "steps: must be an integer"),
        (dict(prediction="velocity"), "prediction: must be one of v, epsilon, x0"),
        (dict(clamp=0.0), "clamp: must be positive"),
        (dict(clamp=math.nan), "clamp: must be positive"),
        (dict(min_snr_gamma=-1.0), "min_snr_gamma"),
        (dict(condition_dropout=1.5), "condition_dropout: must be from 0 to 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**settings)


def NETWORK(x, time):
    return torch.zeros_like(x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(sampler="euler"), "sampler: must be one of ddim, ddpm, dpm\\+\\+, got 'euler'"),
        (dict(steps=0), "steps: must be an integer from 1 to 250.* got 0"),
        (dict(steps=251), "got 251"),
        (dict(steps=2.5), "got 2.5"),
        (dict(guidance=2.0), "unconditional: guidance 2 needs the network without its condition"),
        (dict(guidance=math.nan), "guidance: must be finite"),
        (dict(shape=()), "shape: must be positive"),
        (dict(shape=(2, 0)), "shape: must be positive"),
        (dict(noise=torch.zeros(3, 4)), "noise: must have shape \\(2, 4\\), got \\(3, 4\\)"),
        (dict(start=(torch.zeros(2, 5), 0.5)), "start: must have shape"),
        (dict(start=(torch.zeros(2, 4), 0.0)), "start: its time must lie in"),
        (dict(start=(torch.zeros(2, 4), 0.02)), "steps: must be an integer from 1 to 6"),
        (
            dict(denoise=lambda x, time: x[:1]),
            "denoise at sampling step 1 of 8 .*must have shape \\(2, 4\\), got \\(1, 4\\)",
        ),
        (
            dict(correct=lambda x, time: x * torch.inf),
            "correct: 8 of 8 values at sampling step 1 of 8",
        ),
        (dict(guidance=2.0, unconditional=lambda x, time: x / 0), "unconditional: 8 of 8 values"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DEFAULT.sample(
            **{"denoise": NETWORK, "shape": (2, 4), "steps": 8, "generator": seeded(), **arguments}
        )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nan_stops_and_names_the_step(sampler):
    def turns_nan(x, time):
        return torch.where((time < 0.5)[:, None] & (torch.arange(4) == 1), torch.nan, 0 * x)

    with pytest.raises(
        ValueError,
        match=(
            r"denoise: 2 of 8 values at sampling step 6 of 10 \(training step 124\) are NaN or"
            r" infinite; sampling stops here"
        ),
    ):
        DEFAULT.sample(turns_nan, (2, 4), 10, sampler, generator=seeded())


def test_bad_steps_and_shapes():
    x = torch.zeros(3, 4)
    for step in (-1, 250, torch.tensor([0, 1, 250])):
        with refused("step"):
            DEFAULT.noised(x, x, step)
        with refused("step"):
            DEFAULT.time(step)
    for step in (0.5, torch.zeros(3, 1, dtype=torch.long), True):
        with refused("step"):
            DEFAULT.to_x0(x, x, step)
    with refused("step"):
        DEFAULT.noised(x, x, torch.tensor([0, 1]))
    for call in (DEFAULT.noised, DEFAULT.target, DEFAULT.to_x0, DEFAULT.to_noise):
        with pytest.raises(ValueError, match="must have shape"):
            call(x, x[:1], 3)
