"""Networks that fail as GPUs and native code do; jobs load them as `tests.faulty_networks:NAME`.

They do so in the workers alone, and write into the file that `FAULTS` names which process it was.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from scacam import Network
from tests.tiny_networks import colours

ILLEGAL = "CUDA error: an illegal memory access was encountered"


class Faulty(nn.Module):
    """Calls a function with the images and how many calls there were so far, then the network."""

    def __init__(self, inner: nn.Module, fault: Callable[[Tensor, int], None]) -> None:
        super().__init__()
        self.inner, self.fault = inner, fault
        self.driver, self.log = os.getpid(), os.environ["FAULTS"]

    def forward(self, images: Tensor) -> Tensor:
        if os.getpid() != self.driver:
            with Path(self.log).open("a+") as file:
                file.write(f"{os.getpid()}\n")
                file.seek(0)
                self.fault(images, len(file.readlines()))
        return self.inner(images)


def _faulty(fault: Callable[[Tensor, int], None]) -> Network:
    network = colours()
    module = Faulty(network.module, fault)
    return Network(module, preprocessing=network.preprocessing, target_layer="inner.0")


def failing_twice() -> Network:
    """On a GPU that fails at first."""

    def fault(images: Tensor, calls: int) -> None:
        if calls <= 2:
            raise torch.AcceleratorError(ILLEGAL)

    return _faulty(fault)


def always_failing() -> Network:
    """On a GPU that is broken, as torch before 2.8 said it."""

    def fault(images: Tensor, calls: int) -> None:
        raise RuntimeError(ILLEGAL)

    return _faulty(fault)


def killed_by_white() -> Network:
    """Kills its process when it sees an image that is white all over."""

    def fault(images: Tensor, calls: int) -> None:
        if (images > 0.99).flatten(1).all(1).any():
            signal.raise_signal(signal.SIGSEGV)  # in this thread, as native code would

    return _faulty(fault)


def confused_by_white() -> Network:
    """Raises something when it sees an image that is white all over."""

    def fault(images: Tensor, calls: int) -> None:
        if (images > 0.99).flatten(1).all(1).any():
            raise TypeError("too white\nby far")

    return _faulty(fault)
