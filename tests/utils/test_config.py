"""utils/config.py: the layers of a config, and what it refuses."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from utils import config as module
from utils.config import CONFIGS, OPTIONAL, load_config, save_config, save_provenance
from utils.errors import UserError


@pytest.fixture
def run_yaml(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_layers_go_on_top_of_each_other(run_yaml):
    path = run_yaml("train: {lr: 1, batch_size: 8}\nloss:\n  weights: {seg: 0.5}\n")
    config = load_config(path, ["train.batch_size=2", "train.batch_size=3"])
    assert config.train.lr == 1.0 and isinstance(config.train.lr, float)
    assert config.train.batch_size == 3
    assert config.loss.weights.seg == 0.5 and config.loss.weights.cls == 1.0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_of_the_project_loads(path):
    assert load_config(path.stem) == load_config(path)


def test_config_of_a_run_loads_again(tmp_path):
    config = load_config("more_coco", ["tag=x", "model.backbone_args={depth: 2}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_coco_differs_from_voc_where_the_reference_does():
    voc, coco = load_config("more_voc"), load_config("more_coco")
    assert voc == load_config()
    assert coco.pseudo_labels.uncertain.aux == [coco.pseudo_labels.high, coco.pseudo_labels.low]
    assert coco.crf.iterations == voc.crf.iterations == 10


def test_values_from_the_command_line():
    overrides = [
        "tag=007",
        "data.root=/a folder/with: colon=and equals",
        "data.classes=[cat, dog]",
        "evaluate.base_size=null",
        "evaluate.images=5",
        "train.betas=[0, 0.9]",
        "loss.energy_weight=1e-6",
        "model.backbone_args.depth=6",
        "evaluate.crf=true",
        "resume=auto",
    ]
    config = load_config(None, overrides)
    assert config.tag == "007"
    assert config.data.root == "/a folder/with: colon=and equals"
    assert config.data.classes == ["cat", "dog"]
    assert config.evaluate.base_size is None and config.evaluate.images == 5
    assert config.train.betas == [0.0, 0.9] and isinstance(config.train.betas[0], float)
    assert config.loss.energy_weight == 1e-6
    assert config.model.backbone_args == {"depth": 6}
    assert config.evaluate.crf is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=3", ["unknown key 'train.batchsize'", "command line", "'train.batch_size'"]),
        ("batch_size=3", ["'train.batch_size'"]),
        ("batchsize=3", ["'train.batch_size'"]),
        ("model.batch_size=3", ["'train.batch_size'"]),
        ("loss.weights.segm=1", ["'loss.weights.seg'"]),
        ("data.rot=/x", ["'data.root'"]),
        ("train.batch_size=four", ["train.batch_size = 'four'", "an integer"]),
        ("train.batch_size=1.5", ["train.batch_size = 1.5", "an integer"]),
        ("train.batch_size=true", ["train.batch_size = True", "an integer"]),
        ("train.batch_size=null", ["train.batch_size = None", "an integer"]),
        ("train.lr=fast", ["train.lr = 'fast'", "a number"]),
        ("train.lr=.nan", ["train.lr", "a number"]),
        ("evaluate.crf=1", ["evaluate.crf = 1", "true or false"]),
        ("evaluate.images=all", ["evaluate.images = 'all'", "an integer or null"]),
        ("train=3", ["train = 3", "mapping"]),
        ("model.backbone_args=6", ["model.backbone_args = 6", "mapping"]),
        ("train.betas=0.9", ["train.betas = 0.9", "a list"]),
        ("train.betas=[0.9, x]", ["train.betas", "each element a number"]),
        ("data.classes=[1]", ["data.classes = [1]", "each element a text"]),
        ("method=moer", ["method = 'moer'", "more"]),
        ("data.name=vco", ["data.name", "voc or coco or shapes"]),
        ("data.augmentation=none", ["data.augmentation", "voc or coco"]),
        ("train.precision=fp16", ["train.precision", "fp32 or bf16"]),
        ("resume=yes", ["resume = 'yes'", "auto or null"]),
        ("evaluate.image_labels=gt", ["evaluate.image_labels", "given or predicted"]),
        ("evaluate.predict_from=cam", ["evaluate.predict_from", "classifier or segmentation"]),
        ("train.batch_size=0", ["train.batch_size = 0", "at least 1"]),
        ("train.iterations=0", ["train.iterations = 0", "at least 1"]),
        ("model.token_ratio=2", ["model.token_ratio = 2.0", "0 to 1"]),
        ("evaluate.cam_scales=[]", ["evaluate.cam_scales = []", "above 0"]),
        ("loss.certain_temperature=0", ["loss.certain_temperature", "above 0"]),
        ("train.betas=[0.9]", ["train.betas", "two numbers"]),
        ("pseudo_labels.certain.aux=[0.2, 0.5]", ["pseudo_labels.certain.aux", "high >= low"]),
        ("pseudo_labels.high=0.1", ["pseudo_labels.high", "pseudo_labels.low = 0.25"]),
        ("data.resize_range=[1, 0.3]", ["data.resize_range", "smallest"]),
        ("foo", ["'foo'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
        ("tag=", ["tag=", "no value"]),
        ("data.classes=[a", ["data.classes=[a", "cannot be read"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(override, words):
    with pytest.raises(UserError) as caught:
        load_config("more_voc", [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in [*words, "command line"]:
        assert word in message


def test_a_mistake_in_a_file_names_the_file(run_yaml):
    path = run_yaml("train: {iteration: 5}")
    with pytest.raises(UserError, match=rf"'train\.iteration' in {path}: did you mean 'train\.iterations'"):
        load_config(path)
    path = run_yaml("train: {iterations: [5]}")
    with pytest.raises(UserError, match=rf"train\.iterations = \[5\] in {path}: expected an integer"):
        load_config(path)


@pytest.mark.parametrize("text", ["train: {lr: 1", "a: 1\na: 2\n", "- 1\n- 2\n", "\x00"])
def test_a_file_that_is_no_config(run_yaml, text):
    path = run_yaml(text)
    with pytest.raises(UserError, match=str(path)) as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_unknown_config():
    with pytest.raises(UserError, match="did you mean 'more_voc'"):
        load_config("mor_voc")
    with pytest.raises(UserError, match=r"nowhere/x\.yaml does not exist"):
        load_config("nowhere/x.yaml")


def test_tables_and_defaults_agree():
    default = OmegaConf.to_container(OmegaConf.load(CONFIGS / "default.yaml"))
    leaves = dict(module.leaves(default))
    assert {key for key, value in leaves.items() if value is None} <= set(OPTIONAL)
    tables = {*OPTIONAL, *module.CHOICES, *module.RANGES, *module.POSITIVE, *module.PAIRS}
    assert tables <= set(leaves)


def test_provenance(tmp_path):
    config = load_config("more_voc", ["tag=x"])
    for _ in range(2):
        save_provenance(config, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    starts = [json.loads(line) for line in (tmp_path / "run" / "provenance.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0]["versions"]["torch"] and starts[0]["command"]
    assert starts[0]["commit"] is None or len(starts[0]["commit"]) == 40
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.yaml", "provenance.jsonl"]


def test_no_commit_outside_of_git(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOT", tmp_path)
    assert module._git_commit() == {"commit": None, "changed": None}
