"""Acceptance checks 2 to 13 of causal tracing, UNet. "Exact" is `torch.equal` in float64."""

import pytest
import torch

import overpaint as op
from overpaint import hooks, sites
from overpaint.errors import UnsupportedModel
from overpaint.probes import Probe
from overpaint.trace import corrupt, encoder, lockstep

PROBE = Probe("a", "style", "a cat in openmoji style", "openmoji style")
LAST = ("unet.resnet.21", "unet.self_attn.15", "unet.cross_attn.15", "unet.mlp.15")


@pytest.fixture(scope="module")
def embeds(tiny_double):
    """Clean and corrupted text features, and those of the empty prompt."""
    (made,), _ = corrupt.corruptions(tiny_double, [PROBE], noise_samples=1, sigma=1.0)
    pair = encoder.encode_restored(tiny_double.text_encoder, made, [])
    return pair, tiny_double.encode([""])


@pytest.fixture(scope="module")
def all_sites(tiny_double):
    return sites.find_unet(tiny_double.unet)


@pytest.fixture
def run(tiny_double, embeds):
    def go(*restored, steps=3, **options):
        return lockstep.restore(
            tiny_double, *embeds, [list(group) for group in restored], seed=0, steps=steps,
            guidance_scale=7.5, **options,
        )  # fmt: skip

    return go


def of_kind(found, kind):
    return [site for site in found if site.kind == kind]


def named(found, *names):
    return [site for site in found if site.name in names]


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_idle_hooks_change_nothing_and_go(tiny_double, embeds, all_sites):
    latents = tiny_double.initial_latents([0, 0])
    options = {"steps": 2, "guidance_scale": 7.5}
    from overpaint.sample import denoise

    plain = denoise(tiny_double, latents, embeds[0], embeds[1], **options)
    idle = {site.module(tiny_double): (lambda output: output) for site in all_sites}
    with hooks.patch(idle) as calls:
        hooked = denoise(tiny_double, latents, embeds[0], embeds[1], **options)
    assert torch.equal(plain, hooked)
    assert set(calls.values()) == {2}
    assert hook_count(tiny_double.unet) == 0


def test_no_noise_no_difference(tiny_double, embeds, all_sites):
    clean = embeds[0][:1].expand(2, -1, -1)
    rows = lockstep.restore(
        tiny_double, clean, embeds[1], [[all_sites[5]]], seed=0, steps=2, guidance_scale=7.5
    )
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_the_clean_and_corrupted_rows_are_plain_runs(tiny_double, embeds, run):
    from overpaint.sample import denoise

    rows = run([])
    plain = denoise(
        tiny_double, tiny_double.initial_latents([0] * 4), embeds[0][[0, 1, 1, 1]], embeds[1], steps=3,
        guidance_scale=7.5,
    )  # fmt: skip
    assert torch.equal(rows, plain[:3])
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("branches", ["both", "cond"])
def test_restoring_everything_is_the_clean_run(run, all_sites, branches, steps):
    rows = run(all_sites, branches=branches, steps=steps)
    assert torch.equal(rows[2], rows[0])


@pytest.mark.parametrize("source", ["clean_trajectory", "same_latent"])
@pytest.mark.parametrize("branches", ["both", "cond"])
def test_restoring_all_cross_attention_is_the_clean_run(run, all_sites, branches, source):
    rows = run(of_kind(all_sites, "cross_attn"), branches=branches, source=source)
    assert torch.equal(rows[2], rows[0])


def test_restoring_the_last_four_layers_is_the_clean_run(run, all_sites):
    rows = run(named(all_sites, *LAST))
    assert torch.equal(rows[2], rows[0])


@pytest.mark.parametrize("source", ["clean_trajectory", "same_latent"])
def test_restoring_nothing_is_the_corrupted_run(run, source):
    rows = run([], source=source)
    assert torch.equal(rows[2], rows[1])


def test_what_runs_before_any_text_does_nothing_at_the_first_step(run, all_sites):
    early = named(all_sites, "unet.resnet.0", "unet.self_attn.0")
    rows = run(*[[site] for site in early], steps=1)
    assert torch.equal(rows[2], rows[1])
    assert torch.equal(rows[3], rows[1])


def test_what_runs_before_any_text_only_leaks_the_clean_latents(run, all_sites):
    early = [[site] for site in named(all_sites, "unet.resnet.0", "unet.self_attn.0")]
    control = run(*early, source="same_latent")
    assert torch.equal(control[2], control[1])
    assert torch.equal(control[3], control[1])
    paper = run(*early, source="clean_trajectory")
    assert not torch.equal(paper[2], paper[1])
    assert not torch.equal(paper[3], paper[1])


def test_restoring_all_self_attention_is_neither(run, all_sites):
    rows = run(of_kind(all_sites, "self_attn"))
    assert (rows[2] - rows[0]).abs().max() > 1e-6
    assert (rows[2] - rows[1]).abs().max() > 1e-6


@pytest.mark.parametrize("source", ["clean_trajectory", "same_latent"])
def test_a_site_restored_among_others_is_that_site_restored_alone(run, all_sites, source):
    some = [[site] for site in all_sites[2:9]]
    together = run(*some, chunk=7, source=source)
    parts = run(*some, chunk=3, source=source)
    alone = run(some[4], source=source)
    assert torch.allclose(together, parts, atol=1e-5)
    assert torch.allclose(together[6], alone[2], atol=1e-5)


def test_branches_differ(run, all_sites):
    site = named(all_sites, "unet.resnet.12")
    both, cond = run(site, branches="both"), run(site, branches="cond")
    assert torch.equal(both[:2], cond[:2])
    assert not torch.equal(both[2], cond[2])


def test_without_guidance_there_is_one_branch(tiny_double, embeds, all_sites):
    rows = lockstep.restore(tiny_double, *embeds, [all_sites], seed=0, steps=2, guidance_scale=1)
    assert torch.equal(rows[2], rows[0])
    assert not torch.equal(rows[1], rows[0])


def test_pndm_runs_51_calls_for_50_steps(embeds, all_sites):
    from diffusers import PNDMScheduler

    from overpaint.zoo import build

    pipe = build.tiny().to(torch.float64)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    model = op.load(pipe)
    for source in ("clean_trajectory", "same_latent"):
        ticks = []
        rows = lockstep.restore(
            model, *embeds, [of_kind(all_sites, "cross_attn"), named(all_sites, "unet.resnet.0")],
            seed=0, steps=5, guidance_scale=2, source=source, on_step=lambda *step, ticks=ticks: ticks.append(step),
        )  # fmt: skip
        assert len(ticks) == 6
        assert torch.equal(rows[2], rows[0])
        assert torch.equal(rows[3], rows[1]) == (source == "same_latent")


def test_attention_kernels_agree():
    """Check 14: the fused kernel against the plain one."""
    from diffusers.models.attention_processor import AttnProcessor

    from overpaint.zoo import build

    options = {"steps": 2, "sigma": 1.0, "score": brightness, "kinds": ("cross_attn",), "chunk": 16}
    fused = op.load(build.tiny())
    plain = op.load(build.tiny())
    plain.unet.set_attn_processor(AttnProcessor())
    tables = [op.trace.unet(model, [PROBE], **options) for model in (fused, plain)]
    scores = [torch.tensor(t.table["score_restored"].to_pylist()) for t in tables]
    assert (scores[0] - scores[1]).abs().max() < 1e-3
    assert tables[0].top(5) == tables[1].top(5)


def brightness(images, probes):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def traced(tiny_sd1):
    return op.trace.unet(
        tiny_sd1, [PROBE], steps=2, sigma=1.0, score=brightness, chunk=35, minimum_gap=-1.0
    )


def test_a_row_a_site(traced, all_sites):
    rows = traced.table.to_pylist()
    assert [row["site"] for row in rows] == [site.name for site in all_sites]
    assert {(row["source"], row["branches"], row["seed"]) for row in rows} == {
        ("clean_trajectory", "both", 0)
    }
    assert traced.protocol["scorer"] == "brightness"
    assert all(
        row["indirect_effect"] == row["score_restored"] - row["score_corrupted"] for row in rows
    )


def test_clean_score_is_that_of_generate(traced, tiny_sd1):
    plain = tiny_sd1.generate(PROBE.prompt, seed=0, steps=2)
    score = traced.table["score_clean"][0].as_py()
    assert score == pytest.approx(plain.images.mean().item(), abs=1e-5)


def test_other_noise_moves_the_corrupted_run_only(tiny_sd1):
    rows = op.trace.unet(
        tiny_sd1, [PROBE], steps=1, sigma=1.0, noise_samples=2, score=brightness,
        kinds=("cross_attn",), chunk=16,
    ).table.to_pylist()  # fmt: skip
    first, second = rows[0], rows[-1]
    assert (first["noise"], second["noise"]) == (0, 1)
    assert first["score_clean"] == second["score_clean"]
    assert first["score_corrupted"] != second["score_corrupted"]


def test_the_empty_prompt_is_never_corrupted(tiny_sd1):
    """Check 13: every run's unconditional rows get the features of "" byte for byte."""
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["encoder_hidden_states"])

    handle = tiny_sd1.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        op.trace.unet(tiny_sd1, [PROBE], steps=1, score=brightness, kinds=("mlp",), chunk=16)
    finally:
        handle.remove()
    empty = tiny_sd1.encode([""])
    rows = seen[0].shape[0] // 2
    assert rows == 20
    assert torch.equal(seen[0][:rows], empty.expand(rows, -1, -1))
    assert len({row.numpy().tobytes() for row in seen[0][rows:]}) == 2  # clean, corrupted


def test_nothing_is_left_on_the_model(tiny_sd1):
    def fail(images, probes):
        raise RuntimeError("on purpose")

    def fail_late(done, total):
        if done == 2:
            raise KeyboardInterrupt

    options = {"steps": 2, "kinds": ("mlp",), "chunk": 16}
    with pytest.raises(RuntimeError, match="on purpose"):
        op.trace.unet(tiny_sd1, [PROBE], score=fail, **options)
    with pytest.raises(KeyboardInterrupt):
        op.trace.unet(tiny_sd1, [PROBE], score=brightness, on_progress=fail_late, **options)
    assert hook_count(tiny_sd1.unet) == hook_count(tiny_sd1.text_encoder) == 0


def test_progress(tiny_sd1):
    seen = []
    op.trace.unet(
        tiny_sd1, [PROBE], steps=2, kinds=("mlp",), chunk=8, score=brightness,
        on_progress=lambda *x: seen.append(x),
    )  # fmt: skip
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]  # two batches of two steps


def test_a_layer_that_does_not_run_once_a_step_is_noticed(tiny_double, embeds, all_sites):
    unused = sites.Site("unet.mlp.99", "unet", "mlp", 99, "down_blocks.0.attentions.0.spare")
    wrapper = tiny_double.unet.get_submodule("down_blocks.0.attentions.0")
    wrapper.spare = torch.nn.Identity()
    try:
        with pytest.raises(UnsupportedModel, match=r"a site's module ran \[0\] times in 1 steps"):
            lockstep.restore(tiny_double, *embeds, [[unused]], seed=0, steps=1, guidance_scale=2)
    finally:
        del wrapper.spare


def test_runs_that_disagree_are_noticed(tiny_sd1, all_sites):
    embeds = tiny_sd1.encode(["a cat", "a dog"])
    negative = tiny_sd1.encode([""])
    options = {"seed": 0, "steps": 1, "guidance_scale": 2, "chunk": 2}

    def disturb(output):
        return output + torch.rand(1)

    with (
        hooks.patch({tiny_sd1.unet.conv_in: disturb}),
        pytest.raises(UnsupportedModel, match="two equal runs of this model differ"),
    ):
        lockstep.restore(tiny_sd1, embeds, negative, [[s] for s in all_sites[:4]], **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "clean"}, "`source` must be 'clean_trajectory' or 'same_latent', got 'clean'"),
        ({"branches": "uncond"}, "`branches` must be 'both' or 'cond', got 'uncond'"),
        ({"kinds": ("ff",)}, r"`kinds` must be among resnet, self_attn.*got \['ff'\]"),
        ({"kinds": ()}, "`kinds` must be among resnet"),
        ({"chunk": 0}, "a batch must have at least 1 row, got 0"),
        ({"seeds": []}, "`seeds` is empty"),
    ],
)
def test_bad_requests(tiny_sd1, change, message):
    with pytest.raises(ValueError, match=message):
        op.trace.unet(tiny_sd1, [PROBE], score=brightness, **change)
