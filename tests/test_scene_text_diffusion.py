"""Latents, network, loss, guidance and storage of a lettering model."""

import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from overpaint.errors import UnsupportedModel
from overpaint.scene_text import Config, Guidance, Lettering, alphabet
from overpaint.scene_text.codec import make_codec
from overpaint.scene_text.config import LAYOUTS
from overpaint.scene_text.diffusion import (
    Batch,
    emptied_rows,
    masked_error,
    sample,
    scheduler,
    training_loss,
)
from overpaint.scene_text.encoders import CharacterEncoder
from overpaint.scene_text.layout import Edges
from overpaint.scene_text.line import Line
from overpaint.scene_text.network import Network, Place

SMOKE = Config.smoke()
MASK = torch.zeros(2, 32, 64, dtype=torch.bool)
MASK[:, 3:29, 12:52] = True
PLACE = Place(*(torch.full((2,), v) for v in (14.0, 50.0, 7.0, 22.0)))
WORDS, INSTRUCTIONS = ["red", "font"], ['Write "red" in color: red', 'Write "font"']


def model(seed=0, **changes):
    """Return a model whose last layer is not zero, as it is before the first step."""
    built = Lettering.build(replace(SMOKE, **changes), seed=seed)
    torch.nn.init.normal_(
        built.network.unet.conv_out.weight, std=0.1, generator=torch.Generator().manual_seed(seed)
    )
    return built


def lines():
    return torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))


def batch(network):
    texts = network.texts(WORDS, INSTRUCTIONS)
    valid = (torch.arange(8) < texts.counts[:, None]).float()
    left = 14 + torch.arange(8) * 9.0 * valid
    return Batch(
        lines() * 2 - 1, MASK[:, None].float(), texts, PLACE, Edges(left, left + 9 * valid, valid)
    )


def test_the_codecs_return_the_picture_up_to_their_resolution_of_color():
    flat = torch.rand(2, 3, 1, 1).expand(-1, -1, 32, 64) * 2 - 1
    picture = lines() * 2 - 1
    luma, rgb = make_codec("luma", 8), make_codec("rgb", 8)
    assert luma.encode(picture).shape == (2, 24, 8, 16)
    assert torch.allclose(rgb.decode(rgb.encode(picture)), picture, atol=1e-6)
    assert torch.allclose(luma.decode(luma.encode(flat)), flat, atol=1e-5)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    again = luma.decode(luma.encode(picture))
    assert torch.allclose((again * weights).sum(1), (picture * weights).sum(1), atol=1e-5)


def test_chroma_is_that_of_jpeg():
    """The loss weighs luma and chroma as they are, see ITU-T T.871: pure red has the chroma of red 1/2 of the range."""
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(-1, -1, 32, 64)
    latents = make_codec("luma", 8).encode(red)
    luma = 0.299 - 0.587 - 0.114
    assert torch.allclose(latents[:, :16], torch.full((1, 16, 8, 16), luma), atol=1e-5)
    assert torch.allclose(latents[:, 20:], torch.full((1, 4, 8, 16), 0.713 * (1 - luma)), atol=1e-5)


def test_the_padding_of_the_character_encoder_is_zero_and_has_no_gradient():
    torch.manual_seed(0)
    encoder = CharacterEncoder(20, 32, both_ends=False, has_layout=False)
    numbers, counts = alphabet.encode(["abc", "cba"], 20)
    tokens = encoder(numbers, counts)
    assert tokens.shape == (2, 20, 32) and not torch.allclose(tokens[0], tokens[1])
    assert torch.equal(tokens[0, 3:], encoder.position_embedding.weight[3:])
    tokens.square().sum().backward()
    gradient = encoder.embedding.weight.grad
    assert not encoder.embedding.weight[0].any() and not gradient[0].any()
    assert gradient[numbers[0, :3]].abs().min() > 0


def test_the_autoencoder_is_normalised():
    torch.manual_seed(0)
    codec = make_codec("autoencoder", 4)
    pictures = torch.rand(8, 3, 32, 64) * 2 - 1
    before = codec.decode(codec.encode(pictures))
    codec.normalise(pictures)
    latents = codec.encode(pictures)
    assert torch.allclose(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-4)
    assert torch.allclose(latents.std((0, 2, 3)), torch.full((4,), 0.5), atol=1e-3)
    assert torch.allclose(codec.decode(latents), before, atol=1e-4)


def test_the_masked_error_is_that_of_diffste():
    predicted, target = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]), torch.zeros(1, 1, 2, 2)
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    by_hand = (5 * (1 + 16) + 4 + 9) / 4
    assert float(masked_error(predicted, target, mask)) == pytest.approx(by_hand)
    ones = torch.ones_like(mask)
    assert float(masked_error(predicted, target, ones)) == pytest.approx(
        5 * predicted.square().mean()
    )


@pytest.mark.parametrize("mode", ["decoupled", "branch"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_configuration_trains_all_of_its_weights(mode, layout):
    network = model(mode=mode, layout=layout).network.train()
    loss = training_loss(
        network, batch(network), scheduler("sample").alphas_cumprod, torch.Generator().manual_seed(0), drops=(0, 0, 0)
    )  # fmt: skip
    loss.backward()
    missing = [n for n, p in network.named_parameters() if p.grad is None]
    assert torch.isfinite(loss) and not missing


def test_the_loss_falls_when_a_few_lines_are_learned():
    network = model().network.train()
    rows, alphas = batch(network), scheduler("sample").alphas_cumprod
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for step in range(60):
        loss = training_loss(network, rows, alphas, torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_an_exact_prediction_has_no_loss():
    """A network that returns the target; both predictions agree on what it is."""
    for prediction in ("sample", "v_prediction"):
        network = model(layout="none", prediction=prediction).network
        rows, alphas = batch(network), scheduler(prediction).alphas_cumprod
        seen = {}

        def exact(
            latents,
            t,
            inputs,
            network=network,
            rows=rows,
            alphas=alphas,
            kind=prediction,
            seen=seen,
        ):
            clean = network.codec.encode(rows.images)
            signal = alphas[t].view(-1, 1, 1, 1).sqrt()
            sigma = (1 - alphas[t]).view(-1, 1, 1, 1).sqrt()
            noise = (latents - signal * clean) / sigma
            seen["t"] = t
            return clean if kind == "sample" else signal * noise - sigma * clean

        network.forward = exact
        loss = training_loss(network, rows, alphas, torch.Generator().manual_seed(0))
        assert float(loss) < 1e-4
        assert len(set((seen["t"] // 500).tolist())) == 2  # one timestep in each half


def test_rows_are_emptied_at_their_rates():
    rows = 100_000
    characters, instructions = emptied_rows(
        rows, (0.1, 0.05, 0.05), torch.Generator().manual_seed(0)
    )
    shares = [
        (characters & instructions).sum(), (characters & ~instructions).sum(), (~characters & instructions).sum(),
    ]  # fmt: skip
    assert [float(n) / rows for n in shares] == pytest.approx([0.1, 0.05, 0.05], abs=0.01)


def test_both_encoders_of_emptied_rows_see_nothing_in_training():
    network = model().network
    texts = network.texts(["red"] * 2, ["write red"] * 2)
    off, on = torch.tensor([False, True]), torch.tensor([True, False])
    dropped = texts.dropped(off, on)
    assert dropped.counts.tolist() == [3, 0] and not dropped.numbers[1].any()
    assert not dropped.tokens[0].any() and dropped.tokens[1].any()
    counted = {"both": 0, "characters": 0, "instructions": 0}
    original = network.inputs

    def record(images, mask, texts, place, *, edges=None):
        empty, silent = texts.counts == 0, (texts.tokens == 0).all(1)
        counted["both"] += int((empty & silent).sum())
        counted["characters"] += int((empty & ~silent).sum())
        counted["instructions"] += int((~empty & silent).sum())
        return original(images, mask, texts, place, edges=edges)

    network.inputs, network.forward = record, lambda latents, t, inputs: latents
    small, alphas = batch(network), scheduler("sample").alphas_cumprod
    many = Batch(
        small.images[:1].expand(400, -1, -1, -1), small.mask[:1].expand(400, -1, -1, -1),
        network.texts(["red"] * 400, ["write"] * 400), Place(*(v[:1].expand(400) for v in vars(PLACE).values())),
        Edges(*(v[:1].expand(400, -1) for v in vars(small.edges).values())),
    )  # fmt: skip
    for step in range(5):
        training_loss(network, many, alphas, torch.Generator().manual_seed(step))
    assert all(30 < count < 300 for count in counted.values()), counted


def write(built, **options):
    return built.write(lines(), MASK, WORDS, INSTRUCTIONS, PLACE, **{"steps": 3, **options})


def test_only_the_mask_is_written_and_the_seed_decides():
    built = model()
    first = write(built)
    assert torch.equal(first, write(built)) and not torch.equal(first, write(built, seed=1))
    outside = ~MASK[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(first[outside], lines()[outside]) and not torch.equal(first, lines())
    alone = built.write(
        lines()[:1], MASK[:1], WORDS[:1], INSTRUCTIONS[:1], Place(*(v[:1] for v in vars(PLACE).values())), steps=3
    )  # fmt: skip
    assert torch.allclose(alone, first[:1], atol=1e-5)


def test_words_and_instructions_change_the_picture():
    built = model()
    first = write(built)
    other = built.write(lines(), MASK, ["der", "font"], INSTRUCTIONS, PLACE, steps=3)
    assert (first - other)[0].abs().max() > 1e-4 and torch.allclose(first[1], other[1], atol=1e-6)
    style = built.write(lines(), MASK, WORDS, ["font", INSTRUCTIONS[1]], PLACE, steps=3)
    assert (first - style)[0].abs().max() > 1e-5


def test_guidance_at_1_is_conditional_at_0_unconditional_and_split_equals_joint():
    built = model()
    plain = write(built)
    assert torch.equal(write(built, guidance=Guidance(1, 1)), plain)
    empty = built.write(lines(), MASK, [" " * 0, ""], ["", ""], PLACE, steps=3)
    assert torch.allclose(write(built, guidance=Guidance(0, 0)), empty, atol=1e-5)
    joint = write(built, guidance=Guidance(3, 3))
    split = write(built, guidance=Guidance(3, 3 + 1e-6))
    assert torch.allclose(joint, split, atol=1e-4) and not torch.allclose(joint, plain, atol=1e-3)


def test_the_layout_shares_the_place_and_the_true_edges_replace_it():
    network = model().network
    texts = network.texts(WORDS, INSTRUCTIONS)
    inputs = network.inputs(lines(), MASK[:, None].float(), texts, PLACE)
    assert inputs.edges.left[0, 0] == 14 and float(
        inputs.edges.right[0, 2].detach()
    ) == pytest.approx(50)
    true = batch(network).edges
    assert torch.equal(
        network.inputs(lines(), MASK[:, None].float(), texts, PLACE, edges=true).edges.left,
        true.left,
    )
    width = network.natural_width(texts)
    assert width.shape == (2,) and (width > 0).all()
    with pytest.raises(ValueError, match="has no layout head: name the width"):
        model(layout="none").network.natural_width(texts)


def test_ablations_do_not_read_what_they_leave_out():
    for changes, words, instructions, is_same in (
        ({"characters": False}, ["der", "tonf"], INSTRUCTIONS, True),
        ({"instructions": False}, WORDS, ["", ""], True),
        ({}, ["der", "tonf"], INSTRUCTIONS, False),
    ):
        built = model(**changes)
        other = built.write(lines(), MASK, words, instructions, PLACE, steps=2)
        assert torch.equal(write(built, steps=2), other) is is_same
    with pytest.raises(ValueError, match="are both off: switch one on"):
        replace(SMOKE, characters=False, instructions=False)


def test_a_saved_model_writes_the_same_in_a_fresh_process(tmp_path):
    for mode in ("decoupled", "branch"):
        built = model(mode=mode)
        built.network.half().float()  # weights are stored in half precision
        built.save(tmp_path / mode)
        expected = write(built)
        assert torch.equal(write(Lettering.load(tmp_path / mode)), expected)
    code = (
        "import sys, torch; sys.path.insert(0, 'tests'); from test_scene_text_diffusion import *; "
        f"print(float(write(Lettering.load({str(tmp_path / 'branch')!r})).sum().item()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) == pytest.approx(float(expected.sum()), abs=1e-3)


def test_damaged_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no lettering model at .*config.json is missing"):
        Lettering.load(tmp_path)
    model().save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"mode": "branch"}))
    with pytest.raises(
        UnsupportedModel, match="do not fit the configuration beside them: names or shapes differ"
    ):
        Lettering.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"mode": "sum"}))
    with pytest.raises(
        UnsupportedModel,
        match="is no configuration of a lettering model .*must be one of decoupled",
    ):
        Lettering.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match="do not fit"):
        Lettering.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "yuv"}, "`codec` must be one of luma"),
        ({"channels": (10**9,)}, "`channels` must be 1 to 4096"),
        ({"channels": (20, 40)}, "must be multiples of `groups` and `head_width`"),
        ({"middle": 1}, "`middle` must be true or false"),
        ({"channels": (16,) * 6}, "`line.width` must be a multiple of 128"),
    ],
)
def test_configurations_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SMOKE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 30}, "must be multiples of 8"),
        ({"baseline": 5.0}, "must ascend from 0 to `height`"),
        ({"margin": 100}, "`margin` must be 0 to a quarter"),
    ],
)
def test_lines_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Line(**changes)


def test_wrong_sizes_and_steps_are_refused():
    built = model()
    with pytest.raises(
        ValueError, match=r"must be lines of shape \(B, 3, 32, 64\), got \(2, 3, 32, 32\)"
    ):
        built.write(lines()[..., :32], MASK, WORDS, INSTRUCTIONS, PLACE)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        write(built, steps=0)


def test_a_permutation_of_the_input_channels_changes_the_output():
    network = model().network.eval()
    inputs = network.inputs(
        lines(), MASK[:, None].float(), network.texts(WORDS, INSTRUCTIONS), PLACE
    )
    latents = torch.randn(2, 24, 8, 16)
    with torch.no_grad():
        whole = network(latents, torch.tensor(500), inputs)
        turned = network(latents, torch.tensor(500), replace(inputs, fixed=inputs.fixed.flip(1)))
    assert (whole - turned).abs().max() > 1e-4


def test_the_channels_beside_the_noise_are_mask_picture_positions_and_letters():
    network = model().network
    texts = network.texts(WORDS, INSTRUCTIONS)

    def fixed(images):
        return network.inputs(images, MASK[:, None].float(), texts, PLACE).fixed

    picture = lines() * 2 - 1
    channels = fixed(picture).detach()
    assert channels.shape[1] == 16 + 24 + 2 + SMOKE.layout_features
    assert channels.shape[1] + 24 == network.unet.config.in_channels
    mask = torch.nn.functional.pixel_shuffle(channels[:, :16], 4)
    assert torch.equal(mask[:, 0].bool(), MASK)
    known = network.codec.encode(picture * ~MASK[:, None])
    assert torch.equal(channels[:, 16:40], known)
    across, up = channels[0, 40, 0], channels[0, 41, :, 0]  # of latents around 2, 6, 10, ... pixels
    assert across[2] == 0 and float(across[7]) == pytest.approx((30 - 14) / 36 * 2 - 1)
    assert float(up[2]) == pytest.approx((22 - 10) / 15)
    hidden = torch.where(MASK[:, None], torch.ones(()), picture)
    assert torch.equal(fixed(hidden), channels)  # what is under the mask is not read


def test_the_true_layout_of_training_and_the_predicted_one_enter_alike():
    """With the edges that the head predicts given as true ones, the inputs are the same, emptied rows included."""
    network = model().network
    texts = network.texts(WORDS, INSTRUCTIONS)
    off, on = torch.tensor([False, False]), torch.tensor([False, True])
    for part in (texts, texts.dropped(on, off), texts.dropped(on, on), texts.dropped(off, on)):
        predicted = network.inputs(lines(), MASK[:, None].float(), part, PLACE)
        true = network.inputs(lines(), MASK[:, None].float(), part, PLACE, edges=predicted.edges)
        assert torch.equal(predicted.fixed, true.fixed)
        assert torch.equal(predicted.conditions.characters, true.conditions.characters)
        assert all(
            torch.equal(bias, true.conditions.bias[n])
            for n, bias in predicted.conditions.bias.items()
        )
    # The edges of a word whose characters are emptied reach the network neither in training nor in sampling.
    known = network.inputs(
        lines(), MASK[:, None].float(), texts.dropped(~off, off), PLACE, edges=batch(network).edges
    )
    unknown = network.inputs(lines(), MASK[:, None].float(), texts.dropped(~off, off), PLACE)
    assert torch.equal(known.fixed, unknown.fixed)
    assert torch.equal(known.conditions.characters, unknown.conditions.characters)


def test_clean_latents_weigh_at_most_six_times():
    """The loss of a constant error is its square times the weights of the mask times min(1 / sigma^2, 6)."""
    network = model(layout="none").network
    rows = batch(network)
    network.forward = lambda latents, t, inputs: network.codec.encode(rows.images) + 0.1
    weights = 1 + 4 * network.codec.weights(rows.mask)
    for value, expected in ((0.99, 6.0), (0.5, 2.0), (1e-6, 1.0)):
        loss = training_loss(
            network, rows, torch.full((1000,), value), torch.Generator().manual_seed(0)
        )
        assert float(loss) == pytest.approx(expected * 0.01 * float(weights.mean()), rel=1e-4)


def test_sampling_with_an_exact_network_returns_the_picture():
    network = model(layout="none").network
    target = network.codec.encode(lines() * 2 - 1)
    network.forward = lambda latents, t, inputs: target
    texts, noise = network.texts(WORDS, INSTRUCTIONS), torch.randn(2, 24, 8, 16)
    for solver in ("ddim", "dpm"):
        written = sample(
            network, torch.zeros(2, 3, 32, 64), MASK[:, None].float(), texts, PLACE, steps=4, guidance=Guidance(),
            noise=noise, solver=solver,
        )  # fmt: skip
        expected = network.codec.decode(target).clamp(-1, 1)
        inside = MASK[:, None].expand(-1, 3, -1, -1)
        assert torch.allclose(written[inside], expected[inside], atol=1e-3), solver


def test_the_shipped_size_writes_a_line_in_seconds():
    built = Lettering.build(Config())
    place = Place(*(torch.tensor([v]) for v in (20.0, 90.0, 7.0, 22.0)))
    mask = torch.zeros(1, 32, 128, dtype=torch.bool)
    mask[:, 3:29, 18:92] = True
    start = time.process_time()
    built.write(
        torch.rand(1, 3, 32, 128),
        mask,
        ["wizards"],
        ["red"],
        place,
        steps=20,
        guidance=Guidance(3, 3),
    )
    assert time.process_time() - start < 15


def test_the_shipped_size_fits_into_twelve_megabytes():
    with torch.device("meta"):
        network = Network(Config(pieces=tuple(f"piece{i}" for i in range(700))))
    assert 2 * sum(p.numel() for p in network.parameters()) < 12e6
