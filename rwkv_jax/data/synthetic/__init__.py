"""Synthetic tasks: data that is drawn, not read, with exact answers. `data.source = "synthetic:mqar(num_pairs=4)"`.

task.py            what a task is, and how rows are laid out
draws.py           random numbers of rows
recall.py          MQAR, recall at a distance, induction, a needle in a haystack
sequences.py       copying, selective copying, reversal, sorting, addition
state_tracking.py  parity, modular addition, word problems of permutations
tasks.py           the table, and the names in configs
source.py          a task as the data of a run
"""
