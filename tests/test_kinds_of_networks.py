"""A convolutional network, a transformer and a zero-shot one in a single run."""

import sys
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from killing import killed_and_begun_again
from open_clip.push_to_hf_hub import save_config_for_hf
from safetensors.torch import save_file

import scacam
from scacam.errors import NetworkError
from scacam.images import decode, pixels, view_of
from scacam.jobs import compare, report

ROOT = Path(__file__).parent.parent
METHODS = ("gap_cam", "grad_cam", "sca_cam")
PROMPTS = ("a tabby cat", "garden hose", "snow")
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def saved_clip(folder: Path) -> str:
    """A folder as open_clip publishes its models, with random weights in it."""
    folder.mkdir()
    torch.manual_seed(0)
    clip = open_clip.CLIP(**CLIP)
    open_clip.factory.set_model_preprocess_cfg(
        clip, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "interpolation": "bilinear"}
    )
    save_config_for_hf(clip, folder / "open_clip_config.json", CLIP)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return str(folder)


def test_a_zero_shot_network_of_a_folder(tmp_path: Path) -> None:
    folder = saved_clip(tmp_path / "clip")
    network = scacam.load_network("open_clip.mine", folder, prompts=PROMPTS)
    assert (network.categories, network.feature_shape) == (PROMPTS, (48, 4, 4))
    assert network.preprocessing == scacam.Preprocessing(
        (64, 64), 64, "bilinear", (0.5,) * 3, (0.25,) * 3
    )
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")
    texts = open_clip.build_zero_shot_classifier(
        model, tokens, PROMPTS, open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        cosines = model.encode_image(images, normalize=True) @ texts
        torch.testing.assert_close(network.logits(images), model.logit_scale.exp() * cosines)
    (tmp_path / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(NetworkError, match=r"open_clip\.mine"):
        scacam.load_network("open_clip.mine", folder, prompts=PROMPTS)
    (tmp_path / "clip" / "open_clip_config.json").unlink()
    with pytest.raises(NetworkError, match=r"open_clip\.mine"):
        scacam.load_network("open_clip.mine", folder, prompts=PROMPTS)


@pytest.mark.long
def test_a_job_over_all_three_killed_resumed_reported_and_compared(
    tmp_path: Path, module_photo
) -> None:
    folder, out, prompts = tmp_path / "photos", tmp_path / "out", tmp_path / "classes.txt"
    folder.mkdir()
    for seed in range(64):
        module_photo(240, 230, seed).save(folder / f"{seed:04d}.jpg")
    prompts.write_text("\n".join(PROMPTS))
    networks = {
        "resnet18": "random",
        "timm.vit_tiny_patch16_224": "random",
        "open_clip.mine": saved_clip(tmp_path / "clip"),
    }
    command = [sys.executable, "jobs/explain.py", "--input", str(folder), "--output", str(out)]
    command += ["--networks", *map("=".join, networks.items()), "--prompts", str(prompts)]
    command += ["--methods", *METHODS, "--top-k", "2"]
    said = killed_and_begun_again(command, out)
    assert "64 of 64 images explained" in said
    run = scacam.open_run(str(out))
    assert list(run.networks) == list(networks)
    for name, weights in networks.items():
        _assert_stored(run, scacam.load_network(name, weights, prompts=PROMPTS), folder)
    page = Path(report.run(run=str(out)).path).read_text()
    assert all(name in page for name in networks)
    assert any(name in page for name in PROMPTS)
    compared = compare.run(runs=[str(out), str(out)])
    table = pq.read_table(compared.table)
    assert set(table["network_a"].to_pylist()) == set(networks)
    assert not any(table["moved"].to_pylist())


def _assert_stored(run: scacam.Run, network: scacam.Network, folder: Path) -> None:
    """That rows of the first image and the last are what the network explains."""
    methods = [method for method in METHODS if network.supports(method)]
    assert run.networks[network.name]["methods"] == methods
    explainer = scacam.Explainer(network, methods, top_k=2)
    for image_id in (0, 63):
        image = decode((folder / f"{image_id:04d}.jpg").read_bytes())
        view = view_of(*image.size, network.preprocessing, "center_crop")
        seen = torch.from_numpy(pixels(image, view, network.preprocessing).copy())[None]
        expected = explainer(network.normalize(seen))
        rows = run.explanations(network.name, image_ids=[image_id]).to_table().to_pylist()
        assert len(rows) == 2 * len(methods)
        for row in rows:
            assert row["class_name"] == network.class_name(row["class_id"])
            maps = expected.heatmaps[row["method"]][0, row["rank"] - 1].numpy()
            tolerance = 2e-3 * np.abs(maps).max()
            np.testing.assert_allclose(run.heatmap(row), maps, rtol=0, atol=tolerance)
