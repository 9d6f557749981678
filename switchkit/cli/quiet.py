"""What libraries say that a user of the command line can do nothing about."""

from __future__ import annotations

import logging
import warnings

__all__ = ["quiet"]


def quiet(command: str) -> None:
    """Drop advertisements, and warnings that a user of the command line can do nothing about."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        # Of generated text a box tells.
        lambda record: (
            not record.getMessage().startswith(("💡 Tip", "GPU available", "TPU available", "Generated text: "))
        )
    )
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    # Rows are logged by optimizer steps, over the ends of epochs.
    warnings.filterwarnings("ignore", message=r"The number of training batches .* is smaller than the logging interval")
    if command != "fit":
        # Saving is nothing that a test run does.
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks used to create")
