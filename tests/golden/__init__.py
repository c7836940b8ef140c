"""Files of jlora's own formats as each release wrote them; `make.py` adds a folder for a release, none is changed."""

ADAPTERS, TO_MERGE, BASE, MERGED, PARTIAL = "adapters", "to_merge", "base", "merged", "partial"
EXPECTED = "expected.json"
MACHINE = "jlora.checkpoints._rewrite._machine"  # what a journal says of the machine, which is another one now
