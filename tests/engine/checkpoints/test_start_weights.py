"""Start weights by what model.weights says, downloaded from a local server where a name says so."""

import hashlib
import io
import json
import multiprocessing

import huggingface_hub.constants
import pytest
import timm
import torch

from engine.checkpoints.start_weights import load_start_weights, start_weights
from engine.config import load_config
from engine.distributed import Ranks
from engine.training.train import train
from model import build_method
from model.method import ModelSection
from tests import tiny
from tests.faulty_server import Answer, FaultyServer
from utils import download
from utils.errors import UserError
from utils.log import close_logger

ARGS = {"embed_dim": 32, "depth": 3, "num_heads": 2, "img_size": 64, "patch_size": 8}   # as in tiny.SETTINGS
MODEL = ModelSection(backbone="vit_tiny_patch16_224", backbone_args=ARGS)


@pytest.fixture(scope="module")
def tensors():
    torch.manual_seed(0)
    return timm.create_model(MODEL.backbone, num_classes=5, **ARGS).state_dict()


@pytest.fixture
def server(monkeypatch, tmp_path, tensors):
    """A server that gives the tensors, wrapped as DeiT's; registry rows `tiny_imagenet` of them and `pictures`."""
    for name in ("WSSS_MIRROR", "WSSS_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WSSS_DOWNLOADS", str(tmp_path / "downloads"))
    server, buffer = FaultyServer(), io.BytesIO()
    torch.save({"model": tensors}, buffer)
    server.answers = [Answer(buffer.getvalue(), pause=0.05)]
    row = {"kind": "start_weights", "url": f"{server.url}/tiny.pth", "page": "http://page", "file": "tiny.pth",
           "size": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest(), "licence": None,
           "what": "a tiny ViT"}
    rows = {"tiny_imagenet": row, "pictures": {**row, "kind": "data", "file": "pictures.zip"}}
    (tmp_path / "rows.yaml").write_text(json.dumps(rows))
    monkeypatch.setattr(download, "REGISTRY", tmp_path / "rows.yaml")
    yield server
    server.close()


def assert_equal(ours, tensors):
    assert ours.keys() == tensors.keys()
    assert all(torch.equal(ours[name], tensors[name]) for name in tensors)


def test_a_random_start():
    assert start_weights("random", MODEL) is None


@pytest.mark.parametrize("wrapping", [None, "model", "state_dict"])
def test_a_file(tmp_path, tensors, wrapping, monkeypatch):
    torch.save({wrapping: tensors, "epoch": 3} if wrapping else tensors, tmp_path / "start.pth")
    assert_equal(start_weights(str(tmp_path / "start.pth"), MODEL), tensors)
    monkeypatch.chdir(tmp_path)
    assert_equal(start_weights("start.pth", MODEL), tensors)


def test_a_file_of_the_project_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "cls_token" in start_weights("weights/vit_shapes.safetensors", MODEL)


def test_a_name_is_fetched_once(server, tensors):
    for _ in range(2):
        assert_equal(start_weights("tiny_imagenet", MODEL), tensors)
    assert len(server.requests) == 1


@pytest.mark.parametrize("spec, words", [
    (None, "model.weights is not set: .*download.py list.*model.weights=timm.*model.weights=random"),
    ("nowhere.pth", "model.weights=nowhere.pth: nowhere.pth: no such weights file"),
    ("no/where", "model.weights=no/where: no/where: no such weights file"),
    ("tiny.pth", "model.weights=tiny.pth: no such weights file; model.weights=tiny_imagenet fetches it"),
    ("tiny_imagnet", "model.weights=tiny_imagnet: 'tiny_imagnet' is not in rows.yaml; did you mean 'tiny_imagenet'"),
    ("pictures", "model.weights=pictures: names a data of .*registry.yaml, no start weights"),
])
def test_what_names_no_weights(server, spec, words):
    with pytest.raises(UserError, match=words):
        start_weights(spec, MODEL)
    assert server.requests == []


def test_offline_says_which_file_to_put_where(server, monkeypatch, tmp_path):
    monkeypatch.setenv("WSSS_OFFLINE", "1")
    with pytest.raises(UserError, match=rf"model.weights=tiny_imagenet: .* put tiny.pth .*{server.url}/tiny.pth"):
        start_weights("tiny_imagenet", MODEL)


def test_timm_gives_its_own(tmp_path, tensors):
    torch.save(tensors, tmp_path / "pretrained.pth")
    args = {**ARGS, "pretrained_cfg_overlay": {"file": str(tmp_path / "pretrained.pth"), "custom_load": False}}
    ours = start_weights("timm", ModelSection(backbone=MODEL.backbone, backbone_args=args))
    assert_equal(ours, {name: value for name, value in tensors.items() if not name.startswith("head.")})


@pytest.mark.parametrize("backbone", ["vit_base_patch16_224", "vit_large_patch14_224", "no_such_vit"])
def test_timm_has_none(backbone, monkeypatch, tmp_path):
    """Unreachable, never released, unknown."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError) as caught:
        start_weights("timm", ModelSection(backbone=backbone, backbone_args={"depth": 1}))
    assert str(caught.value).startswith(f"model.weights=timm: timm gives no weights for model.backbone={backbone}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 450


def run(root, output, *overrides):
    short = ["train.iterations=1", "train.batch_size=1", "train.validate_images=1", "pseudo_labels.cam_scales=[1.0]"]
    overrides = [f"data.root={root}", f"output={output}", *tiny.SETTINGS, *short, "tag=run", *overrides]
    try:
        train(load_config("more_voc", overrides), Ranks(0, 1, torch.device("cpu")))
    finally:
        close_logger()


def test_training_fetches_only_when_it_starts(server, tiny_voc, tmp_path, monkeypatch):
    weights = "model.weights=tiny_imagenet"
    run(tiny_voc, tmp_path / "runs", weights)
    assert len(server.requests) == 1
    (tmp_path / "downloads" / "tiny.pth").unlink()
    run(tiny_voc, tmp_path / "runs", weights, "resume=auto")
    assert len(server.requests) == 1, "a resumed run has its own weights"


def test_weights_that_do_not_fit_the_backbone(server, tiny_voc, tmp_path):
    other = "model.backbone_args={embed_dim: 16, depth: 3, num_heads: 2, img_size: 64, patch_size: 8}"
    with pytest.raises(UserError) as caught:
        run(tiny_voc, tmp_path / "runs", "model.weights=tiny_imagenet", other)
    for word in ("model.weights=tiny_imagenet", "do not fit model.backbone=vit_tiny_patch16_224", "shape"):
        assert word in str(caught.value)


def test_a_trained_method_is_no_start(tmp_path):
    weights = tiny.save_checkpoint(tmp_path / "w.safetensors")
    config = load_config("more_voc", [*tiny.SETTINGS, f"model.weights={weights}"])
    with pytest.raises(UserError, match=rf"^model\.weights={weights}: a trained method.*resume=auto"):
        load_start_weights(build_method(config, 20), config.model)


def test_the_default_is_of_the_registry():
    default = download.registry()[load_config("more_voc").model.weights]
    assert default.kind == "start_weights" and default.file == "jx_vit_base_p16_224-80ecf9dd.pth"
    assert load_config("more_coco").model.weights == default.name
    assert load_config("more_voc_animals").model.weights is None


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    there = []

    def obtain(*arguments, real=download.obtain):
        there.append((folder / "downloads" / "tiny.pth").exists())
        return real(*arguments)

    download.obtain = obtain
    assert "cls_token" in start_weights("tiny_imagenet", MODEL)
    assert there == [rank == 1]


def test_rank_0_downloads_and_the_others_wait(server, tmp_path):
    context = multiprocessing.get_context("fork")   # with the fixture's registry
    processes = [context.Process(target=_rank, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(server.requests) == 1
