"""What a run leaves behind: its folder, its record, and the ways to look at them.

Nothing in here imports JAX, so that reading the records of finished runs costs no start-up time:

- :mod:`~mtl_jax.report.folder`: run ids, the lock, atomic files and the ledger of the test part;
- :mod:`~mtl_jax.report.record`: the schema of ``result.json``;
- :mod:`~mtl_jax.report.compare`: a record against its trivial baselines and against single-task training;
- :mod:`~mtl_jax.report.find`: finished records under an outputs folder;
- :mod:`~mtl_jax.report.terminal` and :mod:`~mtl_jax.report.plot`: one run as a table and as a figure.
"""
