"""Files from strangers: no code runs, nothing is written outside, and what the fuzzing found wrong stays mended."""

import contextlib
import io
import json
import os
import pickle
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.launch import error_line
from datasets.irn import irn_ids
from datasets.labels import load_labels
from datasets.prepare import coco, voc
from datasets.prepare.mat import read_field
from datasets.prepare.preparation import Preparation
from datasets.prepare.sources import Source
from datasets.samples import Sample
from engine.checkpoints import files
from engine.checkpoints.opening import checkpoint_classes, checkpoint_config
from engine.config import load_config
from engine.distributed import Ranks
from engine.evaluation.results import append_results
from engine.inference.prediction_folder import claim_folder
from report.run import evaluate_command
from tests.datasets.prepare import devkit
from utils.errors import UserError
from utils.images import read_rgb


class Evil:
    """A pickle of it calls the function with the arguments."""

    def __init__(self, *call):
        self.call = call[0], call[1:]

    def __reduce__(self):
        return self.call


def refused(words, read, *arguments):
    """The line of the UserError, which has the words."""
    with pytest.raises(UserError, match=words) as caught:
        read(*arguments)
    return error_line(caught.value)


def irn_file(path, **content):
    np.save(path, np.array(content, object), allow_pickle=True)
    return path


# code

@pytest.mark.parametrize("write", [
    lambda path, evil: torch.save({"x": evil}, path),
    lambda path, evil: torch.save({"x": evil}, path, _use_new_zipfile_serialization=False),
    lambda path, evil: path.write_bytes(pickle.dumps({"x": evil})),
])
def test_weights_and_states_run_no_code(tmp_path, write):
    evil, optimizer = Evil(os.mkdir, str(tmp_path / "ran")), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    write(tmp_path / "w.pth", evil)
    refused(r"w\.pth: .*code", files.read_tensors, tmp_path / "w.pth")
    files.save_state(tmp_path, 3, torch.nn.Linear(1, 1), optimizer, {})
    write(tmp_path / files.STATE.format(3), evil)
    refused("not a readable state", files.newest_state, tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("evil", [
    lambda tmp: Evil(os.mkdir, str(tmp / "ran")), lambda tmp: Evil(eval, f"open({str(tmp / 'ran')!r}, 'w')"),
    lambda tmp: Evil(torch.load, str(tmp / "x")),
])
def test_irns_files_run_no_code(tmp_path, evil):
    irn_file(tmp_path / "a.npy", keys=np.array([1]), high_res=evil(tmp_path))
    refused(r"a\.npy.*asks for", irn_ids, tmp_path / "a.npy", 0.5, 21, (4, 4))
    assert not (tmp_path / "ran").exists()


def test_irns_files_change_and_ask_for_nothing(tmp_path):
    """A function keeps its defaults; no array is larger than the file; maps and keys are what they have to be."""
    size, read = (4, 4), lambda: irn_ids(tmp_path / "a.npy", 0.5, 21, (4, 4))
    known, torchs = torch._utils._rebuild_tensor_v2.__defaults__, torch.zeros(1, *size)
    np.save(tmp_path / "a.npy", np.array({}, object))
    head = (tmp_path / "a.npy").read_bytes().partition(b"\n")[0] + b"\n"
    tampering = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}X\x0c\x00\x00\x00__defaults__K\x01\x85stb."
    (tmp_path / "a.npy").write_bytes(head + tampering)
    refused(r"a\.npy", read)
    assert torch._utils._rebuild_tensor_v2.__defaults__ == known
    storage = torchs.untyped_storage()
    typed = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    large = Evil(torch._utils._rebuild_tensor_v2, typed, 0, (1, 4, 400), (0, 0, 1), False, None)
    for maps in (Evil(np.ndarray, (10**5, 4, 4)), large):
        irn_file(tmp_path / "a.npy", keys=np.array([1]), high_res=maps)
        refused(r"a\.npy", read)
    for keys in ([0.5], [np.nan], [-1], [20], [1] * 30):
        irn_file(tmp_path / "a.npy", keys=np.array(keys), cam=np.ones((len(keys), 2, 2), "f4"))
        refused(r"a\.npy.*keys", read)
    irn_file(tmp_path / "a.npy", keys=np.array([1]), high_res=np.full((1, 4, 4), 1e300))
    refused(r"a\.npy.*finite", read)
    irn_file(tmp_path / "a.npy", keys=torch.tensor([1]), cam=np.ones((1, 2, 2), "f2", order="F"))
    assert (read() == 2).all()


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{k}: &a{k} [{', '.join(9 * [f'*a{k - 1}'])}]" for k in range(1, 9))])


@pytest.mark.parametrize(("text", "words"), [
    ("seed: !!python/object/apply:os.mkdir ['TMP/ran']", "tag"), ("output: ${oc.env:HOME}", "not resolved"),
    ("model:\n  backbone_args: {x: !!python/object/new:os.mkdir ['TMP/ran']}", "tag"),
    ("a: &a [*a]", "values"), (LAUGHS, "values"),
    ("{a: " * 2000, "recursion"), ("seed: " + "1" * 5000, "integer"),
    ("base: more_vok", r"x\.yaml: base.*more_voc"), ("base: " + "a" * 5000, r"x\.yaml: base"),
])
def test_a_config_runs_nothing_and_ends(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text.replace("TMP", str(tmp_path)))
    refused(words, load_config, tmp_path / "x.yaml")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("error")
def test_labels_too_large_for_a_number(tmp_path):
    np.save(tmp_path / "a.npy", np.array({"a": np.full(20, 1e300)}, object))
    samples = [Sample("a", tmp_path / "a.jpg", None)]
    refused("other values", load_labels, str(tmp_path / "a.npy"), tmp_path, tmp_path, samples, voc.CLASSES)


@pytest.mark.parametrize("text", ['[{"miou": NaN}]', '[{"miou": 1e999}]', "[" * 10**5])
def test_results_that_cannot_be_written_again_are_kept_aside(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    append_results(tmp_path / "results.json", [{"map": "cam"}])
    assert json.loads((tmp_path / "results.json").read_text()) == [{"map": "cam"}]
    assert [path.read_text() for path in tmp_path.glob("*unreadable*")] == [text]


def test_settings_too_deep_to_be_read():
    refused("recursion", load_config, None, ["train.betas=" + "{a: " * 2000])


def test_a_config_reads_no_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "told")
    (tmp_path / "x.yaml").write_text('model: {backbone_args: {x: "\\"\\\\x24{oc.env:SECRET}\\"", depth: "3"}}')
    given = load_config(tmp_path / "x.yaml").model.backbone_args
    assert given["depth"] == 3 and "told" not in str(dict(given))


# places

@pytest.mark.parametrize(("kind", "name", "link"), [
    (tarfile.REGTYPE, "../JPEGImages/x.jpg", ""), (tarfile.REGTYPE, "/JPEGImages/x.jpg", ""),
    (tarfile.SYMTYPE, "JPEGImages/x.jpg", "/etc/passwd"), (tarfile.SYMTYPE, "JPEGImages/x.jpg", "../../x"),
    (tarfile.LNKTYPE, "JPEGImages/x.jpg", "../x"), (tarfile.LNKTYPE, "JPEGImages/x.jpg", "/etc/passwd"),
    (tarfile.CHRTYPE, "JPEGImages/x.jpg", ""), (tarfile.FIFOTYPE, "JPEGImages/x.jpg", ""),
])
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_tars_stay_in_their_folder(tmp_path, kind, name, link, mode):
    with tarfile.open(tmp_path / "x.tar", mode) as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        tar.addfile(member, io.BytesIO())
    source = Source(tmp_path / "x.tar", voc.VOC_INNER, voc.VOC_WANTED, tmp_path / "scratch")
    refused(r"x\.tar: (refused|no files)", lambda: source.files)   # an absolute name is in none of the folders
    assert {path.name for path in tmp_path.iterdir()} <= {"x.tar", "scratch"}


@pytest.mark.parametrize("name", ["../JPEGImages/x.jpg", "/JPEGImages/x.jpg", "..\\JPEGImages\\x.jpg", "a/../../x.jpg"])
def test_zips_stay_in_their_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr(name, b"x")
    refused(r"x\.zip: refused", lambda: Source(tmp_path / "x.zip", (), ("JPEGImages",), tmp_path).files)


def test_a_journal_deletes_nothing_outside(tmp_path):
    keep, root = tmp_path / "keep.txt", tmp_path / "data"
    root.mkdir()
    keep.touch()
    names = ["../keep.txt", str(keep), "a\0b", 3]
    lines = [json.dumps({"tool": "other"}), *(json.dumps([name, 0, ""]) for name in names), '["a"]', "3", "\udcff"]
    (root / ".preparing.jsonl").write_text("\n".join(lines), errors="surrogateescape")
    with Preparation(root, {"tool": "mine"}) as work:
        assert keep.exists() and not work.records


def test_a_checkpoint_does_not_say_where_to_write(tmp_path):
    settings = {"schema": 2, "method": "more", "evaluate": {"save_labels": "/x", "save_overlays": "../x"}}
    meta = {"meta": json.dumps({"classes": ["nut"], "settings": settings})}
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors", meta)
    evaluate = checkpoint_config(str(tmp_path / "w.safetensors"))[0].evaluate
    assert evaluate.save_labels is evaluate.save_overlays is None
    asked = checkpoint_config(str(tmp_path / "w.safetensors"), ["evaluate.save_labels=here"])[0].evaluate
    assert asked.save_labels == "here"


@pytest.mark.parametrize("meta", [
    "[]", "3", '{"classes": 3}', '{"classes": [["a"]]}', '{"classes": [".."]}', '{"classes": ["a\\u0000"]}',
    '{"settings": [1]}', "{", "[" * 5000, '{"val": 1}',
])
def test_notes_of_weights_that_are_none(tmp_path, meta):
    save_file({"x": torch.ones(1)}, tmp_path / "w.safetensors", {"meta": meta})
    refused(r"w\.safetensors", checkpoint_classes, tmp_path / "w.safetensors", load_config())


def test_a_printed_command_is_one(tmp_path):
    row = {"map": "cam", "checkpoint": "x;touch y", "split": "$(touch y)", "scales": [1.0]}
    command = evaluate_command(tmp_path, [row], {})
    assert "'x;touch y'" in command and "'data.val_split=$(touch y)'" in command


# what fuzzing found

def test_a_damaged_mat_is_no_crash():
    """Every byte of a mask of SBD wrong; scipy's reader ends the process at some of them."""
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    sound = devkit.mat(mask)
    assert np.array_equal(read_field(sound, "GTcls", "Segmentation"), mask)
    for place in range(len(sound)):
        wrong = sound[:place] + b"\xff" + sound[place + 1 :]
        with contextlib.suppress(UserError):
            assert voc._read_mat(types.SimpleNamespace(read=lambda data=wrong: data)).dtype == np.uint8


def test_postscript_is_not_handed_on(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refused("cannot identify", read_rgb, tmp_path / "a.jpg")


def test_a_line_is_one_printable_line():
    line = error_line(UserError("x.json: image a\n\x1b[2J\ud800 " + "b" * 10**6))
    assert line.isprintable() and len(line) < 3000 and line.startswith("x.json: image a \\x1b[2J\\ud800 b")


@pytest.mark.parametrize("image", [
    {"height": 10**9}, {"height": "2"}, {"width": 0}, {"file_name": "a b.jpg"}, {"file_name": "a\nb.jpg"},
])
def test_coco_images_that_are_none(tmp_path, image):
    categories = [{"id": k, "name": name} for k, name in enumerate(coco.CLASSES)]
    whole = {"images": [{"id": 1, "file_name": "a.jpg", "height": 2, "width": 2, **image}], "categories": categories,
             "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "area": 1, "segmentation": []}]}
    (tmp_path / "x.json").write_text(json.dumps(whole))
    refused(r"x\.json", coco.read_pictures, tmp_path / "x.json")
    (tmp_path / "x.json").write_text("[" * 10**5)
    refused(r"x\.json", coco.read_pictures, tmp_path / "x.json")


@pytest.mark.parametrize("text", ["null", "3", "[" * 10**5])
def test_settings_that_are_none(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    refused(r"settings\.json", claim_folder, tmp_path, {}, False, Ranks(0, 1, torch.device("cpu")))


def test_a_state_of_nothing(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
    for wrong in ({}, {"param_groups": [{}], "state": {}}, {"param_groups": 3, "state": 3}):
        refused("another network or optimizer", files.load_optimizer, optimizer,
                {"iteration": 3, "kind": "SGD", "optimizer": wrong})


def test_a_zip_with_a_wrong_place(tmp_path):
    """A member that begins before the file does."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("JPEGImages/x.jpg", b"x" * 50)
    data = bytearray((tmp_path / "x.zip").read_bytes())
    entry, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    data[end + 16 : end + 20] = (entry + 200).to_bytes(4, "little")   # its members begin before the file
    (tmp_path / "x.zip").write_bytes(data)
    source = Source(tmp_path / "x.zip", (), ("JPEGImages",), tmp_path)
    refused(r"x\.zip", lambda: [blob.read() for blob in source.files.values()])


def test_odd_weights_warn_nobody(tmp_path, recwarn):
    torch.save({"x": torch.ones(2)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as old, zipfile.ZipFile(tmp_path / "odd.pth", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name).replace(b"\x80\x02", b"\x80\x6f") if "pkl" in name else old.read(name))
    try:
        files.read_tensors(tmp_path / "odd.pth")
    except UserError as error:
        assert "odd.pth" in str(error)
    assert not recwarn.list
