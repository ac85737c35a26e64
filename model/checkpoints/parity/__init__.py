"""Numbers recorded from the released code, run again through ours: one function per kind of case.

Imports the networks and what loads them; `cases.py` has the table of kinds.
"""
