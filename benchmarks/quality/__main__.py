"""The whole quality benchmark; what an earlier run has left in `benchmarks/cache` is not done again.

    nice -n 19 python -m benchmarks.quality

It needs the folder `../shared` with models and text. From nothing it takes some hours on two cores, nearly all of them
for training the SAEs that ITDAs are compared with. Figures and plots go to `benchmarks/results`.
"""

from benchmarks.quality import dictionaries, opponents, stability, summary, synthetic

if __name__ == "__main__":
    opponents.run()
    dictionaries.run()
    synthetic.run()
    stability.run()
    summary.run(to_file=True)
