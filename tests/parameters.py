"""Fingerprints of all parameters of a model, to compare before and after an edit."""

from overpaint.edit.weights import fingerprint


def fingerprints(model):
    """Return the fingerprint of every parameter of the pipeline, by the index of its part and its name."""
    parts = (*model.text_encoders, model.unet, model.vae)
    return {(i, n): fingerprint(p) for i, m in enumerate(parts) for n, p in m.named_parameters()}
