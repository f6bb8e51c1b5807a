"""Scorer and hook count that the tests of tracing share."""


def brightness(images, probes):
    """Score pictures by their mean."""
    return images.mean((1, 2, 3))


def hook_count(model):
    """Return the number of hooks on all modules of `model`."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
