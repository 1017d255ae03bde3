"""How good dictionaries are: ITDAs, baselines and trained SAEs on the same models, text, size and L0."""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before sae_lens is imported
