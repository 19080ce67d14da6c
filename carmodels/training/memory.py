"""Out-of-memory: one error for all its forms, a second try, and batches in parts that fit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

# Of RuntimeErrors: CUDA's (its context, a kernel), cuBLAS's and cuDNN's, torch's allocator on a CPU.
_SIGNS = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
_Result = TypeVar("_Result")


@contextmanager
def named_out_of_memory() -> Iterator[None]:
    """Raises torch.OutOfMemoryError for every form of out-of-memory.

    Only torch's allocator on a GPU raises it. Others raise RuntimeError, Python and NumPy MemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        raise torch.OutOfMemoryError(str(error).partition("\n")[0] or "out of memory") from error


def free_memory() -> None:
    """Return what no tensor uses to the device. Call it outside the handler: the error holds tensors."""
    gc.collect()
    torch.cuda.empty_cache()


def try_twice(do: Callable[[], _Result]) -> _Result:
    """do(), and after an out-of-memory once more with unused memory freed. `do` must bear a repetition."""
    try:
        with named_out_of_memory():
            return do()
    except torch.OutOfMemoryError:
        pass
    free_memory()
    with named_out_of_memory():
        return do()


class PartwiseForward:
    """network(*inputs) without gradients, in parts that fit into memory.

    On out-of-memory, halves the parts until they fit. Later calls begin with the size that fitted. Raises
    OutOfMemoryError if one image does not fit.
    """

    def __init__(self, network: Callable[..., torch.Tensor]) -> None:
        self._network = network
        self.largest: int | None = None  # images that fit; None: whole batches, so far

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        while True:
            size = min(self.largest or len(inputs[0]), len(inputs[0]))
            try:
                with named_out_of_memory():
                    parts = zip(*(batch.split(size) for batch in inputs), strict=True)
                    return torch.cat([self._network(*part) for part in parts])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
            free_memory()
            self.largest = (size + 1) // 2


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Give trainable parameters the state that their first step would allocate.

    A step that runs out of memory has changed some parameters and not others, so it cannot be tried again.
    This can: a step with gradients and rates of zero changes nothing.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    new = [p for p in parameters if p.requires_grad and p not in optimizer.state]
    if not new:
        return
    before = [{name: group[name] for name in ("lr", "weight_decay")} for group in optimizer.param_groups]
    optimizer.zero_grad(set_to_none=True)
    try:
        for group in optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
        for parameter in new:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    except BaseException:
        for parameter in new:
            optimizer.state.pop(parameter, None)  # it may be half made
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
        for group, values in zip(optimizer.param_groups, before, strict=True):
            group.update(values)
    for parameter in new:
        if "step" in optimizer.state[parameter]:
            optimizer.state[parameter]["step"].zero_()
