"""A method over many images: batches of one size, several at once in threads."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from datasets import EvalItem
from engine.inference.batch import Prediction, evaluation_mode, predict_batch
from engine.inference.plan import Plan
from model.method import Method

GPU_BATCH, GPU_PIXELS = 8, 2_000_000   # of the images that a GPU computes together: the number, and at most so many
WAITING = 8


@contextmanager
def over_images(
    method: Method, items: Iterable[EvalItem], plan: Plan, device: torch.device,
    then: Callable[[EvalItem, Prediction], Any], batch_size: int | None = None, at_once: int | None = None,
) -> Iterator[Iterator[Any]]:
    """Gives an iterator of then(item, prediction), which threads call while the device computes further batches.

    items: with `name`, `image` (3, H, W) and `labels` (K,), None where the plan predicts them. batch_size: how many
    images of one size go through the method together; None: 1 on a CPU, on a GPU 8, fewer of large images. at_once: see
    `image_threads`.
    """
    def together(size: torch.Size) -> int:
        by_pixels = GPU_PIXELS // (size[-2] * size[-1]) if device.type == "cuda" else 1
        return batch_size or max(1, min(GPU_BATCH, by_pixels))

    def computed(group: list[EvalItem]) -> list:
        images = torch.stack([item.image for item in group]).to(device)
        predictions = predict_batch(method, images, _labels(group, device), plan, [item.name for item in group])
        return [then(item, prediction) for item, prediction in zip(group, predictions, strict=True)]

    with evaluation_mode(method), image_threads(device, at_once) as threads:
        yield itertools.chain.from_iterable(in_threads(computed, same_size(items, together), threads, device))


def same_size(items: Iterable[EvalItem], together: Callable[[torch.Size], int]) -> Iterator[list[EvalItem]]:
    """The items in lists of up to together(size) images of one size. At most WAITING such lists wait for company."""
    waiting: dict[torch.Size, list[EvalItem]] = {}
    for item in items:
        group = waiting.setdefault(item.image.shape, [])
        group.append(item)
        if len(group) == together(item.image.shape):
            yield waiting.pop(item.image.shape)
        elif sum(len(group) / together(size) for size, group in waiting.items()) > WAITING:
            yield waiting.pop(max(waiting, key=lambda size: len(waiting[size])))
    yield from waiting.values()


@contextmanager
def image_threads(device: torch.device, at_once: int | None = None) -> Iterator[int]:
    """How many batches to compute at once: on a CPU one for each of torch's threads, which has one thread meanwhile;
    on a GPU two, so that it need not wait while labels are brought back and counted. at_once: 1 for one batch after
    the other, with all threads."""
    if at_once == 1 or device.type != "cpu":
        yield at_once or 2
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_threads(function: Callable, items: Iterable, threads: int, device: torch.device) -> Iterator:
    """map(function, items) in order, on that many threads; items are taken only as they are needed."""
    if threads == 1:
        yield from map(function, items)
        return
    on_cpu = device.type == "cpu"
    begin, given = (torch.set_num_threads, 1) if on_cpu else (torch.cuda.set_device, device)   # each thread's own
    with ThreadPoolExecutor(threads, initializer=begin, initargs=(given,)) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def as_is(item: Any) -> Any:
    """The collate function of a loader whose items stay single."""
    return item


def _labels(group: list[EvalItem], device: torch.device) -> Tensor | None:
    if any(item.labels is None for item in group):
        return None
    return torch.stack([item.labels for item in group]).to(device)
