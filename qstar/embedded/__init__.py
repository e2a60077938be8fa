"""The embedded default: a task, a corpus and a small decoder on which thoughts help, without network or GPU."""
