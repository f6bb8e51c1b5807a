"""Context managers that record and patch the inputs and outputs of modules with torch hooks.

Only this file registers hooks. Hooks are registered on entry and removed on exit, also after an exception, so that none
is left on a model. The output of a module that returns a tuple is the first element of that tuple.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.utils.hooks import RemovableHandle

__all__ = ["patch", "patch_inputs", "record", "record_inputs"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Stop(BaseException):
    """Raised to end a forward pass early; `record_inputs` catches it."""


@contextmanager
def record(modules: Sequence[Module], *, copies: bool = True) -> Iterator[list[list[Tensor]]]:
    """Record the outputs of `modules`.

    Args:
        modules: The modules.
        copies: Detach and clone the outputs; otherwise they are the outputs themselves, with their gradients.

    Yields:
        One list for each module, in the order of `modules`; each call of a module appends its output.
    """
    outputs: list[list[Tensor]] = [[] for _ in modules]
    with _removed_on_exit(
        [
            module.register_forward_hook(_recorder(recorded, copies))
            for module, recorded in zip(modules, outputs, strict=True)
        ]
    ):
        yield outputs


@contextmanager
def record_inputs(module: Module, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Record the first positional input of `module`, as float32 copies.

    Args:
        module: The module.
        stop: End the `with` block at the module's first call, before the module runs. Code of the block after that
            call is skipped.

    Yields:
        A list; each call of the module appends its input, detached and cloned, in float32.
    """
    inputs: list[Tensor] = []

    def hook(_: Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().float().clone())
        if stop:
            raise _Stop

    with _removed_on_exit([module.register_forward_pre_hook(hook)]), suppress(_Stop):
        yield inputs


@contextmanager
def patch(replacements: Mapping[Module, Callable[[Tensor], Tensor]]) -> Iterator[dict[Module, int]]:
    """Replace the outputs of modules.

    Args:
        replacements: For each module a function that takes its output and returns the new output. The function must
            not write into its argument, which other code may hold.

    Yields:
        Number of calls of each module since entry.
    """
    calls = dict.fromkeys(replacements, 0)

    def hook_for(function: Callable[[Tensor], Tensor]) -> Callable[..., object]:
        def hook(module: Module, _: object, output: object) -> object:
            calls[module] += 1
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            assert isinstance(output, Tensor)
            return function(output)

        return hook

    with _removed_on_exit([m.register_forward_hook(hook_for(f)) for m, f in replacements.items()]):
        yield calls


@contextmanager
def patch_inputs(
    replacements: Mapping[Module, Callable[[tuple[Any, ...], dict[str, Any]], Arguments]],
) -> Iterator[dict[Module, int]]:
    """Replace the inputs of modules.

    Args:
        replacements: For each module a function that takes its positional and keyword arguments and returns the new
            ones. The function must not write into tensors, which other code may hold.

    Yields:
        Number of calls of each module since entry.
    """
    calls = dict.fromkeys(replacements, 0)

    def hook_for(
        function: Callable[[tuple[Any, ...], dict[str, Any]], Arguments],
    ) -> Callable[..., Arguments]:
        def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            calls[module] += 1
            return function(args, kwargs)

        return hook

    with _removed_on_exit(
        [
            m.register_forward_pre_hook(hook_for(f), with_kwargs=True)
            for m, f in replacements.items()
        ]
    ):
        yield calls


def _recorder(recorded: list[Tensor], copies: bool) -> Callable[..., None]:
    def hook(_: Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        recorded.append(first.detach().clone() if copies else first)

    return hook


@contextmanager
def _removed_on_exit(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
