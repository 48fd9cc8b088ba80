"""What must be the same where a run goes on, and what may change."""

from pathlib import Path

from engine.checkpoints.files import read_meta
from engine.config import RunConfig, load_settings, portable
from utils.config import flatten, shown
from utils.errors import UserError

# keys and sections; another length is another schedule: the rates would have fallen otherwise
MAY_CHANGE = (
    "output", "tag", "data.workers", "data.on_error", "data.max_errors", "train.log_every", "train.picture_every",
    "train.checkpoint_every", "train.keep_checkpoints", "train.validate_every", "train.validate_images",
    "train.compile", "train.timeout", "train.on_nonfinite", "train.max_nonfinite", "evaluate.", "crf.",
)


def check_same_run(weights: Path, config: RunConfig, images: dict, masks: str | None = None) -> str:
    """The settings that changed since the run wrote `weights`, in words; UserError where they make it another run.

    images: count and sha256 of the names of those trained on. masks: sha256 of those learned from, None for none. Files
    are compared by their last name.
    """
    meta = read_meta(weights)
    before = load_settings(meta["settings"], str(weights)) if "settings" in meta else config
    old, new = (
        {**flatten(portable(one)), "model.normalize": "timm" if one.model.timm_statistics else "imagenet"}
        for one in (before, config)
    )
    ours, theirs = ({name: str(value).rpartition("/")[2] for name, value in one.items()} for one in (new, old))
    names = [name for name in {**new, **old} if ours.get(name) != theirs.get(name)]
    changed = {name: f"{name} = {shown(new.get(name))}, was {shown(old.get(name))}" for name in names}
    refused = [words for name, words in changed.items() if not name.startswith(MAY_CHANGE)]
    if (own := meta.get("train_images", images)) != images:
        refused.append(f"{images['count']} training images of another list, were {own['count']}")
    if meta.get("train_masks", masks) != masks:
        refused.append("data.masks holds other masks, or irn's maps are cut at another evaluate.bkg")
    if refused:
        words = "; ".join(refused[:5])   # another method differs in many
        raise UserError(f"{weights}: the run had other settings: {words}: give its own, or another tag")
    return "; ".join(changed.values())
