"""What surrounds a run: options, signals, the machine, the directory on disk, logs and workers.

Nothing here knows of Cal-QL: functions take plain values (names, numbers, paths, functions).
"""
