"""Silence diffusers, transformers and huggingface_hub while a model is loaded or draws."""

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars and warnings of diffusers and transformers in the block, and restore them after it."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    logs = (diffusers_logging, transformers_logging)
    before = [(log.is_progress_bar_enabled(), log.get_verbosity()) for log in logs]
    try:
        for log in logs:
            log.disable_progress_bar()
            log.set_verbosity_error()
        yield
    finally:
        for log, (bars, verbosity) in zip(logs, before, strict=True):
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
