"""A fuzzer: random models, batches, losses and options from one integer, against oracles made of torch alone.

    draw ──► pieces (harmless · modules · hostile) ──► a case ──► checks against oracles ──► verdict by construct

`python -m tests.fuzz --cases 20000 --hostile` runs it, `--only SEED` shows one case in full.
"""
