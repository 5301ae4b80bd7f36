"""Networks of Hugging Face's transformers and of open_clip, as modules that return logits."""

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scacam.errors import NetworkError
from scacam.images import Preprocessing
from scacam.networks.weights import is_checkpoint
from scacam.networks.zoo import Recipe, package, unavailable

__all__ = ["from_hugging_face", "from_open_clip"]

logger = logging.getLogger("scacam")

_RESAMPLING = {2: "bilinear", 3: "bicubic"}
_CONFIG = "open_clip_config.json"
_NAMELESS = re.compile(r"LABEL_\d+")


class _Logits(nn.Module):
    """Of an output object the logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def from_hugging_face(name: str, weights: str) -> Recipe:
    """An image classifier of the hub, or of a folder that `save_pretrained` wrote.

    Args:
        name: of the network on the hub; anything for a folder.
        weights: `DEFAULT` and `random` for the hub, a folder, or a revision on the hub.

    Raises:
        NetworkError: transformers is not installed, or has no such classifier.
    """
    transformers = package("transformers", f"hf.{name}", "transformers")
    source, options = name, {}
    if is_checkpoint(weights):
        source = weights
    elif weights not in ("DEFAULT", "random"):
        options = {"revision": weights}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        processor = transformers.AutoImageProcessor.from_pretrained(source, **options).to_dict()
    except (OSError, ValueError) as error:
        raise unavailable(f"hf.{name}", weights, error) from error
    classifier = transformers.AutoModelForImageClassification
    if type(config) not in classifier._model_mapping:
        raise NetworkError(f"hf.{name}: transformers has no image classifier {config.model_type}")

    def build(num_classes: int) -> nn.Module:
        return _Logits(classifier.from_config(config))

    def publish() -> nn.Module:
        try:
            # Nothing but safetensors is read, which hold no code.
            network = classifier.from_pretrained(source, use_safetensors=True, **options)
        except (OSError, ValueError) as error:
            raise unavailable(f"hf.{name}", weights, error) from error
        return _Logits(network)

    names = [config.id2label[index] for index in sorted(config.id2label)]
    return Recipe(
        build=build,
        publish=publish,
        weights=weights,
        preprocessing=_preprocessing(name, config, processor),
        categories=() if all(map(_NAMELESS.fullmatch, names)) else names,
        output_kind="sigmoid" if config.problem_type == "multi_label_classification" else None,
        reads_files=True,
    )


def _preprocessing(name: str, config: Any, processor: dict[str, Any]) -> Preprocessing:
    """What the processor of a network does, as far as it is a resize, a crop and a scaling."""
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        share = processor.get("crop_pct") or 1
        crops = bool(processor.get("do_center_crop")) and "height" in crop
        shape = (crop["height"], crop["width"]) if crops else (edge, edge)
        resize = int(edge / share)
    else:
        edge = getattr(config, "image_size", 224)
        shape = (size.get("height", edge), size.get("width", edge))
        resize = min(shape)
        logger.warning(
            "hf.%s is published to see the whole image squashed, as with the view whole_image; in "
            "the view center_crop it sees a centre crop",
            name,
        )
    scaled = processor.get("do_normalize", True)
    resample = processor.get("resample", 2)
    if resample not in _RESAMPLING:
        raise NetworkError(f"hf.{name} resizes by resample={resample}, not 2 or 3 (bicubic)")
    return Preprocessing(
        crop_size=shape,
        resize_size=resize,
        interpolation="bicubic" if resample == 3 else "bilinear",
        mean=tuple(processor["image_mean"]) if scaled else (0.0,) * 3,
        std=tuple(processor["image_std"]) if scaled else (1.0,) * 3,
    )


class _ZeroShot(nn.Module):
    """The image half of a CLIP, and a classifier whose weights are embeddings of texts."""

    def __init__(self, visual: nn.Module, texts: Tensor, scale: float, bias: float) -> None:
        super().__init__()
        self.visual = visual
        self.classifier = nn.Linear(texts.shape[1], len(texts))
        with torch.no_grad():
            self.classifier.weight.copy_(scale * texts)
            self.classifier.bias.fill_(bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(F.normalize(self.visual(images), dim=1))


def from_open_clip(name: str, weights: str, prompts: Sequence[str] | None) -> Recipe:
    """A zero-shot classifier: the classes are what is asked for.

    Args:
        name: of a model of open_clip; anything for a folder.
        weights: a tag of open_clip's, `DEFAULT` for the first it has, a checkpoint, `random`, or a
            folder as open_clip publishes it, with a configuration in it.
        prompts: the classes in words. Each is put into seven sentences, whose embeddings are
            averaged.

    Raises:
        NetworkError: open_clip is not installed or has no such model or weights, or no classes are
            given.
    """
    open_clip = package("open_clip", f"open_clip.{name}", "open_clip_torch")
    is_folder = is_checkpoint(weights) and Path(weights).is_dir()
    source = f"local-dir:{weights}" if is_folder else name
    if not is_folder and name not in open_clip.list_models():
        raise NetworkError(f"open_clip has no model {name!r}")
    if not prompts:
        raise NetworkError(f"open_clip.{name} needs classes: --prompts FILE, with one per line")
    tags = open_clip.list_pretrained_tags_by_model(name)
    tag = tags[0] if weights == "DEFAULT" and tags else weights
    if tag != "random" and not is_checkpoint(tag) and tag not in tags:
        raise NetworkError(f"open_clip.{name} has no weights {tag!r}, only {', '.join(tags)}")
    try:
        config = open_clip.get_model_config(source)
    except OSError as error:
        raise unavailable(f"open_clip.{name}", weights, error) from error

    def made(pretrained: str | None) -> nn.Module:
        model = open_clip.create_model(
            source,
            None if is_folder else pretrained,
            pretrained_text=False,
            require_pretrained=is_folder,
        ).eval()
        texts = open_clip.build_zero_shot_classifier(
            model,
            open_clip.get_tokenizer(source),
            list(prompts),
            open_clip.SIMPLE_IMAGENET_TEMPLATES,
        )
        bias = getattr(model, "logit_bias", None)
        return _ZeroShot(
            model.visual,
            texts.detach().T,
            float(model.logit_scale.detach().exp()),
            0.0 if bias is None else float(bias),
        )

    def publish() -> nn.Module:
        try:
            return made(tag)
        except (OSError, RuntimeError, ValueError) as error:
            raise unavailable(f"open_clip.{name}", tag, error) from error

    size = config["vision_cfg"].get("image_size", 224)
    shape = (size, size) if isinstance(size, int) else tuple(size)
    if is_folder:
        published = json.loads((Path(weights) / _CONFIG).read_text()).get("preprocess_cfg", {})
    else:
        published = open_clip.get_pretrained_cfg(name, tag) or {}
    sees = vars(open_clip.transform.PreprocessCfg()) | published
    return Recipe(
        build=lambda _: made(None),
        publish=publish,
        weights=tag,
        preprocessing=Preprocessing(
            crop_size=shape,
            resize_size=min(shape),
            interpolation=sees["interpolation"],
            mean=tuple(sees["mean"]),
            std=tuple(sees["std"]),
        ),
        categories=list(prompts),
        reads_files=True,
    )
