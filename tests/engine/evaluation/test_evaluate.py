"""Evaluation of a method in closed form against loops over pixels."""

import json
import math
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.measure import Counter
from engine.checkpoints.files import check_classes, run_folder
from engine.distributed import Ranks
from engine.evaluation.evaluate import evaluate, score, validate
from engine.evaluation.results import append_results, settings_of, title
from engine.inference import batch, many
from engine.inference.batch import _label_maps, predict, predict_batch, threshold, to_host
from engine.inference.many import in_pools, same_size
from engine.inference.pictures import training_picture
from engine.inference.plan import evaluation_plan, validation_plan
from model.method import MapPlan
from report.run import evaluate_command
from tests.engine.fake_method import FakeMethod, FakeSet, K, config, fake_is_known  # noqa: F401
from tests.tiny import fork
from utils.batch import Batch
from utils.crf import dense_crf
from utils.errors import UserError
from utils.images import to_uint8
from utils.metrics import confusion_matrix

ALONE = Ranks(0, 1, torch.device("cpu"))
FIELDS = ["map", "method", "dataset", "split", "images", "scales", "flip", "crf", "image_labels", "predicted_from",
          "background", "input", "precision", "miou", "pixel_accuracy", "iou", "checkpoint", "iteration", "seconds",
          "evaluation"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def oracle(kind: str, colour: list[float], present: list[bool], bkg: float) -> int:
    """The label of one pixel."""
    if kind == "seg":
        values = [0.1, *colour]
        return max(range(K + 1), key=lambda i: values[i])
    values = {k + 1: sigmoid(c if kind == "cam" else -c) for k, c in enumerate(colour) if present[k]}
    best = max(values, key=values.get, default=0)
    return best if values and values[best] > bkg else 0


def oracle_matrix(dataset: FakeSet, kind: str, bkg: float, present_of) -> np.ndarray:
    matrix = np.zeros((K + 1, K + 1), np.int64)
    for i in range(len(dataset)):
        item = dataset[i]
        for y in range(item.label_map.shape[0]):
            for x in range(item.label_map.shape[1]):
                if item.label_map[y, x] != 255:
                    label = oracle(kind, item.image[:, y, x].tolist(), present_of(item), bkg)
                    matrix[item.label_map[y, x], label] += 1
    return matrix


def given(item) -> list[bool]:
    return [bool(v) for v in item.labels]


def by_classifier(item) -> list[bool]:
    """Where it finds no class: those of the segmentation."""
    present = [item.image[k].mean().item() > 0 for k in range(K)]
    return present if any(present) else by_segmentation(item)


def by_segmentation(item, min_pixels: int = 5) -> list[bool]:
    """Of its coarse scores: every fourth pixel, the first class's logit 2 lower."""
    pixels = item.image[:, ::2, ::2].flatten(1).T.tolist()
    labels = [max(range(K + 1), key=[0.2, 2 * a - 2, 2 * b, 2 * c].__getitem__) for a, b, c in pixels]
    return [labels.count(k + 1) >= min_pixels for k in range(K)]


@pytest.mark.parametrize(
    ("overrides", "present_of"),
    [
        ([], given),
        (["evaluate.image_labels=predicted"], by_classifier),
        (["evaluate.image_labels=predicted", "evaluate.predict_from=seg"], by_segmentation),
    ],
)
def test_every_pixel(overrides, present_of):
    dataset, settings = FakeSet(6), config("evaluate.bkg=0.6", *overrides)
    matrices = score(FakeMethod(), dataset, K, evaluation_plan(settings), ALONE)
    assert list(matrices) == [("cam", False), ("lam", False), ("seg", False)]
    for (kind, _), matrix in matrices.items():
        np.testing.assert_array_equal(matrix, oracle_matrix(dataset, kind, 0.6, present_of), err_msg=kind)


@pytest.mark.parametrize(("min_pixels", "seen"), [(4, [False, False, True]), (5, [False, False, False])])
def test_where_no_class_is_predicted_those_of_the_segmentation_are_taken(min_pixels, seen):
    """The second image's class is predicted; of the first, 4 pixels of the coarse scores are the third class."""
    images = torch.full((2, 3, 8, 8), -1.0)
    images[1, 0], images[0, 2, :4, :4] = 1, 3
    settings = config("evaluate.image_labels=predicted", f"evaluate.min_pixels={min_pixels}")
    first, second = predict_batch(FakeMethod(), images, None, evaluation_plan(settings), ["first", "second"])
    assert first.present.tolist() == seen and second.present.tolist() == [True, False, False]


def test_a_value_at_the_threshold_is_background():
    maps = torch.tensor([[[0.5, 0.5001, 0.2, 0.9]], [[0.4, 0.4, 0.7, 0.9]]])
    assert threshold(maps, torch.tensor([True, True]), 0.5).tolist() == [[0, 1, 2, 1]]
    assert threshold(maps, torch.tensor([False, True]), 0.5).tolist() == [[0, 0, 2, 2]]
    assert threshold(maps, torch.tensor([False, False]), 0.5).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("num_classes", [1, 5])
def test_label_maps_of_a_batch(num_classes):
    """Against each image by itself, whose absent classes' maps are left out first; ties everywhere."""
    plan = evaluation_plan(config())
    present = torch.stack([torch.arange(num_classes) % step == step - 1 for step in (1, 2, 3, 9)])   # all to none
    maps = {k: torch.randint(0, 5, (4, num_classes + plan.kinds[k].background, 9, 11)) / 4 for k in plan.kinds}
    for kind, made in zip(plan.kinds, _label_maps(maps, present, plan), strict=True):
        for values, own, ids in zip(maps[kind], present, made, strict=True):
            expected = values.argmax(0)
            if not plan.kinds[kind].background:
                value, index = torch.cat([torch.full_like(values[:1], 0.5), values[own]]).max(0)
                known = torch.cat([torch.zeros(1, dtype=torch.long), own.nonzero().flatten() + 1])
                expected = torch.where(value <= 0.5, 0, known[index])
            assert torch.equal(ids, expected.byte())


@pytest.mark.parametrize("overrides", [[], ["evaluate.multi_scale=true", "evaluate.base_size=8"],
                                       ["evaluate.image_labels=predicted"],
                                       ["evaluate.image_labels=predicted", "evaluate.predict_from=seg"]])
@pytest.mark.parametrize("plan_of", [evaluation_plan, validation_plan])
def test_a_batch_waits_for_the_gpu_twice_at_most(overrides, plan_of, monkeypatch):
    """Up to its label maps on tensors of a GPU without values, then as a whole on the CPU."""
    class Done(Exception):
        pass

    def brought(*tensors):
        host = to_host(*tensors)
        if torch.is_tensor(host[0]) and host[0].ndim == 4:
            raise Done
        return [np.zeros(len(host[0]), bool)]   # no class is found: the longest way

    plan = plan_of(config(*overrides, "train.precision=fp32"))
    with FakeTensorMode(), monkeypatch.context() as patch, Counter() as counter, pytest.raises(Done):
        patch.setattr(batch, "to_host", brought)
        given = torch.rand(5, 3, 8, 10, device="cuda"), torch.ones(5, K, device="cuda")
        predict_batch(FakeMethod(), *given, plan, "abcde")
    assert counter.host_reads == 1 + (plan.predicted == "classifier")
    with Counter() as counter:
        predict_batch(FakeMethod(), torch.rand(5, 3, 8, 10), torch.ones(5, K), plan, "abcde")
    assert counter.host_reads == (plan.predicted == "classifier")   # a copy to where it is counts for nothing


@pytest.mark.parametrize("failing", [None, 100])
def test_writers_are_threads_of_their_own(failing):
    """In order; so many wait; what one raises ends all of it, as Ctrl-C does, and no thread stays."""
    threads, taken, written = threading.active_count(), [], []

    def lists():
        for first in range(0, 300, 3):
            taken.append(first)
            yield [first, first + 1, first + 2]

    def write(pair):
        assert pair[1] != threading.get_ident()
        time.sleep(0.003 * (pair[0] % 2))
        if pair[0] == failing:
            raise OSError("full disk")
        written.append(pair[0])
        return pair[0]

    given = lambda items: [(item, threading.get_ident()) for item in items], write, lists(), 2, 3
    ends = nullcontext() if failing is None else pytest.raises(OSError, match="full disk")
    with ends, closing(in_pools(*given, (torch.set_num_threads, 1))) as results:
        for count, number in enumerate(results):
            assert count == number and 3 * len(taken) - count <= 3 * 3 + 3 + 3
            if number == 280:
                break
    assert {*range(failing or 280)} <= {*written} and threading.active_count() == threads
    assert max(taken) < (failing or 280) + 18


@pytest.mark.parametrize("fits", [3, 0])
def test_a_batch_too_large_for_the_memory_goes_in_parts(fits, capsys):
    class Small(FakeMethod):
        def maps(self, images, *rest):
            assert held is None or held() is None, "the tensors of the failed batch live on"
            return self.counted(images.clone(), *rest)

        def counted(self, images, *rest):
            nonlocal held
            if len(images) > fits:
                held = weakref.ref(images)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().maps(images, *rest)

    class OneSize(FakeSet):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item._replace(image=item.image[:, :6, :6], label_map=item.label_map[:6, :6])

    plan, held, method = evaluation_plan(config()), None, Small()
    if not fits:
        with pytest.raises(UserError, match=r"image_0: 6x6 pixels .*; give a smaller evaluate\.base_size"):
            score(method, OneSize(8), K, plan, ALONE, batch_size=8)
        return
    made, alone = (score(m, OneSize(20), K, plan, ALONE, batch_size=b) for m, b in ((method, 8), (FakeMethod(), 1)))
    assert all((made[row] == alone[row]).all() for row in alone)
    assert max(call[0][0] for call in method.calls) == 2
    assert capsys.readouterr().err.count("4 images of 6x6 are too many for the GPU's memory: 2 at once") >= 1


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_crf_starts_from_background_and_present_maps(power):
    item = FakeSet(2)[1]
    settings = config("evaluate.crf=true", "crf.iterations=3", f"crf.background_power={power}")
    parameters = settings.crf.model_dump()
    assert parameters.pop("background_power") == power
    prediction = predict(FakeMethod(), item.image, item.labels, evaluation_plan(settings))
    cam, image = item.image.sigmoid().numpy(), to_uint8(item.image)
    chosen = cam[[0, 2]]
    start = torch.from_numpy(np.stack([(1 - chosen.max(0)) ** power, *chosen]))
    refined = dense_crf(image, start, **parameters).numpy()
    np.testing.assert_array_equal(prediction.labels["cam", True], np.array([0, 1, 3])[refined.argmax(0)])
    refined = dense_crf(image, (prediction.maps["seg"]).softmax(0), **parameters).numpy()
    np.testing.assert_array_equal(prediction.labels["seg", True], refined.argmax(0))
    without = FakeSet(4)[3]   # an image without a label
    labels = predict(FakeMethod(), without.image, without.labels, evaluation_plan(settings)).labels
    assert not labels["lam", True].any() and not labels["lam", False].any()


@pytest.mark.parametrize("power", [1.0, 2.5])
def test_a_row_says_the_power_of_its_background(power, tmp_path):
    """Where it had a part; and the command that makes the rows again gives it, whatever the run's config says."""
    settings = config("evaluate.crf=true", "crf.iterations=1", f"crf.background_power={power}")
    rows = evaluate(FakeMethod(), FakeSet(3), settings, ALONE, "weights", tmp_path / "results.json")
    for row in rows:
        told = power != 1 and row["crf"] and row["map"] != "seg"
        assert row.get("background_power") == (power if told else None)
        assert ("background power 2.5" in title(row)) == told
    for own in ({}, {"crf.background_power": 1.0}, {"crf.background_power": 2.5}, {"crf.background_power": 3.0}):
        words = [word for word in evaluate_command(tmp_path, rows, own).split() if word.startswith("crf.")]
        assert words == [f"crf.background_power={power}"] * (own.get("crf.background_power", 1.0) != power)
    assert "power" not in evaluate_command(tmp_path, [row for row in rows if row["map"] == "seg"], own)


def test_scales_flip_and_squares():
    item, method = FakeSet(1)[0], FakeMethod()
    settings = config("evaluate.base_size=20", "evaluate.multi_scale=true", "evaluate.multi_scales=[0.5,2]")
    prediction = predict(method, item.image, item.labels, evaluation_plan(settings))
    localised = MapPlan((1.0, 0.5, 2.0), True, 20, settings.evaluate.bkg)
    plans = {"cam": localised, "lam": localised, "seg": MapPlan((1.0, 1.25, 1.5), True, 20)}
    assert method.calls == [((1, *item.image.shape), plans, True)]   # all of them in one call
    assert all(values.shape[-2:] == item.image.shape[-2:] for values in prediction.maps.values())
    method.calls.clear()
    predict(method, item.image, item.labels, evaluation_plan(config("evaluate.maps=[seg]", "evaluate.flip=false")))
    assert method.calls == [((1, *item.image.shape), {"seg": MapPlan((1.0, 1.25, 1.5))}, True)]


@pytest.mark.parametrize("given, size, said", [
    ("base_size=20", (20, 20), "input 20x20"), ("long_side=21", (21, 14), "long side 21"),
    ("base_size=null", (9, 6), "native size"),
])
def test_what_the_images_become(given, size, said):
    """The classifier's inputs, those of the maps, and what a row, its title and the command that makes it again say."""
    plan, method = evaluation_plan(config(f"evaluate.{given}", "evaluate.image_labels=predicted")), FakeMethod()
    image, asked = torch.randn(3, 9, 6), []
    method.classify = lambda images: asked.append(images) or images.mean((2, 3))
    assert predict(method, image, None, plan).maps["seg"].shape[-2:] == (9, 6)
    assert torch.equal(asked[0], torch.nn.functional.interpolate(image[None], size, mode="bilinear"))
    assert {made.input_size(9, 6) for made in plan.maps.values()} == {size}
    row = settings_of(("seg", False), plan, {"method": "fake", "dataset": "voc", "split": "val", "images": 3})
    assert title(row).endswith(f", {said}")
    command = evaluate_command(Path("run"), [row], {"evaluate.base_size": None, "evaluate.long_side": 30}).split()
    again = config("evaluate.long_side=30", *[item for item in command if "_size=" in item or "_side=" in item])
    assert evaluation_plan(again).input_size(9, 6) == size


def test_validation_follows_the_training_plan():
    method, settings = FakeMethod(), config("train.validate_images=3", "data.crop_size=16", "evaluate.bkg=0.6")
    scores, present = validate(method, FakeSet(6), settings, ALONE)
    assert present == 3 and set(scores) == {"cam", "lam", "fused", "seg"}
    assert method.training and len(method.calls) == 3
    plain = MapPlan(side=16, bkg=0.6)
    plans = {
        "cam": plain._replace(scales=(1.0, 0.5), flip=True), "lam": plain, "fused": plain, "seg": plain,
    }
    assert [call[1:] for call in method.calls] == [(plans, False)] * 3
    plan = validation_plan(settings)
    assert (plan.maps["cam"].bkg, plan.maps["lam"].bkg, plan.crf, plan.predicted) == (0.6, 0.6, None, None)


@pytest.mark.parametrize("run", [validate, lambda *given: evaluate(*given, "weights")])
def test_masks_without_any_class_are_no_score(run):
    """Not one of 100 for predicting nothing."""
    class Empty(FakeSet):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item._replace(label_map=item.label_map // 255 * 255)

    with pytest.raises(UserError, match="split val: no pixel of a class to score"):
        run(FakeMethod(), Empty(3), config(), ALONE)


def test_fused_is_the_product_brought_to_0_1():
    item = FakeSet(1)[0]
    plan = validation_plan(config())._replace(base_size=None)
    maps = predict(FakeMethod(), item.image, item.labels, plan).maps
    product = (maps["cam"] * maps["lam"])[0]
    expected = (product - product.min()) / (product.max() - product.min() + 1e-5)
    torch.testing.assert_close(maps["fused"][0], expected)


def test_random_numbers_of_training_stay_untouched():
    before = torch.get_rng_state()
    score(FakeMethod(), FakeSet(3), K, evaluation_plan(config()), ALONE)
    assert torch.equal(before, torch.get_rng_state())


def test_each_image_has_one_thread():
    class OnOneThread(FakeMethod):
        def maps(self, images, kinds, labels):
            assert torch.get_num_threads() == 1
            return super().maps(images, kinds, labels)

    threads, dataset, plan = torch.get_num_threads(), FakeSet(7), evaluation_plan(config())
    made = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            made.append(score(OnOneThread(), dataset, K, plan, ALONE))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for row, matrix in made[0].items():
        np.testing.assert_array_equal(matrix, made[1][row])


def test_broken_weights_are_named():
    method, item = FakeMethod(), FakeSet(1)[0]
    with pytest.raises(UserError, match="image_7.*not finite"):
        predict(method, item.image * math.nan, item.labels, evaluation_plan(config()), "image_7")


def test_rows_tables_and_files(tmp_path, capsys):
    folders = [f"evaluate.save_labels={tmp_path / 'labels'}", f"evaluate.save_overlays={tmp_path / 'pictures'}"]
    settings = config("evaluate.crf=true", "evaluate.images=4", "evaluate.image_labels=predicted", *folders)
    results, dataset = tmp_path / "run" / "results.json", FakeSet(6)
    rows = evaluate(FakeMethod(), dataset, settings, ALONE, "some.weights", results)
    evaluate(FakeMethod(), dataset, settings, ALONE, "other.weights", results)
    stored = json.loads(results.read_text())
    assert stored[:6] == rows and len(stored) == 12
    assert [(row["map"], row["crf"]) for row in rows] == [(m, c) for m in ("cam", "lam", "seg") for c in (False, True)]
    assert all(list(row) == FIELDS for row in rows)
    assert [row["image_labels"] for row in rows] == ["predicted"] * 4 + [None] * 2
    assert list(rows[0]["iou"]) == ["background", *dataset.classes] and rows[0]["images"] == 4
    out = capsys.readouterr().out
    for line in (
        "CAM: voc val, 4 images, single scale (1), flip, no CRF, image labels predicted, predicted by the classifier,",
        "segmentation: voc val, 4 images, multi scale (1 1.25 1.5), flip, CRF, no image labels used, native size",
        "precision", "Summary", str(results),
    ):
        assert line in out
    item = dataset[2]
    saved = Image.open(tmp_path / "labels" / "seg" / "image_2.png")
    expected = predict(FakeMethod(), item.image, item.labels, evaluation_plan(settings)).labels["seg", False]
    assert saved.mode == "P"
    np.testing.assert_array_equal(np.array(saved), expected)
    assert len(list((tmp_path / "labels" / "lam_crf").iterdir())) == len(list((tmp_path / "pictures").iterdir())) == 4
    assert Image.open(tmp_path / "pictures" / "image_2.png").width > 7 * 150


def test_a_class_in_neither_map_is_null(tmp_path):
    class Blank(FakeMethod):
        def map(self, images, kind, plan):
            return torch.cat([torch.ones_like(images[:, :1]), torch.zeros_like(images)], 1)

    results = tmp_path / "results.json"
    evaluate(Blank(), FakeSet(2), config("evaluate.maps=[seg]"), ALONE, "w", results)
    (row,) = json.loads(results.read_text())
    assert row["iou"]["second"] is None and row["iou"]["first"] == 0.0
    assert row["miou"] == pytest.approx(row["iou"]["background"] / 3)


def test_rows_of_concurrent_evaluations_are_kept(tmp_path):
    path = tmp_path / "results.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append_results, [path] * 40, [[{"miou": index}] for index in range(40)]))
    assert sorted(row["miou"] for row in json.loads(path.read_text())) == list(range(40))


def test_an_unreadable_results_file_is_kept(tmp_path):
    path = tmp_path / "results.json"
    for content in ("[{", "{}"):
        path.write_text(content)
        append_results(path, [{"miou": 1.0}])
        assert json.loads(path.read_text()) == [{"miou": 1.0}]
    kept = sorted(p.read_text() for p in tmp_path.glob("results.json.unreadable-*"))
    assert kept == ["[{", "{}"]


def test_two_processes_score_what_one_does(tmp_path):
    alone = evaluate(FakeMethod(), FakeSet(5), config(), ALONE, "weights", tmp_path / "one")
    done = fork("tests/engine/fake_method.py", tmp_path / "two", count=2)
    assert done.returncode == 0, done.stderr
    shared = json.loads((tmp_path / "two.0").read_text())
    own = {"seconds": 0, "evaluation": None}
    assert [{**row, **own} for row in shared] == [{**row, **own} for row in alone]
    one, two = (evaluation_folder(rows, tmp_path) for rows in (alone, shared))
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {p.name: p.read_bytes() for p in two.iterdir()}
    assert one != two and len(list(one.iterdir())) == 2 + 5 * 5
    miou = repr([row["miou"] for row in alone])
    assert not (tmp_path / "two.1").exists() and done.stdout.endswith(f"{miou}\n{miou}\n")   # the second says no more


@pytest.mark.parametrize("base_size", ["null", "8"])
def test_images_of_one_size_go_together(base_size):
    """Sizes 6..11 squared: the batches change neither a score nor which image has which labels."""
    class Counting(FakeMethod):
        def maps(self, images, *rest):
            batches.append(len(images))
            return super().maps(images, *rest)

    plan, dataset = evaluation_plan(config(f"evaluate.base_size={base_size}", "evaluate.crf=true")), FakeSet(60)
    alone = score(FakeMethod(), dataset, K, plan, ALONE)
    for count in (2, 5, 60):
        batches: list[int] = []
        together = score(Counting(), dataset, K, plan, ALONE, batch_size=count)
        assert sum(batches) == 60 and 1 < max(batches) <= count
        assert alone.keys() == together.keys()
        for row, matrix in alone.items():
            np.testing.assert_array_equal(together[row], matrix, err_msg=str(row))


def test_same_size_loses_and_mixes_nothing(monkeypatch):
    monkeypatch.setattr(many, "WAITING", 1500)
    items = [FakeSet(1)[index] for index in range(200)]
    groups = list(same_size(iter(items), lambda size: 3))
    assert sorted(item.name for group in groups for item in group) == sorted(item.name for item in items)
    assert all(len({item.image.shape for item in group}) == 1 and len(group) <= 3 for group in groups)
    (shared,), (again,) = (list(same_size(items[:1], lambda size: 2)) for _ in range(2))
    assert shared[0].image.data_ptr() != again[0].image.data_ptr()   # a loader's shared memory is not held
    taken = 0

    def counted():
        nonlocal taken
        for taken, item in enumerate(items, 1):  # noqa: B007
            yield item

    given = 0
    for group in same_size(counted(), lambda size: 3):
        given += sum(item.label_map.size for item in group)
        waiting = sum(item.label_map.size for item in items[:taken]) - given
        assert waiting <= 1500 + 11 * 11   # with the image that came last


def test_more_processes_than_images():
    empty = score(FakeMethod(), FakeSet(1), K, evaluation_plan(config()), Ranks(1, 2, torch.device("cpu")))
    assert not any(matrix.any() for matrix in empty.values())
    item = FakeSet(1)[0]
    (matrix,) = score(FakeMethod(), FakeSet(1), K, evaluation_plan(config("evaluate.maps=[seg]")), ALONE).values()
    labels = np.argmax([np.full(item.label_map.shape, 0.1), *item.image.numpy()], axis=0)
    np.testing.assert_array_equal(matrix, confusion_matrix(item.label_map, labels, K + 1))


def test_unknown_maps_are_refused():
    for maps in ("[cam,mask]", "[]"):
        with pytest.raises(UserError, match=r"evaluate\.maps"):
            evaluation_plan(config(f"evaluate.maps={maps}"))


def test_classes_must_agree(tmp_path):
    noted, released, wrapped = tmp_path / "a.safetensors", tmp_path / "b.pth", tmp_path / "c.pth"
    save_file({"x": torch.zeros(1)}, noted, metadata={"meta": json.dumps({"classes": ["a", "b", "c"]})})
    rows = {"aux_classifier.weight": 9, "classifier.weight": 3, "graph_layer._fc1.0.weight": 1}
    weights = {f"module.{name}": torch.zeros(count, 2, 1, 1) for name, count in rows.items()}
    torch.save(weights, released)
    torch.save({"model_state_dict": weights}, wrapped)
    for path in (noted, released, wrapped):
        check_classes(str(path), ["a", "b", "c"])
        with pytest.raises(UserError, match=rf"{path.name} has 3 classes, the data has 20"):
            check_classes(str(path), ["x"] * 20)
    with pytest.raises(UserError, match=r"a.safetensors: class 2 is 'b', in the data 'c'"):
        check_classes(str(noted), ["a", "c", "b"])


def test_run_folder():
    assert run_folder("runs/a/checkpoints/best.weights.safetensors") == Path("runs/a")
    assert run_folder("weights/official.pth") == Path("weights")


def test_training_picture_leaves_the_mode_alone():
    images = torch.stack([FakeSet(1)[0].image[:, :6, :6]] * 3)
    batch = Batch(["a"] * 3, images, torch.eye(3), torch.ones(3, 6, 6, dtype=torch.bool), torch.arange(3))
    for training in (True, False):
        method = FakeMethod().train(training)
        picture = training_picture(method, batch, FakeSet.classes, config())
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert method.training == training
        assert not any(call[-1] for call in method.calls)


def evaluation_folder(rows: list[dict], run: Path) -> Path:
    (name,) = {row["evaluation"] for row in rows}
    return run / "evaluation" / name


def test_an_evaluation_keeps_what_a_report_shows(tmp_path):
    """Matrices and image scores by slow oracles; the best and worst images, and never one in both."""
    dataset, settings = FakeSet(7), config("evaluate.bkg=0.6", "evaluate.report_images=2")
    rows = evaluate(FakeMethod(), dataset, settings, ALONE, "w", tmp_path / "results.json")
    folder = evaluation_folder(rows, tmp_path)
    with np.load(folder / "confusion.npz") as file:
        assert file["classes"].tolist() == ["background", *dataset.classes]
        for row in rows:
            np.testing.assert_array_equal(file[row["map"]], oracle_matrix(dataset, row["map"], 0.6, given))
    content = json.loads((folder / "images.json").read_text())
    own = {}
    for index in range(len(dataset)):
        one = [dataset[index]]
        for kind in ("cam", "lam", "seg"):
            matrix = oracle_matrix(one, kind, 0.6, given)
            shares = [matrix[k, k] / (matrix[k].sum() + matrix[:, k].sum() - matrix[k, k])
                      for k in range(K + 1) if matrix[k].any()]
            own.setdefault(one[0].name, {})[kind] = pytest.approx(sum(shares) / len(shares))
    assert {entry["name"]: entry["score"] for entry in content["images"]} == own
    order = sorted(content["images"], key=lambda entry: entry["score"]["seg"])
    assert content["ranked_by"] == "seg"
    assert [shown["name"] for shown in content["worst"]] == [entry["name"] for entry in order[:2]]
    assert [shown["name"] for shown in content["best"]] == [entry["name"] for entry in order[:-3:-1]]
    for shown in (*content["best"], *content["worst"]):
        item = dataset[int(shown["name"].removeprefix("image_"))]
        assert [panel["caption"] for panel in shown["panels"]] == ["input", "mask", "CAM", "LAM", "segmentation"]
        assert set(shown["classes"].values()) >= set(np.unique(item.label_map).tolist()) - {255}
        drawn = Image.open(folder / shown["panels"][0]["file"])
        assert drawn.format == "JPEG" and drawn.size == item.label_map.shape[::-1]


def test_few_images_and_none_to_keep(tmp_path):
    class Unmarked(FakeSet):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item._replace(label_map=np.full_like(item.label_map, 255)) if index == 1 else item

    kept = evaluate(FakeMethod(), Unmarked(4), config("evaluate.maps=[seg,cam]"), ALONE, "w", tmp_path / "results.json")
    content = json.loads((evaluation_folder(kept, tmp_path) / "images.json").read_text())
    assert content["images"][1] == {"name": "image_1", "score": {"seg": None, "cam": None}}
    assert sorted(shown["name"] for shown in content["best"]) == ["image_0", "image_2", "image_3"]
    assert content["ranked_by"] == "seg" and not content["worst"]
    settings = config("evaluate.maps=[cam]", "evaluate.crf=true", "crf.iterations=1", "evaluate.report_images=0")
    none = evaluate(FakeMethod(), FakeSet(2), settings, ALONE, "w", tmp_path / "results.json")
    folder = evaluation_folder(none, tmp_path)
    content = json.loads((folder / "images.json").read_text())
    assert content["ranked_by"] == "cam_crf" and not content["best"] and not content["worst"]
    assert sorted(path.name for path in folder.iterdir()) == ["confusion.npz", "images.json"]
    assert none[0]["evaluation"] != kept[0]["evaluation"]
    alone = evaluate(FakeMethod(), FakeSet(2), settings, ALONE, "w")   # without a file of results nothing is written
    assert [row["evaluation"] for row in alone] == [None, None]


def test_equal_scores_are_ranked_by_name(tmp_path):
    class Same(FakeSet):
        def __getitem__(self, index):
            return super().__getitem__(0)._replace(name=f"image_{index}")

    for together in (1, 3):
        settings = config("evaluate.report_images=2", f"evaluate.images_at_once={together}")
        rows = evaluate(FakeMethod(), Same(8), settings, ALONE, "w", tmp_path / "results.json")
        content = json.loads((evaluation_folder(rows, tmp_path) / "images.json").read_text())
        assert [shown["name"] for shown in content["best"]] == ["image_0", "image_1"]
        assert [shown["name"] for shown in content["worst"]] == ["image_7", "image_6"]
