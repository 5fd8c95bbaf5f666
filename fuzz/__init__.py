"""Fuzzing of everything that reads what others may have written. ``python -m fuzz all --cases 1000`` runs it; see ``docs/reliability.md``.

:mod:`fuzz.targets` has one small file for each reader. :mod:`fuzz.mutation` changes files with knowledge of their structure, and
:mod:`fuzz.run` runs the cases in a process of their own, where a hang, a crash and memory can be measured.
"""
