"""Go on training an embedded model on other text, to have two models to compare."""

import torch
from datasets import Dataset
from sae_lens import HookedSAETransformer

from itda_lens.embedded.models import model
from itda_lens.streams import token_batches


def fine_tuned(
    text: Dataset, *, seed: int = 0, steps: int = 200, batch_size: int = 8, rate: float = 1e-3, order: int = 0
) -> HookedSAETransformer:
    """The embedded model of a seed, trained further on a text: about half a minute for 200 steps on one core.

    Args:
        text: documents with a column `text`.
        seed: of the embedded model.
        steps: of AdamW, the rate falling to zero in a straight line.
        batch_size: rows of 128 tokens in a step.
        rate: the learning rate at the start.
        order: seeds which rows are drawn.

    Example:
        >>> from itda_lens.embedded import dataset
        >>> fine_tuned(dataset("heldout"), steps=1).cfg.model_name
        'itda-embedded-seed0-tuned'
    """
    tuned = model(seed)
    tuned.cfg.model_name += "-tuned"
    context = tuned.cfg.n_ctx
    rows = torch.cat([tokens for tokens, _ in token_batches(tuned, text, context_size=context, batch_size=64)])
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    generator = torch.Generator().manual_seed(order)
    with torch.enable_grad():
        for _ in range(steps):
            batch = rows[torch.randint(len(rows), (batch_size,), generator=generator)]
            tuned(batch, return_type="loss").backward()
            torch.nn.utils.clip_grad_norm_(tuned.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
    return tuned
