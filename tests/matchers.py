"""Pictures and small matchers for the tests of matching."""

import torch
from torch.nn import functional as F

from overpaint.match import Config, Matcher, backbone


def texture(h, w, seed=0):
    """Return a picture (3, h, w) of blobs of two sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((h // s + 2, w // s + 2) for s in (4, 16))
    noise = (torch.rand(1, 3, *size, generator=generator) for size in sizes)
    parts = [F.interpolate(n, (h, w), mode="bicubic", align_corners=False) for n in noise]
    return torch.stack(parts).mean(0)[0].clamp(0, 1)


def build():
    """Return a matcher with the shipped backbone and untrained denoisers: it returns the initial flow."""
    matcher = Matcher.build(Config.smoke(), seed=1)
    matcher.backbone.load_state_dict(backbone.load().state_dict())
    return matcher


def build_random():
    """Return the same with random last layers, so that its hypotheses differ."""
    matcher = build()
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for part in (matcher.coarse, matcher.fine):
            part.unet.conv_out.weight.normal_(0, 0.05)
    return matcher
