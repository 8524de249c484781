"""ListOps, the data: grammar, generator, official files, baselines, builder. The task is `lra/listops.py`.

Nothing is imported here: a generating process loads NumPy and two small files, not JAX.
"""
