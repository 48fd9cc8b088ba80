"""engine/alike.py and main_first, with what other processes say given by the test."""

import pytest

from datasets import build_val_set
from engine import alike, distributed
from engine.config import load_config
from utils.errors import UserError


def other_says(monkeypatch, **facts):
    monkeypatch.setattr(alike, "gather", lambda own: [own, ("node2", {**own[1], **facts})])


def test_other_data_on_another_node_is_named(monkeypatch, tiny_voc):
    facts = build_val_set(load_config("more_voc", [f"data.root={tiny_voc}"])).facts()
    assert set(facts) == {"images", "classes", "image labels"} and len(set(facts.values())) == 3
    other_says(monkeypatch)
    alike.check_same(facts)
    other_says(monkeypatch, images="7 (sha256 0)")
    words = r"nodes: images: rank 0 \(.*\) has 4 \(sha256 \w{12}\), rank 1 \(node2\) has 7 \(sha256 0\); give"
    with pytest.raises(UserError, match=words):
        alike.check_same(facts)


def test_files_that_a_process_misses_are_named(monkeypatch):
    monkeypatch.setattr(alike, "gather", lambda own: [own, ("node2", ["b", "d"])])
    with pytest.raises(UserError, match=r"^masks: rank 1 \(node2\) misses 2 of 4 files, as b, d: all nodes must share"):
        alike.check_all_there([], 4, "masks")


def test_the_content_of_a_file_is_compared_over_nodes_alone(monkeypatch, tmp_path):
    file = tmp_path / "a"
    file.write_text("weights")
    other_says(monkeypatch, **{f"the content of {file}": "0123"})
    alike.check_same_file(str(file))
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the content of .*a: rank 0 .* rank 1 .node2. has 0123"):
        alike.check_same_file(str(file))


@pytest.mark.parametrize(("main", "local_rank", "before"), [(True, "0", 0), (False, "0", 1), (False, "1", 2)])
def test_the_first_of_every_node_goes_before_the_others_there(monkeypatch, main, local_rank, before):
    barriers = []
    monkeypatch.setattr(distributed, "is_main", lambda: main)
    monkeypatch.setattr(distributed, "barrier", lambda: barriers.append(1))
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with distributed.main_first():
        assert len(barriers) == before
    assert len(barriers) == 2
