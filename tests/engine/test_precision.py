"""Which precision is taken where, and that what is computed in bf16 says so."""

import pytest
import torch

from engine.config import load_config, load_settings, portable
from engine.evaluation.results import settings_of, title
from engine.inference.batch import predict
from engine.inference.plan import evaluation_plan, validation_plan
from engine.precision import precision_on, settled
from tests.model.test_maps import tiny_more

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")])
def test_auto_is_bf16_on_a_gpu_that_computes_in_it(capability, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert [precision_on(GPU, "auto"), precision_on(CPU, "auto")] == [precision, "fp32"]
    assert [precision_on(device, "fp32") for device in (GPU, CPU)] == ["fp32", "fp32"]
    assert [precision_on(device, "bf16") for device in (GPU, CPU)] == ["bf16", "bf16"]
    run = settled(load_config("more_voc"), GPU)
    assert run.train.precision == precision and load_config("more_voc").train.precision == "auto"
    later = load_settings(portable(run), "its weights")   # evaluated anywhere, it has the precision of its run
    assert {plan(later).on(CPU).precision for plan in (evaluation_plan, validation_plan)} == {precision}
    told = load_settings(portable(run), "its weights", ["evaluate.precision=fp32"])
    assert {plan(told).on(GPU).precision for plan in (evaluation_plan, validation_plan)} == {"fp32"}


def test_maps_are_made_in_the_precision_of_the_plan():
    method, image, labels = tiny_more(), torch.randn(3, 64, 64), torch.ones(4)
    maps_of, cached = method.maps, []   # bf16 weights of another thread's stream may not be there yet
    method.maps = lambda *given: cached.append(torch.is_autocast_cache_enabled()) or maps_of(*given)
    plan, maps = evaluation_plan(load_config("more_voc", ["evaluate.base_size=64"])), {}
    for precision in ("auto", "fp32", "bf16"):
        maps[precision] = predict(method, image, labels, plan._replace(precision=precision)).maps
    for kind, exact in maps["fp32"].items():
        assert torch.equal(maps["auto"][kind], exact)   # on a CPU
        assert 0 < (maps["bf16"][kind] - exact).abs().max() < 0.1 * exact.abs().max()
    assert cached == [False] * 3


def test_a_score_says_that_it_is_of_bf16():
    facts = {"method": "more", "dataset": "voc", "split": "val", "images": 3}
    plan = evaluation_plan(load_config("more_voc"))
    rows = [settings_of(("lam", False), plan._replace(precision=precision), facts) for precision in ("fp32", "bf16")]
    assert [row["precision"] for row in rows] == ["fp32", "bf16"]
    assert title(rows[1]) == f"{title(rows[0])}, bf16"
