"""Weight files with the released models' keys and shapes load strictly, flat or wrapped."""

import pytest
import torch

from engine.checkpoints.files import load_weights
from engine.config import load_config
from model import build_method
from utils.errors import UserError


def key_lists(text):
    """One {key: shape} a model of the list (VOC, COCO)."""
    models = []
    for line in text.splitlines():
        if line.startswith("#"):
            models.append({})
        elif line.strip():
            key, shape, _ = line.split("\t")
            models[-1][key] = tuple(int(n) for n in shape.strip("(),").replace(" ", "").split(",") if n)
    return models


@pytest.fixture(scope="module", params=[0, 1], ids=["voc", "coco"])
def model(request, golden):
    keys = key_lists(golden("more/official_state_dict_keys.txt"))[request.param]
    classes = keys["classifier.weight"][0]
    return keys, build_method(load_config(None, [f"model.registers={keys['encoder.cls_token'][1] - classes}"]), classes)


def save(path, keys, wrapped=False):
    weights = {f"module.{key}": torch.full(shape, 0.5) for key, shape in keys.items()}
    torch.save({"step": 1, "model_state_dict": weights} if wrapped else weights, path)
    return path


@pytest.mark.parametrize("wrapped", [False, True], ids=["flat", "wrapped"])
def test_loads(model, tmp_path, wrapped):
    keys, method = model
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.zero_()
    load_weights(save(tmp_path / "released.pth", keys, wrapped), method)
    assert all((value == 0.5).all() for value in method.state_dict().values())


@pytest.mark.parametrize("fault", ["missing", "extra", "misshaped"])
@pytest.mark.parametrize("key", ["decoder.conv8.weight", "encoder.cls_token", "graph_layer._fc1.0.bias"])
def test_names_the_fault(model, tmp_path, fault, key):
    keys, method = model
    keys = dict(keys)
    name = key
    if fault == "missing":
        del keys[key]
    elif fault == "extra":
        name = key + ".more"
        keys[name] = (3,)
    else:
        keys[key] = (*keys[key][:-1], keys[key][-1] + 1)
    weights = {f"module.{k}": torch.tensor(0.5).expand(shape) for k, shape in keys.items()}
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        method.from_official(weights)
    assert {"missing": "missing", "extra": "not expected", "misshaped": "has shape"}[fault] in str(error.value)


def test_the_error_names_the_file(model, tmp_path):
    keys, method = model
    first = next(iter(keys))
    path = save(tmp_path / "short.pth", {first: keys[first]})
    with pytest.raises(UserError, match=r"short\.pth"):
        load_weights(path, method)
