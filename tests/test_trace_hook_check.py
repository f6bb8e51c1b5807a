"""The hooks fire as the sites are listed; models that run otherwise are refused."""

import pytest
from torch.nn import functional

import overpaint as op
from overpaint.errors import UnsupportedModel
from overpaint.model import sites
from overpaint.trace.hook_check import verified_sites
from overpaint.zoo import builders


@pytest.fixture
def model():
    """A model that a test may modify."""
    return op.load(builders.tiny("sdxl", text_layers=1))


@pytest.mark.parametrize("fixture", ["tiny_sd1", "tiny_sd2", "tiny_xl"])
def test_every_layout_runs_as_listed(request, fixture):
    model = request.getfixturevalue(fixture)
    hooked = [m for m in model.unet.modules() if m._forward_hooks]
    assert verified_sites(model) == sites.find(model)
    assert [m for m in model.unet.modules() if m._forward_hooks] == hooked == []


def test_attention_slicing_is_allowed(model):
    model.pipe.enable_attention_slicing(1)
    assert verified_sites(model) == sites.find(model)


def test_a_shared_module_is_refused(model):
    blocks = model.unet.mid_block.attentions[0].transformer_blocks
    blocks[1].attn2 = blocks[0].attn2
    with pytest.raises(
        UnsupportedModel, match=r"hook of unet.cross_attn.3 \(heads\) fired 0 times .*is shared"
    ):
        verified_sites(model)


def test_a_processor_that_bypasses_the_projection_is_refused(model):
    class Bypass:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            values = attn.to_v(
                hidden_states if encoder_hidden_states is None else encoder_hidden_states
            )
            mixed = values.mean(1, keepdim=True).expand(-1, hidden_states.shape[1], -1)
            return functional.linear(mixed, attn.to_out[0].weight, attn.to_out[0].bias)

    model.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.set_processor(Bypass())
    with pytest.raises(
        UnsupportedModel, match=r"unet.self_attn.0 \(heads\) fired 0 times in one forward pass"
    ):
        verified_sites(model)


def test_a_layer_that_runs_twice_is_refused(model):
    resnet = model.unet.mid_block.resnets[0]

    class Twice(type(model.unet.mid_block)):
        def forward(self, hidden_states, temb=None, **options):
            return super().forward(resnet(hidden_states, temb), temb=temb, **options)

    model.unet.mid_block.__class__ = Twice
    with pytest.raises(UnsupportedModel, match="hook of unet.resnet.3 fired 2 times"):
        verified_sites(model)


def test_another_execution_order_is_refused(model):
    encoder = model.text_encoders[1].get_submodule(
        sites.find_text(model.text_encoders[1])[0].path.partition(".layers")[0]
    )
    forward_order = type(encoder)

    class Backwards(forward_order):
        def forward(self, inputs_embeds, **options):
            layers, self.layers = self.layers, self.layers[::-1]
            try:
                return super().forward(inputs_embeds, **options)
            finally:
                self.layers = layers

    encoder.__class__ = Backwards
    with pytest.raises(
        UnsupportedModel, match=r"text2.1.self_attn \(heads\) ran in the place of text2.0.self_attn"
    ):
        verified_sites(model)


def test_a_part_compiled_in_place_is_refused(model):
    model.unet.mid_block.compile()
    with pytest.raises(UnsupportedModel, match=r"is compiled \(mid_block\), so that hooks"):
        verified_sites(model)
