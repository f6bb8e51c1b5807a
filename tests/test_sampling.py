"""Settings of drawing."""

import pytest
import torch
from diffusers import DDIMScheduler

from overpaint.model.sampling import Drawing, denoise, invert, make_scheduler


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"solver": "euler"}, "unknown solver 'euler': choose one of own, ddim, dpm"),
        ({"seeds": ()}, "`seeds` is empty: give at least one"),
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"memory": 0}, "`memory` must be a positive number of MiB, got 0"),
        ({"memory": float("nan")}, "`memory` must be a positive number of MiB, got nan"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**settings)


def test_equal_settings_are_equal_values_whatever_sequence_holds_the_seeds():
    assert Drawing(seeds=range(3)) == Drawing(seeds=[0, 1, 2]) == Drawing(seeds=(0, 1, 2))
    assert hash(Drawing()) == hash(Drawing(steps=10, solver="dpm"))


@pytest.mark.parametrize("layout", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_more_iterations_invert_ddim_more_exactly(request, layout):
    """For noise (SD 1) and velocity (SD 2), and where the model's own scheduler is no DDIM (SDXL)."""
    model = request.getfixturevalue(layout)
    empty = model.encode([""])
    scheduler = make_scheduler(model, "ddim")

    def draw(noise):
        return denoise(
            model, noise, empty.expand(len(noise), -1, -1), empty,
            steps=5, guidance_scale=1, scheduler=scheduler,
        )  # fmt: skip

    noise = model.initial_latents([0, 1], scheduler=scheduler)
    latents = draw(noise)
    errors = []
    for iterations in (1, 4, 16):
        embeds = empty.expand(2, -1, -1)
        inverted = invert(model, latents, embeds, steps=5, iterations=iterations)
        errors.append(float((draw(inverted) - latents).norm() / latents.norm()))
    assert errors[2] < 1e-4 and errors[2] < errors[1] < errors[0], errors
    assert torch.allclose(inverted, noise, atol=1e-3)


def test_a_single_step_from_pure_noise_cannot_be_inverted(copied):
    settings = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    settings |= {"set_alpha_to_one": True}
    copied.pipe.scheduler = DDIMScheduler.from_config(copied.scheduler.config, **settings)
    latents, empty = copied.initial_latents([0]), copied.encode([""])
    with pytest.raises(ValueError, match="discards its input with `steps` 1, .* use more steps"):
        invert(copied, latents, empty, steps=1)
    assert invert(copied, latents, empty, steps=2).isfinite().all()
