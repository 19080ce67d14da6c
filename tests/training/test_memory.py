"""Every form of out-of-memory is one error, and what fits is found once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from carmodels.training.memory import PartwiseForward, allocate_state, named_out_of_memory, try_twice

TOO_MUCH = 2**60  # bytes


def raised(error: Exception) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize(
    "run_out",
    [
        lambda: torch.empty(TOO_MUCH, dtype=torch.uint8),
        lambda: np.empty(TOO_MUCH, np.uint8),
        raised(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")),
        raised(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
        raised(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")),
        raised(MemoryError()),
        raised(torch.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=["torch", "numpy", "cuda", "cublas", "cudnn", "python", "torch on a GPU"],
)
def test_every_form_of_out_of_memory_is_torchs_in_one_line(run_out: Callable[[], object]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"^[^\n]+$"), named_out_of_memory():
        run_out()


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError("no")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)), named_out_of_memory():
        raise error
    calls: list[int] = []
    with pytest.raises(type(error)):
        try_twice(lambda: (calls.append(1), raised(error)()))
    assert len(calls) == 1


class Small:
    """A network on a device that holds so many images."""

    def __init__(self, room: int) -> None:
        self.room, self.sizes = room, list[int]()

    def __call__(self, images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return images + others


def test_images_are_shown_in_parts_that_fit_and_the_size_is_remembered() -> None:
    images, network = torch.arange(22.0).reshape(11, 2), Small(room=3)
    forward = PartwiseForward(network)
    torch.testing.assert_close(forward(images, images), 2 * images)
    assert network.sizes == [11, 6, 3, 3, 3, 2]
    network.sizes.clear()
    torch.testing.assert_close(forward(images[:4], images[:4]), 2 * images[:4])
    assert network.sizes == [3, 1]
    assert forward(images[:0], images[:0]).shape == (0, 2)
    with pytest.raises(torch.OutOfMemoryError):
        PartwiseForward(Small(room=0))(images, images)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": lambda groups, **more: torch.optim.SGD(groups, momentum=0.9, nesterov=True, **more),
}


def three_steps(name: str, *, ahead: bool) -> list[torch.Tensor]:
    """Parameters of three groups after three steps; the last group opens after the first."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(6)]
    groups = [{"params": parameters[n : n + 2]} for n in (0, 2, 4)]
    optimizer = OPTIMIZERS[name](groups, lr=0.1, weight_decay=0.1, fused=True)
    for step in range(3):
        for number, parameter in enumerate(parameters):
            parameter.requires_grad_(step > 0 or number < 4)
        if ahead:
            try_twice(lambda: allocate_state(optimizer))
        optimizer.zero_grad()
        sum((p**2).sum() * (n + 1) for n, p in enumerate(parameters) if p.requires_grad).backward()
        optimizer.step()
    return [p.detach().clone() for p in parameters]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("allocation", [None, *range(18)])
def test_state_that_is_allocated_ahead_changes_nothing_even_if_memory_is_short_meanwhile(
    name: str, allocation: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = three_steps(name, ahead=False)
    allocations: list[str] = []

    def short_once(made: str) -> Callable[..., torch.Tensor]:
        function = getattr(torch, made)

        def allocated(*arguments: object, **more: object) -> torch.Tensor:
            allocations.append(made)
            if len(allocations) - 1 == allocation:
                raise torch.OutOfMemoryError("CUDA out of memory")
            tensor: torch.Tensor = function(*arguments, **more)
            return tensor

        return allocated

    for made in ("zeros_like", "empty_like", "zeros"):
        monkeypatch.setattr(torch, made, short_once(made))
    for one, other in zip(three_steps(name, ahead=True), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert len(allocations) >= 12


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_allocates_nothing_once_the_state_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.nn.Parameter(torch.randn(4, 3)) for _ in range(2)]
    optimizer = OPTIMIZERS[name]([{"params": [p]} for p in parameters], lr=0.1, fused=True)
    allocate_state(optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones(4, 3)
    for made in ("zeros_like", "empty_like", "zeros", "empty", "tensor"):
        monkeypatch.setattr(torch, made, raised(torch.OutOfMemoryError("CUDA out of memory")))
    optimizer.step()
