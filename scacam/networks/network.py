"""A network that can be explained: a module with its target layer, head and preprocessing."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import chain

import torch
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.images import Preprocessing
from scacam.methods import METHODS
from scacam.networks.anatomy.examine import examine

__all__ = ["Network"]

_SEED = 0


class Network:
    """A classifier that can be explained.

    Attributes:
        name: what it is called in tables and reports.
        module: the plain `nn.Module`, in eval mode.
        weights: where its weights come from, in words.
        preprocessing: how it wants its images.
        categories: the names of its classes, or None.
        layers: those that are explained, in the order in which they run.
        target_layer: the last of them as name and call: it is the one whose output the classifier
            pools, unless others were named.
        head: what lies between that output and the logits.
        output: how logits and probabilities come from what the module returns.
        feature_shape: channels, height and width of the features of a preprocessed image.
        finer_layer: the last layer with twice the target layer's resolution, just before it is
            halved, or None.
        finer_shape: channels, height and width of its output, or None.
        num_classes: how many logits there are; 2 for a module that returns a single one.
        rebuild: makes the same network again, if `load_network` made this one; else None.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        name: str | None = None,
        target_layer: str | Sequence[str] | None = None,
        finer_layer: str | None = None,
        preprocessing: Preprocessing | None = None,
        categories: Sequence[str] | None = None,
        weights: str = "as given",
        output_kind: str | None = None,
    ) -> None:
        """Find the target layer and the class weights by running the module on random images.

        Args:
            module: a classifier that returns logits `[B, classes]`, or their softmax or sigmoid; it
                is put into eval mode.
            name: what to call it; left out, the name of its class.
            target_layer: name of the layer to explain, or names of several, of which the last to
                run is the target layer; left out, it is found.
            finer_layer: name of the finer layer; left out, it is found by the resolutions.
            preprocessing: left out, ImageNet's, for gray images where the module wants one channel.
            categories: names of the classes, one per logit; two for a single logit, of which the
                second is the one it speaks for.
            weights: where the weights come from.
            output_kind: `softmax` if an image is of one class, `sigmoid` if each class is a
                question by itself; left out, what the module's last step says, else softmax, but
                sigmoid for a single logit.

        Raises:
            NetworkError: there is no map or token grid that the classifier reads, the target layer
                does not exist, the module cannot be watched or is no function of one image, its
                logits cannot be had, or the categories are not one per logit.
        """
        self.module = module.eval()
        self.name = name or type(module).__name__
        self.weights = weights
        self.rebuild: partial[Network] | None = None
        self.preprocessing = preprocessing or _default_preprocessing(module)
        named = [target_layer] if isinstance(target_layer, str) else list(target_layer or ())
        try:
            _refuse_unfit(module)
            anatomy = examine(module, self._random_images(3), named, finer_layer, output_kind)
        except (NetworkError, RuntimeError) as error:
            reason = str(error)
            if any(isinstance(layer, torch.jit.ScriptModule) for layer in module.modules()):
                reason = (
                    "it holds TorchScript, whose layers cannot be watched; give the nn.Module "
                    f"that it was made from, and its state dict ({reason})"
                )
            elif isinstance(error, RuntimeError):
                reason = f"it cannot be watched or differentiated: {reason}"
            raise NetworkError(f"{self.name}: {reason}") from error
        self.layers = anatomy.layers
        self.target_layer, self.head, straight, self.feature_shape = anatomy.layers[-1]
        self.finer_layer, self.finer_shape = anatomy.finer_layer, anatomy.finer_shape
        self.output = anatomy.output
        self.num_classes = anatomy.num_classes
        if not named and not straight:
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

    @property
    def class_biases(self) -> Tensor | None:
        """`[classes]`, what the classifier adds; zeros without any, None as of class weights."""
        return None if self.head.classifier is None else self.head.biases(self.module)

    def class_name(self, class_id: int) -> str:
        """The name of a class; "class 7" where the categories are not known."""
        return f"class {class_id}" if self.categories is None else self.categories[class_id]

    def supports(self, method: str) -> bool:
        """Whether a method has maps for this network: of its target layer, or of the finer one."""
        if METHODS[method].needs_finer_layer:
            return self.finer_layer is not None
        return self.layers[-1].supports(method)

    def methods_by_layer(self, methods: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Those of some methods that have maps, by the name of the layer under which these stand.

        The maps of methods that need the finer layer have its resolution and stand under its name.
        A layer without maps has no key.
        """
        chosen = {
            explained.layer.name: [name for name in methods if explained.supports(name)]
            for explained in self.layers
        }
        if self.finer_layer is not None:
            finer = [name for name in methods if METHODS[name].needs_finer_layer]
            chosen.setdefault(self.finer_layer.name, []).extend(finer)
        return {layer: tuple(names) for layer, names in chosen.items() if names}

    def map_shape(self, layer: str) -> tuple[int, int]:
        """Height and width of the maps that stand under a layer's name."""
        shapes = {explained.layer.name: explained.feature_shape for explained in self.layers}
        if self.finer_layer is not None and self.finer_shape is not None:
            shapes[self.finer_layer.name] = self.finer_shape
        return shapes[layer][1:]

    def logits(self, images: Tensor) -> Tensor:
        """Logits `[B, classes]` of preprocessed images, whatever the module makes of them."""
        return self.output.logits(self.module, images)

    def probabilities(self, logits: Tensor) -> Tensor:
        """From logits `[…, classes]`, as `output.kind` says."""
        return self.output.probabilities(logits)

    def normalize(self, pixels: Tensor) -> Tensor:
        """From uint8 pixels `[B, H, W, channels]` to what the module wants, on the same device.

        The images stay channels-last in memory, in which convolutions are a quarter faster.
        """
        dtype = _example(self.module).dtype
        images = pixels.permute(0, 3, 1, 2).to(torch.promote_types(dtype, torch.float32)) / 255
        mean = _by_channel(tuple(self.preprocessing.mean), images.dtype, images.device)
        std = _by_channel(tuple(self.preprocessing.std), images.dtype, images.device)
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
        return torch.randn(shape, generator=generator).to(_example(self.module))


@lru_cache(maxsize=64)
def _by_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`[channels, 1, 1]`, kept: a copy for each batch would make the host wait for the GPU."""
    return torch.tensor(values).to(device, dtype)[:, None, None]


def _example(module: nn.Module) -> Tensor:
    """A tensor of the type and on the device of the module's."""
    tensors = chain(module.parameters(), module.buffers())
    return next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))


def _refuse_unfit(module: nn.Module) -> None:
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if tensor.is_meta:
            raise NetworkError(f"{name} is on the meta device: it has no weights yet")
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise NetworkError(
                f"layer {name!r} has no running statistics, so that each image would change what "
                "is said of the others in its batch; train it with track_running_stats=True"
            )


def _default_preprocessing(module: nn.Module) -> Preprocessing:
    convolutions = (layer for layer in module.modules() if isinstance(layer, nn.Conv2d))
    first = next(convolutions, None)
    if first is not None and first.in_channels == 1:
        return Preprocessing(mean=(0.449,), std=(0.226,))
    return Preprocessing()
