"""The first half hour on a card: whether the kernels are right there, and the times that decide their design.

    python -m experiments.benchmarks.first_card --part=1 --out=FOLDER

`__main__` runs the steps of `plan`, each in a process of its own; `step` is that process. It needs only what
`pallas_kernels` and the models need: no ml_collections, grain or tensorboardX.
"""
