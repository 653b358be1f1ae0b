"""The checkpoints of a training run: which a folder holds, and a prefix read back from one."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from prefix_tuning.prefix import Prefix

logger = logging.getLogger(__name__)


def checkpoints(folder: Path) -> list[Path]:
    """Those that Trainer names by their step, in the order of the steps; a copy by another name (checkpoint-best) is none."""
    named = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(named, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def last_checkpoint(folder: Path) -> str:
    """That with the most steps among those that have what Trainer writes last."""
    whole = [path for path in checkpoints(folder) if (path / TRAINER_STATE_NAME).is_file()]
    if not whole:
        raise ValueError(f"resume_from_checkpoint: expected a whole checkpoint, got none in {folder}")
    return str(whole[-1])


def load_checkpoint(prefix: Prefix, folder: str) -> None:
    """Reads the parameters of `prefix` from a checkpoint; ValueError where it holds a prefix of another kind or size."""
    if not Path(folder).is_dir():
        raise ValueError(f"resume_from_checkpoint: expected a folder, got {folder}")
    saved = Prefix.load(folder)
    if saved.base_model and Path(saved.base_model).name != Path(prefix.base_model).name:
        logger.warning(
            f"resume_from_checkpoint: the prefix in {folder} was trained for the model {saved.base_model}, this one is for "
            f"{prefix.base_model}"
        )
    kinds = ["with" if p.reparametrization is not None else "without" for p in (prefix, saved)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"resume_from_checkpoint: expected a prefix {kinds[0]} a reparametrisation as the one that is trained, got one "
            f"{kinds[1]} in {folder}"
        )
    expected, found = _sizes(prefix), _sizes(saved)
    wrong = next((name for name in expected | found if expected.get(name) != found.get(name)), None)
    if wrong is not None:
        raise ValueError(
            f"resume_from_checkpoint: {wrong}: expected {expected.get(wrong, 'no such tensor')} as in the prefix that is "
            f"trained, got {found.get(wrong, 'none')} in {folder}"
        )
    prefix.load_state_dict(saved.state_dict())


def _sizes(prefix: Prefix) -> dict[str, Any]:
    """What two prefixes must agree on for one to be loaded into the other."""
    sizes = {"prefix_len": prefix.prefix_len, "position_offset": prefix.position_offset}
    return sizes | {name: list(tensor.shape) for name, tensor in prefix.state_dict().items()}
