"""Mutations of saved folders, at a small scale; all of them are in benchmarks/attack."""

from benchmarks.attack import folders, mutations


def test_a_folder_loads_as_what_was_saved_or_is_refused_within_bounds():
    bombs = [mutations.bomb_of_zeros, mutations.bomb_of_prompts_that_share]
    rows = folders.run(0.006, 1, [*mutations.MUTATIONS, *bombs])
    assert sum(row["tried"] for row in rows) == 2 * 14 + 3 * 2
    for row in rows:
        assert row["silently another"] == row["beyond bounds"] == 0, row
        assert row["as saved"] + row["refused"] == row["tried"] or row["mutation"].startswith("bomb"), row
        assert row["other"] in ("", "3 loaded"), row
