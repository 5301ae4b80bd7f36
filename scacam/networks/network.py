"""A network that can be explained: a module with its target layer, head and preprocessing."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.images import Preprocessing
from scacam.methods import METHODS
from scacam.networks.head import examine

__all__ = ["Network"]

_SEED = 0


class Network:
    """A classifier that can be explained.

    Attributes:
        name: what it is called in tables and reports.
        module: the plain `nn.Module`, in eval mode; it returns logits `[B, classes]`.
        weights: where its weights come from, in words.
        preprocessing: how it wants its images.
        categories: the names of its classes, or None.
        target_layer: the layer whose output the classifier pools, as name and call.
        head: what lies between that output and the logits.
        feature_shape: channels, height and width of the features of a preprocessed image.
        num_classes: how many logits there are.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        target_layer: str | None = None,
        preprocessing: Preprocessing | None = None,
        categories: Sequence[str] | None = None,
        weights: str = "as given",
    ) -> None:
        """Find the target layer and the class weights by running the module on random images.

        Args:
            module: a classifier that returns logits `[B, classes]`; it is put into eval mode.
            name: what to call it; left out, the name of its class.
            target_layer: name of the layer to explain; left out, it is found.
            preprocessing: left out, ImageNet's, for gray images where the module wants one channel.
            categories: names of the classes, one per logit.
            weights: where the weights come from.

        Raises:
            NetworkError: there is no spatial map that the classifier pools, the target layer does
                not exist, or the categories are not one per logit.
        """
        self.module = module.eval()
        self.name = name or type(module).__name__
        self.weights = weights
        self.preprocessing = preprocessing or _default_preprocessing(module)
        try:
            anatomy = examine(module, self._random_images(2), target_layer)
        except NetworkError as error:
            raise NetworkError(f"{self.name}: {error}") from error
        self.target_layer = anatomy.target_layer
        self.head = anatomy.head
        self.feature_shape = anatomy.feature_shape
        self.num_classes = anatomy.num_classes
        if target_layer is None and not anatomy.straight:
            raise NetworkError(
                f"{self.name}: no spatial map leads straight to its classifier (the last one is "
                f"the output of {self.target_layer.name!r}); name a target layer to explain it "
                "all the same"
            )
        if categories is not None and len(categories) != self.num_classes:
            raise NetworkError(
                f"{self.name}: {len(categories)} category names for {self.num_classes} classes"
            )
        self.categories = None if categories is None else tuple(categories)

    @property
    def class_weights(self) -> Tensor | None:
        """`[classes, C]`, from pooled channels to logits; None if the classifier is not linear."""
        return self.head.class_weights(self.module)

    def class_name(self, class_id: int) -> str:
        """The name of a class; "class 7" where the categories are not known."""
        return f"class {class_id}" if self.categories is None else self.categories[class_id]

    def supports(self, method: str) -> bool:
        """Whether a method of `scacam.methods.METHODS` has maps for this network."""
        return self.head.kind != "general" or not METHODS[method].needs_class_weights

    def normalize(self, pixels: Tensor) -> Tensor:
        """From uint8 pixels `[B, H, W, channels]` to what the module wants, on the same device.

        The images stay channels-last in memory, in which convolutions are a quarter faster.
        """
        dtype = next(self.module.parameters()).dtype
        images = pixels.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32)) / 255
        mean = torch.tensor(self.preprocessing.mean).to(images)[:, None, None]
        std = torch.tensor(self.preprocessing.std).to(images)[:, None, None]
        return ((images - mean) / std).to(dtype)

    def digest(self) -> str:
        """SHA-256 of the state dict: names, types, shapes and values."""
        digest = hashlib.sha256()
        for key, value in sorted(self.module.state_dict().items()):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def _random_images(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(_SEED)
        shape = (count, self.preprocessing.channels, *self.preprocessing.crop_size)
        return torch.randn(shape, generator=generator).to(next(self.module.parameters()))


def _default_preprocessing(module: nn.Module) -> Preprocessing:
    convolutions = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    first = next(convolutions, None)
    if first is not None and first.in_channels == 1:
        return Preprocessing(mean=(0.449,), std=(0.226,))
    return Preprocessing()
