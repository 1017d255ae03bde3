"""How good dictionaries are: ITDAs, baselines and trained SAEs on the same models, text, size and L0."""
