"""Checkpoints open without data: where the config, the classes and the file come from, and in which order."""

import pytest
import torch

from datasets import coco, voc
from engine.checkpoints.files import save_weights
from engine.checkpoints.opening import checkpoint_config, find_checkpoint, from_hub, open_checkpoint
from engine.config import SCHEMA, load_config, portable, save_config
from model import build_method
from model.method import MapPlan
from model.more.official import official_shapes
from utils.errors import UserError

ARGS = "{embed_dim: 32, depth: 3, num_heads: 2, img_size: 32, patch_size: 8}"
SMALL = ["model.backbone=vit_tiny_patch16_224", f"model.backbone_args={ARGS}", "model.decoder_channels=16"]
NAMES = ["nut", "bolt"]


def make(classes=2, *overrides):
    config = load_config("more_voc", [*SMALL, *overrides])
    return build_method(config, classes), config


def save(path, classes=NAMES, *overrides, **meta):
    method, config = make(len(classes), *overrides)
    save_weights(path, method, {"classes": list(classes), "settings": portable(config), **meta})
    return method


def same_weights(one, two):
    return all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())


def test_one_file_opens_anywhere(tmp_path):
    method = save(tmp_path / "w.safetensors", NAMES, "evaluate.bkg=0.25", "data.root=/home/me/data").eval()
    opened = open_checkpoint(str(tmp_path / "w.safetensors"), ["evaluate.flip=false"])
    assert opened.classes == ("nut", "bolt") and not opened.method.training
    assert opened.config.evaluate.bkg == 0.25 and not opened.config.evaluate.flip and opened.config.data.root is None
    assert opened.config_name == str(tmp_path / "w.safetensors")
    images = torch.randn(1, 3, 40, 48)
    plan = MapPlan((1.0, 0.5), flip=True)
    plans = {"cam": plan, "lam": plan, "seg": MapPlan(flip=True)}
    theirs, ours = (one.maps(images, plans, None) for one in (opened.method, method))
    assert theirs.keys() == plans.keys() and all(torch.equal(theirs[kind], ours[kind]) for kind in plans)
    assert same_weights(opened.method, method)


def test_which_config_is_taken(tmp_path):
    """config=..., else the header, with the paths of its run's config.yaml, else that config.yaml, else the default."""
    run, lone = tmp_path / "run", tmp_path / "w.safetensors"
    weights = run / "checkpoints" / "w.safetensors"
    for path in (weights, lone):
        save(path, NAMES, "seed=1", "tag=mine", "data.root=/data", "model.weights=/w/vit.pth", "output=/runs")
    here = ["data.root=/here", "model.weights=/v/vit.pth", "output=/else", "evaluate.bkg=0.1"]
    save_config(load_config("more_voc", ["seed=2", "tag=mine", *here]), run / "config.yaml")
    named = tmp_path / "named.yaml"
    named.write_text("seed: 3\n")
    assert checkpoint_config(str(weights), config=str(named))[0].seed == 3
    config, name = checkpoint_config(str(weights))
    assert (config.seed, config.evaluate.bkg, name) == (1, 0.5, str(weights))
    assert (config.data.root, config.model.weights, config.output) == ("/here", "/v/vit.pth", "runs")
    for stray in ("tag: other\ndata: {root: /else}\n", "learning_rate: 1\n"):
        (tmp_path / "config.yaml").write_text(stray)
        assert checkpoint_config(str(lone))[0].data.root is None
    (tmp_path / "config.yaml").unlink()
    assert checkpoint_config(str(lone))[0].seed == 1
    assert checkpoint_config(str(lone), ["seed=4"])[0].seed == 4
    method, _ = make()
    save_weights(tmp_path / "old.safetensors", method, {"classes": NAMES, "config": "tag"})
    (run / "old.safetensors").write_bytes((tmp_path / "old.safetensors").read_bytes())
    assert checkpoint_config(str(run / "old.safetensors"))[1] == str(run / "config.yaml")
    assert checkpoint_config(str(tmp_path / "old.safetensors"))[1] == "more_voc"
    assert checkpoint_config(str(tmp_path / "old.safetensors"), default="more_coco")[1] == "more_coco"
    assert open_checkpoint(str(tmp_path / "old.safetensors"), SMALL).classes == ("nut", "bolt")


@pytest.mark.parametrize("data, name", [(voc, "more_voc"), (coco, "more_coco")])
def test_released_files_have_their_data_sets_classes(tmp_path, data, name):
    method, _ = make(len(data.CLASSES))
    weights = {key: torch.randn(shape) for key, shape in official_shapes(method.network.state_dict()).items()}
    torch.save(weights, tmp_path / "released.pth")
    opened = open_checkpoint(str(tmp_path / "released.pth"), SMALL)
    assert opened.config.train.precision == "fp32", "as it was trained, also on a GPU"
    told = open_checkpoint(str(tmp_path / "released.pth"), [*SMALL, "train.precision=bf16"], config=name)
    assert told.config.train.precision == "bf16"
    assert (opened.classes, opened.config_name) == (data.CLASSES, name)
    assert torch.equal(opened.method.network.decoder.conv8.weight, weights["decoder.conv8.weight"])
    with pytest.raises(UserError, match=rf"has {len(data.CLASSES)} classes, the data has 2: give its own data"):
        open_checkpoint(str(tmp_path / "released.pth"), [*SMALL, "data.classes=[nut,bolt]"])


def test_a_released_file_of_other_classes_is_told_them(tmp_path):
    method, _ = make()
    weights = {key: torch.randn(shape) for key, shape in official_shapes(method.network.state_dict()).items()}
    torch.save(weights, tmp_path / "released.pth")
    with pytest.raises(UserError, match=r"released\.pth has 2 classes, the data has 20: give its own .*data\.classes"):
        open_checkpoint(str(tmp_path / "released.pth"), SMALL)
    assert open_checkpoint(str(tmp_path / "released.pth"), [*SMALL, "data.classes=[nut,bolt]"]).classes == tuple(NAMES)


def test_folders(tmp_path):
    """The file as the Hub names it, else the only one."""
    folder = tmp_path / "shared"
    save(folder / "more.safetensors")
    assert find_checkpoint(str(folder)) == str(folder / "more.safetensors")
    save(folder / "other.safetensors")
    with pytest.raises(UserError, match=r"shared: 2 \.safetensors files in this folder; give the weights file itself"):
        find_checkpoint(str(folder))
    save(folder / "model.safetensors")
    assert find_checkpoint(str(folder)) == str(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no \.safetensors file in this folder; .*of a run, in checkpoints/"):
        find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "path", ["nowhere.pth", "runs/x/checkpoints/best.weights.safetensors", "runs/w.safetensors", "no_such_name"]
)
def test_what_is_not_there_is_named(path):
    with pytest.raises(UserError, match=f"{path}: no such checkpoint"):
        open_checkpoint(path)


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="^runs/train_voc: no such checkpoint$"):
        open_checkpoint("runs/train_voc")


def test_names_of_the_registry(tmp_path, monkeypatch):
    """A checkpoint's row is fetched, here from the folder of downloads; rows of other things are refused."""
    monkeypatch.setenv("WSSS_DOWNLOADS", str(tmp_path))
    monkeypatch.setenv("WSSS_OFFLINE", "1")
    with pytest.raises(UserError, match=r"put more_voc_official\.pth .*there"):
        open_checkpoint("more_voc_official")
    with pytest.raises(UserError, match="vit_base_imagenet: names start_weights of weights/registry.yaml"):
        open_checkpoint("vit_base_imagenet")
    method, _ = make(20)
    weights = {key: torch.randn(shape) for key, shape in official_shapes(method.network.state_dict()).items()}
    torch.save(weights, tmp_path / "more_voc_official.pth")
    assert open_checkpoint("more_voc_official", SMALL).classes == voc.CLASSES


def test_the_hub_is_asked_for_an_id(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="somebody/some-model: no such checkpoint here, and the Hub does not give it: "):
        open_checkpoint("somebody/some-model")


def test_offline_asks_nobody(monkeypatch):
    asked = []
    monkeypatch.setenv("WSSS_OFFLINE", "1")
    hub = "engine.checkpoints.opening.hf_hub_download"
    monkeypatch.setattr(hub, lambda *_, **how: asked.append(how["local_files_only"]))
    from_hub("somebody/some-model")
    assert asked == [True]


def test_settings_that_are_not_ours_are_named(tmp_path):
    method, config = make()
    settings = {**portable(config), "sead": 1}
    save_weights(tmp_path / "w.safetensors", method, {"classes": NAMES, "settings": settings})
    with pytest.raises(UserError, match=r"unknown key 'sead' in .*w\.safetensors: did you mean 'seed'"):
        open_checkpoint(str(tmp_path / "w.safetensors"))


def test_a_file_of_the_first_schema_opens(tmp_path):
    """Its header has no number of a schema, and former names of keys and of values."""
    method, config = make()
    settings = portable(config)
    del settings["schema"], settings["evaluate"]["scales"]
    former = {"cam_scales": [1.0, 0.5], "lam_scales": [0.75], "seg_scales": [1.25], "predict_from": "segmentation"}
    settings["evaluate"] |= former
    settings["data"]["augmentation"] = "voc"
    save_weights(tmp_path / "w.safetensors", method, {"classes": NAMES, "settings": settings})
    opened = open_checkpoint(str(tmp_path / "w.safetensors"), ["evaluate.scales.lam=[1.5]"])
    assert opened.config.evaluate.scales == {"cam": (1.0, 0.5), "lam": (1.5,), "seg": (1.25,)}
    assert (opened.config.evaluate.predict_from, opened.config.data.augmentation) == ("seg", "resized_crop")
    assert same_weights(opened.method, method)


def test_portable_settings_name_no_folder_of_the_machine():
    paths = ["data.root=data/voc", "output=/home/me/runs", "model.weights=~/vit.pth", "resume=auto",
             "data.image_labels=../labels/x.npy", "evaluate.save_labels=C:\\me\\out"]   # fmt: skip
    config = load_config("more_voc", [*paths, "data.train_split=/data/me/train.txt", "data.classes=[a/b]"])
    settings = portable(config)
    assert settings["data"]["root"] is None and settings["resume"] is None
    assert (settings["output"], settings["model"]["weights"]) == ("runs", "vit.pth")
    assert (settings["data"]["image_labels"], settings["data"]["train_split"]) == ("x.npy", "train.txt")
    assert settings["evaluate"]["save_labels"] == "out" and settings["data"]["classes"] == ["a/b"]
    expected = {**config.model_dump(mode="json"), "schema": SCHEMA, "resume": None}
    kept = {key: value for key, value in settings.items() if key not in ("data", "model", "evaluate", "output")}
    assert kept == {key: expected[key] for key in kept}
