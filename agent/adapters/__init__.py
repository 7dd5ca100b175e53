"""The outside: files, processes, GPUs. Typed facts come in, typed requests go out."""
