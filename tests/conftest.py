"""Tiny random models, shared by all tests and never changed by any."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach the network

import pytest
import torch

# Tiny models gain nothing from more, and lose much where something else wants the cores too.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def tiny_sd1():
    """A random pipeline in SD-1.4's layout, float32. Read only: an edit must be reverted."""
    import overpaint
    from overpaint.zoo import builders

    return overpaint.load(builders.tiny())


@pytest.fixture(scope="session")
def tiny_sd2():
    """The same in SD-2's layout: velocity prediction, other padding."""
    import overpaint
    from overpaint.zoo import builders

    return overpaint.load(builders.tiny("sd2"))


@pytest.fixture(scope="session")
def tiny_xl():
    """The same in SDXL's layout: two text encoders, of 2 and 3 layers, packed text features.

    Asking a text encoder of transformers 5 for hidden states leaves a hook on each of its layers, which sleeps and
    stays. One encoding puts them there, so that a test which counts hooks before and after finds no more.
    """
    import overpaint
    from overpaint.zoo import builders

    model = overpaint.load(builders.tiny("sdxl", text_layers=2))
    model.encode([""])
    return model


@pytest.fixture(scope="session")
def tiny_double():
    """`tiny_sd1` in float64, for laws that hold exactly."""
    import overpaint
    from overpaint.zoo import builders

    return overpaint.load(builders.tiny().to(torch.float64))


@pytest.fixture(scope="session")
def tiny_shallow():
    """`tiny_double` with 4 text layers, where a test edits every layer or reads many captions."""
    import overpaint
    from overpaint.zoo import builders

    return overpaint.load(builders.tiny(text_layers=4).to(torch.float64))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """`tiny_sd1` as a pipeline folder on disk."""
    from overpaint.zoo import builders

    folder = tmp_path_factory.mktemp("models") / "tiny"
    builders.tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quickfix_change(tiny_sd1):
    """A change of `tiny_sd1` from "blob style" to "noto style", by `edit.quickfix`."""
    import overpaint

    return overpaint.edit.quickfix(tiny_sd1, {"blob style": "noto style"})


@pytest.fixture
def studio(tiny_folder, tmp_path):
    """A studio without its page that offers one tiny model; its downloads go to `tmp_path`."""
    from overpaint.studio import Studio

    return Studio([str(tiny_folder)], tmp_path / "downloads")


@pytest.fixture(scope="session")
def result_of():
    """Return a function that runs a task of the studio to its end and returns its result."""
    from overpaint.studio.scheduler import Result

    def run_to_end(events):
        return [event for event in events if isinstance(event, Result)][-1].value

    return run_to_end


@pytest.fixture
def free_port():
    """Return a function that finds a free port of this machine."""
    import socket

    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, open as long as the tests of one file: its event loop is in no other's way."""
    import browser

    with browser.launched() as found:
        yield found


@pytest.fixture(scope="session")
def axe():
    """The source of axe-core, for `browser.check`."""
    import browser

    return browser.axe_core()


@pytest.fixture
def run(capsys):
    """Run the command line in this process: exit code, stdout, stderr."""
    from overpaint.cli import app as cli

    def call(*arguments):
        code = cli._run([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
