"""Networks small enough for tests; jobs load them as `tests.tiny_networks:NAME`."""

import torch
from torch import nn

from scacam import Network, Preprocessing


def colours() -> Network:
    """Four classes, red, green, blue and gray, on 8 × 8 maps of a 32 × 32 input."""
    module = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    with torch.no_grad():
        convolution, linear = module[0][0], module[3]
        convolution.weight.zero_()
        convolution.bias.zero_()
        for channel in range(3):
            convolution.weight[channel, channel] = 1 / 16
        convolution.weight[3] = 1 / 48
        linear.weight.copy_(4 * torch.eye(4) - 1)
        linear.bias.zero_()
    return Network(
        module,
        preprocessing=Preprocessing((32, 32), 32, mean=(0.0,) * 3, std=(1.0,) * 3),
        categories=["red", "green", "blue", "gray"],
    )


def not_a_number() -> Network:
    """Says NaN of images that are bright in the first pixel."""
    network = colours()

    class Doubtful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network.module

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits = self.inner(images)
            bright = (images[:, :, 0, 0] > 0.99).all(1, keepdim=True) & (images.max() <= 1)
            return torch.where(bright, torch.nan, logits)

    return Network(Doubtful(), preprocessing=network.preprocessing, target_layer="inner.0")


def greedy() -> Network:
    """Runs out of memory, truly, on more than three images at a time."""
    network = colours()

    class Greedy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network.module

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) > 3:
                torch.empty(1 << 50, dtype=torch.uint8)
            return self.inner(images)

    return Network(Greedy(), preprocessing=network.preprocessing, target_layer="inner.0")


def nameless() -> Network:
    """The same without names for its classes."""
    network = colours()
    return Network(network.module, preprocessing=network.preprocessing)
