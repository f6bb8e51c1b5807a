"""Record and patch: the only file that touches torch hooks.

All are context managers. They register on entry and remove on exit, also after an exception, so that a model
never keeps a hook. They see what a module returns as a tensor: where a module returns a tuple, its first element.
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
    """Ends a forward pass early; never leaves `record_inputs`."""


@contextmanager
def record(modules: Sequence[Module]) -> Iterator[list[list[Tensor]]]:
    """Collect what `modules` return.

    Args:
        modules: The modules to listen to.

    Yields:
        One list a module, in the order given; each call of the module adds its output, detached and cloned.
    """
    outputs: list[list[Tensor]] = [[] for _ in modules]
    with _hooked(
        [
            module.register_forward_hook(_recorder(into))
            for module, into in zip(modules, outputs, strict=True)
        ]
    ):
        yield outputs


@contextmanager
def record_inputs(module: Module, *, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect the first positional input of `module`, as float32 copies.

    Args:
        module: The module to listen to.
        stop: End the block at the module's first call, before the module runs. Code in the `with` block after that
            call is skipped.

    Yields:
        A list; each call of the module adds its input, detached, cloned, float32.
    """
    inputs: list[Tensor] = []

    def hook(_: Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].detach().float().clone())
        if stop:
            raise _Stop

    with _hooked([module.register_forward_pre_hook(hook)]), suppress(_Stop):
        yield inputs


@contextmanager
def patch(replacements: Mapping[Module, Callable[[Tensor], Tensor]]) -> Iterator[dict[Module, int]]:
    """Pass what modules return through functions.

    Args:
        replacements: For each module a function from its output to the output to use instead. It must not write
            into its argument, which others may hold.

    Yields:
        How often each module has been called since entry: proof that a hook fired.
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

    with _hooked([m.register_forward_hook(hook_for(f)) for m, f in replacements.items()]):
        yield calls


@contextmanager
def patch_inputs(
    modules: Mapping[Module, Callable[[tuple[Any, ...], dict[str, Any]], Arguments]],
) -> Iterator[dict[Module, int]]:
    """Pass what modules are called with through functions.

    Args:
        modules: For each module a function from its positional and keyword arguments to those to use instead. It
            must not write into tensors, which others may hold.

    Yields:
        How often each module has been called since entry: proof that a hook fired.
    """
    calls = dict.fromkeys(modules, 0)

    def hook_for(
        function: Callable[[tuple[Any, ...], dict[str, Any]], Arguments],
    ) -> Callable[..., Arguments]:
        def hook(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
            calls[module] += 1
            return function(args, kwargs)

        return hook

    with _hooked(
        [m.register_forward_pre_hook(hook_for(f), with_kwargs=True) for m, f in modules.items()]
    ):
        yield calls


def _recorder(into: list[Tensor]) -> Callable[..., None]:
    def hook(_: Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        first = output[0] if isinstance(output, tuple) else output
        into.append(first.detach().clone())

    return hook


@contextmanager
def _hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
