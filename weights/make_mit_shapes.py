"""Makes the start weights of AFA's demo: a small Mix Transformer that learned the features of MoRe's.

    PYTHONPATH=. python weights/make_mit_shapes.py OUT

The images are those of make_vit_shapes.py: shapes from a seed that no data set uses; neither their labels nor masks are
read here. The student is the backbone of configs/afa_shapes.yaml; of random crops its last two stages learn the
standardised patch tokens of vit_shapes.safetensors, of the third block and of the last, whose grid they share.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from engine.config import load_config
from model.backbones.mit import MixTransformer, official_name
from utils.images import MEAN, STD
from utils.progress import progress_bar
from weights.make_vit_shapes import Classifier, images_and_labels, random_crops

TEACHER, BLOCK = Path(__file__).parent / "vit_shapes.safetensors", 2


class Teacher(nn.Module):
    """Normalised images -> standardised patch tokens (B, N, D) of block BLOCK and of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = Classifier().vit.eval()
        self.vit.load_state_dict(load_file(TEACHER))

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        last, (middle,) = self.vit.forward_intermediates(images, [BLOCK], norm=False, output_fmt="NLC")
        both = middle, last[:, self.vit.num_prefix_tokens :]
        return [F.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x) for x in both]


class Student(nn.Module):
    """Normalised images -> what the last two stages say of the teacher's tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        model = load_config("afa_shapes", []).model
        self.mit = MixTransformer(model.backbone, model.backbone_args, model.strides, drop_path=0)
        self.to_teacher = nn.ModuleList(nn.Linear(count, width) for count in self.mit.channels[-2:])

    def forward(self, images: Tensor) -> list[Tensor]:
        stages = self.mit(images).stages[-2:]
        return [layer(x.flatten(2).transpose(1, 2)) for layer, x in zip(self.to_teacher, stages, strict=True)]


def set_rate(optimizer: torch.optim.Optimizer, lr: float, step: int, iterations: int) -> None:
    """A linear warm-up over a twentieth of the iterations, then a cosine."""
    warmup = iterations // 20 + 1
    factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * step / iterations))
    for group in optimizer.param_groups:
        group["lr"] = lr * factor


def save(mit: MixTransformer, path: Path) -> None:
    """In float16, under the names of SegFormer's authors; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({official_name(name): value.half().contiguous() for name, value in mit.state_dict().items()}, path)


def train(student: Student, teacher: Teacher, images: Tensor, iterations: int, batch: int, lr: float) -> float:
    """AdamW with a linear warm-up and a cosine; random crops, flips, quarter turns.

    Returns the share of the teacher's variance that is missed, of both stages together and lately.
    """
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.02)
    bar, mean = progress_bar(range(iterations), "train"), 0.0
    for step in bar:
        set_rate(optimizer, lr, step, iterations)
        crops, _ = random_crops(images, batch)
        crops = v2.functional.normalize(crops.float() / 255, list(MEAN), list(STD))
        loss = sum(F.mse_loss(*pair) for pair in zip(student(crops), teacher(crops), strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = 0.98 * mean + 0.02 * loss.item() if step else loss.item()
        bar.set_postfix(missed=f"{mean / 2:.3f}")
    return mean / 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--images", type=int, default=6000)
    arguments.add_argument("--iterations", type=int, default=1000)
    arguments.add_argument("--batch", type=int, default=32)
    arguments.add_argument("--lr", type=float, default=2e-3)
    arguments = arguments.parse_args()
    torch.manual_seed(0)
    images, _ = images_and_labels(arguments.images)
    teacher = Teacher()
    student = Student(teacher.vit.embed_dim)
    missed = train(student, teacher, images, arguments.iterations, arguments.batch, arguments.lr)
    print(f"share of the teacher's variance that is missed: {missed:.3f}")
    save(student.mit, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    main()
