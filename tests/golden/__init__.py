"""Golden references: stored results of today's code, to compare a refactoring with.

  python -m tests.golden BASE_COMMIT           train in this working tree and in the commit's, and compare
  python -m tests.golden BASE_COMMIT --close   for changed operations: losses to 1e-6, gradients to 1e-5
  python -m tests.golden --write               store references.json again, after an intended change

`references.json` holds the results that are the same on every machine; tests/test_golden.py compares them.
Losses differ between CPUs, so they are compared on one machine, commit against commit.
"""
