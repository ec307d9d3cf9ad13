"""fi_runtime: the runtime behind the Triton doors.

``frontend`` runs inside Triton's Python backend, ``engine`` in a process of its own that owns the
device; what both need, ``messages`` and ``config`` above all, lies beside them.
"""
