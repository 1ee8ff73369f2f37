"""What each GPU kernel should take on an H100, on paper, to be held against measurements.

Nothing here was measured. A kernel's time is the largest of what its bytes, its loads in flight, its issue slots and
each execution unit need (:mod:`.model`). The instructions come from the compiled kernel (:mod:`.sass`), grid and
shared memory from the operator's own host code (:mod:`.launches`). How often a loop runs in all follows from the
shape: a module per stem says how.

    python -m benchmarks.estimates                      every case, from the objects that a build for sm_90a left
    python -m benchmarks.estimates --write              the same into h100.json, and from there into docs/PERFORMANCE.md
    python -m benchmarks.estimates --measure --json F   on a GPU: each case's operator timed, beside h100.json
"""
