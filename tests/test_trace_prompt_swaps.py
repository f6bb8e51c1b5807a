"""The direct effect: laws of windows of cross-attention layers that read another prompt, and their settings."""

from contextlib import nullcontext

import pytest
import torch
from trace_inputs import brightness, hook_count

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import hooks, sites
from overpaint.model.sampling import denoise
from overpaint.probes import Probe
from overpaint.trace import Drawing, pick_window, prompt_swap, smallest_window
from overpaint.trace.prompt_swaps import draw
from overpaint.trace.renderer import Renderer

PROBE = Probe("a", "style", "a cat in openmoji style", "openmoji style", "openmoji")
OTHER = Probe("b", "style", "a dog in openmoji style", "openmoji style", "openmoji")
TARGET = "noto style"


def encode(model, *prompts):
    """Encode each prompt on its own: in a batch, equal rows may be rounded apart."""
    return torch.cat([model.encode([prompt]) for prompt in prompts])


@pytest.fixture(scope="module")
def layers(tiny_double):
    return [site for site in sites.find_unet(tiny_double.unet) if site.kind == "cross_attn"]


@pytest.fixture
def run(tiny_double):
    def call(
        *windows,
        target="a cat in noto style",
        steps=2,
        guidance_scale=7.5,
        batch_size=32,
        within=None,
    ):
        drawing = Drawing(steps, guidance_scale, "own", batch_size=batch_size)
        renderer = Renderer.of(tiny_double, drawing, draw=False)
        embeds = encode(tiny_double, PROBE.prompt, target)
        with within or nullcontext():
            return draw(
                renderer, embeds, tiny_double.encode([""]), [list(w) for w in windows], seed=0
            )

    return call


@pytest.mark.parametrize("guidance_scale", [1, 7.5])
def test_all_layers_equal_the_target_and_no_layer_equals_the_original(run, layers, guidance_scale):
    rows = run(layers, (), guidance_scale=guidance_scale)
    assert torch.equal(rows[2], rows[1])
    assert torch.equal(rows[3], rows[0])
    assert (rows[0] - rows[1]).abs().max() > 1e-3


def test_every_layer_changes_the_picture(run, layers):
    rows = run(*[[layer] for layer in layers])
    apart = (rows[2:] - rows[0]).flatten(1).norm(dim=1)
    assert (apart > 1e-6).all()
    assert len({round(x, 9) for x in apart.tolist()}) == 16


def test_original_and_target_rows_equal_plain_runs(tiny_double, run, layers):
    rows = run(layers[:1], layers[1:2])
    plain = denoise(
        tiny_double,
        tiny_double.initial_latents([0] * 4),
        encode(tiny_double, PROBE.prompt, "a cat in noto style", PROBE.prompt, PROBE.prompt),
        tiny_double.encode([""]),
        steps=2,
        guidance_scale=7.5,
    )
    assert torch.equal(rows[:2], plain[:2])


def test_a_target_equal_to_the_prompt_changes_nothing(run, layers):
    rows = run(layers[3:5], target=PROBE.prompt)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_a_window_in_a_batch_equals_that_window_alone(run, layers):
    windows = [layers[i : i + 2] for i in range(6)]
    together, parts, alone = run(*windows), run(*windows, batch_size=4), run(windows[4])
    assert torch.allclose(together[6], alone[2], atol=1e-5)
    assert torch.allclose(together, parts, atol=1e-5)


def test_a_layer_reads_the_target_in_its_row_of_the_conditional_branch_only(
    tiny_double, run, layers
):
    seen = []

    def note(states):
        seen.append(states)
        return states

    run(layers[5:6], (), steps=1, within=hooks.patch({layers[5].module(tiny_double).to_k: note}))
    (keys,) = seen
    empty, original, target, swapped, left = keys[0], *keys[4:]
    assert all(torch.equal(row, empty) for row in keys[:4])
    assert torch.equal(swapped, target)
    assert torch.equal(left, original)
    assert not torch.equal(original, target)


@pytest.fixture(scope="module")
def swapped(tiny_sd1):
    return prompt_swap(
        tiny_sd1,
        [PROBE, OTHER],
        target=TARGET,
        window=3,
        drawing=Drawing(steps=2, solver="own"),
        scorer=brightness,
        minimum_gap=-1,
    )


def test_each_prompt_has_a_row_for_each_window(swapped):
    rows = swapped.table.to_pylist()
    assert [row["site"] for row in rows] == [f"unet.cross_attn.{i}" for i in range(14)] * 2
    assert {row["probe"] for row in rows} == {"a", "b"}
    assert swapped.protocol["window"] == 3
    assert swapped.protocol["targets"] == ["a cat in noto style", "a dog in noto style"]


def test_scores_equal_those_of_the_pictures(swapped, tiny_sd1):
    row = swapped.table.to_pylist()[0]
    plain = tiny_sd1.generate(["a cat in openmoji style", "a cat in noto style"], seed=0, steps=2)
    original, target = plain.images.mean((1, 2, 3)).tolist()
    assert row["score_clean"] == pytest.approx(original, abs=1e-5)
    assert row["score_corrupted"] == pytest.approx(target, abs=1e-5)
    assert row["direct_effect"] == row["score_clean"] - row["score_restored"]
    assert row["indirect_effect"] is None
    assert swapped.value() == "direct_effect"


def test_the_widest_window_has_the_full_effect(tiny_sd1):
    for pick in ("min", "max"):
        table = prompt_swap(
            tiny_sd1,
            [PROBE],
            target=TARGET,
            window=16,
            pick=pick,
            drawing=Drawing(steps=2),
            scorer=brightness,
            minimum_gap=-1,
        ).table
        assert table.num_rows == 1
        assert table["recovery"][0].as_py() == pytest.approx(1, abs=1e-6)
        assert table["latent_recovery"][0].as_py() == pytest.approx(1, abs=1e-6)


def test_the_best_window_has_the_least_or_greatest_mean(swapped, tiny_sd1):
    rows = swapped.table.to_pylist()
    means = [sum(r["score_restored"] for r in rows[i::14]) / 2 for i in range(14)]
    start = means.index(min(means))
    names = [site.name for site in pick_window(swapped)]
    assert names == [f"unet.cross_attn.{i}" for i in range(start, start + 3)]
    assert pick_window(swapped)[2].module(tiny_sd1) is sites.get(tiny_sd1, names[2]).module(
        tiny_sd1
    )
    largest = op.trace.Effects(swapped.table, {**swapped.protocol, "pick": "max"})
    assert pick_window(largest)[0].index == means.index(max(means))


def test_the_scorer_gets_the_probe_of_the_concept_or_of_the_target(tiny_sd1):
    scored = []

    def note(images, probes):
        scored.append({(p.prompt, p.label, p.kind) for p in probes})
        return images.mean((1, 2, 3))

    options = {"target": TARGET, "drawing": Drawing(steps=1), "window": 16, "scorer": note}
    prompt_swap(tiny_sd1, [PROBE], pick="min", **options)
    prompt_swap(tiny_sd1, [PROBE], pick="max", **options)
    assert scored == [
        {("a cat in openmoji style", "openmoji", "style")},
        {("a cat in noto style", "noto", "style")},
    ]


def test_a_function_may_return_the_target(tiny_sd1):
    def other(probe):
        return Probe(probe.id, probe.kind, "an owl", "owl")

    effects = prompt_swap(
        tiny_sd1, [PROBE], target=other, window=16, drawing=Drawing(steps=1), scorer=brightness
    )
    assert effects.protocol["targets"] == ["an owl"]


def test_the_smallest_window_that_meets_a_threshold_is_returned(tiny_sd1):
    original = tiny_sd1.generate(PROBE.prompt, steps=1).images

    def change(images, probes):
        return (images - original).flatten(1).norm(dim=1)

    options = {
        "target": TARGET,
        "drawing": Drawing(steps=1, solver="own"),
        "scorer": change,
        "pick": "max",
    }
    tables = [prompt_swap(tiny_sd1, [PROBE], window=m, **options).table for m in (1, 2)]
    one, two = (max(table["score_restored"].to_pylist()) for table in tables)
    assert one < two
    for threshold, expected in ((one - 1e-6, 1), ((one + two) / 2, 2)):
        effects = smallest_window(tiny_sd1, [PROBE], threshold=threshold, **options)
        assert effects.protocol["window"] == expected
        assert effects.protocol["solver"] == "own"
        assert len(pick_window(effects)) == expected


def test_a_threshold_out_of_reach_is_refused(tiny_xl):
    with pytest.raises(
        ValueError, match=r"no window meets the threshold of 2: with .*Give a threshold of at most"
    ):
        smallest_window(
            tiny_xl,
            [PROBE],
            target=TARGET,
            threshold=2,
            pick="max",
            drawing=Drawing(steps=1),
            scorer=brightness,
        )


def test_a_stopped_run_continues(tiny_sd1, tmp_path):
    options = {"target": TARGET, "window": 15, "drawing": Drawing(steps=2), "scorer": brightness}
    whole = prompt_swap(tiny_sd1, [PROBE, OTHER], **options)

    def stop(done, total, label):
        assert total == 2000
        if done == 1500:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prompt_swap(tiny_sd1, [PROBE, OTHER], folder=tmp_path, on_progress=stop, **options)
    ticks = []
    again = prompt_swap(
        tiny_sd1, [PROBE, OTHER], folder=tmp_path, on_progress=lambda *t: ticks.append(t), **options
    )
    label = "swapping prompts"
    assert ticks == [(1500, 2000, label), (2000, 2000, label)]
    assert again.table.equals(whole.table)


def test_no_hook_is_left_on_the_model(tiny_sd1):
    def fail(images, probes):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        prompt_swap(
            tiny_sd1, [PROBE], target=TARGET, drawing=Drawing(steps=1), window=16, scorer=fail
        )
    assert hook_count(tiny_sd1.unet) == 0


def test_text_that_is_not_a_tensor_raises(tiny_double, run, layers):
    module = layers[0].module(tiny_double)

    def wrap(args, kwargs):
        return args, {**kwargs, "encoder_hidden_states": (kwargs["encoder_hidden_states"], [])}

    with pytest.raises(UnsupportedModel, match="not given its text as one tensor"):
        run(layers[:1], steps=1, within=hooks.patch_inputs({module: wrap}))


def test_a_layer_that_does_not_run_raises(tiny_double, run):
    unused = sites.Site("unet.cross_attn.99", "unet", "cross_attn", 99, "conv_in.spare")
    tiny_double.unet.conv_in.spare = torch.nn.Identity()
    try:
        with pytest.raises(UnsupportedModel, match=r"layer ran \[0\] times in 1 steps"):
            run([unused], steps=1)
    finally:
        del tiny_double.unet.conv_in.spare


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "`window` must be from 1 to 16, .* got 0"),
        ({"window": 17}, "`window` must be from 1 to 16, .* got 17"),
        ({"pick": "best"}, "`pick` must be 'min' .* got 'best'"),
        ({"target": " "}, "`target` is empty"),
        ({"probes": []}, "`probes` is empty"),
        (
            {"probes": [Probe("c", "style", "noto style, noto style", "noto style")]},
            "occurs 2 times",
        ),
    ],
)
def test_settings_out_of_range_are_refused(tiny_sd1, change, message):
    settings = {"target": TARGET, "probes": [PROBE], "scorer": brightness, **change}
    probes = settings.pop("probes")
    with pytest.raises(ValueError, match=message):
        prompt_swap(tiny_sd1, probes, **settings)


def test_effects_of_another_trace_are_refused():
    effects = op.trace.Effects.of([], {"trace": "unet"})
    with pytest.raises(
        ValueError, match="these effects come from 'unet': pass the result of `trace.prompt_swap`"
    ):
        pick_window(effects)


def test_sdxls_pooled_text_is_not_swapped(tiny_xl):
    """The pooled text reaches the UNet beside cross-attention, so even all layers are not quite the target."""
    rows = prompt_swap(
        tiny_xl,
        [PROBE],
        target=TARGET,
        window=1,
        drawing=Drawing(steps=1),
        scorer=brightness,
        minimum_gap=-1,
    ).table.to_pylist()
    assert all(row["latent_recovery"] != 0 for row in rows)
    (whole,) = prompt_swap(
        tiny_xl,
        [PROBE],
        target=TARGET,
        window=len(rows),
        drawing=Drawing(steps=1),
        scorer=brightness,
        minimum_gap=-1,
    ).table.to_pylist()
    assert 0 < whole["latent_recovery"] < 1
    (same,) = prompt_swap(
        tiny_xl,
        [PROBE],
        target="openmoji style",
        window=len(rows),
        drawing=Drawing(steps=1),
        scorer=brightness,
    ).table.to_pylist()
    assert same["score_restored"] == same["score_clean"] == same["score_corrupted"]
    assert same["latent_recovery"] is None


def test_the_smallest_window_uses_solver_and_memory(tiny_sd1):
    options = {"target": TARGET, "scorer": brightness, "threshold": 9.0}
    free, tight = (
        smallest_window(
            tiny_sd1, [PROBE], drawing=Drawing(steps=1, solver="dpm", memory=memory), **options
        )
        for memory in (None, 8)
    )
    assert free.protocol["solver"] == "dpm"
    assert tight.protocol["batch_size"] < free.protocol["batch_size"]


def test_a_probe_with_a_seed_of_its_own_uses_it(tiny_sd1):
    seeded = Probe("a", "style", PROBE.prompt, PROBE.concept, PROBE.label, seed=7)
    options = {"target": TARGET, "window": 16, "scorer": brightness}
    first, second = (
        prompt_swap(tiny_sd1, [probe], drawing=Drawing(steps=1, seeds=seeds), **options)
        for probe, seeds in ((PROBE, (7,)), (seeded, (0, 1)))
    )
    assert second.table.equals(first.table)
