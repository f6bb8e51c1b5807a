"""Attribution against finite differences of the objective, and what it must leave behind: nothing."""

import pytest
import torch

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites, text_features
from overpaint.model.sampling import denoise
from overpaint.probes import Probe
from overpaint.scorers import judge as features
from overpaint.trace import Effects, corruption, screening

PROBE = Probe("a", "style", "a cat in openmoji style", "openmoji style")
OTHER = Probe("b", "object", "a dog in noto style", "dog")
SETTINGS = {"steps": 3, "sigma": 1.0, "guidance_scale": 3.0, "solver": "own"}


def brightness(images, probes):
    return images.mean((1, 2, 3))


def settings(**changes):
    return {**SETTINGS, "objective": "latents", "score": brightness, **changes}


def attributions(effects):
    return {
        (row["site"], row["role"], row["position"]): row["attribution"]
        for row in effects.table.to_pylist()
    }


class Loop:
    """An independent corrupted run, in which states can be moved towards their clean values."""

    def __init__(self, model, probe=PROBE, scheduler=None):
        self.model, self.scheduler = model, scheduler
        (self.made,), _ = corruption.corruptions(model, [probe], noise_samples=1, sigma=1.0)
        self.clean = self.encode(noisy=False)
        self.corrupted = self.encode()
        self.goal = self.draw(self.clean)

    @torch.no_grad()
    def encode(self, *, noisy=True, move=None):
        ids = [self.made.ids[None]]
        with hooks.patch(move or {}):
            if not noisy:
                return text_features(self.model.text_encoders, ids)
            with corruption.noisy(self.model.text_encoder, self.made, first=0):
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
def test_a_sites_attribution_is_the_slope_towards_its_clean_states(
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

    found = screening.unet(tiny_double, [PROBE], last=last, branches=branches, **settings())
    assert attributions(found)[name, "", None] == pytest.approx(slope(moved), rel=1e-5)


@pytest.mark.parametrize(("name", "last"), [("text.0.self_attn", 3), ("text.7.mlp", 1)])
def test_a_text_states_attribution_is_the_slope_towards_its_clean_state(
    tiny_double, loop, last, name
):
    module = sites.get(tiny_double, name).module(tiny_double)
    with hooks.record([module]) as seen:
        loop.encode(noisy=False)
        loop.encode()
    clean, corrupted = seen[0]
    found = attributions(screening.text_encoder(tiny_double, [PROBE], last=last, **settings()))

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

    places = [(role, place) for site, role, place in found if site == name]
    assert places == [("subject", 4), ("subject", 5), ("last_subject", 6), ("eos", 7), ("pad", 8)]
    for role, place in places[1:4]:
        expected = slope(lambda share, place=place: moved(share, place))
        assert found[name, role, place] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_the_score_is_followed_through_the_decoder(tiny_double, loop):
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

    found = screening.unet(
        tiny_double, [PROBE], last=1, kinds=("mlp",), **settings(objective="score")
    )
    number = attributions(found)["unet.mlp.15", "", None]
    assert number == pytest.approx(slope(moved, step=0.5), rel=0.02)
    assert found.protocol["objective"] == "score"


def test_under_same_latent_what_runs_before_any_text_is_exactly_nothing(tiny_double):
    found = attributions(
        screening.unet(tiny_double, [PROBE], last=3, source="same_latent", **settings())
    )
    assert found["unet.resnet.0", "", None] == found["unet.self_attn.0", "", None] == 0
    assert found["unet.cross_attn.0", "", None] != 0
    paper = attributions(screening.unet(tiny_double, [PROBE], last=3, **settings()))
    assert paper["unet.resnet.0", "", None] != 0


def test_same_latent_takes_the_clean_prompt_on_the_corrupted_latents(tiny_double, loop):
    """At the first step the latents are equal, so with K = 1 of one step the two sources agree."""
    options = {"last": 1, **settings(steps=1)}
    one, other = (
        attributions(screening.unet(tiny_double, [PROBE], source=source, **options))
        for source in ("clean_trajectory", "same_latent")
    )
    assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


def test_no_noise_no_attribution(tiny_double):
    for function in (screening.unet, screening.text_encoder):
        found = function(tiny_double, [PROBE], last=2, **settings(sigma=0.0, objective="score"))
        assert set(attributions(found).values()) == {0.0}


def test_a_run_does_not_depend_on_its_neighbours(tiny_double):
    for function in (screening.unet, screening.text_encoder):
        options = {"last": 1, "seeds": (0, 3), **settings(steps=1)}
        both = function(tiny_double, [PROBE, OTHER], **options).table.to_pylist()
        alone = function(tiny_double, [OTHER], **options).table.to_pylist()
        found = [row["attribution"] for row in both if row["probe"] == "b"]
        assert found == pytest.approx([row["attribution"] for row in alone], rel=1e-6, abs=1e-12)
        assert len({(row["probe"], row["seed"]) for row in both}) == 4


def test_pndm_takes_a_step_more(tiny_double):
    from diffusers import PNDMScheduler

    from overpaint.zoo import builders

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

    found = screening.unet(model, [PROBE], last=1, kinds=("cross_attn",), **settings())
    number = attributions(found)["unet.cross_attn.15", "", None]
    assert number == pytest.approx(slope(moved), rel=1e-5)


def test_the_solver_is_the_one_asked_for(tiny_double):
    own, dpm = (
        attributions(screening.unet(tiny_double, [PROBE], last=2, **settings(solver=name)))
        for name in ("own", "dpm")
    )
    assert own != dpm


def test_nothing_is_left_on_the_model(tiny_double):
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
                function(model, [PROBE, OTHER], **settings(score=fail, objective=None), last=1)
            assert [p.requires_grad for p in parameters] == before
            assert all(p.grad is None for p in parameters)
            modules = [m for part in parts for m in part.modules()]
            assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) == 0
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def test_it_works_where_gradients_are_off(tiny_double):
    with torch.no_grad():
        inside = attributions(screening.unet(tiny_double, [PROBE], last=1, **settings()))
    assert inside == attributions(screening.unet(tiny_double, [PROBE], last=1, **settings()))


def test_a_score_without_a_gradient_gives_way_to_the_latents(tiny_double):
    def numpy(images, probes):
        return torch.tensor(images.numpy().mean((1, 2, 3)))

    def detached(images, probes):
        return images.detach().mean((1, 2, 3))

    wanted = attributions(screening.unet(tiny_double, [PROBE], last=1, **settings()))
    for score in (numpy, detached):
        found = screening.unet(
            tiny_double, [PROBE], last=1, **settings(score=score, objective=None)
        )
        assert found.protocol["objective"] == "latents"
        assert attributions(found) == wanted
        with pytest.raises(
            ValueError, match="`score` returns numbers without a gradient: write it"
        ):
            screening.unet(tiny_double, [PROBE], **settings(score=score, objective="score"), last=1)


def test_a_score_that_fails_is_not_hidden(tiny_double):
    def fail(images, probes):
        raise RuntimeError("out of paint")

    with pytest.raises(RuntimeError, match="out of paint"):
        screening.unet(tiny_double, [PROBE], **settings(score=fail, objective=None), last=1)


def test_the_judge_can_be_followed(tiny_sd1):
    judge = features.load()
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


def test_best_are_the_largest_means():
    numbers = {("a", "x"): 3.0, ("a", "y"): -9.0, ("b", "x"): 5.0, ("b", "y"): 0.0, ("c", "x"): 4.0}
    more = {**dict.fromkeys(numbers, 0.0), ("b", "x"): -10.0}
    effects = Effects.of(rows(numbers) + rows(more), {})
    assert screening.best(effects, 0.2) == (("c", "x"),)
    assert screening.best(effects, 0.21) == (("c", "x"), ("a", "x"))
    assert len(screening.best(effects, 1)) == 5
    with pytest.raises(ValueError, match="`share` must be above 0 and at most 1, got 0: 0.2 keeps"):
        screening.best(effects, 0)
    with pytest.raises(ValueError, match="these effects hold no attributions"):
        screening.best(Effects.of(rows(numbers, "recovery"), {}))


def test_attribution_agrees_with_small_noise_exactly_traced(tiny_double):
    """Where corruption is slight the first order is all there is: the estimate is the latents' own effect."""
    options = {**SETTINGS, "sigma": 1e-3, "steps": 1, "score": brightness}
    options["positions"] = ("last_subject", "eos")
    screened = screening.text_encoder(tiny_double, [PROBE], last=1, objective="latents", **options)
    exact = op.trace.text_encoder(tiny_double, [PROBE], control=False, **options)
    found = screened.agreement(exact, value="attribution", other_value="latent_recovery")
    assert found.mean > 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last": 0}, "`last` must be from 1 to 3, the denoising steps, got 0"),
        ({"last": 4}, "`last` must be from 1 to 3, the denoising steps, got 4"),
        ({"seeds": ()}, "`seeds` is empty"),
        ({"objective": "loss"}, "`objective` must be 'score', 'latents' or None, got 'loss'"),
        ({"source": "clean"}, "`source` must be 'clean_trajectory'"),
        ({"branches": "uncond"}, "`branches` must be 'both' or 'cond', got 'uncond'"),
        ({"kinds": ("ff",)}, "no sites are left: `kinds` must be among resnet"),
        ({"steps": 0, "last": 1}, "`steps` must be at least 1, got 0"),
    ],
)
def test_bad_requests(tiny_double, change, message):
    with pytest.raises(ValueError, match=message):
        screening.unet(tiny_double, [PROBE], **{"last": 1, **settings(**change)})


def test_both_encoders_of_sdxl_are_screened(tiny_xl):
    options = settings(steps=1, objective="latents")
    found = attributions(screening.text_encoder(tiny_xl, [PROBE], last=1, **options))
    parts = {site.split(".")[0] for site, _, _ in found}
    assert parts == {"text", "text2"}
    for part in parts:
        assert any(n != 0 for (site, _, _), n in found.items() if site.startswith(f"{part}."))


def test_a_note_says_what_was_drawn_and_how_well_it_was_chosen():
    numbers = {("a", ""): 1.0, ("b", ""): 2.0, ("c", ""): 3.0, ("d", ""): 4.0}
    drawn = {("a", ""): 0.1, ("b", ""): 0.3, ("c", ""): 0.2}
    screened = Effects.of(rows(numbers, probe="p"), {"last": 7})
    exact = Effects.of(rows(drawn, "indirect_effect", probe="p"), {"steps": 3})
    noted = screening.noted(exact, screened, share=0.75)
    assert noted.table is exact.table
    assert noted.protocol["steps"] == 3
    note = noted.protocol["screen"]
    assert (note["share"], note["states"], note["drawn"], note["last"]) == (0.75, 4, 3, 7)
    assert note["spearman"] == pytest.approx(0.5)
    few = screening.noted(Effects.of(rows(dict(list(drawn.items())[:2]), "indirect_effect", probe="p"), {}), screened,
                       share=0.5)  # fmt: skip
    assert few.protocol["screen"]["spearman"] is None


def test_it_starts_where_the_tracers_start(tiny_xl):
    """SDXL's Euler scheduler: the noise's scale depends on the number of steps."""
    starts = []

    def watch(args, kwargs):
        starts.append((args[0] if args else kwargs["sample"])[-1].detach().clone())
        return args, kwargs

    options = {"steps": 3, "sigma": 1.0, "guidance_scale": 3.0, "score": brightness}
    found = []
    with hooks.patch_inputs({tiny_xl.unet: watch}):
        for trace in (
            lambda: op.trace.unet(tiny_xl, [PROBE], only=["unet.mlp.0"], **options),
            lambda: screening.unet(tiny_xl, [PROBE], last=1, objective="latents", **options),
        ):
            starts.clear()
            trace()
            found.append([s for s in starts if s.shape == starts[-1].shape][:3])
    full = [[s for s in one if s.shape[-1] == tiny_xl.unet.config.sample_size] for one in found]
    assert torch.equal(full[0][0], full[1][0])


def test_a_probe_that_comes_with_a_seed_uses_it(tiny_double):
    own = Probe("a", "style", PROBE.prompt, PROBE.concept, seed=3)
    for function in (screening.unet, screening.text_encoder):
        options = {"last": 1, **settings(steps=1)}
        asked = function(tiny_double, [PROBE], seeds=(3,), **options).table
        assert function(tiny_double, [own], seeds=(0, 1), **options).table.equals(asked)


def test_memory_lowers_the_batch_and_one_that_holds_nothing_is_refused(tiny_double):
    options = {"last": 1, "seeds": (0, 1, 2), "kinds": ("cross_attn",), **settings(steps=1)}
    done = []
    free = screening.unet(tiny_double, [PROBE], **options)
    tight = screening.unet(
        tiny_double, [PROBE], memory=30, on_progress=lambda *x: done.append(x), **options
    )
    assert attributions(tight) == pytest.approx(attributions(free), rel=1e-6, abs=1e-12)
    assert len(done) > 1
    with pytest.raises(ValueError, match="too little: the smallest batch of screening, 1 rows"):
        screening.unet(tiny_double, [PROBE], memory=0.1, **options)


def test_attributions_that_are_not_finite_are_an_error(tiny_double):
    def score(images, probes):
        return (images.mean((1, 2, 3)) - images.mean((1, 2, 3))).sqrt()  # a slope without bounds

    for function in (screening.unet, screening.text_encoder):
        with pytest.raises(UnsupportedModel, match="attributions became NaN or infinite: load it"):
            function(tiny_double, [PROBE], last=1, **settings(score=score, objective="score"))
