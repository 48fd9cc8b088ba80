"""Makes the start weights of the demo: a small ViT that learned image-level labels of generated shapes.

    PYTHONPATH=. python weights/make_vit_shapes.py FIRST
    PYTHONPATH=. python weights/make_vit_shapes.py OUT --start FIRST --top 4 --area 1 --iterations 500 --lr 5e-4

The counterpart of ImageNet weights for `data.name=shapes`: the images come from another seed than any the demo uses,
and only the labels of whole images are read, no mask. The second call teaches where the evidence lies: a present class
needs several patches that show it, and at least half of the patches show none. README.md beside this file has the calls
that made the shipped weights.
"""

import argparse
import math
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from datasets import shapes
from datasets.labels import labels_of_mask
from engine.config import load_config
from model.multi_scale import resize
from utils.images import MEAN, STD
from utils.progress import progress_bar

SEED = 1_000_003            # of the images; the demo's are drawn from data.shapes.seed
DRAWN, CROP = 112, 80       # pixels: of a drawn image, of what the network sees


def images_and_labels(count: int) -> tuple[Tensor, Tensor]:
    """uint8 (count, 3, DRAWN, DRAWN) and multi-hot float (count, 6)."""
    images = torch.empty(count, 3, DRAWN, DRAWN, dtype=torch.uint8)
    labels = torch.empty(count, len(shapes.CLASSES))
    for index in progress_bar(range(count), "draw"):
        image, label_map = shapes.draw(SEED, "train", index, DRAWN)
        images[index] = torch.from_numpy(image).permute(2, 0, 1)
        labels[index] = labels_of_mask(label_map, len(shapes.CLASSES))
    return images, labels


class Classifier(nn.Module):
    """Images of values 0..255 -> class logits of the class token (B, 6) and of every patch (B, N, 6).

    `vit` is the backbone of configs/more_shapes.yaml.
    """

    def __init__(self) -> None:
        super().__init__()
        model = load_config("more_shapes", []).model
        self.vit = timm.create_model(model.backbone, num_classes=0, **model.backbone_args)
        self.of_token = nn.Linear(self.vit.embed_dim, len(shapes.CLASSES))
        self.of_patches = nn.Linear(self.vit.embed_dim, len(shapes.CLASSES))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.vit.forward_features(v2.functional.normalize(images.float() / 255, list(MEAN), list(STD)))
        return self.of_token(tokens[:, 0]), self.of_patches(tokens[:, 1:])


def random_crops(images: Tensor, count: int) -> tuple[Tensor, list[int]]:
    """uint8 (count, 3, CROP, CROP), cut at random, turned by quarters, mirrored or not; and the images' numbers."""
    crop, chosen = v2.RandomResizedCrop(CROP, scale=(0.4, 1.0), antialias=True), torch.randint(len(images), (count,))
    turned = [torch.rot90(crop(images[i]), int(torch.randint(4, ())), (1, 2)) for i in chosen.tolist()]
    crops = torch.stack(turned)
    return crops.flip(-1) if torch.rand(()) < 0.5 else crops, chosen.tolist()


def loss_terms(of_token: Tensor, of_patches: Tensor, labels: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classification by the token, by the mean of each class's `top` largest patches; logits of the lower half of its
    patches against 0: an object covers half of an image at most.
    """
    ranked = of_patches.sort(dim=1, descending=True).values
    lower = ranked[:, ranked.shape[1] // 2 :]
    classify = F.multilabel_soft_margin_loss
    return classify(of_token, labels), classify(ranked[:, :top].mean(1), labels), F.softplus(lower).mean()


def train(
    model: Classifier, images: Tensor, labels: Tensor, iterations: int, batch: int, lr: float, top: int, area: float
) -> None:
    """AdamW with a linear warm-up and a cosine; random crops, flips, quarter turns. area: weight of the last term."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    warmup = iterations // 10
    bar = progress_bar(range(iterations), "train")
    for step in bar:
        share = (step - warmup) / max(iterations - warmup, 1)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        crops, chosen = random_crops(images, batch)
        token, patches, lower = loss_terms(*model(crops), labels[chosen], top)
        loss = token + patches + area * lower
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(token=f"{token.item():.3f}", patches=f"{patches.item():.3f}", lower=f"{lower.item():.3f}")


@torch.no_grad()
def accuracy(model: Classifier, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of right yes/no answers about a class, from the class token and from the patches."""
    model.eval()
    of_token, of_patches = model(resize(images.float(), (CROP, CROP)))
    return tuple(float(((x > 0) == (labels > 0)).float().mean()) for x in (of_token, of_patches.amax(1)))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("out", type=Path)
    arguments.add_argument("--images", type=int, default=8000)
    arguments.add_argument("--iterations", type=int, default=1200)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--start", type=Path, help="weights to start from, made by this script")
    arguments.add_argument("--top", type=int, default=1, help="patches a present class needs")
    arguments.add_argument("--area", type=float, default=0.0, help="weight of the term on bare patches")
    arguments = arguments.parse_args()
    torch.manual_seed(0)
    held_out = max(arguments.images // 16, 1)
    images, labels = images_and_labels(arguments.images + held_out)
    model = Classifier()
    if arguments.start:
        model.vit.load_state_dict(load_file(arguments.start))
    settings = {name: getattr(arguments, name) for name in ("iterations", "batch", "lr", "top", "area")}
    train(model, images[held_out:], labels[held_out:], **settings)
    token, patches = accuracy(model, images[:held_out], labels[:held_out])
    print(f"{held_out} held-out images, right answers a class: class token {token:.3f}, patches {patches:.3f}")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.vit.state_dict().items()}
    save_file(weights, arguments.out, metadata={"held_out_accuracy_of_patches": f"{patches:.4f}"})
    print(arguments.out)


if __name__ == "__main__":
    main()
