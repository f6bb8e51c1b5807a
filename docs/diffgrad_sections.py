"""Sections of docs/results.md on the DiffGrad optimiser."""

from tables import Run, number, origin, table, triple


def accuracy(run: Run) -> str:
    """Return the section on accuracy with DiffGrad and with other optimisers."""
    protocol = run["protocol"]
    tables, task = protocol["tables"], protocol["task"]
    optimisers = [
        [row["name"], f"{row['rate']:g}", triple(row["last"]),
         "" if row["name"] == "DiffGrad" else triple(row["diffgrad_minus"])]
        for row in tables["optimisers"]
    ]  # fmt: skip
    activations = [
        [row["name"], triple(row["diffgrad"]), triple(row["adam_half"]), triple(row["difference"]),
         f"{row['friction'][0]:.4f} to {row['friction'][-1]:.4f}"]
        for row in tables["activations"]
    ]  # fmt: skip
    adam = {row["rate"]: row for row in tables["rates"]["Adam"]}
    rates = [
        [f"{row['rate']:g}", triple(row["last"]), triple(adam[row["rate"] / 2]["last"])]
        for row in tables["rates"]["DiffGrad"]
    ]
    scales = [
        [f"{row['loss_scale']:g}", f"{min(row['friction']):.3f} to {max(row['friction']):.3f}",
         triple(row["diffgrad"]), triple(row["adam"]), triple(row["difference"])]
        for row in tables["loss_scales"]
    ]  # fmt: skip
    more = (
        f"{task['data']}, {task['subset']:,} training images, {task['network']} network, batches "
        f"of {task['batch']},"
        f" {task['epochs']} epochs, {len(protocol['seeds'])} paired seeds"
    )
    return (
        "## DiffGrad: accuracy\n\n"
        + origin("python benchmarks/quality_diffgrad.py", protocol, more=more)
        + "\nTest accuracy after the last epoch, percent, with Student's intervals over seeds.\n\n"
        + table(["optimiser", "rate", "last epoch", "DiffGrad minus it"], optimisers)
        + "\nBy activation function:\n\n"
        + table(
            ["activation", "DiffGrad", "Adam, half the rate", "difference", "mean friction"],
            activations,
        )
        + "\nBy rate:\n\n"
        + table(["rate of DiffGrad", "DiffGrad", "Adam at half of it"], rates)
        + "\nWith the loss multiplied, against Adam whose rate is multiplied by the mean friction:\n\n"
        + table(["loss times", "mean friction", "DiffGrad", "Adam", "difference"], scales)
    )


def recipe(run: Run) -> str:
    """Return the section on the judge's recipe with each optimiser."""
    protocol = run["protocol"]
    rows = [
        [
            row["name"],
            f"{row['loss']:.3f}",
            f"{row['minus_adamw']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
            if row["name"] != "AdamW"
            else "",
        ]
        for row in protocol["rows"]
    ]
    more = f"{len(protocol['seeds'])} paired seeds"
    settings = {k: v for k, v in protocol.items() if k != "steps"}  # training steps, not denoising
    return (
        "## DiffGrad: in a recipe of the zoo\n\n"
        + origin(
            "python benchmarks/quality_diffgrad_recipe.py",
            settings,
            more=f"first {protocol['steps']} training steps of `icons-judge`, {more}",
        )
        + "\n"
        + table(["optimiser", "loss", "minus AdamW's"], rows)
    )


def speed(run: Run) -> str:
    """Return the section on the time of a step of DiffGrad."""
    names = {
        "loop": "loop to Adam's loop",
        "foreach": "lists (`foreach=True`) to Adam's lists",
        "fused": "`fused=True` to Adam's fused kernel",
        "fused_to_adam_foreach": "`fused=True` to Adam's lists",
        "loop_to_pytorch_optimizer": "loop to `pytorch_optimizer`'s loop",
        "foreach_to_pytorch_optimizer": "lists to `pytorch_optimizer`'s lists",
        "to_torch_optimizer": "loop to `torch_optimizer`'s loop",
        "compiled": "`torch.compile(optimizer.step)` to Adam's fused kernel",
    }
    ends = ("", "_small", "_big")
    result = run["result"]
    rows = [
        [text, *(number(result.get(f"{key}{end}")) for end in ends)] for key, text in names.items()
    ]
    protocol = {k: v for k, v in run["protocol"].items() if k != "steps"}
    more = f"{protocol['threads']} thread"
    return (
        "## DiffGrad: time of a step\n\n"
        + origin("python benchmarks/speed_diffgrad.py", protocol, more=more)
        + "\nRatios of the time of a step.\n\n"
        + table(["", "161 tensors, 3.5 M", "300 tensors of 1,024", "1 tensor of 8.4 M"], rows)
    )
