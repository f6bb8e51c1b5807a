"""Acceptance checks 2 to 13 of causal tracing, UNet. "Exact" is `torch.equal` in float64."""

import pytest
import torch

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.probes import Probe
from overpaint.trace import corruption, text_encoder_trace, unet_trace
from overpaint.trace.renderer import Renderer
from overpaint.trace.unet_trace import Intervention

PROBE = Probe("a", "style", "a cat in openmoji style", "openmoji style")
LAST = ("unet.resnet.21", "unet.self_attn.15", "unet.cross_attn.15", "unet.mlp.15")


def brightness(images, probes):
    return images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def embeds(tiny_double):
    """Clean and corrupted text features, and those of the empty prompt."""
    (made,), _ = corruption.corruptions(tiny_double, [PROBE], noise_samples=1, sigma=1.0)
    pair = text_encoder_trace.encode_restored(tiny_double.text_encoder, made, [])
    return pair, tiny_double.encode([""])


@pytest.fixture(scope="module")
def all_sites(tiny_double):
    return sites.find_unet(tiny_double.unet)


def restore(
    model, clean_corrupted, negative, groups, *, steps=3, guidance_scale=7.5, rows=64, direction="restore", **options
):  # fmt: skip
    """Run `lockstep.restore`; a group is an intervention, or sites that one row takes whole."""
    renderer = Renderer.of(
        model, score=brightness, steps=steps, guidance_scale=guidance_scale, solver_name="own", direction=direction,
        minimum_gap=0.02, batch_size=rows, memory=None,
    )  # fmt: skip
    plan = [g if isinstance(g, Intervention) else Intervention(tuple(g)) for g in groups]
    return unet_trace.restore(renderer, clean_corrupted, negative, plan, **{"seed": 0, **options})


@pytest.fixture
def run(tiny_double, embeds):
    return lambda *groups, **options: restore(tiny_double, *embeds, groups, **options)


def of_kind(found, kind):
    return [site for site in found if site.kind == kind]


def named(found, *names):
    return [site for site in found if site.name in names]


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_idle_hooks_change_nothing_and_go(tiny_double, embeds, all_sites):
    latents = tiny_double.initial_latents([0, 0])
    options = {"steps": 2, "guidance_scale": 7.5}
    from overpaint.model.sampling import denoise

    plain = denoise(tiny_double, latents, embeds[0], embeds[1], **options)
    idle = {site.module(tiny_double): (lambda output: output) for site in all_sites}
    with hooks.patch(idle) as calls:
        hooked = denoise(tiny_double, latents, embeds[0], embeds[1], **options)
    assert torch.equal(plain, hooked)
    assert set(calls.values()) == {2}
    assert hook_count(tiny_double.unet) == 0


def test_no_noise_no_difference(tiny_double, embeds, all_sites):
    clean = embeds[0][:1].expand(2, -1, -1)
    rows = restore(tiny_double, clean, embeds[1], [[all_sites[5]]], steps=2)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_the_clean_and_corrupted_rows_are_plain_runs(tiny_double, embeds, run):
    from overpaint.model.sampling import denoise

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
    together = run(*some, source=source)
    parts = run(*some, rows=8, source=source)
    alone = run(some[4], source=source)
    assert torch.allclose(together, parts, atol=1e-5)
    assert torch.allclose(together[6], alone[2], atol=1e-5)


def test_branches_differ(run, all_sites):
    site = named(all_sites, "unet.resnet.12")
    both, cond = run(site, branches="both"), run(site, branches="cond")
    assert torch.equal(both[:2], cond[:2])
    assert not torch.equal(both[2], cond[2])


def test_without_guidance_there_is_one_branch(tiny_double, embeds, all_sites):
    rows = restore(tiny_double, *embeds, [all_sites], steps=2, guidance_scale=1)
    assert torch.equal(rows[2], rows[0])
    assert not torch.equal(rows[1], rows[0])


def test_pndm_runs_6_calls_for_5_steps(embeds, all_sites):
    from diffusers import PNDMScheduler

    from overpaint.zoo import builders

    pipe = builders.tiny().to(torch.float64)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    model = op.load(pipe)
    for source in ("clean_trajectory", "same_latent"):
        ticks = []
        rows = restore(
            model, *embeds, [of_kind(all_sites, "cross_attn"), named(all_sites, "unet.resnet.0")], steps=5,
            guidance_scale=2, source=source, on_step=lambda *step, ticks=ticks: ticks.append(step),
        )  # fmt: skip
        assert len(ticks) == 6
        assert torch.equal(rows[2], rows[0])
        assert torch.equal(rows[3], rows[1]) == (source == "same_latent")


def test_attention_kernels_agree():
    """Check 14: the fused kernel against the plain one."""
    from diffusers.models.attention_processor import AttnProcessor

    from overpaint.zoo import builders

    options = {"steps": 2, "sigma": 1.0, "score": brightness, "kinds": ("cross_attn",)}
    fused = op.load(builders.tiny())
    plain = op.load(builders.tiny())
    plain.unet.set_attn_processor(AttnProcessor())
    tables = [op.trace.unet(model, [PROBE], **options) for model in (fused, plain)]
    scores = [torch.tensor(t.table["score_restored"].to_pylist()) for t in tables]
    assert (scores[0] - scores[1]).abs().max() < 1e-3
    assert tables[0].top(5) == tables[1].top(5)


@pytest.fixture(scope="module")
def traced(tiny_sd1):
    return op.trace.unet(
        tiny_sd1, [PROBE], steps=2, sigma=1.0, score=brightness, batch_size=64, minimum_gap=-1.0,
        solver="own",
    )  # fmt: skip


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
        kinds=("cross_attn",),
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
        op.trace.unet(tiny_sd1, [PROBE], steps=1, score=brightness, kinds=("mlp",))
    finally:
        handle.remove()
    empty = tiny_sd1.encode([""])
    rows = seen[-1].shape[0] // 2
    assert rows == 20
    assert torch.equal(seen[-1][:rows], empty.expand(rows, -1, -1))
    assert len({row.numpy().tobytes() for row in seen[-1][rows:]}) == 2  # clean, corrupted


def test_nothing_is_left_on_the_model(tiny_sd1):
    def fail(images, probes):
        raise RuntimeError("on purpose")

    def fail_late(done, total):
        if done == 500:  # the first of two steps
            raise KeyboardInterrupt

    options = {"steps": 2, "kinds": ("mlp",)}
    with pytest.raises(RuntimeError, match="on purpose"):
        op.trace.unet(tiny_sd1, [PROBE], score=fail, **options)
    with pytest.raises(KeyboardInterrupt):
        op.trace.unet(tiny_sd1, [PROBE], score=brightness, on_progress=fail_late, **options)
    assert hook_count(tiny_sd1.unet) == hook_count(tiny_sd1.text_encoder) == 0


def test_progress(tiny_sd1):
    seen = []
    op.trace.unet(
        tiny_sd1, [PROBE], steps=2, kinds=("mlp",), batch_size=12, score=brightness, seeds=(0, 1),
        on_progress=lambda *x: seen.append(x),
    )  # fmt: skip
    # Thousandths of a run: two runs of two batches of two steps.
    assert seen == [(250 * i, 2000) for i in range(1, 9)]


def test_a_layer_that_does_not_run_once_a_step_is_noticed(tiny_double, embeds, all_sites):
    unused = sites.Site("unet.mlp.99", "unet", "mlp", 99, "down_blocks.0.attentions.0.spare")
    wrapper = tiny_double.unet.get_submodule("down_blocks.0.attentions.0")
    wrapper.spare = torch.nn.Identity()
    try:
        with pytest.raises(UnsupportedModel, match=r"a site's module ran \[0\] times in 1 steps"):
            restore(tiny_double, *embeds, [[unused]], steps=1, guidance_scale=2)
    finally:
        del wrapper.spare


def test_runs_that_disagree_are_noticed(tiny_sd1, all_sites):
    embeds = tiny_sd1.encode(["a cat", "a dog"])
    negative = tiny_sd1.encode([""])
    options = {"steps": 1, "guidance_scale": 2, "rows": 4}

    def disturb(output):
        return output + torch.rand(1)

    with (
        hooks.patch({tiny_sd1.unet.conv_in: disturb}),
        pytest.raises(UnsupportedModel, match="two equal runs of this model differ"),
    ):
        restore(tiny_sd1, embeds, negative, [[s] for s in all_sites[:4]], **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "clean"}, "`source` must be 'clean_trajectory' or 'same_latent', got 'clean'"),
        ({"branches": "uncond"}, "`branches` must be 'both' or 'cond', got 'uncond'"),
        ({"kinds": ("ff",)}, r"`kinds` must be among resnet, self_attn.*got \['ff'\]"),
        ({"kinds": ()}, "`kinds` must be among resnet"),
        (
            {"batch_size": 3},
            r"`batch_size` must be at least 4 \(clean, corrupted, two restored\), got 3",
        ),
        ({"memory": 0}, "`memory` must be a positive number of MiB, got 0"),
        (
            {"memory": 0.001},
            "`memory` of 0.001 MiB is too little: the smallest batch of the UNet, 4",
        ),
        ({"windows": ("dawn",)}, r"`windows` must be among '', 'early', .*got \['dawn'\]"),
        ({"only": ["unet.mlp.99"]}, "no states are selected, so there is nothing to trace"),
        ({"direction": "both"}, "`direction` must be 'restore' or 'corrupt', got 'both'"),
        ({"solver": "euler"}, "unknown solver 'euler': choose one of own, ddim, dpm"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"seeds": []}, "`seeds` is empty"),
    ],
)
def test_bad_requests(tiny_sd1, change, message):
    with pytest.raises(ValueError, match=message):
        op.trace.unet(tiny_sd1, [PROBE], score=brightness, **change)


def test_corrupting_everything_is_the_corrupted_run(run, all_sites):
    for source in ("clean_trajectory", "same_latent"):
        rows = run(of_kind(all_sites, "cross_attn"), [], direction="corrupt", source=source)
        assert torch.equal(rows[2], rows[1])
        assert torch.equal(rows[3], rows[0])
        assert not torch.equal(rows[0], rows[1])


def test_all_heads_of_a_layer_are_the_layer(run, tiny_double, all_sites):
    site = named(all_sites, "unet.cross_attn.6")[0]
    count = sites.heads(tiny_double, site)
    assert count > 1
    one = Intervention((site,), head=1)
    rows = run([site], one, steps=1)
    assert not torch.equal(rows[3], rows[1])
    assert not torch.equal(rows[3], rows[2])

    every = [Intervention((site,), head=h) for h in range(count)]
    embeds = _embeds_of(tiny_double)
    renderer = Renderer.of(
        tiny_double, score=brightness, steps=2, guidance_scale=7.5, solver_name="own", direction="restore",
        minimum_gap=0.0, batch_size=8, memory=None,
    )  # fmt: skip
    batch = unet_trace._Batch(
        renderer, [Intervention((site,)), Intervention(())], twins=False, both=True
    )
    whole = batch.run(*embeds, seed=0, on_step=lambda step: None)
    # One row that takes every head: the copiers of all heads act on row 2.
    batch._copiers = lambda: ({}, _all_heads(tiny_double, every, batch))
    heads = batch.run(*embeds, seed=0, on_step=lambda step: None)
    assert torch.allclose(whole[2], heads[2], atol=1e-12)


def _embeds_of(model):
    (made,), _ = corruption.corruptions(model, [PROBE], noise_samples=1, sigma=1.0)
    return text_encoder_trace.encode_restored(model.text_encoder, made, []), model.encode([""])


def _all_heads(model, every, batch):
    entries = []
    for intervention in every:
        linear, columns = unet_trace.head_columns(model, intervention.sites[0], intervention.head)
        entries.append((2, intervention, columns))
    return {linear: unet_trace.on_first(batch._copier(entries))}


def test_windows_share_out_the_steps():
    for steps in (1, 2, 3, 10, 20, 51):
        seen = [
            [Intervention((), window=w).active(step, steps) for w in ("early", "middle", "late")]
            for step in range(steps + 1)  # some schedulers take one step more
        ]
        assert all(sum(row) == 1 for row in seen)
        assert all(Intervention(()).active(step, steps) for step in range(steps + 1))


def test_a_window_acts_in_its_steps_only(run, all_sites):
    attention = tuple(of_kind(all_sites, "cross_attn"))
    for window in ("early", "middle", "late"):
        rows = run(attention, Intervention(attention, window=window), steps=3)
        assert not torch.equal(rows[3], rows[1])
        assert not torch.equal(rows[3], rows[0])
    alone = run(
        Intervention(attention, window="early"), steps=1
    )  # of one step the early third is empty
    assert torch.equal(alone[2], alone[1])


def test_rows_heads_windows_and_groups_are_named(tiny_sd1):
    options = {"steps": 2, "score": brightness, "sigma": 1.0, "solver": "dpm"}
    rows = op.trace.unet(
        tiny_sd1, [PROBE], only=["unet.self_attn.0"], heads=True, windows=("", "late"), **options
    ).table.to_pylist()
    count = sites.heads(tiny_sd1, sites.get(tiny_sd1, "unet.self_attn.0"))
    assert [(r["head"], r["window"]) for r in rows] == [
        (h, w) for h in (None, *range(count)) for w in ("", "late")
    ]
    attention = of_kind(sites.find_unet(tiny_sd1.unet), "cross_attn")
    (row,) = op.trace.unet(
        tiny_sd1, [PROBE], groups={"all cross-attention": attention}, **options
    ).table.to_pylist()
    assert (row["site"], row["kind"]) == ("all cross-attention", "group")
    assert row["score_restored"] == pytest.approx(row["score_clean"], abs=1e-6)


def test_a_stopped_sweep_goes_on_to_the_same_table(tiny_sd1, tmp_path):
    options = {"steps": 1, "kinds": ("cross_attn",), "score": brightness, "seeds": (0, 1, 2)}
    whole = op.trace.unet(tiny_sd1, [PROBE], **options)

    def stop(done, total):
        if done >= 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        op.trace.unet(tiny_sd1, [PROBE], folder=tmp_path, on_progress=stop, **options)
    drawn = []
    again = op.trace.unet(
        tiny_sd1, [PROBE], folder=tmp_path, on_progress=lambda *x: drawn.append(x), **options
    )
    assert again.table.equals(whole.table)
    assert drawn[0][0] > 1000  # the first run was read, not drawn
    with pytest.raises(ValueError, match="steps"):
        op.trace.unet(tiny_sd1, [PROBE], folder=tmp_path, **{**options, "steps": 2})


def test_another_model_is_noticed_on_resuming(tiny_sd1, tmp_path):
    from overpaint.zoo import builders

    options = {"steps": 1, "only": ["unet.mlp.0"], "score": brightness, "folder": tmp_path}
    op.trace.unet(tiny_sd1, [PROBE], **options)
    with pytest.raises(ValueError, match="weights"):
        op.trace.unet(op.load(builders.tiny(seed=1)), [PROBE], **options)


def test_memory_lowers_the_batch_and_changes_nothing(tiny_sd1):
    options = {"steps": 1, "kinds": ("cross_attn",), "score": brightness, "sigma": 1.0}
    free = op.trace.unet(tiny_sd1, [PROBE], **options)
    tight = op.trace.unet(tiny_sd1, [PROBE], memory=8, **options)
    assert 4 <= tight.protocol["batch_size"] < free.protocol["batch_size"]
    for name in ("score_restored", "latent_recovery"):
        a, b = (torch.tensor(t.table[name].to_pylist()) for t in (free, tight))
        assert torch.allclose(a, b, atol=1e-5)


def test_latents_that_are_not_finite_are_an_error(tiny_sd1):
    with (
        hooks.patch({tiny_sd1.unet.conv_out: lambda output: output * float("nan")}),
        pytest.raises(
            UnsupportedModel, match="latents became NaN or infinite from seed 0: load it in"
        ),
    ):
        op.trace.unet(tiny_sd1, [PROBE], steps=1, score=brightness)


def test_a_probe_that_comes_with_a_seed_uses_it(tiny_sd1):
    options = {"steps": 1, "score": brightness, "only": ["unet.mlp.0"], "sigma": 1.0}
    own = Probe("a", "style", PROBE.prompt, PROBE.concept, seed=7)
    asked = op.trace.unet(tiny_sd1, [PROBE], seeds=(7,), **options).table
    assert op.trace.unet(tiny_sd1, [own], seeds=(0, 1), **options).table.equals(asked)
    options = {"steps": 1, "score": brightness, "positions": ("eos",), "control": False}
    asked = op.trace.text_encoder(tiny_sd1, [PROBE], seeds=(7,), **options).table
    assert op.trace.text_encoder(tiny_sd1, [own], seeds=(0, 1), **options).table.equals(asked)
