"""A method over many images: batches of one size, several at once in threads; others write."""

import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import EvalItem
from engine.inference.batch import Prediction, evaluation_mode, predict_batch
from engine.inference.plan import Plan
from model.method import Method
from utils.errors import UserError

GPU_BATCH, GPU_PIXELS = 8, 2_000_000   # of the images that a GPU computes together: the number, and at most so many
WAITING = 1 << 26                      # pixels of the images that wait for others of their size: 0.8 GB
Take = Callable[[list[EvalItem], list[Prediction]], list]


def labels_alone(items: list[EvalItem], predictions: list[Prediction]) -> list[Prediction]:
    """Takes the predictions without their maps."""
    return [prediction._replace(maps={}) for prediction in predictions]


@contextmanager
def over_images(
    method: Method, items: Iterable[EvalItem], plan: Plan, device: torch.device, then: Callable[[EvalItem, Any], Any],
    batch_size: int | None = None, at_once: int | None = None, take: Take = labels_alone,
) -> Iterator[Iterator[Any]]:
    """Gives an iterator of then(item, taken), in threads while the device computes further batches.

    items: with `name`, `image` (3, H, W) and `labels` (K,), None where the plan predicts them. batch_size: how many
    images of one size go through the method together; None: 1 on a CPU, on a GPU 8, fewer of large images. at_once: see
    `image_threads`. take: what becomes of a batch's predictions in the thread that computes them; nothing of it may lie
    on the device, as on a GPU `then` is called by threads of another pool.
    """
    def together(size: torch.Size) -> int:
        by_pixels = GPU_PIXELS // (size[-2] * size[-1]) if device.type == "cuda" else 1
        return batch_size or max(1, min(GPU_BATCH, by_pixels))

    def computed(group: list[EvalItem]) -> list[tuple[EvalItem, Any]]:
        labels = None if any(item.labels is None for item in group) else [item.labels for item in group]
        given = _together([item.image for item in group], device), labels and _together(labels, device)
        predictions = predict_batch(method, *given, plan, [item.name for item in group])
        return list(zip(group, take(group, predictions), strict=True))

    with evaluation_mode(method), image_threads(device, at_once) as threads:
        writers, begin = 0, (torch.set_num_threads, 1)
        if device.type != "cpu":
            torch.cuda.synchronize(device)   # the weights are there for every stream
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            writers, begin = max(2, min(8, cores // 2)), (_own_stream, device)
        lists = same_size(items, together)
        results = in_pools(InParts(computed, threads), lambda pair: then(*pair), lists, threads, writers, begin)
        with closing(results):
            yield results


def same_size(items: Iterable[EvalItem], together: Callable[[torch.Size], int]) -> Iterator[list[EvalItem]]:
    """The items in lists of up to together(size) images of one size.

    Where more than WAITING pixels wait for company, that list goes whose last image came first. Images that wait are
    copied out of the shared memory, and the open files, of a loader's workers.
    """
    waiting: dict[torch.Size, list[EvalItem]] = {}
    pixels = 0
    for item in items:
        size = item.image.shape
        if together(size) == 1:
            yield [item]
            continue
        tensors = {name: value.clone() for name, value in item._asdict().items() if isinstance(value, Tensor)}
        waiting[size] = [*waiting.pop(size, []), item._replace(**tensors)]
        pixels += size[-2] * size[-1]
        full = [size] if len(waiting[size]) == together(size) else []
        while full or pixels > WAITING:
            group = waiting.pop(full.pop() if full else next(iter(waiting)))
            pixels -= len(group) * group[0].image[0].numel()
            yield group
    yield from waiting.values()


class InParts:
    """Calls compute(items) on as many of a list at a time as the device has memory for, which running out of it shows.

    threads: that call this.
    """

    def __init__(self, compute: Callable[[list[EvalItem]], list], threads: int) -> None:
        self.compute, self.threads = compute, threads
        self.fits: dict[int, int] = {}   # images at once, by the pixels of the smallest that did not fit
        self.places, self.alone = threading.Semaphore(threads), threading.Lock()

    def __call__(self, items: list[EvalItem]) -> list:
        """Raises UserError, naming the image, where one by itself does not fit."""
        (height, width), done, alone = items[0].image.shape[-2:], [], False
        while len(done) < len(items):
            fits = [count for pixels, count in [*self.fits.items()] if height * width >= pixels]
            part = items[len(done) :][: min(fits, default=len(items))]
            results = self._tried(part, alone)
            if results is not None:
                done += results
                continue
            torch.cuda.empty_cache()
            if len(part) > 1:
                self.fits[height * width] = fewer = len(part) // 2
                text = f"{len(part)} images of {width}x{height} are too many for the GPU's memory: {fewer} at once"
                tqdm.write(text, file=sys.stderr)
            elif alone:
                raise UserError(
                    f"{part[0].name}: {width}x{height} pixels are too many for the GPU's memory; give a smaller "
                    "evaluate.base_size or evaluate.long_side, evaluate.multi_scale=false or evaluate.flip=false"
                )
            alone = True
        return done

    def _tried(self, items: list[EvalItem], alone: bool) -> list | None:
        """None where memory ran out. alone: while no other thread computes."""
        with ExitStack() as stack:
            for place in [self.alone, *[self.places] * self.threads] if alone else [self.places]:
                stack.enter_context(place)
            try:
                return self.compute(items)
            except torch.OutOfMemoryError:   # whose traceback keeps tensors: it ends here
                return None


@contextmanager
def image_threads(device: torch.device, at_once: int | None = None) -> Iterator[int]:
    """How many batches to compute at once: on a CPU one for each of torch's threads, which has one thread meanwhile;
    on a GPU two, so that it need not wait while labels are brought back. at_once: 1 for one batch after the other, with
    all threads."""
    if at_once == 1 or device.type != "cpu":
        yield at_once or 2
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def in_pools(
    compute: Callable[[list], list], write: Callable, lists: Iterable[list], threads: int, writers: int, begin: tuple
) -> Iterator:
    """Of every list the results of write(x), for x in compute(list), in order. begin: as `in_threads` takes it.

    writers: threads that write, beside those that compute; these write themselves where it is 0. So many results wait
    at most for a writer, beside those of the last lists.
    """
    def both(items: list) -> list:
        return [write(made) for made in compute(items)]

    with closing(in_threads(compute if writers else both, lists, threads, begin)) as made:
        single = itertools.chain.from_iterable(made)
        if not writers:
            yield from single
            return
        with closing(in_threads(write, single, writers, (torch.set_num_threads, 1))) as written:
            yield from written


def in_threads(function: Callable, items: Iterable, threads: int, begin: tuple) -> Iterator:
    """map(function, items) in order, on that many threads; items are taken only as they are needed.

    begin: a function and its argument, called first in every thread. One thread alone is the caller's.
    """
    if threads == 1:
        yield from map(function, items)
        return
    pool, waiting = ThreadPoolExecutor(threads, initializer=begin[0], initargs=begin[1:]), deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def as_is(item: Any) -> Any:
    """The collate function of a loader whose items stay single."""
    return item


def _together(tensors: list[Tensor], device: torch.device) -> Tensor:
    """One tensor on the device, for which the host does not wait."""
    pinned = torch.empty(len(tensors), *tensors[0].shape, dtype=tensors[0].dtype, pin_memory=device.type == "cuda")
    return torch.stack(tensors, out=pinned).to(device, non_blocking=True)


def _own_stream(device: torch.device) -> None:
    """From here on what this thread gives to the GPU waits for no other thread's work."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream(device))
