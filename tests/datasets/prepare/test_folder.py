"""tools/prepare_folder.py: a user's own images, tables and masks."""

import json
import os
import shlex
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from engine.launch import run_script
from datasets import build_train_set, build_val_set
from engine.config import load_config, split_config
from engine.distributed import Ranks
from engine.training.train import train
from tests import tiny
from tools import prepare_folder
from utils.errors import UserError

SIZE = (12, 16)  # height, width
TABLE = "image,classes\na.jpg,nut;bolt\nmore/b.png,bolt\n\nc,nut\nc,hot dog\nd.JPEG,background\n"
LABELS = {"a": ["nut", "bolt"], "b": ["bolt"], "c": ["nut", "hot dog"], "d": []}
CLASSES = ["nut", "bolt", "hot dog"]


def mask_of(stem):
    """Ids 0..3 and 255, by the classes in the order of CLASSES."""
    mask = np.zeros(SIZE, np.uint8)
    for k, name in enumerate(LABELS[stem]):
        mask[2 + 3 * k : 5 + 3 * k, 3:9] = 1 + CLASSES.index(name)
    mask[0, 0] = 255
    return mask


@pytest.fixture
def mine(tmp_path):
    """images/ (with a subfolder), masks/, labels.csv."""
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "more/b.png", "c.jpg", "d.JPEG"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(path)
    (tmp_path / "images/notes.txt").write_text("no image")
    (tmp_path / "masks").mkdir()
    for stem in LABELS:
        Image.fromarray(mask_of(stem)).save(tmp_path / f"masks/{stem}.png")
    (tmp_path / "labels.csv").write_text(TABLE)
    return tmp_path


def arguments(mine, *more, masks=True, labels="labels.csv"):
    given = [mine / "out", "--images", mine / "images", "--labels", mine / labels, "--workers", 1]
    given += ["--masks", mine / "masks"] if masks else []
    return [str(argument) for argument in (*given, *more)]


def with_classes(mine, *more):
    return arguments(mine, "--classes", ",".join(CLASSES), *more)


def printed_config(out, *more):
    """The config of the command that the tool printed, as run_train.sh passes it on."""
    command = shlex.split(out.strip().splitlines()[-1])
    assert command[0] == "bash" and command[1].endswith("run_train.sh") and len(command[2:7]) == 5
    return load_config(*split_config([f"tag={command[6]}", *command[7:], "data.crop_size=8", *more], "more_voc"))


def snapshot(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def ids(path):
    return np.array(Image.open(path))


def test_images_masks_lists_labels(mine, capsys):
    before = snapshot(mine)
    prepare_folder.main(with_classes(mine, "--val-share", 0.5))
    config, out = printed_config(capsys.readouterr().out), mine / "out"
    train, val = build_train_set(config), build_val_set(config)
    assert val.compared() is None and sorted(train.names + val.names) == sorted(LABELS) and len(val) == 2
    assert list(train.classes) == CLASSES
    labels = {sample.name: train.labels_of(sample) for sample in train.samples}
    labels |= {item.name: item.labels for item in (val[i] for i in range(2))}
    for stem, names in LABELS.items():
        assert labels[stem].tolist() == [float(name in names) for name in CLASSES]
        assert np.array_equal(ids(out / f"SegmentationClassAug/{stem}.png"), mask_of(stem))
    assert (out / "JPEGImages/b.png").read_bytes() == (mine / "images/more/b.png").read_bytes()
    assert {path.name for path in (out / "JPEGImages").iterdir()} == {"a.jpg", "b.png", "c.jpg", "d.jpg"}
    assert (out / "classes.txt").read_text().splitlines() == CLASSES
    assert {name: data for name, data in snapshot(mine).items() if not name.startswith("out/")} == before


def test_without_masks_it_trains_without_validation(mine, capsys):
    (mine / "labels.json").write_text(json.dumps(LABELS))
    prepare_folder.main(arguments(mine, "--link", masks=False, labels="labels.json"))
    config = printed_config(capsys.readouterr().out)
    train = build_train_set(config)
    assert train.names == ["a", "b", "c", "d"] and list(train.classes) == sorted(CLASSES)
    assert config.data.val_split is None and not (mine / "out/SegmentationClassAug").exists()
    assert train[1, 0].image.shape == (3, 8, 8) and (mine / "out/JPEGImages/b.png").is_symlink()
    with pytest.raises(UserError, match="data.val_split is null"):
        build_val_set(config)


def test_the_printed_command_trains_without_masks(mine, capsys):
    prepare_folder.main(arguments(mine, masks=False))
    more = [f"output={mine}", *tiny.SETTINGS, "train.iterations=1", "train.warmup_iterations=1"]
    run = train(printed_config(capsys.readouterr().out, *more), Ranks(0, 1, torch.device("cpu")))
    log, metrics = (run / "train.log").read_text(), (run / "metrics.jsonl").read_text()
    assert "4 training images (train), no validation, 3 classes" in log
    assert "train/total" in metrics and "val/" not in metrics
    assert {path.name.split(".")[0] for path in (run / "checkpoints").iterdir()} == {"iter_000001"}


def test_one_row_a_class_and_many_columns_say_the_same(mine, capsys):
    prepare_folder.main(with_classes(mine))
    first = (mine / "out/labels.json").read_bytes()
    tables = ("image,class\na,nut\na,bolt\nb,bolt\nc,nut\nc,hot dog\nd,background\n",
              "a.jpg, nut, bolt\nb.png, bolt\nc.jpg, nut, \"hot dog\"\nd.JPEG, background\n",
              "\ufeffIMAGE,classes\r\na,nut; bolt\r\nb,bolt\r\nc,nut;hot dog;nut\r\nd,background\r\n",
              "a.jpg\tnut;bolt\rb.png\tbolt\r\rc.jpg\tnut\t\"hot dog\"\rd.JPEG\t__Background__\t\r",
              "filename;nut;bolt;hot dog;bg\na;1;1;0;0\nb;0;1.0;0;0\nc;True;false;1;0\nd;0;0;0;1\n")
    for number, table in enumerate(tables):
        (mine / "labels.csv").write_bytes(table.encode("utf-16" if number == 3 else "utf-8"))
        given = with_classes(mine)
        prepare_folder.main([str(mine / f"out{number}"), *given[1:]])
        assert (mine / f"out{number}/labels.json").read_bytes() == first
    capsys.readouterr()


def test_columns_of_0_and_1_are_the_classes_in_their_order(mine):
    (mine / "labels.csv").write_text("image,nut,bolt,cog\n" + "".join(f"{stem},0,1,0\n" for stem in LABELS))
    given = with_classes(mine)
    prepare_folder.main([str(mine / "out"), *given[1:given.index("--masks")]])
    assert (mine / "out/classes.txt").read_text().split() == ["nut", "bolt", "cog"]


@pytest.mark.parametrize("form", ["text", "json", "16 bit"])
def test_ids_of_other_numbers(form, mine, capsys):
    meant = {0: "background", 7: "hot dog", 38: "nut", 200: "bolt", 3: "bolt", 99: "ignore"}
    dtype = np.uint8
    if form == "16 bit":
        meant, dtype = {1000 + number: name for number, name in meant.items()}, np.uint16
    of_class = {name: number for number, name in meant.items()}
    number_of = {k: of_class[name] for k, name in enumerate(["background", *CLASSES])} | {255: of_class["ignore"]}
    for stem in LABELS:
        mask = np.vectorize(number_of.get)(mask_of(stem)).astype(dtype)
        Image.fromarray(mask).save(mine / f"masks/{stem}.png")
    text = ",".join(f"{number}={name}" for number, name in meant.items())
    if form == "json":
        (mine / "ids.json").write_text(json.dumps(meant))
        text = str(mine / "ids.json")
    prepare_folder.main(with_classes(mine, "--ids", text))
    for stem in LABELS:
        assert np.array_equal(ids(mine / f"out/SegmentationClassAug/{stem}.png"), mask_of(stem))


def test_given_lists(mine, capsys):
    (mine / "train.txt").write_text("c\nmore/b.png\n")
    (mine / "val.txt").write_text("a.jpg\n")
    given = with_classes(mine, "--train-list", mine / "train.txt", "--val-list", mine / "val.txt")
    prepare_folder.main(given)
    config = printed_config(capsys.readouterr().out)
    assert build_train_set(config).names == ["c", "b"] and build_val_set(config).names == ["a"]


def test_a_second_call_and_the_choice_of_val(mine, capsys):
    prepare_folder.main(with_classes(mine, "--val-share", 0.5))
    before = snapshot(mine / "out")
    prepare_folder.main(with_classes(mine, "--val-share", 0.5))
    assert "everything is there already" in capsys.readouterr().out and snapshot(mine / "out") == before
    (mine / "masks/extra.png").write_bytes(b"")
    with pytest.raises(UserError, match="prepared with other sources"):
        prepare_folder.main(with_classes(mine, "--val-share", 0.5))
    prepare_folder.main([str(mine / "out"), "--verify", "--workers", "1"])


def test_what_gave_up_gives_way_to_other_settings(mine, capsys):
    """A first call with the wrong ids fails halfway; the right one need not be in another folder."""
    Image.fromarray(np.full(SIZE, 9, np.uint8)).save(mine / "masks/c.png")
    with pytest.raises(UserError, match=r"c\.png: mask holds id 9"):
        prepare_folder.main(with_classes(mine))
    assert list((mine / "out/JPEGImages").iterdir()), "it was halfway"
    prepare_folder.main(arguments(mine, "--ids", "0=background,1=nut,2=bolt,3=hot dog,9=ignore,255=ignore"))
    assert (ids(mine / "out/SegmentationClassAug/c.png") == 255).all()
    assert "note: 1 of 4 masks hold other classes than the labels: c\n" in capsys.readouterr().out
    prepare_folder.main([str(mine / "out"), "--verify", "--workers", "1"])
    with pytest.raises(UserError, match="prepared with other settings ids, {.* instead of null; name another"):
        prepare_folder.main(with_classes(mine))


def write(name, text):
    return lambda mine: (mine / name).write_text(text)


def spaced(mine):
    (mine / "images/a.jpg").rename(mine / "images/a 1.jpg")


def twice(mine):
    Image.new("RGB", (4, 4)).save(mine / "images/more/a.png")


def small_mask(mine):
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(mine / "masks/a.png")


def large_id(mine):
    Image.fromarray(np.full(SIZE, 9, np.uint8)).save(mine / "masks/c.png")


def black_and_white(mine):
    for stem in LABELS:
        Image.fromarray(np.where(mask_of(stem) % 255, 255, 0).astype(np.uint8)).save(mine / f"masks/{stem}.png")


@pytest.mark.parametrize(("edit", "more", "words"), [
    (write("labels.csv", TABLE + "e.jpg,nut\n"), (), ("labels.csv, line 8", "'e.jpg'")),
    (write("labels.csv", TABLE + "a.jpg,nutt\n"), (), ("labels.csv, line 8", "'nutt'", "'nut'")),
    (write("labels.csv", TABLE.replace("more/b.png,bolt", "more/b.png,")), (), ("labels.csv, line 3", "no class")),
    (write("labels.csv", TABLE.replace("a.jpg", "")), (), ("labels.csv, line 2", "first column")),
    (write("labels.csv", TABLE.replace("d.JPEG,background\n", "")), (), ("labels.csv", "no classes of 1", "d.JPEG")),
    (write("labels.csv", "image,nut,bolt\na,1,2\n"), (), ("labels.csv, line 2", "'2' in the column bolt")),
    (write("labels.csv", "image,nut,bolt\na,1\n"), (), ("labels.csv, line 2", "1 values, but 2 classes")),
    (write("labels.csv", "a,1,0\nb,0,1\n"), (), ("labels.csv: values such as 0 and 1 need a first row",)),
    (write("labels.csv", "image,label\na,1\n"), (), ("labels.csv: values such as 0 and 1 need a first row",)),
    (write("labels.csv", "image,nut,nut\na,1,0\n"), (), ("labels.csv: values", "all different")),
    (write("labels.csv", "image,class,split\na,nut,train\n"), (), ("line 1: column 'split'", "leave out other")),
    (write("labels.csv", "image,class\na,nan\n"), (), ("labels.csv, line 2: 'nan' is no class",)),
    (lambda mine: [p.rename(p.with_stem("m" + p.stem)) for p in mine.glob("masks/*")], (), ("masks: no mask has",)),
    (write("labels.csv", "a,1\n"), (), ("labels.csv, line 1: '1' is no class",)),
    (write("labels.csv", 'image,classes\na,"nut,bolt"\n'), (), ("labels.csv, line 2: 'nut,bolt' is no class",)),
    (write("labels.csv", 'image,classes\na,"nut"x\n'), (), ("labels.csv, line 2: cannot be read",)),
    (lambda mine: (mine / "labels.csv").write_bytes(b"a,Stra\xdfe"), (), ("labels.csv", "save it as UTF-8")),
    (lambda mine: (mine / "images/e.jpg").symlink_to("gone"), (), ("e.jpg: is a link to nothing",)),
    (lambda mine: (mine / "images/a.jpg.png").symlink_to("a.jpg"), (), ("both known as 'a.jpg'",)),
    (spaced, (), ("a 1.jpg", "white space")),
    (twice, (), ("images/a.jpg", "more/a.png", "same name")),
    (small_mask, (), ("masks/a.png is 4x3", "a.jpg is 16x12")),
    (large_id, (), ("masks/c.png", "id 9", "3 classes")),
    (large_id, ("--ids", "0=background,255=ignore,1=nut,2=bolt,3=hot dog"), ("masks/c.png", "id 9", "--ids")),
    (write("masks/a.png", "broken"), (), ("masks/a.png", "cannot be read")),
    (write("images/c.jpg", "broken"), (), ("images/c.jpg", "cannot be read")),
    (black_and_white, (), ("masks/a.png: ids [0, 255], labels ['nut', 'bolt']; so 3 of 3 masks",)),
    (lambda mine: os.truncate(mine / "images/c.jpg", 600), (), ("images/c.jpg", "truncated")),
    (write("val.txt", "a\nx\n"), ("--train-list", "val.txt", "--val-list", "val.txt"), ("val.txt", "images: x")),
    (write("val.txt", "a\n"), ("--train-list", "val.txt", "--val-list", "val.txt"), ("val.txt", "training list: a")),
    (write("val.txt", "a\n"), ("--val-list", "val.txt"), ("--train-list",)),
    (write("val.txt", "c\nc.jpg"), ("--train-list", "val.txt", "--val-list", "val.txt"), ("'c' twice, c and c.jpg",)),
    (write("val.txt", ""), ("--ids", "1=nut,1=bolt"), ("--ids", "twice")),
    (write("val.txt", ""), ("--ids", "one=nut"), ("--ids", "ID=CLASS")),
    (write("val.txt", ""), ("--ids", "1=screw"), ("--ids", "screw")),
    (write("val.txt", ""), ("--classes", "nut,nut"), ("--classes",)),
    (write("val.txt", ""), ("--classes", "nut,BG"), ("--classes", "'BG' is no class")),
])
def test_mistakes_are_named(edit, more, words, mine):
    edit(mine)
    given = [str(mine / word) if word.endswith(".txt") else word for word in more]
    with pytest.raises(UserError) as error:
        prepare_folder.main(with_classes(mine, *given))
    for word in words:
        assert word in str(error.value)


def test_masks_need_the_order_of_the_classes(mine):
    with pytest.raises(UserError, match="--masks needs --classes"):
        prepare_folder.main(arguments(mine))


def test_a_mistake_is_one_line(mine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare_folder.py", *arguments(mine, "--classes", "nut")])
    with pytest.raises(SystemExit) as left:
        run_script(prepare_folder.main)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {mine}/labels.csv, line 2: unknown class 'bolt'")
