"""Image-level labels from every source, and what goes wrong with each."""

import io
import json
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch

from datasets.labels import labels_of_mask, load_labels
from datasets.onehot import read_onehot
from datasets.samples import Sample
from utils.errors import UserError
from utils.images import write_label_png

CLASSES = ("cat", "dog", "horse")


def load(source, root, names=("a", "b"), mask=None):
    samples = [Sample(name, root / f"{name}.jpg", mask and root / mask.format(name)) for name in names]
    labels_of = load_labels(source, root, root, samples, CLASSES)
    return torch.stack([labels_of(sample) for sample in samples])


def write_xml(folder, name, objects):
    folder.mkdir(exist_ok=True)
    body = "".join(
        f"<object><name>{label}</name><difficult>{difficult}</difficult><part><name>head</name></part></object>"
        for label, difficult in objects
    )
    (folder / f"{name}.xml").write_text(f"<annotation>{body}</annotation>")


def write_onehot(path, table, protocol=None):
    array = np.empty((), object)
    array[()] = table
    if protocol is None:
        np.save(path, array)
    else:
        with open(path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
            pickle.dump(array, file, protocol)


def test_json(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"a": ["dog", "dog"], "b": ["horse", "cat"], "other": []}))
    assert load("labels.json", tmp_path).tolist() == [[0, 1, 0], [1, 0, 1]]
    assert load(str(tmp_path / "labels.json"), tmp_path).tolist() == load(None, tmp_path).tolist()


def test_xml_keeps_difficult_objects_and_skips_parts(tmp_path):
    write_xml(tmp_path / "Annotations", "a", [("dog", 0), ("cat", 1)])
    write_xml(tmp_path / "Annotations", "b", [])
    assert load("Annotations", tmp_path).tolist() == [[1, 1, 0], [0, 0, 0]]
    assert load(None, tmp_path).tolist() == [[1, 1, 0], [0, 0, 0]]


def test_masks(tmp_path):
    write_label_png(tmp_path / "a.png", np.array([[0, 255, 3]]))
    write_label_png(tmp_path / "b.png", np.array([[0, 0, 0]]))
    for source in (None, "masks"):
        assert load(source, tmp_path, mask="{}.png").tolist() == [[0, 0, 1], [0, 0, 0]]
    assert labels_of_mask(np.array([[1, 2, 255]]), 3).tolist() == [1, 1, 0]


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "uint8", "int64", "bool", ">f4"])
def test_onehot(tmp_path, protocol, dtype):
    table = {"a": np.array([0, 1, 0], dtype), "b": np.ones(3, dtype)}
    write_onehot(tmp_path / "cls_labels_onehot.npy", table, protocol)
    assert load(None, tmp_path).tolist() == [[0, 1, 0], [1, 1, 1]]


def test_onehot_with_old_module_names(tmp_path):
    array = np.array([1, 0, 0], np.float32)
    content = pickle.dumps({"a": array}, 2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "x.npy").write_bytes(content)
    assert read_onehot(tmp_path / "x.npy")["a"].tolist() == [1, 0, 0]


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_onehot_of_other_types(tmp_path, module):
    vector, within = np.float32([1, 0, 0]), np.empty((), object)
    within[()] = vector
    table = OrderedDict({np.str_("s"): list(vector), b"b": [1, False, 0.0], np.bytes_(b"n"): vector.astype(object),
                         np.int32(2007000032): within, 2008000001: vector})
    (tmp_path / "x.npy").write_bytes(pickle.dumps(table, 2).replace(b"numpy._core", module.encode()))
    read = read_onehot(tmp_path / "x.npy")
    assert list(read) == ["s", "b", "n", "2007_000032", "2008_000001"]
    assert all(labels.dtype == np.float32 and labels.tolist() == [1, 0, 0] for labels in read.values())


def test_default_prefers_the_onehot_file(tmp_path):
    write_onehot(tmp_path / "cls_labels_onehot.npy", {"a": np.eye(3)[0], "b": np.eye(3)[1]})
    (tmp_path / "labels.json").write_text(json.dumps({"a": [], "b": []}))
    assert load(None, tmp_path).tolist() == [[1, 0, 0], [0, 1, 0]]


def test_released_dictionaries(shared_data):
    files = sorted(shared_data.glob("*/cls_labels_onehot.npy"))
    if not files:
        pytest.skip("no cls_labels_onehot.npy there")
    for path in files:
        table = read_onehot(path)
        assert len(table) > 100
        assert all(labels.shape == (20,) and labels.sum() > 0 and set(labels) <= {0, 1} for labels in table.values())


class Evil:
    """Pickles into a call that makes a file."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_code_never_runs(tmp_path, wrapped):
    proof = tmp_path / "proof"
    for evil in (Evil(os.mkdir, str(proof)), Evil(open, str(proof), "w"), Evil(eval, f"open({str(proof)!r}, 'w')")):
        if wrapped:
            write_onehot(tmp_path / "x.npy", {"a": evil})
        else:
            (tmp_path / "x.npy").write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match=r"x\.npy.*asks for"):
            read_onehot(tmp_path / "x.npy")
        assert not proof.exists()


def test_hostile_pickles_give_one_line(tmp_path):
    path = tmp_path / "x.npy"
    good = io.BytesIO()
    np.save(good, np.array({"a": np.ones(3)}, object))
    good = good.getvalue()
    hostile = [
        b"", b"\x93NUMPY", good[:-30], b"cos\nsystem\n(S'true'\ntR.", b"c_codecs\nencode\n(Vx\nVhex\ntR.",
        b"cnumpy\ndtype\n(VO8\ntR.", b"cnumpy\nndarray\n}VX\nVY\nsb.", pickle.dumps([1]), pickle.dumps({"a": 1}),
        pickle.dumps({"a": np.ones((2, 2))}), pickle.dumps({"a": np.array(["x"])}), pickle.dumps({1: np.ones(3)}),
        b"]" * 100 + b".", b"\x80\x04P1\n.", pickle.dumps({"a": "100"}), pickle.dumps({"a": [1], b"a": [1]}),
    ]  # fmt: skip
    for content in hostile:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.npy") as caught:
            read_onehot(path)
        assert "\n" not in str(caught.value)
    np.save(path, np.ones((4, 3)))
    with pytest.raises(UserError, match="without image names"):
        read_onehot(path)


def test_image_without_labels(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"a": ["dog"]}))
    with pytest.raises(UserError, match=r"labels\.json.*no labels for image b"):
        load(None, tmp_path)
    write_xml(tmp_path / "Annotations", "a", [])
    with pytest.raises(UserError, match=r"b\.xml.*no labels for image b"):
        load("Annotations", tmp_path)
    with pytest.raises(UserError, match="image a has no mask"):
        load("masks", tmp_path)


def test_wrong_length(tmp_path):
    write_onehot(tmp_path / "cls_labels_onehot.npy", {"a": np.ones(20), "b": np.ones(20)})
    with pytest.raises(UserError, match=r"cls_labels_onehot\.npy.*a has length 20.*3 classes"):
        load(None, tmp_path)


def test_values_that_are_no_labels(tmp_path):
    write_onehot(tmp_path / "cls_labels_onehot.npy", {"a": np.array([0, 0.5, 1]), "b": np.ones(3)})
    with pytest.raises(UserError, match="other values than 0 and 1"):
        load(None, tmp_path)


def test_unknown_class_offers_the_nearest(tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({"a": ["hrse"], "b": []}))
    with pytest.raises(UserError, match=r"image a has the unknown class 'hrse'.*'horse'"):
        load(None, tmp_path)


@pytest.mark.parametrize("content", ["", "[]", '{"a": "dog"}', '{"a": [1]}', "{", "["*9**5, '{"a":[],"b":[],"a":[]}'])
def test_broken_json(tmp_path, content):
    (tmp_path / "labels.json").write_text(content)
    with pytest.raises(UserError, match=r"labels\.json"):
        load(None, tmp_path)


def test_broken_xml_and_sources(tmp_path):
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations" / "a.xml").write_text("<annotation>")
    with pytest.raises(UserError, match=r"a\.xml.*cannot be read"):
        load(None, tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text('<?xml version="1.0" encoding="gb2312"?><annotation/>')
    with pytest.raises(UserError, match=r"a\.xml.*cannot be read"):
        load(None, tmp_path)
    (tmp_path / "Annotations" / "a.xml").write_text('<annotation xmlns="x"><object/></annotation>')
    with pytest.raises(UserError, match=r"a\.xml: is no annotation of VOC, it begins with <{x}annotation>"):
        load(None, tmp_path)
    with pytest.raises(UserError, match=r"gone\.json.*data\.image_labels"):
        load("gone.json", tmp_path)
    (tmp_path / "labels.csv").write_text("a,dog")
    with pytest.raises(UserError, match=r"labels\.csv"):
        load("labels.csv", tmp_path)
