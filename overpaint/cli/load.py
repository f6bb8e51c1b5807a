"""`overpaint load`: list the components of a model."""

from overpaint.cli.options import Device, Dtype, Json, Model
from overpaint.cli.terminal import load_model, print_facts

__all__ = ["load"]

_WEIGHTS = ("text_encoder", "text_encoder_2", "unet", "vae")


def load(
    model: Model, device: Device = "cpu", dtype: Dtype = "float32", as_json: Json = False
) -> None:
    """List the components of a model. With their classes and numbers of parameters.

    \b
    overpaint load icons
    overpaint load ./sd14 --json
    """  # noqa: D301
    loaded = load_model(model, device, dtype)
    components = loaded.components()
    classes = {name: type(component).__name__ for name, component in components.items()}
    counts = {
        f"{name}_parameters": sum(p.numel() for p in components[name].parameters())
        for name in _WEIGHTS
        if name in components
    }
    print_facts({"model": loaded.name, **classes, **counts}, as_json=as_json)
