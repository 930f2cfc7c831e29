"""Taking over published weights: names compared strictly, differences listed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from avzero.errors import UserError

_LISTED = 6


def load_strictly(
    model: nn.Module,
    title: str,
    state: Mapping[str, Tensor],
    rename: Callable[[str], str | None] = lambda key: key,
) -> None:
    """Load a reference state dict whose every key must find its place and every place its key.

    Args:
        model: the system.
        title: its name in messages.
        state: the reference's tensors; a leading ``module.`` and BatchNorm's step counters are
            ignored. A 4-d kernel of size 1x1, or 3-d of size 1, is taken as the matrix it is.
        rename: from the reference's key to ours; None drops it.

    Raises:
        UserError: keys missing, left over, of another shape, or not floating where ours are.
    """
    ours = model.state_dict()
    theirs: dict[str, Tensor] = {}
    for key, value in state.items():
        bare = key.removeprefix("module.")
        target = None if bare.endswith("num_batches_tracked") else rename(bare)
        if target is not None:
            theirs[target] = value
    problems = []
    for verb, names in (("missing", ours.keys() - theirs.keys()), ("extra", theirs.keys() - ours)):
        if names:
            shown = ", ".join(sorted(names)[:_LISTED])
            more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
            problems.append(f"{verb}: {shown}{more}")
    unlike = []
    for key in sorted(ours.keys() & theirs.keys()):
        value = theirs[key]
        if value.dim() > ours[key].dim() and value.numel() == ours[key].numel():
            theirs[key] = value = value.reshape(ours[key].shape)
        if value.shape != ours[key].shape:
            unlike.append(f"{key} is {list(value.shape)}, expected {list(ours[key].shape)}")
        elif ours[key].is_floating_point() and not value.is_floating_point():
            # Copying would cast without a word: the imaginary part lost, int8 without its scale.
            kinds = (str(kind).removeprefix("torch.") for kind in (value.dtype, ours[key].dtype))
            unlike.append(f"{key} is {', expected '.join(kinds)}")
    rest = [f"{len(unlike) - _LISTED} more of another shape or type"]
    problems += unlike[:_LISTED] + (rest if len(unlike) > _LISTED else [])
    if problems:
        raise UserError(
            f"not a checkpoint of {title} with these settings: {'; '.join(problems)}. "
            "Set the hyperparameters it was trained with, and choose its feature set"
        )
    model.load_state_dict(theirs)
