"""Causal tracing of the UNet: laws of restored sites, settings and resumed traces. Exact means `torch.equal`."""

import pytest
import torch
from diffusers import PNDMScheduler
from diffusers.models.attention_processor import AttnProcessor
from trace_inputs import brightness, hook_count

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sampling import denoise
from overpaint.probes import Probe
from overpaint.trace import Drawing, Noise, TextStates, UNetStates, unet_trace
from overpaint.trace.batches import head_columns, on_first
from overpaint.trace.corruption import corruptions
from overpaint.trace.renderer import Renderer
from overpaint.trace.text_encoder_trace import encode_restored
from overpaint.trace.unet_trace import Intervention
from overpaint.zoo import builders

PROBE = Probe("a", "style", "a cat in openmoji style", "openmoji style")
LAST = ("unet.resnet.21", "unet.self_attn.15", "unet.cross_attn.15", "unet.mlp.15")


@pytest.fixture(scope="module")
def embeds(tiny_double):
    """Clean and corrupted text features, and those of the empty prompt."""
    return embeds_of(tiny_double)


@pytest.fixture(scope="module")
def all_sites(tiny_double):
    return sites.find_unet(tiny_double.unet)


def embeds_of(model):
    (corruption,), _ = corruptions(model, [PROBE], Noise(sigma=1.0))
    return encode_restored(model.text_encoder, corruption, []), model.encode([""])


def restore(
    model, clean_corrupted, negative, groups, *, steps=3, guidance_scale=7.5, rows=64, direction="restore", **options
):  # fmt: skip
    """Call `unet_trace.restore`; a group is an intervention, or the sites that one row restores whole."""
    drawing = Drawing(steps, guidance_scale, "own", batch_size=rows)
    renderer = Renderer.of(model, drawing, scorer=brightness, direction=direction, minimum_gap=0.02)
    plan = [g if isinstance(g, Intervention) else Intervention(tuple(g)) for g in groups]
    return unet_trace.restore(renderer, clean_corrupted, negative, plan, **{"seed": 0, **options})


@pytest.fixture
def run(tiny_double, embeds):
    return lambda *groups, **options: restore(tiny_double, *embeds, groups, **options)


def of_kind(all_sites, kind):
    return [site for site in all_sites if site.kind == kind]


def named(all_sites, *names):
    return [site for site in all_sites if site.name in names]


def test_hooks_that_return_their_input_change_nothing_and_are_removed(
    tiny_double, embeds, all_sites
):
    latents = tiny_double.initial_latents([0, 0])
    options = {"steps": 2, "guidance_scale": 7.5}
    plain = denoise(tiny_double, latents, embeds[0], embeds[1], **options)
    idle = {site.module(tiny_double): (lambda output: output) for site in all_sites}
    with hooks.patch(idle) as calls:
        hooked = denoise(tiny_double, latents, embeds[0], embeds[1], **options)
    assert torch.equal(plain, hooked)
    assert set(calls.values()) == {2}
    assert hook_count(tiny_double.unet) == 0


def test_without_noise_all_rows_are_equal(tiny_double, embeds, all_sites):
    clean = embeds[0][:1].expand(2, -1, -1)
    rows = restore(tiny_double, clean, embeds[1], [[all_sites[5]]], steps=2)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_the_clean_and_corrupted_rows_equal_plain_runs(tiny_double, embeds, run):
    rows = run([])
    plain = denoise(
        tiny_double, tiny_double.initial_latents([0] * 4), embeds[0][[0, 1, 1, 1]], embeds[1], steps=3,
        guidance_scale=7.5,
    )  # fmt: skip
    assert torch.equal(rows, plain[:3])
    assert (rows[0] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("branches", ["both", "cond"])
def test_restoring_all_sites_equals_the_clean_run(run, all_sites, branches, steps):
    rows = run(all_sites, branches=branches, steps=steps)
    assert torch.equal(rows[2], rows[0])


@pytest.mark.parametrize("source", ["clean_trajectory", "same_latent"])
@pytest.mark.parametrize("branches", ["both", "cond"])
def test_restoring_all_cross_attention_equals_the_clean_run(run, all_sites, branches, source):
    rows = run(of_kind(all_sites, "cross_attn"), branches=branches, source=source)
    assert torch.equal(rows[2], rows[0])


def test_restoring_the_last_four_layers_equals_the_clean_run(run, all_sites):
    rows = run(named(all_sites, *LAST))
    assert torch.equal(rows[2], rows[0])


@pytest.mark.parametrize("source", ["clean_trajectory", "same_latent"])
def test_restoring_nothing_equals_the_corrupted_run(run, source):
    rows = run([], source=source)
    assert torch.equal(rows[2], rows[1])


def test_sites_before_any_text_have_no_effect_at_the_first_step(run, all_sites):
    early = named(all_sites, "unet.resnet.0", "unet.self_attn.0")
    rows = run(*[[site] for site in early], steps=1)
    assert torch.equal(rows[2], rows[1])
    assert torch.equal(rows[3], rows[1])


def test_sites_before_any_text_only_leak_the_clean_latents(run, all_sites):
    early = [[site] for site in named(all_sites, "unet.resnet.0", "unet.self_attn.0")]
    control = run(*early, source="same_latent")
    assert torch.equal(control[2], control[1])
    assert torch.equal(control[3], control[1])
    paper = run(*early, source="clean_trajectory")
    assert not torch.equal(paper[2], paper[1])
    assert not torch.equal(paper[3], paper[1])


def test_restoring_all_self_attention_equals_neither_run(run, all_sites):
    rows = run(of_kind(all_sites, "self_attn"))
    assert (rows[2] - rows[0]).abs().max() > 1e-6
    assert (rows[2] - rows[1]).abs().max() > 1e-6


@pytest.mark.parametrize("source", ["clean_trajectory", "same_latent"])
def test_a_site_restored_in_a_batch_equals_that_site_restored_alone(run, all_sites, source):
    some = [[site] for site in all_sites[2:6]]
    together = run(*some, source=source, steps=2)
    parts = run(*some, rows=6, source=source, steps=2)
    alone = run(some[3], source=source, steps=2)
    assert torch.allclose(together, parts, atol=1e-5)
    assert torch.allclose(together[5], alone[2], atol=1e-5)


def test_the_two_settings_of_branches_differ(run, all_sites):
    site = named(all_sites, "unet.resnet.12")
    both, cond = run(site, branches="both"), run(site, branches="cond")
    assert torch.equal(both[:2], cond[:2])
    assert not torch.equal(both[2], cond[2])


def test_without_guidance_there_is_one_branch(tiny_double, embeds, all_sites):
    rows = restore(tiny_double, *embeds, [all_sites], steps=2, guidance_scale=1)
    assert torch.equal(rows[2], rows[0])
    assert not torch.equal(rows[1], rows[0])


def test_pndm_with_its_additional_step_is_traced(embeds, all_sites):
    pipe = builders.tiny().to(torch.float64)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config, skip_prk_steps=True)
    model = op.load(pipe)
    for source in ("clean_trajectory", "same_latent"):
        ticks = []
        rows = restore(
            model, *embeds, [of_kind(all_sites, "cross_attn"), named(all_sites, "unet.resnet.0")], steps=3,
            guidance_scale=2, source=source, on_step=lambda *step, ticks=ticks: ticks.append(step),
        )  # fmt: skip
        assert len(ticks) == 4
        assert torch.equal(rows[2], rows[0])
        assert torch.equal(rows[3], rows[1]) == (source == "same_latent")


def test_fused_and_plain_attention_kernels_agree():
    """The fused kernel against the plain one."""
    options = {
        "drawing": Drawing(steps=2),
        "noise": Noise(sigma=1.0),
        "scorer": brightness,
        "states": UNetStates(kinds=("cross_attn",)),
    }
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
        tiny_sd1,
        [PROBE],
        drawing=Drawing(steps=2, batch_size=64, solver="own"),
        noise=Noise(sigma=1.0),
        scorer=brightness,
        minimum_gap=-1.0,
    )


def test_there_is_one_row_a_site(traced, all_sites):
    rows = traced.table.to_pylist()
    assert [row["site"] for row in rows] == [site.name for site in all_sites]
    assert {(row["source"], row["branches"], row["seed"]) for row in rows} == {
        ("clean_trajectory", "both", 0)
    }
    assert traced.protocol["scorer"] == "brightness"
    assert all(
        row["indirect_effect"] == row["score_restored"] - row["score_corrupted"] for row in rows
    )


def test_the_clean_score_equals_that_of_generate(traced, tiny_sd1):
    plain = tiny_sd1.generate(PROBE.prompt, seed=0, steps=2)
    score = traced.table["score_clean"][0].as_py()
    assert score == pytest.approx(plain.images.mean().item(), abs=1e-5)


def test_another_noise_sample_changes_only_the_corrupted_run(tiny_sd1):
    rows = op.trace.unet(
        tiny_sd1,
        [PROBE],
        drawing=Drawing(steps=1),
        noise=Noise(sigma=1.0, samples=2),
        scorer=brightness,
        states=UNetStates(kinds=("cross_attn",)),
    ).table.to_pylist()
    first, second = rows[0], rows[-1]
    assert (first["noise"], second["noise"]) == (0, 1)
    assert first["score_clean"] == second["score_clean"]
    assert first["score_corrupted"] != second["score_corrupted"]


def test_the_empty_prompt_is_never_corrupted(tiny_sd1):
    """The unconditional rows of every run get the features of "", byte for byte."""
    seen = []

    def note(module, args, kwargs):
        seen.append(kwargs["encoder_hidden_states"])

    handle = tiny_sd1.unet.register_forward_pre_hook(note, with_kwargs=True)
    try:
        op.trace.unet(
            tiny_sd1,
            [PROBE],
            drawing=Drawing(steps=1),
            scorer=brightness,
            states=UNetStates(kinds=("mlp",)),
        )
    finally:
        handle.remove()
    empty = tiny_sd1.encode([""])
    rows = seen[-1].shape[0] // 2
    assert rows == 20
    assert torch.equal(seen[-1][:rows], empty.expand(rows, -1, -1))
    assert len({row.numpy().tobytes() for row in seen[-1][rows:]}) == 2  # clean, corrupted


def test_no_hook_is_left_on_the_model(tiny_sd1):
    def fail(images, probes):
        raise RuntimeError("on purpose")

    def fail_late(done, total, label):
        if done == 500:  # the first of two steps
            raise KeyboardInterrupt

    options = {"drawing": Drawing(steps=2), "states": UNetStates(kinds=("mlp",))}
    with pytest.raises(RuntimeError, match="on purpose"):
        op.trace.unet(tiny_sd1, [PROBE], scorer=fail, **options)
    with pytest.raises(KeyboardInterrupt):
        op.trace.unet(tiny_sd1, [PROBE], scorer=brightness, on_progress=fail_late, **options)
    assert hook_count(tiny_sd1.unet) == hook_count(tiny_sd1.text_encoder) == 0


def test_progress_is_reported_in_thousandths_of_a_run(tiny_sd1):
    seen = []
    op.trace.unet(
        tiny_sd1,
        [PROBE],
        drawing=Drawing(steps=2, batch_size=12, seeds=(0, 1)),
        states=UNetStates(kinds=("mlp",)),
        scorer=brightness,
        on_progress=lambda *x: seen.append(x),
    )
    # Thousandths of a run: two runs of two batches of two steps.
    label = "tracing the UNet, clean trajectory"
    assert seen == [(250 * i, 2000, label) for i in range(1, 9)]


def test_a_layer_that_does_not_run_once_a_step_raises(tiny_double, embeds, all_sites):
    unused = sites.Site("unet.mlp.99", "unet", "mlp", 99, "down_blocks.0.attentions.0.spare")
    wrapper = tiny_double.unet.get_submodule("down_blocks.0.attentions.0")
    wrapper.spare = torch.nn.Identity()
    try:
        with pytest.raises(UnsupportedModel, match=r"a site's module ran \[0\] times in 1 steps"):
            restore(tiny_double, *embeds, [[unused]], steps=1, guidance_scale=2)
    finally:
        del wrapper.spare


def test_batches_that_disagree_on_the_clean_row_raise(tiny_sd1, all_sites):
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
        (
            {"drawing": Drawing(batch_size=3)},
            r"`batch_size` must be at least 4 \(clean, corrupted, two restored\), got 3",
        ),
        (
            {"drawing": Drawing(memory=0.001)},
            "`memory` of 0.001 MiB is too little: the smallest batch of the UNet, 4",
        ),
        (
            {"states": UNetStates(only=["unet.mlp.99"])},
            "no states are selected, so there is nothing to trace",
        ),
        ({"direction": "both"}, "`direction` must be 'restore' or 'corrupt', got 'both'"),
    ],
)
def test_settings_out_of_range_are_refused(tiny_sd1, change, message):
    with pytest.raises(ValueError, match=message):
        op.trace.unet(tiny_sd1, [PROBE], scorer=brightness, **change)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("ff",)}, r"`kinds` must be among resnet, self_attn.*got \['ff'\]"),
        ({"kinds": ()}, "`kinds` must be among resnet"),
        ({"windows": ("dawn",)}, r"`windows` must be among '', 'early', .*got \['dawn'\]"),
        ({"windows": ()}, "`windows` must be among '', 'early'"),
    ],
)
def test_unknown_kinds_and_windows_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        UNetStates(**settings)


def test_corrupting_all_cross_attention_equals_the_corrupted_run(run, all_sites):
    for source in ("clean_trajectory", "same_latent"):
        rows = run(of_kind(all_sites, "cross_attn"), [], direction="corrupt", source=source)
        assert torch.equal(rows[2], rows[1])
        assert torch.equal(rows[3], rows[0])
        assert not torch.equal(rows[0], rows[1])


def test_restoring_all_heads_of_a_layer_equals_restoring_the_layer(run, tiny_double, all_sites):
    site = named(all_sites, "unet.cross_attn.6")[0]
    count = sites.heads(tiny_double, site)
    assert count > 1
    one = Intervention((site,), head=1)
    rows = run([site], one, steps=1)
    assert not torch.equal(rows[3], rows[1])
    assert not torch.equal(rows[3], rows[2])

    every = [Intervention((site,), head=h) for h in range(count)]
    embeds = embeds_of(tiny_double)
    drawing = Drawing(steps=2, guidance_scale=7.5, solver="own", batch_size=8)
    renderer = Renderer.of(tiny_double, drawing, scorer=brightness)
    batch = unet_trace._Batch(
        renderer, [Intervention((site,)), Intervention(())], twins=False, both=True
    )
    whole = batch.run(*embeds, seed=0, on_step=lambda step: None)
    # One row that takes every head: the copiers of all heads act on row 2.
    batch._copiers = lambda: ({}, _all_heads(tiny_double, every, batch))
    heads = batch.run(*embeds, seed=0, on_step=lambda step: None)
    assert torch.allclose(whole[2], heads[2], atol=1e-12)


def _all_heads(model, every, batch):
    entries = []
    for intervention in every:
        linear, columns = head_columns(model, intervention.sites[0], intervention.head)
        entries.append((2, intervention, columns))
    return {linear: on_first(batch._copier(entries))}


def test_each_step_is_in_one_window():
    for steps in (1, 2, 3, 10, 20, 51):
        seen = [
            [Intervention((), window=w).active(step, steps) for w in ("early", "middle", "late")]
            for step in range(steps + 1)  # some schedulers take one step more
        ]
        assert all(sum(row) == 1 for row in seen)
        assert all(Intervention(()).active(step, steps) for step in range(steps + 1))


def test_a_window_acts_only_in_its_steps(run, all_sites):
    attention = tuple(of_kind(all_sites, "cross_attn"))
    for window in ("early", "middle", "late"):
        rows = run(attention, Intervention(attention, window=window), steps=3)
        assert not torch.equal(rows[3], rows[1])
        assert not torch.equal(rows[3], rows[0])
    alone = run(
        Intervention(attention, window="early"), steps=1
    )  # of one step the early third is empty
    assert torch.equal(alone[2], alone[1])


def test_heads_windows_and_groups_are_named_in_the_table(tiny_sd1):
    options = {
        "drawing": Drawing(steps=2, solver="dpm"),
        "scorer": brightness,
        "noise": Noise(sigma=1.0),
    }
    rows = op.trace.unet(
        tiny_sd1,
        [PROBE],
        states=UNetStates(only=["unet.self_attn.0"], heads=True, windows=("", "late")),
        **options,
    ).table.to_pylist()
    count = sites.heads(tiny_sd1, sites.get(tiny_sd1, "unet.self_attn.0"))
    assert [(r["head"], r["window"]) for r in rows] == [
        (h, w) for h in (None, *range(count)) for w in ("", "late")
    ]
    attention = of_kind(sites.find_unet(tiny_sd1.unet), "cross_attn")
    (row,) = op.trace.unet(
        tiny_sd1, [PROBE], states=UNetStates(groups={"all cross-attention": attention}), **options
    ).table.to_pylist()
    assert (row["site"], row["kind"]) == ("all cross-attention", "group")
    assert row["score_restored"] == pytest.approx(row["score_clean"], abs=1e-6)


def test_a_stopped_trace_continues_to_the_same_table(tiny_sd1, tmp_path):
    options = {
        "drawing": Drawing(steps=1, seeds=(0, 1, 2)),
        "states": UNetStates(only=["unet.mlp.0", "unet.cross_attn.3"]),
        "scorer": brightness,
    }
    whole = op.trace.unet(tiny_sd1, [PROBE], **options)

    def stop(done, total, label):
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
        op.trace.unet(
            tiny_sd1,
            [PROBE],
            folder=tmp_path,
            **{**options, "drawing": Drawing(steps=2, seeds=(0, 1, 2))},
        )


def test_another_model_is_refused_on_resuming(tiny_sd1, tmp_path):
    options = {
        "drawing": Drawing(steps=1),
        "states": UNetStates(only=["unet.mlp.0"]),
        "scorer": brightness,
        "folder": tmp_path,
    }
    op.trace.unet(tiny_sd1, [PROBE], **options)
    with pytest.raises(ValueError, match="weights"):
        op.trace.unet(op.load(builders.tiny(seed=1)), [PROBE], **options)


def test_memory_lowers_the_batch_and_changes_nothing(tiny_sd1):
    options = {
        "states": UNetStates(kinds=("cross_attn",)),
        "scorer": brightness,
        "noise": Noise(sigma=1.0),
    }
    free, tight = (
        op.trace.unet(tiny_sd1, [PROBE], drawing=Drawing(steps=1, memory=memory), **options)
        for memory in (None, 8)
    )
    assert 4 <= tight.protocol["batch_size"] < free.protocol["batch_size"]
    for name in ("score_restored", "latent_recovery"):
        a, b = (torch.tensor(t.table[name].to_pylist()) for t in (free, tight))
        assert torch.allclose(a, b, atol=1e-5)


def test_latents_that_are_not_finite_raise(tiny_sd1):
    with (
        hooks.patch({tiny_sd1.unet.conv_out: lambda output: output * float("nan")}),
        pytest.raises(
            UnsupportedModel, match="latents became NaN or infinite from seed 0: load it in"
        ),
    ):
        op.trace.unet(tiny_sd1, [PROBE], drawing=Drawing(steps=1), scorer=brightness)


def test_a_probe_with_a_seed_of_its_own_uses_it(tiny_sd1):
    seeded = Probe("a", "style", PROBE.prompt, PROBE.concept, seed=7)
    for trace, states in (
        (op.trace.unet, UNetStates(only=["unet.mlp.0"])),
        (op.trace.text_encoder, TextStates(only=[("text.0.mlp", "eos")])),
    ):
        first, second = (
            trace(tiny_sd1, [probe], states=states, drawing=Drawing(steps=1, seeds=seeds), scorer=brightness)
            for probe, seeds in ((PROBE, (7,)), (seeded, (0, 1)))
        )  # fmt: skip
        assert second.table.equals(first.table)
