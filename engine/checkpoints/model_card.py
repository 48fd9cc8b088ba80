"""The model card of a released run."""

from engine.checkpoints.opening import SUMS, Opened
from engine.evaluation.results import title

CARD = """# {name}

Weakly supervised semantic segmentation, learned from image-level labels.

| | |
|---|---|
{facts}

Classes: {classes}.

## Results

Shares of 100, mIoU over the classes present.

{results}

## Use

In a checkout of the project's code:

```bash
bash run_evaluate_voc.sh cpu 1 {name}.safetensors data.root=FOLDER
```

```python
from engine.checkpoints.opening import open_checkpoint

method, classes, config, _ = open_checkpoint("{name}.safetensors")
```

`sha256sum -c {sums}` checks the files.

## Provenance

{provenance}
"""


def model_card(name: str, opened: Opened, meta: dict, rows: list[dict], starts: list[dict]) -> str:
    """The model card, as Markdown. meta: of the weights' header. rows: of results.json. starts: of provenance.jsonl."""
    config, data, train = opened.config, opened.config.data, opened.config.train
    length = meta.get("iterations", train.iterations)   # older files do not say it
    facts = {
        "method": config.method,
        "backbone": f"{config.model.backbone}, started from {config.model.weights}",
        "data": f"{data.name} {data.train_split}, image-level labels, crops of {data.crop_size} pixels",
        "training": f"{length} iterations, batch {train.batch_size}, rate {train.lr:g}, {train.precision}",
        "these weights": f"iteration {meta.get('iteration', 'unknown')}, seed {config.seed}",
    }
    if "val" in meta:
        facts["validation in training"] = ", ".join(f"{kind} {_percent(value)}" for kind, value in meta["val"].items())
    scores = ["| mIoU | pixel accuracy | of |", "|---|---|---|"]
    scores += [f"| {_percent(row['miou'])} | {_percent(row['pixel_accuracy'])} | {title(row)} |" for row in rows]
    return CARD.format(
        name=name, facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        results="\n".join(scores) if rows else "These weights were not scored.", sums=SUMS,
        classes=", ".join(opened.classes), provenance="\n".join(_provenance(starts)) or "Not recorded.",
    )


def _provenance(starts: list[dict]) -> list[str]:
    lines = []
    for start in starts:
        changed = ", with changes" if start["changed"] else ""
        command = " ".join(["python", *start["command"][1:]])
        versions = ", ".join(f"{package} {version}" for package, version in start["versions"].items() if version)
        lines += [f"- {start['time']}, commit {start['commit'] or 'unknown'}{changed}, {versions}", f"  `{command}`"]
    return lines


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
