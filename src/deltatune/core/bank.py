"""Banks: tensors that one adapter keeps once for all its sites.

Shared projections (VeRA, RandLoRA), one trained vector for a whole model (Intrinsic SAID), a pool of vectors. They
live on the root of the model, `<root>.<tensor>.<adapter>`, and in files under `base_model.<tensor>`. A site's edit
holds the bank and reads `bank.<slot>.weight` when it runs: a tensor that several modules registered would be refused
by FSDP2 as a parameter and would become several tensors under `.to()` as a buffer.

A configuration with shared tensors gives its bank in `TargetedConfig.bank` and its edits in `build_shared`.
"""

from __future__ import annotations

from torch import nn

from deltatune.core.edits import Edit

#: where files keep what belongs to no module of the model
FILE_PATH = "base_model"


class Bank(Edit):
    """The shared tensors of one adapter, declared with `self.tensor(...)`; never called itself."""

    def place_on(self, root: nn.Module, adapter: str) -> None:
        """Registers the tensors under the model itself."""
        self.place(root, root, FILE_PATH, adapter)
