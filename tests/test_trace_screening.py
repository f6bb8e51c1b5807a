"""Screening: attribution against finite differences of the objective, and its settings."""

from dataclasses import replace

import pytest
import torch
from diffusers import PNDMScheduler
from trace_inputs import brightness, hook_count

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites, text_features
from overpaint.model.sampling import denoise
from overpaint.probes import Probe
from overpaint.scorers import judge as judges
from overpaint.trace import Drawing, Effects, Noise, TextStates, UNetStates, screening
from overpaint.trace.corruption import corruptions, noisy
from overpaint.zoo import builders

PROBE = Probe("a", "style", "a cat in openmoji style", "openmoji style")
OTHER = Probe("b", "object", "a dog in noto style", "dog")
DRAWING = Drawing(steps=3, guidance_scale=3.0, solver="own", batch_size=8)


def settings(drawing=DRAWING, **changes):
    defaults = {"objective": "latents", "scorer": brightness, "noise": Noise(sigma=1.0)}
    return {"drawing": drawing, **defaults, **changes}


ONE_STEP = replace(DRAWING, steps=1)


def attributions(effects):
    return {
        (row["site"], row["role"], row["position"]): row["attribution"]
        for row in effects.table.to_pylist()
    }


class Loop:
    """An independent corrupted run, in which states can be moved towards their clean values."""

    def __init__(self, model, probe=PROBE, scheduler=None):
        self.model, self.scheduler = model, scheduler
        (self.corruption,), _ = corruptions(model, [probe], Noise(sigma=1.0))
        self.clean = self.encode(corrupt=False)
        self.corrupted = self.encode()
        self.goal = self.draw(self.clean)

    @torch.no_grad()
    def encode(self, *, corrupt=True, move=None):
        ids = [self.corruption.ids[None]]
        with hooks.patch(move or {}):
            if not corrupt:
                return text_features(self.model.text_encoders, ids)
            with noisy(self.model.text_encoder, self.corruption, first=0):
                return text_features(self.model.text_encoders, ids)

    def draw(self, embeds, *, move=None):
        latents = self.model.initial_latents([0])
        with hooks.patch(move or {}):
            return denoise(
                self.model, latents, embeds, self.model.encode([""]), steps=3, guidance_scale=3.0,
                scheduler=self.scheduler,
            )  # fmt: skip

    def objective(self, latents):
        return float(-(latents - self.goal).square().sum() / 2)


def slope(function, step=1e-4):
    return (function(step) - function(-step)) / (2 * step)


@pytest.fixture(scope="module")
def loop(tiny_double):
    return Loop(tiny_double)


@pytest.mark.parametrize(("last", "branches"), [(1, "both"), (3, "both"), (3, "cond")])
@pytest.mark.parametrize("name", ["unet.resnet.3", "unet.cross_attn.6"])
def test_a_sites_attribution_equals_the_slope_towards_its_clean_states(
    tiny_double, loop, last, branches, name
):
    module = sites.get(tiny_double, name).module(tiny_double)
    with hooks.record([module]) as seen:
        loop.draw(loop.clean)
        loop.draw(loop.corrupted)
    clean, corrupted = seen[0][:3], seen[0][3:]

    def moved(share):
        step = 0

        def move(output):
            nonlocal step
            ways = (clean[step] - corrupted[step]) * share * (step >= 3 - last)
            if branches == "cond":
                ways = torch.cat([torch.zeros_like(ways[:1]), ways[1:]])
            step += 1
            return output + ways

        return loop.objective(loop.draw(loop.corrupted, move={module: move}))

    effects = screening.unet(tiny_double, [PROBE], last=last, branches=branches, **settings())
    assert attributions(effects)[name, "", None] == pytest.approx(slope(moved), rel=1e-5)


@pytest.mark.parametrize(("name", "last"), [("text.0.self_attn", 3), ("text.7.mlp", 1)])
def test_a_text_states_attribution_equals_the_slope_towards_its_clean_state(
    tiny_double, loop, last, name
):
    module = sites.get(tiny_double, name).module(tiny_double)
    with hooks.record([module]) as seen:
        loop.encode(corrupt=False)
        loop.encode()
    clean, corrupted = seen[0]
    values = attributions(screening.text_encoder(tiny_double, [PROBE], last=last, **settings()))

    def moved(share, place):
        def move(output):
            changed = output.clone()
            changed[:, place] += share * (clean - corrupted)[:, place]
            return changed

        embeds = loop.encode(move={module: move})
        step = 0

        def late(args, kwargs):  # the features act through the last steps alone
            nonlocal step
            step += 1
            text = kwargs["encoder_hidden_states"]
            full = embeds if step > 3 - last else loop.corrupted
            return args, {**kwargs, "encoder_hidden_states": torch.cat([text[:1], full])}

        with hooks.patch_inputs({tiny_double.unet: late}):
            return loop.objective(loop.draw(loop.corrupted))

    places = [(role, place) for site, role, place in values if site == name]
    assert places == [("subject", 4), ("subject", 5), ("last_subject", 6), ("eos", 7), ("pad", 8)]
    for role, place in places[1:4]:
        expected = slope(lambda share, place=place: moved(share, place))
        assert values[name, role, place] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_gradient_passes_through_the_decoder_and_the_scorer(tiny_double, loop):
    """The last module before the latents: its attribution is the score's slope along it, drawn by hand."""
    module = tiny_double.unet.get_submodule(
        sites.get(tiny_double, "unet.mlp.15").path
    )  # the last site
    with hooks.record([module]) as seen:
        loop.draw(loop.clean)
        loop.draw(loop.corrupted)
    way = seen[0][2] - seen[0][5]

    def moved(share):
        step = 0

        def move(output):
            nonlocal step
            step += 1
            return output + share * way * (step == 3)

        images = tiny_double.decode(loop.draw(loop.corrupted, move={module: move}))
        return float(images.double().mean())

    effects = screening.unet(
        tiny_double, [PROBE], last=1, kinds=("mlp",), **settings(objective="score")
    )
    number = attributions(effects)["unet.mlp.15", "", None]
    assert number == pytest.approx(slope(moved, step=0.5), rel=0.02)
    assert effects.protocol["objective"] == "score"


def test_sites_before_any_text_have_zero_attribution_under_same_latent(tiny_double):
    values = attributions(
        screening.unet(tiny_double, [PROBE], last=3, source="same_latent", **settings())
    )
    assert values["unet.resnet.0", "", None] == values["unet.self_attn.0", "", None] == 0
    assert values["unet.cross_attn.0", "", None] != 0
    paper = attributions(screening.unet(tiny_double, [PROBE], last=3, **settings()))
    assert paper["unet.resnet.0", "", None] != 0


def test_same_latent_runs_the_clean_prompt_on_the_corrupted_latents(tiny_double, loop):
    """At the first step the latents are equal, so with K = 1 of one step the two sources agree."""
    options = {"last": 1, **settings(ONE_STEP)}
    one, other = (
        attributions(screening.unet(tiny_double, [PROBE], source=source, **options))
        for source in ("clean_trajectory", "same_latent")
    )
    assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


def test_without_noise_all_attributions_are_zero(tiny_double):
    for function in (screening.unet, screening.text_encoder):
        effects = function(
            tiny_double, [PROBE], last=2, **settings(noise=Noise(sigma=0.0), objective="score")
        )
        assert set(attributions(effects).values()) == {0.0}


def test_a_run_does_not_depend_on_the_others_of_its_batch(tiny_double):
    for function in (screening.unet, screening.text_encoder):
        options = {"last": 1, **settings(replace(ONE_STEP, seeds=(0, 3)))}
        both = function(tiny_double, [PROBE, OTHER], **options).table.to_pylist()
        alone = function(tiny_double, [OTHER], **options).table.to_pylist()
        numbers = [row["attribution"] for row in both if row["probe"] == "b"]
        assert numbers == pytest.approx([row["attribution"] for row in alone], rel=1e-6, abs=1e-12)
        assert len({(row["probe"], row["seed"]) for row in both}) == 4


def test_pndm_with_its_additional_step_is_screened(tiny_double):
    pipe = builders.tiny().to(torch.float64)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    model = op.load(pipe)
    loop = Loop(model)
    module = sites.get(model, "unet.cross_attn.15").module(model)
    with hooks.record([module]) as seen:
        loop.draw(loop.clean)
        loop.draw(loop.corrupted)
    assert len(seen[0]) == 8
    clean, corrupted = seen[0][3], seen[0][7]

    def moved(share):
        step = 0

        def move(output):
            nonlocal step
            step += 1
            return output + share * (clean - corrupted) * (step == 4)

        return loop.objective(loop.draw(loop.corrupted, move={module: move}))

    effects = screening.unet(model, [PROBE], last=1, kinds=("cross_attn",), **settings())
    number = attributions(effects)["unet.cross_attn.15", "", None]
    assert number == pytest.approx(slope(moved), rel=1e-5)


def test_the_solver_changes_the_attributions(tiny_double):
    own, dpm = (
        attributions(
            screening.unet(tiny_double, [PROBE], last=2, **settings(replace(DRAWING, solver=name)))
        )
        for name in ("own", "dpm")
    )
    assert own != dpm


def test_no_hook_gradient_or_frozen_weight_is_left_on_the_model(tiny_double):
    model = tiny_double
    parts = (model.text_encoder, model.unet, model.vae)
    parameters = [p for part in parts for p in part.parameters()]
    frozen = parameters[::3]
    for parameter in frozen:
        parameter.requires_grad_(False)
    before = [p.requires_grad for p in parameters]

    def fail(images, probes):
        if len(images) > 1:
            raise KeyError("on purpose")
        return images.mean((1, 2, 3))

    try:
        assert True in before
        assert False in before
        for function in (screening.unet, screening.text_encoder):
            function(model, [PROBE], last=2, **settings())
            with pytest.raises(KeyError, match="on purpose"):
                function(model, [PROBE, OTHER], **settings(scorer=fail, objective=None), last=1)
            assert [p.requires_grad for p in parameters] == before
            assert all(p.grad is None for p in parameters)
            assert sum(map(hook_count, parts)) == 0
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def test_it_works_inside_no_grad(tiny_double):
    with torch.no_grad():
        inside = attributions(screening.unet(tiny_double, [PROBE], last=1, **settings()))
    assert inside == attributions(screening.unet(tiny_double, [PROBE], last=1, **settings()))


def test_without_a_gradient_of_the_score_the_objective_is_the_latents(tiny_double):
    def numpy(images, probes):
        return torch.tensor(images.numpy().mean((1, 2, 3)))

    def detached(images, probes):
        return images.detach().mean((1, 2, 3))

    expected = attributions(screening.unet(tiny_double, [PROBE], last=1, **settings()))
    for score in (numpy, detached):
        effects = screening.unet(
            tiny_double, [PROBE], last=1, **settings(scorer=score, objective=None)
        )
        assert effects.protocol["objective"] == "latents"
        assert attributions(effects) == expected
        with pytest.raises(
            ValueError, match="`scorer` returns numbers without a gradient: write it"
        ):
            screening.unet(
                tiny_double, [PROBE], **settings(scorer=score, objective="score"), last=1
            )


def test_an_error_of_the_scorer_is_raised(tiny_double):
    def fail(images, probes):
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError, match="out of paint"):
        screening.unet(tiny_double, [PROBE], **settings(scorer=fail, objective=None), last=1)


def test_the_judge_has_gradients(tiny_sd1):
    judge = judges.load()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    probes = [PROBE, OTHER]
    plain = judge.score(images, probes)
    graded = judge.score(images.clone().requires_grad_(), probes)
    assert not plain.requires_grad
    assert torch.equal(plain, graded)
    image = images.double().requires_grad_()
    (grad,) = torch.autograd.grad(judge.score(image, probes).sum(), [image])
    way = torch.sign(grad)
    up, down = (judge.score(images + step * way, probes).double().sum() for step in (1e-3, -1e-3))
    assert float((up - down) / 2e-3) == pytest.approx(float(grad.abs().sum()), rel=0.02)


def rows(numbers, value="attribution", **more):
    return [
        {"site": site, "role": role, "control": "", "window": "", "head": None, value: number, **more}
        for (site, role), number in numbers.items()
    ]  # fmt: skip


def test_best_returns_the_states_of_largest_mean():
    numbers = {("a", "x"): 3.0, ("a", "y"): -9.0, ("b", "x"): 5.0, ("b", "y"): 0.0, ("c", "x"): 4.0}
    more = {**dict.fromkeys(numbers, 0.0), ("b", "x"): -10.0}
    effects = Effects.of(rows(numbers) + rows(more), {})
    assert screening.best(effects, 0.2) == (("c", "x"),)
    assert screening.best(effects, 0.21) == (("c", "x"), ("a", "x"))
    assert len(screening.best(effects, 1)) == 5
    with pytest.raises(
        ValueError, match="`share` must be above 0 and at most 1, got 0: 0.2 returns"
    ):
        screening.best(effects, 0)
    with pytest.raises(ValueError, match="these effects hold no attributions"):
        screening.best(Effects.of(rows(numbers, "recovery"), {}))


def test_attribution_agrees_with_an_exact_trace_at_small_noise(tiny_double):
    """With slight corruption the first-order estimate equals the effect on the latents."""
    options = {"noise": Noise(sigma=1e-3), "drawing": ONE_STEP, "scorer": brightness}
    positions = ("last_subject", "eos")
    screened = screening.text_encoder(
        tiny_double, [PROBE], last=1, objective="latents", positions=positions, **options
    )
    exact = op.trace.text_encoder(
        tiny_double, [PROBE], states=TextStates(positions), controls="none", **options
    )
    agreement = screened.agreement(exact, value="attribution", other_value="latent_recovery")
    assert agreement.mean > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last": 0}, "`last` must be from 1 to 3, the denoising steps, got 0"),
        ({"last": 4}, "`last` must be from 1 to 3, the denoising steps, got 4"),
        ({"objective": "loss"}, "`objective` must be 'score', 'latents' or None, got 'loss'"),
        ({"source": "clean"}, "`source` must be 'clean_trajectory'"),
        ({"branches": "uncond"}, "`branches` must be 'both' or 'cond', got 'uncond'"),
        ({"kinds": ("ff",)}, "no sites are left: `kinds` must be among resnet"),
    ],
)
def test_settings_out_of_range_are_refused(tiny_double, change, message):
    with pytest.raises(ValueError, match=message):
        screening.unet(tiny_double, [PROBE], **{"last": 1, **settings(), **change})


def test_both_encoders_of_sdxl_are_screened(tiny_xl):
    options = settings(ONE_STEP)
    values = attributions(screening.text_encoder(tiny_xl, [PROBE], last=1, **options))
    parts = {site.split(".")[0] for site, _, _ in values}
    assert parts == {"text", "text2"}
    for part in parts:
        assert any(n != 0 for (site, _, _), n in values.items() if site.startswith(f"{part}."))


def test_a_note_holds_the_share_drawn_and_the_rank_correlation():
    numbers = {("a", ""): 1.0, ("b", ""): 2.0, ("c", ""): 3.0, ("d", ""): 4.0}
    drawn = {("a", ""): 0.1, ("b", ""): 0.3, ("c", ""): 0.2}
    screened = Effects.of(rows(numbers, probe="p"), {"last": 7})
    exact = Effects.of(rows(drawn, "indirect_effect", probe="p"), {"steps": 3})
    noted = screening.with_note(exact, screened, share=0.75)
    assert noted.table is exact.table
    assert noted.protocol["steps"] == 3
    note = noted.protocol["screen"]
    assert (note["share"], note["states"], note["drawn"], note["last"]) == (0.75, 4, 3, 7)
    assert note["spearman"] == pytest.approx(0.5)
    two = Effects.of(rows(dict(list(drawn.items())[:2]), "indirect_effect", probe="p"), {})
    few = screening.with_note(two, screened, share=0.5)
    assert few.protocol["screen"]["spearman"] is None


def test_screening_starts_from_the_same_latents_as_the_tracers(tiny_xl):
    """SDXL's Euler scheduler: the noise's scale depends on the number of steps."""
    starts = []

    def watch(args, kwargs):
        starts.append((args[0] if args else kwargs["sample"])[-1].detach().clone())
        return args, kwargs

    options = {
        "drawing": Drawing(steps=3, guidance_scale=3.0),
        "noise": Noise(sigma=1.0),
        "scorer": brightness,
    }
    runs = []
    with hooks.patch_inputs({tiny_xl.unet: watch}):
        for trace in (
            lambda: op.trace.unet(
                tiny_xl, [PROBE], states=UNetStates(only=["unet.mlp.0"]), **options
            ),
            lambda: screening.unet(tiny_xl, [PROBE], last=1, objective="latents", **options),
        ):
            starts.clear()
            trace()
            runs.append([s for s in starts if s.shape == starts[-1].shape][:3])
    full = [[s for s in run if s.shape[-1] == tiny_xl.unet.config.sample_size] for run in runs]
    assert torch.equal(full[0][0], full[1][0])


def test_a_probe_with_a_seed_of_its_own_uses_it(tiny_double):
    seeded = Probe("a", "style", PROBE.prompt, PROBE.concept, seed=3)
    for function in (screening.unet, screening.text_encoder):
        first, second = (
            function(tiny_double, [probe], last=1, **settings(replace(ONE_STEP, seeds=seeds)))
            for probe, seeds in ((PROBE, (3,)), (seeded, (0, 1)))
        )
        assert second.table.equals(first.table)


def test_memory_lowers_the_batch_and_a_budget_below_one_run_is_refused(tiny_double):
    reports = []

    def screen(memory, **options):
        drawing = replace(ONE_STEP, seeds=(0, 1, 2), memory=memory)
        kinds = ("cross_attn",)
        return screening.unet(
            tiny_double, [PROBE], last=1, kinds=kinds, **settings(drawing), **options
        )

    tight = screen(30, on_progress=lambda *x: reports.append(x))
    assert attributions(tight) == pytest.approx(attributions(screen(None)), rel=1e-6, abs=1e-12)
    assert len(reports) > 1
    assert reports[-1] == (3, 3, "screening")
    with pytest.raises(ValueError, match="too little: the smallest batch of screening, 1 rows"):
        screen(0.1)


def test_attributions_that_are_not_finite_raise(tiny_double):
    def score(images, probes):
        return (images.mean((1, 2, 3)) - images.mean((1, 2, 3))).sqrt()  # a slope without bounds

    for function in (screening.unet, screening.text_encoder):
        with pytest.raises(UnsupportedModel, match="attributions became NaN or infinite: load it"):
            function(tiny_double, [PROBE], last=1, **settings(scorer=score, objective="score"))
