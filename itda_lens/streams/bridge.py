"""A bridge whose hooks stay alive when an SAE is removed from it."""

from typing import Any

from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

from itda_lens.streams.state import mend_hooks


class LastingBridge(SAETransformerBridge):
    """A `SAETransformerBridge` that is as it was after `run_with_saes`.

    SAELens puts a hook point without its own name where the SAE was, so that later hooks there would never run.
    """

    def _reset_sae(self, *args: Any, **kwargs: Any) -> None:
        super()._reset_sae(*args, **kwargs)
        mend_hooks(self)
