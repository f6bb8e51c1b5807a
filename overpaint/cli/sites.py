"""`overpaint sites`: list the sites that can be traced."""

from overpaint.cli.options import Device, Dtype, Json, Model
from overpaint.cli.terminal import load_model, print_json, print_table

__all__ = ["sites"]


def sites(
    model: Model, device: Device = "cpu", dtype: Dtype = "float32", as_json: Json = False
) -> None:
    """List the sites that can be traced. They are in execution order.

    \b
    overpaint sites icons
    overpaint sites icons --json
    """  # noqa: D301
    from overpaint.model.sites import find

    rows = [(site.name, site.kind, site.path) for site in find(load_model(model, device, dtype))]
    if as_json:
        keys = ("name", "kind", "path")
        return print_json({"sites": [dict(zip(keys, row, strict=True)) for row in rows]})
    # The name holds the kind, and without that column 80 columns hold the longest path.
    return print_table(("site", "module"), [(name, path) for name, _, path in rows])
