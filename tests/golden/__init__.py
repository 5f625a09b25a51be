"""Golden references: what the code computes today, stored, so that a refactoring can be held against it.

  python -m tests.golden BASE_COMMIT           train both working trees, this one and the commit's, and compare
  python -m tests.golden BASE_COMMIT --close   the same for changed operations: losses to 1e-6, gradients to 1e-5
  python -m tests.golden --write               store references.json again, after a change that was meant

`references.json` holds what is the same on every machine; tests/test_golden.py compares. Losses differ between CPUs, so
they are compared on one machine, commit against commit.
"""
