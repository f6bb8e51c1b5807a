"""Fixtures for all tests. Session fixtures are read only: a test that edits a model must revert the edit."""

import copy
import functools
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported; no test uses the network

import pytest
import torch

# More threads do not make tiny models faster, and are much slower while other processes use the cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(scope="session")
def tiny_sd1():
    """A model with random weights in SD-1.4's layout, float32."""
    import overpaint
    from overpaint.zoo import builders

    return overpaint.load(builders.tiny())


@pytest.fixture(scope="session")
def tiny_sd2():
    """A model with random weights in SD-2's layout: velocity prediction, other padding."""
    import overpaint
    from overpaint.zoo import builders

    return overpaint.load(builders.tiny("sd2"))


@pytest.fixture(scope="session")
def tiny_xl():
    """A model with random weights in SDXL's layout: two text encoders, of 2 and 3 layers.

    transformers 5 registers permanent hooks on the layers of a text encoder when it first returns hidden states. The
    encoding here registers them, so that tests can compare the number of hooks before and after.
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
def real_vocabulary(tmp_path_factory):
    """Return a function: the folder of a layout of `layouts` with CLIP's vocabulary, float32, written once."""
    import layouts

    @functools.cache
    def write(layout):
        return layouts.folder(tmp_path_factory.mktemp("layouts") / f"tiny-{layout}", layout)

    return write


@pytest.fixture
def copied(tiny_sd1):
    """A copy of `tiny_sd1` that a test may change."""
    from overpaint.model import TextToImage

    return TextToImage(copy.deepcopy(tiny_sd1.pipe), name="copied")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tiny_sd1):
    """`tiny_sd1` as a pipeline folder on disk."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_sd1.pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge():
    """The scorer `icons-judge`."""
    from overpaint import scorers

    return scorers.load("icons-judge")


@pytest.fixture(scope="module")
def quickfix_change(tiny_sd1):
    """A change of `tiny_sd1` from "blob style" to "noto style", by `edit.quickfix`."""
    import overpaint

    return overpaint.edit.quickfix(tiny_sd1, {"blob style": "noto style"})


@pytest.fixture
def few_concepts(monkeypatch):
    """Limit the concepts whose drift the studio predicts to eight, because encoding all takes seconds."""
    from overpaint.edit import vocabulary

    monkeypatch.setattr(
        "overpaint.studio.side_effects.concepts", lambda kind: vocabulary.concepts(kind)[:8]
    )


@pytest.fixture
def studio(tiny_folder, tmp_path, few_concepts):
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
    """A headless Chromium for the tests of one file; its event loop must not run during other tests."""
    import browser

    with browser.launched() as chromium:
        yield chromium


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
