"""The layers of a config, what it refuses, and settings of earlier versions."""

import json
import pickle
from pathlib import Path

import pytest

from engine import provenance
from engine.config import CONFIGS, SCHEMA, layers_of, load_config, load_settings, portable, save_config
from engine.provenance import save_provenance
from model import METHODS
from utils.config import read_yaml
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


@pytest.mark.parametrize("name", ["more_coco", "deeplab_voc"])
def test_config_of_a_run_loads_again(tmp_path, name):
    config = load_config(name, ["tag=x", "model.backbone_args={depth: 2}"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert int(read_yaml(tmp_path / "config.yaml")["schema"]) == SCHEMA


def test_a_number_out_of_a_few():
    assert load_config("deeplab_voc", ["model.output_stride=16"]).model.output_stride == 16
    with pytest.raises(UserError, match="model.output_stride = 4 on the command line: expected 8 or 16"):
        load_config("deeplab_voc", ["model.output_stride=4"])


def test_coco_differs_from_voc_where_the_reference_does():
    voc, coco = load_config("more_voc"), load_config("more_coco")
    assert voc == load_config()
    assert coco.pseudo_labels.uncertain.aux == (coco.pseudo_labels.high, coco.pseudo_labels.low)
    assert coco.crf.iterations == voc.crf.iterations == 10


def test_values_from_the_command_line():
    overrides = [
        "tag=007",
        "data.root=/a folder/with: colon=and equals #and more",
        "data.train_split=[odd]",
        "data.classes=[cat, 007, no, 1e3, t:shirt]",
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
    assert config.data.root == "/a folder/with: colon=and equals #and more" and config.data.train_split == "[odd]"
    assert config.data.classes == ("cat", "007", "no", "1e3", "t:shirt")
    assert config.evaluate.base_size is None and config.evaluate.images == 5
    assert config.train.betas == (0.0, 0.9) and isinstance(config.train.betas[0], float)
    assert config.loss.energy_weight == 1e-6
    assert config.model.backbone_args == {"depth": 6}
    assert config.evaluate.crf is True


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batchsize=3", ["unknown key 'train.batchsize'", "'train.batch_size'"]),
        ("batch_size=3", ["'train.batch_size'"]),
        ("batchsize=3", ["'train.batch_size'"]),
        ("model.batch_size=3", ["'train.batch_size'"]),
        ("loss.weights.segm=1", ["'loss.weights.seg'"]),
        ("data.rot=/x", ["'data.root'"]),
        ("evaluate.cam_scales=[1]", ["unknown key 'evaluate.cam_scales'", "its name is evaluate.scales.cam now"]),
        ("train.batch_size=four", ["train.batch_size = four", "an integer, at least 1"]),
        ("train.batch_size=1.5", ["train.batch_size = 1.5", "an integer"]),
        ("train.batch_size=true", ["train.batch_size = true", "an integer"]),
        ("train.batch_size=null", ["train.batch_size = null", "an integer"]),
        ("train.lr=fast", ["train.lr = fast", "a number"]),
        ("train.lr=.nan", ["train.lr", "a number"]),
        ("evaluate.crf=1", ["evaluate.crf = 1", "true or false"]),
        ("evaluate.images=all", ["evaluate.images = all", "an integer, at least 1 or null"]),
        ("train=3", ["train = 3", "mapping"]),
        ("model.backbone_args=6", ["model.backbone_args = 6", "mapping"]),
        ("train.betas=0.9", ["train.betas = 0.9", "a list"]),
        ("train.betas=[0.9, x]", ["train.betas = [0.9, x]", "each a number"]),
        ("data.classes=[[a]]", ["data.classes = [[a]]", "each element a text"]),
        ("data.classes=[]", ["data.classes = []", "one or more names"]),
        ("data.classes=[Background, nut]", ["data.classes", "without background"]),
        ("data.classes=[hot dog, HotDog]", ["data.classes", "that differ"]),
        ("method=moer", ["method = moer", "expected 'more'"]),
        ("data.name=vco", ["data.name", "voc or coco or shapes"]),
        ("data.augmentation=none", ["data.augmentation", "resized_crop or scale_and_pad"]),
        ("train.precision=fp16", ["train.precision", "fp32 or bf16"]),
        ("train.optimizer=adam", ["train.optimizer", "adamw or sgd"]),
        ("resume=yes", ["resume = yes", "auto or null"]),
        ("evaluate.image_labels=gt", ["evaluate.image_labels", "given or predicted"]),
        ("evaluate.predict_from=cam", ["evaluate.predict_from = cam", "classifier or seg"]),
        ("evaluate.maps=[cam, mask]", ["evaluate.maps = [cam, mask]", "one or more of cam, lam"]),
        ("evaluate.maps=[]", ["evaluate.maps = []", "one or more of"]),
        ("evaluate.scales.cma=[1]", ["evaluate.scales.cma = [1]", "a kind of map out of cam, lam"]),
        ("train.batch_size=0", ["train.batch_size = 0", "at least 1"]),
        ("train.iterations=0", ["train.iterations = 0", "at least 1"]),
        ("train.iterations=null", ["train.iterations = null", "exactly one of train.iterations and train.epochs"]),
        ("model.token_ratio=2", ["model.token_ratio = 2", "0 to 1"]),
        ("evaluate.scales.cam=[]", ["evaluate.scales.cam = []", "above 0"]),
        ("evaluate.scales.seg=[1, 0]", ["evaluate.scales.seg = [1, 0]", "above 0"]),
        ("loss.certain_temperature=0", ["loss.certain_temperature", "above 0"]),
        ("train.betas=[0.9]", ["train.betas", "a list of 2"]),
        ("pseudo_labels.certain.aux=[0.2, 0.5]", ["pseudo_labels.certain.aux", "high >= low"]),
        ("pseudo_labels.high=0.1", ["pseudo_labels.high", "pseudo_labels.low = 0.25"]),
        ("data.resize_range=[1, 0.3]", ["data.resize_range", "smallest"]),
        ("tag=a=b", ["tag = a=b", "was TAG left out"]),
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


def test_every_default_fits_and_has_a_source():
    for name, value, source in layers_of(None).described(load_config()):
        assert (source.startswith("default (") and len(source) > len("default ()")) or "default of more" in source, name
        assert value is not None or "null" in source or name in ("tag", "resume", "data.root", "train.epochs"), name


def test_a_config_is_not_changed():
    config = load_config("more_shapes")
    for change in (
        lambda: setattr(config, "seed", 1), lambda: setattr(config.train, "lr", 1.0),
        lambda: config.model.backbone_args.update(depth=1), lambda: config.evaluate.scales.__setitem__("cam", (1.0,)),
    ):
        with pytest.raises((TypeError, ValueError)):
            change()


def test_base_builds_on_another(run_yaml, tmp_path):
    (tmp_path / "mine.yaml").write_text("base: more_shapes\nmodel: {backbone_args: {depth: 4}}\ntrain: {lr: 1}\n")
    path = run_yaml("base: mine\ntrain: {epochs: 3}\n")
    config, shapes = load_config(path), load_config("more_shapes")
    assert config.model.backbone_args == {**shapes.model.backbone_args, "depth": 4}
    assert (config.train.lr, config.train.epochs, config.train.iterations) == (1.0, 3, None)
    assert config.data == shapes.data
    sources = {name: source for name, _, source in layers_of(path, ["seed=3"]).described(config)}
    assert sources["train.epochs"] == f"in {path}" and sources["train.lr"] == f"in {tmp_path / 'mine.yaml'}"
    assert sources["data.crop_size"].endswith("configs/more_shapes.yaml") and sources["seed"] == "on the command line"
    (tmp_path / "mine.yaml").write_text("base: run\n")
    with pytest.raises(UserError, match="builds on"):
        load_config(path)


def test_another_backbone_has_its_own_arguments():
    args = load_config("more_shapes").model.backbone_args
    assert load_config("more_shapes", ["model.backbone_args.depth=4"]).model.backbone_args == {**args, "depth": 4}
    assert load_config("more_shapes", ["model.backbone=vit_small_patch16_224"]).model.backbone_args == {}
    both = ["model.backbone_args={depth: 4}", "model.backbone=vit_small_patch16_224"]
    for items in (both, both[::-1]):
        assert load_config("more_shapes", items).model.backbone_args == {"depth": 4}
    same = ["model.backbone=vit_tiny_patch16_224"]
    assert load_config("more_shapes", same).model.backbone_args == args


def test_iterations_or_epochs():
    assert load_config(None, ["train.epochs=2"]).train.iterations is None
    for items in (["train.epochs=2", "train.iterations=5"], ["train.iterations=null"]):
        with pytest.raises(UserError, match="exactly one"):
            load_config(None, items)


LONG = {"base_size": None, "long_side": 512}


@pytest.mark.parametrize("defaults, given, sizes", [
    ({}, "", (448, None)), ({}, "long_side: 512", (None, 512)), ({}, "long_side: null", (448, None)),
    (LONG, "", (None, 512)), (LONG, "base_size: 448", (448, None)), (LONG, "long_side: null", (None, None)),
    ({}, "base_size: 448, long_side: 512", None), (LONG, "base_size: 448, long_side: 512", None),
])
def test_a_square_or_a_long_side(monkeypatch, run_yaml, defaults, given, sizes):
    monkeypatch.setattr(METHODS["more"], "defaults", {"evaluate": defaults})
    items = [f"evaluate.{item.replace(': ', '=')}" for item in given.split(", ") if item]
    for source in ((None, items), (run_yaml(f"evaluate: {{{given}}}"), ())):
        if sizes is None:
            with pytest.raises(UserError, match="long_side = 512 .*: expected at most one of evaluate.base_size and"):
                load_config(*source)
        else:
            config = load_config(*source)
            assert (config.evaluate.base_size, config.evaluate.long_side) == sizes
            assert load_settings(portable(config), "a file").evaluate == config.evaluate


def test_texts_of_a_file_stay_as_written(run_yaml):
    path = run_yaml("tag: 007\ndata: {classes: [no, 1e3, on], val_split: null, root: ~}\nmodel: {weights: 12}\n")
    config = load_config(path)
    assert (config.tag, config.data.classes, config.model.weights) == ("007", ("no", "1e3", "on"), "12")
    assert config.data.val_split is None and config.data.root is None


OLD = {   # what the version before schema numbers wrote
    "method": "more", "data": {"augmentation": "coco"}, "model": {"backbone_args": {"depth": 2}},
    "evaluate": {"cam_scales": [1.0], "lam_scales": [1.0, 0.5], "seg_scales": [2.0], "predict_from": "segmentation"},
}


def test_settings_of_an_earlier_version_open():
    config = load_settings(OLD, "a.safetensors", ["evaluate.scales.cam=[3]"])
    assert config.evaluate.scales == {"cam": (3.0,), "lam": (1.0, 0.5), "seg": (2.0,)}
    assert (config.data.augmentation, config.evaluate.predict_from) == ("scale_and_pad", "seg")
    assert config.model.backbone_args == {"depth": 2}


def test_settings_of_another_version_say_so():
    with pytest.raises(UserError, match=r"in a\.safetensors is of schema 99, this version knows .*newer version"):
        load_settings({"schema": 99}, "a.safetensors")
    with pytest.raises(UserError, match=r"unknown key 'train\.rate' in a\.safetensors: did you mean"):
        load_settings({"train": {"rate": 1}}, "a.safetensors")


def test_what_is_shared_names_no_folder_of_this_machine():
    items = ["data.root=/home/me/voc", "data.classes=[t:shirt, /x]", "model.weights=~/vit.pth", "tag=/a", "seed=3"]
    config = load_config(None, [*items, "evaluate.save_labels=C:\\me\\out"])
    shared = portable(config)
    assert shared["schema"] == SCHEMA and shared["data"]["root"] is None
    assert shared["data"]["classes"] == ["t:shirt", "/x"] and shared["model"]["weights"] == "vit.pth"
    assert shared["evaluate"]["save_labels"] == "out"
    again = load_settings(shared, "x")
    assert again.seed == 3 and again.data.classes == config.data.classes


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
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance._git_commit() == {"commit": None, "changed": None}


def test_references_are_refused(run_yaml):
    with pytest.raises(UserError, match=r"output = \$\{oc\.env:HOME\}/runs in .*: references such as"):
        load_config(run_yaml("output: ${oc.env:HOME}/runs\n"))


def test_a_base_that_is_no_name(run_yaml):
    with pytest.raises(UserError, match=r"base = \[more_voc\]: expected the name of one config"):
        load_config(run_yaml("base: [more_voc]\n"))


def test_paths_in_free_mappings_are_not_shared():
    config = load_config(None, ["model.backbone_args={overlay: {file: /home/me/secret/x.pth}, depth: 2}"])
    assert portable(config)["model"]["backbone_args"] == {"overlay": {"file": "x.pth"}, "depth": 2}


def test_a_config_can_be_pickled():
    config = load_config("more_shapes", ["seed=3"])
    assert pickle.loads(pickle.dumps(config)) == config
