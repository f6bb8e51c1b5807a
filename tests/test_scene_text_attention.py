"""The two ways in which a UNet attends to characters and instructions, and the networks of full size."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from overpaint.errors import UnsupportedModel
from overpaint.scene_text import full_size
from overpaint.scene_text.attention import Branches, Conditions, install_branches, install_decoupled

SETTINGS = {
    **full_size.unet_settings(width=16), "norm_num_groups": 8, "attention_head_dim": 2, "cross_attention_dim": 24,
}  # fmt: skip


@pytest.fixture(scope="module")
def conditions():
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(2, 5, 24, generator=generator)
    char = torch.randn(2, 7, 32, generator=generator)
    return Conditions(text, char, {})


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**SETTINGS).eval()


def run(unet, conditions):
    latents = torch.randn(2, 9, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(latents, 500, conditions, return_dict=False)[0]


@pytest.mark.parametrize("install", [install_branches, install_decoupled])
def test_both_conditions_reach_the_network(unet, conditions, install):
    install(unet, 32)
    whole = run(unet, conditions)
    text, char = conditions.instructions, conditions.characters
    for changed in (Conditions(0 * text, char, {}), Conditions(text, 0 * char, {})):
        assert (run(unet, changed) - whole).abs().max() > 1e-4
    assert not torch.equal(run(unet, Conditions(text, None, {})), whole)


def test_branches_are_averaged_and_a_missing_condition_is_left_out(unet, conditions):
    install_branches(unet, 32)
    wrappers = [m for m in unet.modules() if isinstance(m, Branches)]
    assert len(wrappers) == 16
    wrapper, hidden = unet.down_blocks[0].attentions[0], torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        text = wrapper.text(hidden, encoder_hidden_states=conditions.instructions).sample
        char = wrapper.char(hidden, encoder_hidden_states=conditions.characters).sample
        assert torch.allclose(wrapper(hidden, conditions)[0], (text + char) / 2, atol=1e-6)
        alone = wrapper(hidden, Conditions(None, conditions.characters, {}))[0]
    assert torch.allclose(alone, char, atol=1e-6)


def test_decoupled_without_characters_is_the_stock_network(unet, conditions):
    stock = run(unet, conditions.instructions)
    install_decoupled(unet, 32)
    assert torch.allclose(
        run(unet, Conditions(conditions.instructions, None, {})), stock, atol=1e-5
    )


@pytest.mark.parametrize("install", [install_branches, install_decoupled])
def test_the_bias_draws_the_attention_to_a_letter(unet, conditions, install):
    """With a large bias towards letter 0 in every column, the other letters no longer matter."""
    install(unet, 32, has_layout=True)
    bias = {n: torch.zeros(2, n, 7) for n in (16, 8, 4, 2)}
    for values in bias.values():
        values[..., 0] = 1e3
    changed = conditions.characters.clone()
    changed[:, 1:] += 1.0
    one = run(unet, Conditions(None, conditions.characters, bias))
    two = run(unet, Conditions(None, changed, bias))
    assert torch.allclose(one, two, atol=1e-5)
    none = {n: 0 * values for n, values in bias.items()}
    one = run(unet, Conditions(None, conditions.characters, none))
    two = run(unet, Conditions(None, changed, none))
    assert (one - two).abs().max() > 1e-4


def test_gradients_reach_all_weights_of_the_characters(unet, conditions):
    install_decoupled(unet, 32)
    latents = torch.randn(2, 9, 16, 16)
    unet(latents, 500, conditions, return_dict=False)[0].square().mean().backward()
    new = [p for n, p in unet.named_parameters() if "_char" in n]
    assert len(new) == 32 and all(p.grad is not None and p.grad.abs().max() > 0 for p in new)


@pytest.mark.parametrize(("mode", "new"), [("branch", 248.9e6), ("decoupled", 0.80e6)])
def test_the_full_size_has_the_parameters_of_the_paper(mode, new):
    model = full_size.build(mode)
    counts = {n: p.numel() for n, p in model.unet.named_parameters()}
    added = sum(c for n, c in counts.items() if ".char." in n or "_char." in n)
    assert added == pytest.approx(new, rel=0.005)
    assert sum(counts.values()) - added == pytest.approx(859.5e6, rel=0.001)
    assert sum(p.numel() for p in model.characters.parameters()) == 3680
    assert all(p.is_meta for p in model.unet.parameters())


def test_a_stock_unet_is_copied_key_by_key(unet):
    model = full_size.build("branch", settings=SETTINGS, device="cpu")
    full_size.load_unet(model, unet.state_dict(), is_harmless=True)
    assert torch.equal(model.unet.conv_in.weight, unet.conv_in.weight)
    name = "down_blocks.0.attentions.0.{}transformer_blocks.0.attn1.to_q.weight"
    assert torch.equal(
        model.unet.state_dict()[name.format("text.")], unet.state_dict()[name.format("")]
    )
    hidden = torch.randn(1, 16, 8, 8)
    conditions = Conditions(torch.randn(1, 5, 24), torch.randn(1, 7, 32), {})
    wrapper, stock = model.unet.down_blocks[0].attentions[0], unet.down_blocks[0].attentions[0]
    with torch.no_grad():
        step = wrapper(hidden, conditions)[0] - hidden
        whole = stock(hidden, encoder_hidden_states=conditions.instructions).sample - hidden
    assert torch.allclose(
        2 * step, whole, atol=1e-5
    )  # the character branch adds nothing; the mean halves
    with pytest.raises(UnsupportedModel, match="not those of an inpainting UNet"):
        full_size.load_unet(model, {"conv_in.weight": torch.zeros(1)})


def test_save_and_load_give_the_same_output_and_missing_weights_raise(tmp_path, conditions):
    for mode in ("branch", "decoupled"):
        torch.manual_seed(1)
        model = full_size.build(mode, settings=SETTINGS, device="cpu")
        full_size.save(model, tmp_path / mode, settings=SETTINGS)
        assert torch.equal(
            run(full_size.load(tmp_path / mode).unet, conditions), run(model.unet, conditions)
        )
    weights = {k: v.clone() for k, v in model.unet.state_dict().items() if "_char." not in k}
    save_file(weights, tmp_path / "decoupled" / "unet.safetensors")
    with pytest.raises(
        UnsupportedModel, match=r"do not fit the configuration .*: save the model again"
    ):
        full_size.load(tmp_path / "decoupled")


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"mode": "sum", "unet": {}}', '{"mode": 1', "null"]
)
def test_a_damaged_configuration_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        UnsupportedModel, match="is no configuration of DiffSTE .*: it must be what"
    ):
        full_size.load(tmp_path)


def test_the_names_of_the_published_checkpoint_are_converted():
    model = full_size.build("branch", settings=SETTINGS, device="cpu")
    names = ("char_embedding.weight", "position_embedding.weight")
    published = {f"char_embedder.{name}": torch.zeros(1) for name in names}
    for key, value in model.unet.state_dict().items():
        parts = key.split(".")
        if "attentions" in parts:
            at = parts.index("attentions")
            parts[at + 1], parts[at + 2] = parts[at + 2], parts[at + 1]
        published["unet." + ".".join(parts)] = value
    unet, characters = full_size.from_published({**published, "vae.x": torch.zeros(1)})
    assert set(unet) == set(model.unet.state_dict())
    assert set(characters) == set(model.characters.state_dict())
    with pytest.raises(UnsupportedModel, match="no `unet.` or `char_embedder.` entries"):
        full_size.from_published({"vae.x": torch.zeros(1)})
    with pytest.raises(ValueError, match="`mode` must be 'branch' or 'decoupled'"):
        full_size.build("sum")
