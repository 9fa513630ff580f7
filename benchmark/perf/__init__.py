"""``python -m benchmark.perf``: how fast and how small this project's code is beside what a user would run instead.

``entries`` lists what is measured, ``harness`` runs both sides in processes of their own and compares them, ``worker``
is such a process, ``machine`` measures what the hardware can do, and every entry has a module with its inputs, both
sides and the work that cannot be avoided.
"""
